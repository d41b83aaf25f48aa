"""Encode vectors byte for byte as faiss does: whole vectors, one byte per dimension, or product quantisation.

Codecs turn float32 rows, vectors or residuals, into bytes on the rows' device, and back in host memory.
Product quantisation (Jégou et al. 2011) stores the nearest of 256 centroids for each of M pieces of a vector;
encoding, and each training iteration, costs 256·d multiply-adds per vector. The rotation before it (OPQ,
non-parametric, Ge et al. 2013) alternates between encoding a sample and solving for the best rotation, at d³.
Results are deterministic for a seed and device; ties may differ from faiss, as sums are ordered differently.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retrotool.lazy import faiss, torch

Codes = npt.NDArray[np.uint8]
CENTROIDS = 256
_ENCODE_ROWS = {"cpu": 1 << 10, "cuda": 1 << 18}  # scores of a piece should fit a CPU's cache
_WIDE, _NARROW_ROWS = 8, 1 << 14  # dimensions of a piece that are compared at once; vectors at a time
_ITERATIONS = 8
_ROTATIONS = 4
_ROTATION_ROWS = 1 << 14
_CROSS_ROWS = 1 << 10
_MOVED = 1 / 64  # relative distance by which the centroid of a single vector's piece is moved
SAMPLE = 1 << 15  # most vectors used for training: 128 per centroid


@dataclass(frozen=True, slots=True)
class Whole:
    """Whole vectors, as float16 or float32."""

    d: int
    dtype: str = "float16"

    @property
    def size(self) -> int:
        """Bytes of a code."""
        return self.d * np.dtype(self.dtype).itemsize

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Encode float32 [n, d] as uint8 [n, size]."""
        if not len(rows):  # torch can't view an empty tensor as bytes
            return torch.empty(0, self.size, dtype=torch.uint8, device=rows.device)
        return rows.to(getattr(torch, self.dtype)).contiguous().view(torch.uint8)

    def decode(self, codes: Codes) -> torch.Tensor:
        """Decode codes [n, size] to float32 [n, d]."""
        return torch.from_numpy(np.ascontiguousarray(codes).view(self.dtype).astype(np.float32))


@dataclass(frozen=True, eq=False, slots=True)
class Scalar:
    """One byte per dimension: 256 steps from ``least`` [d] over ``extent`` [d], both float32."""

    least: npt.NDArray[np.float32]
    extent: npt.NDArray[np.float32]

    @property
    def d(self) -> int:
        """Dimensions, and bytes of a code."""
        return len(self.least)

    size = d

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Encode float32 [n, d] as uint8 [n, d]."""
        least, extent = (torch.from_numpy(a).to(rows.device) for a in (self.least, self.extent))
        share = torch.where(extent == 0, torch.zeros_like(rows), (rows - least) / extent)
        return (share.clamp_(0, 1) * 255).to(torch.uint8)

    def decode(self, codes: Codes) -> torch.Tensor:
        """Decode codes [n, d] to the middles of their steps, float32 [n, d]."""
        # As in faiss, a step is 1/255 wide: the last one begins at the largest value.
        share = torch.from_numpy(codes.astype(np.float32)).add_(0.5).div_(255)
        return share.mul_(torch.from_numpy(self.extent)).add_(torch.from_numpy(self.least))

    @classmethod
    def train(cls, rows: torch.Tensor, *, seed: int = 0) -> Scalar:
        """Fit to float32 [n, d]. Ranges are widened a little, as their ends are values of single vectors."""
        least, most = rows.amin(0).cpu(), rows.amax(0).cpu()
        generator = torch.Generator().manual_seed(seed)
        below, above = (torch.rand(2, len(least), generator=generator) + 1) * (most - least) / 256
        return cls((least - below).numpy(), (most - least + below + above).numpy())


@dataclass(frozen=True, eq=False, slots=True)
class Product:
    """M bytes per vector. ``table``, float32 [M, 256, d / M]: the centroids of each piece."""

    table: npt.NDArray[np.float32]

    @property
    def d(self) -> int:
        """Dimensions."""
        return int(self.table.shape[0] * self.table.shape[2])

    @property
    def size(self) -> int:
        """Bytes of a code."""
        return int(self.table.shape[0])

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Encode float32 [n, d] as uint8 [n, M]."""
        return encode_pieces(rows, torch.from_numpy(self.table).to(rows.device))

    def decode(self, codes: Codes) -> torch.Tensor:
        """Decode codes [n, M] to float32 [n, d]."""
        return _decode(torch.from_numpy(codes.astype(np.int32)), torch.from_numpy(self.table))


Codec = Whole | Scalar | Product


def encode_pieces(rows: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return each piece's nearest centroid in ``table`` [M, 256, d / M], uint8 [n, M], for float32 [n, d]."""
    m, _, width = table.shape
    if rows.device.type == "cpu" and width <= _WIDE and "AVX" in faiss.get_compile_options():
        return _encode_narrow(rows, table)
    half_norms = table.square().sum(2) / 2
    codes = torch.empty(len(rows), m, dtype=torch.uint8, device=rows.device)
    for start in range(0, len(rows), _ENCODE_ROWS[rows.device.type]):
        some = rows[start : start + _ENCODE_ROWS[rows.device.type]]
        # Scores of all pieces at once, M·256 numbers per vector, would not fit the cache.
        for i in range(m):
            scores = torch.addmm(-half_norms[i], some[:, i * width : (i + 1) * width], table[i].T)
            codes[start : start + len(some), i] = scores.max(1).indices  # quicker than argmax
    return codes


def _encode_narrow(rows: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Do the same by faiss, which keeps pieces of 8 dimensions in registers: 2.6 times as fast."""
    m, _, width = table.shape
    centroids = np.zeros((m, CENTROIDS, _WIDE), np.float32)
    centroids[:, :, :width] = table.numpy()
    quantizer = faiss.ProductQuantizer(m * _WIDE, m, 8)
    faiss.copy_array_to_vector(centroids.ravel(), quantizer.centroids)
    codes = torch.empty(len(rows), m, dtype=torch.uint8)
    wide = np.zeros((min(len(rows), _NARROW_ROWS), m, _WIDE), np.float32)
    for start in range(0, len(rows), _NARROW_ROWS):
        some = rows[start : start + _NARROW_ROWS]
        wide[: len(some), :, :width] = some.view(len(some), m, width).numpy()
        found = quantizer.compute_codes(wide[: len(some)].reshape(len(some), m * _WIDE))
        codes[start : start + len(some)] = torch.from_numpy(found)
    return codes


def train_product(rows: torch.Tensor, pieces: int, *, seed: int = 0) -> torch.Tensor:
    """Return centroids, float32 [pieces, 256, d / pieces], trained on float32 [n, d], n ≥ 1.

    Centroids are rounded to bfloat16, and those of single vectors are moved: the table stays in the store
    after a chunk is erased, and such a centroid and its list's would reveal the vector.
    """
    table = _improve(rows, _first(rows, pieces, seed), _ITERATIONS)
    place = encode_pieces(rows, table).int() + _firsts(table)
    alone = torch.bincount(place.flatten(), minlength=pieces * CENTROIDS).view(pieces, CENTROIDS) <= 1
    generator = torch.Generator().manual_seed(seed)
    signs = 2.0 * torch.randint(0, 2, table.shape, generator=generator).to(table.device) - 1
    usual = table.square().mean(2, keepdim=True).sqrt()
    moved = table + _MOVED * torch.maximum(table.abs(), usual) * signs
    return torch.where(alone.unsqueeze(2), moved, table).to(torch.bfloat16).float()


def train_rotation(rows: torch.Tensor, pieces: int, d: int, *, seed: int = 0) -> torch.Tensor:
    """Return a rotation, float32 [d, d_in], for coding float32 [n, d_in]; d < d_in keeps most variance."""
    sample = rows[:_ROTATION_ROWS]
    rotation = _start(sample, pieces, d, seed)
    rotated = sample @ rotation.T
    table = _improve(rotated, _first(rotated, pieces, seed), _ITERATIONS // 2)
    for _ in range(_ROTATIONS):
        coded = _decode(encode_pieces(rotated, table), table)
        left, _, right = torch.linalg.svd(_cross(coded, sample).cpu(), full_matrices=False)  # slower on a GPU
        del coded
        rotation = torch.matmul(left, right).float().to(sample.device)
        rotated = sample @ rotation.T
        table = _improve(rotated, table, 1)
    return rotation


def _cross(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return oneᵀ · other, float64 [d, d'], of float32 [n, d] and [n, d'], in blocks to save memory."""
    blocks = zip(torch.split(one, _CROSS_ROWS), torch.split(other, _CROSS_ROWS), strict=True)
    return sum((a.T.double() @ b.double() for a, b in blocks), start=one.new_zeros((), dtype=torch.float64))


def _start(rows: torch.Tensor, pieces: int, d: int, seed: int) -> torch.Tensor:
    """Return the principal directions, distributed over the pieces for equal variance."""
    if len(rows) < 2 * d:  # too few to estimate directions
        generator = torch.Generator().manual_seed(seed)
        random = torch.randn(rows.shape[1], rows.shape[1], generator=generator, dtype=torch.float64)
        turned: torch.Tensor = torch.linalg.qr(random)[0]
        return turned[:d].float().to(rows.device)
    mean = rows.mean(0, dtype=torch.float64)
    variances, directions = torch.linalg.eigh(_cross(rows, rows) / len(rows) - torch.outer(mean, mean))
    weight = [0.0] * pieces
    dealt: list[list[int]] = [[] for _ in range(pieces)]
    # The paper's greedy allocation, by sums instead of products.
    for direction in torch.argsort(variances, descending=True)[:d].tolist():
        piece = min((p for p in range(pieces) if len(dealt[p]) < d // pieces), key=weight.__getitem__)
        dealt[piece].append(direction)
        weight[piece] += float(variances[direction])
    chosen = torch.tensor([direction for some in dealt for direction in some], device=rows.device)
    basis: torch.Tensor = directions
    return basis.T[chosen].float().contiguous()


def _first(rows: torch.Tensor, pieces: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(rows), generator=generator)[:CENTROIDS]
    drawn = drawn.repeat(-(-CENTROIDS // len(drawn)))[:CENTROIDS].to(rows.device)
    return rows[drawn].view(CENTROIDS, pieces, -1).transpose(0, 1).contiguous()


def _improve(rows: torch.Tensor, table: torch.Tensor, iterations: int) -> torch.Tensor:
    """Run Lloyd's iterations on all pieces; empty centroids take pieces of the first (random) rows."""
    pieces, _, width = table.shape
    for _ in range(iterations):
        place = encode_pieces(rows, table).int() + _firsts(table)
        counts = torch.bincount(place.flatten(), minlength=pieces * CENTROIDS)
        sums = torch.zeros(pieces * CENTROIDS, width, device=rows.device)
        sums.index_add_(0, place.flatten(), rows.reshape(-1, width))
        means = sums / counts.clamp_min(1).unsqueeze(1)
        empty = torch.nonzero(counts == 0).flatten()
        if len(empty):
            takes = torch.arange(len(empty), device=rows.device) % len(rows)
            means[empty] = rows.view(len(rows), pieces, width)[takes, empty // CENTROIDS]
        table = means.view(table.shape)
    return table


def _decode(codes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    place = codes.int() + _firsts(table)
    return table.view(-1, table.shape[2]).index_select(0, place.flatten()).view(len(codes), -1)


def _firsts(table: torch.Tensor) -> torch.Tensor:
    return torch.arange(0, table.shape[0] * CENTROIDS, CENTROIDS, dtype=torch.int32, device=table.device)

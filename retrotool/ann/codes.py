"""Codes of vectors, byte for byte as faiss has them: whole vectors, one byte a dimension, or product quantisation.

A codec turns float32 rows into rows of bytes and back. ``encode`` runs on the device that its input is on; ``decode``
takes and gives host memory. What is encoded is a vector or its residual to its centroid, as the index says.

Product quantisation (Jégou et al. 2011) cuts a vector into M pieces and names for each the nearest of 256 centroids of
its own. Cost of encoding: 256·d multiply-adds a vector. Sums are in another order than faiss's, so where two centroids
are equally near, up to float32, either may be named.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Codes = npt.NDArray[np.uint8]
CENTROIDS = 256
"""Centroids of a piece: a code is a byte."""
_ENCODE_ROWS = {"cpu": 1 << 12, "cuda": 1 << 18}


@dataclass(frozen=True, slots=True)
class Whole:
    """The numbers themselves, as float16 or float32."""

    d: int
    dtype: str = "float16"

    @property
    def size(self) -> int:
        """Bytes of a code."""
        return self.d * np.dtype(self.dtype).itemsize

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Codes, uint8 [n, size], of float32 [n, d]."""
        import torch

        if not len(rows):  # torch has no view of it
            return torch.empty(0, self.size, dtype=torch.uint8, device=rows.device)
        return rows.to(getattr(torch, self.dtype)).contiguous().view(torch.uint8)

    def decode(self, codes: Codes) -> torch.Tensor:
        """What codes [n, size] stand for, float32 [n, d]."""
        import torch

        return torch.from_numpy(np.ascontiguousarray(codes).view(self.dtype).astype(np.float32))


@dataclass(frozen=True, eq=False, slots=True)
class Scalar:
    """A byte a dimension: 256 steps from ``least`` [d] over ``extent`` [d], both float32."""

    least: npt.NDArray[np.float32]
    extent: npt.NDArray[np.float32]

    @property
    def d(self) -> int:
        """Dimensions."""
        return len(self.least)

    @property
    def size(self) -> int:
        """Bytes of a code."""
        return len(self.least)

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Codes, uint8 [n, d], of float32 [n, d]."""
        import torch

        least, extent = (torch.from_numpy(a).to(rows.device) for a in (self.least, self.extent))
        share = torch.where(extent == 0, torch.zeros_like(rows), (rows - least) / extent)
        return (share.clamp_(0, 1) * 255).to(torch.uint8)

    def decode(self, codes: Codes) -> torch.Tensor:
        """What codes [n, d] stand for, the middles of the steps, float32 [n, d]."""
        import torch

        # A step is 1/255 wide, as in faiss: the last one begins at the largest value.
        share = torch.from_numpy(codes.astype(np.float32)).add_(0.5).div_(255)
        return share.mul_(torch.from_numpy(self.extent)).add_(torch.from_numpy(self.least))

    @classmethod
    def train(cls, rows: torch.Tensor, *, seed: int = 0) -> Scalar:
        """The range of each dimension of float32 [n, d], a little widened: its ends are numbers of some vector."""
        import torch

        least, most = rows.amin(0).cpu(), rows.amax(0).cpu()
        generator = torch.Generator().manual_seed(seed)
        below, above = (torch.rand(2, len(least), generator=generator) + 1) * (most - least) / 256
        return cls((least - below).numpy(), (most - least + below + above).numpy())


@dataclass(frozen=True, eq=False, slots=True)
class Product:
    """M bytes a vector: ``table``, float32 [M, 256, d / M], has the centroids of each piece."""

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
        """Codes, uint8 [n, M], of float32 [n, d]."""
        import torch

        return encode_pieces(rows, torch.from_numpy(self.table).to(rows.device))

    def decode(self, codes: Codes) -> torch.Tensor:
        """What codes [n, M] stand for, float32 [n, d]."""
        import torch

        place = torch.from_numpy(codes.astype(np.int32)).add_(self._firsts())
        flat = torch.from_numpy(self.table).view(-1, self.table.shape[2])
        return flat.index_select(0, place.view(-1)).view(len(codes), -1)

    def _firsts(self) -> torch.Tensor:
        import torch

        return torch.arange(0, CENTROIDS * self.size, CENTROIDS, dtype=torch.int32)


Codec = Whole | Scalar | Product
"""How vectors of ``d`` dimensions are coded, in ``size`` bytes."""


def encode_pieces(rows: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The nearest of each piece's centroids ``table`` [M, 256, d / M], uint8 [n, M], for float32 [n, d]."""
    import torch

    m, _, width = table.shape
    half_norms = table.square().sum(2) / 2
    codes = torch.empty(len(rows), m, dtype=torch.uint8, device=rows.device)
    for start in range(0, len(rows), _ENCODE_ROWS[rows.device.type]):
        some = rows[start : start + _ENCODE_ROWS[rows.device.type]]
        # Piece by piece: all at once would be M·256 numbers a vector, which no cache holds.
        for i in range(m):
            scores = torch.addmm(-half_norms[i], some[:, i * width : (i + 1) * width], table[i].T)
            codes[start : start + len(some), i] = scores.argmax(1)
    return codes


def is_same_codec(one: Codec, other: Codec) -> bool:
    """Whether two codecs are the same to the bit."""

    def fields(codec: Any) -> list[Any]:
        return [
            value.tobytes() if isinstance(value, np.ndarray) else value
            for value in (getattr(codec, name) for name in codec.__dataclass_fields__)
        ]

    return type(one) is type(other) and fields(one) == fields(other)

"""Choose an index by arithmetic alone; no vector is read.

1. ``--factory``, ``--nlist`` and ``--code`` are obeyed where given.
2. Up to ``FLAT_LIMIT`` vectors: exact search, hardly slower than an index and more accurate.
3. Lists: a power of two near 4√n, so that choosing lists costs about as much as scanning them.
4. Codes: OPQ of ``DEFAULT_CODE`` bytes, or the longest that fits ``--memory``; candidates are re-ranked.
   Whole vectors if they are no longer than a code, or if the target recall is too high for codes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from retrotool.errors import UsageError

TARGET_RECALL = 0.95
FLAT_LIMIT = 1 << 15
DEFAULT_CODE = 64
ID_BYTES = 8
SAMPLES_PER_LIST = 64
ITERATIONS = 8
MIN_FOR_PRODUCT = 39 * 256  # vectors: with fewer than 39 per centroid, product codes overfit
_MIN_PER_LIST = 39
_SAMPLES_AT_LEAST = 16
_SHORTEST = 4
_LADDER = (128, 96, 64, 48, 32, 24, 16, 12, 8)  # code lengths in bytes, rounded down to divisors of d
_TOO_FINE_FOR_CODES = 0.999
_FACTORY = re.compile(
    r"(?:OPQ([1-9]\d*)(?:_([1-9]\d*))?,)?(?:IVF([1-9]\d*),)?(?:(Flat)|(SQfp16)|(SQ8)|PQ([1-9]\d*)(?:x8)?(?:np)?)"
)
_CODE = re.compile(r"float16|float32|sq8|(o?)pq([1-9]\d*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexShape:
    """An index described for people; ``factory`` is the faiss string, bytes are those held in memory."""

    factory: str
    kind: str = "not measured yet"
    why: str = ""
    nlist: int = 0
    bytes_per_vector: int = 0
    trained_bytes: int = 0


@dataclass(frozen=True, slots=True)
class IndexChoice:
    """An index for ``d`` dimensions; ``nlist`` 0: no lists, ``rotated`` 0: no rotation."""

    d: int
    nlist: int = 0
    code: str = "float16"
    rotated: int = 0
    why: str = ""

    @property
    def pieces(self) -> int:
        """Pieces of a product code; 0 for other codes."""
        return int(self.code[2:]) if self.code.startswith("pq") else 0

    @property
    def coded(self) -> int:
        """Dimensions that are coded."""
        return self.rotated or self.d

    @property
    def code_bytes(self) -> int:
        """Bytes of a code."""
        whole = {"float16": 2 * self.coded, "float32": 4 * self.coded, "sq8": self.coded}
        return self.pieces or whole[self.code]

    @property
    def bytes_per_vector(self) -> int:
        """Bytes of a code and its id."""
        return self.code_bytes + ID_BYTES

    @property
    def trained_bytes(self) -> int:
        """Bytes of centroids, rotation and tables."""
        table = 4 * 256 * self.coded if self.pieces else 8 * self.d if self.code == "sq8" else 0
        return 4 * self.nlist * self.coded + 4 * self.rotated * self.d + table

    @property
    def factory(self) -> str:
        """The faiss string."""
        codes = {"float16": "SQfp16", "float32": "Flat", "sq8": "SQ8"}
        words = [codes.get(self.code, f"PQ{self.pieces}")]
        if self.nlist:
            words.insert(0, f"IVF{self.nlist}")
        if self.rotated:
            words.insert(0, f"OPQ{self.pieces}" + (f"_{self.rotated}" if self.rotated != self.d else ""))
        return ",".join(words)

    def shape(self) -> IndexShape:
        """Return the description for records and results."""
        codes = {"float16": "float16", "float32": "float32", "sq8": "a byte a dimension"}
        code = codes.get(self.code, f"{'rotated ' if self.rotated else ''}product codes of {self.pieces} bytes")
        return IndexShape(
            factory=self.factory,
            kind=f"{_lists_of(self.nlist)}, {code}" if self.nlist else f"exact, {code}",
            why=self.why,
            nlist=self.nlist,
            bytes_per_vector=self.bytes_per_vector,
            trained_bytes=self.trained_bytes,
        )


@dataclass(frozen=True, slots=True)
class IndexOptions:
    """What the user requested; None: choose. ``memory`` is in bytes, ``shard_rows`` in vectors."""

    target: float = TARGET_RECALL
    memory: int | None = None
    nlist: int | None = None
    code: str | None = None
    factory: str | None = None
    shard_rows: int | None = None

    @property
    def names_index(self) -> bool:
        """Whether the options name an index, in whole or in part."""
        return any(one is not None for one in (self.nlist, self.code, self.factory))


def choose_index(n: int, d: int, wanted: IndexOptions | None = None) -> IndexChoice:
    """Return the index for n vectors of d dimensions; raise ``UsageError`` if the request can't be met."""
    wanted = wanted or IndexOptions()
    if wanted.factory is not None:
        if wanted.nlist is not None or wanted.code is not None:
            raise UsageError("--factory already sets the lists and the code", "Omit --nlist and --code.")
        return _check(n, parse_factory(wanted.factory, d))
    nlist = _lists(n, d, wanted) if wanted.nlist is None else wanted.nlist
    if wanted.code is not None:
        chosen = replace(_parse_code(wanted.code, d), nlist=nlist, why="as requested")
        if not nlist and wanted.nlist is None and chosen.code not in ("float16", "float32"):
            chosen = replace(chosen, nlist=count_lists(n))
        return _check(n, chosen)
    if nlist:
        return _check(n, _code(n, d, nlist, wanted))
    return IndexChoice(d, why="as requested" if wanted.nlist is not None else "few enough for exact search")


def count_lists(n: int) -> int:
    """Return the number of lists for n vectors: a power of two near 4√n, at least 39 vectors per list."""
    if n < _MIN_PER_LIST:
        return 1
    return 1 << min(round(math.log2(4 * math.sqrt(n))), math.floor(math.log2(n / _MIN_PER_LIST)))


def _lists_of(nlist: int) -> str:
    return f"{nlist:,} list" if nlist == 1 else f"{nlist:,} lists"


def _lists(n: int, d: int, wanted: IndexOptions) -> int:
    fits = wanted.memory is None or n * (2 * d + ID_BYTES) <= wanted.memory
    if n <= FLAT_LIMIT and (fits or n < MIN_FOR_PRODUCT):
        return 0
    nlist = count_lists(n)
    while wanted.memory is not None and nlist > 1 and nlist * _SAMPLES_AT_LEAST * 4 * d > wanted.memory:
        nlist //= 2  # the training sample, in float16, takes half of the memory
    return nlist


def _code(n: int, d: int, nlist: int, wanted: IndexOptions) -> IndexChoice:
    def fits(choice: IndexChoice) -> bool:
        return wanted.memory is None or n * choice.bytes_per_vector + choice.trained_bytes <= wanted.memory

    whole = IndexChoice(d, nlist)
    pieces = _pieces(d) if n >= MIN_FOR_PRODUCT else []
    ladder = [replace(whole, code=f"pq{m}", rotated=d) for m in pieces] or [replace(whole, code="sq8")]
    if wanted.memory is None and whole.code_bytes <= DEFAULT_CODE:
        return replace(whole, why=f"whole vectors are no longer than codes of {DEFAULT_CODE} bytes")
    if wanted.target >= _TOO_FINE_FOR_CODES:
        why = f"codes are too coarse for a recall of {wanted.target}"
        return replace(whole, why=why if fits(whole) else f"{why}; the index exceeds --memory and is read from disk")
    default = next((one for one in ladder if one.code_bytes <= DEFAULT_CODE), ladder[-1])
    if wanted.memory is None:
        return replace(default, why=f"{default.bytes_per_vector} bytes a vector suffice, as candidates are re-ranked")
    for one in [whole, *ladder]:
        if fits(one):
            return replace(one, why=f"the longest code with which {n:,} vectors fit --memory")
    return replace(ladder[-1], why=f"no code of {n:,} vectors fits --memory; shards are read from disk")


def _pieces(d: int) -> list[int]:
    """Return product code lengths for d dimensions, longest first, at least two dimensions per piece."""
    divisors = [m for m in range(1, d // 2 + 1) if d % m == 0]
    found = [max((m for m in divisors if m <= length), default=0) for length in _LADDER]
    return [m for m in dict.fromkeys(found) if m >= _SHORTEST]


def parse_factory(text: str, d: int) -> IndexChoice:
    """Parse a faiss string; raise ``UsageError`` if retrotool does not build that index."""
    match = _FACTORY.fullmatch(text.replace(" ", ""))
    if match is None:
        raise UsageError(
            f"--factory {text!r} is not supported",
            "Supported: Flat, SQfp16, and IVFn followed by Flat, SQfp16, SQ8 or PQm, such as OPQ64,IVF4096,PQ64.",
        )
    opq, rotated, nlist, flat, half, byte, pieces = match.groups()
    code = "float32" if flat else "float16" if half else "sq8" if byte else f"pq{int(pieces)}"
    if (opq and not pieces) or (opq and int(opq) != int(pieces)):
        raise UsageError(f"--factory {text!r}: OPQ{opq} must be followed by PQ{opq}")
    turned = int(rotated or d) if opq else 0
    return IndexChoice(d, int(nlist or 0), code, turned, "as requested")


def _parse_code(text: str, d: int) -> IndexChoice:
    match = _CODE.fullmatch(text.lower())
    if match is None:
        raise UsageError(f"--code {text!r} is unknown", "Use float16, float32, sq8, pqM or opqM, such as opq64.")
    if match[2] is None:
        return IndexChoice(d, code=text.lower())
    return IndexChoice(d, code=f"pq{int(match[2])}", rotated=d if match[1] else 0)


def _check(n: int, choice: IndexChoice) -> IndexChoice:
    name, d, pieces = choice.factory, choice.coded, choice.pieces
    if not choice.nlist and choice.code not in ("float16", "float32"):
        raise UsageError(f"{name}: codes need lists", f"Use for example IVF{count_lists(n)},{name}.")
    if choice.nlist > n or choice.nlist < 0:
        advice = (
            f"Try --nlist {count_lists(n)}, without --factory."
            if n
            else "There is nothing to train on: drop the index."
        )
        raise UsageError(f"{_lists_of(choice.nlist)} need at least as many vectors; there are {n:,}", advice)
    if pieces and d % pieces:
        good = [str(m) for m in range(2 * pieces, 0, -1) if d % m == 0]
        advice = f"Possible numbers of pieces: {', '.join(good[:6])}."
        raise UsageError(f"{name}: {d} dimensions can't be cut into {pieces} equal pieces", advice)
    if d > choice.d:
        raise UsageError(f"{name}: the rotation can't have more dimensions ({d}) than the vectors ({choice.d})")
    if pieces and n < MIN_FOR_PRODUCT:
        raise UsageError(
            f"{name}: product codes need {MIN_FOR_PRODUCT:,} vectors to train on; there are {n:,}",
            "Omit the option, or use --code sq8.",
        )
    return choice

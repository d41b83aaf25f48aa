"""Which index suits so many vectors: exact, inverted lists of whole vectors, or inverted lists of codes.

1. What ``--factory``, ``--nlist`` and ``--code`` say.
2. Up to ``FLAT_LIMIT`` vectors, exact: no index is faster by much, and none is as good.
3. Lists: a power of two near 4√n, so that finding lists and going through them cost about the same.
4. Codes: product codes of ``DEFAULT_CODE`` bytes, with a rotation (OPQ), whose candidates are re-ranked by the stored
   embeddings. With ``--memory`` the longest code of the ladder that fits. Whole vectors where they are no longer than
   a code, and for targets that codes are too coarse for.

No vector is looked at here; nothing but arithmetic.
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
SAMPLES_A_LIST = 64
ITERATIONS = 8
LEAST_FOR_PRODUCT = 39 * 256
"""Vectors that product codes need: fewer than 39 a centroid would be learnt by heart."""
_LEAST_A_LIST = 39
_SAMPLES_AT_LEAST = 16
_SHORTEST = 4
_LADDER = (128, 96, 64, 48, 32, 24, 16, 12, 8)
"""Bytes of the codes to choose from; of each the next shorter one that divides the dimensions."""
_TOO_FINE_FOR_CODES = 0.999
_FACTORY = re.compile(
    r"(?:OPQ([1-9]\d*)(?:_([1-9]\d*))?,)?(?:IVF([1-9]\d*),)?(?:(Flat)|(SQfp16)|(SQ8)|PQ([1-9]\d*)(?:x8)?(?:np)?)"
)
_CODE = re.compile(r"float16|float32|sq8|(o?)pq([1-9]\d*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexShape:
    """What an index is, for people: its ``kind`` in words, and ``why`` it is that one.

    ``factory`` is the faiss string. In memory a vector takes ``bytes_per_vector``, its code and id, and all of them
    ``trained_bytes`` besides: centroids, rotation and tables.
    """

    factory: str
    kind: str = "not measured yet"
    why: str = ""
    nlist: int = 0
    bytes_per_vector: int = 0
    trained_bytes: int = 0


@dataclass(frozen=True, slots=True)
class IndexChoice:
    """An index for vectors of ``d`` dimensions.

    ``nlist`` 0: no lists. ``code``: float16, float32, sq8 or pqM, of ``rotated`` dimensions after a rotation (0: there
    is none). ``why`` is for people.
    """

    d: int
    nlist: int = 0
    code: str = "float16"
    rotated: int = 0
    why: str = ""

    @property
    def pieces(self) -> int:
        """Pieces of a product code; 0: it is none."""
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
        """What records and results say of it."""
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
class IndexWishes:
    """What a person asked for; None: choose. ``memory`` is in bytes, ``shard_rows`` are the vectors of a shard."""

    target: float = TARGET_RECALL
    memory: int | None = None
    nlist: int | None = None
    code: str | None = None
    factory: str | None = None
    shard_rows: int | None = None

    @property
    def names_index(self) -> bool:
        """Whether it says, in whole or in part, which index."""
        return any(one is not None for one in (self.nlist, self.code, self.factory))


def choose_index(n: int, d: int, wanted: IndexWishes | None = None) -> IndexChoice:
    """The index for n vectors of d dimensions; ``UsageError`` for a wish that can't be had."""
    wanted = wanted or IndexWishes()
    if wanted.factory is not None:
        if wanted.nlist is not None or wanted.code is not None:
            raise UsageError("--factory says all that --nlist and --code would", "Give it alone.")
        return _check(n, parse_factory(wanted.factory, d))
    nlist = _lists(n, d, wanted) if wanted.nlist is None else wanted.nlist
    if wanted.code is not None:
        chosen = replace(_parse_code(wanted.code, d), nlist=nlist, why="as asked")
        if not nlist and wanted.nlist is None and chosen.code not in ("float16", "float32"):
            chosen = replace(chosen, nlist=count_lists(n))
        return _check(n, chosen)
    if nlist:
        return _check(n, _code(n, d, nlist, wanted))
    return IndexChoice(d, why="as asked" if wanted.nlist is not None else "few enough for exact search")


def count_lists(n: int) -> int:
    """Lists for n vectors: a power of two near 4√n, with at least 39 vectors a list."""
    if n < _LEAST_A_LIST:
        return 1
    return 1 << min(round(math.log2(4 * math.sqrt(n))), math.floor(math.log2(n / _LEAST_A_LIST)))


def _lists_of(nlist: int) -> str:
    return f"{nlist:,} list" if nlist == 1 else f"{nlist:,} lists"


def _lists(n: int, d: int, wanted: IndexWishes) -> int:
    fits = wanted.memory is None or n * (2 * d + ID_BYTES) <= wanted.memory
    if n <= FLAT_LIMIT and (fits or n < LEAST_FOR_PRODUCT):
        return 0
    nlist = count_lists(n)
    while wanted.memory is not None and nlist > 1 and nlist * _SAMPLES_AT_LEAST * 4 * d > wanted.memory:
        nlist //= 2  # training holds its sample, as float16, in half of the memory
    return nlist


def _code(n: int, d: int, nlist: int, wanted: IndexWishes) -> IndexChoice:
    def fits(choice: IndexChoice) -> bool:
        return wanted.memory is None or n * choice.bytes_per_vector + choice.trained_bytes <= wanted.memory

    whole = IndexChoice(d, nlist)
    if n < LEAST_FOR_PRODUCT:
        ladder = [replace(whole, code="sq8")]
    else:
        ladder = [replace(whole, code=f"pq{m}", rotated=d) for m in _pieces(d)] or [replace(whole, code="sq8")]
    if wanted.memory is None and whole.code_bytes <= DEFAULT_CODE:
        return replace(whole, why=f"whole vectors are no longer than codes of {DEFAULT_CODE} bytes")
    if wanted.target >= _TOO_FINE_FOR_CODES:
        why = f"for a recall of {wanted.target} codes are too coarse"
        return replace(whole, why=why if fits(whole) else f"{why}; it does not fit --memory, and is read from disk")
    default = next((one for one in ladder if one.code_bytes <= DEFAULT_CODE), ladder[-1])
    if wanted.memory is None:
        return replace(
            default, why=f"{default.bytes_per_vector} bytes a vector are enough where candidates are ranked again"
        )
    for one in [whole, *ladder]:
        if fits(one):
            return replace(one, why=f"the longest codes of which {n:,} fit --memory")
    return replace(ladder[-1], why=f"no code of {n:,} vectors fits --memory: shards are read from disk when needed")


def _pieces(d: int) -> list[int]:
    """Lengths of product codes for d dimensions, longest first: at least two dimensions a piece."""
    divisors = [m for m in range(1, d // 2 + 1) if d % m == 0]
    found = [max((m for m in divisors if m <= length), default=0) for length in _LADDER]
    return [m for m in dict.fromkeys(found) if m >= _SHORTEST]


def parse_factory(text: str, d: int) -> IndexChoice:
    """The index that a faiss string names; ``UsageError`` if it is not one of those that retrotool makes."""
    match = _FACTORY.fullmatch(text.replace(" ", ""))
    if match is None:
        raise UsageError(
            f"--factory {text!r} is no index that retrotool makes",
            "It makes Flat and SQfp16, and IVFn, before Flat, SQfp16, SQ8 or PQm, such as OPQ64,IVF4096,PQ64: "
            "of these single vectors can be erased, and shards can be merged.",
        )
    opq, rotated, nlist, flat, half, byte, pieces = match.groups()
    code = "float32" if flat else "float16" if half else "sq8" if byte else f"pq{int(pieces)}"
    if (opq and not pieces) or (opq and int(opq) != int(pieces)):
        raise UsageError(f"--factory {text!r}: OPQ{opq} is the rotation for PQ{opq}")
    turned = int(rotated or d) if opq else 0
    return IndexChoice(d, int(nlist or 0), code, turned, "as asked")


def _parse_code(text: str, d: int) -> IndexChoice:
    match = _CODE.fullmatch(text.lower())
    if match is None:
        known = "float16, float32, sq8, pqM and opqM, such as opq64"
        raise UsageError(f"--code {text!r} is not known", f"Known are {known}.")
    if match[2] is None:
        return IndexChoice(d, code=text.lower())
    return IndexChoice(d, code=f"pq{int(match[2])}", rotated=d if match[1] else 0)


def _check(n: int, choice: IndexChoice) -> IndexChoice:
    """A choice that can be trained with n vectors; ``UsageError`` otherwise."""
    name = choice.factory
    if not choice.nlist and choice.code not in ("float16", "float32"):
        raise UsageError(f"{name}: codes need lists", f"Such as IVF{count_lists(n)},{name}")
    if choice.nlist > n or choice.nlist < 0:
        raise UsageError(
            f"{_lists_of(choice.nlist)}: as many vectors are needed, there are {n:,}",
            f"Try --nlist {count_lists(n)}, without --factory."
            if n
            else "Nothing is left to train on: drop the index.",
        )
    if choice.pieces and (choice.pieces > choice.coded or choice.coded % choice.pieces):
        good = [m for m in range(choice.coded, 0, -1) if choice.coded % m == 0]
        raise UsageError(
            f"{name}: {choice.coded} dimensions can't be cut into {choice.pieces} equal pieces",
            f"Into {', '.join(map(str, [m for m in good if m <= 2 * max(choice.pieces, 1)][:6]))} they can.",
        )
    if choice.rotated > choice.d:
        raise UsageError(f"{name}: a rotation can't make {choice.rotated} dimensions out of {choice.d}")
    if choice.pieces and n < LEAST_FOR_PRODUCT:
        raise UsageError(
            f"{name}: product codes need {LEAST_FOR_PRODUCT:,} vectors to learn from, there are {n:,}",
            "Leave the choice to retrotool, or take --code sq8.",
        )
    return choice

"""Inputs made by code, and ways to read them."""

from __future__ import annotations

import bz2
import gzip
import itertools
import lzma
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import zstandard

from retrotool.sources import Document, Fields, InputFile, Rejected, Slice, find_inputs, read_input
from retrotool.sources.lines import LineCounter

DEFAULT = Fields()
BOM = b"\xef\xbb\xbf"


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


PACK: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "zst": zstd, "bz2": bz2.compress, "xz": lzma.compress}


def input_of(path: Path, data: bytes | None = None) -> InputFile:
    """The input at a path, named as if it were given from its folder."""
    if data is not None:
        path.write_bytes(data)
    (file,) = find_inputs([str(path)])
    return replace(file, name=Path(file.path).name)


def rows_of(path: Path, data: bytes | None = None, **fields: object) -> list[Document | Rejected]:
    return list(read_input(input_of(path, data), Fields(**fields)))


def read_slices(file: InputFile, slices: list[Slice], fields: Fields = DEFAULT) -> list[Document | Rejected]:
    """Rows of all slices, with lines counted from the file's beginning."""
    found: list[Document | Rejected] = []
    counter = LineCounter()
    for where in slices:
        before = counter.before(file, where, fields)
        found += [row._replace(line=row.line + before) for row in read_input(file, fields, where)]
    return found


def byte_ranges(size: int, cuts: list[float]) -> list[Slice]:
    places = sorted({0, size, *(int(cut * size) for cut in cuts)})
    return [Slice(start, end, start, end) for start, end in itertools.pairwise(places)]

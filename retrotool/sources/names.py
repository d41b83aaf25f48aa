"""The names of the fields of rows of JSON, to be told where another was asked for; tables tell theirs themselves."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

import orjson

from retrotool.errors import InputError
from retrotool.sources import json_array, lines, streams
from retrotool.sources.files import WHOLE, InputFile
from retrotool.sources.records import Fields, find

_ROWS = 1000


def names_without(file: InputFile, name: str) -> list[str]:
    """The fields of the first row that lacks the field ``name``, of the first thousand; [] if there is none such."""
    if file.base not in ("jsonl", "json"):
        return []
    limit = lines.line_limit(Fields())
    with contextlib.ExitStack() as stack:
        found = lines.lines_of(file, WHOLE, limit)
        if file.base == "json" and not json_array.is_lines(file, limit):
            stream = stack.enter_context(contextlib.closing(streams.blocks(Path(file.path), file.compression)))
            found = json_array.elements(stream, limit)
        try:
            for line in itertools.islice(found, _ROWS):
                with contextlib.suppress(orjson.JSONDecodeError):
                    row = orjson.loads(line.data or b"")
                    if isinstance(row, dict) and find(row, name) is None:
                        return list(row)
        except (InputError, OSError, streams.BrokenStream, json_array.BrokenSyntax):
            return []  # what is wrong is told of its rows
    return []

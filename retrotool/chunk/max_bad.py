"""``--max-bad``: how much input may be set aside before a run stops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from retrotool.errors import UsageError

_LEAST_ROWS = 1000
"""Rows below which a share says nothing, unless they are all."""


@dataclass(frozen=True, slots=True)
class MaxBad:
    """At most ``rows``, or a ``share`` of all rows read; the rest of a damaged file counts as a row. Neither: any."""

    rows: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, text: str | None) -> MaxBad:
        """From ``100`` or ``0.5%``; ``UsageError`` for anything else."""
        if text is None:
            return cls()
        try:
            if text.endswith("%"):
                share = float(text[:-1]) / 100
                if 0 <= share <= 1:
                    return cls(share=share)
            elif (rows := int(text)) >= 0:
                return cls(rows=rows)
        except ValueError:
            pass
        raise UsageError(f"--max-bad {text}: it is a number of rows, such as 100, or a share, such as 0.5%")

    def exceeded(self, counts: Mapping[str, Any], *, last: bool = False) -> str:
        """Return why a run with these counts must stop; "" if it may go on. ``last``: there is no more to read."""
        bad = counts["set_aside"]
        if self.rows is not None:
            return f"{bad:,} rows were set aside, more than --max-bad {self.rows:,}" if bad > self.rows else ""
        if self.share is not None:
            read = counts["documents"] + bad + counts["blocked"] + counts["known_documents"]
            if read < _LEAST_ROWS and self.share and not last:
                return ""
            limit = f"{100 * self.share:g}%"
            return (
                f"{bad:,} of {read:,} rows were set aside, more than --max-bad {limit}"
                if bad > self.share * read
                else ""
            )
        return ""

"""retrotool builds retrieval databases for language models: chunk, embed, index, neighbours, purge.

``retrotool.open(path)`` opens a store for reading. Everything heavy is imported when it is first used.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from retrotool.api import Reader

__all__ = ["open"]


def open(path: str | Path) -> Reader:  # noqa: A001 - it is called as retrotool.open
    """Open a store for reading, see ``retrotool.api.Reader``."""
    from retrotool.api import open_store

    return open_store(path)

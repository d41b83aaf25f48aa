"""retrotool builds retrieval databases for language models: chunk, embed, index, neighbours, purge.

``retrotool.open(path)`` opens a store for reading; ``retrotool.RetroDataset`` reads one for training with
PyTorch. Heavy libraries are imported on first use.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retrotool.reader import Reader
    from retrotool.train.dataset import RetroDataset

__all__ = ["RetroDataset", "open"]


def open(path: str | Path) -> Reader:  # noqa: A001 - it is called as retrotool.open
    """Open a store for reading (``retrotool.reader.Reader``)."""
    from retrotool.reader import open_store

    return open_store(path)


def __getattr__(name: str) -> Any:
    """Import ``RetroDataset`` on first use, as it imports torch."""
    if name == "RetroDataset":
        from retrotool.train.dataset import RetroDataset

        return RetroDataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

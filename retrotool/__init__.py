"""retrotool builds retrieval databases for language models: chunk, embed, index, neighbours, purge.

``retrotool.open(path)`` opens a store for reading; ``retrotool.RetroDataset`` reads one for training with PyTorch.
Everything heavy is imported when it is first used.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retrotool.reader import Reader
    from retrotool.train.dataset import RetroDataset

__all__ = ["RetroDataset", "open"]


def open(path: str | Path) -> Reader:  # noqa: A001 - it is called as retrotool.open
    """Open a store for reading, see ``retrotool.reader.Reader``."""
    from retrotool.reader import open_store

    return open_store(path)


def __getattr__(name: str) -> Any:
    """``RetroDataset`` is imported when it is asked for: it brings torch."""
    if name == "RetroDataset":
        from retrotool.train.dataset import RetroDataset

        return RetroDataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

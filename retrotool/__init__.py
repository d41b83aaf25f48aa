"""retrotool builds retrieval databases for language models: chunk, embed, index, neighbours, purge.

``retrotool.open(path)`` opens a store for reading; ``retrotool.RetroDataset`` reads one for training with
PyTorch. ``retrotool.api`` has every command as a function. All are imported on first use, as they import
heavy libraries.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retrotool import api as api
    from retrotool import errors as errors
    from retrotool.reader import Reader as Reader
    from retrotool.reader import open_store as open  # noqa: A004 - it is called as retrotool.open
    from retrotool.train.dataset import RetroDataset as RetroDataset

    __version__: str

__all__ = ["Reader", "RetroDataset", "__version__", "api", "errors", "open"]
_PLACES = {"Reader": "reader:Reader", "RetroDataset": "train.dataset:RetroDataset", "open": "reader:open_store"}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("retrotool")
    if name in ("api", "errors"):
        return importlib.import_module(f"retrotool.{name}")
    if name in _PLACES:
        module, _, attribute = _PLACES[name].partition(":")
        return getattr(importlib.import_module(f"retrotool.{module}"), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

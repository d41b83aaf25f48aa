"""Libraries that take seconds to import: ``torch`` and ``faiss``, imported when something of them is first used.

So a command that needs none of them starts quickly, whichever modules it imports.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


class LazyModule:
    """A module that is imported when one of its names is asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        found = getattr(importlib.import_module(self._name), name)
        setattr(self, name, found)  # to be looked up once
        return found


if TYPE_CHECKING:
    import torch as torch
else:
    torch = LazyModule("torch")

faiss: Any = LazyModule("faiss")

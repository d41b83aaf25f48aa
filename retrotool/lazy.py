"""Libraries that take seconds to import: ``torch`` and ``faiss``, imported when something of them is first used.

So a command that needs none of them starts quickly, whichever modules it imports.
"""

from __future__ import annotations

import importlib
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any


class LazyModule:
    """A module that is imported when one of its names is asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    @cached_property
    def _module(self) -> ModuleType:
        return importlib.import_module(self._name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


if TYPE_CHECKING:
    import torch as torch
else:
    torch = LazyModule("torch")

faiss: Any = LazyModule("faiss")

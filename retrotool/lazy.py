"""Slow imports: torch and faiss are imported on first use, pandas not at all.

So a command that needs none of them starts quickly, whichever modules it imports.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any


class LazyModule:
    """A module that is imported when one of its names is first used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        found = getattr(importlib.import_module(self._name), name)
        setattr(self, name, found)  # cached
        return found


if TYPE_CHECKING:
    import torch as torch
else:
    torch = LazyModule("torch")

faiss: Any = LazyModule("faiss")


class _WithoutPandas:
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:  # noqa: ARG002
        if fullname == "pandas":
            raise ModuleNotFoundError(fullname)


def leave_pandas_out() -> None:
    """Make pyarrow work without pandas, in a process that has imported neither and runs only retrotool.

    Otherwise pyarrow imports it for the first array that it converts, which takes 0.3 s. It tries only once,
    which happens here, so other code may import pandas later.
    """
    if "pyarrow" in sys.modules or "pandas" in sys.modules:
        return
    finder = _WithoutPandas()  # None in sys.modules would not do: Cython code gets the None
    sys.meta_path.insert(0, finder)
    try:
        import pyarrow as pa

        pa.array([0])
    finally:
        sys.meta_path.remove(finder)

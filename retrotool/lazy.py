"""Libraries that take long to import: torch and faiss when something of them is first used, pandas not at all.

So a command that needs none of them starts quickly, whichever modules it imports.
"""

from __future__ import annotations

import importlib
import sys
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


class _Absent:
    """Has pandas not be found."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:  # noqa: ARG002
        """Raise what an import of a missing module raises."""
        if fullname == "pandas":
            raise ModuleNotFoundError(fullname)


def leave_pandas_out() -> None:
    """Have pyarrow do without pandas in a process that has imported neither yet.

    Where pandas is installed, pyarrow imports it for the first array that it converts, which takes 0.3 s. It tries only
    once, and here that is. Others may import pandas afterwards; for processes that run retrotool alone.
    """
    if "pyarrow" in sys.modules or "pandas" in sys.modules:
        return
    absent = _Absent()
    sys.meta_path.insert(0, absent)
    try:
        import pyarrow as pa

        pa.array([0])
    finally:
        sys.meta_path.remove(absent)

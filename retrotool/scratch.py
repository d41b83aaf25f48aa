"""Scratch files: temporary files of a command, never in a store.

Their folder is that of ``--scratch``, of the environment variable ``RETROTOOL_SCRATCH``, or the system's
(``TMPDIR``). The files have no name, so a kill leaves nothing.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import IO

from retrotool.errors import UsageError

VARIABLE = "RETROTOOL_SCRATCH"


def use_scratch(folder: str | os.PathLike[str] | None) -> None:
    """Use a folder, also in worker processes (None: no change); ``UsageError`` if it can't be used."""
    if folder is None:
        return
    path = Path(folder).absolute()
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        raise UsageError(f"--scratch {folder} is not a writable folder", "Create it, or name another one.")
    store = next((above for above in (path, *path.parents) if (above / "store.json").exists()), None)
    if store is not None:
        raise UsageError(f"--scratch {folder} is in the store {store}", "Name a folder outside the store.")
    os.environ[VARIABLE] = str(path)


def scratch_folder() -> str:
    """Return the folder for scratch files."""
    return os.environ.get(VARIABLE) or tempfile.gettempdir()


def scratch_file() -> IO[bytes]:
    """Open a new file without a name, which is removed when it is closed."""
    return tempfile.TemporaryFile(prefix="retrotool-", dir=scratch_folder())


def more_scratch(least: str) -> str:
    """Return the advice for a folder without room; ``least`` is the space needed."""
    return f"Name a folder with {least} free with --scratch or the environment variable {VARIABLE}."

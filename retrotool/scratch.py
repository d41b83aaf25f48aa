"""Where files are put that nobody needs when a command has ended: never in a store.

The folder is that of ``--scratch``, of the environment variable ``RETROTOOL_SCRATCH``, or the system's for temporary
files (``TMPDIR``). Files in it have no name, so that a kill leaves nothing.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import IO

from retrotool.errors import UsageError

VARIABLE = "RETROTOOL_SCRATCH"


def use_scratch(folder: str | os.PathLike[str] | None) -> None:
    """Use a folder from now on, in worker processes too; ``UsageError`` if it can't be used. None: as it was."""
    if folder is None:
        return
    path = Path(folder).absolute()
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        raise UsageError(f"--scratch {folder} is no folder that can be written to", "Make it, or name another one.")
    store = next((above for above in (path, *path.parents) if (above / "store.json").exists()), None)
    if store is not None:
        raise UsageError(f"--scratch {folder} is in the store {store}", "Name a folder outside of it.")
    os.environ[VARIABLE] = str(path)


def scratch_folder() -> str:
    """The folder for scratch files."""
    return os.environ.get(VARIABLE) or tempfile.gettempdir()


def scratch_file() -> IO[bytes]:
    """A new file without a name, which ends with its last user."""
    return tempfile.TemporaryFile(prefix="retrotool-", dir=scratch_folder())


def more_scratch(least: str) -> str:
    """What to do where the folder has no room: ``least`` says how much is needed."""
    return f"Name a folder with {least} free by --scratch, or in the environment variable {VARIABLE}."

"""On the path of every process that tests start where all stores are in memory: has it find them there."""

import sys
from contextlib import suppress
from pathlib import Path

sys.path.remove(str(Path(__file__).parent))
this = sys.modules.pop("sitecustomize")
with suppress(ImportError):
    import sitecustomize  # noqa: F401 - another, of this machine
sys.modules.setdefault("sitecustomize", this)

import memory_storage  # noqa: E402, F401

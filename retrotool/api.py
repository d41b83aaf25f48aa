"""The Python interface: every command as a function, from arguments to a result, and ``open_store`` for reading.

Every function opens (or makes) the store, announces a run, cleans up after dead ones, executes its stage and returns a
frozen dataclass whose fields are those of ``--json``. Reading is in ``retrotool.reader``.
"""

from retrotool.chunk.estimate import estimate
from retrotool.chunk.run import chunk
from retrotool.embed.run import embed
from retrotool.export.run import export
from retrotool.index.run import index
from retrotool.info.log_entries import log_entries, verify_log
from retrotool.info.run import info
from retrotool.info.verify_run import verify
from retrotool.inspect.run import inspect
from retrotool.leakage.run import leakage
from retrotool.neighbours.run import neighbours
from retrotool.plan.run import plan
from retrotool.purge.affected import affected
from retrotool.purge.erase_run import erase
from retrotool.purge.retrain_indexes import retrain_indexes
from retrotool.purge.run import purge, scan
from retrotool.purge.select import Selectors, kinds_of
from retrotool.purge.undo import restore
from retrotool.reader import Chunk, Reader, open_store
from retrotool.receipt.run import VerifiedPurge, verify_purge

__all__ = [
    "Chunk",
    "Reader",
    "Selectors",
    "VerifiedPurge",
    "affected",
    "chunk",
    "embed",
    "erase",
    "estimate",
    "export",
    "index",
    "info",
    "inspect",
    "kinds_of",
    "leakage",
    "log_entries",
    "neighbours",
    "open_store",
    "plan",
    "purge",
    "restore",
    "retrain_indexes",
    "scan",
    "verify",
    "verify_log",
    "verify_purge",
]

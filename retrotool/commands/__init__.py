"""What each command does, from arguments to a result; also the way to run stages from Python.

Every function opens (or makes) the store, announces a run, cleans up after dead ones, executes its stage and returns a
frozen dataclass whose fields are those of ``--json``. Reading is in ``retrotool.api``.
"""

from retrotool.commands.affecting import affected
from retrotool.commands.calibrating import calibrate
from retrotool.commands.chain import log_entries, verify_log
from retrotool.commands.chunking import chunk
from retrotool.commands.embedding import embed
from retrotool.commands.erasing import erase
from retrotool.commands.estimating import estimate
from retrotool.commands.exporting import export_neighbours
from retrotool.commands.indexing import index
from retrotool.commands.inspecting import inspect
from retrotool.commands.leakage import leakage
from retrotool.commands.looking import info, verify
from retrotool.commands.materialising import materialise
from retrotool.commands.neighbour_tables import neighbours
from retrotool.commands.plan_page import write_page as write_plan_page
from retrotool.commands.planning import plan
from retrotool.commands.proving import VerifiedPurge, verify_purge
from retrotool.commands.purging import purge
from retrotool.commands.repairing import repair
from retrotool.commands.restoring import restore
from retrotool.commands.retraining import retrain_indexes
from retrotool.commands.scanning import scan
from retrotool.commands.selecting import Selectors, kinds_of

__all__ = [
    "Selectors",
    "VerifiedPurge",
    "affected",
    "calibrate",
    "chunk",
    "embed",
    "erase",
    "estimate",
    "export_neighbours",
    "index",
    "info",
    "inspect",
    "kinds_of",
    "leakage",
    "log_entries",
    "materialise",
    "neighbours",
    "plan",
    "purge",
    "repair",
    "restore",
    "retrain_indexes",
    "scan",
    "verify",
    "verify_log",
    "verify_purge",
    "write_plan_page",
]

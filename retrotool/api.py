"""The Python interface: each command as a function, and ``open_store`` for reading (``retrotool.reader``).

A writing function opens (or creates) the store, registers a run, cleans up after dead runs, executes its
stage and returns a frozen dataclass with the fields of ``--json``.
"""

from retrotool.build.run import BuildOptions as BuildOptions
from retrotool.build.run import build as build
from retrotool.build.run import plan_build as plan_build
from retrotool.chunk.estimate import estimate as estimate
from retrotool.chunk.run import chunk as chunk
from retrotool.embed.run import embed as embed
from retrotool.engine import use_engine as use_engine
from retrotool.evaluate.run import evaluate as evaluate
from retrotool.export.run import export as export
from retrotool.index.run import index as index
from retrotool.info.doctor import doctor as doctor
from retrotool.info.log_entries import log_entries as log_entries
from retrotool.info.log_entries import verify_log as verify_log
from retrotool.info.run import info as info
from retrotool.info.run import list_files as list_files
from retrotool.info.source_counts import count_sources as count_sources
from retrotool.info.verify import verify as verify
from retrotool.inspect.run import inspect as inspect
from retrotool.inspect.show import show_item as show_item
from retrotool.leakage.run import leakage as leakage
from retrotool.neighbours.edits import edit_neighbours as edit_neighbours
from retrotool.neighbours.run import neighbours as neighbours
from retrotool.plan.run import plan as plan
from retrotool.purge.affected import affected as affected
from retrotool.purge.erase import erase as erase
from retrotool.purge.run import list_purges as list_purges
from retrotool.purge.run import purge as purge
from retrotool.purge.select import Selectors as Selectors
from retrotool.purge.select import kinds_of as kinds_of
from retrotool.purge.undo import undo as undo
from retrotool.reader import Chunk as Chunk
from retrotool.reader import Reader as Reader
from retrotool.reader import open_store as open_store
from retrotool.receipt.run import VerifiedPurge as VerifiedPurge
from retrotool.receipt.run import verify_purge as verify_purge
from retrotool.repair.run import repair as repair
from retrotool.train.trainer import train as train

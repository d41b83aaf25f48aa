"""Who runs tasks: this process, or local worker processes."""

from retrotool.engine.run import execute
from retrotool.engine.task import perform

__all__ = ["execute", "perform"]

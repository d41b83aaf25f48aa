"""Who runs tasks: this process, or local worker processes."""

from retrotool.engine.run import count_elsewhere, execute, plan_tasks
from retrotool.engine.task import check_shard, perform

__all__ = ["check_shard", "count_elsewhere", "execute", "perform", "plan_tasks"]

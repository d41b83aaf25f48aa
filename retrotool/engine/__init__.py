"""Who runs tasks: this process, local worker processes, or a Ray cluster."""

from retrotool.engine.choice import find_devices, use_engine
from retrotool.engine.run import count_elsewhere, execute, gathering, plan_tasks
from retrotool.engine.task import check_shard, perform

__all__ = [
    "check_shard",
    "count_elsewhere",
    "execute",
    "find_devices",
    "gathering",
    "perform",
    "plan_tasks",
    "use_engine",
]

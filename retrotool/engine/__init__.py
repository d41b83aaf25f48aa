"""Who runs tasks: this process, local worker processes, or a Ray cluster."""

from retrotool.engine.engines import doing_everything, engine_in_use, is_a_job, use_engine, worker_devices
from retrotool.engine.run import execute, gathering, plan_tasks
from retrotool.engine.task import perform

__all__ = [
    "doing_everything",
    "engine_in_use",
    "execute",
    "gathering",
    "is_a_job",
    "perform",
    "plan_tasks",
    "use_engine",
    "worker_devices",
]

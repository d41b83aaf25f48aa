"""Which engine runs the tasks of commands: local processes, or a Ray cluster."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace

from retrotool import encoder
from retrotool.errors import UsageError

ENGINES = ("local", "ray")
_CONNECT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine by name, and the address of a Ray cluster's head: HOST:PORT, or "auto".

    ``shard`` (i, n): this is job i of n, from 0. ``share_only``: it ends when its own share is done.
    """

    name: str = "local"
    address: str | None = None
    shard: tuple[int, int] | None = None
    share_only: bool = True


_chosen = Engine()


def use_engine(engine: str = "local", ray_address: str | None = None, shard: tuple[int, int] | None = None) -> None:
    """Run the tasks of all commands of this process from now on with ``engine``, "local" or "ray".

    ``ray_address``: HOST:PORT of the head of a cluster; by default $RAY_ADDRESS, else the cluster that this
    machine belongs to. ``shard`` (i, n): this process is job i of n on the store, from 0, and begins with
    that share of the tasks.
    """
    global _chosen
    if engine not in ENGINES:
        raise UsageError(f"--engine {engine} is not one of {', '.join(ENGINES)}")
    if shard is not None and not 0 <= shard[0] < shard[1]:
        raise UsageError(f"--shard {shard[0]}/{shard[1]} is not i/n with i from 0 to n - 1")
    _chosen = Engine(engine, _ray_address(ray_address) if engine == "ray" else None, shard)


def _ray_address(given: str | None) -> str:
    """Return the address of a cluster; ``UsageError``, before anything is written, if there can't be one."""
    address = given or os.environ.get("RAY_ADDRESS") or "auto"
    if "://" in address:
        raise UsageError(
            f"{address} is not the address of a cluster's head, HOST:PORT",
            "To send the command to a cluster instead: ray job submit -- retrotool ...",
        )
    if importlib.util.find_spec("ray") is None:
        raise UsageError("--engine ray needs the package ray", "Install it with: pip install ray")
    if address != "auto":  # Ray itself tries for many minutes
        host, _, port = address.rpartition(":")
        if not (host and port.isdecimal()):
            raise UsageError(f"--ray-address {address} is not HOST:PORT")
        try:
            socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise no_cluster(address, error) from error
    return address


def no_cluster(address: str, error: Exception) -> UsageError:
    """Return the error for an address at which no cluster answers."""
    why = f"no Ray cluster can be reached at {address}: {str(error).splitlines()[0]}"
    return UsageError(
        "this machine is not part of a running Ray cluster" if address == "auto" else why,
        "Start one with `ray start --head`, or name the head with --ray-address HOST:PORT.",
    )


@contextlib.contextmanager
def doing_everything() -> Iterator[None]:
    """Wait for the shares of other jobs, too, in a job of a ``shard``: what follows needs all results."""
    global _chosen
    before = _chosen
    _chosen = replace(before, share_only=False)
    try:
        yield
    finally:
        _chosen = before


def engine_in_use() -> Engine:
    """Return the engine that was chosen last."""
    return _chosen


def is_a_job() -> bool:
    """Check whether this process is a job of a shard, so that others work on the store, too."""
    return _chosen.shard is not None


def worker_devices(devices: str, dtype: str = "auto") -> list[str]:
    """Return the devices for the workers of a stage.

    On Ray each worker has one GPU or a machine's cores, so there is a single entry: "auto" stands for the GPU
    that Ray gave to the worker, or the CPU where it gave none.
    """
    if _chosen.name == "local":
        return encoder.find_devices(devices, dtype)
    if devices not in ("auto", "cpu", "cuda"):
        raise UsageError(
            f"--devices {devices}: on Ray every worker has one GPU, which is chosen by Ray",
            "Use --devices auto, cuda or cpu.",
        )
    return [devices]

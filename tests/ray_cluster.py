"""A Ray cluster on this machine: a head, and nodes that tests can add and remove.

``start`` runs it in a process that ends with the tests. Everything listens on a loopback address. The loss of a node is
noticed within a second or two. A node's GPU is only a number: work for it is done on the CPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

LOCAL = "127.0.0.2"  # Ray takes 127.0.0.1 for the address of this machine in its network
_KEY = b"retrotool"
_QUICK = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
_NODES = [{"num_cpus": 1}, {"num_cpus": 1, "num_gpus": 1}]
_MEMORY = 80 << 20
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_memory_usage_threshold": "0.98"}
_NO_GPU = {"CUDA_VISIBLE_DEVICES": "99"}  # Ray counts it, torch can't find it


@dataclass(frozen=True)
class RayCluster:
    """A running cluster: the address of its head, and the port on which nodes are ordered."""

    address: str
    port: int

    def _order(self, *order: Any) -> Any:
        with Client((LOCAL, self.port), authkey=_KEY) as client:
            client.send(order)
            return client.recv()

    def add(self, **resources: int) -> str:
        """Add a node; return its id."""
        return str(self._order("add", resources))

    def remove(self, node: str) -> None:
        """Kill all processes of a node."""
        self._order("remove", node)


def start() -> RayCluster:
    """Start a cluster with two nodes, of which one has a GPU; it ends with the process that runs all tests."""
    tests = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    folders = [str(Path(__file__).parent / "engine"), *filter(None, [os.environ.get("PYTHONPATH")])]
    stages = {"PYTHONPATH": os.pathsep.join(folders)}  # of tests, for the workers
    environment = {**os.environ, **ENVIRONMENT, **_NO_GPU, **stages}
    done = subprocess.run(
        [sys.executable, __file__, str(tests)], stdout=subprocess.PIPE, text=True, env=environment, check=True
    )
    address, port = done.stdout.split()
    return RayCluster(address, int(port))


def _serve(tests: int, ready: int) -> None:
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a short path, for sockets
    every = {"node_ip_address": LOCAL, "object_store_memory": _MEMORY, "include_dashboard": False}
    head = {**every, "num_cpus": 0, "_system_config": _QUICK, "temp_dir": folder}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = {}

    def add(resources: dict[str, int]) -> str:
        node = cluster.add_node(**every, **resources)
        nodes[node.node_id] = node
        return str(node.node_id)

    for resources in _NODES:
        add(resources)
    cluster.wait_for_nodes()

    def follow() -> None:
        while Path(f"/proc/{tests}").exists():
            threading.Event().wait(0.5)
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)

    threading.Thread(target=follow, daemon=True).start()
    with Listener((LOCAL, 0), authkey=_KEY) as listener:
        os.write(ready, f"{cluster.address} {listener.address[1]}".encode())
        os.close(ready)
        while True:
            with listener.accept() as order:
                kind, what = order.recv()
                order.send(add(what) if kind == "add" else cluster.remove_node(nodes.pop(what), allow_graceful=False))


def _main(tests: int) -> None:
    """Serve in a process that this one does not wait for; print the cluster's address and port."""
    answer, ready = os.pipe()
    if os.fork():
        os.close(ready)
        print(os.read(answer, 1000).decode())
        return
    os.setsid()
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    _serve(tests, ready)


if __name__ == "__main__":
    sys.path = [path for path in sys.path if Path(path) != Path(__file__).parent]
    _main(int(sys.argv[1]))

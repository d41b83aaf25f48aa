"""Object stores of this machine for tests: servers on 127.0.0.1, each a process that its starter ends."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

KEYS = {"AWS_ACCESS_KEY_ID": "retrotool", "AWS_SECRET_ACCESS_KEY": "retrotool-secret", "AWS_REGION": "us-east-1"}
BUCKET = "store-bucket"
_START_SECONDS = 60.0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def process_on(port: int, *command: str, env: dict[str, str] | None = None) -> Iterator[str]:
    """Run a server until the end of the block; yield its address once it listens."""
    with subprocess.Popen(
        command, env={**os.environ, **(env or {})}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            until = time.monotonic() + _START_SECONDS
            while True:
                assert process.poll() is None, f"{command[0]} ended: {process.returncode}"
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                assert time.monotonic() < until, f"{command[0]} does not listen"
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def _script(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


@contextlib.contextmanager
def local_bucket(folder: Path) -> Iterator[str]:
    """LocalBucket, an S3 server whose buckets are folders; conditional PUTs are atomic there."""
    (folder / BUCKET).mkdir(parents=True, exist_ok=True)
    port = free_port()
    with process_on(port, _script("localbucket"), "--port", str(port), str(folder)) as address:
        yield address


@contextlib.contextmanager
def moto() -> Iterator[str]:
    """moto, an S3 server in memory with nearly all of S3's API."""
    import boto3

    port = free_port()
    with process_on(port, _script("moto_server"), "-H", "127.0.0.1", "-p", str(port)) as address:
        boto3.client(
            "s3", endpoint_url=address, region_name=KEYS["AWS_REGION"], aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        ).create_bucket(Bucket=BUCKET)  # fmt: skip
        yield address


@contextlib.contextmanager
def nanio(folder: Path) -> Iterator[str]:
    """nanio, an S3 server that ignores the condition of a PUT."""
    import boto3

    port = free_port()
    env = {"NANIO_ACCESS_KEY": KEYS["AWS_ACCESS_KEY_ID"], "NANIO_SECRET_KEY": KEYS["AWS_SECRET_ACCESS_KEY"]}
    command = (_script("nanio"), "serve", "--host", "127.0.0.1", "--port", str(port), "--data-dir", str(folder))
    with process_on(port, *command, "--no-access-log", env=env) as address:
        boto3.client(
            "s3", endpoint_url=address, region_name=KEYS["AWS_REGION"], aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        ).create_bucket(Bucket=BUCKET)  # fmt: skip
        yield address


@contextlib.contextmanager
def faulty(address: str, latency: float = 0.0) -> Iterator[str]:
    """A proxy before a server; ``faulty_proxy.set_fault`` decides what goes wrong. ``latency``: seconds a request."""
    port, script = free_port(), str(Path(__file__).with_name("faulty_proxy.py"))
    with process_on(port, sys.executable, script, str(port), address.removeprefix("http://"), str(latency)) as proxy:
        yield proxy


@contextlib.contextmanager
def settings_of(address: str) -> Iterator[None]:
    """Set the environment by which clients find a server."""
    before = {name: os.environ.get(name) for name in (*KEYS, "AWS_ENDPOINT_URL")}
    os.environ.update({**KEYS, "AWS_ENDPOINT_URL": address})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

"""Object stores of this machine for tests: servers on 127.0.0.1, each a process that its starter ends."""

from __future__ import annotations

import base64
import contextlib
import functools
import hmac
import importlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from datetime import timedelta
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import faulty_proxy

KEYS = {"AWS_ACCESS_KEY_ID": "retrotool", "AWS_SECRET_ACCESS_KEY": "retrotool-secret", "AWS_REGION": "us-east-1"}
AZURE_KEYS = {  # of everyone's own azurite
    "AZURE_STORAGE_ACCOUNT_NAME": "devstoreaccount1",
    "AZURE_STORAGE_ACCOUNT_KEY": (
        "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
    ),
}
BUCKET = "store-bucket"
_START_SECONDS = 60.0
_LOCAL_BUCKET = """
import socketserver
import localbucket
socketserver.StreamRequestHandler.disable_nagle_algorithm = True  # else each answer with a content takes 40 ms
socketserver.TCPServer.request_queue_size = 128  # else many connections at once take a second
localbucket.main()
"""
_MOTO = """
import logging, sys
from moto.moto_server.werkzeug_app import MotoRequestHandler, create_backend_app
from werkzeug.serving import run_simple
logging.getLogger("werkzeug").setLevel("ERROR")
# moto_server looks through the folders of all services at each request, which takes half of its time.
run_simple("127.0.0.1", int(sys.argv[1]), create_backend_app("s3"), threaded=True, request_handler=MotoRequestHandler)
"""


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
    with process_on(port, sys.executable, "-c", _LOCAL_BUCKET, "--port", str(port), str(folder)) as address:
        yield address


def client_of(address: str) -> Any:
    """Return boto3's client of a server."""
    import boto3

    return boto3.client(
        "s3", endpoint_url=address, region_name=KEYS["AWS_REGION"], aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
    )  # fmt: skip


@contextlib.contextmanager
def moto(bucket: str = BUCKET) -> Iterator[str]:
    """moto, an S3 server in memory with nearly all of S3's API."""
    port = free_port()
    with process_on(port, sys.executable, "-c", _MOTO, str(port), env={"MOTO_DISABLE_GLOBAL_CORS": "true"}) as address:
        client_of(address).create_bucket(Bucket=bucket)
        yield address


@contextlib.contextmanager
def nanio(folder: Path) -> Iterator[str]:
    """nanio, an S3 server that ignores the condition of a PUT."""
    port = free_port()
    env = {"NANIO_ACCESS_KEY": KEYS["AWS_ACCESS_KEY_ID"], "NANIO_SECRET_KEY": KEYS["AWS_SECRET_ACCESS_KEY"]}
    command = (_script("nanio"), "serve", "--host", "127.0.0.1", "--port", str(port), "--data-dir", str(folder))
    with process_on(port, *command, "--no-access-log", env=env) as address:
        client_of(address).create_bucket(Bucket=BUCKET)
        yield address


@contextlib.contextmanager
def azurite(program: str) -> Iterator[None]:
    """azurite, a server of Azure's blobs by Node.js, with the environment by which clients find it."""
    port = free_port()
    command = (program, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--inMemoryPersistence")
    with process_on(port, *command, "--skipApiVersionCheck", "--silent") as address:
        endpoint = f"{address}/{AZURE_KEYS['AZURE_STORAGE_ACCOUNT_NAME']}"
        _make_container(endpoint)
        with _environment({**AZURE_KEYS, "AZURE_STORAGE_ENDPOINT": endpoint}):
            yield


def _make_container(endpoint: str) -> None:
    """Make a container, by a request that is signed with the account's key."""
    account, key = AZURE_KEYS.values()
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    signed = "".join(f"{name}:{value}\n" for name, value in headers.items())
    headers["Content-Type"] = "application/xml"
    others = "\n" * 7  # dates, conditions, range
    text = f"PUT\n\n\n\n\napplication/xml{others}{signed}/{account}/{account}/{BUCKET}\nrestype:container"
    digest = hmac.digest(base64.b64decode(key), text.encode(), "sha256")
    headers["Authorization"] = f"SharedKey {account}:{base64.b64encode(digest).decode()}"
    url = f"{endpoint}/{BUCKET}?restype=container"
    urllib.request.urlopen(urllib.request.Request(url, b"", headers, method="PUT")).close()


@contextlib.contextmanager
def faulty(address: str, latency: float = 0.0) -> Iterator[str]:
    """A proxy before a server; ``faulty_proxy.set_fault`` decides what goes wrong. ``latency``: seconds a request."""
    port, script = free_port(), str(Path(__file__).with_name("faulty_proxy.py"))
    with process_on(port, sys.executable, script, str(port), address.removeprefix("http://"), str(latency)) as proxy:
        yield proxy


@contextlib.contextmanager
def short_waits() -> Iterator[None]:
    """Have new clients of obstore repeat a request as often as others do, but after milliseconds."""
    store: Any = importlib.import_module("obstore.store")
    from_url = store.from_url
    waits = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=10), "base": 2}

    def soon(place: str, *, retry_config: dict[str, Any], **options: Any) -> Any:
        return from_url(place, retry_config={**retry_config, "backoff": waits}, **options)

    store.from_url = soon
    try:
        yield
    finally:
        store.from_url = from_url


@contextlib.contextmanager
def denying(address: str, *queries: str) -> Iterator[str]:
    """A proxy before a server, which answers 403 where the query has one of these words, such as "versions"."""
    host, _, port = address.removeprefix("http://").partition(":")

    class Denying(faulty_proxy.Handler):
        target = host, int(port)

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if set(queries).isdisjoint(re.split("[=&]", self.path.partition("?")[2])):
                self._answer(*self._forward(body))
            else:
                self._answer(403, [], b"<Error><Code>AccessDenied</Code></Error>")

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

    with serving(Denying) as place:
        yield place


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server in a thread of this process, until the end of the block; yield its address."""
    server = faulty_proxy.Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@functools.cache
def _read_botocore_once() -> None:
    """Have botocore read what it knows of S3 now, and not again for each client; forked processes inherit it."""
    import botocore.session

    botocore.session.create_loader = functools.cache(botocore.session.create_loader)
    client_of("http://127.0.0.1")


def settings_of(address: str) -> contextlib.AbstractContextManager[None]:
    """Set the environment by which clients find an S3 server."""
    _read_botocore_once()
    return _environment({**KEYS, "AWS_ENDPOINT_URL": address})


@contextlib.contextmanager
def _environment(wanted: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

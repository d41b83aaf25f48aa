"""An HTTP proxy on 127.0.0.1 that does something wrong at the n-th request: ``python faulty_proxy.py PORT TARGET``.

``PUT /.fault`` with ``{"kind": ..., "at": n}`` sets what and when, and returns how many requests there were since the
last time, and whether the fault was due. Kinds:

* a status code, such as "503": the answer, and the server does not see the request
* "late 503": the server does what it is asked for, and the answer is another
* "cut": the server does it, and the connection ends without an answer
* "refuse": the connection ends, and the server does not see the request
* "short": the answer ends in the middle of its content
* "slow": the answer comes after 1.5 s
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KINDS = ("500", "503", "429", "409", "412", "late 500", "late 412", "cut", "refuse", "short", "slow")
SLOW_SECONDS = 1.5
CONTROL = "/.fault"
_HOP = {"connection", "transfer-encoding", "keep-alive"}


class State:
    lock = threading.Lock()
    kind, at, requests, fired = "", 0, 0, False


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    target = ("127.0.0.1", 0)
    latency = 0.0

    def log_message(self, *_: object) -> None:
        pass

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == CONTROL:
            self._control(json.loads(body))
            return
        with State.lock:
            State.requests += 1
            kind = State.kind if State.requests == State.at else ""
            State.fired |= bool(kind)
        time.sleep(self.latency)
        if kind == "refuse":
            self.close_connection = True
            return
        if kind.isdigit():
            self._answer(int(kind), [], b"<Error><Code>Fault</Code></Error>")
            return
        status, headers, content = self._forward(body)
        if kind == "cut":
            self.close_connection = True
        elif kind.startswith("late"):
            self._answer(int(kind.split()[1]), [], b"<Error><Code>Fault</Code></Error>")
        else:
            if kind == "slow":
                time.sleep(SLOW_SECONDS)
            self._answer(status, headers, content, cut=kind == "short")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

    def _control(self, wanted: dict[str, object]) -> None:
        with State.lock:
            before = {"requests": State.requests, "fired": State.fired}
            State.kind, State.at = str(wanted["kind"]), int(str(wanted["at"]))
            State.requests, State.fired = 0, False
        self._answer(200, [], json.dumps(before).encode())

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        server = http.client.HTTPConnection(*self.target, timeout=60)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
            server.request(self.command, self.path, body or None, headers)
            answer = server.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            server.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, *, cut: bool = False) -> None:
        given = {name.lower() for name, _ in headers}
        try:
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in _HOP and (self.command == "HEAD" or name.lower() != "content-length"):
                    self.send_header(name, value)
            if self.command != "HEAD" or "content-length" not in given:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) // 2] if cut else content)
            if cut:
                self.close_connection = True
        except OSError:  # the client did not wait
            self.close_connection = True


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def set_fault(address: str, kind: str = "", at: int = 0) -> tuple[int, bool]:
    """Set the next fault; return the number of requests since the last time, and whether its fault was due."""
    data = json.dumps({"kind": kind, "at": at}).encode()
    with urllib.request.urlopen(urllib.request.Request(address + CONTROL, data, method="PUT")) as answer:
        found = json.load(answer)
    return found["requests"], found["fired"]


if __name__ == "__main__":
    port, target = int(sys.argv[1]), sys.argv[2]
    Handler.target = (target.split(":")[0], int(target.split(":")[1]))
    Handler.latency = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
    Server(("127.0.0.1", port), Handler).serve_forever()

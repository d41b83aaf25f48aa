"""A web server of this process on 127.0.0.1: files, counted, and a dataset as the Hugging Face Hub has it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

DATASET = "org/lakes"
REVISIONS = ("main", "v1")
_TREE = f"/api/datasets/{DATASET}/tree/"
_INFO = f"/api/datasets/{DATASET}/paths-info/"
_RESOLVE = f"/datasets/{DATASET}/resolve/"
_PAGE = 2


class WebServer:
    """``files`` by path without a leading slash; ``sent`` counts the bytes of each that were read."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.sent: Counter[str] = Counter()
        self.heads = 0
        self.address = ""
        self.has_ranges = self.has_length = self.is_open = True
        self.at_head: dict[int, Callable[[], object]] = {}  # called before so many requests for headers, from 1

    def tag(self, path: str) -> str:
        return hashlib.sha1(self.files[path]).hexdigest()

    def entry(self, path: str) -> dict[str, object]:
        """A file in a listing of the Hub, which keeps large files beside the repository."""
        data = self.files[path]
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return {"type": "file", "path": path, "size": len(data), "oid": self.tag(path)} | (
            {"lfs": lfs} if len(data) > 1000 else {}
        )


@contextlib.contextmanager
def web_server() -> Iterator[WebServer]:
    served = WebServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_POST(self) -> None:
            body = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            assert self.path.startswith(_INFO)
            self.answer_json([served.entry(path) for path in body["paths"] if path in served.files])

        def do_GET(self) -> None:
            if self.command == "HEAD":
                served.heads += 1
                served.at_head.get(served.heads, int)()
            path = unquote(urlsplit(self.path).path)
            query = parse_qs(urlsplit(self.path).query)
            if path.startswith(_TREE):
                self.list_tree(path.removeprefix(_TREE), int(query.get("cursor", ["0"])[0]))
            elif path.startswith(_RESOLVE):
                self.redirect(path.removeprefix(_RESOLVE))
            else:
                self.send_file(path.removeprefix("/"))

        def list_tree(self, path: str, first: int) -> None:
            revision, _, folder = path.partition("/")
            found = sorted(name for name in served.files if not folder or name.startswith(f"{folder}/"))
            if revision not in REVISIONS or (folder and not found):
                self.refuse("RevisionNotFound" if revision not in REVISIONS else "EntryNotFound")
                return
            link = f'<{served.address}{_TREE}{path}?recursive=True&cursor={first + _PAGE}>; rel="next"'
            more = {"Link": link} if first + _PAGE < len(found) else {}
            self.answer_json([served.entry(name) for name in found[first : first + _PAGE]], **more)

        def redirect(self, path: str) -> None:
            revision, _, name = path.partition("/")
            if revision not in REVISIONS or name not in served.files:
                self.refuse("EntryNotFound")
                return
            self.answer(302, b"", Location=f"{served.address}/{name}")

        def send_file(self, path: str) -> None:
            if path not in served.files or not served.is_open:
                self.answer(404 if served.is_open else 403, b"")
                return
            data, code, headers = served.files[path], 200, {"ETag": f'"{served.tag(path)}"'}
            asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")) if served.has_ranges else None
            if asked:
                first = int(asked[1]) if asked[1] else max(0, len(data) - int(asked[2]))
                last = min(int(asked[2]) if asked[1] and asked[2] else len(data), len(data) - 1)
                if first > last:
                    self.answer(416, b"")
                    return
                code, headers["Content-Range"] = 206, f"bytes {first}-{last}/{len(data)}"
                data = data[first : last + 1]
            served.sent[path] += len(data) if self.command == "GET" else 0
            self.answer(code, data, **headers)

        def answer_json(self, content: object, **headers: str) -> None:
            self.answer(200, json.dumps(content).encode(), **headers)

        def refuse(self, code: str) -> None:
            self.answer(404, b"", **{"X-Error-Code": code})

        def answer(self, code: int, data: bytes, **headers: str) -> None:
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            if served.has_length:
                self.send_header("Content-Length", str(len(data)))
            else:
                self.close_connection = True
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    served.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

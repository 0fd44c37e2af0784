"""A web server on this machine that behaves as told: the other side for the tests of fetching files."""

from __future__ import annotations

import hashlib
import http.server
import re
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

Behaviour = Callable[["Handler", bytes], None]
"""Answers one GET for these bytes."""


@dataclass
class Mirror:
    """Serves `files`; the GETs are answered by `behaviours`, one each, and honestly when there are none left."""

    files: dict[str, bytes] = field(default_factory=dict)
    behaviours: deque[Behaviour] = field(default_factory=deque)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, name and Range of every request."""
    sent_bytes: int = 0
    etag: Callable[[bytes], str] = lambda content: f'"{hashlib.sha1(content).hexdigest()}"'
    headers: dict[str, str] = field(default_factory=dict)
    """Sent with every answer."""
    head_status: int = 200
    url: str = ""

    def gets(self) -> list[tuple[str, str]]:
        """Name and Range of every GET."""
        return [(name, asked) for method, name, asked in self.requests if method == "GET"]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    mirror: Mirror

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        content = self._content()
        if content is not None and self.mirror.head_status == 200:
            self.head(200, {"Content-Length": str(len(content)), "ETag": self.mirror.etag(content)})
        elif content is not None:
            self.head(self.mirror.head_status, {"Content-Length": "0"})

    def do_GET(self) -> None:
        content = self._content()
        if content is not None:
            behave = self.mirror.behaviours.popleft() if self.mirror.behaviours else honest
            behave(self, content)
            self.close_connection = True

    def _content(self) -> bytes | None:
        name = self.path.removeprefix("/")
        self.mirror.requests.append((self.command, name, self.headers.get("Range", "")))
        content = self.mirror.files.get(name)
        if content is None:
            self.head(404, {"Content-Length": "0"})
        return content

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        # Announced, because a client that reused the connection would race with its end.
        for name, value in {"Connection": "close", **headers, **self.mirror.headers}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()

    def asked_from(self, content: bytes) -> int:
        """Where the answer has to begin: 0 unless a range of this version is asked for."""
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        condition = self.headers.get("If-Range", self.mirror.etag(content))
        return int(found[1]) if found and condition == self.mirror.etag(content) else 0

    def answer(
        self,
        content: bytes,
        begin: int,
        body: bytes,
        *,
        status: int | None = None,
        content_range: str | None = None,
        length: int | Literal[""] | None = None,
    ) -> None:
        """Answer as a server should that begins at `begin`, but with this `body`, and what else is given."""
        status = status or (206 if begin else 200)
        headers = {"Content-Length": str(len(content) - begin if length is None else length)}
        headers["ETag"] = self.mirror.etag(content)
        if status == 206:
            honest_range = f"bytes {begin}-{len(content) - 1}/{len(content)}"
            headers["Content-Range"] = honest_range if content_range is None else content_range
        self.head(status, headers)
        self.mirror.sent_bytes += len(body)
        self.wfile.write(body)
        self.wfile.flush()


def honest(handler: Handler, content: bytes) -> None:
    begin = handler.asked_from(content)
    handler.answer(content, begin, content[begin:])


def breaks_off_after(n: int, *, reset: bool = False) -> Behaviour:
    """Sends n bytes of what is asked for; then the connection ends, or is reset."""

    def behave(handler: Handler, content: bytes) -> None:
        begin = handler.asked_from(content)
        handler.answer(content, begin, content[begin : begin + n])
        if reset:
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()

    return behave


def answers_whole(handler: Handler, content: bytes) -> None:
    """Takes no notice of ranges."""
    handler.answer(content, 0, content)


def answers_whole_but_breaks_off_after(n: int) -> Behaviour:
    return lambda handler, content: handler.answer(content, 0, content[:n])


def claims_range(text: str) -> Behaviour:
    """Sends the rest that was asked for as the range `text`, in which {begin}, {last} and {size} are filled in."""

    def behave(handler: Handler, content: bytes) -> None:
        begin = handler.asked_from(content)
        claimed = text.format(begin=begin, last=len(content) - 1, size=len(content))
        handler.answer(content, begin, content[begin:], content_range=claimed)

    return behave


def sends_other_bytes_than_announced(handler: Handler, content: bytes) -> None:
    """The range is announced as asked for, and the bytes are those at the beginning."""
    begin = handler.asked_from(content)
    handler.answer(content, begin, content[: len(content) - begin])


def damages_byte(index: int) -> Behaviour:
    def behave(handler: Handler, content: bytes) -> None:
        damaged = bytearray(content)
        damaged[index] ^= 0x55
        begin = handler.asked_from(content)
        handler.answer(content, begin, bytes(damaged[begin:]))

    return behave


def answers(status: int, **headers: str) -> Behaviour:
    """No file, but this status; `Retry_After="1"` makes the header Retry-After."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, content: handler.head(status, {"Content-Length": "0", **named})


def redirects_to(url: str) -> Behaviour:
    return answers(302, Location=url)


@contextmanager
def serve(mirror: Mirror) -> Iterator[Mirror]:
    """`mirror` with its `url`, served until the block ends."""
    handler = type("BoundHandler", (Handler,), {"mirror": mirror})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that hangs up is expected
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    mirror.url = f"http://127.0.0.1:{server.server_port}/"
    try:
        yield mirror
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

"""/metrics over HTTP for Prometheus, and nothing else: GET and HEAD, one small request a connection, one at a time.

It listens where the coordinator does, never on all interfaces, and has no authentication: what it shows are counters,
host names and rank numbers.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from typing import Any

from ..core.errors import ConfigError
from .prometheus import CONTENT_TYPE, render

REFRESH_S = 0.5  # between two snapshots
_REQUEST_BYTES = 8192
_REQUEST_S = 1.0  # for a request to come, and for its answer to be taken

_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}


class Endpoint:
    """Answers in a thread of its own, from the latest `status`, which whoever owns this replaces.

    Raises ConfigError where it cannot listen at address:port.
    """

    def __init__(self, address: str, port: int) -> None:
        self.status: dict[str, Any] | None = None
        self.refreshed = 0.0
        self._socket = _listen(address, port)
        self.port = self._socket.getsockname()[1]
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join(2 * _REQUEST_S)
        self._socket.close()

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                connection, _ = self._socket.accept()
            except OSError:  # nobody came, or who came has gone again
                continue
            with connection:
                try:
                    connection.settimeout(_REQUEST_S)
                    connection.sendall(answer(_read(connection), self.status))
                except OSError:
                    continue  # it did not wait for its answer


def _listen(address: str, port: int) -> socket.socket:
    try:
        family, kind, _, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        if ipaddress.ip_address(where[0]).is_unspecified:
            raise ConfigError(f"metrics_port {port}: {address} is all interfaces; name one of them, or 127.0.0.1")
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just left, not one in use
        listening.bind(where)
        listening.listen(8)
        listening.settimeout(0.2)  # to see that it is closed
    except OSError as error:
        raise ConfigError(f"metrics_port {port}: cannot listen at {address}:{port} ({error.strerror})") from None
    return listening


def _read(connection: socket.socket) -> bytes:
    """A request's head, as far as it came within _REQUEST_S and _REQUEST_BYTES."""
    ends, data = time.monotonic() + _REQUEST_S, b""
    while b"\r\n\r\n" not in data and len(data) <= _REQUEST_BYTES:
        connection.settimeout(max(0.001, ends - time.monotonic()))
        try:
            more = connection.recv(4096)
        except TimeoutError:
            return b""
        if not more:
            return data
        data += more
    connection.settimeout(_REQUEST_S)
    return data


def answer(request: bytes, status: dict[str, Any] | None) -> bytes:
    """The whole answer to a request's head. status: None before the first snapshot."""
    head = request.partition(b"\r\n\r\n")
    words = head[0].partition(b"\r\n")[0].decode("latin-1").split(" ")
    if len(request) > _REQUEST_BYTES:
        return _answer(431, "the request is too long\n")
    if not head[1] or len(words) != 3 or not words[2].startswith("HTTP/1."):
        return _answer(400, "not an HTTP request\n")
    method, path = words[0], words[1].partition("?")[0]
    if path != "/metrics":
        return _answer(404, "there is /metrics only\n", method == "HEAD")
    if method not in ("GET", "HEAD"):
        return _answer(405, "GET or HEAD only\n", more="Allow: GET, HEAD\r\n")
    if status is None:
        return _answer(503, "no snapshot yet\n", method == "HEAD")
    return _answer(200, render(status), method == "HEAD", CONTENT_TYPE)


def _answer(code: int, text: str, head: bool = False, kind: str = "text/plain; charset=utf-8", more: str = "") -> bytes:
    body = text.encode()
    lines = f"HTTP/1.1 {code} {_REASONS[code]}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{more}"
    return f"{lines}Connection: close\r\n\r\n".encode() + (b"" if head else body)

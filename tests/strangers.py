"""People who should not be let in: what they send to a port, a relay that records, and who listens where."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

import zmq

from moe_runtime.comm.locks import calls, job_keys

# ZMTP 3.1 (RFC 23): signature, version, mechanism, as-server, filler; then a READY command of the NULL mechanism.
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01%s" + bytes(32)
NULL = GREETING % b"NULL".ljust(20, b"\0")
CURVE = GREETING % b"CURVE".ljust(20, b"\0")
PLAIN = GREETING % b"PLAIN".ljust(20, b"\0")


def speak(address: str, port: int, data: bytes, seconds: float = 5.0) -> bytes:
    """Send bytes over TCP; what comes back until the other side hangs up, which it must within `seconds`."""
    got = b""
    with socket.create_connection((address, port), timeout=seconds) as connection:
        with suppress(ConnectionError):
            connection.sendall(data)
            while chunk := connection.recv(1 << 16):
                got += chunk
    return got


@contextmanager
def dealer(address: str, port: int, secret: bytes | None = None, identity: bytes = b"", **options: bytes):
    """A ZeroMQ client, with the keys of `secret` or none, that does not come back once it was turned away."""
    context = zmq.Context()
    client = context.socket(zmq.DEALER)
    client.linger, client.reconnect_ivl = 0, -1
    if identity:
        client.identity = identity
    for name, value in options.items():
        setattr(client, name, value)
    if secret is not None:
        calls(client, job_keys(secret))
    client.connect(f"tcp://{address}:{port}")
    try:
        yield client
    finally:
        client.close()
        context.term()


class Relay:
    """Listens on loopback, passes on to `address:port`, and keeps what the first who came has sent."""

    def __init__(self, address: str, port: int) -> None:
        self._to = (address, port)
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._door.getsockname()[1]
        self.sent = b""
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        came, _ = self._door.accept()
        onward = socket.create_connection(self._to)
        threading.Thread(target=self._pass, args=(onward, came, False), daemon=True).start()
        self._pass(came, onward, True)

    def _pass(self, source: socket.socket, to: socket.socket, keep: bool) -> None:
        with suppress(OSError):
            while chunk := source.recv(1 << 16):
                self.sent += chunk if keep and len(self.sent) < 1 << 20 else b""
                to.sendall(chunk)
        with suppress(OSError):
            to.shutdown(socket.SHUT_WR)


@contextmanager
def silent(address: str, port: int, count: int):
    """Connections that say nothing."""
    held = [socket.create_connection((address, port), timeout=10) for _ in range(count)]
    try:
        yield held
    finally:
        for connection in held:
            connection.close()


def until(holds: Callable[[], bool], what: str, seconds: float = 15.0) -> None:
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)


def listening(process: int) -> set[tuple[str, int]]:
    """Addresses and TCP ports on which a process listens (its sockets' inodes in /proc/net/tcp and tcp6)."""
    inodes = set()
    for entry in Path(f"/proc/{process}/fd").iterdir():
        with suppress(OSError):
            inodes.add(os.readlink(entry))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                address, port = fields[1].split(":")
                at = ".".join(str(byte) for byte in reversed(bytes.fromhex(address))) if table == "tcp" else address
                found.add((at, int(port, 16)))
    return found


def started_by(process: int) -> dict[int, str]:
    """A process and all that it and its children have started, with their command lines."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            stat = (entry / "stat").read_text().rpartition(")")[2].split()
            parents[int(entry.name)] = int(stat[1])
    found = {process}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    lines = {}
    for number in found:
        with suppress(OSError):
            lines[number] = Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return lines

"""Can a job's nodes open connections to each other? Found out before anything heavy, on ports like those of the data.

Rows travel over ports that the system gives out, between all nodes; a firewall that lets the controller's one port
through and nothing else would show as a hang later. Every node listens on such a port and is tried by two others, so
that the number of attempts grows with the number of nodes and not with its square.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

PATIENCE_S = 5.0  # of one attempt
_BACKLOG = 4096  # all nodes try node 0 at once

Target = tuple[str, str, int]  # name, address, port


class Door:
    """A listening port on this node's own address; whoever comes is let go again. `port` is where."""

    def __init__(self, address: str) -> None:
        self._socket = socket.create_server((address, 0), backlog=_BACKLOG)
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._welcome, name="door", daemon=True).start()

    def _welcome(self) -> None:
        try:
            while True:
                self._socket.accept()[0].close()
        except OSError:  # closed
            return

    def close(self) -> None:
        with suppress(OSError):  # Linux: it listens no more, and accept() returns; elsewhere this may be refused
            self._socket.shutdown(socket.SHUT_RDWR)
        with socket.socket() as last:  # there accept() would go on waiting
            last.settimeout(0.2)
            last.connect_ex(self._socket.getsockname())
        self._socket.close()


def targets(names: Sequence[str], facts: Sequence[Mapping[str, Any]]) -> list[list[Target]]:
    """Whom each node is to try: node 0, and the next one. [] for each node of a job of one."""
    at = [(name, fact["address"], fact["door"]) for name, fact in zip(names, facts, strict=True)]
    count = len(at)
    return [[at[other] for other in sorted({0, (n + 1) % count} - {n})] for n in range(count)]


def unreachable(name: str, tries: Sequence[Target]) -> list[str]:
    """Try them all at once; one line for each that does not answer, with the cure. Takes PATIENCE_S at most."""

    def attempt(target: Target) -> str | None:
        other, address, port = target
        try:
            socket.create_connection((address, port), timeout=PATIENCE_S).close()
        except OSError as error:
            return (
                f"{name} cannot reach {other} at {address}:{port} ({error}): rows travel over ports that the system "
                "gives out (net.ipv4.ip_local_port_range), between all nodes; let them through the firewall, or name "
                "another `interface` for the nodes"
            )
        return None

    with ThreadPoolExecutor(max(1, len(tries))) as pool:
        return [line for line in pool.map(attempt, map(tuple, tries)) if line]

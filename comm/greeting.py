"""How the ranks of the bridge meet at rank 0, and who may connect to them.

Rank 0 waits for every rank's greeting, compares, and answers all with the table of addresses. Whatever else comes to
these sockets is turned away or dropped, and counted.
"""

from __future__ import annotations

import re
import secrets
import time
from collections import Counter
from typing import Any

from ..core.errors import ConfigError, PeerTimeout
from .locks import (
    Doorkeeper,
    JobKeys,
    Passes,
    calls,
    checks_passes,
    in_words,
    job_keys,
    listens,
    set_bounds,
    shows_pass,
)
from .messages import open_socket, pack, unpack, zmq

HELLO_BYTES = 1 << 16
TABLE_BYTES = 1 << 24


class BridgeLock:
    """Who may connect to a rank's sockets, by the job's secret; without one everybody, and strangers' frames drop."""

    def __init__(self, context: zmq.Context, size: int, rank: int, secret: bytes | None, encrypt: bool) -> None:
        self.keys: JobKeys | None = None
        self.encrypt, self.token = encrypt, b""
        self._name, self._strangers = name_of(rank), Counter[str]()
        if secret is not None:
            self.keys, self.token = job_keys(secret), secrets.token_bytes(32)
            names = [name_of(peer) for peer in range(size) if peer != rank]
            self._keeper = Doorkeeper(context, self.keys, None if encrypt else Passes(self.token, names))

    def guard(self, socket: zmq.Socket, most: int, rows: bool = False) -> None:
        """Before bind. most: bytes of a frame."""
        set_bounds(socket, most + 1024)  # CURVE adds some
        if self.keys is None:
            return
        if rows and not self.encrypt:
            checks_passes(socket)
        else:
            listens(socket, self.keys, "moe-runtime rows" if rows else "moe-runtime")
        self._keeper.watch(socket)

    def open(self, socket: zmq.Socket, token: bytes | None = None) -> None:
        """Before connect. token: of the owner of a socket for rows."""
        if self.keys is None:
            return
        if token is None or self.encrypt:
            calls(socket, self.keys)
        else:
            shows_pass(socket, self._name, token)

    def all_are_in(self) -> None:
        """Nobody comes later: a connection that breaks is a rank that is gone."""
        if self.keys is not None and self._keeper.passes is not None:
            self._keeper.passes.over = True

    def stranger(self, what: str) -> None:
        self._strangers[what] += 1

    def close(self) -> None:
        if self.keys is not None:
            self._keeper.close()

    def refused(self) -> str:
        """In words, or ""."""
        return in_words({**self._strangers, **(self._keeper.refused if self.keys is not None else {})})

    def describe(self) -> str:
        told = "not authenticated (started without moe-launch, or without a secret)"
        if self.keys is not None:
            rows = "encrypted" if self.encrypt else "not encrypted"
            told = f"ranks prove the job's secret when they connect; rows are {rows}"
        return "; ".join(filter(None, (f"bridge: {told}", self.refused())))


def name_of(rank: int) -> str:
    return f"rank {rank}"


def gather_world(
    context: zmq.Context,
    lock: BridgeLock,
    size: int,
    address: str,
    port: int,
    hello: dict[str, Any],
    ends: float,
    deadline_s: float,
) -> list[dict[str, Any]]:
    """Rank 0: wait for every rank's hello, compare, and answer all with the table or with what is wrong."""
    door = open_socket(context, zmq.ROUTER)
    lock.guard(door, HELLO_BYTES)
    try:
        door.bind(f"tcp://{address}:{port}")
    except zmq.ZMQError as error:
        raise ConfigError(f"rank 0 cannot listen at {address}:{port} ({error}); give another --master-port") from error
    hellos, answers_to = {0: hello}, {}
    while len(hellos) < size:
        left = ends - time.monotonic()
        if left <= 0 or not door.poll(left * 1000):
            missing = tuple(rank for rank in range(size) if rank not in hellos)
            refused = lock.refused()
            raise PeerTimeout(
                f"rank 0, phase rendezvous: ranks {list(missing)} did not come to {address}:{port} "
                f"within {deadline_s:g} s" + (f" ({refused})" if refused else ""),
                waiting_rank=0,
                ranks=missing,
                phase="rendezvous",
            )
        sender, *frames = door.recv_multipart()
        theirs = read_hello(frames, size)
        if theirs is None:
            lock.stranger("greetings that were none")
            continue
        answers_to[theirs["rank"]] = sender
        hellos[theirs["rank"]] = theirs
    problem = disagreement(hellos)
    table = [{name: hellos[rank][name] for name in ("endpoint", "token")} for rank in sorted(hellos)]
    for sender in answers_to.values():
        door.send_multipart([sender, pack({"problem": problem, "table": table})])
    door.close(linger=2000)
    if problem:
        raise ConfigError(problem)
    return table


def read_hello(frames: list[bytes], size: int) -> dict[str, Any] | None:
    """A rank's greeting, or None for what is not the greeting of any of ranks 1 to size - 1."""
    try:
        hello = unpack(b"".join(frames), HELLO_BYTES, items=1000, depth=4)
    except ValueError:
        return None
    if len(frames) != 1 or not isinstance(hello, dict) or type(hello.get("rank")) is not int:
        return None
    return hello if 0 < hello["rank"] < size and _is_place(hello) else None


def _is_place(entry: Any) -> bool:
    """Whether this says where a rank listens and what its token is ("" where it has none)."""
    if not isinstance(entry, dict) or not isinstance(entry.get("endpoint"), str):
        return False
    token = entry.get("token")
    return isinstance(token, str) and re.fullmatch("([0-9a-f]{64})?", token) is not None


def report_to_rank_0(
    context: zmq.Context,
    lock: BridgeLock,
    rank: int,
    address: str,
    port: int,
    hello: dict[str, Any],
    ends: float,
    deadline_s: float,
) -> list[dict[str, Any]]:
    door = open_socket(context, zmq.DEALER)
    door.maxmsgsize = TABLE_BYTES
    lock.open(door)
    door.connect(f"tcp://{address}:{port}")
    door.send(pack(hello))
    if not door.poll(max(0.0, ends - time.monotonic()) * 1000):
        raise PeerTimeout(
            f"rank {rank}, phase rendezvous: rank 0 at {address}:{port} did not answer within {deadline_s:g} s "
            "(it waits for all ranks; its own message names the missing ones, and whom it turned away)",
            waiting_rank=rank,
            ranks=(0,),
            phase="rendezvous",
        )
    frames = door.recv_multipart()
    door.close(linger=0)
    try:
        answer = unpack(b"".join(frames), TABLE_BYTES)
    except ValueError:
        answer = None
    problem, table = (answer.get("problem"), answer.get("table")) if isinstance(answer, dict) else (None, None)
    if isinstance(problem, str):
        raise ConfigError(problem)
    if not isinstance(table, list) or len(table) != hello["size"] or not all(map(_is_place, table)):
        raise ConfigError(f"rank 0 at {address}:{port} answered no table of ranks; is it rank 0 of this job?")
    return table


def disagreement(hellos: dict[int, dict]) -> str | None:
    """The first field in which a rank differs from rank 0, in words; None when all agree."""
    for rank in sorted(hellos):
        for field, value in hellos[0].items():
            if field not in ("rank", "endpoint", "token") and hellos[rank].get(field) != value:
                return f"rank {rank} disagrees with rank 0 on {field}: {hellos[rank].get(field)!r} against {value!r}"
    return None

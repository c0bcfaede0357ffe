"""CURVE (ZeroMQ's authenticated encryption) by a job's secret: who has the secret can speak, nobody else.

Every process of a job derives the same two key pairs from the secret: one for whoever listens, one for whoever calls.
Source: ZeroMQ RFC 26 (CurveZMQ): a handshake with fresh keys for each connection, so that nothing recorded can be
played again, and a number in every message. A `Doorkeeper` says yes or no to each who comes (RFC 27, ZAP) and counts.

Sockets that carry rows can do with less: PLAIN (RFC 24) with a `Passes`, where only the set-up is authenticated.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import queue
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import ConfigError
from .messages import zmq

_Z85 = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"


@dataclass(frozen=True)
class JobKeys:
    """Two CURVE key pairs, each key 40 characters of Z85 (RFC 32)."""

    server_public: bytes
    server_secret: bytes
    client_public: bytes
    client_secret: bytes


def job_keys(secret: bytes) -> JobKeys:
    """The keys that follow from a job's secret. Raises ConfigError where this ZeroMQ was built without CURVE."""
    if not zmq.has("curve"):
        raise ConfigError("this pyzmq was built without CURVE (libsodium); install the wheel: pip install pyzmq")
    pairs = []
    for end in ("server", "client"):
        private = z85(hmac.digest(secret, f"moe-runtime curve {end}".encode(), hashlib.sha256))
        pairs += [zmq.curve_public(private), private]
    return JobKeys(*pairs)


def listens(socket: zmq.Socket, keys: JobKeys, domain: str = "moe-runtime") -> None:
    """Before bind: only who has the server's public key can speak to this socket, and who answers ZAP may refuse."""
    socket.curve_server = True
    socket.curve_secretkey, socket.curve_publickey = keys.server_secret, keys.server_public
    socket.zap_domain = domain.encode()


def calls(socket: zmq.Socket, keys: JobKeys) -> None:
    """Before connect."""
    socket.curve_serverkey = keys.server_public
    socket.curve_secretkey, socket.curve_publickey = keys.client_secret, keys.client_public


class Passes:
    """Who may open a socket of rows that is not encrypted: each rank by a pass of its own, until the meeting is over.

    token: random, of the socket's owner; it travels in the encrypted table of ranks. What was recorded on the wire is
    of no use later: once all are connected nobody else is let in.
    """

    def __init__(self, token: bytes, names: Sequence[str]) -> None:
        self._passes = {name: pass_of(token, name) for name in names}
        self.over = False

    def refusal(self, name: str, word: bytes) -> str:
        """Why not, or ""."""
        if not word or not hmac.compare_digest(self._passes.get(name, "").encode(), word):
            return "connections with a wrong pass"
        return "connections with a pass after the meeting" if self.over else ""


def pass_of(token: bytes, name: str) -> str:
    """What `name` shows to the owner of the token."""
    return hmac.digest(token, f"moe-runtime pass {name}".encode(), hashlib.sha256).hex()


def checks_passes(socket: zmq.Socket, domain: str = "moe-runtime rows") -> None:
    """Before bind: only who shows a pass can speak to this socket (`Passes`)."""
    socket.plain_server = True
    socket.zap_domain = domain.encode()


def shows_pass(socket: zmq.Socket, name: str, token: bytes) -> None:
    """Before connect."""
    socket.plain_username, socket.plain_password = name.encode(), pass_of(token, name).encode()


HANDSHAKE_S = 5.0


def set_bounds(socket: zmq.Socket, most: int, backlog: int = 1024) -> None:
    """Before bind: what a stranger can take of a listening socket. most: bytes of a frame; a larger one ends its
    connection. Who does not say who it is within HANDSHAKE_S is let go.

    ZeroMQ has no limit of connections: that is the process's limit of open files (ulimit -n).
    """
    socket.maxmsgsize = most
    socket.handshake_ivl = int(HANDSHAKE_S * 1000)
    socket.backlog = backlog


# What a listening socket's monitor tells (zmq_socket_monitor(3)), in our words. The numbers of errors: zmq.h.
_MECHANISM_MISMATCH, _CRYPTOGRAPHIC = 0x11000002, 0x11000001
_SILENT = (errno.EAGAIN, errno.ETIMEDOUT)
NO_KEY, WITHOUT_KEY = "connections without a key", "connections without the job's key"


class Tally:
    """Who was not let in, counted from a listening socket's events, each connection once. Pure.

    ZeroMQ says nothing of a connection whose first bytes are not its own: it is one that ends without a word of its
    handshake. One that ends so while another is let in may go uncounted.
    """

    def __init__(self) -> None:
        self.refused: Counter[str] = Counter()
        self._let_in = 0
        self._came: dict[int, int] = {}  # descriptor to how many had been let in before
        self._told = False  # of the connection whose end is the next event
        self._denied = 0  # counted, and their end is still to come

    def deny(self, reason: str) -> None:
        """Somebody was told no; his connection will end, in whatever way."""
        self.refused[reason] += 1
        self._denied += 1

    def event(self, kind: int, value: int) -> None:
        if kind == zmq.EVENT_ACCEPTED:
            self._came[value] = self._let_in
        elif kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._let_in += 1
        elif kind == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            # A client without a key may see first that the two do not fit, and leave.
            self._ended("connections that said nothing" if value in _SILENT else NO_KEY)
            self._told = True
        elif kind == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            reasons = {_MECHANISM_MISMATCH: NO_KEY, _CRYPTOGRAPHIC: WITHOUT_KEY}
            self._ended(reasons.get(value, "connections with a broken handshake"))
            self._told = True
        elif kind == zmq.EVENT_ACCEPT_FAILED:
            self.refused["connections for lack of open files"] += 1
        elif kind == zmq.EVENT_DISCONNECTED:
            if self._came.pop(value, -1) == self._let_in and not self._told:
                self._ended("connections that were not ZeroMQ")
            self._told = False

    def _ended(self, reason: str) -> None:
        if self._denied:
            self._denied -= 1
        else:
            self.refused[reason] += 1


def in_words(refused: Mapping[str, int]) -> str:
    """ "refused: 3 connections without the job's key, ...", or ""."""
    told = ", ".join(f"{count} {reason}" for reason, count in sorted(refused.items()) if count)
    return f"refused: {told}" if told else ""


def refusal(mechanism: bytes, credentials: Sequence[bytes], keys: JobKeys, passes: Passes | None) -> str:
    """Why somebody with these credentials (RFC 27) is not let in, or "". Pure."""
    if mechanism == b"CURVE" and len(credentials) == 1:
        return "" if hmac.compare_digest(z85(credentials[0]), keys.client_public) else WITHOUT_KEY
    if mechanism == b"PLAIN" and len(credentials) == 2 and passes is not None:
        return passes.refusal(credentials[0].decode("ascii", "replace"), credentials[1])
    return NO_KEY


class Doorkeeper:
    """Answers for all listening sockets of a context who may come in, and counts who may not; a thread of its own.

    The only one of its context. Close it before the context. passes: for sockets set up with `checks_passes`.
    """

    def __init__(self, context: zmq.Context, keys: JobKeys, passes: Passes | None = None) -> None:
        self._keys, self.passes = keys, passes
        self._tallies: dict[bytes, list[Tally]] = {}  # by ZAP domain
        self._watched: list[zmq.Socket] = []
        self._new: queue.SimpleQueue[tuple[zmq.Socket, Tally]] = queue.SimpleQueue()
        questions = context.socket(zmq.REP)
        questions.linger = 0
        questions.bind("inproc://zeromq.zap.01")
        self._bell, bell = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        self._bell.linger = bell.linger = 0
        bell.bind(f"inproc://doorkeeper-{id(self)}")
        self._bell.connect(f"inproc://doorkeeper-{id(self)}")
        self._thread = threading.Thread(target=self._keep, args=(questions, bell), name="doorkeeper", daemon=True)
        self._thread.start()

    def watch(self, socket: zmq.Socket) -> None:
        """Count whom this socket turns away. After `listens` or `checks_passes`, before bind, in its owner's thread."""
        tally = Tally()
        self._tallies.setdefault(socket.zap_domain, []).append(tally)
        self._watched.append(socket)
        self._new.put((socket.get_monitor_socket(_EVENTS), tally))
        self._bell.send(b"new")

    @property
    def refused(self) -> dict[str, int]:
        """How many, by reason."""
        tallies = [tally for each in list(self._tallies.values()) for tally in each]
        return dict(sum((tally.refused.copy() for tally in tallies), Counter()))

    def close(self) -> None:
        """In the thread that owns the watched sockets."""
        if self._bell.closed:
            return
        for socket in self._watched:
            if not socket.closed:
                socket.disable_monitor()
        if self._thread.is_alive():
            self._bell.send(b"end")
            self._thread.join()
        self._bell.close()

    def _keep(self, questions: zmq.Socket, bell: zmq.Socket) -> None:
        monitors: dict[Any, Tally] = {}
        poller = zmq.Poller()
        for socket in (questions, bell):
            poller.register(socket, zmq.POLLIN)
        over = False
        try:
            while not over:
                for socket, _ in poller.poll():
                    if socket is questions:
                        self._answer(questions)
                    elif socket is bell:
                        over = bell.recv() == b"end"
                        while not self._new.empty():
                            monitor, tally = self._new.get()
                            monitors[monitor] = tally
                            poller.register(monitor, zmq.POLLIN)
                    else:
                        _read(socket, monitors[socket])
        finally:  # a context with an open socket could not end
            for socket in (questions, bell, *monitors):
                socket.close(linger=0)

    def _answer(self, questions: zmq.Socket) -> None:
        version, request, domain, _address, _identity, mechanism, *credentials = questions.recv_multipart()
        why_not = refusal(mechanism, credentials, self._keys, self.passes)
        if why_not:
            for tally in self._tallies.get(domain, ())[-1:]:
                tally.deny(why_not)
        code, text = (b"400", why_not.encode()) if why_not else (b"200", b"OK")
        questions.send_multipart([version, request, code, text, b"", b""])


def _read(monitor: zmq.Socket, tally: Tally) -> None:
    """All events that have come: two bytes of kind and four of value, in the machine's order, then an endpoint."""
    while monitor.poll(0):
        told, _endpoint = monitor.recv_multipart()
        tally.event(int.from_bytes(told[:2], sys.byteorder), int.from_bytes(told[2:6], sys.byteorder))


_EVENTS = (
    zmq.EVENT_ACCEPTED | zmq.EVENT_ACCEPT_FAILED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)  # fmt: skip


def z85(data: bytes) -> bytes:
    """Bytes in multiples of four, as Z85 text (RFC 32)."""
    out = bytearray()
    for at in range(0, len(data), 4):
        number = int.from_bytes(data[at : at + 4], "big")
        out += bytes(_Z85[number // 85**power % 85] for power in (4, 3, 2, 1, 0))
    return bytes(out)

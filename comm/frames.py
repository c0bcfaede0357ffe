"""Frames: short messages from rank to rank of one host, in order, and how a rank waits for the next one.

They travel in shared memory where the C extension is there (Ring, waited for at a Bell), else over the socket that
joins two ranks (Wire, waited for with Poll): the slow twin, which makes the same calls. The socket also tells that the
other rank has ended, and why. What frames say is comm/lane.py's.

Ordering: whatever a frame speaks of was written before the frame was sent and is read after it was received. A ring
orders the two by release and acquire (csrc/exchange.h). A socket does by the lock of its queue, under which Linux puts
a frame on and takes it off.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, Protocol

from ..core import native
from .transport import SLICE_S
from .window import FRAME_BYTES

DATA, FREE, SMALL, OPEN, WRITTEN, BLAME = range(1, 7)
HEAD = struct.Struct("=qq")  # kind; number of the message, counted from 1 each way
# DATA: bytes in this chunk, bytes of the message. OPEN: bytes sent, bytes expected, where in the sender's window.
# WRITTEN: bytes. BLAME: a rank. A small message is its bytes after the head.
FRAME = struct.Struct("=qqqqq")
_SPIN_NS = 200_000  # at most, before it sleeps


def extension() -> Any:
    """The C extension if it knows about frames: one that was built before it did serves for other things."""
    return native.extension if hasattr(native.extension, "exchange_send") else None


class Broken(Exception):
    """The other rank wrote what this protocol does not know."""


def unpack(frame: bytes) -> tuple[int, int, int, int, int]:
    """(kind, number, a, b, c); those three of a small message, whose bytes come after its head, are 0."""
    if len(frame) >= HEAD.size:
        kind, number = HEAD.unpack_from(frame)
        if kind == SMALL:
            return kind, number, 0, 0, 0
        if len(frame) == FRAME.size:
            return FRAME.unpack(frame)
    raise Broken(f"a frame of {len(frame)} bytes")


class Wire:
    """Frames over the socket: the slow twin of Ring."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self.ended: str | None = None  # how the other rank left
        self.blame = ""  # and because of whom

    def send(self, frame: bytes) -> None:
        # Fewer than a ring's 16 frames each way are ever unread, so a frame always fits the socket's buffer.
        try:
            self._socket.send(frame)
        except ConnectionError as error:  # what it sent before it left still counts: read that first
            self.ended = self.ended or f"is gone ({error.strerror})"

    def receive(self) -> bytes | None:
        """The next frame, None where there is none now, or none any more: then `ended` says so."""
        while True:
            try:
                frame = self._socket.recv(2 * FRAME_BYTES)
            except BlockingIOError:
                return None
            except ConnectionError as error:  # told once, before what is left to read
                self.ended = f"is gone ({error.strerror})"
                continue
            if not frame:
                self.ended = self.ended or "ended or closed its transport"
                return None
            kind, _, rank, _, _ = unpack(frame)
            if kind != BLAME:
                return frame
            self.blame = f", after an error with rank {rank}"

    def check(self) -> None:
        """See whether the other rank has ended; here every `receive` does."""

    def close(self, blamed: int | None) -> None:
        if blamed is not None:  # so that, in a row of ranks that fall, each tells where it began
            with suppress(OSError):
                self._socket.send(FRAME.pack(BLAME, 0, blamed, 0, 0))
        self._socket.close()


class Ring:
    """Frames in shared memory, one ring each way; the socket only tells that the other rank has ended."""

    def __init__(self, extension: Any, rank: int, peer: int, mine: mmap.mmap, theirs: mmap.mmap, wire: Wire) -> None:
        self._send, self._receive = extension.exchange_send, extension.exchange_receive
        self._rank, self._peer, self._mine, self._theirs = rank, peer, mine, theirs
        self._sent = self._received = 0
        self._wire = wire

    @property
    def ended(self) -> str | None:
        return self._wire.ended

    @property
    def blame(self) -> str:
        return self._wire.blame

    def send(self, frame: bytes) -> None:
        self._sent += 1
        try:
            self._send(self._theirs, self._rank, self._sent, frame)
        except ValueError as error:
            raise Broken(str(error)) from None

    def receive(self) -> bytes | None:
        try:
            frame = self._receive(self._mine, self._peer, self._received + 1)
        except ValueError as error:
            raise Broken(str(error)) from None
        if frame is not None:
            self._received += 1
        return frame

    def check(self) -> None:
        if self._wire.ended is None and self._wire.receive() is not None:
            raise Broken("a frame on the socket, where frames travel in shared memory")


# ---- waiting ------------------------------------------------------------------------------------------------------


class Waiter(Protocol):
    """How a rank waits for frames: `look`, then read frames, then `wait`, and none is missed."""

    def look(self) -> None: ...

    def wait(self, peers: Iterable[int], timeout_s: float) -> bool:
        """Until there may be frames, or so long. True if it was quiet: then ask who has ended."""
        ...


class Bell:
    """At this rank's bell in its window: first spinning, longer if waits were short lately, then asleep."""

    def __init__(self, window: mmap.mmap, size: int) -> None:
        self._window, self._extension, self._seen = window, extension(), 0
        # Who spins where ranks outnumber cores keeps the one from running whom it waits for.
        self._longest_ns = _SPIN_NS if size <= len(os.sched_getaffinity(0)) else 0
        self.spin_ns = self._longest_ns

    def look(self) -> None:
        self._seen = self._extension.exchange_look(self._window)

    def wait(self, peers: Iterable[int], timeout_s: float) -> bool:
        nanoseconds = int(1e9 * min(timeout_s, SLICE_S))
        began = time.monotonic_ns()
        rang = self._extension.exchange_await(self._window, self._seen, self.spin_ns, nanoseconds)
        self.learn(time.monotonic_ns() - began)
        return rang == 0

    def learn(self, waited_ns: int) -> None:
        """How long the last wait was, asleep or not. Waking up takes so long that it pays to spin for a short one; of
        a long one spinning is a small part, but others might have used the core.
        """
        short = waited_ns < 4 * self._longest_ns
        self.spin_ns = self._longest_ns if short else self._longest_ns // 8


class Poll:
    """At the sockets, which tell of frames and of ends alike."""

    def __init__(self, sockets: Mapping[int, socket.socket]) -> None:
        self._sockets = sockets

    def look(self) -> None:
        pass

    def wait(self, peers: Iterable[int], timeout_s: float) -> bool:
        poll = select.poll()
        for peer in peers:
            poll.register(self._sockets[peer], select.POLLIN)
        poll.poll(1000 * timeout_s)
        return False

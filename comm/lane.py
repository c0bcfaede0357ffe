"""What joins two ranks of one host: frames that say what happened in each other's windows, and one message each way.

A message goes in one of three ways. Up to SMALL_BYTES it is a frame. Up to EAGER_BYTES, or where there is no better
way, it is copied into chunks of the receiver's window and out again. Rows, and whatever is larger, are written once,
straight to the place the receiver has named for them: both ranks open the message, the receiver with a place in its
arena, the sender writes there and says so. A receiver without room names no place, and the rows go through chunks.

How frames travel is comm/frames.py's; what they say is owned here, and is checked before it is used.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from .frames import DATA, FRAME, FREE, HEAD, OPEN, SMALL, WRITTEN, Broken, Ring, Wire, unpack
from .window import CHUNKS, Layout, Pages

SMALL_BYTES = 256
EAGER_BYTES = 1 << 16  # copying this twice costs less than waiting for a place
_AHEAD = 8  # messages that a peer can have begun before this rank expects them
ELSEWHERE = -1  # the place of a receiver that has none
_NOTHING = np.empty(0, dtype=np.uint8)
_KINDS = {DATA: "a chunk", SMALL: "a small message", OPEN: "an opening", WRITTEN: "rows"}


@dataclass(slots=True)
class Source:
    """A message to send: `write(begin, out)` writes its bytes from `begin` on into `out`, uint8 1-D.

    unit: `begin` and the length of `out` are multiples of it. direct: written where the receiver will read it, else
    `data` is the message.
    """

    total: int
    write: Callable[[int, Any], None]
    unit: int = 1
    direct: bool = False
    data: Any = b""


@dataclass(slots=True)
class Target:
    """Where a message is received, uint8 1-D. direct: the sender may write there itself if `at` is a place."""

    memory: Any  # np.ndarray or memoryview
    at: int = ELSEWHERE
    direct: bool = False


def bytes_source(data: np.ndarray | memoryview, direct: bool = False) -> Source:
    def write(begin: int, out: Any) -> None:
        out[:] = data[begin : begin + len(out)]

    return Source(len(data), write, 1, direct, data)


def rows_source(fill: Callable[[int, int, torch.Tensor], None], first: int, count: int, row_bytes: int) -> Source:
    """Rows first..first + count of start_rows."""

    def write(begin: int, out: np.ndarray) -> None:
        row, end = begin // row_bytes, (begin + len(out)) // row_bytes
        fill(first + row, first + end, torch.from_numpy(out).view(-1, row_bytes))

    return Source(count * row_bytes, write, row_bytes, True)


def rows_sources(
    fill: Callable[[int, int, torch.Tensor], None], row_bytes: Sequence[int], counts: Sequence[int]
) -> list[Source]:
    """The rows of start_rows for each rank r, of row_bytes[r]."""
    firsts = [end - count for count, end in zip(counts, accumulate(counts), strict=True)]
    return [rows_source(fill, *each) for each in zip(firsts, counts, row_bytes, strict=True)]


def rows_targets(memory: np.ndarray, at: int, row_bytes: Sequence[int], counts: Sequence[int]) -> list[Target]:
    """Where each rank's rows belong in `memory`, which is at `at` in the window or elsewhere."""
    targets, begin = [], 0
    for each, count in zip(row_bytes, counts, strict=True):
        end = begin + each * count
        targets.append(Target(memory[begin:end], ELSEWHERE if at == ELSEWHERE else at + begin, True))
        begin = end
    return targets


def _cut(source: Source) -> Source:
    """A source whose units do not fit a chunk, byte by byte; needs memory for one unit."""
    unit, held = np.empty(source.unit, dtype=np.uint8), -1

    def write(begin: int, out: np.ndarray) -> None:
        nonlocal held
        done = 0
        while done < len(out):
            number, inside = divmod(begin + done, source.unit)
            if number != held:
                source.write(number * source.unit, unit)
                held = number
            part = unit[inside : inside + len(out) - done]
            out[done : done + len(part)] = part
            done += len(part)

    return Source(source.total, write)


class Lost(Exception):
    """The other rank has ended."""


class Mismatch(Exception):
    """The other rank is in another call, or counts differently."""


class Lane:
    """One rank's end: its peer's process, the chunks to write and to read, and one message each way under way.

    `work` does what can be done now; it raises Lost, Mismatch or Broken. What the peer wrote is checked before use.
    """

    def __init__(
        self, wire: Wire, frames: Wire | Ring, pid: int, layout: Layout, mine: mmap.mmap, theirs: mmap.mmap,
        rank: int, peer: int,
    ) -> None:  # fmt: skip
        self.pid, self._wire, self._frames, self._layout = pid, wire, frames, layout
        self._outbox, self._inbox = layout.chunks(theirs, rank), layout.chunks(mine, peer)
        self._theirs, self._their_pages = np.frombuffer(theirs, dtype=np.uint8), Pages(theirs, layout.arena_at)
        self._free, self._next_out, self._next_in = CHUNKS, 0, 0
        self._early: deque[bytes] = deque()  # frames of messages that this rank does not expect yet
        self._source: Source | None = None
        self._target: Target | None = None
        self._out_number = self._in_number = 0
        self._out_total = self._sent = self._received = 0
        self._place: int | None = None  # that the peer has named for this rank's message

    def begin(self, source: Source | None, target: Target | None) -> None:
        """Take up a message each way, or one way. A message both ways may be small or direct."""
        self._source, self._target = source, target
        self._sent = self._received = 0
        self._place = None
        if target is not None:
            self._in_number += 1
        self._out_total = 0 if source is None else source.total
        if source is None:
            return
        self._out_number += 1
        if target is None:  # nothing will come by which the peer's end would be noticed
            self._frames.check()
        if target is not None and (source.direct or target.direct):
            self._say(OPEN, self._out_number, source.total, len(target.memory), target.at)
        if source.direct:
            if source.total == 0:
                self._source = None
        elif target is not None and source.total <= SMALL_BYTES:
            self._frames.send(b"".join((HEAD.pack(SMALL, self._out_number), source.data)))
            self._source = None

    @property
    def received(self) -> bool:
        return self._target is None

    @property
    def idle(self) -> bool:
        return self._source is None and self._target is None

    @property
    def needs_place(self) -> bool:
        return self._source is not None and self._source.direct and self._place is None

    def work(self) -> None:
        """Everything that can be done now without waiting. Raises Lost where nothing more can ever be done."""
        for _ in range(len(self._early)):
            self._take(self._early.popleft())
        self._write()
        while not self.idle:
            frame = self._frames.receive()
            if frame is None:
                break
            self._take(frame)
            self._write()
        if not self.idle and self._frames.ended is not None:
            raise Lost(self._frames.ended + self._frames.blame)

    def check(self) -> None:
        """See whether the peer has ended; `work` then says so, after what it sent before."""
        self._frames.check()

    def require(self) -> None:
        """Raises Lost where the peer has ended."""
        self._frames.check()
        if self._frames.ended is not None:
            raise Lost(self._frames.ended + self._frames.blame)

    # ---- writing --------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        source = self._source
        if source is None:
            return
        if source.direct:
            if self._place is None:
                return
            if self._place != ELSEWHERE:
                self._their_pages.need(self._place + source.total, ours=False)
                source.write(0, self._theirs[self._place : self._place + source.total])
                self._say(WRITTEN, self._out_number, source.total)
                self._source = None
                return
        chunk_bytes = self._outbox.shape[1]
        if source.unit > chunk_bytes:
            self._source = source = _cut(source)
        fits = chunk_bytes // source.unit * source.unit
        while self._free:
            length = min(fits, source.total - self._sent)
            if length:
                source.write(self._sent, self._outbox[self._next_out, :length])
            self._say(DATA, self._out_number, length, source.total)
            self._next_out, self._free = (self._next_out + 1) % CHUNKS, self._free - 1
            self._sent += length
            if self._target is None and self._frames.ended is not None:  # nobody is left to read it
                raise Lost(self._frames.ended + self._frames.blame)
            if self._sent == source.total:
                self._source = None
                return

    def _say(self, kind: int, number: int, a: int = 0, b: int = 0, c: int = 0) -> None:
        self._frames.send(FRAME.pack(kind, number, a, b, c))

    # ---- reading --------------------------------------------------------------------------------------------------

    def _take(self, frame: bytes) -> None:
        kind, number, a, b, c = unpack(frame)
        if kind == FREE:
            self._free += 1
            if self._free > CHUNKS:
                raise Broken("freed a chunk that was not in use")
            return
        target = self._target
        if kind not in _KINDS:
            raise Broken(f"a frame of kind {kind}")
        if number != self._in_number or target is None:
            if not self._in_number < number <= self._in_number + _AHEAD:
                raise Broken(f"{_KINDS[kind]} of message {number} after message {self._in_number}")
            self._early.append(frame)
            return
        if kind == SMALL:
            self._check_total(len(frame) - HEAD.size, target, not target.direct)
            target.memory[:] = memoryview(frame)[HEAD.size :]
            self._target = None
        elif kind == DATA:
            self._check_total(b, target, not target.direct or target.at == ELSEWHERE)
            self._take_chunk(a, target)
        elif kind == OPEN:
            self._open(a, b, c, target)
        else:
            self._check_total(a, target, target.direct and target.at != ELSEWHERE)
            self._target = None

    def _check_total(self, total: int, target: Target, expected: bool) -> None:
        if total != len(target.memory) or not expected:
            way = "" if expected else " in another way"
            raise Mismatch(f"sent {total} bytes{way} where this rank expects {len(target.memory)}")

    def _take_chunk(self, length: int, target: Target) -> None:
        left = len(target.memory) - self._received
        if not (0 < length <= min(left, self._inbox.shape[1]) or length == left == 0):
            raise Broken(f"a chunk of {length} bytes where {left} are left")
        target.memory[self._received : self._received + length] = self._inbox[self._next_in, :length]
        self._say(FREE, 0)
        self._next_in = (self._next_in + 1) % CHUNKS
        self._received += length
        if self._received == len(target.memory):
            self._target = None

    def _open(self, sends: int, expects: int, place: int, target: Target) -> None:
        if sends != len(target.memory) or expects != self._out_total:
            raise Mismatch(
                f"sends {sends} bytes where this rank expects {len(target.memory)}, and expects {expects} where it "
                f"sends {self._out_total}"
            )
        if self.needs_place:
            if place != ELSEWHERE and not self._layout.is_region(place, expects):
                raise Broken(f"a place for {expects} bytes at {place}, which is not in its window")
            self._place = place
        if target.direct and not len(target.memory):
            self._target = None

    # ---- the end --------------------------------------------------------------------------------------------------

    def progress(self) -> str:
        out = "all sent" if self._source is None else f"{self._sent} of {self._out_total} bytes sent"
        if self.needs_place:
            out += ", no place named for them yet"
        if self._target is None:
            return f"{out}, all received"
        return f"{out}, {self._received} of {len(self._target.memory)} received"

    def close(self, blamed: int | None) -> None:
        self._wire.close(blamed)
        self._outbox = self._inbox = self._theirs = _NOTHING  # the memory goes with the last view of it

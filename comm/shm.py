"""Ranks of one host over shared memory. Rows are written once, where the rank that receives them reads them.

Each rank owns one window (comm/window.py), which all ranks map when they meet (comm/meeting.py). Messages between two
ranks are comm/lane.py's; the frames that tell of them travel in shared memory, too, or over sockets where the C
extension is missing (comm/frames.py). Exchanges, deadlines and whom to blame are owned here.

Rows move only inside calls. Starting an exchange writes what has a place: small messages always, and rows of ranks that
have started as well. The rest moves when the exchange is finished, or in the next call if one comes before: two ranks
have one message each way under way. So the rank that starts last holds up nobody by computing meanwhile.

Rows of dispatch and combine go in one step where they are few: parcels (comm/parcels.py) carry their number and the
rows themselves. More of them are announced by a parcel and then written in place.
"""

from __future__ import annotations

import math
import mmap
import operator
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NoReturn

import numpy as np
import torch

from ..core.errors import ConfigError, MoeRuntimeError, PeerLost, PeerTimeout
from ..core.memory import pool
from .frames import Bell, Broken, Poll, Ring, Waiter, Wire, extension
from .lane import (
    EAGER_BYTES,
    ELSEWHERE,
    SMALL_BYTES,
    Lane,
    Lost,
    Mismatch,
    Source,
    Target,
    bytes_source,
    rows_sources,
    rows_targets,
)
from .meeting import meet
from .parcels import Parcels, Post
from .transport import (
    SLICE_S,
    InHalves,
    Interruption,
    Waits,
    byte_view,
    check_counts,
    check_peer,
    describe_counts,
    once,
    reduce_in_rank_order,
)
from .window import Arena, create, layout_of

_WINDOW_BYTES = 512 << 20
_ROW_ALIGN = 16
_PATIENCE_S = 0.0002  # how long a start waits for places, so that rows move while this rank computes
_NOTHING = np.empty(0, dtype=np.uint8)
_Messages = dict[int, tuple[Source | None, Target | None]]  # by rank, what goes there and what comes


class SharedMemoryTransport(InHalves):
    """Ranks 0..size-1 on one Linux host; CPU tensors.

    store: where ranks leave the names of their sockets: anything with torch's Store's `set`, `get` and `wait`; used
        only here. window_bytes: the most memory each rank receives into, the same on all ranks. Pages are taken from
        the machine when they are first needed and kept: a world uses what its largest exchange at once needed, and
        never more than size * window_bytes. Chunks for other ranks are a part of it: 2 MiB each, at most a quarter.

    Results of exchanges that were received in the window stay there while the caller has them. When there is no room
    left, messages go in rounds through the chunks into memory of their own: slower, never refused.

    Every exchange carries the size of each message, so counts that do not match are an error that names both. A rank
    that ends or closes its transport gives the others PeerLost as soon as they wait for it. After an error the
    transport is unusable, since ranks may be in different calls.
    Raises PeerTimeout when a rank has not come within the deadline, ConfigError when ranks are not on one host.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        deadline_s: float,
        window_bytes: int = _WINDOW_BYTES,
        interruption: Interruption | None = None,
    ) -> None:
        if not 0 <= rank < size:
            raise ConfigError(f"rank {rank} is not in 0..{size - 1}")
        self.rank, self.size, self.deadline_s = rank, size, deadline_s
        self.waits = Waits(size)
        self._latest: _Exchange | _Rows | None = None  # all before it have ended
        self._unusable: str | None = None
        self._interruption = interruption or Interruption()
        self._blamed: int | None = None
        self._lanes: dict[int, Lane] = {}
        self._layout = layout_of(size, window_bytes)
        descriptor = create(self._layout)
        try:
            window = mmap.mmap(descriptor, self._layout.window_bytes)
            peers = meet(store, rank, size, deadline_s, descriptor, self._layout, self._interruption)
        finally:
            os.close(descriptor)  # the mappings keep the memory
        self._arena = Arena(window, self._layout)
        without = [peer for peer, one in peers.items() if not one.has_rings] + [rank] * (extension() is None)
        self._plain = f"frames over sockets: no C extension on ranks {sorted(without)}" if without else ""
        for peer, one in sorted(peers.items()):
            wire = Wire(one.connection)
            frames: Wire | Ring = wire
            if not without:
                frames = Ring(extension(), rank, peer, window, one.window, wire)
            self._lanes[peer] = Lane(wire, frames, one.pid, self._layout, window, one.window, rank, peer)
        sockets = {peer: one.connection for peer, one in peers.items()}
        self._waiter: Waiter = Poll(sockets) if without else Bell(window, size)
        windows = {peer: one.window for peer, one in peers.items()}
        self._parcels = Parcels(rank, window, windows, self._layout, use=not without)

    @property
    def name(self) -> str:
        return f"shm ({self._plain})" if self._plain else "shm"

    def describe(self) -> list[str]:
        """One line for people."""
        window, touched, lent = (
            f"{size / 2**20:.1f} MiB"
            for size in (self._layout.window_bytes, self._arena.touched_bytes, self._arena.lent_bytes)
        )
        return [
            f"shm: {self._plain or 'frames in shared memory (C)'}; rows up to {window} per rank are written once, "
            f"in place: {touched} touched so far, {lent} held by results now"
        ]

    def start_all_to_all_v(
        self, send: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], phase: str
    ) -> Callable[[], torch.Tensor]:
        """As the contract has it. Rows may come back in this rank's window, as those of start_rows."""
        check_counts(self, send, send_counts, recv_counts, phase)
        row_bytes = send.element_size() * math.prod(send.shape[1:])
        shape = (sum(recv_counts), *send.shape[1:])
        data: Any
        memory: Any
        at = ELSEWHERE
        if 0 < row_bytes * max(*send_counts, *recv_counts) <= SMALL_BYTES and shape[0]:  # counts: fewest steps
            memory = memoryview(bytearray(row_bytes * shape[0]))
            recv = torch.frombuffer(memory, dtype=send.dtype).view(shape)
            data = memoryview(_bytes_of(send))
        else:
            if any(row_bytes * count > EAGER_BYTES for peer, count in enumerate(recv_counts) if peer != self.rank):
                at, memory = self._take_memory(row_bytes * shape[0])
                recv = torch.from_numpy(memory).view(send.dtype).view(shape)
            else:
                recv = send.new_empty(shape)
                memory = byte_view(recv)
            data = byte_view(send)
        sources, targets, begin, place = [], [], 0, 0
        for send_count, recv_count in zip(send_counts, recv_counts, strict=True):
            end, after = begin + row_bytes * send_count, place + row_bytes * recv_count
            sources.append(bytes_source(data[begin:end], direct=end - begin > EAGER_BYTES))
            direct = after - place > EAGER_BYTES
            targets.append(Target(memory[place:after], at + place if direct and at != ELSEWHERE else ELSEWHERE, direct))
            begin, place = end, after
        return self._start_rows(sources, targets, recv, send_counts, recv_counts, phase)

    def start_rows(
        self,
        row_bytes: Sequence[int],
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        fill: Callable[[int, int, torch.Tensor], None],
        phase: str,
    ) -> Callable[[], torch.Tensor]:
        """An all_to_all_v of packed rows that are written where they will be read, instead of being copied there.

        row_bytes [R]: of the rows between this rank and each, both ways; multiples of 16. fill(begin, end, out) writes
        rows begin..end, numbered over all destinations in order, into `out`, uint8 [end - begin, row_bytes] in the
        receiver's window. It is called in this call or when the exchange is finished, once for each row. Rows that fit
        in a parcel (256 KiB, less in small windows) are written to memory of this rank first, those of several
        destinations at once where all row_bytes are the same.

        The returned function waits and gives the rows, grouped by source, as bytes in one dimension, once. If all came
        in parcels, that is memory of its own. Else, where this rank's window has room for all of them, it is memory of
        the window itself, lent until the tensor and all views of it are gone (a forked child, which shares it, must
        copy what it needs). Where it has none, rows go through chunks into memory that is taken for the result, of just
        its size; a sender whose rows are larger than a chunk (1 MiB, less in small windows) takes memory for one row
        for each such receiver.

        After an error in `fill` the transport is unusable.
        """
        row_bytes = self._check_row_counts(row_bytes, send_counts, recv_counts, phase)
        if not self._parcels.used:
            at, memory = self._take_memory(sum(_products(row_bytes, recv_counts)))
            sources = rows_sources(fill, row_bytes, send_counts)
            targets = rows_targets(memory, at, row_bytes, recv_counts)
            return self._start_rows(sources, targets, torch.from_numpy(memory), send_counts, recv_counts, phase)
        rows = self._begin(_Rows(self, row_bytes, send_counts, fill, phase, (0, 0), recv_counts))
        return once(lambda: rows.finish()[2], phase)

    @property
    def takes_counted_rows(self) -> bool:
        """Whether start_counted_rows can be called; the same on all ranks."""
        return self._parcels.used

    def start_counted_rows(
        self,
        row_bytes: Sequence[int],
        send_counts: Sequence[int],
        note: tuple[int, int],
        fill: Callable[[int, int, torch.Tensor], None],
        phase: str,
    ) -> Callable[[], tuple[list[int], list[list[int]], torch.Tensor]]:
        """start_rows for ranks that do not know yet how many rows come; each sends two numbers of its own along.

        The returned function gives (rows received from each rank, each rank's note, the rows as start_rows gives
        them), once. A call that sends more than fits in parcels waits for all ranks' counts; others do not wait.
        """
        row_bytes = self._check_row_counts(row_bytes, send_counts, send_counts, phase)
        return once(self._begin(_Rows(self, row_bytes, send_counts, fill, phase, note)).finish, phase)

    def all_reduce(self, tensor: torch.Tensor, phase: str, op: str = "sum") -> None:
        """In rank order, so that the result is the same for any timing; of large tensors each rank reduces a part."""
        flat = tensor.detach().view(-1)
        if flat.numel() * flat.element_size() <= SMALL_BYTES:
            flat.copy_(reduce_in_rank_order(list(self.all_gather(flat, phase)), op))
            return
        bounds = [len(flat) * rank // self.size for rank in range(self.size + 1)]
        counts = [end - begin for begin, end in zip(bounds, bounds[1:], strict=False)]
        mine = counts[self.rank]
        parts = pool.empty((self.size, mine), flat.dtype).unbind(0)
        outgoing, incoming = [byte_view(part) for part in flat.split(counts)], [byte_view(part) for part in parts]
        self._exchange_all(outgoing, incoming, phase, lambda: describe_counts(counts, [mine] * self.size))
        reduced = byte_view(reduce_in_rank_order(parts, op))
        detail = f"all_reduce of {len(flat)} {tensor.dtype}"
        self._exchange_all([reduced] * self.size, outgoing, phase, lambda: detail)

    def all_gather(self, tensor: torch.Tensor, phase: str) -> torch.Tensor:
        out = tensor.new_empty((self.size, *tensor.shape))
        self._exchange_all(
            [byte_view(tensor)] * self.size,
            [byte_view(part) for part in out.unbind(0)],
            phase,
            lambda: f"all_gather of {tuple(tensor.shape)} {tensor.dtype}",
        )
        return out

    def broadcast(self, tensor: torch.Tensor, root: int, phase: str) -> None:
        data = byte_view(tensor)
        messages: _Messages = {root: (None, Target(data))}
        if self.rank == root:
            messages = {peer: (bytes_source(data), None) for peer in self._lanes}
        detail = f"broadcast of {tuple(tensor.shape)} {tensor.dtype} from rank {root}"
        self._finish(self._start(messages, phase, lambda: detail))

    def send(self, tensor: torch.Tensor, to: int, phase: str) -> None:
        check_peer(self, to, phase)
        detail = f"sending {tuple(tensor.shape)} {tensor.dtype} to rank {to}"
        self._finish(self._start({to: (bytes_source(byte_view(tensor)), None)}, phase, lambda: detail))

    def recv(self, tensor: torch.Tensor, source: int, phase: str) -> None:
        check_peer(self, source, phase)
        detail = f"receiving {tuple(tensor.shape)} {tensor.dtype} from rank {source}"
        self._finish(self._start({source: (None, Target(byte_view(tensor)))}, phase, lambda: detail))

    def barrier(self, phase: str) -> None:
        self._exchange_all([_NOTHING] * self.size, [_NOTHING] * self.size, phase, lambda: "")

    def close(self) -> None:
        self._unusable = self._unusable or "it is closed"
        for lane in self._lanes.values():
            lane.close(self._blamed)
        self._lanes, self._latest = {}, None  # what is under way holds the transport, and so its windows, in a circle

    # ---- moving bytes -------------------------------------------------------------------------------------------

    def _take_memory(self, num_bytes: int) -> tuple[int, np.ndarray]:
        """(where in the window, memory): a region of the window if there is room."""
        if not num_bytes:
            return ELSEWHERE, _NOTHING
        return self._arena.lend(num_bytes) or (ELSEWHERE, pool.bytes(num_bytes))

    def _check_row_counts(
        self, row_bytes: Sequence[int], send_counts: Sequence[int], recv_counts: Sequence[int], phase: str
    ) -> list[int]:
        if len(row_bytes) != self.size or min(row_bytes) <= 0 or math.gcd(*row_bytes) % _ROW_ALIGN:
            raise ConfigError(
                f"{phase}: row_bytes must be {self.size} positive multiples of {_ROW_ALIGN}, got {list(row_bytes)}"
            )
        check_counts(self, None, send_counts, recv_counts, phase)
        if send_counts[self.rank] != recv_counts[self.rank]:
            detail = describe_counts(send_counts, recv_counts)
            raise ConfigError(f"{phase}: rank {self.rank} does not agree with itself, {detail}")
        return list(row_bytes)

    def _start_rows(
        self,
        sources: list[Source],
        targets: list[Target],
        result: torch.Tensor,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        phase: str,
    ) -> Callable[[], torch.Tensor]:
        exchange = self._start_all(sources, targets, phase, lambda: describe_counts(send_counts, recv_counts))
        results = [result]  # emptied, so that who keeps the function does not keep the rows

        def finish() -> torch.Tensor:
            self._finish(exchange)
            for peer, seconds in exchange.waited_s.items():
                self.waits.add(peer, seconds)
            return results.pop()

        return once(finish, phase)

    def _exchange_all(
        self, outgoing: list[np.ndarray], incoming: list[np.ndarray], phase: str, detail: Callable[[], str]
    ) -> None:
        sources, targets = [bytes_source(data) for data in outgoing], [Target(memory) for memory in incoming]
        self._finish(self._start_all(sources, targets, phase, detail))

    def _start_all(
        self, sources: list[Source], targets: list[Target], phase: str, detail: Callable[[], str]
    ) -> _Exchange:
        """One message to and from every rank, this one included."""
        mine, place = sources[self.rank], targets[self.rank]
        if mine.total != len(place.memory):
            raise ConfigError(f"{phase}: rank {self.rank} does not agree with itself, {detail()}")
        return self._start({peer: (sources[peer], targets[peer]) for peer in self._lanes}, phase, detail, (mine, place))

    def _start(
        self,
        messages: _Messages,
        phase: str,
        detail: Callable[[], str],
        own: tuple[Source, Target] | None = None,
    ) -> _Exchange:
        """One message to a rank, from it or both, all at once; `own` is from this rank to itself.

        An empty message is sent as well. Ends the exchange that is under way first, if there is one.
        """
        self._end_latest(phase)
        self._latest = exchange = self._open(messages, phase, detail, own)
        return exchange

    def _end_latest(self, phase: str) -> None:
        self._check_usable(phase)
        if isinstance(self._latest, _Rows):
            self._latest.settle()
        elif self._latest is not None:
            self._finish(self._latest)

    def _begin(self, rows: _Rows) -> _Rows:
        self._end_latest(rows.phase)
        self._latest = rows
        self._step(rows, self.rank, rows.begin)
        return rows

    def _open(
        self,
        messages: _Messages,
        phase: str,
        detail: Callable[[], str],
        own: tuple[Source, Target] | None = None,
    ) -> _Exchange:
        exchange = _Exchange({peer: self._lanes[peer] for peer in messages}, phase, detail, {})
        for peer, (source, target) in messages.items():
            self._step(exchange, peer, self._lanes[peer].begin, source, target)
        if own is not None and own[0].total:
            self._step(exchange, self.rank, own[0].write, 0, own[1].memory)
        self._work(exchange, 0.0)
        self._await_places(exchange)
        return exchange

    def _await_places(self, exchange: _Exchange) -> None:
        until = None
        while any(lane.needs_place for lane in exchange.busy.values()):
            now = time.monotonic()
            until = until or now + _PATIENCE_S
            if now >= until:
                return
            self._waiter.wait(exchange.busy, until - now)
            self._work(exchange, 0.0)

    def _finish(self, exchange: _Exchange) -> None:
        """Until all messages are received and all of this rank's are in the receivers' windows."""
        if not exchange.busy:  # so it was at once, or a later call has ended it
            return
        self._check_usable(exchange.phase)
        waited = 0.0  # not the time that this rank's own writing takes
        while exchange.busy:
            self._interruption.check(self.rank, exchange.phase)
            if waited >= self.deadline_s:
                self._time_out(exchange, {peer: lane.progress() for peer, lane in exchange.busy.items()})
            began = time.monotonic()
            quiet = self._waiter.wait(exchange.busy, self.deadline_s - waited)
            waited += time.monotonic() - began
            if quiet:
                for peer, lane in exchange.busy.items():
                    self._step(exchange, peer, lane.check)
            self._work(exchange, waited)

    def _work(self, exchange: _Exchange, waited: float) -> None:
        """Everything that can be done now without waiting."""
        self._waiter.look()
        for peer, lane in list(exchange.busy.items()):
            self._step(exchange, peer, lane.work)
            if lane.received:
                exchange.waited_s.setdefault(peer, waited)
            if lane.idle:
                del exchange.busy[peer]

    def _step(self, exchange: _Exchange | _Rows, peer: int, step: Callable[..., Any], *arguments: Any) -> Any:
        """A step of an exchange with `peer`; whatever stops it makes the transport unusable."""
        try:
            return step(*arguments)
        except Lost as lost:
            self._unusable, self._blamed = f"phase {exchange.phase} lost rank {peer}", peer
            raise PeerLost(
                f"{self._where(exchange)}: rank {peer} (process {self._lanes[peer].pid}) {lost}; look at its log",
                rank=peer,
                phase=exchange.phase,
            ) from None
        except Mismatch as mismatch:
            self._unusable, self._blamed = f"of a mismatch in phase {exchange.phase}", peer
            raise MoeRuntimeError(
                f"{self._where(exchange)}: rank {peer} {mismatch}; all ranks must make the same calls in the same "
                "order, with counts that match"
            ) from None
        except Broken as broken:
            self._unusable, self._blamed = f"rank {peer} broke the protocol in phase {exchange.phase}", peer
            who = f"rank {peer} (process {self._lanes[peer].pid})" if peer in self._lanes else "a rank"
            raise MoeRuntimeError(
                f"{self._where(exchange)}: what {who} wrote to shared memory "
                f"cannot be: {broken}; it is faulty, or something has overwritten the memory"
            ) from None
        except BaseException as error:
            self._unusable = self._unusable or f"{type(error).__name__} ended phase {exchange.phase} before its time"
            raise

    def _where(self, exchange: _Exchange | _Rows) -> str:
        detail = exchange.detail()
        return f"rank {self.rank}, phase {exchange.phase}" + (f", {detail}" if detail else "")

    def _time_out(self, exchange: _Exchange | _Rows, busy: dict[int, str]) -> NoReturn:
        """busy: the ranks waited for, and how far each is."""
        phase = exchange.phase
        self._unusable, self._blamed = f"phase {phase} timed out", next(iter(busy))
        progress = "; ".join(f"rank {peer}: {how_far}" for peer, how_far in busy.items())
        raise PeerTimeout(
            f"{self._where(exchange)}: waited {self.deadline_s:g} s for ranks {list(busy)} over {self.name} "
            f"({progress}); they are stuck, stopped or in a different call (raise timeout_s if they are only slow)",
            waiting_rank=self.rank,
            ranks=tuple(busy),
            phase=phase,
        )

    def _check_usable(self, phase: str) -> None:
        self._interruption.check(self.rank, phase)
        if self._unusable is not None:
            raise RuntimeError(f"{phase}: the transport cannot be used any more: {self._unusable}")


@dataclass(slots=True)
class _Exchange:
    """Messages that were started together.

    busy: the lanes, by rank, on which something is left to do. waited_s: seconds until each rank's message was there.
    """

    busy: dict[int, Lane]
    phase: str
    detail: Callable[[], str]
    waited_s: dict[int, float]


class _Rows:
    """Rows under way. Each rank's go in its parcel if they fit (`here`), else by the lanes once both know their counts.

    row_bytes: of each rank's rows, both ways. recv_counts: None where only the parcels will tell.
    """

    def __init__(
        self,
        transport: SharedMemoryTransport,
        row_bytes: list[int],
        send_counts: Sequence[int],
        fill: Callable[[int, int, torch.Tensor], None],
        phase: str,
        note: tuple[int, int],
        recv_counts: Sequence[int] | None = None,
    ) -> None:
        self.transport, self.row_bytes, self.phase, self.note = transport, row_bytes, phase, note
        self.send_counts, self.recv_counts, self.fill = send_counts, recv_counts, fill
        self.sent = _products(row_bytes, send_counts)
        self.here = [transport._parcels.fits(num_bytes) for num_bytes in self.sent]
        self.received: list[int] = []  # bytes from each rank
        self.notes: list[list[int]] = []  # by rank; empty until all parcels have come
        self.waited_ns: list[int] = []
        self.post: Post | None = None
        self.by_lane: _Exchange | None = None
        self.memory: np.ndarray | None = None
        self.settled = False

    def detail(self) -> str:
        return describe_counts(self.send_counts, self.recv_counts or [])

    def begin(self) -> None:
        parcels = self.transport._parcels
        all_here = all(self.here)
        bytes_here = self.sent if all_here else map(operator.mul, self.sent, self.here)
        bounds = list(accumulate(bytes_here, initial=0))
        message = parcels.scratch(bounds[-1])
        self._write(message, bounds, all_here)
        expected = self.recv_counts or [-1] * len(self.sent)
        notes = [(*each, *self.note) for each in zip(self.send_counts, self.here, expected, strict=True)]
        self.post = parcels.post(message, bounds, notes)
        if self.recv_counts is None and not all_here:
            self.gather()
        if self.recv_counts is not None:
            self.open()

    def _write(self, message: np.ndarray, bounds: list[int], all_here: bool) -> None:
        """The rows that go in parcels; all at once where they can."""
        rows = torch.from_numpy(message)
        if all_here and self.row_bytes.count(self.row_bytes[0]) == len(self.row_bytes):
            if message.size:
                self.fill(0, sum(self.send_counts), rows.view(-1, self.row_bytes[0]))
            return
        first = 0
        for rank, (count, here) in enumerate(zip(self.send_counts, self.here, strict=True)):
            if here and count:
                part = rows[bounds[rank] : bounds[rank + 1]].view(count, self.row_bytes[rank])
                self.fill(first, first + count, part)
            first += count

    def open(self) -> None:
        """Memory for the rows, and the lanes where some do not fit in parcels."""
        transport = self.transport
        self.received = _products(self.row_bytes, self.recv_counts)
        comes_here = [transport._parcels.fits(num_bytes) for num_bytes in self.received]
        if all(self.here) and all(comes_here):
            self.memory = np.empty(sum(self.received), dtype=np.uint8)
            return
        at, self.memory = transport._take_memory(sum(self.received))
        sources = rows_sources(self.fill, self.row_bytes, self.send_counts)
        targets = rows_targets(self.memory, at, self.row_bytes, self.recv_counts)
        for rank in range(transport.size):
            if self.here[rank]:
                sources[rank] = bytes_source(_NOTHING, direct=True)
            if comes_here[rank]:
                targets[rank] = Target(_NOTHING, direct=True)
        far = [peer for peer in transport._lanes if not (self.here[peer] and comes_here[peer])]
        messages = {peer: (sources[peer], targets[peer]) for peer in far}
        own = (sources[transport.rank], targets[transport.rank])
        self.by_lane = transport._open(messages, self.phase, self.detail, own)

    def settle(self) -> None:
        """Until all rows are received and all of this rank's are where they belong."""
        if self.settled:
            return
        transport = self.transport
        self.gather()
        if self.memory is None:
            self.open()
        if self.by_lane is not None:
            transport._finish(self.by_lane)
        transport._step(self, transport.rank, transport._parcels.fetch, self.post, self.memory, self.received)
        self.waited_ns = self.post.waited_ns.tolist()  # the arrays are the next post's
        self.settled, self.fill = True, None

    def finish(self) -> tuple[list[int], list[list[int]], torch.Tensor]:
        """(rows from each rank, each rank's note, the rows as bytes in one dimension)."""
        transport = self.transport
        if not self.settled:
            transport._check_usable(self.phase)
            self.settle()
        memory, self.memory = self.memory, None  # so that who keeps the function does not keep the rows
        for peer in transport._lanes:
            written = 0.0 if self.by_lane is None else self.by_lane.waited_s.get(peer, 0.0)
            transport.waits.add(peer, 1e-9 * self.waited_ns[peer] + written)
        return list(self.recv_counts), [note[3:] for note in self.notes], torch.from_numpy(memory)

    def gather(self) -> None:
        """Until every rank's parcel is there, and so how many rows it sends."""
        if self.notes:
            return
        transport, post = self.transport, self.post
        deadline_s = transport.deadline_s
        while not self._all_there(min(SLICE_S, deadline_s)):
            transport._interruption.check(transport.rank, self.phase)
            waited_s = 1e-9 * int(post.waited_ns.max())
            for peer in post.missing():
                transport._step(self, peer, transport._lanes[peer].check)
            if self._all_there(0.0):  # what a rank sent before it left still counts
                break
            for peer in post.missing():
                transport._step(self, peer, transport._lanes[peer].require)
            if waited_s >= deadline_s:
                transport._time_out(self, {peer: "nothing received" for peer in post.missing()})
        self.notes = post.notes.tolist()
        for peer in transport._lanes:
            transport._step(self, peer, self._check, peer)
        if self.recv_counts is None:
            self.recv_counts = [note[0] for note in self.notes]

    def _all_there(self, timeout_s: float) -> bool:
        transport = self.transport
        return transport._step(self, transport.rank, transport._parcels.gather, self.post, transport._waiter, timeout_s)

    def _check(self, peer: int) -> None:
        count, here, expects, *_ = self.notes[peer]
        each, length = self.row_bytes[peer], int(self.post.lengths[peer])
        if count < 0 or here != self.transport._parcels.fits(each * count) or length != each * count * here:
            raise Broken(f"a parcel of {length} bytes that is to say {count} rows of {each} bytes")
        expected, sent = count if self.recv_counts is None else self.recv_counts[peer], self.send_counts[peer]
        if count != expected or expects not in (sent, -1):
            raise Mismatch(
                f"sends {each * count} bytes where this rank expects {each * expected}, and expects "
                f"{each * max(expects, 0)} where it sends {each * sent}"
            )


def _products(row_bytes: Sequence[int], counts: Sequence[int]) -> list[int]:
    return list(map(operator.mul, row_bytes, counts))


def _bytes_of(tensor: torch.Tensor) -> bytes:
    """A copy; by a short way for counts."""
    return tensor.detach().numpy().tobytes() if tensor.dtype is torch.int64 else byte_view(tensor).tobytes()

"""Ranks of one host over shared memory: the plain version, in Python. Data is copied once in and once out.

Each rank owns one receive window, which holds a mailbox of two chunks for each other rank. A sender copies a chunk
into its mailbox and says so in a frame on the socket it shares with that rank; the receiver copies the chunk out and
says that the mailbox is free again. Larger messages take many rounds.

Rows move only inside calls. Starting an exchange fills the mailboxes, so a rank that computes meanwhile holds up
nobody whose rows fit into them. The rest moves when the exchange is finished, or in the next call if one comes before:
two ranks have one message each way under way.

Memory is anonymous (memfd) and its descriptor travels over the sockets: nothing in /dev/shm has a name, so nobody else
can open it and nothing is left behind, however a rank ends. The sockets' abstract names are unguessable and both ends
check that the other belongs to the same user.

Ordering: no flag is read from shared memory. A chunk is written before the `send` of its frame and read after the
`recv` of that frame. Linux puts a frame on a socket's queue and takes it off under that queue's lock, and the lock's
release and acquire order the writes before the reads on every architecture. The same holds for "free again" frames.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist

from ..core.errors import ConfigError, MoeRuntimeError, PeerLost, PeerTimeout
from .transport import Waits, byte_view, check_counts, check_peer, describe_counts, once, reduce_in_rank_order

_WINDOW_BYTES = 32 << 20
_CHUNKS = 2  # of each mailbox: one is filled while the other is emptied
_PAGE = 4096
_DATA, _FREE, _BLAME = 1, 2, 3
_FRAME = struct.Struct("=qqq")  # kind; bytes in this chunk (or the rank blamed); bytes of the whole message
_HELLO = struct.Struct("=qq")  # rank; window bytes
_CREDENTIALS = struct.Struct("=iii")  # pid, uid, gid: Linux's struct ucred
_EMPTY = np.empty(0, dtype=np.uint8)


class SharedMemoryTransport:
    """Ranks 0..size-1 on one Linux host; CPU tensors.

    store: where ranks leave the names of their sockets: anything with torch's Store's `set`, `get` and `wait`; used
        only here. All ranks must be given the same `window_bytes`, the memory each rank receives into.

    Every exchange carries the size of each message, so counts that do not match are an error that names both. A rank
    that ends or closes its transport gives the others PeerLost as soon as they wait for it. After an error the
    transport is unusable, since ranks may be in different calls.
    Raises PeerTimeout when a rank has not come within the deadline, ConfigError when ranks are not on one host.
    """

    name = "shm"

    def __init__(self, store: Any, rank: int, size: int, deadline_s: float, window_bytes: int = _WINDOW_BYTES) -> None:
        if not 0 <= rank < size:
            raise ConfigError(f"rank {rank} is not in 0..{size - 1}")
        self.rank, self.size, self.deadline_s = rank, size, deadline_s
        self.waits = Waits(size)
        self._latest: _Exchange | None = None  # all before it have ended
        self._unusable: str | None = None
        self._blamed: int | None = None
        self._lanes: dict[int, _Lane] = {}
        window = _create_window(size, window_bytes)
        try:
            self._meet(store, window)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(window)  # the mappings keep the memory

    def all_to_all_v(
        self, send: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], phase: str
    ) -> torch.Tensor:
        return self.start_all_to_all_v(send, send_counts, recv_counts, phase)()

    def start_all_to_all_v(
        self, send: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], phase: str
    ) -> Callable[[], torch.Tensor]:
        check_counts(self, send, send_counts, recv_counts, phase)
        recv = send.new_empty((sum(recv_counts), *send.shape[1:]))
        outgoing = [byte_view(part) for part in send.detach().split(list(send_counts))]
        incoming = [byte_view(part) for part in recv.split(list(recv_counts))]
        exchange = self._start_all(outgoing, incoming, phase, describe_counts(send_counts, recv_counts))

        def finish() -> torch.Tensor:
            self._finish(exchange)
            for peer, seconds in exchange.waited_s.items():
                self.waits.add(peer, seconds)
            return recv

        return once(finish, phase)

    def all_reduce(self, tensor: torch.Tensor, phase: str, op: str = "sum") -> None:
        """In rank order, so that the result is the same for any timing: each rank reduces its part of the tensor."""
        flat = tensor.detach().view(-1)
        bounds = [len(flat) * rank // self.size for rank in range(self.size + 1)]
        counts = [end - begin for begin, end in zip(bounds, bounds[1:], strict=False)]
        mine = counts[self.rank]
        parts = flat.new_empty((self.size, mine)).unbind(0)
        outgoing, incoming = [byte_view(part) for part in flat.split(counts)], [byte_view(part) for part in parts]
        self._exchange_all(outgoing, incoming, phase, describe_counts(counts, [mine] * self.size))
        reduced = byte_view(reduce_in_rank_order(parts, op))
        self._exchange_all([reduced] * self.size, outgoing, phase, f"all_reduce of {len(flat)} {tensor.dtype}")

    def all_gather(self, tensor: torch.Tensor, phase: str) -> torch.Tensor:
        out = tensor.new_empty((self.size, *tensor.shape))
        detail = f"all_gather of {tuple(tensor.shape)} {tensor.dtype}"
        self._exchange_all([byte_view(tensor)] * self.size, [byte_view(part) for part in out.unbind(0)], phase, detail)
        return out

    def broadcast(self, tensor: torch.Tensor, root: int, phase: str) -> None:
        data, detail = byte_view(tensor), f"broadcast of {tuple(tensor.shape)} {tensor.dtype} from rank {root}"
        if self.rank == root:
            self._exchange(dict.fromkeys(self._lanes, data), {}, phase, detail)
        else:
            self._exchange({}, {root: data}, phase, detail)

    def send(self, tensor: torch.Tensor, to: int, phase: str) -> None:
        check_peer(self, to, phase)
        self._exchange({to: byte_view(tensor)}, {}, phase, f"sending {tuple(tensor.shape)} {tensor.dtype} to rank {to}")

    def recv(self, tensor: torch.Tensor, source: int, phase: str) -> None:
        check_peer(self, source, phase)
        detail = f"receiving {tuple(tensor.shape)} {tensor.dtype} from rank {source}"
        self._exchange({}, {source: byte_view(tensor)}, phase, detail)

    def barrier(self, phase: str) -> None:
        self._exchange_all([_EMPTY] * self.size, [_EMPTY] * self.size, phase, "")

    def close(self) -> None:
        self._unusable = self._unusable or "it is closed"
        for lane in self._lanes.values():
            lane.close(self._blamed)
        self._lanes = {}

    # ---- moving bytes -------------------------------------------------------------------------------------------

    def _exchange_all(self, outgoing: list[np.ndarray], incoming: list[np.ndarray], phase: str, detail: str) -> None:
        self._finish(self._start_all(outgoing, incoming, phase, detail))

    def _start_all(self, outgoing: list[np.ndarray], incoming: list[np.ndarray], phase: str, detail: str) -> _Exchange:
        if len(outgoing[self.rank]) != len(incoming[self.rank]):
            raise ConfigError(f"{phase}: rank {self.rank} does not agree with itself, {detail}")
        incoming[self.rank][:] = outgoing[self.rank]
        return self._start(
            {peer: outgoing[peer] for peer in self._lanes},
            {peer: incoming[peer] for peer in self._lanes},
            phase,
            detail,
        )

    def _exchange(
        self, outgoing: dict[int, np.ndarray], incoming: dict[int, np.ndarray], phase: str, detail: str
    ) -> None:
        self._finish(self._start(outgoing, incoming, phase, detail))

    def _start(
        self, outgoing: dict[int, np.ndarray], incoming: dict[int, np.ndarray], phase: str, detail: str
    ) -> _Exchange:
        """One message to each rank of `outgoing` and one from each of `incoming`, all at once, in chunks.

        An empty message is sent as well. Ends the exchange that is under way first, if there is one.
        """
        self._check_usable(phase)
        if self._latest is not None:
            self._finish(self._latest)
        busy = {peer: self._lanes[peer] for peer in sorted({*outgoing, *incoming})}
        for peer, lane in busy.items():
            lane.begin(outgoing.get(peer), incoming.get(peer))
        where = f"rank {self.rank}, phase {phase}" + (f", {detail}" if detail else "")
        self._latest = exchange = _Exchange(busy, phase, where)
        self._work(exchange, 0.0)
        return exchange

    def _finish(self, exchange: _Exchange) -> None:
        """Until all messages are received and all of this rank's are in the receivers' windows."""
        if not exchange.busy:  # so it was at once, or a later call has ended it
            return
        self._check_usable(exchange.phase)
        began, waited = time.monotonic(), 0.0
        while exchange.busy:
            if waited >= self.deadline_s:
                self._time_out(exchange)
            poll = select.poll()
            for lane in exchange.busy.values():
                poll.register(lane.socket, select.POLLIN)
            poll.poll(1000 * (self.deadline_s - waited))
            waited = time.monotonic() - began  # before rows are copied: those that lie ready are not waited for
            self._work(exchange, waited)

    def _work(self, exchange: _Exchange, waited: float) -> None:
        """Everything that can be done now without waiting."""
        for peer, lane in list(exchange.busy.items()):
            try:
                lane.work()
            except _Lost as lost:
                self._unusable, self._blamed = f"phase {exchange.phase} lost rank {peer}", peer
                raise PeerLost(
                    f"{exchange.where}: rank {peer} (process {lane.pid}) {lost}; look at its log",
                    rank=peer,
                    phase=exchange.phase,
                ) from None
            except _Mismatch as mismatch:
                self._unusable, self._blamed = f"of a mismatch in phase {exchange.phase}", peer
                raise MoeRuntimeError(
                    f"{exchange.where}: rank {peer} {mismatch}; all ranks must make the same calls in the same order, "
                    "with counts that match"
                ) from None
            if lane.received:
                exchange.waited_s.setdefault(peer, waited)
            if lane.idle:
                del exchange.busy[peer]

    def _time_out(self, exchange: _Exchange) -> NoReturn:
        busy, phase = exchange.busy, exchange.phase
        self._unusable, self._blamed = f"phase {phase} timed out", next(iter(busy))
        progress = "; ".join(f"rank {peer}: {lane.progress()}" for peer, lane in busy.items())
        raise PeerTimeout(
            f"{exchange.where}: waited {self.deadline_s:g} s for ranks {list(busy)} over {self.name} ({progress}); "
            "they are stuck, stopped or in a different call (raise timeout_s if they are only slow)",
            waiting_rank=self.rank,
            ranks=tuple(busy),
            phase=phase,
        )

    def _check_usable(self, phase: str) -> None:
        if self._unusable is not None:
            raise RuntimeError(f"{phase}: the transport cannot be used any more: {self._unusable}")

    # ---- meeting ------------------------------------------------------------------------------------------------

    def _meet(self, store: Any, window: int) -> None:
        """A socket to every other rank, and a mapping of its window; higher ranks call lower ones."""
        until = time.monotonic() + self.deadline_s
        window_bytes = os.fstat(window).st_size
        mine = mmap.mmap(window, window_bytes)
        missing = set(range(self.size)) - {self.rank}
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            name = f"moe-runtime-{secrets.token_hex(16)}"
            listener.bind(f"\0{name}")
            listener.listen(self.size)
            try:
                store.set(f"shm/{self.rank}", name)
                for peer in range(self.rank):
                    store.wait([f"shm/{peer}"], timedelta(seconds=max(until - time.monotonic(), 0.001)))
                    self._add_lane(_call(store.get(f"shm/{peer}"), peer, until), window, mine, until)
                    missing.discard(peer)
                while missing:
                    _set_timeout(listener, until)
                    connection, _ = listener.accept()
                    missing.discard(self._add_lane(connection, window, mine, until))
            except (TimeoutError, dist.DistStoreError) as error:
                raise PeerTimeout(
                    f"rank {self.rank}, phase rendezvous: ranks {sorted(missing)} did not come within "
                    f"{self.deadline_s:g} s over {self.name} ({error})",
                    waiting_rank=self.rank,
                    ranks=tuple(sorted(missing)),
                    phase="rendezvous",
                ) from error
            except ConnectionError as error:
                raise PeerLost(
                    f"rank {self.rank}, phase rendezvous: one of ranks {sorted(missing)} left while meeting ({error})",
                    rank=None,
                    phase="rendezvous",
                ) from error

    def _add_lane(self, connection: socket.socket, window: int, mine: mmap.mmap, until: float) -> int | None:
        """Swap ranks and windows over a fresh connection. Returns the rank, or None for a stranger's connection."""
        pid, uid, _ = _CREDENTIALS.unpack(
            connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        if uid != os.geteuid():
            connection.close()
            return None
        _set_timeout(connection, until)
        socket.send_fds(connection, [_HELLO.pack(self.rank, len(mine))], [window])
        hello, descriptors, _, _ = socket.recv_fds(connection, _HELLO.size, 1)
        if len(hello) != _HELLO.size or len(descriptors) != 1:
            raise ConnectionError("it sent no window")
        peer, window_bytes = _HELLO.unpack(hello)
        try:
            if window_bytes != len(mine):
                raise ConfigError(f"rank {peer} has windows of {window_bytes} bytes, rank {self.rank} of {len(mine)}")
            theirs = mmap.mmap(descriptors[0], window_bytes)
        finally:
            os.close(descriptors[0])
        connection.setblocking(False)
        self._lanes[peer] = _Lane(
            connection, pid, _mailbox(theirs, self.rank, self.size), _mailbox(mine, peer, self.size)
        )
        return peer


@dataclass
class _Exchange:
    """Messages that were started together.

    busy: the lanes, by rank, on which something is left to do. waited_s: seconds until each rank's message was there.
    """

    busy: dict[int, _Lane]
    phase: str
    where: str
    waited_s: dict[int, float] = field(default_factory=dict)


class _Lane:
    """What joins two ranks: a socket, a mailbox to write, a mailbox to read, and one message each way under way."""

    def __init__(self, connection: socket.socket, pid: int, outbox: np.ndarray, inbox: np.ndarray) -> None:
        self.socket, self.pid = connection, pid
        self._outbox, self._inbox = outbox, inbox  # [chunks, bytes per chunk]
        self._free, self._next_out, self._next_in = _CHUNKS, 0, 0
        self._arrived: deque[tuple[int, int]] = deque()  # (bytes in chunk, bytes of message), not yet copied out
        self._unread = b""
        self._ended: str | None = None  # how the other rank left
        self._blame = ""  # and because of whom
        self._out: np.ndarray | None = None
        self._in: np.ndarray | None = None
        self._sent = self._received = 0

    def begin(self, outgoing: np.ndarray | None, incoming: np.ndarray | None) -> None:
        self._out, self._in, self._sent, self._received = outgoing, incoming, 0, 0

    @property
    def received(self) -> bool:
        return self._in is None

    @property
    def idle(self) -> bool:
        return self._out is None and self._in is None

    def work(self) -> None:
        """Everything that can be done now without waiting. Raises _Lost where nothing more can ever be done."""
        self._read_frames()
        while self._out is not None and self._free:
            chunk = self._out[self._sent : self._sent + self._outbox.shape[1]]
            self._outbox[self._next_out, : len(chunk)] = chunk
            self._say(_DATA, len(chunk), len(self._out))
            self._next_out, self._free = (self._next_out + 1) % _CHUNKS, self._free - 1
            self._sent += len(chunk)
            if self._sent == len(self._out):
                self._out = None
        while self._in is not None and self._arrived:
            length, total = self._arrived.popleft()
            if total != len(self._in):
                raise _Mismatch(f"sent {total} bytes where this rank expects {len(self._in)}")
            self._in[self._received : self._received + length] = self._inbox[self._next_in, :length]
            self._say(_FREE, 0, 0)
            self._next_in = (self._next_in + 1) % _CHUNKS
            self._received += length
            if self._received == total:
                self._in = None
        if self._ended and not self.idle:
            raise _Lost(self._ended + self._blame)

    def _read_frames(self) -> None:
        while self._ended is None:
            try:
                data = self.socket.recv(64 * _FRAME.size)
            except BlockingIOError:
                break
            except ConnectionError as error:
                self._ended = f"is gone ({error.strerror})"
                break
            if not data:
                self._ended = "ended or closed its transport"
            self._unread += data
        whole = len(self._unread) // _FRAME.size * _FRAME.size
        for kind, length, total in _FRAME.iter_unpack(self._unread[:whole]):
            if kind == _DATA:
                self._arrived.append((length, total))
            elif kind == _FREE:
                self._free += 1
            else:
                self._blame = f", after an error with rank {length}"
        self._unread = self._unread[whole:]

    def _say(self, kind: int, length: int, total: int) -> None:
        # At most 2 * _CHUNKS frames each way are ever unread, so a frame always fits the socket's buffer whole.
        try:
            self.socket.send(_FRAME.pack(kind, length, total))
        except ConnectionError as error:
            # A rank that has left needs no free mailbox, and what it sent before it left still counts.
            if kind == _DATA:
                raise _Lost(f"is gone ({error.strerror}){self._blame}") from None

    def progress(self) -> str:
        out = "all sent" if self._out is None else f"{self._sent} of {len(self._out)} bytes sent"
        return f"{out}, " + ("all received" if self._in is None else f"{self._received} of {len(self._in)} received")

    def close(self, blamed: int | None) -> None:
        if blamed is not None:  # so that, in a row of ranks that fall, each tells where it began
            with suppress(OSError):
                self.socket.send(_FRAME.pack(_BLAME, blamed, 0))
        self.socket.close()
        self._outbox = self._inbox = _EMPTY  # the memory goes with the last view of it


class _Lost(Exception):
    pass


class _Mismatch(Exception):
    pass


def _create_window(size: int, window_bytes: int) -> int:
    """A descriptor of anonymous memory whose length nobody can change any more (a shorter one would be a SIGBUS)."""
    chunk = window_bytes // (size * _CHUNKS) // _PAGE * _PAGE
    if chunk < _PAGE:
        raise ConfigError(f"a window of {window_bytes} bytes is too small for {size} ranks: {_PAGE} bytes a chunk")
    window = os.memfd_create("moe-runtime", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(window, chunk * size * _CHUNKS)
    fcntl.fcntl(window, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return window


def _mailbox(window: mmap.mmap, source: int, size: int) -> np.ndarray:
    """[chunks, bytes per chunk]: where rank `source` writes in this window."""
    return np.frombuffer(window, dtype=np.uint8).reshape(size, _CHUNKS, -1)[source]


def _call(name: bytes | str, peer: int, until: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    _set_timeout(connection, until)
    try:
        connection.connect(f"\0{name.decode() if isinstance(name, bytes) else name}")
    except ConnectionRefusedError as error:
        connection.close()
        raise ConfigError(
            f"rank {peer} cannot be reached through this host: shared memory joins ranks of one host and one network "
            "namespace only; use another transport between hosts"
        ) from error
    return connection


def _set_timeout(connection: socket.socket, until: float) -> None:
    connection.settimeout(max(until - time.monotonic(), 0.001))

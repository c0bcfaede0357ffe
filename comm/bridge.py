"""The bridge: rows between ranks over ZeroMQ and TCP, without torch.distributed or MPI.

It is for worlds whose nodes do not share a torch or an MPI. Ranks meet at rank 0 (`meet`), which compares protocol and
versions and hands everybody the table of addresses; then every rank sends to every other through a socket of its own.
Large payloads go in chunks, so that sending, the wire and copying in overlap. Receivers know from whom each byte came,
so a deadline names exactly who did not deliver.

Where the job has a secret the meeting is under CURVE (comm/locks.py), and whoever opens a connection for rows proves a
pass that travelled in the meeting's table; with encryption these connections are CURVE's too.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch

from ..core.environment import address_towards, is_loopback
from ..core.errors import ConfigError, PeerLost, PeerTimeout
from .greeting import BridgeLock, gather_world, name_of, report_to_rank_0
from .messages import open_socket, pack, unpack, zmq
from .pairwise import PairwiseTransport
from .quirks import as_bytes
from .staging import copy_in, host_chunks
from .transport import SLICE_S, Interruption, Waits, check_peer

PROTOCOL = 1
CHUNK_BYTES = 1 << 20
HEADER_BYTES = 64
_BYE = -1  # the operation number of a rank that leaves


def meet(
    rank: int,
    size: int,
    address: str,
    port: int,
    deadline_s: float,
    about: dict[str, Any],
    bind: str | None = None,
    secret: bytes | None = None,
    encrypt: bool = False,
) -> BridgeTransport:
    """Join a world of `size` ranks at rank 0's address:port. `about` must be equal on all ranks (versions, hashes).

    bind: the address of this rank's own socket; by default loopback when rank 0 is on loopback, else the address of
    the interface that leads to rank 0. secret: the job's; None lets in whoever comes. encrypt: rows too. Raises
    ConfigError naming rank and field when `about` differs, PeerTimeout naming the missing ranks when the deadline
    passes.
    """
    if encrypt and secret is None:
        raise ConfigError(
            'bridge_encryption = "on": there is no secret to derive keys from; start with moe-launch, or set '
            "MOE_RUNTIME_JOB_SECRET to the same value on all ranks"
        )
    host = bind or (address if is_loopback(address) else address_towards(address, port))

    def through_rank_0(context: zmq.Context, lock: BridgeLock, place: dict[str, Any]) -> list[dict[str, Any]]:
        hello = {"protocol": PROTOCOL, "encrypted": encrypt, "rank": rank, "size": size, **place, **about}
        ends = time.monotonic() + deadline_s
        if rank == 0:
            return gather_world(context, lock, size, address, port, hello, ends, deadline_s)
        return report_to_rank_0(context, lock, rank, address, port, hello, ends, deadline_s)

    return _join(through_rank_0, rank, size, host, deadline_s, secret, encrypt, Interruption())


def meet_through(
    exchange: Callable[[dict[str, Any]], list[dict[str, Any]]],
    rank: int,
    size: int,
    host: str,
    deadline_s: float,
    secret: bytes,
    encrypt: bool,
    interruption: Interruption,
) -> BridgeTransport:
    """As `meet`, for ranks that have another authenticated way to hand each other their addresses: `exchange` gives
    every rank's entry, in rank order. host: the address of this rank that the others reach."""

    def through(context: zmq.Context, lock: BridgeLock, place: dict[str, Any]) -> list[dict[str, Any]]:
        table = exchange({**place, "encrypted": encrypt})
        if len({entry["encrypted"] for entry in table}) > 1:
            raise ConfigError("bridge_encryption differs between ranks; give all the same")
        return table

    return _join(through, rank, size, host, deadline_s, secret, encrypt, interruption)


def _join(
    exchange: Callable[[zmq.Context, BridgeLock, dict[str, Any]], list[dict[str, Any]]],
    rank: int,
    size: int,
    host: str,
    deadline_s: float,
    secret: bytes | None,
    encrypt: bool,
    interruption: Interruption,
) -> BridgeTransport:
    """Listen for rows, have `exchange` hand out where (endpoint and token) and give every rank's, and connect."""
    context = zmq.Context()
    lock = BridgeLock(context, size, rank, secret, encrypt)
    try:
        inbox = open_socket(context, zmq.ROUTER)
        lock.guard(inbox, CHUNK_BYTES, rows=True)
        own_port = inbox.bind_to_random_port(f"tcp://{host}")
        table = exchange(context, lock, {"endpoint": f"tcp://{host}:{own_port}", "token": lock.token.hex()})
        return BridgeTransport(context, inbox, host, rank, table, deadline_s, lock, interruption)
    except BaseException:
        lock.close()
        context.destroy(linger=0)
        raise


class BridgeTransport(PairwiseTransport):
    """A Transport (comm/transport.py) over one ZeroMQ socket per peer; tensors of any device.

    Every operation has a number; ranks make the same calls in the same order, so numbers agree. What arrives early
    waits in `_arrived`, by operation and source.
    """

    def __init__(
        self,
        context: zmq.Context,
        inbox: zmq.Socket,
        host: str,
        rank: int,
        table: list[dict[str, Any]],
        deadline_s: float,
        lock: BridgeLock,
        interruption: Interruption | None = None,
    ) -> None:
        super().__init__(rank, len(table), deadline_s)
        self.name = "bridge:zeromq"
        self._lock, self._interruption = lock, interruption or Interruption()
        self._peers = {name_of(peer).encode(): peer for peer in range(self.size) if peer != rank}
        self.host = host  # the address of this rank that the others reach
        self._context, self._inbox = context, inbox
        self._operation = 0
        self._pair_operations: dict[tuple[int, int], int] = defaultdict(int)
        self._arrived: dict[tuple[Any, int], deque] = defaultdict(deque)
        self._gone: dict[int, str] = {}
        self._poller = zmq.Poller()
        self._poller.register(inbox, zmq.POLLIN)
        self._out: dict[int, zmq.Socket] = {}
        self._monitors: dict[zmq.Socket, int] = {}
        for peer in range(self.size):
            if peer == rank:
                continue
            socket = open_socket(context, zmq.DEALER, identity=name_of(rank).encode())
            lock.open(socket, bytes.fromhex(table[peer]["token"]))
            monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            self._poller.register(monitor, zmq.POLLIN)
            self._monitors[monitor] = peer
            socket.connect(table[peer]["endpoint"])
            self._out[peer] = socket
        self.barrier("rendezvous")
        lock.all_are_in()

    # ---- the contract, beside what PairwiseTransport makes of `start` -------------------------------------------

    def send(self, tensor: torch.Tensor, to: int, phase: str) -> None:
        check_peer(self, to, phase)
        self._pair_operations[self.rank, to] += 1
        trackers = self._post(to, ("pair", self._pair_operations[self.rank, to]), tensor.detach().contiguous(), phase)
        self._finish_sending(trackers, phase, (to,))

    def recv(self, tensor: torch.Tensor, source: int, phase: str) -> None:
        check_peer(self, source, phase)
        self._pair_operations[source, self.rank] += 1
        self._collect(("pair", self._pair_operations[source, self.rank]), {source: tensor.detach()}, phase, "")

    def describe(self) -> list[str]:
        return [self._lock.describe()]

    def close(self) -> None:
        if self._context.closed:
            return
        self._lock.close()
        for socket in self._out.values():
            socket.send_multipart([pack([_BYE, 0, 0])], flags=zmq.DONTWAIT)
            socket.disable_monitor()
        for monitor in self._monitors:
            monitor.close(linger=0)
        # Give what was sent a moment to leave, but never hang on a peer that is dead.
        self._context.destroy(linger=1000 if self._interruption.why is None and not self._gone else 0)

    # ---- moving bytes -------------------------------------------------------------------------------------------

    def start(
        self,
        outgoing: Mapping[int, torch.Tensor],
        incoming: Mapping[int, torch.Tensor],
        phase: str,
        detail: str = "",
        waits: Waits | None = None,
    ) -> Callable[[], None]:
        self._operation += 1
        operation, trackers = self._operation, []
        for step in range(1, self.size):  # each rank starts with its right-hand neighbour, to spread the load
            peer = (self.rank + step) % self.size
            if peer in outgoing:
                trackers += self._post(peer, operation, outgoing[peer], phase)

        def finish() -> None:
            self._collect(operation, incoming, phase, detail, waits)
            self._finish_sending(trackers, phase, tuple(outgoing))

        return finish

    def _post(self, peer: int, operation: Any, tensor: torch.Tensor, phase: str) -> list[zmq.MessageTracker]:
        """Queue a contiguous tensor's bytes for a peer, chunk by chunk; returns what says when they left.

        Host memory is sent from where it is. A device's chunk is copied out while the one before it is on its way.
        """
        self._check_open(phase)
        if peer in self._gone:
            raise self._lost(peer, phase)
        payload = as_bytes(tensor).view(-1)
        trackers = []
        for number, part in enumerate(host_chunks(payload, CHUNK_BYTES)):
            header = pack([operation, len(payload), number])
            tracker = self._out[peer].send_multipart(
                [header, part.numpy()], copy=len(part) < 1 << 16, track=len(part) >= 1 << 16
            )
            if tracker is not None:
                trackers.append(tracker)
        return trackers

    def _collect(
        self, operation: Any, incoming: Mapping[int, torch.Tensor], phase: str, detail: str, waits: Waits | None = None
    ) -> None:
        """Fill every tensor from its source, in whatever order chunks arrive."""
        views = {peer: as_bytes(tensor).view(-1) for peer, tensor in incoming.items()}
        missing = {peer: max(1, math.ceil(len(view) / CHUNK_BYTES)) for peer, view in views.items()}
        began = time.monotonic()
        chunks = dict(missing)
        while missing:
            for peer in list(missing):
                waiting = self._arrived[operation, peer]
                while waiting and peer in missing:
                    self._copy_in(waiting.popleft(), chunks[peer] - missing[peer], views[peer], peer, phase)
                    missing[peer] -= 1
                    if missing[peer] == 0:
                        del missing[peer]
                        self._arrived.pop((operation, peer), None)
                        if waits is not None:
                            waits.add(peer, time.monotonic() - began)
            if not missing:
                return
            self._receive(began + self.deadline_s, tuple(missing), phase, detail)

    def _copy_in(self, message: tuple[int, int, Any], due: int, view: torch.Tensor, peer: int, phase: str) -> None:
        """due: the number of the chunk that is to come now; ZeroMQ keeps a peer's frames in order."""
        total, number, part = message
        if total != len(view):
            raise PeerLost(
                f"rank {self.rank}, phase {phase}: rank {peer} sent {total} bytes where {len(view)} were expected; "
                "the two are in different calls",
                rank=peer,
                phase=phase,
            )
        if number != due or len(part) != min(CHUNK_BYTES, total - number * CHUNK_BYTES):
            raise PeerLost(
                f"rank {self.rank}, phase {phase}: rank {peer} sent chunk {number} of {len(part)} bytes where chunk "
                f"{due} of {total} bytes in all was due; is it broken, or another moe-runtime?",
                rank=peer,
                phase=phase,
            )
        if len(part):
            chunk = torch.frombuffer(part, dtype=torch.uint8)
            copy_in(chunk, view[number * CHUNK_BYTES : number * CHUNK_BYTES + len(chunk)])

    def _receive(self, ends: float, missing: tuple[int, ...], phase: str, detail: str) -> None:
        """Wait for any message; note who left. Raises when the deadline passes or a missing rank is gone."""
        self._check_open(phase)
        for peer in missing:
            if peer in self._gone:
                raise self._lost(peer, phase)
        ready: dict[Any, int] = {}
        while not ready and (left := ends - time.monotonic()) > 0:
            self._interruption.check(self.rank, phase)
            ready = dict(self._poller.poll(min(left, SLICE_S) * 1000))
        if not ready:
            raise PeerTimeout(
                f"rank {self.rank}, phase {phase}: waited {self.deadline_s:g} s for ranks {list(missing)} over "
                f"{self.name}" + (f", {detail}" if detail else ""),
                waiting_rank=self.rank,
                ranks=missing,
                phase=phase,
            )
        if self._inbox in ready:
            self._drain(phase)
        for monitor, peer in self._monitors.items():
            if monitor in ready:
                monitor.recv_multipart()
                self._drain(phase)  # what it sent before it went still counts
                self._gone.setdefault(peer, "closed its connection")

    def _drain(self, phase: str) -> None:
        while True:
            try:
                sender, *frames = self._inbox.recv_multipart(flags=zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return
            peer = self._peers.get(sender.bytes)
            if peer is None:
                self._lock.stranger("messages of strangers")
                continue
            try:
                operation, total, number = read_header(frames[0].bytes if frames else b"", len(frames) - 1)
            except ValueError as error:
                raise PeerLost(
                    f"rank {self.rank}, phase {phase}: rank {peer} sent what is no frame of rows ({error}); is it "
                    "broken, or another moe-runtime?",
                    rank=peer,
                    phase=phase,
                ) from None
            if operation == _BYE:
                self._gone[peer] = "left (its runtime was closed)"
                continue
            self._arrived[operation, peer].append((total, number, frames[1].buffer))

    def _finish_sending(self, trackers: list[zmq.MessageTracker], phase: str, peers: tuple[int, ...]) -> None:
        """The caller may write to its tensors again once ZeroMQ has let go of them."""
        ends = time.monotonic() + self.deadline_s
        for tracker in trackers:
            while not tracker.done and (left := ends - time.monotonic()) > 0:
                self._interruption.check(self.rank, phase)
                with suppress(zmq.NotDone):
                    tracker.wait(min(left, SLICE_S))
            if not tracker.done:
                raise PeerTimeout(
                    f"rank {self.rank}, phase {phase}: ranks {list(peers)} did not take what was sent within "
                    f"{self.deadline_s:g} s over {self.name}",
                    waiting_rank=self.rank,
                    ranks=peers,
                    phase=phase,
                )

    def _check_open(self, phase: str) -> None:
        self._interruption.check(self.rank, phase)
        if self._context.closed:
            raise RuntimeError(f"{phase}: the transport is closed")

    def _lost(self, peer: int, phase: str) -> PeerLost:
        return PeerLost(
            f"rank {self.rank}, phase {phase}: rank {peer} {self._gone[peer]} ({self.name}); look at its log",
            rank=peer,
            phase=phase,
        )


def read_header(data: bytes, parts: int) -> tuple[Any, int, int]:
    """Operation (a number, or ("pair", number)), bytes of the whole payload, number of this chunk.

    parts: frames that came with it. Raises ValueError for anything else.
    """
    header = unpack(data, HEADER_BYTES, items=8, depth=2)
    if not isinstance(header, list) or len(header) != 3:
        raise ValueError("not three fields")
    operation, total, number = header
    if isinstance(operation, list) and len(operation) == 2 and operation[0] == "pair":
        key, count = tuple(operation), operation[1]
    else:
        key = count = operation
    if any(type(value) is not int for value in (count, total, number)):
        raise ValueError("fields that are no whole numbers")
    if count < _BYE or total < 0 or not 0 <= number < max(1, math.ceil(total / CHUNK_BYTES)):
        raise ValueError(f"chunk {number} of {total} bytes, operation {count}")
    if parts != (key != _BYE):
        raise ValueError(f"{parts} parts")
    return key, total, number

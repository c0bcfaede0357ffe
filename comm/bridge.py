"""The bridge: rows between ranks over ZeroMQ and TCP, without torch.distributed or MPI.

It is for worlds whose nodes do not share a torch or an MPI. Ranks meet at rank 0 (`meet`), which compares protocol and
versions and hands everybody the table of addresses; then every rank sends to every other through a socket of its own.
Large payloads go in chunks, so that sending, the wire and copying in overlap. Receivers know from whom each byte came,
so a deadline names exactly who did not deliver.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..core.environment import address_towards, is_loopback
from ..core.errors import ConfigError, PeerLost, PeerTimeout
from .messages import open_socket, pack, unpack, zmq
from .pairwise import PairwiseTransport
from .quirks import as_bytes
from .staging import copy_in, host_chunks
from .transport import Waits, check_peer

PROTOCOL = 1
CHUNK_BYTES = 1 << 20
_BYE = -1  # the operation number of a rank that leaves


def meet(
    rank: int, size: int, address: str, port: int, deadline_s: float, about: dict[str, Any], bind: str | None = None
) -> BridgeTransport:
    """Join a world of `size` ranks at rank 0's address:port. `about` must be equal on all ranks (versions, hashes).

    bind: the address of this rank's own socket; by default loopback when rank 0 is on loopback, else the address of
    the interface that leads to rank 0. Raises ConfigError naming rank and field when `about` differs, PeerTimeout
    naming the missing ranks when the deadline passes.
    """
    context = zmq.Context()
    inbox = open_socket(context, zmq.ROUTER)
    host = bind or (address if is_loopback(address) else address_towards(address, port))
    try:
        own_port = inbox.bind_to_random_port(f"tcp://{host}")
        hello = {"protocol": PROTOCOL, "rank": rank, "size": size, "endpoint": f"tcp://{host}:{own_port}", **about}
        ends = time.monotonic() + deadline_s
        if rank == 0:
            table = _gather_world(context, size, address, port, hello, ends, deadline_s)
        else:
            table = _report_to_rank_0(context, rank, address, port, hello, ends, deadline_s)
        return BridgeTransport(context, inbox, host, rank, [entry["endpoint"] for entry in table], deadline_s)
    except BaseException:
        context.destroy(linger=0)
        raise


class BridgeTransport(PairwiseTransport):
    """A Transport (comm/transport.py) over one ZeroMQ socket per peer; tensors of any device.

    Every operation has a number; ranks make the same calls in the same order, so numbers agree. What arrives early
    waits in `_arrived`, by operation and source.
    """

    def __init__(
        self, context: zmq.Context, inbox: zmq.Socket, host: str, rank: int, endpoints: list[str], deadline_s: float
    ) -> None:
        super().__init__(rank, len(endpoints), deadline_s)
        self.name = "bridge:zeromq"
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
            socket = open_socket(context, zmq.DEALER, identity=f"rank {rank}".encode())
            monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            self._poller.register(monitor, zmq.POLLIN)
            self._monitors[monitor] = peer
            socket.connect(endpoints[peer])
            self._out[peer] = socket
        self.barrier("rendezvous")

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

    def close(self) -> None:
        if self._context.closed:
            return
        for socket in self._out.values():
            socket.send_multipart([pack([_BYE, 0, 0])], flags=zmq.DONTWAIT)
            socket.disable_monitor()
        for monitor in self._monitors:
            monitor.close(linger=0)
        # Give what was sent a moment to leave, but never hang on a peer that is dead.
        self._context.destroy(linger=1000)

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
        while missing:
            for peer in list(missing):
                waiting = self._arrived[operation, peer]
                while waiting and peer in missing:
                    self._copy_in(waiting.popleft(), views[peer], peer, phase)
                    missing[peer] -= 1
                    if missing[peer] == 0:
                        del missing[peer]
                        self._arrived.pop((operation, peer), None)
                        if waits is not None:
                            waits.add(peer, time.monotonic() - began)
            if not missing:
                return
            self._receive(began + self.deadline_s, tuple(missing), phase, detail)

    def _copy_in(self, message: tuple[int, int, Any], view: torch.Tensor, peer: int, phase: str) -> None:
        total, number, part = message
        if total != len(view):
            raise PeerLost(
                f"rank {self.rank}, phase {phase}: rank {peer} sent {total} bytes where {len(view)} were expected; "
                "the two are in different calls",
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
        left = ends - time.monotonic()
        ready = dict(self._poller.poll(max(0.0, left) * 1000)) if left > 0 else {}
        if not ready:
            raise PeerTimeout(
                f"rank {self.rank}, phase {phase}: waited {self.deadline_s:g} s for ranks {list(missing)} over "
                f"{self.name}" + (f", {detail}" if detail else ""),
                waiting_rank=self.rank,
                ranks=missing,
                phase=phase,
            )
        if self._inbox in ready:
            self._drain()
        for monitor, peer in self._monitors.items():
            if monitor in ready:
                monitor.recv_multipart()
                self._drain()  # what it sent before it went still counts
                self._gone.setdefault(peer, "closed its connection")

    def _drain(self) -> None:
        while True:
            try:
                sender, header, *parts = self._inbox.recv_multipart(flags=zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return
            peer = int(sender.bytes.decode().removeprefix("rank "))
            operation, total, number = unpack(header.bytes)
            if operation == _BYE:
                self._gone[peer] = "left (its runtime was closed)"
                continue
            key = tuple(operation) if isinstance(operation, list) else operation
            self._arrived[key, peer].append((total, number, parts[0].buffer))

    def _finish_sending(self, trackers: list[zmq.MessageTracker], phase: str, peers: tuple[int, ...]) -> None:
        """The caller may write to its tensors again once ZeroMQ has let go of them."""
        ends = time.monotonic() + self.deadline_s
        for tracker in trackers:
            try:
                tracker.wait(max(0.001, ends - time.monotonic()))
            except zmq.NotDone:
                raise PeerTimeout(
                    f"rank {self.rank}, phase {phase}: ranks {list(peers)} did not take what was sent within "
                    f"{self.deadline_s:g} s over {self.name}",
                    waiting_rank=self.rank,
                    ranks=peers,
                    phase=phase,
                ) from None

    def _check_open(self, phase: str) -> None:
        if self._context.closed:
            raise RuntimeError(f"{phase}: the transport is closed")

    def _lost(self, peer: int, phase: str) -> PeerLost:
        return PeerLost(
            f"rank {self.rank}, phase {phase}: rank {peer} {self._gone[peer]} ({self.name}); look at its log",
            rank=peer,
            phase=phase,
        )


# ---- meeting ----------------------------------------------------------------------------------------------------


def _gather_world(
    context: zmq.Context, size: int, address: str, port: int, hello: dict, ends: float, deadline_s: float
) -> list[dict]:
    """Rank 0: wait for every rank's hello, compare, and answer all with the table or with what is wrong."""
    door = open_socket(context, zmq.ROUTER)
    try:
        door.bind(f"tcp://{address}:{port}")
    except zmq.ZMQError as error:
        raise ConfigError(f"rank 0 cannot listen at {address}:{port} ({error}); give another --master-port") from error
    hellos, answers_to = {0: hello}, {}
    while len(hellos) < size:
        if not door.poll(max(0.0, ends - time.monotonic()) * 1000):
            missing = tuple(rank for rank in range(size) if rank not in hellos)
            raise PeerTimeout(
                f"rank 0, phase rendezvous: ranks {list(missing)} did not come to {address}:{port} "
                f"within {deadline_s:g} s",
                waiting_rank=0,
                ranks=missing,
                phase="rendezvous",
            )
        sender, message = door.recv_multipart()
        theirs = unpack(message)
        answers_to[theirs["rank"]] = sender
        hellos[theirs["rank"]] = theirs
    problem = disagreement(hellos)
    table = [hellos[rank] for rank in sorted(hellos)]
    for sender in answers_to.values():
        door.send_multipart([sender, pack({"problem": problem, "table": table})])
    door.close(linger=2000)
    if problem:
        raise ConfigError(problem)
    return table


def _report_to_rank_0(
    context: zmq.Context, rank: int, address: str, port: int, hello: dict, ends: float, deadline_s: float
) -> list[dict]:
    door = open_socket(context, zmq.DEALER)
    door.connect(f"tcp://{address}:{port}")
    door.send(pack(hello))
    if not door.poll(max(0.0, ends - time.monotonic()) * 1000):
        raise PeerTimeout(
            f"rank {rank}, phase rendezvous: rank 0 at {address}:{port} did not answer within {deadline_s:g} s "
            "(it waits for all ranks; its own message names the missing ones)",
            waiting_rank=rank,
            ranks=(0,),
            phase="rendezvous",
        )
    answer = unpack(door.recv())
    door.close(linger=0)
    if answer["problem"]:
        raise ConfigError(answer["problem"])
    return answer["table"]


def disagreement(hellos: dict[int, dict]) -> str | None:
    """The first field in which a rank differs from rank 0, in words; None when all agree."""
    for rank in sorted(hellos):
        for field, value in hellos[0].items():
            if field not in ("rank", "endpoint") and hellos[rank].get(field) != value:
                return f"rank {rank} disagrees with rank 0 on {field}: {hellos[rank].get(field)!r} against {value!r}"
    return None

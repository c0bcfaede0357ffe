"""Islands joined into one world: rows inside an island by its own library, rows between islands over the bridge.

An island is a maximal set of ranks that share one vendor's collective library. Each has its own torch.distributed
group with its own store, so torch.distributed never spans islands; the world meets on the bridge. The composite is
itself a Transport.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .bridge import BridgeTransport
from .gloo import GlooTransport
from .group import join_group, listen
from .hostbridge import HostBridge
from .native import NativeTransport
from .place import Place, vendor_of
from .quirks import as_bytes, can_reduce, dtype_name
from .transport import (
    InHalves,
    LocalTransport,
    Transport,
    Waits,
    check_counts,
    deadline,
    describe_counts,
    once,
    reduce_in_rank_order,
)
from .wire import all_gather_message


@dataclass(frozen=True)
class Islands:
    """Who is on which island. kinds[i]: what the ranks of island i share; ranks[i]: they, in increasing order."""

    kinds: tuple[str, ...]
    ranks: tuple[tuple[int, ...], ...]

    def of(self, rank: int) -> int:
        """The island of a rank."""
        return next(island for island, ranks in enumerate(self.ranks) if rank in ranks)

    def leaders(self) -> tuple[int, ...]:
        """The lowest rank of each island: it speaks for its island where one voice is enough."""
        return tuple(ranks[0] for ranks in self.ranks)


def form_islands(kinds: Sequence[str]) -> Islands:
    """Group ranks by kind: kinds[r] names the collective library that rank r speaks and where it reaches."""
    names = tuple(dict.fromkeys(kinds))
    return Islands(names, tuple(tuple(r for r, kind in enumerate(kinds) if kind == name) for name in names))


def join_islands(bridge: BridgeTransport | HostBridge, place: Place, deadline_s: float) -> CompositeTransport:
    """Build this rank's island group beside a world-wide bridge. Every rank calls, with its own place."""
    islands = form_islands(all_gather_message(bridge, place.kind, "rendezvous of islands (kinds)"))
    mine = islands.ranks[islands.of(bridge.rank)]
    if dist.is_initialized():  # the bridge is a group of the whole world: islands are groups within it
        if len(mine) == 1:
            return CompositeTransport(bridge, LocalTransport(deadline_s), islands)
        within = dist.new_group(list(mine), deadline(deadline_s), "gloo", use_local_synchronization=True)
        return CompositeTransport(bridge, over_group(place, deadline_s, within, mine), islands)
    endpoint, listener = "", None
    if len(mine) > 1 and bridge.rank == mine[0]:
        listener = listen(bridge.host, 0)
        endpoint = f"{bridge.host} {listener.getsockname()[1]}"
    endpoints = all_gather_message(bridge, endpoint, "rendezvous of islands")
    if len(mine) == 1:
        return CompositeTransport(bridge, LocalTransport(deadline_s), islands)
    address, port = endpoints[mine[0]].split()
    join_group(address, int(port), listener, mine.index(bridge.rank), len(mine), deadline_s, "moe_runtime_island")
    return CompositeTransport(bridge, over_group(place, deadline_s), islands)


def over_group(place: Place, deadline_s: float, group: Any = None, ranks: Sequence[int] | None = None) -> Transport:
    """A transport over ranks that all compute on places of one kind: those of the gloo group `group`.

    None: torch.distributed's default group, which then ends with the transport. CPU ranks use gloo; others their
    vendor's library for device tensors, and gloo beside it. ranks: of the group, where it is not all there are.
    """
    host = GlooTransport(dist.group.WORLD if group is None else group, deadline_s, owns_default_group=group is None)
    if place.device.type == "cpu":
        return host
    members = None if ranks is None else list(ranks)
    device_group = dist.new_group(
        members, deadline(deadline_s), place.backend, use_local_synchronization=members is not None
    )
    return NativeTransport(device_group, host, place.vendor, place.emulated)


class CompositeTransport(InHalves):
    """A Transport over an island's own and the bridge. `native` numbers its ranks within the island."""

    def __init__(self, bridge: BridgeTransport | HostBridge, native: Transport, islands: Islands) -> None:
        self.rank, self.size, self.deadline_s = bridge.rank, bridge.size, bridge.deadline_s
        self.islands, self._bridge, self._native = islands, bridge, native
        self._island = islands.of(self.rank)
        self._mates = islands.ranks[self._island]
        self._others = tuple(rank for rank in range(self.size) if rank not in self._mates)
        self._leads = self.rank == self._mates[0]
        self.name = f"islands ({native.name} inside, {bridge.name} between)"
        # Bytes of rows of all-to-all by path; what went native never left the island.
        self.bytes_sent = {"native": 0, "bridge": 0}

    @property
    def waits(self) -> Waits:
        """What this rank waited for its island's ranks and for the others."""
        joined = Waits(self.size, self._native.waits.exact and self._bridge.waits.exact)
        for number, mate in enumerate(self._mates):
            joined.take(mate, self._native.waits, number)
        for peer in self._others:
            joined.take(peer, self._bridge.waits, peer)
        return joined

    def path(self, source: int, to: int) -> str:
        """How rows travel from one rank to another, for describe()."""
        if source == to:
            return "self"
        island = self.islands.of(source)
        return self.islands.kinds[island] if to in self.islands.ranks[island] else "bridge"

    def start_all_to_all_v(
        self, send: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], phase: str
    ) -> Callable[[], torch.Tensor]:
        check_counts(self, send, send_counts, recv_counts, phase)
        send = send.detach().contiguous()
        recv = send.new_empty((sum(recv_counts), *send.shape[1:]))
        outgoing, incoming = send.split(list(send_counts)), recv.split(list(recv_counts))
        detail = describe_counts(send_counts, recv_counts)
        finish_inside = self._native.start_all_to_all_v(
            torch.cat([outgoing[mate] for mate in self._mates]),
            [send_counts[mate] for mate in self._mates],
            [recv_counts[mate] for mate in self._mates],
            phase,
        )
        finish_between = self._bridge.start(
            {peer: outgoing[peer] for peer in self._others},
            {peer: incoming[peer] for peer in self._others},
            phase,
            detail,
            self._bridge.waits,
        )
        row_bytes = as_bytes(send[:0]).shape[1]
        self.bytes_sent["native"] += row_bytes * sum(send_counts[mate] for mate in self._mates if mate != self.rank)
        self.bytes_sent["bridge"] += row_bytes * sum(send_counts[peer] for peer in self._others)

        def finish() -> torch.Tensor:
            inside = finish_inside()
            for mate, rows in zip(self._mates, inside.split([recv_counts[mate] for mate in self._mates]), strict=True):
                incoming[mate].copy_(rows)
            finish_between()
            return recv

        return once(finish, phase)

    def all_reduce(self, tensor: torch.Tensor, phase: str, op: str = "sum") -> None:
        """Inside each island, then between the leaders in island order, then inside again: equal bits on all ranks."""
        if not self._reduces_natively(tensor.dtype):
            self._bridge.all_reduce(tensor, phase, op)  # some island's library has no such type: over host memory
            return
        self._native.all_reduce(tensor, phase, op)
        leaders = self.islands.leaders()
        peers = [leader for leader in leaders if leader != self.rank] if self._leads else []
        parts = {leader: torch.empty_like(tensor) for leader in peers}
        self._bridge.start(dict.fromkeys(peers, tensor), parts, phase)()
        if self._leads:
            parts[self.rank] = tensor.clone()
            tensor.copy_(reduce_in_rank_order([parts[leader] for leader in leaders], op))
        self._native.broadcast(tensor, 0, phase)

    def _reduces_natively(self, dtype: torch.dtype) -> bool:
        """Whether every island's library reduces this dtype as it is; the same answer on all ranks."""
        return all(can_reduce(vendor_of(kind), dtype_name(dtype)) for kind in self.islands.kinds)

    def all_gather(self, tensor: torch.Tensor, phase: str) -> torch.Tensor:
        out = tensor.new_empty((self.size, *tensor.shape))
        finish = self._bridge.start(
            dict.fromkeys(self._others, tensor.contiguous()), {peer: out[peer] for peer in self._others}, phase
        )
        for mate, value in zip(self._mates, self._native.all_gather(tensor, phase), strict=True):
            out[mate].copy_(value)
        finish()
        return out

    def broadcast(self, tensor: torch.Tensor, root: int, phase: str) -> None:
        home = self.islands.of(root)
        others = [leader for island, leader in enumerate(self.islands.leaders()) if island != home]
        outgoing = dict.fromkeys(others, tensor) if self.rank == root else {}
        self._bridge.start(outgoing, {root: tensor} if self.rank in others else {}, phase)()
        self._native.broadcast(tensor, self._mates.index(root) if self._island == home else 0, phase)

    def send(self, tensor: torch.Tensor, to: int, phase: str) -> None:
        if to in self._mates:
            self._native.send(tensor, self._mates.index(to), phase)
        else:
            self._bridge.send(tensor, to, phase)

    def recv(self, tensor: torch.Tensor, source: int, phase: str) -> None:
        if source in self._mates:
            self._native.recv(tensor, self._mates.index(source), phase)
        else:
            self._bridge.recv(tensor, source, phase)

    def barrier(self, phase: str) -> None:
        self.all_reduce(torch.zeros(1), phase)

    def close(self) -> None:
        self._native.close()
        self._bridge.close()

    def describe(self) -> list[str]:
        """The matrix of rank pairs and the path each takes."""
        width = max(8, *(len(kind) for kind in self.islands.kinds)) + 2
        told = [f"{kind} {list(ranks)}" for kind, ranks in zip(self.islands.kinds, self.islands.ranks, strict=True)]
        lines = [
            f"islands: {'; '.join(told)}",
            "from\\to".ljust(10) + "".join(f"rank {to}".rjust(width) for to in range(self.size)),
        ]
        for source in range(self.size):
            lines.append(
                f"rank {source}".ljust(10) + "".join(self.path(source, to).rjust(width) for to in range(self.size))
            )
        return lines + self._bridge.describe()

"""The transport contract, the transport of a world of one, and what several transports share.

A transport moves rows of bytes between ranks and knows nothing of experts. Every call names a `phase`, so that an
error can say what this rank was doing; every wait ends at the transport's deadline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol

import numpy as np
import torch

from ..core.errors import ConfigError, ViewPassed
from .quirks import as_bytes


class Waits:
    """How long this rank waited for each peer's rows in all_to_all_v, in seconds; slow peers stand out.

    A wait begins when this rank has sent its own rows and needs the peer's. Where a library does not say who was late,
    all peers of that exchange are given its whole wait, and `exact` is False.
    """

    def __init__(self, size: int, exact: bool = True) -> None:
        self.exact = exact
        self.count, self.total_s, self.longest_s = [0] * size, [0.0] * size, [0.0] * size

    def add(self, peer: int, seconds: float) -> None:
        self.count[peer] += 1
        self.total_s[peer] += seconds
        self.longest_s[peer] = max(self.longest_s[peer], seconds)

    def describe(self) -> str:
        """In words, the peer waited for longest first."""
        peers = sorted((p for p, count in enumerate(self.count) if count), key=lambda p: -self.total_s[p])
        told = [
            f"rank {p} {self.total_s[p]:.3f} s in {self.count[p]} exchanges (longest {self.longest_s[p]:.3f} s)"
            for p in peers
        ]
        return "; ".join(told)

    def take(self, peer: int, other: Waits, other_peer: int) -> None:
        """Copy what `other` knows of `other_peer` to `peer`."""
        for name in ("count", "total_s", "longest_s"):
            getattr(self, name)[peer] = getattr(other, name)[other_peer]


class Interruption:
    """Set from another thread where a rank waits for what will not come: within SLICE_S its wait raises ViewPassed.

    One is shared by all that is made for a view; a transport that was interrupted is of no use any more.
    """

    why: str | None = None

    def check(self, rank: int, phase: str) -> None:
        if self.why is not None:
            raise ViewPassed(f"rank {rank}, phase {phase}: {self.why}")


SLICE_S = 0.02  # how long a rank sleeps before it looks whether others have ended, or it is interrupted


class Transport(Protocol):
    """What dispatch, combine, gradient sums and saving need from a way to reach other ranks.

    Counts are rows along dimension 0. Tensors are contiguous and live on the CPU or on the transport's device; results
    are where the input was. All ranks make the same calls in the same order. Every call raises PeerLost or
    PeerTimeout, naming the phase.
    """

    name: str
    rank: int
    size: int
    deadline_s: float
    waits: Waits

    def all_to_all_v(
        self, send: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], phase: str
    ) -> torch.Tensor:
        """Rows `send` [sum(send_counts), ...], grouped by destination, to rows grouped by source."""
        ...

    def start_all_to_all_v(
        self, send: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], phase: str
    ) -> Callable[[], torch.Tensor]:
        """Begin an all_to_all_v; the returned function waits for it and gives the rows, once.

        Until then `send` must not be written to. Other calls may come between; all ranks start and finish alike.
        Transports that cannot move rows meanwhile do all the work when it is finished.
        """
        ...

    # A transport that shares memory has one more, start_rows (comm/shm.py): senders write rows where they are read.

    def all_reduce(self, tensor: torch.Tensor, phase: str, op: str = "sum") -> None:
        """In place; op is "sum", "max" or "min"."""
        ...

    def all_gather(self, tensor: torch.Tensor, phase: str) -> torch.Tensor:
        """[...] on each rank to [R, ...] on all."""
        ...

    def broadcast(self, tensor: torch.Tensor, root: int, phase: str) -> None:
        """In place, from `root`."""
        ...

    def send(self, tensor: torch.Tensor, to: int, phase: str) -> None: ...

    def recv(self, tensor: torch.Tensor, source: int, phase: str) -> None: ...

    def barrier(self, phase: str) -> None: ...

    def close(self) -> None: ...

    def describe(self) -> list[str]:
        """Lines for people, beside the name."""
        ...


class InHalves:
    """What transports have in common: a whole exchange is its two halves, and most have nothing to describe."""

    start_all_to_all_v: Callable[..., Callable[[], torch.Tensor]]

    def all_to_all_v(
        self, send: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], phase: str
    ) -> torch.Tensor:
        return self.start_all_to_all_v(send, send_counts, recv_counts, phase)()

    def describe(self) -> list[str]:
        """Lines for people, beside the name: paths, memory held."""
        return []


class LocalTransport(InHalves):
    """A world of one: every exchange is the identity."""

    name = "local"
    rank = 0
    size = 1

    def __init__(self, deadline_s: float = 300.0) -> None:
        self.deadline_s = deadline_s
        self.waits = Waits(1)

    def start_all_to_all_v(
        self, send: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], phase: str
    ) -> Callable[[], torch.Tensor]:
        return once(lambda: send, phase)

    def all_reduce(self, tensor: torch.Tensor, phase: str, op: str = "sum") -> None:
        pass

    def all_gather(self, tensor: torch.Tensor, phase: str) -> torch.Tensor:
        return tensor.unsqueeze(0)

    def broadcast(self, tensor: torch.Tensor, root: int, phase: str) -> None:
        pass

    def send(self, tensor: torch.Tensor, to: int, phase: str) -> None:
        raise ValueError(f"{phase}: a world of one has no rank {to} to send to")

    def recv(self, tensor: torch.Tensor, source: int, phase: str) -> None:
        raise ValueError(f"{phase}: a world of one has no rank {source} to receive from")

    def barrier(self, phase: str) -> None:
        pass

    def close(self) -> None:
        pass


def once(finish: Callable[[], Any], phase: str) -> Callable[[], Any]:
    """`finish`, which may be called a single time: a second call raises RuntimeError."""
    calls = iter((finish,))

    def call() -> Any:
        for function in calls:
            return function()
        raise RuntimeError(f"{phase}: this exchange has been finished already")

    return call


def deadline(seconds: float) -> timedelta:
    return timedelta(seconds=seconds)


_COMBINE: dict[str, Callable[..., torch.Tensor]] = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}


_CACHED = 1 << 16  # elements


def reduce_in_rank_order(parts: Sequence[torch.Tensor], op: str) -> torch.Tensor:
    """A new tensor: parts[0] op parts[1] op ..., in this order; 16-bit floats are accumulated in float32."""
    if op not in _COMBINE:
        raise ConfigError(f"all_reduce: op must be one of {', '.join(_COMBINE)}, got {op!r}")
    dtype = parts[0].dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    out = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
    # Piece by piece on CPUs: what is wide stays in the cache.
    size = _CACHED if out.device.type == "cpu" else max(1, out.numel())
    for piece, *pieces in zip(*(part.reshape(-1).split(size) for part in (out, *parts)), strict=True):
        total = pieces[0].to(wide, copy=True)
        for other in pieces[1:]:
            _COMBINE[op](total, other.to(wide), out=total)
        piece.copy_(total)
    return out


def byte_view(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous CPU tensor's own bytes, 1-D uint8. No copy: what is written there is in the tensor."""
    if not tensor.numel():  # an empty tensor may have strides that refuse another view
        return np.empty(0, dtype=np.uint8)
    return as_bytes(tensor.detach()).view(-1).numpy()


def check_counts(
    transport: Any, send: torch.Tensor | None, send_counts: Sequence[int], recv_counts: Sequence[int], phase: str
) -> None:
    """Raise ConfigError for counts that cannot belong to this world or to `send`, where there is one."""
    for name, counts in (("send", send_counts), ("receive", recv_counts)):
        if len(counts) != transport.size or min(counts) < 0:
            raise ConfigError(f"{phase}: {name} counts must be {transport.size} numbers >= 0, got {list(counts)}")
    if send is not None and sum(send_counts) != send.shape[0]:
        raise ConfigError(f"{phase}: send counts {list(send_counts)} do not add up to {send.shape[0]} rows")


def check_peer(transport: Any, peer: int, phase: str) -> None:
    if not 0 <= peer < transport.size or peer == transport.rank:
        raise ConfigError(f"{phase}: rank {transport.rank} of {transport.size} has no peer {peer}")


def describe_counts(send_counts: Sequence[int], recv_counts: Sequence[int]) -> str:
    return f"sending {list(send_counts)} and expecting {list(recv_counts)} rows per rank"

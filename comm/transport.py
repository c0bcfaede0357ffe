"""The transport contract, and the two transports that exist so far.

A transport moves rows of bytes between ranks and knows nothing of experts. Every call names a `phase`, so that an
error can say what this rank was doing; every wait ends at the transport's deadline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from ..core import environment
from ..core.errors import ConfigError, PeerLost, PeerTimeout
from .quirks import as_bytes, exchange_rows, needs_largest, plan_reduction, reduce_in_place
from .vendors import VENDORS, Vendor


class Transport(Protocol):
    """What dispatch, combine, gradient sums and saving need from a way to reach other ranks.

    Counts are rows along dimension 0. Tensors are contiguous and live on the transport's device. All ranks make
    the same calls in the same order. Every call raises PeerLost or PeerTimeout, naming the phase.
    """

    name: str
    rank: int
    size: int
    deadline_s: float

    def all_to_all_v(
        self, send: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], phase: str
    ) -> torch.Tensor:
        """Rows `send` [sum(send_counts), ...], grouped by destination, to rows grouped by source."""
        ...

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


class LocalTransport:
    """A world of one: every exchange is the identity."""

    name = "local"
    rank = 0
    size = 1

    def __init__(self, deadline_s: float = 300.0) -> None:
        self.deadline_s = deadline_s

    def all_to_all_v(
        self, send: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], phase: str
    ) -> torch.Tensor:
        return send

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


_REDUCE_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN, "avg": dist.ReduceOp.AVG}


class TorchTransport:
    """torch.distributed over one process group, which carries the deadline, within the limits of one vendor's library.

    vendor: whose documented limits are applied (comm/quirks.py): sizes padded, payloads as bytes, reductions in a
    dtype that the library has. emulated: gloo on host memory stands in for that library.
    """

    def __init__(
        self,
        group: Any,
        deadline_s: float,
        owns_default_group: bool,
        vendor: Vendor = VENDORS["cpu"],
        emulated: bool = False,
    ) -> None:
        self._group = group
        self._owns_default_group = owns_default_group
        self.vendor = vendor
        self.name = f"torch.distributed:{dist.get_backend(group)}" + (
            f" standing in for {vendor.collective_library.value} (emulated)" if emulated else ""
        )
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.deadline_s = deadline_s

    def all_to_all_v(
        self, send: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], phase: str
    ) -> torch.Tensor:
        row_bytes = as_bytes(send[:0]).shape[1]
        largest = None
        if needs_largest(self.vendor):  # one more exchange: no rank knows what two others send each other
            agreed = torch.tensor([row_bytes * max(*send_counts, *recv_counts)], dtype=torch.int32)
            self.all_reduce(agreed, f"{phase} (largest message)", "max")
            largest = int(agreed)
        detail = describe_counts(send_counts, recv_counts)

        def call(received: torch.Tensor, sent: torch.Tensor, recv_splits: list[int], send_splits: list[int]) -> None:
            self._run(
                lambda: dist.all_to_all_single(received, sent, recv_splits, send_splits, group=self._group),
                phase,
                detail,
            )

        limit = environment.presized_all_to_all_bytes()
        return exchange_rows(self.vendor, send, send_counts, recv_counts, call, largest, limit)

    def all_reduce(self, tensor: torch.Tensor, phase: str, op: str = "sum") -> None:
        reduce_in_place(
            tensor,
            plan_reduction(self.vendor, tensor.dtype, op, self.size),
            lambda work, name: self._run(lambda: dist.all_reduce(work, _REDUCE_OPS[name], group=self._group), phase),
        )

    def all_gather(self, tensor: torch.Tensor, phase: str) -> torch.Tensor:
        out = tensor.new_empty((self.size, *tensor.shape))
        self._run(lambda: dist.all_gather(list(out.unbind(0)), tensor, group=self._group), phase)
        return out

    def broadcast(self, tensor: torch.Tensor, root: int, phase: str) -> None:
        self._run(lambda: dist.broadcast(as_bytes(tensor), group_src=root, group=self._group), phase)

    def send(self, tensor: torch.Tensor, to: int, phase: str) -> None:
        self._run(lambda: dist.send(as_bytes(tensor), group_dst=to, group=self._group), phase, f"for rank {to}")

    def recv(self, tensor: torch.Tensor, source: int, phase: str) -> None:
        self._run(lambda: dist.recv(as_bytes(tensor), group_src=source, group=self._group), phase, f"for rank {source}")

    def barrier(self, phase: str) -> None:
        # dist.barrier takes no deadline on gloo; a one-element sum does.
        self.all_reduce(torch.zeros(1), phase)

    def close(self) -> None:
        # Let go of the group as well: gloo's worker threads end with its last reference, and one that is still about
        # when the interpreter shuts down aborts the process (seen: one generation in ten).
        group, self._group = self._group, None
        if group is None or not dist.is_initialized():
            return
        dist.destroy_process_group(None if self._owns_default_group else group)

    def _run(self, operation: Any, phase: str, detail: str = "") -> None:
        if self._group is None:
            raise RuntimeError(f"{phase}: the transport is closed")
        try:
            operation()
        except RuntimeError as error:
            raise _translate(error, self, phase, detail) from error


def _translate(error: RuntimeError, transport: Transport, phase: str, detail: str) -> Exception:
    """Turn gloo's RuntimeErrors into PeerTimeout and PeerLost; leave others as they are.

    gloo reports the address of a peer, not its rank, so the ranks named are all that this rank may have waited for.
    """
    text = str(error)
    others = tuple(rank for rank in range(transport.size) if rank != transport.rank)
    where = f"rank {transport.rank}, phase {phase}" + (f", {detail}" if detail else "")
    if "imed out" in text or "imeout" in text:
        return PeerTimeout(
            f"{where}: waited {transport.deadline_s:g} s for ranks {list(others)} over {transport.name}; "
            "one of them is stuck, stopped or in a different call (raise timeout_s if it is only slow)",
            waiting_rank=transport.rank,
            ranks=others,
            phase=phase,
        )
    if any(mark in text for mark in ("onnection closed", "onnection reset", "roken pipe", "ead error", "rite error")):
        lost = others[0] if len(others) == 1 else None
        named = f"rank {lost}" if lost is not None else f"one of ranks {list(others)}"
        return PeerLost(
            f"{where}: {named} closed its connection ({transport.name}); look at its log", rank=lost, phase=phase
        )
    return error


def deadline(seconds: float) -> timedelta:
    return timedelta(seconds=seconds)


_COMBINE: dict[str, Callable[..., torch.Tensor]] = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}


def reduce_in_rank_order(parts: Sequence[torch.Tensor], op: str) -> torch.Tensor:
    """A new tensor: parts[0] op parts[1] op ..., in this order; 16-bit floats are accumulated in float32."""
    if op not in _COMBINE:
        raise ConfigError(f"all_reduce: op must be one of {', '.join(_COMBINE)}, got {op!r}")
    dtype = parts[0].dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    total = parts[0].to(wide, copy=True)
    for part in parts[1:]:
        _COMBINE[op](total, part.to(wide), out=total)
    return total.to(dtype)


def byte_view(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous CPU tensor's own bytes, 1-D uint8. No copy: what is written there is in the tensor."""
    if not tensor.numel():  # an empty tensor may have strides that refuse another view
        return np.empty(0, dtype=np.uint8)
    return as_bytes(tensor.detach()).view(-1).numpy()


def check_counts(
    transport: Any, send: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], phase: str
) -> None:
    """Raise ConfigError for counts that cannot belong to this world or to `send`."""
    for name, counts in (("send", send_counts), ("receive", recv_counts)):
        if len(counts) != transport.size or min(counts) < 0:
            raise ConfigError(f"{phase}: {name} counts must be {transport.size} numbers >= 0, got {list(counts)}")
    if sum(send_counts) != send.shape[0]:
        raise ConfigError(f"{phase}: send counts {list(send_counts)} do not add up to {send.shape[0]} rows")


def check_peer(transport: Any, peer: int, phase: str) -> None:
    if not 0 <= peer < transport.size or peer == transport.rank:
        raise ConfigError(f"{phase}: rank {transport.rank} of {transport.size} has no peer {peer}")


def describe_counts(send_counts: Sequence[int], recv_counts: Sequence[int]) -> str:
    return f"sending {list(send_counts)} and expecting {list(recv_counts)} rows per rank"

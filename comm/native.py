"""Ranks of one vendor over that vendor's own collective library, through torch.distributed; device tensors.

The vendor's documented limits (comm/quirks.py) are applied here, and no caller sees them: sizes padded, payloads as
bytes, reductions in a dtype that the library has. CPU tensors (counts, control) go over gloo among the same ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..core import environment
from .gloo import GlooTransport, translate
from .quirks import (
    as_bytes,
    granule,
    needs_largest,
    plan_reduction,
    reduce_in_place,
    start_exchange,
    take_message,
    whole_message,
)
from .transport import InHalves, check_counts, check_peer, deadline, describe_counts, once
from .vendors import Vendor

_REDUCE_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN, "avg": dist.ReduceOp.AVG}


class NativeTransport(InHalves):
    """A Transport over a device group, and over gloo (`host`) for CPU tensors. Closing ends both.

    library: what the group speaks, where it is not the vendor's own.

    Vendors' libraries do not say which peer was late or lost. Dispatch exchanges its counts over gloo first, where
    every peer is named, and `waits` are those of gloo.
    """

    def __init__(
        self, group: Any, host: GlooTransport, vendor: Vendor, emulated: bool, library: str | None = None
    ) -> None:
        self._group, self._host, self.vendor = group, host, vendor
        self.rank, self.size, self.deadline_s, self.waits = host.rank, host.size, host.deadline_s, host.waits
        told = f" ({vendor.collective_library.value} emulated)" if emulated else f" ({library})" if library else ""
        self.name = f"torch.distributed:{dist.get_backend(group)}{told}"

    def start_all_to_all_v(
        self, send: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], phase: str
    ) -> Callable[[], torch.Tensor]:
        if send.device.type == "cpu":
            return self._host.start_all_to_all_v(send, send_counts, recv_counts, phase)
        check_counts(self, send, send_counts, recv_counts, phase)
        largest = None
        if needs_largest(self.vendor):  # one more exchange: no rank knows what two others send each other
            agreed = torch.tensor([as_bytes(send[:0]).shape[1] * max(*send_counts, *recv_counts)])
            self._host.all_reduce(agreed, f"{phase} (largest message)", "max")
            largest = int(agreed)
        detail = describe_counts(send_counts, recv_counts)

        def call(received: torch.Tensor, sent: torch.Tensor, recv_splits: list[int], send_splits: list[int]):
            work = self._run(
                lambda: dist.all_to_all_single(
                    received, sent, recv_splits, send_splits, group=self._group, async_op=True
                ),
                phase,
                detail,
            )
            return lambda: self._run(lambda: work.wait(deadline(self.deadline_s)), phase, detail)

        limit = environment.presized_all_to_all_bytes()
        return once(start_exchange(self.vendor, send.detach(), send_counts, recv_counts, call, largest, limit), phase)

    def all_reduce(self, tensor: torch.Tensor, phase: str, op: str = "sum") -> None:
        if tensor.device.type == "cpu":
            return self._host.all_reduce(tensor, phase, op)
        reduce_in_place(
            tensor,
            plan_reduction(self.vendor, tensor.dtype, op, self.size),
            lambda work, name: self._run(lambda: dist.all_reduce(work, _REDUCE_OPS[name], group=self._group), phase),
            granule(self.vendor.quirks),
        )

    def all_gather(self, tensor: torch.Tensor, phase: str) -> torch.Tensor:
        if tensor.device.type == "cpu":
            return self._host.all_gather(tensor, phase)
        mine = whole_message(tensor, self.vendor)
        gathered = mine.new_empty((self.size, len(mine)))
        self._run(lambda: dist.all_gather(list(gathered.unbind(0)), mine, group=self._group), phase)
        out = tensor.new_empty((self.size, *tensor.shape))
        for message, part in zip(gathered.unbind(0), out.unbind(0), strict=True):
            take_message(message, part)
        return out

    def broadcast(self, tensor: torch.Tensor, root: int, phase: str) -> None:
        if tensor.device.type == "cpu":
            return self._host.broadcast(tensor, root, phase)
        message = whole_message(tensor, self.vendor)
        self._run(lambda: dist.broadcast(message, group_src=root, group=self._group), phase)
        take_message(message, tensor)

    def send(self, tensor: torch.Tensor, to: int, phase: str) -> None:
        if tensor.device.type == "cpu":
            return self._host.send(tensor, to, phase)
        check_peer(self, to, phase)
        message = whole_message(tensor, self.vendor)
        self._run(lambda: dist.send(message, group_dst=to, group=self._group), phase, f"for rank {to}", (to,))

    def recv(self, tensor: torch.Tensor, source: int, phase: str) -> None:
        if tensor.device.type == "cpu":
            return self._host.recv(tensor, source, phase)
        check_peer(self, source, phase)
        message = whole_message(tensor, self.vendor)
        detail = f"from rank {source}"
        self._run(lambda: dist.recv(message, group_src=source, group=self._group), phase, detail, (source,))
        take_message(message, tensor)

    def barrier(self, phase: str) -> None:
        self._host.barrier(phase)

    def close(self) -> None:
        self._group = None
        self._host.close()

    def _run(self, operation: Any, phase: str, detail: str = "", waits_for: tuple[int, ...] | None = None) -> Any:
        if self._group is None:
            raise RuntimeError(f"{phase}: the transport is closed")
        try:
            return operation()
        except RuntimeError as error:
            others = tuple(rank for rank in range(self.size) if rank != self.rank)
            raise translate(error, self, phase, detail, others if waits_for is None else waits_for) from error

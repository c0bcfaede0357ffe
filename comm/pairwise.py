"""The contract from one primitive: an exchange of one message between each pair of ranks.

gloo and the ZeroMQ bridge both move messages between pairs; what the contract asks for beyond that is written here
once. Reductions go in rank order, so all ranks and all such transports get the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from .transport import InHalves, Waits, check_counts, describe_counts, once, reduce_in_rank_order

_SMALL_BYTES = 1 << 14  # up to here a reduction is one exchange of everything; beyond, two of a part each


class PairwiseTransport(InHalves):
    """A Transport whose subclass moves messages: `start`, `send` and `recv`."""

    name: str

    def __init__(self, rank: int, size: int, deadline_s: float) -> None:
        self.rank, self.size, self.deadline_s = rank, size, deadline_s
        self.waits = Waits(size)

    def start(
        self,
        outgoing: Mapping[int, torch.Tensor],
        incoming: Mapping[int, torch.Tensor],
        phase: str,
        detail: str = "",
        waits: Waits | None = None,
    ) -> Callable[[], None]:
        """Begin one exchange: outgoing[p] to peer p, incoming[p] from peer p; contiguous tensors.

        Every rank calls, also with nothing to move; whom one rank sends to expects it. The returned function waits
        until all has come and all that was sent may be written to again; it adds to `waits` where given.
        """
        raise NotImplementedError

    def start_all_to_all_v(
        self, send: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], phase: str
    ) -> Callable[[], torch.Tensor]:
        check_counts(self, send, send_counts, recv_counts, phase)
        send = send.detach().contiguous()
        recv = send.new_empty((sum(recv_counts), *send.shape[1:]))
        outgoing, incoming = send.split(list(send_counts)), recv.split(list(recv_counts))
        finish = self._start_all(outgoing, incoming, phase, describe_counts(send_counts, recv_counts), self.waits)

        def rows() -> torch.Tensor:
            finish()
            return recv

        return once(rows, phase)

    def all_reduce(self, tensor: torch.Tensor, phase: str, op: str = "sum") -> None:
        flat = tensor.detach().contiguous().view(-1)
        if flat.numel() * flat.element_size() <= _SMALL_BYTES:
            total = reduce_in_rank_order(list(self.all_gather(flat, phase)), op)
        else:  # each rank reduces its part of the tensor
            bounds = [len(flat) * rank // self.size for rank in range(self.size + 1)]
            counts = [end - begin for begin, end in zip(bounds, bounds[1:], strict=False)]
            mine = counts[self.rank]
            parts = self.all_to_all_v(flat, counts, [mine] * self.size, phase).split([mine] * self.size)
            reduced, total = reduce_in_rank_order(parts, op), torch.empty_like(flat)
            self._start_all([reduced] * self.size, total.split(counts), phase)()
        tensor.detach().copy_(total.view(tensor.shape))

    def all_gather(self, tensor: torch.Tensor, phase: str) -> torch.Tensor:
        out = tensor.new_empty((self.size, *tensor.shape))
        self._start_all([tensor.detach().contiguous()] * self.size, out.unbind(0), phase)()
        return out

    def broadcast(self, tensor: torch.Tensor, root: int, phase: str) -> None:
        others = [peer for peer in range(self.size) if peer != self.rank]
        value = tensor.detach().contiguous()
        mine, theirs = (dict.fromkeys(others, value), {}) if self.rank == root else ({}, {root: value})
        self.start(mine, theirs, phase)()
        if value.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(value)

    def barrier(self, phase: str) -> None:
        self.all_gather(torch.zeros(1, dtype=torch.uint8), phase)

    def _start_all(
        self,
        outgoing: Sequence[torch.Tensor],
        incoming: Sequence[torch.Tensor],
        phase: str,
        detail: str = "",
        waits: Waits | None = None,
    ) -> Callable[[], None]:
        """One message to and from every rank, this one included."""
        incoming[self.rank].copy_(outgoing[self.rank])
        peers = [peer for peer in range(self.size) if peer != self.rank]
        return self.start(
            {peer: outgoing[peer] for peer in peers}, {peer: incoming[peer] for peer in peers}, phase, detail, waits
        )

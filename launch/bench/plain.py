"""The plain path of dispatch and combine, the peer of `bench dispatch`: one row per routing, an all-to-all each way.

What Megatron-LM, torchtitan and DeepSpeed do, in torch operations: sort the T*K routings by expert, gather a row for
each, exchange counts, exchange rows, regroup what came by local expert; and all of it backwards. Every step is the
fastest of the ways that torch offers for it on a CPU, as far as we have measured. It knows no deadlines and no errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...comm import rows

# exchange(send [N, ...], send_counts [R], recv_counts [R]) -> [sum(recv_counts), ...], grouped by source. Counts are
# rows along dimension 0.
Exchange = Callable[[torch.Tensor, Sequence[int], Sequence[int]], torch.Tensor]

_SUM_TOKENS = 32  # summed at a time: their float32 copies stay in the cache


def over_torch(group: Any) -> Exchange:
    """torch.distributed's all_to_all_single with splits, over `group`."""
    import torch.distributed as dist

    def exchange(send: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int]) -> torch.Tensor:
        recv = send.new_empty((sum(recv_counts), *send.shape[1:]))
        dist.all_to_all_single(recv, send, list(recv_counts), list(send_counts), group=group)
        return recv

    return exchange


@dataclass(frozen=True)
class PlainHandle:
    """What dispatch leaves for combine.

    order [T*K]: the routings (token * K + choice) in the order of their experts. regrouped [N]: the place, as received,
    of each row of dispatch's result. rows_per_expert [E_local]: how many of them each local expert has.
    """

    num_tokens: int
    order: torch.Tensor
    send_counts: list[int]
    recv_counts: list[int]
    regrouped: torch.Tensor
    rows_per_expert: torch.Tensor


class PlainPath:
    """Dispatch and combine of rows [T, hidden_size] of `dtype` over `exchange`.

    experts_per_rank [R]: rank r holds that many consecutive experts. wire: None, or the name of a format of
    comm/formats.py that rows travel in to the experts: tokens are quantised once, 1x128, before they are gathered, and
    dequantised when they have come, by the same code as ours. Results go home in `dtype`.
    """

    def __init__(
        self,
        exchange: Exchange,
        rank: int,
        experts_per_rank: Sequence[int],
        hidden_size: int,
        dtype: torch.dtype,
        wire: str | None = None,
    ) -> None:
        self._exchange, self._experts_per_rank = exchange, list(experts_per_rank)
        self._num_ranks, self._num_local = len(experts_per_rank), experts_per_rank[rank]
        self._rank_of_expert = torch.arange(self._num_ranks).repeat_interleave(torch.tensor(experts_per_rank))
        self._local_expert = torch.arange(self._num_local).repeat(self._num_ranks)
        # Payload and scales only: a packed row of no choices.
        self._layout = rows.layout_of(hidden_size, 0, dtype, wire) if wire else None

    def dispatch(self, x_TH: torch.Tensor, topk_ids_TK: torch.Tensor) -> tuple[torch.Tensor, PlainHandle]:
        """(rows [N, H] grouped by local expert, handle). Every choice names an expert: there is no -1 here."""
        experts, top_k = topk_ids_TK.reshape(-1), topk_ids_TK.shape[1]
        order = experts.argsort(stable=True)
        counts_E = torch.bincount(experts, minlength=len(self._rank_of_expert))
        send_counts = counts_E.new_zeros(self._num_ranks).index_add_(0, self._rank_of_expert, counts_E).tolist()
        came = self._exchange(counts_E, self._experts_per_rank, [self._num_local] * self._num_ranks)
        came_RE = came.view(self._num_ranks, self._num_local)
        recv_counts = came_RE.sum(1).tolist()
        sendable = x_TH if self._layout is None else self._encode(x_TH)
        received = self._exchange(sendable.index_select(0, order // top_k), send_counts, recv_counts)
        if self._layout is not None:
            received = rows.unpack(received, self._layout)[0]
        # They have come by source rank, then expert.
        regrouped = self._local_expert.repeat_interleave(came).argsort(stable=True)
        handle = PlainHandle(len(x_TH), order, send_counts, recv_counts, regrouped, came_RE.sum(0))
        return received.index_select(0, regrouped), handle

    def combine(self, expert_out: torch.Tensor, handle: PlainHandle, topk_weights_TK: torch.Tensor) -> torch.Tensor:
        """y [T, H]: the weighted sums of the results [N, H], accumulated in float32."""
        as_received = expert_out.index_select(0, handle.regrouped.argsort())
        home = self._exchange(as_received, handle.recv_counts, handle.send_counts)
        return weighted_sums(home.index_select(0, handle.order.argsort()), topk_weights_TK)

    def _encode(self, x_TH: torch.Tensor) -> torch.Tensor:
        count = len(x_TH)
        no_choices = torch.empty(count, 0), torch.arange(count), torch.empty(count, 0, dtype=torch.int32)
        return rows.pack(x_TH, *no_choices, self._layout)


def weighted_sums(rows_NH: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """rows [T*K, H] and weights [T, K] float32 to [T, H] in the dtype of the rows."""
    rows_TKH = rows_NH.view(*weights_TK.shape, rows_NH.shape[1])
    sums_TH = rows_NH.new_empty(len(weights_TK), rows_NH.shape[1])
    for sums, values, weights in zip(
        sums_TH.split(_SUM_TOKENS), rows_TKH.split(_SUM_TOKENS), weights_TK.split(_SUM_TOKENS), strict=True
    ):
        sums.copy_(torch.bmm(weights.unsqueeze(1), values.float()).squeeze(1))
    return sums_TH

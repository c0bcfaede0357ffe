"""Dispatch and combine: rows to the ranks that hold their experts, and the results home.

A token crosses to a rank once, however many of its experts live there. Both directions are differentiable: the
backward pass of dispatch is a combine and the other way round. Vocabulary and the two forms (`expand`) follow DeepEP.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from ..core.errors import ConfigError, MoeRuntimeError
from .plan import DispatchPlan, ExpandPlan, plan_dispatch, plan_expand
from .transport import Transport

WORKING, IDLE = 1, 0
_ALIGN = 16  # bytes; every part of a packed row starts on this boundary
_HEADER = 3  # int64 words sent to each peer before rows: count, tag, state


@dataclass
class DispatchHandle:
    """What dispatch leaves for the expert compute and for combine.

    recv_counts: rows received from each rank. N = sum(recv_counts).
    topk_slots [N, K] int32: this rank's local slot for each of the row's K choices, -1 where the expert is elsewhere.
    topk_weights [N, K] float32: the routing weights, 0 where the expert is elsewhere; differentiable.
    rows_per_slot [S_local] int64: (row, choice) pairs of each local slot.
    row_index, choice_index [M] int64: those pairs, sorted by slot, then row, then choice.
    states: what every rank said it is doing (WORKING or IDLE), by rank.
    """

    num_tokens: int
    expand: bool
    plan: DispatchPlan
    recv_counts: list[int]
    topk_slots: torch.Tensor
    topk_weights: torch.Tensor
    rows_per_slot: np.ndarray
    row_index: torch.Tensor
    choice_index: torch.Tensor
    states: list[int]
    source_slots_TK: torch.Tensor
    source_weights_TK: torch.Tensor
    anchor: torch.Tensor = field(repr=False)


class Dispatcher:
    """Dispatch and combine over one transport and one owner table (`slot_rank`).

    Built once per shape and reused for every layer of that shape. `describe_check` is compared across ranks before
    the first exchange.
    """

    def __init__(
        self,
        transport: Transport,
        slot_rank: np.ndarray,
        *,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        dtype: torch.dtype,
        placement_digest: int,
    ) -> None:
        self.transport = transport
        self.slot_rank = np.ascontiguousarray(slot_rank, dtype=np.int32)
        self.hidden_size, self.top_k, self.dtype = hidden_size, top_k, dtype
        self.num_local_slots = int((self.slot_rank == transport.rank).sum())
        self.first_slot = int(np.searchsorted(self.slot_rank, transport.rank))
        self._weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        _check_ranks_agree(
            transport,
            {
                "num_experts": num_experts,
                "hidden_size": hidden_size,
                "top_k": top_k,
                "dtype": _DTYPE_CODES.index(str(dtype)) if str(dtype) in _DTYPE_CODES else -1,
                "placement hash": placement_digest,
            },
        )

    def dispatch(
        self,
        x_TH: torch.Tensor,
        slots_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        *,
        expand: bool = False,
        tag: int = 0,
        state: int = WORKING,
        handle: DispatchHandle | None = None,
    ) -> tuple[torch.Tensor, DispatchHandle]:
        """Send each token once to every rank that holds one of its slots.

        x_TH [T, H] in the dispatcher's dtype; slots_TK [T, K] integer global slot ids, -1 = not selected;
        weights_TK [T, K]. T may be 0 and may differ between ranks; every rank must call. `tag` (a layer number) must
        be equal on all ranks of one exchange. `handle` of an earlier dispatch with the same slots on every rank skips
        the plan and the counts exchange (DeepEP's cached mode); other slots raise ConfigError.

        Returns (rows, handle). expand=False: rows [N, H], each token once, with `handle.topk_slots` and
        `handle.topk_weights`. expand=True: rows [M, H], one per (token, local slot), grouped by slot:
        `handle.rows_per_slot`.
        """
        self.check(x_TH, slots_TK, weights_TK)
        if handle is None:
            plan = plan_dispatch(slots_TK.detach().cpu().contiguous().numpy(), self.slot_rank, self.transport.size)
            recv_counts, states = self._exchange_counts(plan, 2 * tag + int(expand), state)
        else:
            if not torch.equal(slots_TK, handle.source_slots_TK):
                raise ConfigError("dispatch: the handle belongs to another routing; leave it out")
            plan, recv_counts, states = handle.plan, handle.recv_counts, handle.states
        rows, topk_weights, topk_slots, anchor = _DispatchRows.apply(x_TH, weights_TK, self, plan, recv_counts)
        order: ExpandPlan = plan_expand(topk_slots.numpy(), self.num_local_slots)
        handle = DispatchHandle(
            num_tokens=x_TH.shape[0],
            expand=expand,
            plan=plan,
            recv_counts=recv_counts,
            topk_slots=topk_slots,
            topk_weights=topk_weights,
            rows_per_slot=order.rows_per_slot,
            row_index=torch.from_numpy(order.row_index),
            choice_index=torch.from_numpy(order.k_index),
            states=states,
            source_slots_TK=slots_TK,
            source_weights_TK=weights_TK,
            anchor=anchor,
        )
        return (rows.index_select(0, handle.row_index) if expand else rows), handle

    def combine(self, rows: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """Bring results home and sum them: y_TH [T, H] in the dtype of `rows`, accumulated in float32.

        expand=False: `rows` [N, H] are this rank's partial sums, already weighted; they are summed in rank order.
        expand=True: `rows` [M, H] are unweighted expert outputs in dispatch's order; they come home one by one, are
        weighted there and summed in the order of the token's choices, so the result does not depend on the placement.
        """
        expected = int(handle.rows_per_slot.sum()) if handle.expand else sum(handle.recv_counts)
        if rows.shape != (expected, self.hidden_size):
            raise ConfigError(
                f"combine: expected rows of shape {(expected, self.hidden_size)}, got {tuple(rows.shape)}"
            )
        if handle.expand:
            return self._combine_expanded(rows, handle)
        # The anchor ties the result to dispatch on every rank: one whose slots got no row would otherwise have no
        # graph here, skip the backward exchange, and leave the others waiting.
        home = _Exchange.apply(
            rows, handle.anchor, self.transport, handle.recv_counts, handle.plan.send_counts.tolist(), "combine"
        )
        tokens = torch.from_numpy(handle.plan.send_tokens)
        y = torch.zeros(handle.num_tokens, self.hidden_size, dtype=_accumulate_dtype(rows.dtype))
        return y.index_add(0, tokens, home.to(y.dtype)).to(rows.dtype)

    def _combine_expanded(self, rows: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        slots_NK = handle.topk_slots
        # Undo the grouping by slot: (row, choice) order is what the sender can reconstruct from its own plan.
        position = torch.empty(len(handle.row_index), dtype=torch.int64)
        row_major = handle.row_index * self.top_k + handle.choice_index
        position[torch.argsort(row_major)] = torch.arange(len(row_major))
        row_major_rows = torch.zeros_like(rows).index_copy(0, position, rows)
        pairs_to = [int((part >= 0).sum()) for part in slots_NK.split(handle.recv_counts)]
        mine_NK = torch.from_numpy(handle.plan.send_slots) >= 0
        pairs_from = [int(part.sum()) for part in mine_NK.split(handle.plan.send_counts.tolist())]
        home = _Exchange.apply(row_major_rows, handle.anchor, self.transport, pairs_to, pairs_from, "combine")
        send_row, choice = mine_NK.nonzero(as_tuple=True)
        token = torch.from_numpy(handle.plan.send_tokens)[send_row]
        y = torch.zeros(handle.num_tokens, self.hidden_size, dtype=_accumulate_dtype(rows.dtype))
        for k in range(self.top_k):  # in the order of the choices, whatever ranks the experts are on
            pair = (choice == k).nonzero().view(-1)
            weight = handle.source_weights_TK[token[pair], k].to(y.dtype)
            y = y.index_add(0, token[pair], home[pair].to(y.dtype) * weight.unsqueeze(1))
        return y.to(rows.dtype)

    def _exchange_counts(self, plan: DispatchPlan, tag: int, state: int) -> tuple[list[int], list[int]]:
        header = torch.empty(self.transport.size, _HEADER, dtype=torch.int64)
        header[:, 0] = torch.from_numpy(plan.send_counts)
        header[:, 1], header[:, 2] = tag, state
        ones = [1] * self.transport.size
        answer = self.transport.all_to_all_v(header, ones, ones, "dispatch (counts)")
        counts, tags, states = (column.tolist() for column in answer.unbind(1))
        for rank, other in enumerate(tags):
            if other != tag:
                raise MoeRuntimeError(
                    f"rank {rank} dispatches for expert layer {other // 2} (expand={bool(other % 2)}) while rank "
                    f"{self.transport.rank} is at layer {tag // 2} (expand={bool(tag % 2)}): all ranks must run the "
                    "same number of forward passes; wrap uneven work in `with runtime.join(model):`"
                )
        return counts, states

    def check(self, x_TH: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor) -> None:
        """Raise ConfigError for tensors that cannot be dispatched."""
        if x_TH.dim() != 2 or x_TH.shape[1] != self.hidden_size or x_TH.dtype != self.dtype:
            raise ConfigError(
                f"dispatch: x must be [T, {self.hidden_size}] {self.dtype}, got {tuple(x_TH.shape)} {x_TH.dtype}"
            )
        expected = (x_TH.shape[0], self.top_k)
        if tuple(slots_TK.shape) != expected or tuple(weights_TK.shape) != expected:
            raise ConfigError(
                f"dispatch: topk ids and weights must be {expected}, got {tuple(slots_TK.shape)} and "
                f"{tuple(weights_TK.shape)}"
            )
        if slots_TK.is_floating_point() or slots_TK.is_complex() or slots_TK.dtype == torch.bool:
            raise ConfigError(f"dispatch: topk ids must be whole numbers, got {slots_TK.dtype}")

    def _row_layout(self) -> tuple[int, int, int]:
        """Bytes: start of weights, start of slots, length of a packed row (hidden values come first)."""
        weights_at = _round_up(self.hidden_size * self.dtype.itemsize)
        slots_at = weights_at + self.top_k * self._weight_dtype.itemsize
        return weights_at, slots_at, _round_up(slots_at + self.top_k * 4)


class _DispatchRows(torch.autograd.Function):
    """Pack (hidden, weights, slots) of each unique (token, rank) into one row of bytes, and exchange the rows."""

    @staticmethod
    def forward(ctx, x_TH, weights_TK, dispatcher, plan, recv_counts):
        ctx.dispatcher, ctx.plan, ctx.recv_counts = dispatcher, plan, recv_counts
        ctx.shapes = (x_TH.shape, weights_TK.shape, weights_TK.dtype)
        weights_at, slots_at, row_bytes = dispatcher._row_layout()
        tokens = torch.from_numpy(plan.send_tokens)
        slots = torch.from_numpy(plan.send_slots)
        packed = torch.empty(len(tokens), row_bytes, dtype=torch.uint8)
        hidden, weights, slot_bytes = dispatcher_views(packed, dispatcher)
        if len(tokens):
            torch.index_select(x_TH.detach(), 0, tokens, out=hidden)
            weights.copy_(weights_TK.detach().index_select(0, tokens).masked_fill(slots < 0, 0))
            slot_bytes.copy_(slots)
        received = dispatcher.transport.all_to_all_v(packed, plan.send_counts.tolist(), recv_counts, "dispatch")
        rows, recv_weights, recv_slots = dispatcher_views(received, dispatcher)
        recv_slots = recv_slots.contiguous()
        ctx.mark_non_differentiable(recv_slots)
        return rows, recv_weights.contiguous(), recv_slots, torch.zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rows, grad_weights, _grad_slots, _grad_anchor):
        dispatcher, plan = ctx.dispatcher, ctx.plan
        (x_shape, weights_shape, weights_dtype) = ctx.shapes
        _, slots_at, _ = dispatcher._row_layout()
        packed = torch.empty(grad_rows.shape[0], _round_up(slots_at), dtype=torch.uint8)
        hidden, weights, _ = dispatcher_views(packed, dispatcher)
        hidden.copy_(grad_rows)
        weights.copy_(grad_weights)
        home = dispatcher.transport.all_to_all_v(
            packed, ctx.recv_counts, plan.send_counts.tolist(), "backward of dispatch"
        )
        hidden, weights, _ = dispatcher_views(home, dispatcher)
        tokens = torch.from_numpy(plan.send_tokens)
        elsewhere = torch.from_numpy(plan.send_slots) < 0
        grad_x = torch.zeros(x_shape, dtype=_accumulate_dtype(hidden.dtype))
        grad_x.index_add_(0, tokens, hidden.to(grad_x.dtype))
        grad_w = torch.zeros(weights_shape, dtype=weights.dtype)
        grad_w.index_add_(0, tokens, weights.masked_fill(elsewhere, 0))
        return grad_x.to(hidden.dtype), grad_w.to(weights_dtype), None, None, None


class _Exchange(torch.autograd.Function):
    """An all-to-all of rows whose backward pass is the opposite all-to-all. `anchor` only ties the graph together."""

    @staticmethod
    def forward(ctx, rows, anchor, transport, send_counts, recv_counts, phase):
        ctx.exchange = (transport, recv_counts, send_counts, f"backward of {phase}")
        return transport.all_to_all_v(rows.detach().contiguous(), send_counts, recv_counts, phase)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rows):
        transport, send_counts, recv_counts, phase = ctx.exchange
        grad = transport.all_to_all_v(grad_rows.contiguous(), send_counts, recv_counts, phase)
        return grad, torch.zeros(()), None, None, None, None


def dispatcher_views(packed: torch.Tensor, dispatcher: Dispatcher) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden [N, H], weights [N, K], slots [N, K] int32) as strided views of packed rows; slots may be cut off."""
    weights_at, slots_at, row_bytes = dispatcher._row_layout()
    hidden = packed[:, : dispatcher.hidden_size * dispatcher.dtype.itemsize].view(dispatcher.dtype)
    weights = packed[:, weights_at:slots_at].view(dispatcher._weight_dtype)
    slots = packed[:, slots_at : slots_at + dispatcher.top_k * 4]
    return hidden, weights, slots.view(torch.int32) if packed.shape[1] == row_bytes else slots


def _round_up(size: int) -> int:
    return (size + _ALIGN - 1) // _ALIGN * _ALIGN


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


_DTYPE_CODES = ("torch.float32", "torch.bfloat16", "torch.float16", "torch.float64")


def _check_ranks_agree(transport: Transport, fields: dict[str, int]) -> None:
    """Compare every field across ranks; raise ConfigError naming the first rank and field that differ."""
    mine = torch.tensor(list(fields.values()), dtype=torch.int64)
    table = transport.all_gather(mine, "dispatcher check")
    for column, name in enumerate(fields):
        values = table[:, column].tolist()
        for rank, value in enumerate(values):
            if value != values[0]:
                shown = [_DTYPE_CODES[v] if name == "dtype" and v >= 0 else v for v in (values[0], value)]
                raise ConfigError(
                    f"rank {rank} disagrees with rank 0 on {name}: {shown[1]} against {shown[0]}; "
                    "all ranks must load the same checkpoint, dtype and placement"
                )

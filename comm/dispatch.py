"""Dispatch and combine: rows to the ranks that hold their experts, and the results home.

A token crosses to a rank once, however many of its experts live there. Both directions are differentiable: the
backward pass of dispatch is a combine and the other way round. Vocabulary and the two forms (`expand`) follow DeepEP.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from ..core.errors import ConfigError, MoeRuntimeError
from ..core.spans import spans
from .plan import DispatchPlan, ExpandPlan, plan_dispatch, plan_expand
from .quirks import dtype_name
from .rows import (
    ALIGN,
    combine_rows,
    gather,
    layout_of,
    new_parts,
    pack,
    pack_gradients,
    packer,
    unpack,
    unpack_gradients,
)
from .transport import Transport, once

WORKING, IDLE = 1, 0
_HEADER = 3  # int64 words sent to each peer before rows: count, tag, state


@dataclass(frozen=True)
class Route:
    """Where this rank's rows go and whence others come; the same for every dispatch of one routing.

    tokens [N_sent] int64 and slots [N_sent, K] int32 are the plan's arrays on the device of the rows.
    """

    plan: DispatchPlan
    send_counts: list[int]
    recv_counts: list[int]
    states: list[int]
    device: torch.device

    @cached_property
    def tokens(self) -> torch.Tensor:
        return torch.from_numpy(self.plan.send_tokens).to(self.device)

    @cached_property
    def slots(self) -> torch.Tensor:
        return torch.from_numpy(self.plan.send_slots).to(self.device)


@dataclass
class DispatchHandle:
    """What dispatch leaves for the expert compute and for combine. Index tensors are on the device of the rows.

    route.recv_counts: rows received from each rank. N = their sum.
    topk_slots [N, K] int32: this rank's local slot for each of the row's K choices, -1 where the expert is elsewhere.
    topk_weights [N, K] float32: the routing weights, 0 where the expert is elsewhere; differentiable.
    rows_per_slot [S_local] int64: (row, choice) pairs of each local slot.
    row_index, choice_index [M] int64: those pairs, sorted by slot, then row, then choice.
    states: what every rank said it is doing (WORKING or IDLE), by rank.
    """

    num_tokens: int
    expand: bool
    route: Route
    topk_slots: torch.Tensor
    topk_weights: torch.Tensor
    num_local_slots: int
    source_slots_TK: torch.Tensor
    source_weights_TK: torch.Tensor
    anchor: torch.Tensor = field(repr=False)
    outer: DispatchHandle | None = None  # of the hop between nodes, where there were two (comm/nodes.py)

    @property
    def recv_counts(self) -> list[int]:
        return self.route.recv_counts

    @property
    def states(self) -> list[int]:
        return (self.outer or self).route.states

    @cached_property
    def order(self) -> ExpandPlan:
        """Made when it is first asked for: who picks rows by topk_slots does without."""
        return plan_expand(self.topk_slots.cpu().numpy(), self.num_local_slots)

    @property
    def rows_per_slot(self) -> np.ndarray:
        return self.order.rows_per_slot

    @cached_property
    def row_index(self) -> torch.Tensor:
        return torch.from_numpy(self.order.row_index).to(self.topk_slots.device)

    @cached_property
    def by_row(self) -> torch.Tensor:
        """The pairs sorted by row, then choice: a permutation [M] of their places in row_index."""
        return torch.from_numpy(np.argsort(self.order.row_index * self.topk_slots.shape[1] + self.order.k_index)).to(
            self.topk_slots.device
        )

    @cached_property
    def choice_index(self) -> torch.Tensor:
        return torch.from_numpy(self.order.k_index).to(self.topk_slots.device)


class Dispatcher:
    """Dispatch and combine over one transport and one owner table (`slot_rank`).

    Built once per shape and reused for every layer of that shape; shapes and formats are compared across ranks before
    the first exchange. `device` is where rows live. formats[r][p]: the wire format between ranks r and p by name, for
    rows on their way to experts (comm/formats.py); None sends them as they are. Results go home as they are. Gradients
    of rows that were approximated on the wire are those of rows that were not.
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
        device: torch.device | str = "cpu",
        formats: Sequence[Sequence[str]] | None = None,
    ) -> None:
        self.transport = transport
        self.slot_rank = np.ascontiguousarray(slot_rank, dtype=np.int32)
        self.hidden_size, self.top_k, self.dtype, self.device = hidden_size, top_k, dtype, torch.device(device)
        self.num_local_slots = int((self.slot_rank == transport.rank).sum())
        own = dtype_name(dtype)
        self.formats = [list(row) for row in formats] if formats else [[own] * transport.size] * transport.size
        check_ranks_agree(
            transport,
            {
                "num_experts": num_experts,
                "hidden_size": hidden_size,
                "top_k": top_k,
                "dtype": _DTYPE_CODES.index(str(dtype)) if str(dtype) in _DTYPE_CODES else -1,
                "placement hash": placement_digest,
                "wire formats (hash)": zlib.crc32(repr(self.formats).encode()),
            },
        )
        self.exact_layout = layout_of(hidden_size, top_k, dtype, own)
        self.layouts = [layout_of(hidden_size, top_k, dtype, wire) for wire in self.formats[transport.rank]]
        self._row_bytes = [layout.row_bytes for layout in self.layouts]
        self._uniform = all(layout == self.layouts[0] for layout in self.layouts)
        self._kinds = 1 if self._uniform else len(self.layouts)

    def no_rows(self) -> torch.Tensor:
        """[0, H] rows of this dispatcher: what a rank without tokens dispatches."""
        return torch.empty(0, self.hidden_size, dtype=self.dtype, device=self.device)

    def describe(self) -> str:
        return "a token crosses to each rank once"

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
        return self.start_dispatch(x_TH, slots_TK, weights_TK, expand=expand, tag=tag, state=state, handle=handle)()

    def start_dispatch(
        self,
        x_TH: torch.Tensor,
        slots_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        *,
        expand: bool = False,
        tag: int = 0,
        state: int = WORKING,
        handle: DispatchHandle | None = None,
    ) -> Callable[[], tuple[torch.Tensor, DispatchHandle]]:
        """dispatch in two halves: this one exchanges counts and sends the rows on their way; the function that it
        returns waits for them and gives what dispatch gives, once. Meanwhile the caller may compute, or start another.
        """
        self.check(x_TH, slots_TK, weights_TK)
        if handle is None:
            arrive = self._send_first(x_TH, weights_TK, slots_TK, 2 * tag + int(expand), state)
        elif torch.equal(slots_TK, handle.source_slots_TK):
            arrive = self._send(x_TH, weights_TK, handle.route)
        else:
            raise ConfigError("dispatch: the handle belongs to another routing; leave it out")

        def wait() -> tuple[torch.Tensor, DispatchHandle]:
            received, route = arrive()
            rows, topk_weights, topk_slots, anchor = _call(_DispatchRows, x_TH, weights_TK, self, route, received)
            made = DispatchHandle(
                num_tokens=x_TH.shape[0],
                expand=expand,
                route=route,
                topk_slots=topk_slots,
                topk_weights=topk_weights,
                num_local_slots=self.num_local_slots,
                source_slots_TK=slots_TK,
                source_weights_TK=weights_TK,
                anchor=anchor,
            )
            return (gather(rows, made.row_index, visit=lambda: made.by_row) if expand else rows), made

        return once(wait, "dispatch")

    def combine(self, rows: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """Bring results home and sum them: y_TH [T, H] in the dtype of `rows`, accumulated in float32.

        expand=False: `rows` [N, H] are this rank's partial sums, already weighted; they are summed in rank order.
        expand=True: `rows` [M, H] are unweighted expert outputs in dispatch's order; they come home one by one, are
        weighted there and summed in the order of the token's choices, so the result does not depend on the placement.
        """
        return self.start_combine(rows, handle)()

    def start_combine(self, rows: torch.Tensor, handle: DispatchHandle) -> Callable[[], torch.Tensor]:
        """combine in two halves, as start_dispatch: the function that it returns waits and gives y_TH, once."""
        self._check_results(rows, handle)
        if handle.expand:
            return self._start_combine_expanded(rows, handle)
        # The anchor ties the result to dispatch on every rank: one whose slots got no row would otherwise have no
        # graph here, skip the backward exchange, and leave the others waiting.
        route = handle.route
        bring_home = _start_exchange(rows, handle.anchor, self.transport, route.recv_counts, route.send_counts)

        return once(lambda: combine_rows(bring_home(), route.tokens, handle.num_tokens), "combine")

    def _start_combine_expanded(self, rows: torch.Tensor, handle: DispatchHandle) -> Callable[[], torch.Tensor]:
        # Undo the grouping by slot: (row, choice) order is what the sender can reconstruct from its own plan.
        order, device = handle.order, rows.device
        send_row, choice = np.nonzero(handle.route.plan.send_slots >= 0)
        pairs_to = _count_by_rank(order.row_index, handle.recv_counts)
        pairs_from = _count_by_rank(send_row, handle.route.send_counts)
        bring_home = _start_exchange(rows, handle.anchor, self.transport, pairs_to, pairs_from, handle.by_row)
        tokens = torch.from_numpy(handle.route.plan.send_tokens[send_row]).to(device)
        choices = torch.from_numpy(choice).to(device)

        def wait() -> torch.Tensor:
            weights = handle.source_weights_TK.to(device)[tokens, choices]
            # In the order of the choices, whatever ranks the experts are on.
            return combine_rows(bring_home(), tokens, handle.num_tokens, weights, choices)

        return once(wait, "combine")

    def _send_first(
        self, x_TH: torch.Tensor, weights_TK: torch.Tensor, slots_TK: torch.Tensor, tag: int, state: int
    ) -> Callable[[], tuple[torch.Tensor, Route]]:
        """Plan, and start the exchange of rows of whose number the other ranks do not know yet."""
        plan = plan_dispatch(slots_TK.detach().cpu().contiguous().numpy(), self.slot_rank, self.transport.size)
        send_counts = plan.send_counts.tolist()
        if not (self._in_place(x_TH) and self.transport.takes_counted_rows):
            recv_counts, states = self._exchange_counts(plan, tag, state)
            return self._send(x_TH, weights_TK, Route(plan, send_counts, recv_counts, states, x_TH.device))
        fill = self._fill(x_TH.detach(), weights_TK.detach(), plan, send_counts)
        finish = self.transport.start_counted_rows(self._row_bytes, send_counts, (tag, state), fill, "dispatch")

        def arrive() -> tuple[torch.Tensor, Route]:
            recv_counts, notes, received = finish()
            self._check_tags([other for other, _ in notes], tag)
            return received, Route(plan, send_counts, recv_counts, [state for _, state in notes], x_TH.device)

        return arrive

    def _send(
        self, x_TH: torch.Tensor, weights_TK: torch.Tensor, route: Route
    ) -> Callable[[], tuple[torch.Tensor, Route]]:
        """Start the exchange of packed rows; where the transport can, they are packed where the receiver reads them."""
        x_TH, weights_TK = x_TH.detach(), weights_TK.detach()
        if self._in_place(x_TH):
            fill = self._fill(x_TH, weights_TK, route.plan, route.send_counts)
            finish = self.transport.start_rows(self._row_bytes, route.send_counts, route.recv_counts, fill, "dispatch")
        else:
            packed, send_units, recv_units = self._pack(x_TH, weights_TK, route)
            finish = self.transport.start_all_to_all_v(packed, send_units, recv_units, "dispatch")
        return lambda: (finish(), route)

    def _fill(
        self, x_TH: torch.Tensor, weights_TK: torch.Tensor, plan: DispatchPlan, counts: Sequence[int]
    ) -> Callable[[int, int, torch.Tensor], None]:
        """What packs rows of the plan for the transport, each rank's in the layout that is agreed with it."""
        packers = [
            packer(x_TH, weights_TK, plan.send_tokens, plan.send_slots, layout)
            for layout in self.layouts[: self._kinds]
        ]
        if self._kinds == 1:
            return packers[0]
        ends = list(accumulate(counts))
        return lambda begin, end, out: packers[bisect_right(ends, begin)](begin, end, out)

    def _in_place(self, x_TH: torch.Tensor) -> bool:
        return writes_in_place(self.transport, x_TH)

    def _pack(
        self, x_TH: torch.Tensor, weights_TK: torch.Tensor, route: Route
    ) -> tuple[torch.Tensor, list[int], list[int]]:
        """Rows for all ranks as bytes, and how many units go to and come from each: rows, or 16 bytes where formats
        differ between peers.
        """
        if self._uniform:
            packed = pack(x_TH, weights_TK, route.tokens, route.slots, self.layouts[0])
            return packed, route.send_counts, route.recv_counts
        counts = route.send_counts
        parts = [
            pack(x_TH, weights_TK, tokens, slots, layout).view(-1).view(len(tokens) * layout.row_bytes // ALIGN, ALIGN)
            for tokens, slots, layout in zip(
                route.tokens.split(counts), route.slots.split(counts), self.layouts, strict=True
            )
        ]
        units = [layout.row_bytes // ALIGN for layout in self.layouts]
        return (
            torch.cat(parts),
            [count * unit for count, unit in zip(counts, units, strict=True)],
            [count * unit for count, unit in zip(route.recv_counts, units, strict=True)],
        )

    def _unpack(self, received: torch.Tensor, route: Route) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The inverse of _pack, for what came: (rows [N, H], weights [N, K], slots [N, K])."""
        if self._uniform:
            return unpack(received.view(-1, self._row_bytes[0]), self.layouts[0])
        counts = route.recv_counts
        parts = new_parts(sum(counts), self.exact_layout, received.device)
        sizes = [count * each for count, each in zip(counts, self._row_bytes, strict=True)]
        columns = zip(*(part.split(counts) for part in parts), strict=True)
        for packed, layout, out in zip(received.view(-1).split(sizes), self.layouts, columns, strict=True):
            unpack(packed.view(-1, layout.row_bytes), layout, out=out)
        return parts

    def _exchange_counts(self, plan: DispatchPlan, tag: int, state: int) -> tuple[list[int], list[int]]:
        header = torch.empty(self.transport.size, _HEADER, dtype=torch.int64)
        header[:, 0] = torch.from_numpy(plan.send_counts)
        header[:, 1], header[:, 2] = tag, state
        ones = [1] * self.transport.size
        answer = self.transport.all_to_all_v(header, ones, ones, "dispatch (counts)")
        counts, tags, states = (column.tolist() for column in answer.unbind(1))
        self._check_tags(tags, tag)
        return counts, states

    def _check_tags(self, tags: list[int], tag: int) -> None:
        for rank, other in enumerate(tags):
            if other != tag:
                raise MoeRuntimeError(
                    f"rank {rank} dispatches for expert layer {other // 2} (expand={bool(other % 2)}) while rank "
                    f"{self.transport.rank} is at layer {tag // 2} (expand={bool(tag % 2)}): all ranks must run the "
                    "same number of forward passes; wrap uneven work in `with runtime.join(model):`"
                )

    def _check_results(self, rows: torch.Tensor, handle: DispatchHandle) -> None:
        """Raise ConfigError for rows that combine cannot take."""
        expected = int(handle.rows_per_slot.sum()) if handle.expand else sum(handle.recv_counts)
        if rows.shape != (expected, self.hidden_size):
            raise ConfigError(
                f"combine: expected rows of shape {(expected, self.hidden_size)}, got {tuple(rows.shape)}"
            )

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


def _call(function: type[torch.autograd.Function], first: torch.Tensor, second: torch.Tensor, *others: Any) -> Any:
    """function.apply where a graph is to be made, else the same without one: for one token half the time."""
    differentiable = torch.is_grad_enabled() and (first.requires_grad or second.requires_grad)
    return (function.apply if differentiable else function.without_graph)(first, second, *others)


_NO_GRAPH = torch.zeros(())  # the anchor of what has no graph


class _DispatchRows(torch.autograd.Function):
    """The rows of an exchange that has been started, and the way of their gradients home."""

    @staticmethod
    def forward(x_TH, weights_TK, dispatcher, route, received):
        return *dispatcher._unpack(received, route), torch.zeros(())

    @staticmethod
    def without_graph(x_TH, weights_TK, dispatcher, route, received):
        return *dispatcher._unpack(received, route), _NO_GRAPH

    @staticmethod
    def setup_context(ctx, inputs, output):
        x_TH, weights_TK, ctx.dispatcher, ctx.route, _ = inputs
        ctx.shapes = (x_TH.shape, weights_TK.shape, weights_TK.dtype, weights_TK.device)
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rows, grad_weights, _grad_slots, _grad_anchor):
        dispatcher, route = ctx.dispatcher, ctx.route
        with spans("dispatch (backward)"):
            return *_DispatchRows._home(dispatcher, route, grad_rows, grad_weights, ctx.shapes), None, None, None

    @staticmethod
    def _home(dispatcher, route, grad_rows, grad_weights, shapes):
        x_shape, weights_shape, weights_dtype, weights_device = shapes
        packed = pack_gradients(grad_rows, grad_weights, dispatcher.exact_layout)
        home = _start_rows(packed, dispatcher.transport, route.recv_counts, route.send_counts, "backward of dispatch")()
        hidden, weights = unpack_gradients(home, dispatcher.exact_layout)
        grad_x = combine_rows(hidden, route.tokens, x_shape[0])
        weights = weights.masked_fill(route.slots < 0, 0)
        grad_w = combine_rows(weights, route.tokens, weights_shape[0])
        return grad_x, grad_w.to(weights_device, weights_dtype)


def _start_exchange(
    rows: torch.Tensor,
    anchor: torch.Tensor,
    transport: Transport,
    send_counts: list[int],
    recv_counts: list[int],
    order: torch.Tensor | None = None,
) -> Callable[[], torch.Tensor]:
    """Begin to bring results home; the function that it returns waits for them. Differentiable in `rows`.

    order [N]: a permutation; rows[order[n]] is the n-th to be sent. None: as they are.
    """
    finish = _start_rows(rows.detach(), transport, send_counts, recv_counts, "combine", order)
    return lambda: _call(_Exchange, rows, anchor, transport, send_counts, recv_counts, order, finish)


def _start_rows(
    rows: torch.Tensor,
    transport: Any,
    send_counts: list[int],
    recv_counts: list[int],
    phase: str,
    order: torch.Tensor | None = None,
) -> Callable[[], torch.Tensor]:
    """start_all_to_all_v of rows [N, H], copied once where the transport lets them be written in place."""
    row_bytes = rows.shape[1] * rows.element_size()
    if row_bytes % ALIGN or not row_bytes or not writes_in_place(transport, rows):
        in_order = rows.contiguous() if order is None else gather(rows, order)
        return transport.start_all_to_all_v(in_order, send_counts, recv_counts, phase)

    def fill(begin: int, end: int, out: torch.Tensor) -> None:
        if order is None:
            out.view(rows.dtype).copy_(rows[begin:end])
        else:
            gather(rows, order[begin:end], out.view(rows.dtype))

    finish = transport.start_rows([row_bytes] * transport.size, send_counts, recv_counts, fill, phase)
    return lambda: finish().view(-1, row_bytes).view(rows.dtype)


def writes_in_place(transport: Any, rows: torch.Tensor) -> bool:
    """Whether the transport lets a sender write rows where the receiver reads them (comm/shm.py's start_rows)."""
    return rows.is_cpu and hasattr(transport, "start_rows")


class _Exchange(torch.autograd.Function):
    """An all-to-all of rows whose backward pass is the opposite all-to-all. `anchor` only ties the graph together."""

    @staticmethod
    def forward(rows, anchor, transport, send_counts, recv_counts, order, finish):
        return finish()

    without_graph = forward

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, transport, send_counts, recv_counts, ctx.order, _ = inputs
        ctx.exchange = (transport, recv_counts, send_counts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rows):
        transport, send_counts, recv_counts = ctx.exchange
        with spans("combine (backward)"):
            grad = _start_rows(grad_rows, transport, send_counts, recv_counts, "backward of combine")()
        if ctx.order is not None:
            grad = torch.empty_like(grad).index_copy_(0, ctx.order, grad)
        return grad, torch.zeros(()), None, None, None, None, None


def _count_by_rank(rows: np.ndarray, rows_per_rank: Sequence[int]) -> list[int]:
    """How many of `rows` (numbers of rows that are grouped by rank) belong to each rank."""
    rank_of_row = np.repeat(np.arange(len(rows_per_rank)), rows_per_rank)
    return np.bincount(rank_of_row[rows], minlength=len(rows_per_rank)).tolist()


_DTYPE_CODES = ("torch.float32", "torch.bfloat16", "torch.float16", "torch.float64")


def check_ranks_agree(transport: Transport, fields: dict[str, int]) -> None:
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

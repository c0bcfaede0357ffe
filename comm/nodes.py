"""Dispatch in two hops: a token crosses to each node once, and fans out to that node's ranks there.

Two dispatchers, one after the other. The first knows each node by one of its ranks, the gateway, which is another one
for each rank of the sending node; the second knows the ranks of its own node. Results are summed at the gateway, so one
row per (token, node) goes home: the order of sums is by rank inside a node, then by node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from .dispatch import WORKING, Dispatcher, DispatchHandle
from .quirks import dtype_name
from .transport import Transport, once


class NodeDispatcher:
    """A Dispatcher for worlds of several nodes. rank_node [R]: the node of each rank; a node's ranks are neighbours.

    The other arguments, and what it does for its callers, are Dispatcher's. Between nodes rows travel in the formats
    agreed, inside a node as they are.
    """

    def __init__(
        self,
        transport: Transport,
        slot_rank: np.ndarray,
        *,
        rank_node: Sequence[int],
        formats: Sequence[Sequence[str]] | None = None,
        **shape: Any,
    ) -> None:
        self.transport, self.rank_node = transport, np.asarray(rank_node)
        gateway = gateways(rank_node, transport.rank)
        self._outer = Dispatcher(
            transport, gateway[self.rank_node[slot_rank]].astype(np.int32), formats=formats, **shape
        )
        self._inner = Dispatcher(transport, slot_rank, **shape)
        mine = self.rank_node[transport.rank]
        self._first_slot = int(np.searchsorted(self.rank_node[slot_rank], mine))
        self._same_node = self.rank_node == mine
        self.hidden_size, self.top_k = self._outer.hidden_size, self._outer.top_k
        self.dtype, self.device, self.formats = self._outer.dtype, self._outer.device, self._between(self._outer)
        self.rows_between_nodes = 0  # rows that this rank dispatched to other nodes
        self.no_rows, self.check = self._outer.no_rows, self._outer.check

    def describe(self) -> str:
        return "a token crosses to each node once, and fans out inside it"

    def dispatch(self, *arguments: Any, **options: Any) -> tuple[torch.Tensor, DispatchHandle]:
        """See Dispatcher.dispatch."""
        return self.start_dispatch(*arguments, **options)()

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
        """See Dispatcher.start_dispatch. The hop between nodes is under way when this returns."""
        known = (handle.outer, handle) if handle is not None else (None, None)
        arrive = self._outer.start_dispatch(x_TH, slots_TK, weights_TK, tag=2 * tag, state=state, handle=known[0])

        def wait() -> tuple[torch.Tensor, DispatchHandle]:
            rows, outer = arrive()
            sent = np.asarray(outer.route.send_counts)
            self.rows_between_nodes += int(sent[~self._same_node].sum())
            here = outer.topk_slots.cpu().to(torch.int64)
            slots = torch.where(here >= 0, here + self._first_slot, here)
            rows, inner = self._inner.dispatch(
                rows, slots, outer.topk_weights, expand=expand, tag=2 * tag + 1, state=state, handle=known[1]
            )
            inner.outer = outer
            return rows, inner

        return once(wait, "dispatch")

    def combine(self, rows: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """See Dispatcher.combine; with expand=True too, results are summed at the gateway."""
        return self.start_combine(rows, handle)()

    def start_combine(self, rows: torch.Tensor, handle: DispatchHandle) -> Callable[[], torch.Tensor]:
        """See Dispatcher.start_combine. The hop to the gateways is done when this returns, the way home under way."""
        return self._outer.start_combine(self._inner.combine(rows, handle), handle.outer)

    def _between(self, outer: Dispatcher) -> list[list[str]]:
        """The formats in use: those agreed between ranks of two nodes, and the rows' own inside a node."""
        own, nodes = dtype_name(outer.dtype), self.rank_node
        return [
            [wire if nodes[rank] != nodes[peer] else own for peer, wire in enumerate(row)]
            for rank, row in enumerate(outer.formats)
        ]


def gateways(rank_node: Sequence[int], rank: int) -> np.ndarray:
    """[nodes] int64: the rank by which `rank` reaches each node. Its own node's is itself.

    The i-th rank of a node goes through the i-th of another (modulo its size), so all ranks share the work.
    """
    nodes = np.asarray(rank_node)
    index = int((nodes[:rank] == nodes[rank]).sum())
    members = [np.flatnonzero(nodes == node) for node in range(int(nodes.max()) + 1)]
    return np.array([ranks[index % len(ranks)] for ranks in members])

"""Dispatch by expert ids: replica choice in front of a dispatcher, for models' layers and for callers' own experts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch

from .comm.dispatch import Dispatcher, DispatchHandle
from .comm.nodes import NodeDispatcher
from .comm.transport import Transport
from .core.errors import ConfigError
from .core.placement import Placement
from .experts.placement import Plan
from .experts.routing import ReplicaChooser, lost_selections, refuse_lost


def make_chooser(
    choice: str,
    placement: Placement,
    layer: int,
    transport: Transport,
    rank_nodes: Sequence[str],
    rank_speeds: Sequence[float],
) -> ReplicaChooser:
    """What `replica_choice` of the settings names, for one layer. rank_nodes, rank_speeds [R]: of the cluster file."""
    if choice == "static" or not placement.has_replicas():
        return ReplicaChooser(placement, layer)
    if choice == "local":
        node = [rank for rank, name in enumerate(rank_nodes) if name == rank_nodes[transport.rank]]
        return ReplicaChooser(placement, layer, near=[[transport.rank], node])
    from .experts import replicas  # compiles with numba

    cost, fixed = 1 / np.array(rank_speeds), np.zeros(len(rank_speeds))
    if isinstance(placement, Plan):
        cost, fixed = placement.ranks.cost, placement.ranks.fixed
    nodes = [list(rank_nodes).index(name) for name in rank_nodes]
    gather = functools.partial(transport.all_gather, phase="dispatch (expert counts)")
    return replicas.BalancedChooser(placement, layer, transport.rank, cost, fixed, nodes, gather)


def describe_choice(choice: str) -> str:
    """A replica choice in words."""
    if choice == "balanced":
        from .experts import replicas

        return replicas.describe()
    return {"static": "by the placement's shares", "local": "this rank's, else this node's, else by shares"}[choice]


class ExpertDispatcher:
    """Dispatch and combine in terms of expert ids: replica choice in front of a Dispatcher."""

    def __init__(
        self,
        dispatcher: Dispatcher | NodeDispatcher,
        placement: Placement,
        layer: int,
        chooser: ReplicaChooser | None = None,
    ) -> None:
        self._dispatcher, self._layer = dispatcher, layer
        self._chooser = chooser or ReplicaChooser(placement, layer)
        self.placement = placement

    def dispatch(
        self,
        x_TH: torch.Tensor,
        topk_ids_TK: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        *,
        expand: bool = True,
        handle: DispatchHandle | None = None,
    ) -> tuple[torch.Tensor, DispatchHandle]:
        """See comm.dispatch.Dispatcher.dispatch; ids are expert ids, -1 = not selected.

        `handle` of an earlier dispatch with the same ids on every rank skips the counts exchange.
        """
        return self.start_dispatch(x_TH, topk_ids_TK, topk_weights_TK, expand=expand, handle=handle)()

    def start_dispatch(
        self,
        x_TH: torch.Tensor,
        topk_ids_TK: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        *,
        expand: bool = True,
        handle: DispatchHandle | None = None,
    ) -> Callable[[], tuple[torch.Tensor, DispatchHandle]]:
        """Begin a dispatch; the function that it returns waits for the rows and gives (rows, handle), once.

        Meanwhile the caller may compute (a shared expert) or start another (a second half of the batch).
        """
        self._dispatcher.check(x_TH, topk_ids_TK, topk_weights_TK)
        slots = self._chooser.choose(topk_ids_TK)
        if self.placement.absent is not None:
            cure = "give -1 for experts that the placement says are absent"
            refuse_lost(topk_ids_TK, lost_selections(topk_ids_TK, slots), "dispatch", cure)
        try:
            return self._dispatcher.start_dispatch(
                x_TH, slots, topk_weights_TK, expand=expand, tag=self._layer, handle=handle
            )
        except ConfigError:
            self._chooser.check(topk_ids_TK)  # say it in terms of experts
            raise

    def combine(self, expert_out: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """See comm.dispatch.Dispatcher.combine."""
        return self._dispatcher.combine(expert_out, handle)

    def start_combine(self, expert_out: torch.Tensor, handle: DispatchHandle) -> Callable[[], torch.Tensor]:
        """Begin a combine; the function that it returns waits for the results and gives y_TH, once."""
        return self._dispatcher.start_combine(expert_out, handle)

"""Load-balanced dispatch: which replica computes which token, from the counts of this batch.

Every rank tells how many of its tokens selected each expert. From that table every rank computes the same quota of
each replica (water-filling, so that the slowest rank is done as soon as this placement allows) and who fills it: a
rank's own replica first, then replicas of its node, then the others. Nothing else is said between ranks.

The loops are compiled by numba, or run as plain Python with the same results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..core.placement import Placement
from .placement import kernels
from .placement.jit import engine, jit
from .placement.planner import pour
from .routing import ReplicaChooser


@jit
def whole_quotas(tokens_S, slots, begin):
    """Tokens per slot as whole numbers [S] that keep each expert's sum: floors, then the largest remainders.

    `slots` sorted by expert, where expert e's are slots[begin[e] : begin[e + 1]]. Ties go to the lower slot.
    """
    quota_S = np.empty(len(tokens_S), np.int64)
    for e in range(len(begin) - 1):
        total = 0.0
        missing = 0
        for i in range(begin[e], begin[e + 1]):
            total += tokens_S[slots[i]]
            quota_S[slots[i]] = int(np.floor(tokens_S[slots[i]]))
            missing -= quota_S[slots[i]]
        missing += int(np.rint(total))
        for _ in range(missing):
            best, most = slots[begin[e]], -np.inf
            for i in range(begin[e], begin[e + 1]):
                remainder = tokens_S[slots[i]] - quota_S[slots[i]]
                if remainder > most:
                    best, most = slots[i], remainder
            quota_S[best] += 1
    return quota_S


@jit
def tokens_to_slots(quota_S, counts_RE, rank_S, node_R, slots, begin, rank):
    """How many of `rank`'s tokens each slot takes [S]. Every rank's take adds up to the quotas.

    An expert's tokens go to replicas of their own rank first, then of their own node, then to any; ranks in order.
    """
    num_ranks = len(counts_RE)
    take_S = np.zeros(len(quota_S), np.int64)
    for e in range(len(begin) - 1):
        mine = slots[begin[e] : begin[e + 1]]
        if len(mine) == 1:
            take_S[mine[0]] = counts_RE[rank, e]
            continue
        room = quota_S[mine]
        rest = counts_RE[:, e].copy()
        for nearness in range(3):
            for r in range(num_ranks):
                if rest[r] == 0:
                    continue
                for i in range(len(mine)):
                    owner = rank_S[mine[i]]
                    near = owner == r if nearness == 0 else nearness == 2 or node_R[owner] == node_R[r]
                    if near and room[i] > 0 and rest[r] > 0:
                        count = min(room[i], rest[r])
                        room[i] -= count
                        rest[r] -= count
                        if r == rank:
                            take_S[mine[i]] += count
    return take_S


@jit
def deal(ids_N, take_S, slots, begin):
    """The slot of each selected expert id [N], in order: a slot takes its number, then the expert's next slot does."""
    left_S, at_E = take_S.copy(), begin[:-1].copy()
    slots_N = np.empty(len(ids_N), np.int64)
    for n in range(len(ids_N)):
        e = ids_N[n]
        if e < 0:
            slots_N[n] = -1
            continue
        while left_S[slots[at_E[e]]] == 0:
            at_E[e] += 1
        left_S[slots[at_E[e]]] -= 1
        slots_N[n] = slots[at_E[e]]
    return slots_N


class BalancedChooser(ReplicaChooser):
    """A ReplicaChooser for one layer of all ranks together, which must call `choose` alike.

    cost, fixed [R]: each rank's seconds per token and per active expert, in any one unit. rank_node [R]: the node of
    each rank. gather: every rank's counts [E] int64, as [R, E], on every rank.
    """

    def __init__(
        self,
        placement: Placement,
        layer: int,
        rank: int,
        cost: Sequence[float],
        fixed: Sequence[float],
        rank_node: Sequence[int],
        gather: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        super().__init__(placement, layer)
        self._rank, self._gather = rank, gather
        self._expert_S, self._rank_S = placement.slot_expert[layer], placement.slot_rank
        self._cost, self._fixed = np.array(cost, dtype=np.float64), np.array(fixed, dtype=np.float64)
        self._node_R = np.array(rank_node, dtype=np.int64)
        self._slots, self._begin = kernels.slots_by_expert(self._expert_S, placement.num_experts)
        # Indexed by an id, -1 included: what nobody can compute is not counted.
        self._is_absent = None if placement.absent is None else np.append(placement.absent[layer], False)

    def choose(self, topk_ids_TK: torch.Tensor) -> torch.Tensor:
        """See ReplicaChooser.choose. Exchanges counts with the other ranks."""
        ids = topk_ids_TK.to("cpu", torch.int64)
        self.check(ids)
        ids_N = ids.reshape(-1).numpy()
        if self._is_absent is not None:
            ids_N = np.where(self._is_absent[ids_N], -1, ids_N)
        counts_E = np.bincount(ids_N[ids_N >= 0], minlength=len(self._begin) - 1)
        counts_RE = self._gather(torch.from_numpy(counts_E)).numpy()
        take_S = tokens_to_slots(
            self.quotas(counts_RE.sum(0)), counts_RE, self._rank_S, self._node_R, self._slots, self._begin, self._rank
        )
        return torch.from_numpy(deal(ids_N, take_S, self._slots, self._begin)).view_as(ids)

    def quotas(self, counts_E: np.ndarray) -> np.ndarray:
        """Tokens that each slot takes [S] int64, of all ranks' counts [E]."""
        tokens_S = pour(counts_E.astype(np.float64), self._expert_S, self._rank_S, self._cost, self._fixed)
        return whole_quotas(tokens_S, self._slots, self._begin)


def describe() -> str:
    """How the balanced choice is made here, in one line."""
    return f"balanced by every batch's counts, exchanged before each expert layer's dispatch ({engine})"

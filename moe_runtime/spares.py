"""Every expert on two ranks: `--on-loss replica` lives on it, and a planner that looks at speed alone gives it up."""

from __future__ import annotations

from collections import Counter

import numpy as np

from .core.placement import Placement


def with_spares(placement: Placement, load: np.ndarray | None = None) -> Placement:
    """The same slots, with no expert on one rank alone; as it is where there are fewer than two slots an expert.

    A slot that takes another expert is one of an expert with three or more, where the fewest tokens go: its share goes
    to that expert's other slots, and what comes has no share. load [L, E]: tokens; None: all experts count the same.
    """
    if placement.absent is not None or placement.num_slots < 2 * placement.num_experts or placement.num_ranks < 2:
        return placement
    expert, share = placement.slot_expert.copy(), placement.slot_share.copy()
    for layer in range(placement.num_layers):
        tokens = np.ones(placement.num_experts) if load is None else np.asarray(load, dtype=np.float64)[layer]
        _spare(expert[layer], share[layer], placement.slot_rank, tokens)
        order = np.lexsort((expert[layer], placement.slot_rank))  # a rank's experts are in increasing order
        expert[layer], share[layer] = expert[layer][order], share[layer][order]
    if np.array_equal(expert, placement.slot_expert):
        return placement
    return Placement(expert, placement.slot_rank, share, placement.num_experts, placement.num_ranks)


def _spare(expert_S: np.ndarray, share_S: np.ndarray, rank_S: np.ndarray, tokens_E: np.ndarray) -> None:
    """In place. Where an expert has one slot another one has three, and two of those are on other ranks than it."""
    copies = Counter(expert_S.tolist())
    for alone in [expert for expert, count in copies.items() if count == 1]:
        held = set(rank_S[expert_S == alone].tolist())
        free = [s for s, (e, r) in enumerate(zip(expert_S, rank_S, strict=True)) if copies[e] > 2 and r not in held]
        slot = min(free, key=lambda s: (tokens_E[expert_S[s]] * share_S[s], s))
        gives = expert_S[slot]
        expert_S[slot] = alone
        others = expert_S == gives
        left = share_S[others].sum()
        share_S[others] += share_S[slot] * (share_S[others] / left if left > 0 else 1 / others.sum())
        share_S[slot] = 0.0
        copies[alone] += 1
        copies[gives] -= 1

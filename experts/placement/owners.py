"""Choosing where experts live. So far: shares of the experts in proportion to each rank's speed, without replicas."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...core.errors import ConfigError
from ...core.placement import Placement

__all__ = ["Placement", "apportion", "from_owners", "proportional"]


def apportion(num_experts: int, rank_speeds: Sequence[float]) -> list[int]:
    """How many experts each rank gets, in proportion to its speed; at least one each.

    Largest-remainder method (Hamilton's): floors first, the rest to the largest fractional parts, ties to the lower
    rank. Raises ConfigError for more ranks than experts, or speeds that are not positive.
    """
    num_ranks = len(rank_speeds)
    if num_ranks > num_experts:
        raise ConfigError(
            f"{num_ranks} ranks for {num_experts} experts: at least one rank would hold no expert; "
            f"start at most {num_experts} ranks"
        )
    speeds = np.asarray(rank_speeds, dtype=np.float64)
    if not (np.isfinite(speeds).all() and (speeds > 0).all()):
        raise ConfigError(f"rank speeds must be positive numbers, got {list(rank_speeds)}")
    speeds = speeds / speeds.max()  # only ratios matter; sums of the largest floats would overflow
    # One expert each, then the rest by quota.
    quota = np.maximum(num_experts * speeds / speeds.sum() - 1, 0)
    rest = num_experts - num_ranks
    quota = quota * (rest / quota.sum()) if quota.sum() > 0 else quota
    counts = np.floor(quota + 1e-9).astype(int)
    by_remainder = np.argsort(-(quota - counts), kind="stable")
    counts[by_remainder[: rest - counts.sum()]] += 1
    return (counts + 1).tolist()


def proportional(num_layers: int, num_experts: int, rank_speeds: Sequence[float]) -> Placement:
    """Contiguous runs of experts, sized by `apportion`; the same in every layer, one slot per expert."""
    counts = apportion(num_experts, rank_speeds)
    owners = [[e] for e in np.repeat(np.arange(len(counts)), counts).tolist()]
    return from_owners([owners] * num_layers, len(counts))


def from_owners(owners: Sequence[Sequence[Sequence[int]]], num_ranks: int) -> Placement:
    """A placement from `owners[layer][expert]` = the ranks that hold it; replicas share their tokens equally.

    Every layer must put the same number of slots on each rank (slots are memory, and memory is per rank). Raises
    ConfigError otherwise.
    """
    num_experts = len(owners[0]) if owners else 0
    slot_expert, slot_share, slot_rank = [], [], None
    for layer, ranks_of in enumerate(owners):
        slots = sorted((rank, expert) for expert, ranks in enumerate(ranks_of) for rank in ranks)
        ranks = np.array([rank for rank, _ in slots], dtype=np.int32)
        if slot_rank is not None and not np.array_equal(ranks, slot_rank):
            raise ConfigError(f"placement: layer {layer} puts other numbers of slots on the ranks than layer 0")
        slot_rank = ranks
        slot_expert.append([expert for _, expert in slots])
        slot_share.append([1.0 / len(ranks_of[expert]) for _, expert in slots])
    if slot_rank is None:
        raise ConfigError("placement: the model has no MoE layers to place")
    return Placement(np.array(slot_expert, dtype=np.int32), slot_rank, np.array(slot_share), num_experts, num_ranks)

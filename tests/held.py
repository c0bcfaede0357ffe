"""Placements after losses and arrivals, made as a new view makes them: from what its members hold."""

from __future__ import annotations

from collections.abc import Sequence

from moe_runtime.core.placement import Placement
from moe_runtime.views import Held, placement_of


def keep(placement: Placement, survivors: Sequence[int]) -> Placement:
    """What is in force once these ranks of `placement` are the only ones, in the order of their new numbers."""
    return placement_of([Held.of(placement, rank, None) for rank in survivors], placement.num_experts)


def admit(placement: Placement, size: int, positions: Sequence[int] | None = None) -> Placement:
    """The same for `size` ranks, of which those at `positions` (the last ones) have come and hold nothing."""
    new = range(placement.num_ranks, size) if positions is None else positions
    old = iter(range(placement.num_ranks))
    none: list[list] = [[] for _ in range(placement.num_layers)]
    held = [Held(none, none) if at in new else Held.of(placement, next(old), None) for at in range(size)]
    return placement_of(held, placement.num_experts)

"""Lower bounds on the slowest rank's time, layer by layer, each with its reason.

A bound is a time T below which a relaxation of the problem already has no solution; so no placement reaches less,
whatever its shares. Three relaxations, the largest T counts:

volume: the ranks' speeds together must do all tokens. (Equal ranks: T is at least the mean.)
slots: an expert's replicas are on different ranks, so it needs at least as many as fit its tokens at T per rank; over
    all experts that may not exceed the slots. (Equal ranks: sum(ceil(load / T)) <= slots.) And each of these active
    slots costs its rank `seconds_per_expert`.
pairs: with two slots per rank and equal speeds, the groups of pairs.py.
"""

from __future__ import annotations

import numpy as np

from .model import Ranks

# For the pairs bound; any number above 1 that is not whole is valid.
MULTIPLIERS = np.concatenate([np.arange(1.02, 1.99, 0.02), np.arange(2.04, 3.97, 0.04)])


def lower_bounds(load: np.ndarray, ranks: Ranks, simple: bool = False) -> np.ndarray:
    """Seconds per layer [L] for a load [L, E]; `simple` leaves the pairs relaxation out."""
    from . import kernels, pairs

    cost, fixed, count = ranks.classes
    bound_L = np.array([kernels.lower_bound(load_E, cost, fixed, count, ranks.num_slots) for load_E in load])
    if ranks.two_slots and not simple:
        for layer, load_E in enumerate(load):
            low = bound_L[layer] / ranks.cost[0]
            tokens = pairs.cover_bound(load_E, ranks.count, ranks.num_slots, low, MULTIPLIERS)
            bound_L[layer] = max(bound_L[layer], tokens * ranks.cost[0] * (1 - 1e-9))
    return bound_L


def limits(load: np.ndarray, ranks: Ranks) -> dict[str, int]:
    """Which relaxation is the tightest in how many layers."""
    volume = load.sum(axis=1) / (1 / ranks.cost[ranks.slots > 0]).sum()
    simple, full = lower_bounds(load, ranks, simple=True), lower_bounds(load, ranks)
    pairs = full > simple * (1 + 1e-6)
    slots = ~pairs & (simple > volume * (1 + 1e-6))
    counts = {
        "two slots per rank (pairs)": int(pairs.sum()),
        "hot experts and too few slots (slots)": int(slots.sum()),
        "the ranks' speed (volume)": int(len(load) - pairs.sum() - slots.sum()),
    }
    return {what: number for what, number in counts.items() if number}

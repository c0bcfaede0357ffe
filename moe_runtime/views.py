"""From what the members of a new view hold to the placement in force in it: pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .core.errors import ConfigError
from .core.placement import Placement
from .lost_experts import grow
from .spares import with_spares


@dataclass(frozen=True)
class Held:
    """What a rank holds, in slot order: experts [L][S of the rank], their shares of the tokens, and how many slots more
    it has memory for (None: nobody has said what it has)."""

    experts: list[list[int]]
    shares: list[list[float]] = field(default_factory=list)
    room: int | None = None

    @staticmethod
    def of(placement: Placement, rank: int, room: int | None) -> Held:
        layers, slots = range(placement.num_layers), placement.rank_slots(rank)
        experts = [placement.rank_experts(layer, rank) for layer in layers]
        return Held(experts, [placement.slot_share[layer, slots].tolist() for layer in layers], room)

    def as_message(self) -> list[Any]:
        return [self.experts, self.shares, self.room]


def placement_of(held: Sequence[Held], num_experts: int) -> Placement:
    """The placement that ranks are in which hold this, in rank order; what nobody holds is absent.

    A new view's ranks may come from different placements: one that was being moved to has been taken up by some of them
    only, or a rank is new and holds nothing. An expert's tokens are divided as its slots' shares were, or equally.
    """
    layers = len(held[0].experts)
    slots = [len(one.experts[0]) if layers else 0 for one in held]
    expert = np.array([[e for one in held for e in one.experts[layer]] for layer in range(layers)], dtype=np.int32)
    share = np.array([[s for one in held for s in one.shares[layer]] for layer in range(layers)], dtype=np.float64)
    expert, share = expert.reshape(layers, sum(slots)), share.reshape(layers, sum(slots))
    absent = np.zeros((layers, num_experts), dtype=bool)
    for layer in range(layers):
        count = np.bincount(expert[layer], minlength=num_experts)
        total = np.bincount(expert[layer], share[layer], minlength=num_experts)
        absent[layer] = count == 0
        whole = total[expert[layer]]
        scaled = np.where(whole > 0, share[layer] / np.where(whole > 0, whole, 1), 1 / count[expert[layer]])
        share[layer] = np.where(np.abs(whole - 1) < 1e-9, share[layer], scaled)  # to the bit where nothing was lost
    rank = np.repeat(np.arange(len(held)), slots).astype(np.int32)
    return Placement(expert, rank, share, num_experts, len(held), absent=absent)


def after_loss(
    found: Placement, on_loss: str, speeds: Sequence[float], room: Sequence[int | None], load: np.ndarray, reads: bool
) -> tuple[Placement, str]:
    """The placement to go on with, and what people are told. load [L, E]: tokens so far. reads: from a checkpoint.

    Raises ConfigError where the user's choice does not let the job go on.
    """
    if found.absent is None:
        return found, ""
    lost = int(found.absent.sum())
    if on_loss == "renormalise":
        return found, (
            f"WARNING: {found.say_absent()}; tokens go on without them, the weights of their other experts "
            "renormalised: results differ from here on"
        )
    if on_loss != "reload":
        raise ConfigError(f"--on-loss {on_loss}: {found.say_absent()}; plan replicas, or give --on-loss reload")
    if not reads:
        raise ConfigError(f"--on-loss reload: {found.say_absent()}, and this model was not loaded from a checkpoint")
    known = np.where(found.absent, 0, load)
    others = known.sum(axis=1, keepdims=True) / np.maximum(1, (~found.absent).sum(axis=1, keepdims=True))
    grown = grow(found, list(speeds), list(room), np.where(found.absent, others, known))
    return grown, f"{lost} lost experts are read from the checkpoint again"


def spread(
    placement: Placement,
    speeds: Sequence[float],
    closed: Sequence[int] = (),
    num_slots: int = 0,
    spares: bool = False,
) -> Placement | None:
    """The placement to move to when a rank holds no slot yet, or is to be emptied (`closed`); None where all is well.

    num_slots: in all, where that is more than there are: replicas that were lost with a rank are made again. spares: no
    expert is to be on one rank alone (spares.py). Slots go by speed. A rank that has too many gives up replicas first;
    what stays does not move.
    """
    held = np.bincount(placement.slot_rank, minlength=placement.num_ranks)
    is_open = np.array([rank not in closed for rank in range(placement.num_ranks)])
    if placement.absent is not None or not is_open.any() or not ((held == 0) & is_open | (held > 0) & ~is_open).any():
        return None
    most = placement.num_experts  # no rank holds an expert twice
    total = min(max(placement.num_slots, num_slots), most * int(is_open.sum()))
    wanted = np.where(is_open, np.minimum(_shares_of(total, np.where(is_open, speeds, 0.0)), most), 0)
    wanted[np.flatnonzero(is_open)[0]] += max(0, placement.num_experts - int(wanted.sum()))
    left = _trim(placement, np.minimum(held, wanted))
    room = [int(wanted[rank] - min(held[rank], wanted[rank])) for rank in range(placement.num_ranks)]
    grown = grow(left, list(speeds), room)
    made = _replicate(grown, wanted - np.bincount(grown.slot_rank, minlength=grown.num_ranks))
    made = with_spares(made) if spares else made
    return None if made.digest() == placement.digest() else made  # more ranks than slots: some hold none for good


def _replicate(placement: Placement, extra: np.ndarray) -> Placement:
    """So many slots more for each rank [R]: replicas of what has fewest, tokens divided equally."""
    if not extra.any():
        return placement
    layers = range(placement.num_layers)
    held = [[set(placement.rank_experts(layer, rank)) for layer in layers] for rank in range(placement.num_ranks)]
    copies = [np.bincount(row, minlength=placement.num_experts) for row in placement.slot_expert]
    for rank, count in enumerate(extra.tolist()):
        for layer in layers:
            for _ in range(count):
                expert = min(
                    (e for e in range(placement.num_experts) if e not in held[rank][layer]),
                    key=lambda e: (copies[layer][e], e),
                )
                held[rank][layer].add(expert)
                copies[layer][expert] += 1
    experts = [[sorted(mine) for mine in of_rank] for of_rank in held]
    return placement_of([Held(mine, [[0.0] * len(row) for row in mine]) for mine in experts], placement.num_experts)


def _shares_of(total: int, weights: np.ndarray) -> np.ndarray:
    """`total` divided in proportion to weights: floors first, the rest to the largest fractions."""
    quota = total * weights / weights.sum()
    counts = np.floor(quota + 1e-9).astype(np.int64)
    counts[np.argsort(counts - quota, kind="stable")[: total - int(counts.sum())]] += 1
    return counts


def _trim(placement: Placement, keeps: np.ndarray) -> Placement:
    """Each rank keeps so many of its slots [R]; experts that also live elsewhere are given up first."""
    held = []
    copies = [np.bincount(row, minlength=placement.num_experts) for row in placement.slot_expert]
    for rank in range(placement.num_ranks):
        experts: list[list[int]] = []
        shares: list[list[float]] = []
        slots = placement.rank_slots(rank)
        for layer in range(placement.num_layers):
            mine = placement.rank_experts(layer, rank)
            share = dict(zip(mine, placement.slot_share[layer, slots].tolist(), strict=True))
            dropped = sorted(mine, key=lambda expert: (-copies[layer][expert], -expert))[: len(mine) - keeps[rank]]
            copies[layer][dropped] -= 1
            kept = [expert for expert in mine if expert not in set(dropped)]
            experts.append(kept)
            shares.append([share[expert] for expert in kept])
        held.append(Held(experts, shares))
    return placement_of(held, placement.num_experts)

"""Who takes the experts that nobody holds any more: pure functions, the same answer on every rank.

No expert changes its rank here: what a survivor holds it goes on holding (a better placement is the planner's and live
rebalancing's work, once the job runs again). numpy alone: a planner that compiles would hold the job up.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .core.errors import ConfigError
from .core.placement import Placement


def grow(
    placement: Placement,
    speeds: Sequence[float],
    room: Sequence[int | None],
    load: np.ndarray | None = None,
) -> Placement:
    """Every absent expert in a slot of its own, added to the ranks that will then be done soonest.

    speeds [R]: relative. room [R]: slots that a rank can still take (each is one expert of every layer), None where
    nothing but the number of experts limits them. load [L, E]: tokens per expert, None where none is known (all count
    the same).

    All layers have the same slots, so the layer that lacks most says how many are added; in layers that lack fewer, the
    slots left over take replicas of what keeps the slowest rank busy. Slots and shares that were there stay as they
    are, but for the shares of experts that gain a replica. Raises ConfigError where there is no room.
    """
    expert, share = placement.slot_expert, placement.slot_share
    num_layers, num_ranks = placement.num_layers, placement.num_ranks
    load = _read_load(load, (num_layers, placement.num_experts))
    speed = np.asarray(speeds, dtype=np.float64)
    if speed.shape != (num_ranks,) or not (np.isfinite(speed).all() and (speed > 0).all()) or len(room) != num_ranks:
        raise ConfigError(f"grow: give a speed above 0 and a room for each of {num_ranks} ranks")
    if placement.absent is None:
        return placement
    absent = [
        sorted(placement.absent_experts(layer), key=lambda expert: -row[expert]) for layer, row in enumerate(load)
    ]
    held = np.bincount(placement.slot_rank, minlength=num_ranks)
    limit = np.array([np.inf if slots is None else slots for slots in room])
    limit = np.minimum(limit, placement.num_experts - held).astype(np.int64)  # no rank holds an expert twice
    _check_room(limit, absent)
    tokens = np.take_along_axis(load, expert.astype(np.int64), 1) * share  # [L, S]
    work = np.stack([np.bincount(placement.slot_rank, row, num_ranks) for row in tokens])  # [L, R]

    wishes = np.zeros(num_ranks, dtype=np.int64)
    for layer, experts in enumerate(absent):
        wishes += np.bincount(_soonest(load[layer, experts], work[layer], speed, limit), minlength=num_ranks)
    extra = _divide(max(len(experts) for experts in absent), wishes, limit)
    layers = [
        _grow_layer(placement, layer, absent[layer], load[layer], work[layer], speed, extra)
        for layer in range(num_layers)
    ]
    experts, shares = (np.stack(column) for column in zip(*layers, strict=True))
    slot_rank = np.repeat(np.arange(num_ranks, dtype=np.int32), held + extra)
    return Placement(experts.astype(np.int32), slot_rank, shares, placement.num_experts, num_ranks)


def _read_load(load: np.ndarray | None, shape: tuple[int, int]) -> np.ndarray:
    """[L, E] above 0: an expert that no token has selected so far counts a hundredth of the mean, for tomorrow's."""
    if load is None:
        return np.ones(shape)
    found = np.asarray(load, dtype=np.float64)
    if found.shape != shape or not (np.isfinite(found).all() and (found >= 0).all()):
        raise ConfigError(
            f"grow: a load of shape {list(found.shape)}; give counts of at least 0, [L, E] = {list(shape)}"
        )
    mean = found.mean(axis=1, keepdims=True)
    return np.where(mean > 0, np.maximum(found, mean / 100), 1.0)


def _check_room(limit: np.ndarray, absent: Sequence[Sequence[int]]) -> None:
    needed, layer = max((len(experts), -layer) for layer, experts in enumerate(absent))
    lacking = needed - int(limit.sum())
    if lacking > 0:
        raise ConfigError(
            f"no rank holds {needed} experts of layer {-layer}, and the ranks that are left have room for "
            f"{int(limit.sum())} in each layer: {lacking} slots lack; give them more memory, or choose to "
            "renormalise the weights of the others"
        )


def _soonest(load: np.ndarray, work_R: np.ndarray, speed: np.ndarray, limit: np.ndarray) -> list[int]:
    """The rank of each of some experts, the largest first: the one that is then done soonest, up to `limit` for each.

    So no rank is done later than (all work + (R - 1) x the largest expert) / all speed, or than it was, while `limit`
    does not bind: when an expert was given away, no rank could have been done with it sooner.
    """
    work, left, chosen = work_R.copy(), limit.copy(), []
    for tokens in load:
        done = np.where(left > 0, (work + tokens) / speed, np.inf)
        rank = int(np.argmin(done))
        work[rank] += tokens
        left[rank] -= 1
        chosen.append(rank)
    return chosen


def _divide(count: int, wishes_R: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """`count` slots over the ranks in proportion to wishes, `limit` at the most; ties to the lower rank."""
    given = np.zeros(len(wishes_R), dtype=np.int64)
    quota = wishes_R * count / max(int(wishes_R.sum()), 1)
    given = np.minimum(np.floor(quota + 1e-9).astype(np.int64), limit)
    while given.sum() < count:
        given[int(np.argmax(np.where(given < limit, quota - given, -np.inf)))] += 1
    return given


def _grow_layer(
    placement: Placement,
    layer: int,
    absent: Sequence[int],
    load: np.ndarray,
    work: np.ndarray,
    speed: np.ndarray,
    extra: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """(slot_expert [S], slot_share [S]) of one layer with extra [R] slots more."""
    shares: list[dict[int, float]] = []  # of each rank, by expert
    for rank in range(placement.num_ranks):
        mine = placement.slot_share[layer, placement.rank_slots(rank)].tolist()
        shares.append(dict(zip(placement.rank_experts(layer, rank), mine, strict=True)))
    work, left = work.copy(), extra.copy()
    for expert, rank in zip(absent, _soonest(load[list(absent)], work, speed, left), strict=True):
        shares[rank][expert] = 1.0
        work[rank] += load[expert]
        left[rank] -= 1
    while left.any():
        _add_replica(shares, load, work, speed, left)
    table = [(expert, share) for mine in shares for expert, share in sorted(mine.items())]
    return np.array([expert for expert, _ in table]), np.array([share for _, share in table])


def _add_replica(
    shares: list[dict[int, float]], load: np.ndarray, work: np.ndarray, speed: np.ndarray, left: np.ndarray
) -> None:
    """One slot of the rank that is done soonest takes a replica of what keeps the slowest rank most busy. In place."""
    rank = int(np.argmin(np.where(left > 0, work / speed, np.inf)))
    slowest = int(np.argmax(work / speed))
    here = {e: load[e] * share for e, share in shares[slowest].items() if e not in shares[rank]}
    if not here:  # it holds all of them already: what has most tokens for each replica
        copies = {e: sum(e in mine for mine in shares) for e in range(len(load)) if e not in shares[rank]}
        here = {e: load[e] / count for e, count in copies.items()}
    expert = max(here, key=lambda e: (here[e], -e))
    shares[rank][expert] = 0.0
    left[rank] -= 1
    holders = [r for r, mine in enumerate(shares) if expert in mine]
    before = load[expert] * np.array([shares[r][expert] for r in holders])
    parts = _pour(load[expert], (work[holders] - before) / speed[holders], speed[holders])
    work[holders] += load[expert] * parts - before
    for r, part in zip(holders, parts.tolist(), strict=True):
        shares[r][expert] = part


def _pour(tokens: float, ground: np.ndarray, speed: np.ndarray) -> np.ndarray:
    """Shares of an expert's tokens, poured over its replicas like water: `ground` is when each is done without them."""
    order = np.argsort(ground, kind="stable")
    level = (tokens + np.cumsum((ground * speed)[order])) / np.cumsum(speed[order])  # with so many of them flooded
    height = level[level > ground[order]][-1]
    poured = np.maximum(height - ground, 0) * speed
    return poured / poured.sum()

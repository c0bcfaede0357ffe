"""What the planner knows of a cluster: for each rank its seconds per token and per active expert, slots and node."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ...core.cluster import Cluster
from ...core.errors import ConfigError


@dataclass(frozen=True)
class Rank:
    """One rank, as the planner sees it. Its time for a layer, with n active experts and t tokens for them, is

        t * (seconds_per_token / speed + seconds_on_links) + n * seconds_per_expert

    `seconds_per_token`: of a device of speed 1 (measured, or any unit: then all times are in that unit).
    `seconds_on_links`: to bring a token's row here and its result home. `seconds_per_expert`: to read an active
    expert's weights. `slots`: per layer; or `memory_bytes`: for expert weights in all layers; or neither.
    """

    seconds_per_token: float = 1.0
    speed: float = 1.0
    slots: int | None = None
    memory_bytes: float | None = None
    node: int | str = 0
    seconds_per_expert: float = 0.0
    seconds_on_links: float = 0.0

    def __post_init__(self) -> None:
        for name in ("seconds_per_token", "speed"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ConfigError(f"rank: {name} = {getattr(self, name)!r} must be a number above 0")
        for name in ("seconds_per_expert", "seconds_on_links"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ConfigError(f"rank: {name} = {getattr(self, name)!r} must be a number of at least 0")
        for name in ("slots", "memory_bytes"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ConfigError(f"rank: {name} = {value!r} must be at least 0, or None where there is no limit")


@dataclass(frozen=True)
class Ranks:
    """The same for all ranks, as arrays [R]; `first` [R + 1] is where each rank's slots begin."""

    cost: np.ndarray
    fixed: np.ndarray
    slots: np.ndarray
    node: np.ndarray

    @property
    def count(self) -> int:
        return len(self.cost)

    @property
    def num_slots(self) -> int:
        return int(self.slots.sum())

    @cached_property
    def first(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.slots)]).astype(np.int64)

    @cached_property
    def slot_rank(self) -> np.ndarray:
        return np.repeat(np.arange(self.count, dtype=np.int32), self.slots)

    @cached_property
    def classes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(cost, fixed, how many) of each kind of rank that has slots: bounds need to look at each kind once."""
        kinds, count = np.unique(np.stack([self.cost, self.fixed], axis=1)[self.slots > 0], axis=0, return_counts=True)
        return kinds[:, 0].copy(), kinds[:, 1].copy(), count.astype(np.int64)

    @property
    def equal(self) -> bool:
        return bool(np.ptp(self.cost) == 0 and np.ptp(self.fixed) == 0)

    @property
    def two_slots(self) -> bool:
        """Ranks of one speed with two slots each, for which pairs.py knows more."""
        return self.equal and bool((self.slots == 2).all()) and self.fixed[0] == 0


def ranks_of_cluster(
    cluster: Cluster, seconds_per_token: float = 1.0, bytes_per_token: float = 0.0, seconds_per_expert: float = 0.0
) -> list[Rank]:
    """The ranks of a cluster file. `seconds_per_token`: measured on a device of speed 1.

    `bytes_per_token`: a row out and its result home. Tokens begin on every rank alike, so the part of a rank's
    tokens that comes from node m is m's part of the ranks; the ranks of a node share its links. Latency is left out:
    it is the same for every placement. Links that the file does not list cost nothing.
    """
    link = {frozenset(link.between): link.gbit_s * 1e9 / 8 for link in cluster.links}
    ranks = []
    for node, speed in zip(cluster.rank_nodes(), cluster.rank_speeds(), strict=True):
        on_links = 0.0
        for other in cluster.nodes:
            rate = link.get(frozenset((node.name, other.name)))
            if other is not node and rate and bytes_per_token:
                on_links += bytes_per_token * node.devices / rate * other.devices / cluster.num_ranks
        memory = None if node.memory_gib is None else node.memory_gib * 2**30
        ranks.append(Rank(seconds_per_token, speed, None, memory, node.name, seconds_per_expert, on_links))
    return ranks


def rank_model(
    ranks: Cluster | Sequence[Rank] | int,
    num_slots: int | None,
    num_layers: int,
    num_experts: int,
    bytes_per_expert: float | None,
) -> Ranks:
    """Ranks as arrays, with the slots each of them gets. Raises ConfigError when the experts cannot all be placed."""
    if isinstance(ranks, Cluster):
        ranks = ranks_of_cluster(ranks)
    elif isinstance(ranks, int):
        ranks = [Rank()] * ranks
    if bytes_per_expert is not None and not bytes_per_expert > 0:
        raise ConfigError(f"plan: bytes_per_expert = {bytes_per_expert!r} must be above 0")
    if not ranks:
        raise ConfigError("plan: no ranks; give a number of ranks, a list of Rank, or a Cluster")
    cost = np.array([rank.seconds_per_token / rank.speed + rank.seconds_on_links for rank in ranks])
    most = np.array([_most_slots(rank, num_layers, num_experts, bytes_per_expert) for rank in ranks])
    if num_slots is None:
        limited = all(rank.slots is not None or (rank.memory_bytes and bytes_per_expert) for rank in ranks)
        wanted = int(most.sum()) if limited else max(num_experts, len(ranks))
    else:
        wanted = int(num_slots)
    if wanted < num_experts:
        raise ConfigError(
            f"plan: {wanted} slots for {num_experts} experts; every expert needs one: give more slots or memory"
        )
    if wanted > most.sum():
        raise ConfigError(
            f"plan: {wanted} slots, but the ranks hold at most {most.sum()} (no expert twice on a rank); ask for fewer"
        )
    names: dict[int | str, int] = {}
    node = np.array([names.setdefault(rank.node, len(names)) for rank in ranks], dtype=np.int64)
    fixed = np.array([rank.seconds_per_expert for rank in ranks])
    return Ranks(cost, fixed, _slots_by_speed(wanted, most, 1 / cost), node)


def _most_slots(rank: Rank, num_layers: int, num_experts: int, bytes_per_expert: float | None) -> int:
    most = num_experts if rank.slots is None else min(rank.slots, num_experts)
    if rank.memory_bytes is not None and bytes_per_expert:
        most = min(most, int(rank.memory_bytes // (bytes_per_expert * num_layers)))
    return most


def _slots_by_speed(wanted: int, most: np.ndarray, speed: np.ndarray) -> np.ndarray:
    """Slots per rank [R] in proportion to speed, one for each rank that may have any, `most` at the most.

    The next slot goes to the rank with the fewest slots for its speed (Webster's method); ties to the lower rank.
    """
    slots = np.minimum(1, most).astype(np.int64)
    if slots.sum() > wanted:
        raise ConfigError(f"plan: {wanted} slots for {int(slots.sum())} ranks; each rank needs at least one")
    # Jump close to the answer, then one by one.
    low, high = 0.0, float(wanted) / speed.min() + 1
    for _ in range(100):
        middle = 0.5 * (low + high)
        if np.maximum(slots, np.minimum(most, np.floor(middle * speed + 0.5))).sum() <= wanted:
            low = middle
        else:
            high = middle
    slots = np.maximum(slots, np.minimum(most, np.floor(low * speed + 0.5))).astype(np.int64)
    while slots.sum() < wanted:
        next_rank = int(np.argmin(np.where(slots < most, (slots + 0.5) / speed, np.inf)))
        slots[next_rank] += 1
    return slots

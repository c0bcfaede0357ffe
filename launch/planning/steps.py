"""One step of a job on each rank, predicted: seconds of its parts, what bounds it, and bytes of its buffers.

Pure: from sizes, a placement and rates. Terms add up, as in `moe-launch plan`: nothing overlaps. Left out are
attention's products of queries with keys and values, activations of the dense part, and all that is not bytes or
multiply-adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...core.cluster import Cluster, Link, Node
from ...core.placement import Placement
from .rates import OUT_BYTES, Device, expert_seconds
from .shape import ModelShape

PROMPT_TOKENS = 1024  # of a prefill, per rank
# Of training beside a forward pass. The backward pass multiplies twice (by rows and by weights), reads the weights and
# writes their gradients, and sends rows' gradients the same two ways.
PRODUCTS, WEIGHT_PASSES, EXCHANGES = 3, 3, 2
# Bytes of a trained weight beside itself: its gradient, and AdamW's two moments, with half precision a master as well.
GRADIENT_BYTES, MOMENT_BYTES, MASTER_BYTES = 4, 8, 4


@dataclass(frozen=True)
class Work:
    """One step. tokens: of each rank; logits: of them, those whose logits are needed (per rank).

    cached: tokens of a rank's sequences that a decode step finds in the KV cache. compressed: rows travel to experts
    as FP8 or INT8 (wire_format), else in the model's dtype. parts: of a training step, one after the other.
    """

    name: str
    tokens: float
    logits: float
    cached: float = 0.0
    trains: bool = False
    compressed: bool = False
    parts: int = 1


@dataclass(frozen=True)
class Term:
    """Seconds of one part ("dense", "attention", "experts", "exchange", "optimizer") for one cause, in words."""

    part: str
    cause: str
    seconds: float


@dataclass(frozen=True)
class Step:
    """One rank's step. unknown: pairs of nodes between which nothing is known of the exchange."""

    terms: tuple[Term, ...]
    unknown: tuple[tuple[str, str], ...] = ()

    @property
    def seconds(self) -> float:
        return sum(term.seconds for term in self.terms)

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of each part."""
        found: dict[str, float] = {}
        for term in self.terms:
            found[term.part] = found.get(term.part, 0.0) + term.seconds
        return found

    @property
    def bound(self) -> Term:
        """The largest cause of the largest part."""
        parts = self.parts
        part = max(parts, key=lambda name: parts[name])
        return max((term for term in self.terms if term.part == part), key=lambda term: term.seconds)


def predict(
    shape: ModelShape, cluster: Cluster, placed: Placement, devices: Sequence[Device | None], work: Work
) -> list[Step | None]:
    """Each rank's step [R], all experts alike; None for a rank whose device's rates are not known."""
    rows, active = expert_work(shape, placed, work)
    exchange = Exchange(shape, cluster, placed, work)
    steps: list[Step | None] = []
    for rank, (node, device) in enumerate(zip(cluster.rank_nodes(), devices, strict=True)):
        if device is None:
            steps.append(None)
            continue
        terms = [*_dense(shape, device, work), *_attention(shape, device, work)]
        terms += _experts(shape, device, node, work, rows[rank], active[rank])
        terms += exchange.terms(rank, device)
        if work.trains:
            held = shape.dense_bytes + held_bytes(shape, placed)[rank]
            moved = held / shape.dense_bytes_per_weight * _optimizer_traffic(shape)
            terms.append(Term("optimizer", "reading and writing its state", moved / device.read_bytes))
        steps.append(Step(tuple(terms), exchange.unknown(rank)))
    return steps


def expert_work(shape: ModelShape, placed: Placement, work: Work) -> tuple[np.ndarray, np.ndarray]:
    """(rows, active slots) of each rank in all layers [R], as if tokens chose experts independently and all alike."""
    chosen = shape.top_k / shape.num_experts * placed.slot_share.astype(np.float64)  # of one token [L, S]
    tokens = work.tokens * placed.num_ranks
    rows_S, active_S = (tokens * chosen).sum(axis=0), (1 - (1 - chosen) ** tokens).sum(axis=0)
    return tuple(np.bincount(placed.slot_rank, per_slot, placed.num_ranks) for per_slot in (rows_S, active_S))


def held_bytes(shape: ModelShape, placed: Placement) -> np.ndarray:
    """Of each rank's experts in all layers [R]."""
    return np.bincount(placed.slot_rank, minlength=placed.num_ranks) * shape.expert_bytes * shape.num_layers


def state_bytes(shape: ModelShape) -> int:
    """Of the optimizer, per weight."""
    return MOMENT_BYTES + (MASTER_BYTES if shape.dense_bytes_per_weight < 4 else 0)


def _optimizer_traffic(shape: ModelShape) -> float:
    """Bytes per weight: the gradient is read, moments and master (or weight) are read and written, halves written."""
    wide = shape.dense_bytes_per_weight >= 4
    return GRADIENT_BYTES + 2 * (MOMENT_BYTES + 4) + (0 if wide else shape.dense_bytes_per_weight)


def _dense(shape: ModelShape, device: Device, work: Work) -> list[Term]:
    read = (shape.dense_weights - shape.embedding_weights) * shape.dense_bytes_per_weight
    products = work.tokens * (shape.dense_weights - shape.embedding_weights - shape.head_weights)
    products += work.logits * shape.head_weights
    passes, times = (WEIGHT_PASSES * work.parts, PRODUCTS) if work.trains else (1, 1)
    return [
        Term("dense", "reading weights", passes * read / device.read_bytes),
        Term("dense", "matmul", times * 2 * products / device.flops),
    ]


def _attention(shape: ModelShape, device: Device, work: Work) -> list[Term]:
    """What transformers does to the whole cache in every decode step of MLA; the projections are the dense part's."""
    products = work.cached * shape.expand_weights
    return [Term("attention", "expanding the KV cache", 2 * products / device.flops)] if products else []


def _experts(shape: ModelShape, device: Device, node: Node, work: Work, rows: float, active: float) -> list[Term]:
    per_row, per_expert = expert_seconds(shape, device.flops, device.read_bytes)
    per_expert *= shape.expert_bytes_on(node) / shape.expert_bytes
    slowed = 1 / (node.emulate_speed or 1.0)  # emulation slows experts and nothing else
    passes, times = (WEIGHT_PASSES * work.parts, PRODUCTS) if work.trains else (1, 1)
    return [
        Term("experts", "reading weights", slowed * passes * active * per_expert),
        Term("experts", "matmul", slowed * times * rows * per_row),
    ]


class Exchange:
    """Rows between ranks in one step, and the dense part's gradients where it trains.

    A token goes once to each rank of its own host, and once to each other node, that has any of its experts. Ranks of
    one host copy memory; a node's ranks share its links; between hosts without a link nothing is known.
    """

    def __init__(self, shape: ModelShape, cluster: Cluster, placed: Placement, work: Work) -> None:
        self.nodes, self._work, self._top_k = cluster.rank_nodes(), work, shape.top_k
        self.layers, self._dense_bytes = shape.num_layers, shape.dense_bytes
        self.out, self.home = row_bytes(shape, work)
        self.times = EXCHANGES if work.trains else 1
        self.links = {frozenset(link.between): link for link in cluster.links}
        share_S = placed.slot_share.astype(np.float64) / shape.num_experts  # of a layer's rows [L, S]
        count = placed.num_ranks
        self.part_LR = np.stack([np.bincount(placed.slot_rank, share, count) for share in share_S])
        self.visits_R = self._visits(self.part_LR).sum(axis=0)  # of a token, in all layers
        names = [node.name for node in self.nodes]
        self.visits_of_node = {
            name: float(self._visits(self.part_LR[:, [n == name for n in names]].sum(axis=1)).sum())
            for name in dict.fromkeys(names)
        }

    def _visits(self, part: np.ndarray) -> np.ndarray:
        """The probability that one of a token's experts lies in this part of the rows."""
        return 1 - (1 - np.minimum(part, 1.0)) ** self._top_k

    def _near(self, rank: int) -> list[int]:
        """Other ranks that copies of memory reach."""
        mine = self.nodes[rank]
        return [
            other
            for other, node in enumerate(self.nodes)
            if other != rank and (node is mine or (node.host == mine.host and not self._link(mine, node)))
        ]

    def _link(self, one: Node, other: Node) -> Link | None:
        return self.links.get(frozenset((one.name, other.name)))

    def _others(self, rank: int) -> list[Node]:
        return [node for node in dict.fromkeys(self.nodes) if node is not self.nodes[rank]]

    def unknown(self, rank: int) -> tuple[tuple[str, str], ...]:
        mine = self.nodes[rank]
        others = [node for node in self._others(rank) if node.host != mine.host and not self._link(mine, node)]
        return tuple((mine.name, node.name) for node in others)

    def terms(self, rank: int, device: Device) -> list[Term]:
        mine = self.nodes[rank]
        found = [Term("exchange", "copying memory", self._copied(rank) / device.copied_bytes)]
        for other in self._others(rank):
            if link := self._link(mine, other):
                cause = f"link {'-'.join(link.between)} at {link.gbit_s:g} Gbit/s"
                found.append(Term("exchange", cause, self._on_link(mine, other, link)))
        return found

    def _copied(self, rank: int) -> float:
        """Bytes that this rank copies: rows it sends and receives, both ways."""
        near = self._near(rank)
        rows = self._work.tokens * (self.visits_R[near].sum() + len(near) * self.visits_R[rank])
        total = self.times * rows * (self.out + self.home)
        if self._work.trains:  # reduced in parts, and gathered again; each part is sent and received
            total += 2 * 2 * self._dense_bytes * len(near) / (len(near) + 1)
        return float(total)

    def _on_link(self, mine: Node, other: Node, link: Link) -> float:
        """Seconds of the busier direction, and the latency of going out and coming home in each layer."""
        there = self._work.tokens * mine.devices * self.visits_of_node[other.name]
        here = self._work.tokens * other.devices * self.visits_of_node[mine.name]
        busier = max(there * self.out + here * self.home, here * self.out + there * self.home)
        total = self.times * busier
        if self._work.trains:
            total += 2 * self._dense_bytes / len(dict.fromkeys(self.nodes))
        return total / (link.gbit_s * 1e9 / 8) + 2 * self.times * self.layers * link.latency_us * 1e-6


def row_bytes(shape: ModelShape, work: Work) -> tuple[float, float]:
    """(bytes of a row on its way out, of its result on its way home)."""
    held = shape.hidden * shape.dense_bytes_per_weight
    return (shape.hidden * OUT_BYTES if work.compressed else held), held


def buffers(
    shape: ModelShape, cluster: Cluster, placed: Placement, work: Work, cache_bytes: float | None = 0.0
) -> list[dict[str, float | None]]:
    """Each rank's bytes beside its weights [R], by what they are for; None where it is not known.

    Dispatch rows: those a rank receives and those it sends, out and home; of one layer, or where it trains of all
    layers of one part, which the backward pass needs. cache_bytes: of a rank's KV cache (None: not known).
    """
    exchange = Exchange(shape, cluster, placed, work)
    received = work.tokens * placed.num_ranks * exchange.visits_R
    rows = received + work.tokens * exchange.visits_R.sum()
    rows = rows / (work.parts if work.trains else shape.num_layers)
    found: list[dict[str, float | None]] = []
    for rank, held in enumerate(held_bytes(shape, placed) + shape.dense_bytes):
        named: dict[str, float | None] = {"dispatch rows": float(rows[rank] * (exchange.out + exchange.home))}
        if work.trains:
            weights = held / shape.dense_bytes_per_weight
            named |= {"gradients": float(weights * GRADIENT_BYTES), "AdamW state": float(weights * state_bytes(shape))}
        elif cache_bytes is None or cache_bytes:
            named["KV cache"] = cache_bytes
        found.append(named)
    return found

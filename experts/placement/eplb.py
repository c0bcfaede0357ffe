"""EPLB's interface as a drop-in, and a greedy like EPLB's to compare with; both written from its description.

The description (its README and the issues about it): replicate the expert with the most tokens per replica, again and
again; then pack replicas, largest first, into GPUs with the same number of slots each, lightest GPU first. With
groups, whole groups of experts are packed into nodes first, and all else happens inside a node.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

import numpy as np

from ...core.errors import ConfigError

if TYPE_CHECKING:
    import torch


def rebalance_experts(
    weight: torch.Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """EPLB's function with our planner inside: weight [L, E], tokens per expert, to three int64 tensors on the CPU:

    phy2log [L, num_replicas], the expert of each slot, slots of GPU 0 first; log2phy [L, E, X], an expert's slots, -1
    where it has fewer than X; logcnt [L, E], its number of replicas. Replicas share equally.

    Nothing has to divide anything: GPUs may hold unequal numbers of slots (the first ones more). No GPU gets an
    expert twice. Groups guide, they do not bind: with `num_nodes` > 1 and more than one group, a group's experts stay
    on one node except for those that must leave to keep the nodes' loads within 1 %.
    """
    import torch

    from .model import Rank
    from .planner import plan

    if num_gpus < 1 or num_nodes < 1 or num_groups < 1:
        raise ConfigError("rebalance_experts: num_groups, num_nodes and num_gpus must be at least 1")
    if num_replicas < num_gpus:
        raise ConfigError(f"rebalance_experts: {num_replicas} replicas for {num_gpus} GPUs; each needs at least one")
    slots = [num_replicas // num_gpus + (gpu < num_replicas % num_gpus) for gpu in range(num_gpus)]
    ranks = [Rank(slots=slots[gpu], node=gpu * num_nodes // num_gpus) for gpu in range(num_gpus)]
    load = weight.detach().double().cpu().numpy()
    if num_nodes > 1 and num_groups > 1:
        group_E = np.arange(load.shape[1]) * num_groups // load.shape[1]
        made = plan(load, ranks, num_replicas, policy="nodes", shares="equal", groups=group_E)
    else:
        made = plan(load, ranks, num_replicas, shares="equal")
    log2phy, logcnt = invert(made.slot_expert, made.num_experts)
    return (
        torch.from_numpy(made.slot_expert.astype(np.int64)),
        torch.from_numpy(log2phy),
        torch.from_numpy(logcnt),
    )


def invert(slot_expert: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """(slots of each expert [L, E, X] with -1 where it has fewer, their number [L, E]) of slot_expert [L, S]."""
    num_layers, num_slots = slot_expert.shape
    at = (slot_expert + num_experts * np.arange(num_layers)[:, None]).ravel()
    count = np.bincount(at, minlength=num_layers * num_experts)
    order = np.argsort(at, kind="stable")
    place = np.arange(len(at)) - np.repeat(np.cumsum(count) - count, count)
    slots = np.full((num_layers * num_experts, count.max()), -1, np.int64)
    slots[at[order], place] = order % num_slots
    return slots.reshape(num_layers, num_experts, -1), count.reshape(num_layers, num_experts)


def greedy_tables(load: np.ndarray, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> np.ndarray:
    """The greedy described above: the expert of each slot [L, num_replicas]. It may place an expert on a GPU twice.

    Everything must divide, as there. Global when the groups do not divide over the nodes.
    """
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    num_experts = load.shape[1]
    if num_experts % num_groups or num_gpus % num_nodes or num_replicas % num_gpus:
        raise ConfigError("greedy_tables: experts, groups, nodes, GPUs and replicas must divide; use plan()")
    group_size, per_node = num_experts // num_groups, num_replicas // num_nodes
    table = np.empty((len(load), num_replicas), np.int64)
    for layer, load_E in enumerate(load):
        groups_of = _pack(load_E.reshape(num_groups, group_size).sum(axis=1), num_nodes)
        for node, groups in enumerate(groups_of):
            experts = np.concatenate([np.arange(group * group_size, (group + 1) * group_size) for group in groups])
            copies = _copies(load_E[experts], per_node)
            replicas = np.repeat(np.arange(len(experts)), copies)
            gpus = _pack((load_E[experts] / copies)[replicas], num_gpus // num_nodes)
            table[layer, node * per_node : (node + 1) * per_node] = experts[replicas[np.concatenate(gpus)]]
    return table


def table_balancedness(table: np.ndarray, load: np.ndarray, num_gpus: int) -> float:
    """sum(mean) / sum(max) of the tokens per GPU over layers, replicas sharing equally (EPLB's measure)."""
    copies = invert(table, load.shape[1])[1]
    tokens = np.take_along_axis(load / copies, table, axis=1).reshape(len(load), num_gpus, -1).sum(axis=2)
    return float(tokens.mean(axis=1).sum() / tokens.max(axis=1).sum())


def _copies(load: np.ndarray, num_replicas: int) -> np.ndarray:
    copies = np.ones(len(load), np.int64)
    heap = [(-tokens, expert) for expert, tokens in enumerate(load.tolist())]
    heapq.heapify(heap)
    for _ in range(num_replicas - len(load)):
        expert = heap[0][1]
        copies[expert] += 1
        heapq.heapreplace(heap, (-load[expert] / copies[expert], expert))
    return copies


def _pack(weights: np.ndarray, bins: int) -> list[list[int]]:
    """Items into bins of the same number of items, the heaviest first into the lightest bin that has room."""
    packed: list[list[int]] = [[] for _ in range(bins)]
    heap = [(0.0, number) for number in range(bins)]
    for item in np.argsort(-weights, kind="stable").tolist():
        weight, number = heapq.heappop(heap)
        packed[number].append(item)
        if len(packed[number]) < len(weights) // bins:
            heapq.heappush(heap, (weight + float(weights[item]), number))
    return packed

"""The policies of plan(): each a function from a Problem to (slot_expert [L, S], slot_tokens [L, S], a note)."""

from __future__ import annotations

import numpy as np

from ...core.errors import ConfigError
from ...core.placement import Placement
from . import bounds, exact, kernels, nodes, pairs, search
from .planner import Problem, Solution

Layer = tuple[np.ndarray, np.ndarray]  # expert_S, tokens_S


def fast(problem: Problem) -> Solution:
    """Layer by layer: replicate the most loaded, pack, swap, pour out the shares; or groups (pairs.py).

    Option `smoothing`, 0 to 1: experts are placed for a load that far on its way to equal counts; only the shares are
    for the load itself. The plan fits its own load less and others better, above all with a dispatcher that splits.
    """
    smoothing = float(problem.options.get("smoothing", 0.0))
    if not 0 <= smoothing <= 1:
        raise ConfigError(f"plan: smoothing = {smoothing!r} must be from 0 to 1")
    load = problem.load
    if smoothing:
        load = (1 - smoothing) * load + smoothing * load.mean(axis=1, keepdims=True)
    bound_L = bounds.lower_bounds(load, problem.ranks, simple=True)
    layers = [fast_layer(load_E, problem, bound) for load_E, bound in zip(load, bound_L, strict=True)]
    if smoothing:
        layers = [
            (expert_S, _tokens(expert_S, load_E, problem))
            for (expert_S, _), load_E in zip(layers, problem.load, strict=True)
        ]
    return _stack(layers)


def fast_layer(load_E: np.ndarray, problem: Problem, bound: float) -> Layer:
    ranks = problem.ranks
    cost, fixed, first = ranks.cost, ranks.fixed, ranks.first
    if ranks.two_slots and not problem.equal and len(load_E) > ranks.count and bound > 0:
        low = bound / cost[0]
        expert_S, tokens_S, found = pairs.solve_pairs(load_E, low, 2 * low, ranks.count)
        if found:
            kernels.fill_spare(expert_S, load_E, first)
            kernels.split_tokens(expert_S, ranks.slot_rank, load_E, cost, fixed, tokens_S, 3, 1e-3)
            return expert_S, tokens_S
    copies = kernels.replicate(load_E, ranks.num_slots, int((ranks.slots > 0).sum()))
    return kernels.spread(load_E, copies, cost, fixed, first, bound * 1.0005, problem.equal)


def eplb(problem: Problem) -> Solution:
    """Replicate the most loaded, then pack the largest first: EPLB's greedy, without two replicas on one rank."""
    ranks = problem.ranks
    layers = []
    for load_E in problem.load:
        copies = kernels.replicate(load_E, ranks.num_slots, int((ranks.slots > 0).sum()))
        expert_S = kernels.pack(load_E, copies, ranks.cost, ranks.fixed, ranks.first)
        layers.append((expert_S, kernels.equal_tokens(expert_S, load_E)))
    return _stack(layers)


def exact_policy(problem: Problem) -> Solution:
    """Mixed-integer programs (exact.py); the note carries what HiGHS has proven."""
    if problem.equal:
        raise ConfigError('plan: policy "exact" finds unequal shares only; leave shares="equal" out')
    time_limit = float(problem.options.get("time_limit", 60.0))
    layers, proven = [], 0.0
    for load_E, bound in zip(problem.load, bounds.lower_bounds(problem.load, problem.ranks), strict=True):
        # Stopped by the clock, HiGHS may hold less than the fast policy finds.
        expert_S, tokens_S, dual = exact.solve_layer(load_E, problem.ranks, time_limit)
        candidates = [(expert_S, tokens_S), fast_layer(load_E, problem, bound)]
        layers.append(min(candidates, key=lambda layer: _slowest(layer, problem)))
        proven += dual
    expert, tokens, _ = _stack(layers)
    return expert, tokens, f"HiGHS: no placement can be below {proven:.6g}"


def _slowest(layer: Layer, problem: Problem) -> float:
    ranks, (_, tokens_S) = problem.ranks, layer
    seconds_S = ranks.cost[ranks.slot_rank] * tokens_S + np.where(tokens_S > 0, ranks.fixed[ranks.slot_rank], 0.0)
    return float(np.bincount(ranks.slot_rank, seconds_S, ranks.count).max())


def robust(problem: Problem) -> Solution:
    """Several workloads at once: the worst one's slowest rank, each workload's layer scaled to the same tokens.

    Replicas go to the experts that are hot in any workload; equal shares while placing. Static shares are poured out
    for the mean; a dispatcher that splits each batch (`split`) gains most from such a placement.
    """
    ranks, layers = problem.ranks, []
    total = problem.loads.sum(axis=2, keepdims=True)
    loads = problem.loads / np.where(total > 0, total, 1.0)
    for layer, load_E in enumerate(problem.load):
        load_WE = np.ascontiguousarray(loads[:, layer])
        copies = search.replicate_many(load_WE, ranks.num_slots, int((ranks.slots > 0).sum()))
        expert_S = search.pack_many(load_WE, copies, ranks.cost, ranks.first)
        kernels.fill_spare(expert_S, load_WE.max(axis=0), ranks.first)
        search.swap_many(expert_S, load_WE, ranks.cost, ranks.first, 400)
        layers.append((expert_S, kernels.equal_tokens(expert_S, load_E)))
    return _stack(layers)


def warm(problem: Problem) -> Solution:
    """From the placement `start`, step by step; keeps the number of steps where time + move_cost * moves is least."""
    start, ranks = problem.options.get("start"), problem.ranks
    if not isinstance(start, Placement):
        raise ConfigError('plan: policy "warm" needs start=, the placement in force')
    if start.slot_expert.shape[0] != len(problem.load) or not np.array_equal(start.slot_rank, ranks.slot_rank):
        raise ConfigError("plan: start has other layers, or other slots on its ranks, than the plan that is asked for")
    if start.num_experts != problem.load.shape[1]:
        raise ConfigError(f"plan: start places {start.num_experts} experts, the load has {problem.load.shape[1]}")
    move_cost = float(problem.options.get("move_cost", 0.0))
    starts = np.ascontiguousarray(start.slot_expert, dtype=np.int32)
    return _stack(
        [
            warm_layer(load_E, problem, expert_S, move_cost)
            for load_E, expert_S in zip(problem.load, starts, strict=True)
        ]
    )


def warm_layer(load_E: np.ndarray, problem: Problem, start_S: np.ndarray, move_cost: float) -> Layer:
    ranks, expert_S, moves, idle = problem.ranks, start_S.copy(), 0, 0
    best: tuple[float, Layer] | None = None
    while True:
        tokens_S = _tokens(expert_S, load_E, problem)
        price = _slowest((expert_S, tokens_S), problem) + move_cost * moves
        idle += 1
        if best is None or price < best[0] - 1e-12:
            best, idle = (price, (expert_S.copy(), tokens_S)), 0
        step = search.next_step(expert_S, tokens_S, ranks.slot_rank, len(load_E), ranks.cost, ranks.first)
        kind, i, j = step
        if kind == 0 or idle > 8 or moves > 2 * ranks.num_slots:
            return best[1]
        if kind == 1:
            expert_S[j] = expert_S[i]
        else:
            expert_S[i], expert_S[j] = expert_S[j], expert_S[i]
        moves += kind


def by_nodes(problem: Problem) -> Solution:
    """Experts to nodes by the tokens that select them together, then each node on its own (nodes.py).

    Options: `routing` topk_ids [T, L, K]; or `groups` [E], the group of each expert, to be kept together where there
    is no routing; `spread`, how far a node may exceed its part of the load (0.01).
    """
    ranks = problem.ranks
    allowed = float(problem.options.get("spread", 0.01))
    num_nodes, num_experts = int(ranks.node.max()) + 1, problem.load.shape[1]
    speed_N = np.bincount(ranks.node, (ranks.slots > 0) / ranks.cost, num_nodes)
    slots_N = np.bincount(ranks.node, ranks.slots, num_nodes).astype(np.int64)
    # Half of a node's redundant slots are left for replicas of its own experts.
    cap_N = np.maximum((slots_N * (1 + num_experts / ranks.num_slots) / 2).astype(np.int64), 1)
    cap_N = cap_N if cap_N.sum() >= num_experts else slots_N
    cost_N = 1 - np.bincount(ranks.node, minlength=num_nodes) / ranks.count
    layers, visits = [], 0.0
    for layer, load_E in enumerate(problem.load):
        member_TE, group_E = _selections(problem.options, layer, num_experts)
        token_E = np.nonzero(member_TE.T)[1]
        begin_E = np.concatenate([[0], np.cumsum(member_TE.sum(axis=0))]).astype(np.int64)
        scaled = load_E * (member_TE.sum() / load_E.sum()) if load_E.sum() > 0 else load_E
        part_N = speed_N / speed_N.sum()
        home_E = nodes.first_homes(scaled, group_E, part_N, cap_N)
        load_cap = (1 + allowed) * part_N * scaled.sum()
        visits += nodes.assign(scaled, member_TE, token_E, begin_E, home_E, cost_N, load_cap, cap_N, 12) / len(
            member_TE
        )
        layers.append(_inside_nodes(load_E, home_E, problem))
    note = (
        f"{visits / len(layers):.3f} crossings between nodes per token and layer"
        if "routing" in problem.options
        else ""
    )
    expert, tokens, _ = _stack(layers)
    return expert, tokens, note


def _selections(options: dict, layer: int, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """(whether a token selects an expert [T, E], the group of each expert [E]) from `routing` or `groups`."""
    if options.get("routing") is not None:
        ids = np.asarray(options["routing"])
        if ids.ndim != 3 or layer >= ids.shape[1]:
            raise ConfigError(f"plan: routing of shape {ids.shape}; give topk_ids [T, L, K] for all layers of the load")
        if ids.size and (ids.max() >= num_experts or ids.min() < -1):
            raise ConfigError(f"plan: the routing names an expert outside 0..{num_experts - 1}")
        member_TE = np.zeros((len(ids), num_experts + 1), bool)
        np.put_along_axis(member_TE, ids[:, layer].astype(np.int64) % (num_experts + 1), True, axis=1)  # -1: last
        return np.ascontiguousarray(member_TE[:, :-1]), np.asarray(options.get("groups", np.arange(num_experts)))
    if options.get("groups") is None:
        raise ConfigError('plan: policy "nodes" needs routing=, topk_ids [T, L, K], or groups=, a group per expert [E]')
    group_E = np.asarray(options["groups"])
    if group_E.shape != (num_experts,):
        raise ConfigError(f"plan: groups of shape {group_E.shape} for {num_experts} experts")
    return np.unique(group_E)[:, None] == group_E[None, :], group_E


def _inside_nodes(load_E: np.ndarray, home_E: np.ndarray, problem: Problem) -> Layer:
    """Each node's experts on its ranks, replicas in its spare slots."""
    ranks = problem.ranks
    expert_S, tokens_S = np.full(ranks.num_slots, -1, np.int32), np.zeros(ranks.num_slots)
    for node in range(int(ranks.node.max()) + 1):
        here = np.flatnonzero((ranks.node == node) & (ranks.slots > 0))
        experts = np.flatnonzero(home_E == node)
        if not len(here):
            continue
        slots = ranks.slots[here]
        at = np.concatenate([np.arange(ranks.first[rank], ranks.first[rank + 1]) for rank in here])
        # A node with few experts may have ranks with more slots than it has experts; those are filled below.
        room = np.minimum(slots, len(experts))
        inner = np.concatenate([np.arange(count) < kept for count, kept in zip(slots, room, strict=True)])
        if not len(experts):
            continue
        load, cost, fixed = load_E[experts], ranks.cost[here], ranks.fixed[here]
        first = np.concatenate([[0], np.cumsum(room)]).astype(np.int64)
        copies = kernels.replicate(load, int(room.sum()), len(here))
        target = kernels.lower_bound(load, cost, fixed, np.ones(len(here), np.int64), int(room.sum()))
        placed, tokens = kernels.spread(load, copies, cost, fixed, first, target * 1.001, problem.equal)
        expert_S[at[inner]], tokens_S[at[inner]] = experts[placed], tokens
    kernels.fill_spare(expert_S, load_E, ranks.first)
    return expert_S, kernels.equal_tokens(expert_S, load_E) if problem.equal else tokens_S


def _tokens(expert_S: np.ndarray, load_E: np.ndarray, problem: Problem) -> np.ndarray:
    tokens_S, ranks = kernels.equal_tokens(expert_S, load_E), problem.ranks
    if not problem.equal:
        kernels.split_tokens(expert_S, ranks.slot_rank, load_E, ranks.cost, ranks.fixed, tokens_S, 12, 1e-3)
    return tokens_S


def _stack(layers: list[Layer]) -> Solution:
    return np.stack([expert for expert, _ in layers]), np.stack([tokens for _, tokens in layers]), ""


# name -> (function, the options it takes)
POLICIES = {
    "fast": (fast, ("smoothing",)),
    "exact": (exact_policy, ("time_limit",)),
    "eplb": (eplb, ()),
    "warm": (warm, ("start", "move_cost")),
    "robust": (robust, ()),
    "nodes": (by_nodes, ("routing", "groups", "spread")),
}

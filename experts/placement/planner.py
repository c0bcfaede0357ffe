"""`plan()`: a placement that makes the slowest rank of every layer fast, and a proof of how fast it could be.

The main path is `plan`: understand the load and the ranks, let a policy choose experts and shares, wrap them up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ...core.cluster import Cluster
from ...core.errors import ConfigError
from ...core.placement import Placement
from . import bounds
from .model import Rank, Ranks, rank_model

# A policy takes a Problem and returns (slot_expert [L, S], slot_tokens [L, S], what limits it or "").
Solution = tuple[np.ndarray, np.ndarray, str]


@dataclass(frozen=True)
class Problem:
    """What a policy is given. `loads` [W, L, E]: one workload or several; `load` [L, E]: their mean, each layer of
    each workload counting the same. `options` are plan()'s further arguments."""

    loads: np.ndarray
    load: np.ndarray
    ranks: Ranks
    equal: bool
    options: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Plan(Placement):
    """A Placement (the runtime takes it as it is) that knows its ranks, its load and its proof.

    load [L, E]: the tokens it was made for. `ranks`: times and slots. Times are seconds, or the unit of the ranks.
    """

    ranks: Ranks
    load: np.ndarray
    policy: str = "fast"
    equal: bool = False
    note: str = ""
    milliseconds: float = 0.0

    def times(self, load: np.ndarray | None = None, dispatch: str = "static") -> np.ndarray:
        """Predicted seconds per layer and rank [L, R] for a load [L, E] (this plan's own by default).

        `dispatch`: "static" uses slot_share; "split" chooses shares anew for this load, as a per-batch dispatcher
        would (see `split`); "equal" divides tokens equally over replicas.
        """
        load = self.load if load is None else read_load(load)[0]
        if load.shape != self.load.shape:
            raise ConfigError(f"plan: a load of shape {load.shape} for a plan of [L, E] = {self.load.shape}")
        tokens = load_to_tokens(self, load, dispatch)
        seconds = self.ranks.cost[self.slot_rank] * tokens
        seconds += np.where(tokens > 0, self.ranks.fixed[self.slot_rank], 0.0)
        times = np.zeros((self.num_layers, self.ranks.count))
        for layer in range(self.num_layers):
            times[layer] = np.bincount(self.slot_rank, seconds[layer], self.ranks.count)
        return times

    def balancedness(self, load: np.ndarray | None = None, dispatch: str = "static") -> float:
        """Perfectly divided work over the slowest rank's, both summed over layers; 1 is perfect.

        With equal ranks that is sum(mean tokens) / sum(max tokens), the field's balancedness per rank.
        """
        slowest = self.times(load, dispatch).max(axis=1).sum()
        load = self.load if load is None else read_load(load)[0]
        return float(load.sum() / (1 / self.ranks.cost).sum() / slowest) if slowest > 0 else 1.0

    def bound(self, load: np.ndarray | None = None, simple: bool = False) -> np.ndarray:
        """Seconds per layer [L] that no placement on these ranks and slots can beat (bounds.py says why)."""
        return bounds.lower_bounds(self.load if load is None else read_load(load)[0], self.ranks, simple)

    def ratio(self, load: np.ndarray | None = None, dispatch: str = "static") -> float:
        """Sum of the bounds over the sum of the slowest ranks' times: how near to optimal, proven; 1 is optimal."""
        slowest = self.times(load, dispatch).max(axis=1).sum()
        return float(self.bound(load).sum() / slowest) if slowest > 0 else 1.0

    def moves_from(self, other: Placement) -> int:
        """Slots whose expert their rank did not hold under `other`: expert weights that must travel."""
        if (other.num_layers, other.num_ranks) != (self.num_layers, self.num_ranks):
            raise ConfigError("plan: the other placement has other layers or ranks; moves cannot be counted")
        return sum(
            len(set(self.rank_experts(layer, rank)) - set(other.rank_experts(layer, rank)))
            for layer in range(self.num_layers)
            for rank in range(self.num_ranks)
        )

    def describe(self) -> str:
        """A few lines: what was planned, how near to optimal it is proven to be, and what limits it."""
        slowest, bound, slots = self.times().max(axis=1), self.bound(), np.diff(self.ranks.first)
        ratio = np.divide(bound, slowest, out=np.ones_like(bound), where=slowest > 0)
        worst = int(np.argmin(ratio))
        limits = bounds.limits(self.load, self.ranks)
        return "\n".join(
            [
                f"plan: {self.num_layers} layers, {self.num_experts} experts in {self.num_slots} slots "
                f"({slots.min()} to {slots.max()} per rank) on {self.num_ranks} ranks",
                f"policy {self.policy}, {'equal' if self.equal else 'unequal'} shares, "
                f"{self.milliseconds:.1f} ms, {engine()}",
                f"slowest rank, all layers: {slowest.sum():.6g}; no placement can be below {bound.sum():.6g}: "
                f"within {100 * (slowest.sum() / bound.sum() - 1 if bound.sum() > 0 else 0):.2f} % of optimal",
                f"worst layer: {worst}, within {100 * (1 / ratio[worst] - 1):.2f} %; "
                f"balancedness {self.balancedness():.4f}",
                "what limits it: " + ", ".join(f"{what} in {number} layers" for what, number in limits.items()),
                *([self.note] if self.note else []),
            ]
        )


def plan(
    load: np.ndarray,
    ranks: Cluster | Sequence[Rank] | int,
    num_slots: int | None = None,
    *,
    policy: str | None = None,
    shares: str = "free",
    bytes_per_expert: float | None = None,
    **options: object,
) -> Plan:
    """Where to place the experts of every layer so that its slowest rank is done soon.

    load: tokens per expert, [L, E] or [E] (numbers of any kind), or several workloads [W, L, E].
    ranks: a number of equal ranks, a list of Rank, or the cluster of a cluster file.
    num_slots: in all; by default what the ranks' slots or memory (with `bytes_per_expert`) hold.
    policy: "fast", "exact", "eplb", "warm", "robust" or "nodes"; by default warm with `start`, nodes with `routing`,
    robust with several workloads, else fast.
    shares: "free", replicas take unequal shares; "equal", as EPLB's dispatchers do.
    options: of the policy. fast: `smoothing` (0 to 1, for loads that will drift). exact: `time_limit` seconds per
    layer. warm: `start` (a Placement), `move_cost` (of one expert, in units of the load's time). nodes: `routing`
    (topk_ids [T, L, K]) or `groups` [E], `spread` (how far a node may exceed its part of the load).
    Raises ConfigError for what cannot be placed, naming it.
    """
    began = time.perf_counter()
    mean, loads = read_load(load)
    model = rank_model(ranks, num_slots, *mean.shape, bytes_per_expert)
    policy = policy or _natural_policy(loads, options)
    problem = Problem(loads, mean, model, policy == "eplb" or _is_equal(shares), options)
    slot_expert, slot_tokens, note = _solver(policy, options)(problem)
    if bytes_per_expert is None and _gives_memory(ranks):
        note += "\n" * bool(note) + "memory was not looked at: bytes_per_expert was not given"
    return wrap(problem, slot_expert, slot_tokens, policy, note, began)


def wrap(
    problem: Problem,
    slot_expert: np.ndarray,
    slot_tokens: np.ndarray,
    policy: str,
    note: str = "",
    began: float | None = None,
) -> Plan:
    """A Plan from a policy's arrays [L, S]: slots in increasing expert order within a rank, tokens as shares."""
    ranks, load = problem.ranks, problem.load
    order = np.argsort(ranks.slot_rank * np.int64(load.shape[1]) + slot_expert, axis=1, kind="stable")
    expert = np.take_along_axis(slot_expert, order, axis=1).astype(np.int32)
    tokens = np.take_along_axis(slot_tokens, order, axis=1)
    share = tokens_to_shares(expert, tokens, load.shape[1])
    spent = 0.0 if began is None else (time.perf_counter() - began) * 1e3
    return Plan(
        expert, ranks.slot_rank, share, load.shape[1], ranks.count, ranks, load, policy, problem.equal, note, spent
    )


def tokens_to_shares(slot_expert: np.ndarray, slot_tokens: np.ndarray, num_experts: int) -> np.ndarray:
    """Each slot's part of its expert's tokens [L, S]; equal parts for an expert without tokens."""
    num_layers = len(slot_expert)
    at = slot_expert + num_experts * np.arange(num_layers)[:, None]
    total = np.bincount(at.ravel(), slot_tokens.ravel(), num_layers * num_experts)[at]
    copies = np.bincount(at.ravel(), minlength=num_layers * num_experts)[at]
    return np.where(total > 0, slot_tokens / np.where(total > 0, total, 1.0), 1.0 / copies)


def load_to_tokens(made: Plan, load: np.ndarray, dispatch: str) -> np.ndarray:
    """Tokens per slot [L, S] of a load [L, E]; `dispatch` as in Plan.times."""
    if dispatch == "split":
        share = np.stack([split(load[layer], (made, layer)) for layer in range(made.num_layers)])
    elif dispatch == "equal":
        share = tokens_to_shares(made.slot_expert, np.zeros(made.slot_expert.shape), made.num_experts)
    elif dispatch == "static":
        share = made.slot_share
    else:
        raise ConfigError(f'plan: dispatch {dispatch!r} is none of "static", "split", "equal"')
    return np.take_along_axis(load, made.slot_expert.astype(np.int64), axis=1) * share


def split(load_E: np.ndarray, plan_layer: tuple[Plan, int], sweeps: int = 40) -> np.ndarray:
    """A batch's shares [S] for the replicas of one layer, from the batch's own counts [E]: the slowest rank is done
    as soon as this placement allows (within a thousandth, or as near as `sweeps` rounds come).

    A pure function of its arguments, the same bits on every rank and machine (kernels.py). Microseconds.
    """
    from . import kernels

    made, layer = plan_layer
    load_E = np.ascontiguousarray(load_E, dtype=np.float64)
    if load_E.shape != (made.num_experts,):
        raise ConfigError(f"split: counts of shape {load_E.shape} for {made.num_experts} experts; give [E]")
    expert_S = made.slot_expert[layer]
    tokens_S = pour(load_E, expert_S, made.slot_rank, made.ranks.cost, made.ranks.fixed, sweeps)
    return kernels.shares_of(expert_S, tokens_S, made.num_experts)


def pour(
    load_E: np.ndarray, expert_S: np.ndarray, rank_S: np.ndarray, cost: np.ndarray, fixed: np.ndarray, sweeps: int = 40
) -> np.ndarray:
    """Tokens per slot [S] of a load [E] float64 that make the slowest rank soon done; see split."""
    from . import kernels

    tokens_S = kernels.equal_tokens(expert_S, load_E)
    return kernels.split_tokens(expert_S, rank_S, load_E, cost, fixed, tokens_S, sweeps, 1e-4)


def read_load(load: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean [L, E], workloads [W, L, E]) in float64 of a load [E], [L, E] or [W, L, E]. Raises ConfigError."""
    if hasattr(load, "detach"):  # a torch tensor, wherever it lies
        load = load.detach().cpu().double().numpy()
    try:
        loads = np.array(load, dtype=np.float64, ndmin=2)
    except (TypeError, ValueError):
        raise ConfigError("plan: the load is no array of numbers; give tokens per expert, [L, E]") from None
    if loads.ndim == 2:
        loads = loads[None]
    if loads.ndim != 3 or 0 in loads.shape:
        raise ConfigError(f"plan: a load of shape {loads.shape}; give tokens per expert [L, E], or workloads [W, L, E]")
    if not (np.isfinite(loads).all() and (loads >= 0).all()):
        layer = int(np.argwhere(~(np.isfinite(loads) & (loads >= 0)))[0][1])
        raise ConfigError(f"plan: layer {layer} of the load has a count that is negative or no number")
    if len(loads) == 1:
        return loads[0], loads
    total = loads.sum(axis=2, keepdims=True)
    mean = (loads / np.where(total > 0, total, 1.0) * total.mean(axis=0)).mean(axis=0)
    return mean, loads


def engine() -> str:
    """What runs the planner's loops: numba, or the same functions as plain Python."""
    from . import jit

    return jit.engine


def _is_equal(shares: str) -> bool:
    if shares not in ("free", "equal"):
        raise ConfigError(f'plan: shares {shares!r} is neither "free" nor "equal"')
    return shares == "equal"


def _gives_memory(ranks: Cluster | Sequence[Rank] | int) -> bool:
    if isinstance(ranks, Cluster):
        return any(node.memory_gib is not None for node in ranks.nodes)
    return not isinstance(ranks, int) and any(rank.memory_bytes is not None for rank in ranks)


def _natural_policy(loads: np.ndarray, options: dict) -> str:
    if options.get("start") is not None:
        return "warm"
    if options.get("routing") is not None:
        return "nodes"
    return "robust" if len(loads) > 1 else "fast"


def _solver(policy: str, options: dict) -> Callable[[Problem], Solution]:
    """The policy's function. Imported here: they need numba or scipy, and importing this module must not."""
    from . import solvers

    if policy not in solvers.POLICIES:
        raise ConfigError(f"plan: no policy is called {policy!r}; choose one of {', '.join(solvers.POLICIES)}")
    solve, known = solvers.POLICIES[policy]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(f'plan: policy "{policy}" takes no {unknown[0]!r}; its options: {", ".join(known) or "none"}')
    return solve

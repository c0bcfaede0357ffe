"""`moe-launch simulate`: traces replayed against placements, policies and cluster sizes. Predicted, not measured.

Three questions. Fresh: how good is a plan on the load it was made for? Shifted: on another workload? Next window: with
a trace over time, how good is the plan of one window in the next one, and what does following the load move and cost?
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...core.cluster import load_cluster
from ...core.errors import ConfigError
from ...experts import placement as placements
from ...experts import traces
from ...experts.placement import Plan, Rank
from ...experts.placement.model import rank_model
from ...experts.placement.nodes import internode_tokens, replicas_taken
from ...experts.placement.planner import load_to_tokens, tokens_to_shares
from .plan import even_plan

POLICIES = ("even", "eplb", "fast", "smooth", "warm", "robust", "nodes")
DISPATCHES = ("equal", "static", "split")
SMOOTHING = 0.3
ROUTING_TOKENS = 4096  # planned and judged on; more say little more
MOVE_COST = 0.001  # of warm: what a move must save of a layer's perfectly divided time, in every window


def add_options(parser: Any) -> None:
    what = "load trace (.npz, or SGLang's JSON); several are several workloads"
    parser.add_argument("--trace", required=True, nargs="+", metavar="TRACE", help=what)
    what = "routing trace (.npz): crossings between nodes are counted with it, and policy nodes plans with it"
    parser.add_argument("--routing", metavar="TRACE", help=what)
    parser.add_argument("--cluster", metavar="FILE", help="cluster file: speeds, memory and nodes of the ranks")
    parser.add_argument("--ranks", type=int, nargs="+", metavar="N", help="instead: so many equal ranks; several sizes")
    parser.add_argument("--node-size", type=int, default=8, metavar="N", help="equal ranks of a node (default: 8)")
    parser.add_argument("--slots", type=int, metavar="N", help="slots per layer (default: an eighth as many replicas)")
    parser.add_argument(
        "--policy", nargs="+", choices=POLICIES, default=["even", "eplb", "fast"], help="default: first 3"
    )
    parser.add_argument("--dispatch", nargs="+", choices=DISPATCHES, default=["static"], help="default: static")
    parser.add_argument("--windows", type=int, metavar="N", help="of a trace over time (default: 10, or its steps)")
    parser.add_argument("--top-k", type=int, default=8, metavar="K", help="for crossings between nodes (default: 8)")
    mib = "of one expert of one layer; default: DeepSeek-V3's in FP8"
    parser.add_argument("--expert-mib", type=float, default=3 * 7168 * 2048 / 2**20, metavar="X", help=mib)
    parser.add_argument("--gbit-s", type=float, default=400.0, metavar="X", help="of each rank's link (default: 400)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw balancedness by policy")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


@dataclass(frozen=True)
class Row:
    """One plan judged on one load. Ratios are 1 where perfect.

    balancedness: perfectly divided time over the slowest ranks'; of_bound: proven bound over the slowest ranks'.
    crossings: nodes a token visits besides its own; counted with a routing trace, else as if a token's experts were
    chosen independently of each other.
    moved, moved_bytes, stall_s: experts that another plan in force before would have to move, for the busiest rank's
    link; None where none was.
    """

    question: str
    fitted_on: str
    judged_on: str
    ranks: int
    slots: int
    policy: str
    dispatch: str
    balancedness: float
    of_bound: float
    worst_layer: int
    worst_balancedness: float
    crossings: float | None
    planner_ms: float
    moved: int | None = None
    moved_bytes: float | None = None
    stall_s: float | None = None


def run(options: argparse.Namespace) -> int:
    rows = list(simulate(options))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report: dict[str, Any] = {"assumed": assumptions(options), "engine": placements.engine(), "peak_bytes": peak}
    report["rows"] = [row.__dict__ for row in rows]
    if options.plot:
        from . import plot

        plot.simulate_figure(rows, options.plot)
        print(f"plot written to {options.plot}", file=sys.stderr)
    print(json.dumps(report) if options.json else render(rows, report))
    return 0


def assumptions(options: argparse.Namespace) -> str:
    crossings = f"take a token's {options.top_k} experts as chosen independently"
    if options.routing:
        crossings = f"are those of up to {ROUTING_TOKENS} tokens of {options.routing}, which begin on any rank alike"
    return (
        f"an expert is {options.expert_mib:.1f} MiB, moves go at {options.gbit_s:g} Gbit/s into or out of the busiest "
        f"rank; crossings {crossings}"
    )


def simulate(options: argparse.Namespace) -> Iterator[Row]:
    """Rows as they are found. Raises ConfigError for what cannot be read or planned."""
    if bool(options.cluster) == bool(options.ranks):
        raise ConfigError("give --cluster FILE, or --ranks N")
    for name in ("expert_mib", "gbit_s", "top_k", "node_size"):
        if not getattr(options, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0")
    found = {Path(path).name: traces.read_load(path) for path in options.trace}
    if len(found) < len(options.trace):
        raise ConfigError("two traces have the same file name; rename one of them")
    shapes = {trace.load.shape[1:] for trace in found.values()}
    if len(shapes) > 1:
        raise ConfigError(f"the traces have other layers or experts than each other: {sorted(shapes)}")
    loads = {name: trace.total for name, trace in found.items()}
    num_experts = next(iter(shapes))[1]
    ids = read_ids(options, next(iter(shapes)))
    for ranks in _clusters(options):
        slots = options.slots or max(num_experts + num_experts // 8, len(ranks))
        for policy in options.policy:
            print(f"{len(ranks)} ranks, {policy} ...", file=sys.stderr, flush=True)
            if policy != "warm":
                yield from _workloads(options, loads, ranks, slots, policy, ids)
            for name, trace in found.items():
                if len(trace.load) > 1 and policy not in ("robust", "even"):
                    yield from _windows(options, name, trace.load, ranks, slots, policy, ids)


def _clusters(options: argparse.Namespace) -> list[list[Rank]]:
    if options.cluster:  # memory is for `plan` to look at: what else is there is not known here
        ranks = placements.ranks_of_cluster(load_cluster(options.cluster))
        return [[dataclasses.replace(rank, memory_bytes=None) for rank in ranks]]
    return [[Rank(node=rank // options.node_size) for rank in range(count)] for count in options.ranks]


def read_ids(options: argparse.Namespace, shape: tuple[int, int]) -> np.ndarray | None:
    """topk_ids [T, L, K] of the routing trace, a part of its tokens from all over it; None without one."""
    if not options.routing:
        if "nodes" in options.policy:
            raise ConfigError("policy nodes needs --routing TRACE (runtime.record(..., routing=True) writes one)")
        return None
    trace = traces.read_routing(options.routing)
    found = (trace.topk_ids.shape[1], trace.num_experts)
    if found != shape:
        raise ConfigError(f"{options.routing}: layers and experts {found}; the load traces have {shape}")
    if not len(trace.topk_ids):
        raise ConfigError(f"{options.routing}: no tokens")
    return trace.topk_ids[:: -(-len(trace.topk_ids) // ROUTING_TOKENS)]


def make_plan(
    policy: str,
    loads: np.ndarray,
    ranks: list[Rank],
    slots: int,
    ids: np.ndarray | None = None,
    start: Plan | None = None,
) -> Plan:
    """A plan of this policy; loads [L, E], for robust [W, L, E]. ids: topk_ids [T, L, K], for nodes."""
    if policy == "even":
        return even_plan(rank_model(ranks, max(loads.shape[-1], len(ranks)), *loads.shape, None), loads)
    if policy == "smooth":
        return placements.plan(loads, ranks, slots, smoothing=SMOOTHING)
    if policy == "nodes":
        return placements.plan(loads, ranks, slots, routing=ids, spread=0.02)
    if policy == "warm" and start is not None:
        layer_time = loads.sum() / len(loads) / sum(rank.speed for rank in ranks)
        return placements.plan(loads, ranks, slots, start=start, move_cost=MOVE_COST * layer_time)
    return placements.plan(loads, ranks, slots, policy=policy if policy in ("eplb", "robust") else "fast")


def _workloads(
    options: argparse.Namespace,
    loads: dict[str, np.ndarray],
    ranks: list[Rank],
    slots: int,
    policy: str,
    ids: np.ndarray | None,
) -> Iterator[Row]:
    """Fresh and shifted; a robust plan is fitted on all workloads but the one it is judged on."""
    if policy == "robust":
        for name, load in loads.items():
            others = [other / other.sum(axis=1, keepdims=True) for key, other in loads.items() if key != name]
            if others:
                plan = make_plan("robust", np.stack(others), ranks, slots)
                yield from _judge(options, ids, "shifted", "all others", name, policy, plan, load)
        return
    for fitted, load in loads.items():
        plan = make_plan(policy, load, ranks, slots, ids)
        if policy == "even":  # it looks at no load
            yield from _judge(options, ids, "fresh", "-", fitted, policy, plan, load)
            continue
        for judged, other in loads.items():
            question = "fresh" if judged == fitted else "shifted"
            yield from _judge(options, ids, question, fitted, judged, policy, plan, other)


def _windows(
    options: argparse.Namespace,
    name: str,
    load: np.ndarray,
    ranks: list[Rank],
    slots: int,
    policy: str,
    ids: np.ndarray | None,
) -> Iterator[Row]:
    """Plan on each window, judge on the next; one row of means for each dispatch."""
    count = min(options.windows or 10, len(load))
    if count < 2:
        raise ConfigError("--windows must be at least 2")
    parts = [part.sum(axis=0, dtype=np.float64) for part in np.array_split(load, count)]
    in_force: Plan | None = None
    judged: dict[str, list[Row]] = {}
    for now, after in zip(parts, parts[1:], strict=False):
        now = np.where(now.sum(axis=1, keepdims=True) > 0, now, 1.0)
        after = np.where(after.sum(axis=1, keepdims=True) > 0, after, 1.0)
        plan = make_plan(policy, now, ranks, slots, ids, in_force)
        for row in _judge(options, ids, "next window", name, name, policy, plan, after, in_force):
            judged.setdefault(row.dispatch, []).append(row)
        in_force = plan
    for rows in judged.values():
        yield _mean_row(rows, f"{count} windows")


def _mean_row(rows: list[Row], what: str) -> Row:
    worst = min(rows, key=lambda row: row.worst_balancedness)
    means: dict[str, Any] = {}
    for name in ("balancedness", "of_bound", "crossings", "planner_ms", "moved", "moved_bytes", "stall_s"):
        known = [getattr(row, name) for row in rows if getattr(row, name) is not None]
        means[name] = statistics.fmean(known) if known else None
    fixed = {"worst_layer": worst.worst_layer, "worst_balancedness": worst.worst_balancedness, "judged_on": what}
    return Row(**{**rows[0].__dict__, **means, **fixed})


def _judge(
    options: argparse.Namespace,
    ids: np.ndarray | None,
    question: str,
    fitted: str,
    judged: str,
    policy: str,
    plan: Plan,
    load: np.ndarray,
    before: Plan | None = None,
) -> Iterator[Row]:
    bound = plan.bound(load)
    ideal = load.sum(axis=1) / (1 / plan.ranks.cost).sum()
    moved = moved_bytes = stall = None
    if before is not None:
        moved, moved_bytes, stall = moving(plan, before, options.expert_mib * 2**20, options.gbit_s)
    only = {"eplb": ["equal"], "even": ["static"]}.get(
        policy
    )  # EPLB's dispatchers divide equally; even has no replicas
    for dispatch in only or options.dispatch:
        slowest = plan.times(load, dispatch).max(axis=1)
        by_layer = np.divide(ideal, slowest, out=np.ones_like(ideal), where=slowest > 0)
        yield Row(
            question, fitted, judged, plan.num_ranks, plan.num_slots, policy, dispatch,
            float(ideal.sum() / slowest.sum()), float(bound.sum() / slowest.sum()),
            int(by_layer.argmin()), float(by_layer.min()), crossings(plan, load, dispatch, options.top_k, ids),
            plan.milliseconds, moved, moved_bytes, stall,
        )  # fmt: skip


def moving(plan: Plan, before: Plan, expert_bytes: float, gbit_s: float) -> tuple[int, float, float]:
    """(experts that must travel, bytes, seconds of the rank that receives most); nothing else uses the links."""
    into = np.zeros(plan.num_ranks)
    for layer in range(plan.num_layers):
        for rank in range(plan.num_ranks):
            into[rank] += len(set(plan.rank_experts(layer, rank)) - set(before.rank_experts(layer, rank)))
    return int(into.sum()), float(into.sum() * expert_bytes), float(into.max() * expert_bytes / (gbit_s * 1e9 / 8))


def crossings(plan: Plan, load: np.ndarray, dispatch: str, top_k: int, ids: np.ndarray | None = None) -> float | None:
    """Nodes a token visits besides its own, mean over layers; None on one node.

    With ids [T, L, K] they are counted. Else a token visits node n with probability 1 - (1 - share of n's tokens) **
    top_k, as if its experts were chosen independently; group-limited gates visit fewer. It begins on any rank alike.
    """
    nodes = plan.ranks.node
    num_nodes = int(nodes.max()) + 1
    if num_nodes < 2:
        return None
    tokens = load_to_tokens(plan, load, dispatch)
    part = np.bincount(nodes, minlength=num_nodes) / len(nodes)
    total = 0.0
    for layer in range(plan.num_layers):
        if ids is not None:
            share_S = tokens_to_shares(
                plan.slot_expert[layer : layer + 1], tokens[layer : layer + 1], plan.num_experts
            )[0]
            taken = replicas_taken(ids[:, layer], plan.slot_expert[layer], share_S)
            total += internode_tokens(nodes[plan.slot_rank], taken, num_nodes, part)
            continue
        share = np.bincount(nodes[plan.slot_rank], tokens[layer], num_nodes) / max(tokens[layer].sum(), 1e-30)
        total += ((1 - (1 - share) ** top_k) * (1 - part)).sum()
    return float(total / plan.num_layers)


def render(rows: list[Row], report: dict[str, Any]) -> str:
    lines = [f"predicted; {report['assumed']}", f"{report['engine']}; peak memory {report['peak_bytes'] / 1e6:.0f} MB"]
    lines.append(
        f"{'':12}{'planned on':<24}{'judged on':<24}{'ranks':>6}{'slots':>7} {'policy':<8}{'dispatch':<9}"
        f"{'balance':>8}{'of bound':>9}{'worst layer':>13}{'crossings':>10}{'moved':>9}{'GB':>8}{'stall s':>9}{'ms':>8}"
    )
    for row in rows:
        cells = [
            "-" if value is None else format(value, kind)
            for value, kind in (
                (row.crossings, ".3f"),
                (row.moved, ",.0f"),
                (None if row.moved_bytes is None else row.moved_bytes / 1e9, ",.1f"),
                (row.stall_s, ".2f"),
            )
        ]
        lines.append(
            f"{row.question:<12}{row.fitted_on[:23]:<24}{row.judged_on[:23]:<24}{row.ranks:>6}{row.slots:>7} "
            f"{row.policy:<8}{row.dispatch:<9}{row.balancedness:>8.4f}{row.of_bound:>9.4f}"
            f"{row.worst_balancedness:>7.3f} ({row.worst_layer:>3}){cells[0]:>10}{cells[1]:>9}{cells[2]:>8}"
            f"{cells[3]:>9}{row.planner_ms:>8.1f}"
        )
    return "\n".join(lines)

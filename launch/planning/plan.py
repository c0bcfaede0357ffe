"""`moe-launch plan`: a placement for a model and a cluster, its fit in memory, and what it would take."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...core.cluster import Cluster, load_cluster
from ...core.errors import ConfigError
from ...experts import placement as placements
from ...experts import traces
from ...experts.placement import Placement, Plan, bounds
from ...experts.placement.model import Ranks
from . import rates
from .shape import EXPERT_BYTES, ModelShape, read_shape

GIB = 2**30
POLICIES = ("fast", "exact", "eplb")


def add_options(parser: Any) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder, or a bare config.json")
    parser.add_argument("--cluster", required=True, metavar="FILE", help="cluster file: nodes, speeds, memory, links")
    parser.add_argument(
        "--load", metavar="TRACE", help="load trace (.npz, or SGLang's JSON); default: all experts alike"
    )
    parser.add_argument("--slots", type=int, metavar="N", help="slots per layer (default: see docs/planning.md)")
    parser.add_argument("--policy", choices=POLICIES, default="fast", help="default: fast")
    parser.add_argument("--smoothing", type=float, metavar="X", help="of policy fast, 0 to 1: for loads that drift")
    parser.add_argument("--dtype", choices=("auto", *EXPERT_BYTES), default="auto", help="what experts are held in")
    parser.add_argument(
        "--reserve-gib", type=float, default=0.0, metavar="X", help="of each rank, for KV cache and rows"
    )
    parser.add_argument("--tokens", type=int, default=4096, metavar="T", help="per rank and step (default: 4096)")
    parser.add_argument("--out", metavar="FILE.json", help="write the plan")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the load, and each rank's time before and after")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    rates.add_options(parser)


@dataclass(frozen=True)
class Planned:
    """A plan, the even split beside it, and what they were made of. Times [R] are of one step, all layers."""

    shape: ModelShape
    cluster: Cluster
    rates: rates.Rates
    plan: Plan
    times: np.ndarray
    even_times: np.ndarray
    step: float
    even_step: float
    bound: float
    memory: list[float | None]
    rows_per_step: float
    source: str


def run(options: argparse.Namespace) -> int:
    planned = make(options)
    if options.out:
        placements.save_plan(planned.plan, options.out)
    if options.plot:
        from . import plot

        plot.plan_figure(planned, options.plot)
    print(json.dumps(report(planned)) if options.json else render(planned))
    for what, path in (("plan", options.out), ("plot", options.plot)):
        if path:
            print(f"{what} written to {path}", file=sys.stderr)
    return 0


def make(options: argparse.Namespace) -> Planned:
    """Raises ConfigError or CheckpointError for what cannot be read, cannot be planned or does not fit."""
    if options.tokens < 1 or options.reserve_gib < 0:
        raise ConfigError("--tokens must be at least 1 and --reserve-gib at least 0")
    cluster, shape = load_cluster(options.cluster), read_shape(options.model, options.dtype)
    rated = rates.make_rates(options, shape)
    load, source = read_load(options.load, shape)
    rows = float(options.tokens) * cluster.num_ranks * shape.top_k
    load = load / load.sum(axis=1, keepdims=True) * rows  # of one step
    memory = [_room(shape, node.memory_gib, options.reserve_gib) for node in cluster.rank_nodes()]
    check_fit(shape, cluster, memory, options.reserve_gib)
    on_links = rated.bytes_per_row * together(cluster, shape.top_k) if rated.unit == "s" else 0.0
    ranks = placements.ranks_of_cluster(cluster, rated.seconds_per_row, on_links, rated.seconds_per_expert)
    # The planner knows one size of an expert: where a node's differs, its memory is told in such experts.
    shares = [shape.expert_bytes / shape.expert_bytes_on(node) for node in cluster.rank_nodes()]
    rooms = [None if room is None else room * share for room, share in zip(memory, shares, strict=True)]
    ranks = [dataclasses.replace(rank, memory_bytes=room) for rank, room in zip(ranks, rooms, strict=True)]
    slots = options.slots or default_slots(shape, cluster, memory, options.load is not None)
    extra = {} if options.smoothing is None else {"smoothing": options.smoothing}
    plan = placements.plan(load, ranks, slots, policy=options.policy, bytes_per_expert=shape.expert_bytes, **extra)
    return judged(shape, cluster, rated, plan, memory, rows, source)


def judged(
    shape: ModelShape,
    cluster: Cluster,
    rated: rates.Rates,
    plan: Plan,
    memory: list[float | None],
    rows: float,
    source: str,
) -> Planned:
    """A plan with its times, and those of the even split."""
    times, even_times = plan.times(), even_plan(plan.ranks, plan.load).times()
    return Planned(
        shape,
        cluster,
        rated,
        plan,
        times.sum(axis=0),
        even_times.sum(axis=0),
        float(times.max(axis=1).sum()),
        float(even_times.max(axis=1).sum()),
        float(plan.bound().sum()),
        memory,
        rows,
        source,
    )


def together(cluster: Cluster, top_k: int) -> float:
    """Crossings to a node per selected expert: a token crosses once for all its experts there.

    For experts chosen independently on nodes by their numbers of ranks: sum over nodes of 1 - (1 - part) ** K, over K.
    """
    part = np.array([node.devices for node in cluster.nodes]) / cluster.num_ranks
    return float((1 - (1 - part) ** top_k).sum() / top_k)


def read_load(path: str | None, shape: ModelShape) -> tuple[np.ndarray, str]:
    """(load [L, E] that fits the model, where it comes from)."""
    if path is None:
        return np.ones((shape.num_layers, shape.num_experts)), "no load given: all experts alike"
    trace = traces.read_load(path)
    if trace.load.shape[1:] != (shape.num_layers, shape.num_experts):
        raise ConfigError(
            f"{path}: a load of {trace.load.shape[1]} layers and {trace.load.shape[2]} experts; {shape.name} has "
            f"{shape.num_layers} expert layers of {shape.num_experts}"
        )
    total = trace.total
    empty = np.flatnonzero(total.sum(axis=1) == 0)
    if len(empty):
        raise ConfigError(f"{path}: layer {empty[0]} has no tokens; record a load in which every layer has some")
    return total, f"load of {path} ({len(trace.load)} steps)"


def _room(shape: ModelShape, memory_gib: float | None, reserve_gib: float) -> float | None:
    """Bytes of a rank's memory that experts may have."""
    return None if memory_gib is None else (memory_gib - reserve_gib) * GIB - shape.dense_bytes


def check_fit(shape: ModelShape, cluster: Cluster, memory: list[float | None], reserve_gib: float) -> None:
    """Raises ConfigError, saying how much is missing and what would help, for a model that does not fit."""
    reserved = f" and {reserve_gib:g} GiB reserved" if reserve_gib else ""
    for rank, (node, room) in enumerate(zip(cluster.rank_nodes(), memory, strict=True)):
        if room is not None and room < 0:
            raise ConfigError(
                f"rank {rank} (node {node.name}) has {node.memory_gib:g} GiB; the dense part alone takes "
                f"{shape.dense_bytes / GIB:.1f} GiB{reserved}: {-room / GIB:.1f} GiB short; it needs devices with more "
                "memory"
            )
    rooms = [room for room in memory if room is not None]
    if len(rooms) < len(memory):
        return
    held = sum(_experts_in(shape, cluster, memory))
    if held < shape.num_experts:
        per_layer = shape.expert_bytes * shape.num_layers
        missing = (shape.num_experts - held) * per_layer
        smaller = " or hold the experts in 8 bits (--dtype fp8 or int8)," if EXPERT_BYTES[shape.stored] >= 2 else ""
        raise ConfigError(
            f"{shape.num_experts} experts of {per_layer / GIB:.2f} GiB (all layers) do not fit: beside the dense part "
            f"of {shape.dense_bytes / GIB:.1f} GiB{reserved} the {len(rooms)} ranks hold {held} of them, "
            f"{missing / GIB:.1f} GiB short; add ranks or memory,{smaller} or reserve less"
        )


def _experts_in(shape: ModelShape, cluster: Cluster, memory: list[float | None]) -> list[int]:
    """How many experts of each layer fit into each rank's memory, all of which is known."""
    per_rank = [shape.expert_bytes_on(node) * shape.num_layers for node in cluster.rank_nodes()]
    return [min(int(room // each), shape.num_experts) for room, each in zip(memory, per_rank, strict=True)]


def default_slots(shape: ModelShape, cluster: Cluster, memory: list[float | None], has_load: bool) -> int:
    """Without a load an expert has one slot. With one, an eighth as many replicas as experts, where memory allows."""
    slots = max(shape.num_experts + (shape.num_experts // 8 if has_load else 0), cluster.num_ranks)
    if all(room is not None for room in memory):
        slots = min(slots, sum(_experts_in(shape, cluster, memory)))
    return slots


def even_plan(ranks: Ranks, load: np.ndarray) -> Plan:
    """Experts in order, equal numbers on every rank, no replicas: what is compared with."""
    even = placements.proportional(*load.shape, [1.0] * ranks.count)
    return as_plan(even, ranks.cost, ranks.fixed, ranks.node, load)


def as_plan(placed: Placement, cost: np.ndarray, fixed: np.ndarray, node: np.ndarray, load: np.ndarray) -> Plan:
    """A placement with the times of ranks [R] and a load [L, E], to be judged as plans are."""
    slots = np.bincount(placed.slot_rank, minlength=placed.num_ranks).astype(np.int64)
    ranks = Ranks(cost, fixed, slots, node)
    tables = (placed.slot_expert, placed.slot_rank, placed.slot_share, placed.num_experts, placed.num_ranks)
    return Plan(*tables, ranks, load)


def of_job(shape: ModelShape, cluster: Cluster, placed: Placement | None) -> Planned:
    """What a job would hold and take with a placement, or with the one it gets without: for --dry-run.

    Nothing is measured: all experts alike, times in rows. Raises ConfigError for what does not fit.
    """
    speeds = np.array(cluster.rank_speeds())
    placed = placed or placements.proportional(shape.num_layers, shape.num_experts, speeds.tolist())
    found = (placed.num_layers, placed.num_experts, placed.num_ranks)
    if found != (shape.num_layers, shape.num_experts, cluster.num_ranks):
        raise ConfigError(
            f"the placement is for (layers, experts, ranks) = {found}, the job has "
            f"{(shape.num_layers, shape.num_experts, cluster.num_ranks)}; plan again"
        )
    memory = [_room(shape, node.memory_gib, 0.0) for node in cluster.rank_nodes()]
    check_fit(shape, cluster, memory, 0.0)
    rows = float(cluster.num_ranks * shape.top_k)
    load = np.full((shape.num_layers, shape.num_experts), rows / shape.num_experts)
    node = np.zeros(len(speeds), dtype=np.int64)
    plan = as_plan(placed, 1 / speeds, np.zeros(len(speeds)), node, load)
    return judged(shape, cluster, rates.speeds_only(shape), plan, memory, rows, "all experts alike")


def rank_rows(planned: Planned) -> list[dict[str, Any]]:
    """One row per rank."""
    shape, plan = planned.shape, planned.plan
    slots = np.bincount(plan.slot_rank, minlength=plan.num_ranks)
    tokens = np.take_along_axis(plan.load, plan.slot_expert.astype(np.int64), axis=1) * plan.slot_share
    rows = np.bincount(plan.slot_rank, tokens.sum(axis=0), plan.num_ranks)
    found = []
    for rank, (node, speed) in enumerate(zip(planned.cluster.rank_nodes(), planned.cluster.rank_speeds(), strict=True)):
        experts = float(slots[rank] * shape.expert_bytes_on(node) * shape.num_layers)
        left = None if node.memory_gib is None else node.memory_gib * GIB - shape.dense_bytes - experts
        found.append(
            {
                "rank": rank,
                "node": node.name,
                "speed": speed,
                "slots": int(slots[rank]),
                "dense_bytes": shape.dense_bytes,
                "expert_bytes": experts,
                "expert_dtype": shape.held_on(node),
                "left_bytes": left,
                "share_of_rows": float(rows[rank] / rows.sum()),
                "time": float(planned.times[rank]),
                "even_time": float(planned.even_times[rank]),
            }
        )
    return found


def report(planned: Planned) -> dict[str, Any]:
    """What --json prints. Times are predicted, of one step's expert layers, in `unit`."""
    plan = planned.plan
    return {
        "model": planned.shape.__dict__ | {"expert_bytes": planned.shape.expert_bytes},
        "load": planned.source,
        "rates": planned.rates.__dict__,
        "slots": plan.num_slots,
        "policy": plan.policy,
        "step": planned.step,
        "even_step": planned.even_step,
        "bound": planned.bound,
        "within": planned.step / planned.bound - 1 if planned.bound else 0.0,
        "balancedness": plan.balancedness(),
        "limits": bounds.limits(plan.load, plan.ranks),
        "planner_ms": plan.milliseconds,
        "ranks": rank_rows(planned),
    }


def render(planned: Planned) -> str:
    shape, plan, rated = planned.shape, planned.plan, planned.rates
    rows = rank_rows(planned)
    gib = [f"{shape.dense_bytes / GIB:.1f}", f"{shape.expert_bytes * shape.num_layers / GIB:.2f}"]
    lines = [
        f"model: {shape.name}: {shape.num_layers} expert layers of {shape.num_experts} experts, top-{shape.top_k}; "
        f"dense part {gib[0]} GiB on every rank, an expert {gib[1]} GiB in all layers ({shape.stored})",
        f"load: {planned.source}; {planned.rows_per_step:,.0f} rows a step and layer",
        f"rates: {rated.source}",
        f"{'ranks':>9} {'node':<14}{'speed':>7}{'slots':>9}{'experts GiB':>13}{'left GiB':>10}{'share':>8}"
        f"{'time':>12}{'even split':>13}",
    ]
    for group in _groups(rows):
        slots = sorted({row["slots"] for row in group})
        left = min((row["left_bytes"] for row in group if row["left_bytes"] is not None), default=None)
        name = f"{group[0]['rank']}" if len(group) == 1 else f"{group[0]['rank']}-{group[-1]['rank']}"
        lines.append(
            f"{name:>9} {group[0]['node']:<14}{group[0]['speed']:>7g}"
            f"{'-'.join(map(str, dict.fromkeys([slots[0], slots[-1]]))):>9}"
            f"{max(row['expert_bytes'] for row in group) / GIB:>13.1f}"
            f"{'unknown' if left is None else f'{left / GIB:.1f}':>10}"
            f"{sum(row['share_of_rows'] for row in group):>8.1%}"
            f"{_time(max(row['time'] for row in group), rated.unit):>12}"
            f"{_time(max(row['even_time'] for row in group), rated.unit):>13}"
        )
    limits = ", ".join(f"{what} in {n} layers" for what, n in bounds.limits(plan.load, plan.ranks).items())
    over = planned.step / planned.bound - 1 if planned.bound else 0.0
    lines += [
        f"predicted: expert layers of a step {_time(planned.step, rated.unit)} (slowest rank of each layer), "
        f"even split {_time(planned.even_step, rated.unit)}; no placement can be below "
        f"{_time(planned.bound, rated.unit)}: within {over:.2%} of optimal",
        f"what limits it: {limits}",
        f"policy {plan.policy}, {plan.num_slots} slots a layer, planned in {plan.milliseconds:.0f} ms, "
        f"{placements.engine()}",
    ]
    if any(row["left_bytes"] is None for row in rows):
        lines.append("memory of some nodes is not in the cluster file (memory_gib): their fit was not checked")
    if planned.cluster.links and rated.unit == "s":
        crossings = together(planned.cluster, shape.top_k)
        lines.append(
            f"links: a row of {rated.bytes_per_row / 1024:.1f} KiB there and back, {crossings:.2f} crossings per "
            "selected expert (a token's experts on one node travel together)"
        )
    elif planned.cluster.links:
        lines.append("links are left out where nothing but speeds is known")
    else:
        lines.append("no links in the cluster file: rows between nodes cost nothing in this prediction")
    return "\n".join(lines)


def _groups(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Ranks one by one where they are few, else the ranks of each node together."""
    if len(rows) <= 16:
        return [[row] for row in rows]
    names = list(dict.fromkeys(row["node"] for row in rows))
    return [[row for row in rows if row["node"] == name] for name in names]


def _time(value: float, unit: str) -> str:
    return f"{value:.4g} rows" if unit == "rows" else f"{value * 1e3:,.2f} ms"

"""`moe-launch bench plan`: placements and how near to a proven bound they are, beside EPLB's greedy; no device needed.

Loads come from --trace (SGLang's logical_count JSON or our .npz), else a made-up one stands in. "EPLB's greedy" is
this repository's own program of EPLB's published description, in plain Python with equal shares.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ...experts import placement, traces
from ...experts.placement import eplb, nodes
from .model import machine_line

SLOTS, GIB, EXPERT_BYTES = 288, 2**30, 3 * 7168 * 2048  # an expert of DeepSeek-V3 in FP8


def read_loads(paths: list[Path]) -> dict[str, np.ndarray]:
    """Loads [L, E] by name; without files, a made-up one and three that drift away from it."""
    if paths:
        return {path.stem: traces.read_load(path).total for path in paths}
    base, random = traces.synthetic_load(), np.random.default_rng(1)
    drifts = {f"synthetic, drift {d}": base * random.lognormal(0, d, base.shape) for d in (0.1, 0.3, 0.5)}
    return {"synthetic": base} | drifts


def timed(work: Callable[[], Any], repeat: int) -> tuple[Any, float]:
    """(result, median milliseconds) after a warm-up."""
    result, times = work(), []
    for _ in range(repeat):
        start = time.perf_counter()
        result = work()
        times.append((time.perf_counter() - start) * 1e3)
    return result, statistics.median(times)


def fresh(loads: dict[str, np.ndarray], repeat: int) -> list[dict[str, Any]]:
    """Equal ranks, planned and judged on the same load."""
    rows = []
    for name, load in loads.items():
        for ranks in (32, 72, 144):
            free, free_ms = timed(lambda: placement.plan(load, ranks, SLOTS), repeat)  # noqa: B023
            equal, equal_ms = timed(lambda: placement.plan(load, ranks, SLOTS, shares="equal"), repeat)  # noqa: B023
            start = time.perf_counter()
            table = eplb.greedy_tables(load, SLOTS, 1, 1, ranks)
            greedy_ms = (time.perf_counter() - start) * 1e3
            simple, bound = free.bound(simple=True).sum(), free.bound().sum()
            ideal = load.sum() / ranks
            rows.append(
                {
                    "load": name,
                    "ranks": ranks,
                    "simple_bound": {
                        "free": simple / free.times().max(axis=1).sum(),
                        "equal": simple / equal.times().max(axis=1).sum(),
                        "eplb": simple / ideal * eplb.table_balancedness(table, load, ranks),
                    },
                    "bound": {
                        "free": free.ratio(),
                        "equal": equal.ratio(),
                        "eplb": bound / ideal * eplb.table_balancedness(table, load, ranks),
                    },
                    "balancedness": free.balancedness(),
                    "milliseconds": {"free": free_ms, "equal": equal_ms, "eplb": greedy_ms},
                }
            )
    return rows


def shifted(loads: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Planned on other loads than the one it is judged on: balancedness."""
    rows = []
    for name, load in loads.items():
        others = {other: found for other, found in loads.items() if other != name}
        for ranks in (32, 144) if others else ():
            fits = [(other, found, placement.plan(found, ranks, SLOTS)) for other, found in others.items()]
            if len(others) > 1:
                scaled = np.stack([found / found.sum(axis=1, keepdims=True) for found in others.values()])
                fits.append(("all others", scaled.mean(axis=0), placement.plan(scaled, ranks, SLOTS)))
            for fit, found, plan in fits:
                table = eplb.greedy_tables(found, SLOTS, 1, 1, ranks)
                smooth = placement.plan(found, ranks, SLOTS, smoothing=0.3)
                rows.append(
                    {
                        "load": name,
                        "fitted_on": fit,
                        "policy": plan.policy,
                        "ranks": ranks,
                        "static": plan.balancedness(load),
                        "split": plan.balancedness(load, "split"),
                        "smoothed": smooth.balancedness(load, "split"),
                        "eplb": eplb.table_balancedness(table, load, ranks),
                    }
                )
    plan = placement.plan(next(iter(loads.values())), 32, SLOTS)
    micros = timed(lambda: [placement.split(plan.load[0], (plan, 0)) for _ in range(100)], 5)[1] * 10
    return [*rows, {"split_microseconds_per_layer": micros}]


def by_nodes(load: np.ndarray, tokens: int) -> list[dict[str, Any]]:
    """4 nodes of 8 ranks: balancedness and crossings between nodes per token, on a synthetic group-limited routing."""
    load = load[::6]
    ids = traces.synthetic_routing(load, tokens)
    judged = traces.synthetic_routing(load, tokens, seed=1)  # other tokens than the ones planned on
    ranks = [placement.Rank(slots=9, node=rank // 8) for rank in range(32)]
    group_E = np.arange(load.shape[1]) * 8 // load.shape[1]
    slot_node, part = np.arange(SLOTS) // 72, np.full(4, 0.25)

    def row(what: str, balancedness: float, expert: np.ndarray, share: np.ndarray) -> dict[str, Any]:
        taken = [nodes.replicas_taken(judged[:, i], expert[i], share[i]) for i in range(len(load))]
        crossings = [nodes.internode_tokens(slot_node, found, 4, part) for found in taken]
        return {"placement": what, "balancedness": balancedness, "crossings_per_token": float(np.mean(crossings))}

    rows = []
    for what, groups, on_nodes in (("EPLB's greedy, groups on nodes", 8, 4), ("EPLB's greedy, global", 1, 1)):
        table = eplb.greedy_tables(load, SLOTS, groups, on_nodes, 32)
        share = np.take_along_axis(1 / eplb.invert(table, load.shape[1])[1], table, axis=1)
        rows.append(row(what, eplb.table_balancedness(table, load, 32), table, share))
    plan = placement.plan(load, ranks)
    rows.append(row("fast", plan.balancedness(), plan.slot_expert, plan.slot_share))
    for spread in (0.005, 0.02, 0.05, 0.1, 0.2, 0.4):
        plan = placement.plan(load, ranks, routing=ids, groups=group_E, spread=spread)
        rows.append(row(f"nodes, spread {spread}", plan.balancedness(), plan.slot_expert, plan.slot_share))
    for spread in (0.005, 0.02, 0.1, 0.4):
        plan = placement.plan(load, ranks, policy="nodes", groups=group_E, spread=spread)
        rows.append(row(f"nodes, groups only, spread {spread}", plan.balancedness(), plan.slot_expert, plan.slot_share))
    return rows


def unequal(load: np.ndarray, repeat: int) -> list[dict[str, Any]]:
    """24 ranks: 8 each of speed 1, 0.5, 0.25 with 64, 48, 32 GiB; time over the bound, EPLB's equal split beside it."""
    kinds = ((1.0, 64), (0.5, 48), (0.25, 32))
    ranks = [placement.Rank(speed=speed, memory_bytes=gib * GIB) for speed, gib in kinds for _ in range(8)]
    cost = np.array([1 / rank.speed for rank in ranks])
    rows = []
    for slots in (SLOTS, None):
        plan, ms = timed(lambda: placement.plan(load, ranks, slots, bytes_per_expert=EXPERT_BYTES), repeat)  # noqa: B023
        row = {"slots": plan.num_slots, "over_bound": 1 / plan.ratio() - 1, "milliseconds": ms}
        if plan.num_slots % len(ranks) == 0:
            table = eplb.greedy_tables(load, plan.num_slots, 1, 1, len(ranks))
            copies = eplb.invert(table, load.shape[1])[1]
            tokens = np.take_along_axis(load / copies, table, axis=1).reshape(len(load), len(ranks), -1).sum(axis=2)
            row["eplb_over_bound"] = float((tokens * cost).max(axis=1).sum() / plan.bound().sum() - 1)
        rows.append(row)
    return rows


def large(repeat: int) -> list[dict[str, Any]]:
    """61 layers of 256 experts on many ranks: milliseconds, and the process's peak memory so far."""
    load, rows = traces.synthetic_load(61), []
    for ranks, slots in ((256, 512), (1024, 1024), (1024, 2048), (4096, 4096), (4096, 8192)):
        print(f"{ranks} ranks ...", file=sys.stderr, flush=True)
        plan, ms = timed(lambda: placement.plan(load, ranks, slots), max(1, repeat // 3))  # noqa: B023
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        rows.append({"ranks": ranks, "slots": slots, "ratio": plan.ratio(), "milliseconds": ms, "peak_bytes": peak})
    return rows


def render(report: dict[str, Any]) -> str:
    lines = [f"machine: {report['machine']}; {report['engine']}", ""]
    lines.append(
        f"{SLOTS} slots, equal ranks, planned on the load it is judged on: sum of bounds / sum of slowest ranks"
    )
    lines.append(
        f"{'load':26}{'ranks':>6} |{'free':>8}{'equal':>8}{'EPLB':>8} simple bound |{'free':>8}{'equal':>8}{'EPLB':>8}"
        f" full bound |{'free ms':>9}{'equal ms':>10}{'EPLB ms':>9}"
    )
    for row in report["fresh"]:
        cells = ["".join(f"{row[bound][who]:8.4f}" for who in ("free", "equal", "eplb")) for bound in BOUNDS]
        ms = row["milliseconds"]
        lines.append(
            f"{row['load'][:25]:26}{row['ranks']:6} |{cells[0]}{'':13} |{cells[1]}{'':11} |"
            f"{ms['free']:9.1f}{ms['equal']:10.1f}{ms['eplb']:9.0f}"
        )
    lines += [
        "",
        "planned on other loads: balancedness (split: shares per batch; smoothed: fast, smoothing 0.3, split)",
    ]
    lines.append(
        f"{'load':26}{'planned on':26}{'policy':8}{'ranks':>6}{'static':>9}{'split':>9}{'smoothed':>10}{'EPLB':>9}"
    )
    for row in report["shifted"][:-1]:
        lines.append(
            f"{row['load'][:25]:26}{row['fitted_on'][:25]:26}{row['policy']:8}{row['ranks']:6}"
            f"{row['static']:9.4f}{row['split']:9.4f}{row['smoothed']:10.4f}{row['eplb']:9.4f}"
        )
    lines.append(f"split: {report['shifted'][-1]['split_microseconds_per_layer']:.0f} microseconds per layer")
    lines += ["", "4 nodes of 8 ranks, synthetic group-limited routing, every sixth layer"]
    lines.append(f"{'placement':34}{'balancedness':>14}{'crossings per token':>22}")
    for row in report["nodes"]:
        lines.append(f"{row['placement']:34}{row['balancedness']:14.4f}{row['crossings_per_token']:22.3f}")
    lines += ["", "24 ranks of speed 1, 0.5, 0.25 with 64, 48, 32 GiB: slowest rank over the bound"]
    for row in report["unequal"]:
        peer = f"; EPLB's equal split {100 * row['eplb_over_bound']:.1f} %" if "eplb_over_bound" in row else ""
        lines.append(f"{row['slots']} slots: {100 * row['over_bound']:.2f} % ({row['milliseconds']:.1f} ms){peer}")
    lines += ["", f"61 layers of 256 experts{'':5}{'slots':>8}{'ratio':>9}{'ms':>9}{'peak MB':>10}"]
    for row in report["large"]:
        lines.append(
            f"{row['ranks']:>15} ranks{'':8}{row['slots']:>8}{row['ratio']:9.4f}{row['milliseconds']:9.0f}"
            f"{row['peak_bytes'] / 1e6:10.0f}"
        )
    return "\n".join(lines)


BOUNDS = ("simple_bound", "bound")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="moe-launch bench plan", description=__doc__)
    parser.add_argument("--trace", type=Path, nargs="+", default=[], help="load traces: SGLang JSON or .npz")
    parser.add_argument("--repeat", type=int, default=9, help="timed runs after the warm-up")
    parser.add_argument("--tokens", type=int, default=2048, help="of the synthetic routing")
    parser.add_argument("--skip-large", action="store_true", help="leave out the 1,024 and 4,096 ranks")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    loads = read_loads(arguments.trace)
    report: dict[str, Any] = {"machine": machine_line()}
    steps: dict[str, Callable[[], Any]] = {
        "fresh": lambda: fresh(loads, arguments.repeat),
        "shifted": lambda: shifted(loads),
        "nodes": lambda: by_nodes(next(iter(loads.values())), arguments.tokens),
        "unequal": lambda: unequal(next(iter(loads.values())), arguments.repeat),
        "large": lambda: [] if arguments.skip_large else large(arguments.repeat),
    }
    for name, step in steps.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        report[name] = step()
    report["engine"] = placement.engine()
    print(json.dumps(report) if arguments.json else render(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`moe-launch bench experts`: one expert's product by several torch paths, beside the time to read its weights.

Experts are visited in turn so that weights come from memory, as they do in a model; median over passes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from .model import machine_line


def subjects(weights: Any, rows: int) -> dict[str, Callable[[int], Any]]:
    """Each: a function of the expert's number that multiplies `rows` rows by that expert's weights [E, out, in]."""
    import torch
    import torch.nn.functional as F

    num_experts, _, width = weights.shape
    x = torch.randn(rows, width).to(weights.dtype)
    x_float, converted = x.float(), torch.empty(weights.shape[1:])
    every = x.repeat(num_experts, 1)
    ends = torch.arange(1, num_experts + 1, dtype=torch.int32) * rows
    made: dict[str, Callable[[int], Any]] = {
        "linear": lambda e: F.linear(x, weights[e]),
        "convert to fp32": lambda e: F.linear(x_float, converted.copy_(weights[e])),
        "read weights": lambda e: weights[e].view(torch.int32).sum(),
    }
    if hasattr(F, "grouped_mm"):
        # One call for all experts; its time is shared out over them.
        made["grouped_mm"] = lambda e: F.grouped_mm(every, weights.transpose(1, 2), offs=ends) if e == 0 else None
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        packed = [torch.ops.mkldnn._reorder_linear_weight(weights[e].clone(), rows) for e in range(num_experts)]
        made["oneDNN packed"] = lambda e: torch.ops.mkldnn._linear_pointwise(x, packed[e], None, "none", [], "")
    return made


def measure(product: Callable[[int], Any], num_experts: int, passes: int) -> float:
    """Median seconds per expert."""
    times = []
    for _ in range(passes + 1):
        start = time.perf_counter()
        for expert in range(num_experts):
            product(expert)
        times.append((time.perf_counter() - start) / num_experts)
    return statistics.median(times[1:])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="moe-launch bench experts", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--width", type=int, default=1024, help="rows and columns of an expert's matrix")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    import torch

    torch.set_num_threads(arguments.threads)
    weights = torch.randn(arguments.experts, arguments.width, arguments.width).bfloat16()
    table: dict[int, dict[str, float]] = {}
    with torch.inference_mode():
        for rows in arguments.rows:
            print(f"{rows} rows ...", file=sys.stderr, flush=True)
            table[rows] = {
                name: measure(product, arguments.experts, arguments.passes)
                for name, product in subjects(weights, rows).items()
            }
    if arguments.json:
        print(json.dumps({"machine": machine_line(), "threads": arguments.threads, "seconds": table}))
        return 0
    print(f"machine: {machine_line()}; {arguments.threads} threads, bf16 {arguments.width} x {arguments.width}")
    names = list(next(iter(table.values())))
    print(f"{'rows':>6}" + "".join(f"{name:>18}" for name in names) + "   (microseconds per expert)")
    for rows, row in table.items():
        print(f"{rows:>6}" + "".join(f"{row[name] * 1e6:>18.0f}" for name in names))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`moe-launch bench experts`: one expert's product by several paths, beside the time to read its weights.

Experts are visited in turn so that weights come from memory, as they do in a model. All paths take turns in every pass;
median over passes. `--layer` measures a whole expert layer of real size instead (expert_layer.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ...core.errors import ConfigError
from . import expert_layer
from .model import machine_line

READ, MATMUL, OURS = "read weights", "matmul", "C"
OURS_IN_BLOCKS = {"fp8": "C, FP8 weights", "int8": "C, INT8 weights"}
_MATMUL_ROWS = 1024  # at which torch's matmul of this shape is at its best rate


def subjects(weights: Any, blocks: dict[str, tuple[Any, Any]], rows: int) -> dict[str, Callable[[int], Any]]:
    """Each: a function of the expert's number that multiplies `rows` rows by that expert's weights [E, out, in].

    blocks: the same in each of 8 bits, with their scales.
    """
    import numpy as np
    import torch
    import torch.nn.functional as F

    from ...core import native
    from ...experts.compute import product

    num_experts, _, width = weights.shape
    x = torch.randn(rows, width).to(weights.dtype)
    x_float, converted = x.float(), torch.empty(weights.shape[1:])
    every = x.repeat(num_experts, 1)
    ends = torch.arange(1, num_experts + 1, dtype=torch.int32) * rows
    words = weights.view(torch.int64).numpy()
    made: dict[str, Callable[[int], Any]] = {
        "linear": lambda e: F.linear(x, weights[e]),
        "convert to fp32": lambda e: F.linear(x_float, converted.copy_(weights[e])),
        READ: lambda e: np.bitwise_xor.reduce(words[e], axis=None),  # the fastest way to touch all, of several tried
    }
    if native.extension is not None:
        every_count = np.full(num_experts, rows, dtype=np.int64)

        # One call for all experts, as in a layer; its time is shared out over them.
        def ours(weights: Any, scale: Any) -> Callable[[int], Any]:
            return lambda e: product(every, None, weights, scale, every_count) if e == 0 else None

        made[OURS] = ours(weights, None)
        made |= {OURS_IN_BLOCKS[form]: ours(*stored) for form, stored in blocks.items()}
    if hasattr(F, "grouped_mm"):
        made["grouped_mm"] = lambda e: F.grouped_mm(every, weights.transpose(1, 2), offs=ends) if e == 0 else None
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        packed = [torch.ops.mkldnn._reorder_linear_weight(weights[e].clone(), rows) for e in range(num_experts)]
        made["oneDNN packed"] = lambda e: torch.ops.mkldnn._linear_pointwise(x, packed[e], None, "none", [], "")
    return made


def measure(products: dict[str, Callable[[int], Any]], num_experts: int, passes: int) -> dict[str, float]:
    """Median seconds per expert of each; they take turns in every pass."""
    times: dict[str, list[float]] = {name: [] for name in products}
    for _ in range(passes + 1):
        for name, product in products.items():
            start = time.perf_counter()
            for expert in range(num_experts):
                product(expert)
            times[name].append((time.perf_counter() - start) / num_experts)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def measure_table(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds per expert by rows and path, and the rate of the matmul in multiply-adds per second."""
    import torch
    import torch.nn.functional as F

    from ...core import native
    from ...experts.blocks import FORMATS, quantize_blocks

    torch.set_num_threads(arguments.threads)
    weights = torch.randn(arguments.experts, arguments.width, arguments.width).bfloat16()
    blocks = {}
    for form, stored in FORMATS.items():
        quantised, scales = zip(*(quantize_blocks(weight, to=stored) for weight in weights), strict=True)
        blocks[form] = (torch.stack([q.view(torch.uint8) for q in quantised]).view(stored), torch.stack(scales))
    table: dict[int, dict[str, float]] = {}
    with torch.inference_mode():
        x = torch.randn(_MATMUL_ROWS, arguments.width).bfloat16()
        seconds = measure({MATMUL: lambda e: F.linear(x, weights[e])}, min(8, arguments.experts), arguments.passes)
        for rows in arguments.rows:
            print(f"{rows} rows ...", file=sys.stderr, flush=True)
            table[rows] = measure(subjects(weights, blocks, rows), arguments.experts, arguments.passes)
    return {
        "machine": machine_line(),
        "threads": arguments.threads,
        "width": arguments.width,
        "kernel": native.describe(),
        "matmul_per_s": _MATMUL_ROWS * arguments.width**2 / seconds[MATMUL],
        "seconds": table,
    }


def render(report: dict[str, Any]) -> str:
    width, rate = report["width"], report["matmul_per_s"]
    lines = [
        f"machine: {report['machine']}; {report['threads']} threads, bf16 {width} x {width}; {report['kernel']}",
        f"torch's bf16 matmul of {_MATMUL_ROWS} rows: {rate / 1e9:.0f} G multiply-adds/s",
    ]
    names = list(next(iter(report["seconds"].values())))
    halved = OURS_IN_BLOCKS.values()
    shares = [name for name in ("linear", OURS, *halved) if name in names]
    lines.append(
        f"{'rows':>6}" + "".join(f"{name:>18}" for name in names) + "   (microseconds per expert)"
        "   share of the floor: " + ", ".join(shares)
    )
    for rows, row in report["seconds"].items():
        # Weights in 8 bits are half the bytes. The floor is the later of reading the weights and multiplying them.
        floors = {name: max(row[READ] / (2 if name in halved else 1), int(rows) * width**2 / rate) for name in shares}
        lines.append(
            f"{rows:>6}"
            + "".join(f"{row[name] * 1e6:>18.0f}" for name in names)
            + " " * 28
            + "  ".join(f"{floors[name] / row[name]:.2f}" for name in shares)
        )
    return "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"bench experts: {message}")


def size(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = _Parser(prog="moe-launch bench experts", description=__doc__)
    parser.add_argument("--rows", type=size, nargs="+", default=[1, 2, 4, 8, 16, 32, 128])
    parser.add_argument("--experts", type=size, help="default: 64; with --layer 256")
    parser.add_argument("--width", type=size, default=1024, help="rows and columns of an expert's matrix")
    parser.add_argument("--threads", type=size, default=1, help="of this process; with --layer of each rank")
    parser.add_argument("--passes", type=size, default=5)
    parser.add_argument("--json", action="store_true")
    layer = parser.add_argument_group("a whole layer")
    layer.add_argument("--layer", action="store_true", help="DeepSeek-V3's expert layer in FP8, over several ranks")
    layer.add_argument("--ranks", type=size, default=2)
    layer.add_argument("--hidden", type=size, default=7168)
    layer.add_argument("--intermediate", type=size, default=2048)
    layer.add_argument("--top-k", type=size, default=8)
    layer.add_argument("--tokens", type=size, nargs="+", default=[1, 32, 1024], help="of all ranks together")
    layer.add_argument("--memory-gib", type=size, default=20, help="refuse what would need more, in all ranks")
    arguments = parser.parse_args(argv)
    arguments.experts = arguments.experts or (256 if arguments.layer else 64)
    if arguments.layer:
        report, text = expert_layer.run(arguments), expert_layer.render
    else:
        report, text = measure_table(arguments), render
    print(json.dumps(report) if arguments.json else text(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())

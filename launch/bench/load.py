"""`moe-launch bench load`: a rank's peak memory while loading, beside the bytes it must hold.

The floor is this rank's experts plus the non-expert tensors, as they lie in memory afterwards. Peak memory is the
kernel's own high-water mark of the process (VmHWM), less what the process held before loading.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ...core import environment
from ...core.errors import MoeRuntimeError
from ..machine import available_cores, free_port, reset_peak_memory, resident_bytes
from .model import SHAPE, machine_line, make_checkpoint


def measure_rank(folder: Path) -> dict[str, float]:
    """Runs on every rank: load the checkpoint and report bytes."""
    import torch

    import moe_runtime

    with moe_runtime.init() as runtime:
        if not reset_peak_memory():
            raise MoeRuntimeError("bench load: this kernel resets no high-water mark of memory; this bench needs Linux")
        before = resident_bytes()
        start = time.perf_counter()
        model = runtime.load_model(folder, dtype=torch.bfloat16)
        seconds = time.perf_counter() - start
        peak = resident_bytes(peak=True)
        held = {id(t.untyped_storage()): t.untyped_storage().nbytes() for t in model.state_dict().values()}
        return {
            "rank": runtime.rank,
            "must_hold_bytes": sum(held.values()),
            "peak_bytes": peak - before,
            "after_bytes": resident_bytes() - before,
            "seconds": seconds,
        }


def run(folder: Path, ranks: int) -> list[dict[str, Any]]:
    """Start the ranks, wait, and return what each measured. Raises MoeRuntimeError when one fails."""
    port, threads = free_port(), max(1, available_cores() // ranks)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "moe_runtime.launch.bench.load", "--rank-of", str(folder)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment.inherited(
                environment.rank_environment(rank, ranks, rank, ranks, "127.0.0.1", port, threads)
            ),
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=900)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    failed = [rank for rank, process in enumerate(processes) if process.returncode]
    if failed:
        raise MoeRuntimeError(f"bench load: rank {failed[0]} failed; its traceback is above")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="moe-launch bench load", description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=10, help="of the random model; 10 make a checkpoint of 2.2 GB")
    parser.add_argument("--model", type=Path, help="measure this checkpoint instead of a random one")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.rank_of:
        print(json.dumps(measure_rank(arguments.rank_of)))
        return 0
    with tempfile.TemporaryDirectory(prefix="moe-bench-") as scratch:
        folder = arguments.model or Path(scratch)
        if not arguments.model:
            print("writing a random checkpoint ...", file=sys.stderr, flush=True)
            make_checkpoint(folder, {**SHAPE, "num_hidden_layers": arguments.layers})
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        rows = run(folder, arguments.ranks)
    if arguments.json:
        print(json.dumps({"machine": machine_line(), "checkpoint_bytes": size, "ranks": rows}))
        return 0
    print(f"machine: {machine_line()}; checkpoint of {size / 1e9:.2f} GB on {arguments.ranks} ranks")
    print(f"{'rank':>4}{'must hold':>14}{'peak while loading':>22}{'ratio':>8}{'seconds':>10}")
    for row in rows:
        ratio = row["peak_bytes"] / row["must_hold_bytes"]
        print(
            f"{row['rank']:>4}{row['must_hold_bytes'] / 1e6:>11.0f} MB{row['peak_bytes'] / 1e6:>19.0f} MB"
            f"{ratio:>8.3f}{row['seconds']:>10.1f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

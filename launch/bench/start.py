"""From the command to the first token: how long `moe-launch generate` takes to start on 1, 2 and 4 ranks, and on what.

Beside it, in turns: plain transformers in one process, with the same checkpoint and prompt. Phases are told apart by
the lines that the job prints, stamped as they arrive.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from ...core.errors import MoeRuntimeError
from ..machine import free_port
from .model import SHAPE, machine_line, make_checkpoint

_PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
print("moe-launch: imported", file=sys.stderr, flush=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
print("[rank 0] loaded", file=sys.stderr, flush=True)
ids = torch.tensor([list(b"Hello")])
print(model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1].item(), flush=True)
"""
PHASES = ("launcher", "ranks up and model loaded", "first token", "end")


def stamp(command: Sequence[str], timeout_s: float = 300.0) -> list[float]:
    """Run a command; seconds to: the launcher's first line, rank 0's first, the result on stdout, the end."""
    began, seen = time.perf_counter(), dict[str, float]()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def follow(stream: str) -> None:
        for line in process.stdout if stream == "out" else process.stderr:  # type: ignore[union-attr]
            words = line.decode(errors="replace")
            kind = "token" if stream == "out" else "rank" if words.startswith("[rank 0]") else "launcher"
            seen.setdefault(kind, time.perf_counter() - began)

    threads = [threading.Thread(target=follow, args=(stream,), daemon=True) for stream in ("out", "err")]
    for thread in threads:
        thread.start()
    try:
        process.wait(timeout_s)
    finally:
        process.kill()
    for thread in threads:
        thread.join(5)
    if process.returncode or len(seen) < 3:
        raise MoeRuntimeError(f"bench start: exit code {process.returncode} from {' '.join(command)}")
    return [seen["launcher"], seen["rank"], seen["token"], time.perf_counter() - began]


def subjects(folder: Path, ranks: Sequence[int]) -> dict[str, list[str]]:
    """What is timed, by name."""
    launch = [sys.executable, "-m", "moe_runtime.launch.cli", "generate"]
    job = ["--model", str(folder), "--tokenizer", "bytes", "--prompt", "Hello", "--max-new-tokens", "1"]
    commands = {"transformers alone": [sys.executable, "-c", _PLAIN, str(folder)]}
    for count in ranks:
        number = ["--nproc-per-node", str(count)]
        plural = "s"[: count != 1]
        commands[f"{count} rank{plural}"] = [*launch, *number, *job]
        meeting = ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--node-rank", "0"]
        commands[f"{count} rank{plural}, torchrun"] = [*launch, "--engine", "torchrun", *meeting, *number, *job]
    return commands


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="moe-launch bench start", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3, help="all subjects take turns in each; the median is shown")
    parser.add_argument("--layers", type=int, default=2, help="of the random model")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    taken: dict[str, list[list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="moe-bench-") as scratch:
        print("writing a random checkpoint ...", file=sys.stderr, flush=True)
        make_checkpoint(Path(scratch), {**SHAPE, "num_hidden_layers": arguments.layers})
        for number in range(arguments.rounds):
            for name, command in subjects(Path(scratch), arguments.ranks).items():
                print(f"round {number + 1} of {arguments.rounds}: {name}", file=sys.stderr, flush=True)
                taken.setdefault(name, []).append(stamp(command))
    rows = {name: [statistics.median(phase) for phase in zip(*runs, strict=True)] for name, runs in taken.items()}
    if arguments.json:
        table = {name: dict(zip(PHASES, row, strict=True)) for name, row in rows.items()}
        print(json.dumps({"machine": machine_line(), "seconds": table}))
        return 0
    print(f"machine: {machine_line()}; seconds from the command, median of {arguments.rounds}")
    print(f"{'':<20}" + "".join(f"{phase:>27}" for phase in PHASES))
    for name, row in rows.items():
        print(f"{name:<20}" + "".join(f"{seconds:>27.2f}" for seconds in row))
    return 0


if __name__ == "__main__":
    sys.exit(main())

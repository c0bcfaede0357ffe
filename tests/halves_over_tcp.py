"""Whether two halves by turns pay over a slow network: `python tests/halves_over_tcp.py --mbit 300`. Needs root.

Two hosts made of network namespaces, one rank of one thread each, links shaped by tbf; `moe-launch generate` of the
same prompts with --halves off and auto, in turns. docs/generating.md has the figures.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from hosts import MOE_LAUNCH, Hosts

from moe_runtime.launch.bench.generate import SHAPE
from moe_runtime.launch.bench.model import machine_line, make_checkpoint

WIDE = {
    "hidden_size": 1024,
    "num_hidden_layers": 6,
    "moe_intermediate_size": 256,
    "q_lora_rank": 256,
    "kv_lora_rank": 128,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mbit", type=int, default=300)
    parser.add_argument("--prompt-tokens", type=int, default=330)
    parser.add_argument("--new-tokens", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(machine_line(), f"{arguments.mbit} Mbit/s between two hosts")
    with tempfile.TemporaryDirectory() as scratch, Hosts(folder := Path(scratch), 2, mbit=arguments.mbit) as hosts:
        make_checkpoint(folder / "model", {**SHAPE, **WIDE})
        prompts = ("x" * (arguments.prompt_tokens + n % 7 - 3) for n in range(arguments.prompts))
        (folder / "in.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        nodes = (f'[[node]]\nname = "n{n}"\nhost = "{at}"\nvendor = "cpu"\n' for n, at in enumerate(hosts.addresses))
        (folder / "cluster.toml").write_text("".join(nodes))
        launch = ["--engine", "ssh", hosts.ssh_args, "--cluster", folder / "cluster.toml", "--threads-per-rank", "1"]
        job = ["--model", folder / "model", "--tokenizer", "bytes", "--input", folder / "in.jsonl", "--output",
               folder / "out.jsonl", "--prefill-chunk", "1024"]  # fmt: skip
        numbers = ["--max-new-tokens", arguments.new_tokens, "--batch-size", arguments.batch_size]
        for _ in range(arguments.rounds):
            for halves in ("off", "auto"):
                words = [*MOE_LAUNCH, "generate", *launch, *job, *numbers, "--halves", halves]
                ran = subprocess.run(list(map(str, words)), cwd=folder, capture_output=True, text=True)
                if ran.returncode:
                    sys.exit(ran.stderr)
                said = re.search(r"halves: .*", ran.stderr)[0]
                seconds = float(re.search(r"new tokens in ([\d.]+) s", ran.stderr)[1])
                print(f"--halves {halves:4}  {seconds:6.1f} s   {said}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`moe-launch bench generate`: tokens/s of many prompts with refill, beside fixed batches and plain transformers.

The three do the same work (greedy, every prompt its own number of new tokens) and take turns, round by round; what they
generate is compared. Fixed batches are transformers' own `generate` on a padded batch, as long as its longest takes.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from ...core.errors import ConfigError
from ..machine import available_cores
from .model import machine_line, make_checkpoint, say
from .processes import Processes

SHAPE = dict(
    vocab_size=258, hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=4, n_routed_experts=32, num_experts_per_tok=4, n_group=4, topk_group=2,
    first_k_dense_replace=1, n_shared_experts=1, q_lora_rank=96, kv_lora_rank=64, qk_rope_head_dim=32,
    qk_nope_head_dim=64, v_head_dim=64, eos_token_id=None, pad_token_id=257,
)  # fmt: skip
REFILL, FIXED, PLAIN = "refill", "fixed batches", "transformers, one process"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="moe-launch bench generate", description=__doc__)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=[4, 200], metavar=("FROM", "TO"))
    parser.add_argument("--new-tokens", type=int, nargs=2, default=[4, 64], metavar=("FROM", "TO"))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--batch-size", type=int, default=8, help="sequences a rank has at once; one process: all ranks'"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args(argv)
    if min(arguments.prompts, arguments.ranks, arguments.batch_size, arguments.rounds) < 1:
        raise ConfigError("bench generate: numbers must be at least 1")
    for name in ("prompt_tokens", "new_tokens"):
        least, most = getattr(arguments, name)
        if not 1 <= least <= most:
            raise ConfigError(
                f"bench generate: --{name.replace('_', '-')} {least} {most}: give two numbers, 1 <= FROM <= TO"
            )
    report = run(arguments)
    print(json.dumps(report) if arguments.json else render(report))
    return 0


def workload(arguments: argparse.Namespace) -> list[list]:
    """[prompt, new tokens] each; both lengths log-uniform, one token a character, in no order."""
    pick = random.Random(0)

    def length(least: int, most: int) -> int:
        return round(math.exp(pick.uniform(math.log(least), math.log(most))))

    return [
        [
            "".join(pick.choices("abcdefghijklmnopqrstuvwxyz", k=length(*arguments.prompt_tokens))),
            length(*arguments.new_tokens),
        ]
        for _ in range(arguments.prompts)
    ]


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure. Raises MoeRuntimeError when a rank fails."""
    cores = available_cores()
    work = workload(arguments)
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in (REFILL, FIXED, PLAIN)}
    with tempfile.TemporaryDirectory(prefix="moe-bench-") as scratch:
        say("writing a random checkpoint, starting the subjects ...")
        make_checkpoint(Path(scratch) / "model", SHAPE)
        (Path(scratch) / "work.json").write_text(json.dumps(work), encoding="utf-8")
        given = [scratch, arguments.batch_size]
        ranks = Processes("moe-runtime", "generate_ranks", arguments.ranks, max(1, cores // arguments.ranks), given)
        try:
            plain = Processes(
                PLAIN, "generate_ranks", 1, cores, [scratch, arguments.batch_size * arguments.ranks, PLAIN]
            )
            try:
                for number in range(arguments.rounds):
                    for name in answers:
                        answers[name].append((plain if name == PLAIN else ranks).ask(name)[0])
                        say(f"round {number + 1}/{arguments.rounds}  {name:26s} {answers[name][-1]['seconds']:.1f} s")
            finally:
                plain.close()
        finally:
            ranks.close()
    tokens = sum(new for _, new in work)
    rows = {}
    for name, found in answers.items():
        rates = [tokens / answer["seconds"] for answer in found]
        ours = [tokens / answer["seconds"] for answer in answers[REFILL]]
        rows[name] = {
            "tokens_per_s": {"median": statistics.median(rates), "min": min(rates), "max": max(rates)},
            "passes": found[0]["passes"],
            "refill_over_this": statistics.median(a / b for a, b in zip(ours, rates, strict=True)),
        }
    return {
        "machine": machine_line(),
        "shape": SHAPE,
        "prompts": arguments.prompts,
        "prompt_tokens": sum(len(prompt) for prompt, _ in work),
        "new_tokens": tokens,
        "ranks": arguments.ranks,
        "batch_size": arguments.batch_size,
        "rounds": arguments.rounds,
        "same_tokens": len({answer["digest"] for found in answers.values() for answer in found}) == 1,
        "subjects": rows,
    }


def render(report: dict[str, Any]) -> str:
    lines = [
        f"machine: {report['machine']}; {report['prompts']} prompts of {report['prompt_tokens']} tokens, "
        f"{report['new_tokens']} new tokens; {report['ranks']} ranks x {report['batch_size']} sequences, float32; "
        f"{report['rounds']} rounds, interleaved; median (min to max)",
        f"{'':28s}{'tokens/s':>24s}{'refill / this':>16s}{'passes':>9s}",
    ]
    for name, row in report["subjects"].items():
        rate = row["tokens_per_s"]
        shown = f"{rate['median']:.1f} ({rate['min']:.1f} to {rate['max']:.1f})"
        lines.append(f"{name:28s}{shown:>24s}{row['refill_over_this']:>16.2f}{row['passes']:>9d}")
    lines.append("all generated the same tokens" if report["same_tokens"] else "NOT all generated the same tokens")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

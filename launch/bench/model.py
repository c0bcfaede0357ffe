"""`moe-launch bench model`: tokens/s of a whole model, beside transformers alone and transformers' own EP, in one run.

The subjects are loaded side by side and measured in turn (A B C A B C ...), so that a machine whose speed drifts
treats them alike; ratios are taken round by round.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..machine import available_cores, processor_name
from .processes import Subject, spread
from .subjects import SUBJECTS

# 0.76 billion parameters in all, of which 0.70 in routed experts.
SHAPE = dict(
    vocab_size=16384, hidden_size=1024, intermediate_size=2048, moe_intermediate_size=512, num_hidden_layers=8,
    num_attention_heads=16, num_key_value_heads=16, n_routed_experts=64, num_experts_per_tok=8, n_group=8,
    topk_group=4, first_k_dense_replace=1, n_shared_experts=1, q_lora_rank=384, kv_lora_rank=256,
    qk_rope_head_dim=32, qk_nope_head_dim=64, v_head_dim=64, eos_token_id=None,
)  # fmt: skip


def make_checkpoint(folder: Path, shape: dict[str, Any] = SHAPE) -> None:
    """A random bf16 DeepSeek-V3 checkpoint of this shape, written by transformers itself."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v3", **shape), dtype=torch.bfloat16)
    model.save_pretrained(folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="moe-launch bench model",
        description="tokens/s of a random 0.76 B DeepSeek-V3 against transformers alone and transformers' own EP",
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=8, help="of all ranks together")
    parser.add_argument("--length", type=int, default=256, help="prompt tokens of a sequence")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    cores = available_cores()
    layout = {"moe-runtime": arguments.ranks, "transformers": 1, "transformers-ep": arguments.ranks}
    sizes = [arguments.sequences, arguments.length, arguments.new_tokens]
    subjects: list[Subject] = []
    with tempfile.TemporaryDirectory(prefix="moe-bench-") as scratch:
        folder = Path(scratch) / "model"
        say("writing a random checkpoint ...")
        make_checkpoint(folder)
        try:
            for name in SUBJECTS:
                say(f"loading {name} ...")
                threads = max(1, cores // layout[name])
                subjects.append(Subject(name, "subjects", layout[name], threads, [folder, threads, *sizes]))
            for number in range(arguments.rounds):
                for subject in subjects:
                    seconds = subject.run()
                    say(f"round {number + 1}/{arguments.rounds}  {subject.name:16s} {seconds}")
        finally:
            for subject in subjects:
                subject.close()
    report = make_report(subjects, arguments)
    print(json.dumps(report) if arguments.json else render(report))
    return 0


def make_report(subjects: list[Subject], arguments: argparse.Namespace) -> dict[str, Any]:
    tokens = {
        "prefill": arguments.sequences * arguments.length,
        "decode": arguments.sequences * arguments.new_tokens,
    }
    rows = {}
    for subject in subjects:
        row: dict[str, Any] = {"description": subject.description}
        for phase, count in tokens.items():
            rates = [count / seconds[f"{phase}_s"] for seconds in subject.seconds]
            ours = [count / seconds[f"{phase}_s"] for seconds in subjects[0].seconds]
            row[phase] = {
                "tokens_per_s": spread(rates),
                "ours_over_this": spread([a / b for a, b in zip(ours, rates, strict=True)]),
            }
        rows[subject.name] = row
    return {"machine": machine_line(), "shape": SHAPE, "rounds": arguments.rounds, "tokens": tokens, "subjects": rows}


def machine_line() -> str:
    """The machine that figures are told with."""
    return f"{available_cores()} cores, {processor_name()}, {platform.system()} {platform.machine()}"


def render(report: dict[str, Any]) -> str:
    lines = [f"machine: {report['machine']}; {report['rounds']} rounds, interleaved; median (min to max) tokens/s"]
    lines.append(f"{'':18s}{'prefill':>24s}{'decode':>24s}{'ours / this, prefill':>24s}{'decode':>10s}")
    for name, row in report["subjects"].items():
        cells = "".join(
            f"{row[p]['tokens_per_s']['median']:>10.1f} ({row[p]['tokens_per_s']['min']:.1f} to "
            f"{row[p]['tokens_per_s']['max']:.1f})".rjust(24)
            for p in ("prefill", "decode")
        )
        ratios = [row[p]["ours_over_this"]["median"] for p in ("prefill", "decode")]
        lines.append(f"{name:18s}{cells}{ratios[0]:>24.2f}{ratios[1]:>10.2f}")
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

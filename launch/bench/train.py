"""`moe-launch bench train`: seconds of a training step beside transformers' own EP and transformers alone.

The subjects train the same weights on the same tokens with the same optimizer, are loaded side by side and take turns
step by step; ratios are taken round by round. A subject whose losses or gradient norms are not the others' ends the
bench: it would be computing something else.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from ...core.errors import ConfigError, MoeRuntimeError
from ..machine import available_cores, free_gib
from . import train_layer
from .model import SHAPE, machine_line, make_checkpoint, say
from .processes import Subject, spread
from .subjects import SUBJECTS
from .train_ranks import PARTS

# bf16 rounds to 3 digits, and a near-tie rounded differently routes a token elsewhere.
LOSS_TOLERANCE, NORM_TOLERANCE = 0.005, 0.05
CHECKED_STEPS = 3  # rounding errors grow with every step that follows


def main(argv: list[str] | None = None, shape: dict[str, Any] = SHAPE) -> int:
    parser = argparse.ArgumentParser(prog="moe-launch bench train", description=__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="1: beside transformers alone only (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="after one that is not timed")
    parser.add_argument("--sequences", type=int, default=8, help="of all ranks together")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--layers", type=int, default=shape["num_hidden_layers"], help="fewer need less memory")
    parser.add_argument("--peers", nargs="+", choices=SUBJECTS[1:], default=SUBJECTS[1:], help="fewer need less memory")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument(
        "--malloc", choices=("system", "keep", "trim"), default="system",
        help="of all subjects: as the system has it; keep freed memory; or give it back after each step, so that more "
        "subjects fit, and fault it in again (default: system)",
    )  # fmt: skip
    parser.add_argument("--profile", action="store_true", help="also where moe-runtime's time goes")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args(argv)
    with contextlib.redirect_stdout(sys.stderr):  # transformers imports DeepSpeed where it is there, and that prints
        report = run(arguments, {**shape, "num_hidden_layers": arguments.layers})
    print(json.dumps(report) if arguments.json else render(report))
    return 0


def run(arguments: argparse.Namespace, shape: dict[str, Any]) -> dict[str, Any]:
    """Measure. Raises ConfigError for what cannot be, MoeRuntimeError when a rank fails or computes something else."""
    check(arguments, shape)
    began, cores = os.getloadavg()[0], available_cores()
    layout = {"moe-runtime": arguments.ranks}
    layout |= {name: 1 if name == "transformers" else arguments.ranks for name in arguments.peers}
    if arguments.ranks == 1 and layout.pop("transformers-ep", None):
        say("transformers-ep: left out, it needs 2 ranks")
    options = [arguments.sequences, arguments.length, arguments.learning_rate, arguments.profile]
    options.append(arguments.malloc == "trim")
    subjects: list[Subject] = []
    with tempfile.TemporaryDirectory(prefix="moe-bench-") as scratch:
        folder = Path(scratch) / "model"
        say("writing a random checkpoint ...")
        make_checkpoint(folder, shape)
        check_memory(folder, layout, arguments)
        try:
            for name, ranks in layout.items():
                say(f"loading {name} ...")
                threads = max(1, cores // ranks)
                given, keep = [folder, threads, *options], arguments.malloc == "keep"
                subjects.append(Subject(name, "train_ranks", ranks, threads, given, keep))
            for number in range(arguments.rounds + 1):
                for subject in subjects:
                    seconds = subject.run()
                    say(f"round {number}/{arguments.rounds}  {subject.name:16s} {seconds['step_s']:.2f} s")
                if number < CHECKED_STEPS:
                    check_equal(subjects)
        finally:
            for subject in subjects:
                subject.close()
    report = make_report(subjects, arguments, shape, began)
    if arguments.ranks > 1:
        say("one expert layer beside DeepSpeed's ...")
        layer = [shape[f] for f in ("n_routed_experts", "hidden_size", "moe_intermediate_size", "num_experts_per_tok")]
        tokens = arguments.sequences * arguments.length // arguments.ranks
        report["layer"] = train_layer.compare(arguments.ranks, layer, tokens, arguments.rounds)
    return report


def check(arguments: argparse.Namespace, shape: dict[str, Any]) -> None:
    """Raises ConfigError for what cannot be measured."""
    if min(arguments.ranks, arguments.rounds, arguments.length) < 1:
        raise ConfigError("bench train: --ranks, --rounds and --length must be at least 1")
    if arguments.layers <= shape["first_k_dense_replace"]:
        raise ConfigError(f"bench train: --layers must be above {shape['first_k_dense_replace']}, the dense ones")
    if arguments.sequences < 1 or arguments.sequences % arguments.ranks:
        raise ConfigError(f"bench train: --sequences must be a multiple of --ranks {arguments.ranks}")
    if shape["n_routed_experts"] % arguments.ranks:
        raise ConfigError(
            f"bench train: transformers-ep needs experts that divide evenly: --ranks {arguments.ranks} does not "
            f"divide {shape['n_routed_experts']}"
        )


def check_memory(folder: Path, layout: dict[str, int], arguments: argparse.Namespace) -> None:
    """Raises ConfigError where the subjects do not fit: weights and two moments of each, gradients and activations
    (of one at a time where freed memory is given back), and about 1 GiB in every process."""
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**30
    activations = arguments.sequences * arguments.length * arguments.layers / 4096  # in GiB, as measured with SHAPE
    at_once = 1 if arguments.malloc == "trim" else len(layout)
    needed = weights * 3 * len(layout) + (weights + activations) * at_once + sum(layout.values())
    free = free_gib()
    if free is not None and needed > free:
        raise ConfigError(
            f"bench train: {', '.join(layout)} need about {needed:.0f} GiB together and {free:.0f} are free; "
            "name fewer --peers, or fewer --layers, or give --malloc trim"
        )


def check_equal(subjects: list[Subject]) -> None:
    """Raises MoeRuntimeError where the latest step's loss or gradient norm is not that of the first subject."""
    step = len(subjects[0].answers)
    for what, of, tolerance in (("loss", loss_of, LOSS_TOLERANCE), ("gradient norm", norm_of, NORM_TOLERANCE)):
        ours = of(subjects[0].answers[-1])
        for subject in subjects[1:]:
            theirs = of(subject.answers[-1])
            if not abs(theirs - ours) <= tolerance * abs(ours):
                raise MoeRuntimeError(
                    f"bench train: step {step}: {subject.name} has {what} {theirs:.5f}, {subjects[0].name} {ours:.5f}; "
                    "they do not compute the same"
                )


def loss_of(answers: list[dict[str, Any]]) -> float:
    return sum(answer["loss"] for answer in answers)


def norm_of(answers: list[dict[str, Any]]) -> float:
    return answers[0]["norm"]


def make_report(
    subjects: list[Subject], arguments: argparse.Namespace, shape: dict[str, Any], load: float
) -> dict[str, Any]:
    tokens, rows = arguments.sequences * arguments.length, {}
    ours = [seconds["step_s"] for seconds in subjects[0].seconds[1:]]
    for subject in subjects:
        timed = subject.seconds[1:]
        steps = [seconds["step_s"] for seconds in timed]
        rows[subject.name] = {
            "description": subject.description,
            "step_s": spread(steps),
            "tokens_per_s": tokens / statistics.median(steps),
            "this_over_ours": spread([theirs / mine for theirs, mine in zip(steps, ours, strict=True)]),
            "parts_s": {part: statistics.median(seconds[f"{part}_s"] for seconds in timed) for part in PARTS},
            "peak_gib": sum(answer["peak_bytes"] for answer in subject.answers[-1]) / 2**30,
            "losses": [loss_of(answers) for answers in subject.answers],
            "norms": [norm_of(answers) for answers in subject.answers],
        }
    report = {
        "machine": machine_line(),
        "load_before": load,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "shape": shape,
        "ranks": arguments.ranks,
        "rounds": arguments.rounds,
        "malloc": arguments.malloc,
        "sequences": arguments.sequences,
        "length": arguments.length,
        "subjects": rows,
    }
    if arguments.profile:
        report["profile"] = profile_of(subjects[0])
    return report


def profile_of(subject: Subject) -> dict[str, float]:
    """Rank 0's median seconds of a step by span, and "rest": forward and backward in none of them."""
    steps = [answers[0] for answers in subject.answers[1:]]
    names = sorted({name for step in steps for name in step["spans"]})
    seconds = {name: statistics.median(step["spans"].get(name, 0.0) for step in steps) for name in names}
    rest = statistics.median(step["forward_s"] + step["backward_s"] - sum(step["spans"].values()) for step in steps)
    outside = {part: statistics.median(step[f"{part}_s"] for step in steps) for part in PARTS[2:]}
    return {**seconds, "rest of forward and backward": rest, **outside}


def render(report: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"machine: {report['machine']}; {versions}; load average before: {report['load_before']:.1f}",
        f"{report['shape']['num_hidden_layers']} layers, {report['sequences']} x {report['length']} tokens a step, "
        f"AdamW; malloc: {report['malloc']}; {report['rounds']} rounds, interleaved; median (min to max)",
        f"{'':17s}{'seconds a step':>24s}{'tokens/s':>10s}{'this / ours':>22s}"
        + "".join(f"{part:>11s}" for part in PARTS)
        + f"{'peak GiB':>10s}{'loss, first and last':>22s}",
    ]
    for name, row in report["subjects"].items():
        step, ratio, losses = row["step_s"], row["this_over_ours"], row["losses"]
        lines.append(
            f"{name:17s}"
            + f"{step['median']:.2f} ({step['min']:.2f} to {step['max']:.2f})".rjust(24)
            + f"{row['tokens_per_s']:>10.0f}"
            + f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})".rjust(22)
            + "".join(f"{row['parts_s'][part]:>11.2f}" for part in PARTS)
            + f"{row['peak_gib']:>10.1f}{losses[0]:>14.3f}{losses[-1]:>8.3f}"
        )
    lines.append("parts are each the slowest rank's; sync is part of backward where FSDP does it")
    if "profile" in report:
        total = sum(report["profile"].values())
        lines.append("where rank 0 of moe-runtime spends a step:")
        for name, seconds in sorted(report["profile"].items(), key=lambda item: -item[1]):
            lines.append(f"  {name:30s}{seconds:>8.3f} s{seconds / total:>8.1%}")
    if "layer" in report:
        lines.append(train_layer.render(report["layer"]))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

"""`moe-launch bench balance`: tokens/s of one expert layer on ranks of unequal speed, beside their own rates.

Two ranks of one thread; the second one's experts are slowed down (emulated: after computing for t seconds it waits
until t / speed have passed), so that the figures are measured times of real exchanges and real matmuls. In every round
each placement runs the same batch, and each rank alone the whole layer without exchange. What the ranks reach alone,
added up, is the reference.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from ...core.errors import ConfigError, MoeRuntimeError
from .balance_ranks import SUBJECTS
from .expert_layer import SHAPE
from .model import machine_line, say
from .processes import Processes

_RECORDED = (16, 2048)  # tokens with which the recorder and live moves are timed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="moe-launch bench balance",
        description="tokens/s of an expert layer on two ranks, the second slowed down, by placement and replica choice",
        epilog="example: moe-launch bench balance --speed 0.5 --rounds 7",
    )
    parser.add_argument("--speed", type=float, default=0.5, help="of the second rank, emulated (default: 0.5)")
    parser.add_argument("--tokens", type=int, default=2048, help="of both ranks together (default: 2048)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--skew", type=float, nargs="+", default=[0.0, 1.0], help="Zipf exponents (default: 0 and 1)")
    parser.add_argument("--slots", type=int, help="experts and replicas (default: half as many again as experts)")
    for name, default in zip(SHAPE, (64, 1024, 512, 8), strict=True):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"(default: {default})")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args(argv)
    report = run(arguments)
    print(json.dumps(report) if arguments.json else render(report))
    return 0


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure. Raises ConfigError for what cannot be, MoeRuntimeError when a rank fails."""
    if not 0 < arguments.speed <= 1:
        raise ConfigError(f"bench balance: --speed {arguments.speed} must be above 0 and at most 1")
    if arguments.top_k > arguments.experts or arguments.experts < 2:
        raise ConfigError("bench balance: --experts must be at least 2 and no fewer than --top-k")
    if min(arguments.tokens, arguments.rounds) < 1:
        raise ConfigError("bench balance: --tokens and --rounds must be at least 1")
    slots = arguments.slots or arguments.experts * 3 // 2
    with tempfile.TemporaryDirectory(prefix="moe-bench-") as scratch:
        cluster = Path(scratch) / "cluster.toml"
        cluster.write_text(
            f'[[node]]\nname = "full"\n[[node]]\nname = "slowed"\nemulate_speed = {arguments.speed!r}\n',
            encoding="utf-8",
        )
        shape = [getattr(arguments, name) for name in SHAPE]
        say("starting two ranks ...")
        ranks = Processes("the layer", "balance_ranks", 2, 1, [cluster, slots, *shape])
        try:
            rows = {str(skew): of_skew(ranks, arguments, skew) for skew in arguments.skew}
            recorder = {tokens: slowest(ranks, "recorder", tokens, arguments.skew[-1]) for tokens in _RECORDED}
            moving = {tokens: slowest(ranks, "moving", tokens, arguments.skew[-1]) for tokens in _RECORDED}
        finally:
            ranks.close()
    return {
        "machine": machine_line(),
        "shape": dict(zip(SHAPE, shape, strict=True)),
        "slots": slots,
        "tokens": arguments.tokens,
        "rounds": arguments.rounds,
        "emulated_speed": arguments.speed,
        "describe": ranks.ready[1]["describe"],
        "skew": rows,
        "moving": moving,
        "recorder": {
            tokens: {**found, "share": found["add_s"] / found["layer_s"]} for tokens, found in recorder.items()
        },
    }


def of_skew(ranks: Processes, arguments: argparse.Namespace, skew: float) -> dict[str, Any]:
    """Rounds of all subjects in turn, after the ranks' own rates have been measured to plan with."""
    tokens = arguments.tokens
    ask(ranks, "alone", tokens, skew, 0)
    calibration = [ask(ranks, "alone", tokens, skew, number) for number in range(1, 4)]
    rates = [tokens / statistics.median(one[rank]["seconds"] for one in calibration) for rank in range(2)]
    placed = ask(ranks, "place", tokens, skew, rates)[0]
    for name in SUBJECTS:
        ask(ranks, "run", name, tokens, skew, 0)
    rounds = []
    for number in range(1, arguments.rounds + 1):
        together = ask(ranks, "alone", tokens, skew, number)
        apart = [ask(ranks, "alone", tokens, skew, number, rank)[rank] for rank in range(2)]
        of_subject = {name: ask(ranks, "run", name, tokens, skew, number) for name in SUBJECTS}
        if not all(answer["finite"] for answers in of_subject.values() for answer in answers):
            raise MoeRuntimeError("bench balance: the layer's output is not finite")
        rounds.append((together, apart, of_subject))
        say(f"skew {skew:g}, round {number}/{arguments.rounds}")

    def own(which: int) -> list[float]:
        return [sum(tokens / answer["seconds"] for answer in one[which]) for one in rounds]

    subjects = {}
    for name in SUBJECTS:
        seconds = [max(answer["seconds"] for answer in of_subject[name]) for _, _, of_subject in rounds]
        subjects[name] = {
            "tokens_per_s": statistics.median(tokens / each for each in seconds),
            "of_both": statistics.median(tokens / s / both for s, both in zip(seconds, own(0), strict=True)),
            "of_each_with_the_other_idle": statistics.median(
                tokens / s / both for s, both in zip(seconds, own(1), strict=True)
            ),
            "rank_rows": [statistics.median(one[2][name][rank]["rows"] for one in rounds) for rank in range(2)],
            "rank_expert_s": [
                statistics.median(one[2][name][rank]["expert_seconds"] for one in rounds) for rank in range(2)
            ],
            "seconds": statistics.median(seconds),
            "slots": placed["slots"][name],
        }
    return {
        "own_tokens_per_s": [
            statistics.median(tokens / one[0][rank]["seconds"] for one in rounds) for rank in range(2)
        ],
        "own_with_the_other_idle": [
            statistics.median(tokens / one[1][rank]["seconds"] for one in rounds) for rank in range(2)
        ],
        "subjects": subjects,
    }


def ask(ranks: Processes, *question: Any) -> list[dict[str, Any]]:
    return ranks.ask(json.dumps(question))


def slowest(ranks: Processes, *question: Any) -> dict[str, float]:
    answers = ask(ranks, *question)
    return {key: max(answer[key] for answer in answers) for key in answers[0]}


def render(report: dict[str, Any]) -> str:
    shape = report["shape"]
    lines = [
        f"machine: {report['machine']}; 2 ranks of 1 thread, shm; "
        f"rank 1 at emulated speed {report['emulated_speed']:g}",
        f"{shape['experts']} experts, hidden {shape['hidden']}, intermediate {shape['intermediate']}, "
        f"top-{shape['top_k']}, bf16; {report['tokens']} tokens; median of {report['rounds']} rounds, interleaved",
    ]
    for skew, found in report["skew"].items():
        own = found["own_tokens_per_s"]
        idle = found["own_with_the_other_idle"]
        lines += [
            "",
            f"skew {float(skew):g}; each rank alone, both at once: {own[0]:,.0f} + {own[1]:,.0f} tokens/s; "
            f"with the other idle: {idle[0]:,.0f} + {idle[1]:,.0f}",
            f"{'placement':<20}{'slots':>10}{'rows':>16}{'expert ms':>16}{'all ms':>9}{'tokens/s':>11}"
            f"{'of both':>10}{'(idle)':>9}",
        ]
        for name, row in found["subjects"].items():
            expert_ms = " + ".join(f"{seconds * 1e3:.0f}" for seconds in row["rank_expert_s"])
            rows = " + ".join(f"{count:.0f}" for count in row["rank_rows"])
            lines.append(
                f"{name:<20}{' + '.join(map(str, row['slots'])):>10}{rows:>16}{expert_ms:>16}"
                f"{row['seconds'] * 1e3:>9.0f}{row['tokens_per_s']:>11,.0f}{row['of_both']:>10.3f}"
                f"{row['of_each_with_the_other_idle']:>9.3f}"
            )
    lines.append("")
    for tokens, found in report["recorder"].items():
        lines.append(
            f"recorder, {tokens} tokens: {found['add_s'] * 1e6:.1f} us a layer of {found['layer_s'] * 1e3:.1f} ms: "
            f"{found['share']:.2%}"
        )
    for tokens, found in report["moving"].items():
        lines.append(
            f"live move, {tokens} tokens: {found['sent_mib']:.0f} MiB sent by each rank in {found['passes']} passes of "
            f"{found['moving_s'] * 1e3:.1f} ms, {found['still_s'] * 1e3:.1f} ms without; the switch: "
            f"{found['last_s'] * 1e3:.1f} ms"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

"""`moe-launch bench dispatch`: dispatch and combine, beside the plain path over gloo and over MPI, and beside memcpy.

All subjects live in the same ranks and are measured in turn (A B C A B C ...); ratios are taken round by round. Here
is what surrounds the ranks: options, worlds one after the other, and the report. A round is in dispatch_ranks.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from ...core.config import TRANSPORTS
from ...core.errors import ConfigError
from ..machine import available_cores
from ..worker import one_line
from . import world
from .model import machine_line, say

OURS, OURS_EXPAND = "ours", "ours, expand"
PLAIN_GLOO, PLAIN_MPI = "plain, gloo", "plain, mpi"
FLOOR, FLOOR_EXPAND = "memcpy", "memcpy, expand"
LEAD_IN = 4
SUBJECTS = (OURS, OURS_EXPAND, PLAIN_GLOO, PLAIN_MPI, FLOOR, FLOOR_EXPAND)  # the order of a cycle
FLOOR_OF = {OURS: FLOOR, OURS_EXPAND: FLOOR_EXPAND}
PLAIN = (PLAIN_GLOO, PLAIN_MPI)
DTYPES = ("bf16", "fp8")
RANK_MODULE = "moe_runtime.launch.bench.dispatch_ranks"
TOKENS, QUICK_TOKENS = (1, 16, 128, 1024, 4096), (1, 128)

EXAMPLES = """examples:
  moe-launch bench dispatch
  moe-launch bench dispatch --ranks 2 4 --dtype fp8 --tokens 128 4096 --profile
  moe-launch bench dispatch --quick --json > report.json
A round starts when all ranks have come to a barrier and ends for a rank when its combine has returned; it took what
its slowest rank took. "expand": experts get a row per (token, expert), else a row per token. memcpy, the floor, copies
the bytes of those rows there and back, on all ranks at once."""


@dataclass(frozen=True)
class Settings:
    """What one world measures. ranks: its size. no_mpi: why MPI is not measured, or ""."""

    ranks: int
    dtype: str
    tokens: tuple[int, ...]
    hidden: int
    experts: int
    top_k: int
    transport: str
    seed: int
    rounds: float
    timeout_s: float
    quick: bool
    profile: bool
    no_mpi: str

    def cycles(self, tokens: int) -> tuple[int, int]:
        """(cycles, n): how often the subjects are visited, of which the plain paths take part in every n-th."""
        if self.quick:
            cycles, every = 8, 2
        elif tokens <= 128:
            cycles, every = 200, 1
        else:
            cycles, every = (30, 3) if tokens <= 1024 else (12, 4)
        return max(1, math.ceil(cycles * self.rounds)), every

    def lead_in(self, tokens: int) -> int:
        """Rounds of each turn, of every subject alike, before the one that is timed.

        A few tokens are what decoding sends, one exchange after the other; the round after another subject's would time
        caches that are cold.
        """
        return LEAD_IN if tokens <= 16 else 0

    def warm_up_cycles(self, tokens: int) -> int:
        return 1 if tokens > 128 else 2 if self.quick else 20


def schedule(cycles: int, every: int, subjects: Sequence[str]) -> list[list[str]]:
    """Who is measured in each cycle, in this order: all in every `every`-th, else all but the plain paths."""
    return [[name for name in subjects if n % every == 0 or name not in PLAIN] for n in range(cycles)]


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    mpirun, reason = (None, "--no-mpi") if arguments.no_mpi else world.find_mpirun()
    say(f"ranks start {'without MPI: ' + reason if mpirun is None else 'under mpirun'}")
    load_average = os.getloadavg()[0]
    rows, worlds = [], []
    try:
        with _termination_as_exit():
            for settings in worlds_of(arguments, reason):
                answers = run_world(settings, mpirun, arguments.malloc == "keep")
                rows += make_rows(settings, answers)
                worlds.append(describe_world(settings, answers, "mpirun" if mpirun else "moe-launch"))
    except world.RanksFailed as error:
        print(f"moe-launch: error: bench dispatch: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    shape = {name: getattr(arguments, name) for name in ("hidden", "experts", "top_k", "transport", "seed", "malloc")}
    report = {"machine": machine_line(), "load_average_before": load_average, **shape, "rows": rows, "worlds": worlds}
    print(json.dumps(report) if arguments.json else render(report))
    return 0


def run_world(settings: Settings, mpirun: list[str] | None, keep_memory: bool) -> list[dict[str, Any]]:
    """Start this world's ranks and return what each has found, by rank."""
    title = f"{settings.ranks} ranks, {settings.dtype}"
    say(f"{title}: starting ...")
    shared = Path("/dev/shm")  # the barrier's page should not be written back to a disk
    with tempfile.TemporaryDirectory(prefix="moe-bench-", dir=shared if shared.is_dir() else None) as scratch:
        folder = Path(scratch)
        (folder / "settings.json").write_text(json.dumps(asdict(settings)))
        (folder / "barrier").write_bytes(bytes(64 * settings.ranks))
        return world.run_world(
            RANK_MODULE, folder, settings.ranks, settings.timeout_s, mpirun, lambda line: say(f"{title}: {line}"),
            keep_memory,
        )  # fmt: skip


# ---------------------------------------------------------------- options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"bench dispatch: {message} (see {self.prog} --help)")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Raises ConfigError, in one line, for options that cannot be used."""
    parser = _Parser(
        prog="moe-launch bench dispatch",
        description="dispatch + combine, beside one row per routing over gloo and MPI, and beside memcpy",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], metavar="R", help="worlds, one after the other")
    parser.add_argument("--tokens", type=int, nargs="+", metavar="T", help=f"of each rank (default: {_words(TOKENS)})")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="what rows travel as")
    parser.add_argument("--hidden", type=int, default=7168, metavar="H")
    parser.add_argument("--experts", type=int, default=256, metavar="E")
    parser.add_argument("--top-k", type=int, default=8, metavar="K")
    parser.add_argument("--transport", choices=TRANSPORTS, default="shm", help="ours; the peers have their own")
    parser.add_argument(
        "--malloc", choices=("keep", "system"), default="system",
        help="keep: freed memory is used again, as device allocators do; system: large tensors are new pages each time",
    )  # fmt: skip
    parser.add_argument("--rounds", type=float, default=1.0, metavar="FACTOR", help="times as many rounds of each size")
    parser.add_argument("--seed", type=int, default=0, help="of rows and routings, which differ between ranks")
    parser.add_argument(
        "--timeout-s", type=float, default=300.0, metavar="SECONDS", help="longest time without progress"
    )
    parser.add_argument("--quick", action="store_true", help=f"few rounds, {_words(QUICK_TOKENS)} tokens: a trial")
    parser.add_argument("--profile", action="store_true", help="then say where ours spends its time on rank 0")
    parser.add_argument("--no-mpi", action="store_true", help="leave MPI out, also for starting the ranks")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    arguments.tokens = arguments.tokens or list(QUICK_TOKENS if arguments.quick else TOKENS)
    problems = {
        "--ranks: every world needs at least 2 ranks, fewer send nothing": min(arguments.ranks) < 2,
        "--tokens must be at least 1": min(arguments.tokens) < 1,
        "--hidden must be at least 1": arguments.hidden < 1,
        f"--top-k must be in 1..{arguments.experts}, the experts": not 1 <= arguments.top_k <= arguments.experts,
        f"--experts {arguments.experts}: fewer than ranks": arguments.experts < max(arguments.ranks),
        "--rounds must be a number above 0": not 0 < arguments.rounds < math.inf,
        "--timeout-s must be a number above 0": not 0 < arguments.timeout_s < math.inf,
        "--seed must be at least 0": arguments.seed < 0,
        "--transport mpi and --no-mpi contradict each other": arguments.no_mpi and arguments.transport == "mpi",
    }
    for problem, there in problems.items():
        if there:
            parser.error(problem)
    return arguments


def worlds_of(arguments: argparse.Namespace, no_mpi: str) -> list[Settings]:
    given = vars(arguments)
    fields = {name: given[name] for name in ("hidden", "experts", "top_k", "transport", "seed", "rounds", "timeout_s")}
    first = Settings(
        ranks=0, dtype="", tokens=tuple(arguments.tokens), quick=arguments.quick, profile=arguments.profile,
        no_mpi=no_mpi, **fields,
    )  # fmt: skip
    return [replace(first, ranks=ranks, dtype=dtype) for ranks in arguments.ranks for dtype in arguments.dtype]


@contextmanager
def _termination_as_exit() -> Iterator[None]:
    """Let SIGTERM end this process the way an error does: the ranks are stopped first."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---------------------------------------------------------------- the report


def make_rows(settings: Settings, answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per (tokens, subject). answers[r]: what dispatch_ranks.measure returned on rank r."""
    rows = []
    for sizes in zip(*(answer["sizes"] for answer in answers), strict=True):
        tokens = sizes[0]["tokens"]
        _, every = settings.cycles(tokens)
        # A round takes what its slowest rank takes.
        slowest = {
            name: [max(times) for times in zip(*(size["seconds"][name] for size in sizes), strict=True)]
            for name in sizes[0]["seconds"]
        }
        for name in SUBJECTS:
            row: dict[str, Any] = {"ranks": settings.ranks, "dtype": settings.dtype, "tokens": tokens, "subject": name}
            if name in slowest:
                row |= statistics_of(slowest[name])
                row["bytes_per_rank"] = max(size["bytes"][name] for size in sizes)
                if name in sizes[0]["relative_error"]:
                    row["relative_error"] = max(size["relative_error"][name] for size in sizes)
                row["over_ours"] = _ratio(slowest, name, OURS, every)
                row["over_ours_expand"] = _ratio(slowest, name, OURS_EXPAND, every)
                if name in FLOOR_OF:
                    row["over_floor"] = _ratio(slowest, name, FLOOR_OF[name], every)
            else:
                row["not_measured"] = answers[0]["not_measured"][name]
            rows.append(row)
    return rows


def statistics_of(seconds: list[float]) -> dict[str, Any]:
    """p99 is the smallest value that 99 % of the rounds do not exceed: of fewer than 100 rounds the longest."""
    ordered = sorted(seconds)
    return {
        "rounds": len(ordered),
        "median_s": statistics.median(ordered),
        "p99_s": ordered[math.ceil(0.99 * len(ordered)) - 1],
        "min_s": ordered[0],
    }


def _ratio(slowest: dict[str, list[float]], name: str, base: str, every: int) -> float:
    """The median of name's time over base's, in the cycles in which both were measured."""

    def in_full_cycles(subject: str) -> list[float]:
        return slowest[subject] if subject in PLAIN else slowest[subject][::every]

    if name in PLAIN or base in PLAIN:
        pairs = zip(in_full_cycles(name), in_full_cycles(base), strict=True)
    else:
        pairs = zip(slowest[name], slowest[base], strict=True)
    return statistics.median(time / base_time for time, base_time in pairs)


def describe_world(settings: Settings, answers: list[dict[str, Any]], launcher: str) -> dict[str, Any]:
    """What is told once per world: how it ran, the memory of ours at the largest size, the profile of rank 0."""
    return {
        "ranks": settings.ranks,
        "dtype": settings.dtype,
        "started_by": launcher,
        "order": [name for name in SUBJECTS if name in answers[0]["sizes"][0]["seconds"]],
        "not_measured": answers[0]["not_measured"],
        "describe": answers[0]["describe"],
        "memory": {"tokens": max(settings.tokens), "ranks": [answer["memory"] for answer in answers]},
        "profile": answers[0]["profile"],
    }


def render(report: dict[str, Any]) -> str:
    lines = [
        f"machine: {report['machine']}; load average {report['load_average_before']:.2f} before",
        f"dispatch + combine of [T, {report['hidden']}], {report['experts']} experts, top-{report['top_k']}; "
        f"ours over {report['transport']}; malloc: {report['malloc']}; subjects in the same ranks of 1 thread, in turn",
        f"sizes of up to 16 tokens: {LEAD_IN} rounds of the same subject before each one that is timed",
        "milliseconds of a round's slowest rank; ratios round by round; a ratio above 1 is slower than what it is over",
    ]
    for made in report["worlds"]:
        mine = [row for row in report["rows"] if (row["ranks"], row["dtype"]) == (made["ranks"], made["dtype"])]
        crowded = ", more than cores" if made["ranks"] > available_cores() else ""
        lines += ["", f"{made['ranks']} ranks{crowded}, {made['dtype']}, started by {made['started_by']}"]
        lines.append(
            f"{'tokens':>7}  {'subject':<15}{'rounds':>6}{'median':>11}{'p99':>11}{'min':>11}{'MB/rank':>10}"
            f"{'/ours':>8}{'/ours,exp.':>11}{'/memcpy':>9}"
        )
        lines += [line for row in mine for line in _row_lines(row)]
        lines += [f"{name}: not measured: {reason}" for name, reason in made["not_measured"].items()]
        lines += _memory_lines(made["memory"]) + [line for part in made["profile"] for line in _profile_lines(part)]
    return "\n".join(lines)


def _row_lines(row: dict[str, Any]) -> list[str]:
    """Nothing for what was not measured: the reason stands once below the table."""
    if "not_measured" in row:
        return []
    times = "".join(f"{1e3 * row[key]:>11.3f}" for key in ("median_s", "p99_s", "min_s"))
    floor = f"{row['over_floor']:>9.2f}" if "over_floor" in row else ""
    return [
        f"{row['tokens']:>7}  {row['subject']:<15}{row['rounds']:>6}{times}{row['bytes_per_rank'] / 1e6:>10.2f}"
        f"{row['over_ours']:>8.2f}{row['over_ours_expand']:>11.2f}{floor}"
    ]


def _memory_lines(memory: dict[str, Any]) -> list[str]:
    """Peak memory of ours by rank; growth counts pages of other ranks' windows that this rank wrote to."""
    lines = []
    for form in (OURS, OURS_EXPAND):
        grown = " ".join(f"{rank[form] / 2**20:.0f}" for rank in memory["ranks"])
        lines.append(f"{form}, {memory['tokens']} tokens: resident memory grew by at most {grown} MiB (rank 0, 1, ...)")
    return lines + memory["ranks"][0]["transport"]


def _profile_lines(part: dict[str, Any]) -> list[str]:
    halves = "; ".join(f"{half} {1e3 * seconds:.3f}" for half, seconds in part["halves_s"].items())
    lines = ["", f"rank 0, {part['tokens']} tokens, {part['subject']}, ms of a round: {halves}"]
    lines.append(f"{'own ms':>10}{'share':>8}{'calls':>8}  function (under cProfile, which slows Python down)")
    for entry in part["functions"]:
        lines.append(f"{1e3 * entry['own_s']:>10.3f}{entry['share']:>8.1%}{entry['calls']:>8.1f}  {entry['function']}")
    return lines


def _words(numbers: Sequence[int]) -> str:
    return " ".join(str(number) for number in numbers)


if __name__ == "__main__":
    sys.exit(main())

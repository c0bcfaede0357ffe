"""`moe-launch top`: a job while it runs, redrawn every second: what its coordinator says, and rates of its ranks.

`lines` decides what is shown; the rest asks, draws and waits. No colour; cursor movements on terminals only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..core.errors import ConfigError
from . import records
from .options import seconds

Status = Mapping[str, Any]

_ANSWER_S = 5.0
_NOT_RUNNING = 3  # exit code, as of moe-launch status
_FIXED = 73  # columns of a rank's line without its host


def add_options(parser: Any) -> None:
    parser.add_argument("job", metavar="JOB", help="as the launcher printed it")
    parser.add_argument("--every", type=seconds, default=1.0, metavar="SECONDS", help="between two looks (default: 1)")
    parser.add_argument("--once", action="store_true", help="two looks, one picture, the end")
    parser.add_argument("--json", action="store_true", help="one JSON object a line on stdout")


def run(options: argparse.Namespace) -> int:
    """Watch until the job or the user ends it. Raises ConfigError for a job that this host knows nothing of."""
    if options.every < 0.1:
        raise ConfigError(f"--every {options.every:g}: at least 0.1 seconds")
    record = records.read(options.job)
    if not record.get("coordinator"):
        return _say(f"job {options.job} has no coordinator to ask; moe-launch status says what is known of it")
    if record["code"] is not None:
        return _say(f"job {options.job} is not running: it ended with {record['code']}")
    from .status import client_of  # zmq and msgpack

    client = client_of(record)
    screen = _Screen(options)
    try:
        with screen:
            return _watch(client, options, screen)
    except KeyboardInterrupt:
        return 0
    finally:
        client.close()


def _watch(client: Any, options: argparse.Namespace, screen: _Screen) -> int:
    before: Status | None = None
    asked = 0.0
    while True:
        answer = client.ask({"kind": "status"}, _ANSWER_S)
        now = time.monotonic()
        if answer is None or answer.get("kind") != "status":
            why = "no answer" if answer is None else answer.get("why", "it does not understand")
            return screen.end(f"job {options.job}: {why} from its coordinator at {client.where}; it may have ended")
        status = {"job": options.job, **answer}
        if before is not None or not options.once:
            screen.show(status, before, now - asked)
        if status["state"] == "stopping":
            return screen.end(f"job {options.job} is ending{': ' * bool(status['why'])}{status['why']}")
        if before is not None and options.once:
            return 0
        before, asked = status, now
        screen.wait(options.every)


def _say(why: str) -> int:
    print(f"moe-launch: {why}", file=sys.stderr)
    return _NOT_RUNNING


# ---- what is shown -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """What a rank did between two looks, per second, and milliseconds of one of its forward passes."""

    tokens_s: float
    rows_s: float
    dispatch_ms: float
    experts_ms: float
    combine_ms: float


def rates(status: Status, before: Status | None, seconds: float) -> dict[int, Rates]:
    """By rank; those are left out of which two looks are not known, or that began anew between them."""
    earlier = {(rank["rank"], rank["pid"]): rank["metrics"] for rank in before["ranks"]} if before else {}
    found = {}
    for rank in status["ranks"]:
        now, then = rank["metrics"], earlier.get((rank["rank"], rank["pid"]))
        if not then or seconds <= 0:
            continue
        names = ("tokens", "rows", "dispatch_s", "experts_s", "combine_s", "passes")
        tokens, rows, *spent, passes = (now.get(name, 0) - then.get(name, 0) for name in names)
        if min(tokens, rows, *spent, passes) < 0:
            continue
        found[rank["rank"]] = Rates(tokens / seconds, rows / seconds, *(1e3 * one / max(1, passes) for one in spent))
    return found


def lines(status: Status, before: Status | None, seconds: float, width: int) -> list[str]:
    """The picture, no line longer than `width`. before: the look `seconds` earlier, if there was one."""
    found, slow = rates(status, before, seconds), {one["rank"] for one in status["slow"]}
    requests = sum(rank["metrics"].get("requests", 0) for rank in status["ranks"])
    speed = f"{sum(one.tokens_s for one in found.values()):,.1f}" if found else "-"
    state = status["state"] if status["settled"] or status["state"] != "running" else "taking up a view"
    told = [
        f"{status['job']}: {state}",
        *textwrap.wrap(f"view {status['view']}: {status['view_why']}", width)[:2],
        f"{len(status['members'])} ranks, {speed} tokens/s, {requests:,} requests done, {_outages(status['outages'])}",
        "",
    ]
    longest = max([len(rank["host"]) for rank in status["ranks"]], default=4)
    host = max(4, min(longest, width - _FIXED))
    told.append(
        f"rank  {'host':{host}} {'state':8} {'doing':11} {'heard':>5} {'tok/s':>7} {'rows/s':>7} "
        f"{'disp':>5} {'exp':>5} {'comb':>5} {'mem':>5}"
    )
    for rank in status["ranks"]:
        told.append(_rank_line(rank, found.get(rank["rank"]), rank["rank"] in slow, host))
    for one in status["slow"]:
        told += textwrap.wrap(f"! rank {one['rank']} ({one['kind']}): {one['why']}", width, subsequent_indent="  ")
    return [line[:width].rstrip() for line in told]


def _rank_line(rank: Mapping[str, Any], rate: Rates | None, is_slow: bool, host: int) -> str:
    at, memory = rank["at"], rank["metrics"].get("memory_bytes")
    doing = f"{at.get('phase', '')} {at.get('layer', '')}".strip()
    numbers = [short(rate.tokens_s), short(rate.rows_s)] if rate else ["-", "-"]
    parts = [_ms(rate.dispatch_ms), _ms(rate.experts_ms), _ms(rate.combine_ms)] if rate else ["-"] * 3
    return (
        f"{rank['rank']:4}{'!' if is_slow else ' '} {rank['host'][:host]:{host}} {rank['state'][:8]:8} {doing[:11]:11} "
        f"{_ago(rank['heard_s']):>5} {numbers[0]:>7} {numbers[1]:>7} {parts[0]:>5} {parts[1]:>5} {parts[2]:>5} "
        f"{short(memory, 1024) if memory else '-':>5}"
    )


def short(number: float, step: int = 1000) -> str:
    """At most five characters: 7, 12.3, 999, 1.2k; steps of 1000, or of 1024 for bytes."""
    for unit in ("", "k" if step == 1000 else "K", "M", "G", "T"):
        if number < 999.5 or unit == "T":
            digits = 1 if number < 99.95 and number != int(number) else 0
            return f"{number:.{digits}f}{unit}"
        number /= step
    raise AssertionError("the last unit takes all")


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.1f}" if milliseconds < 999.95 else f"{milliseconds:.0f}"[:5]


def _ago(seconds: float) -> str:
    return f"{seconds:.1f}s" if seconds < 99.95 else f"{seconds / 60:.0f}m" if seconds < 5940 else "long"


def _outages(outages: list[float]) -> str:
    if not outages:
        return "no outage"
    return f"{len(outages)} outage{'s'[: len(outages) > 1]} of {sum(outages):.2f} s{' in all' * (len(outages) > 1)}"


# ---- where it is shown -------------------------------------------------------------------------------------------


class _Screen:
    """stdout: a terminal is drawn anew and follows its size, anything else gets one picture after another."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._json = options.json
        self._draws = sys.stdout.isatty() and not options.once and not options.json
        self._latest: tuple[Status, Status | None, float] | None = None

    def __enter__(self) -> _Screen:
        if self._draws:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGWINCH})  # `wait` takes it
            sys.stdout.write("\x1b[?25l\x1b[2J")  # the cursor goes, and what was there
        return self

    def __exit__(self, *_: object) -> None:
        if self._draws:
            sys.stdout.write("\x1b[?25h\n")
            sys.stdout.flush()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGWINCH})

    def show(self, status: Status, before: Status | None, seconds: float) -> None:
        self._latest = (status, before, seconds)
        if self._json:
            by_rank = {str(number): asdict(rate) for number, rate in rates(status, before, seconds).items()}
            print(json.dumps({**status, "rates": by_rank}), flush=True)
        elif not self._draws:
            print("\n".join([*lines(*self._latest, shutil.get_terminal_size((80, 24)).columns), ""]), flush=True)
        else:
            self._draw()

    def wait(self, seconds: float) -> None:
        """Until the next look is due; a terminal whose size changes meanwhile is drawn anew at once."""
        ends = time.monotonic() + seconds
        while (left := ends - time.monotonic()) > 0:
            if not self._draws:
                time.sleep(left)
            elif signal.sigtimedwait({signal.SIGWINCH}, left) is not None:
                sys.stdout.write("\x1b[2J")
                self._draw()

    def end(self, why: str) -> int:
        if self._draws:
            sys.stdout.write("\n")
            sys.stdout.flush()
        return _say(why)

    def _draw(self) -> None:
        assert self._latest is not None
        size = os.get_terminal_size(sys.stdout.fileno())  # not COLUMNS, which stays as it was
        told = lines(*self._latest, size.columns)
        if len(told) > size.lines - 1:
            left = len(told) - (size.lines - 2)
            told = [*told[: size.lines - 2], f"and {left} lines more: a larger window shows them"[: size.columns]]
        # Home, each line with the rest of it blanked, then all below.
        sys.stdout.write("\x1b[H" + "".join(f"{line}\x1b[K\r\n" for line in told) + "\x1b[J")
        sys.stdout.flush()

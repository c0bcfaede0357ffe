"""How ranks run the probes: one at a time and in step, each within a deadline, rows written as they come.

A probe that does not end (it hangs, or ends a rank) is the last one: nothing after it could be trusted.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from ...comm.islands import CompositeTransport
from ...comm.place import EMULATED, vendor_of
from ...comm.quirks import dtype_name
from ...core.errors import PeerLost, PeerTimeout
from . import device
from .context import DTYPES, GRACE_S, Context, join_alone
from .probes import Probe
from .verdicts import ENDLESS, HUNG, LOST, REFUSED, SKIPPED, Outcome, Row, Subject, make_row

Write = Callable[[dict[str, Any]], None]


def run(context: Context, todo: list[Probe], write: Write) -> bool:
    """Run the probes on this rank, in step with the others; every rank calls. False where one did not end.

    `write` gets what rank 0 is to keep: {"plan": ...}, then {"begin": ...} and {"row": ...} for each probe.
    """
    write({"plan": [[probe.group, probe.what] for probe in todo]})
    say = _Progress(len(todo)) if context.runtime.rank == 0 else lambda number, probe: None
    alone = join_alone()
    for number, probe in enumerate(todo):
        write({"begin": [probe.group, probe.what]})
        say(number, probe)
        mine = _within_deadline(probe, context)
        try:
            said = context.gather([mine.result, mine.seen, list(mine.figures)], f"check ({probe.what})")
        except (PeerLost, PeerTimeout) as error:
            gone = Outcome(LOST, f"{mine.seen or mine.result} on rank {context.runtime.rank}; then {error}")
            _write_rows(context, probe, {context.runtime.rank: gone}, write)
            return False
        outcomes = {rank: _outcome(words) for rank, words in enumerate(said)}
        _write_rows(context, probe, outcomes, write)
        if any(outcome.result in ENDLESS for outcome in outcomes.values()):
            return False
    if alone:
        dist.destroy_process_group()
    return True


def _outcome(words: list[Any]) -> Outcome:
    result, seen, figures = words
    return Outcome(result, seen, tuple((value, unit) for value, unit in figures))


def _within_deadline(probe: Probe, context: Context) -> Outcome:
    """The probe's outcome; a raised error is one. Left behind where it hangs, and with it the whole run."""
    found: list[Outcome] = []

    def work() -> None:
        try:
            if context.on_chip:
                context.namespace.set_device(context.device)  # of this thread
            found.append(probe.run(context))
        except Exception as error:  # noqa: BLE001 - whatever a library raises is what is reported
            found.append(_raised(error))

    limit = context.deadline_s + GRACE_S
    thread = threading.Thread(target=work, daemon=True, name=f"check {probe.what}")
    # For a library that hangs and keeps the interpreter's lock: prints where, and ends this rank.
    faulthandler.dump_traceback_later(limit + GRACE_S, exit=True)
    thread.start()
    thread.join(limit)
    faulthandler.cancel_dump_traceback_later()
    return found[0] if found else Outcome(HUNG, f"did not end within {limit:g} s")


def _raised(error: Exception) -> Outcome:
    said = device.first_line(error)
    if "the emulation has no way" in said:  # what gloo lacks underneath, and not what the vendor's library does
        return Outcome(SKIPPED, said)
    if isinstance(error, PeerTimeout) or "imed out" in str(error) or "imeout" in str(error):
        return Outcome(HUNG, f"gave up at its deadline ({said})")
    if isinstance(error, PeerLost):
        return Outcome(LOST, said)
    return Outcome(REFUSED, f"refused ({said})")


def _write_rows(context: Context, probe: Probe, outcomes: dict[int, Outcome], write: Write) -> None:
    for row in rows_of(probe, context.kinds, outcomes):
        write({"row": row.as_dict()})


def rows_of(probe: Probe, kinds: list[str], outcomes: dict[int, Outcome]) -> list[Row]:
    """One row for each kind of rank where vendors claim something, else one for the world. Pure."""
    endless = any(outcome.result in ENDLESS for outcome in outcomes.values())
    if probe.claim is None or endless:
        names = ", ".join(dict.fromkeys(kinds))
        emulated = any(map(_is_emulated, kinds))
        subject = Subject(probe.required, emulated, not emulated and set(kinds) != {"cpu"})
        return [make_row(probe.group, probe.what, names, (), outcomes, subject)]
    rows = []
    for kind in dict.fromkeys(kinds):
        vendor, emulated = vendor_of(kind), _is_emulated(kind)
        # The CPU is what everything is compared with: it has to do what nobody claims of it.
        required = probe.required or (vendor.name == "cpu" and probe.numerics)
        subject = Subject(required, emulated, not emulated and vendor.name != "cpu", probe.numerics)
        of_kind = {rank: outcome for rank, outcome in outcomes.items() if kinds[rank] == kind}
        rows.append(make_row(probe.group, probe.what, kind, probe.claim(vendor), of_kind, subject))
    return rows


def _is_emulated(kind: str) -> bool:
    return EMULATED in kind


def header(context: Context) -> dict[str, Any]:
    """What every rank says of itself, which `context.about` keeps, and the paths between ranks; every rank calls."""
    runtime = context.runtime
    paths = runtime.transport.describe() if isinstance(runtime.transport, CompositeTransport) else []
    context.about = context.gather(device.about(context), "check (header)")
    return {
        "ranks": context.about,
        "transport": runtime.transport.name,
        "paths": paths,
        "dtypes": [dtype_name(dtype) for dtype in DTYPES if dtype in context.dtypes],
    }


class _Progress:
    """Tells on stderr what runs: every group's start, and at most one line in two seconds within it."""

    def __init__(self, total: int) -> None:
        self._total, self._group, self._silent_until = total, "", 0.0

    def __call__(self, number: int, probe: Probe) -> None:
        now = time.monotonic()
        if probe.group != self._group or now >= self._silent_until:
            self._group, self._silent_until = probe.group, now + 2.0
            print(f"{number + 1}/{self._total} {probe.group}: {probe.what}", file=sys.stderr, flush=True)

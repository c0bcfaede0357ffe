"""The inference job with a hook for faults, started by campaign.py as `moe-launch run tests/faulty.py OPTIONS`.

A file FAULTS/<rank number> that holds "<point> <what>" makes that rank kill, stop, hang or delay itself the next time
it comes to that point; the file goes, FAULTS/<rank number>.at gets the time. Every pass that ends is noted in
FAULTS/<rank number>.<pid>.passes, so that outages can be measured.
"""

from __future__ import annotations

import functools
import os
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any

from moe_runtime.comm.dispatch import Dispatcher
from moe_runtime.launch.generation.batch import RunningBatch
from moe_runtime.launch.generation.ledger import Ledger
from moe_runtime.launch.jobs import generate
from moe_runtime.layer import ExpertParallel
from moe_runtime.migration import Migration
from moe_runtime.refit import Source
from moe_runtime.runtime import Runtime
from moe_runtime.survival import Survival

FOLDER, RANK = Path(os.environ["FAULTS"]), os.environ["RANK"]
TRIGGER = str(FOLDER / RANK)


def fault(point: str) -> None:
    """Where something may go wrong."""
    try:
        with open(TRIGGER) as file:
            where, what = file.read().split()
    except (OSError, ValueError):
        return
    if where != point:
        return
    os.unlink(TRIGGER)
    (FOLDER / f"{RANK}.at").write_text(str(time.monotonic()))
    if what == "hang":
        while True:
            time.sleep(0.01)
    if what == "late":
        return time.sleep(8.0)  # longer than an exchange may take
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[what])


def before(owner: type, name: str, point: str) -> None:
    whole = getattr(owner, name)

    @functools.wraps(whole)
    def wrapped(self: Any, *args: Any, **words: Any) -> Any:
        fault(point)
        return whole(self, *args, **words)

    setattr(owner, name, wrapped)


def after(owner: type, name: str, point: str) -> None:
    whole = getattr(owner, name)

    @functools.wraps(whole)
    def wrapped(self: Any, *args: Any, **words: Any) -> Any:
        result = whole(self, *args, **words)
        fault(point)
        return result

    setattr(owner, name, wrapped)


def note_passes() -> None:
    passes = open(FOLDER / f"{RANK}.{os.getpid()}.passes", "ab", buffering=0)
    whole = RunningBatch.step

    def step(self: RunningBatch) -> Any:
        ended = whole(self)
        passes.write(struct.pack("=d", time.monotonic()))
        return ended

    RunningBatch.step = step


if __name__ == "__main__":
    after(Dispatcher, "start_dispatch", "dispatch")  # this rank's rows are on their way, or there
    before(ExpertParallel, "_compute", "experts")
    after(ExpertParallel, "_compute", "combine")  # between dispatch and combine
    before(Migration, "step", "rebalance")
    after(Migration, "switch", "switch")  # experts are in their new places, here
    before(Runtime, "_enter", "rejoin")
    after(Survival, "build", "meeting")  # in a new view, before anybody has said what it holds
    before(Source, "read", "reading")  # lost experts, from the checkpoint
    before(Dispatcher, "__init__", "placing")  # all has been read, and the ranks are to compare their placements
    after(Ledger, "begin", "ledger")  # all know what is left to do, and results are about to be written
    note_passes()
    sys.exit(generate.main(sys.argv[1:]))

"""Faults on demand in the ranks of a training job: on PYTHONPATH for tests, unknown to the product.

Python imports it at its start. TRAIN_FAULTS names a JSON file: {"log": path, "attempts": [[fault, ...], ...]}, the
faults of each start of the job; a fault is {"rank", "what", "where", "step", "delay"}, and is noted in the log just
before it strikes.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import threading
import time
from pathlib import Path


class Fault:
    def __init__(self, table: dict, log: Path) -> None:
        self.what, self.where, self.step, self.delay = (table[key] for key in ("what", "where", "step", "delay"))
        self._log, self._done, self.now = log, False, 0  # now: the step that the rank is in

    def at(self, where: str) -> None:
        """The rank is there: strike, once, from the fault's step on."""
        if self._done or where != self.where or self.now < self.step:
            return
        self._done = True
        if where in ("anywhere", "start") and self.what != "hang":
            threading.Timer(self.delay, self._strike).start()
            return
        self._strike()

    def _strike(self) -> None:
        with self._log.open("a") as log:
            log.write(json.dumps({"pid": os.getpid(), "at": time.time(), "step": self.now}) + "\n")
        if self.what == "hang":
            while True:
                pass
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[self.what])


def arm(fault: Fault) -> None:
    """Put the fault where a rank passes."""
    from moe_runtime import state_files
    from moe_runtime.comm.dispatch import Dispatcher
    from moe_runtime.comm.nodes import NodeDispatcher
    from moe_runtime.launch.training.loop import Trainer
    from moe_runtime.layer import ExpertParallel
    from moe_runtime.optimizer import MasterAdamW
    from moe_runtime.runtime import Runtime

    def before(owner: object, name: str, where: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args, **named):
            fault.at(where)
            return original(*args, **named)

        setattr(owner, name, wrapped)

    for kind in (Dispatcher, NodeDispatcher):
        before(kind, "start_combine", "before combine")
        for name, where in (("start_dispatch", "dispatch"), ("start_combine", "combine")):
            in_its_middle(kind, name, where, fault)
    before(MasterAdamW, "step", "optimizer")
    before(state_files, "_note", "checkpoint")  # its part is on disk and not told of
    before(Runtime, "save_model", "output")
    compute, step, write = ExpertParallel._compute, Trainer.step, state_files.write_atomically

    def computed(self, rows, handle):
        fault.at("experts")
        outputs = compute(self, rows, handle)
        if outputs.requires_grad:
            outputs.register_hook(lambda grad: fault.at("backward"))
        return outputs

    def stepped(self, number, stop=False):
        fault.now = number + 1
        fault.at("loop")
        fault.at("anywhere")
        return step(self, number, stop)

    def written(path, content):
        write(path, content)
        if path.name == state_files.MANIFEST:
            fault.at("publish")  # whole, and not yet under its name

    ExpertParallel._compute, Trainer.step, state_files.write_atomically = computed, stepped, written


def in_its_middle(kind: type, name: str, where: str, fault: Fault) -> None:
    """Between the halves of an exchange: its messages are on their way, and nobody takes them."""
    original = getattr(kind, name)

    def started(*args, **named):
        finish = original(*args, **named)

        def finished():
            fault.at(where)
            return finish()

        return finished

    setattr(kind, name, started)


def main() -> None:
    run_module = runpy.run_module

    def run(name: str, *args, **named):
        if name == "moe_runtime.launch.jobs.train":
            runpy.run_module = run_module
            plan = json.loads(Path(os.environ["TRAIN_FAULTS"]).read_text())
            attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
            for table in [*plan["attempts"], *[[]] * 100][attempt]:
                if table["rank"] == rank:
                    fault = Fault(table, Path(plan["log"]))
                    if fault.where == "start":
                        fault.step = 0
                        fault.at("start")
                    else:
                        arm(fault)
        return run_module(name, *args, **named)

    runpy.run_module = run


if "TRAIN_FAULTS" in os.environ:
    main()

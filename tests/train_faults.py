"""A training job under faults: `python tests/train_faults.py --rounds 40 --seed 1` (docs/training.md, "Under faults").

Jobs of `moe-launch train --max-restarts` run with a few faults each, at random steps and places, where
faults/sitecustomize.py puts them; with --hosts also between two network namespaces, whose cable is pulled. A row says
how long each fault took to be found (until the launcher, its ranks stopped, says so), whether the right rank was named,
and how long until the next step. Every job must end with the losses of an undisturbed one, to the bit. Anything else is
shown and the exit code is 1. The same seed draws the same faults.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from test_jobs import CONFIG

STEPS, WINDOW = 36, 6  # of a job; a fault falls into a window of its own, which has a checkpoint
DEADLINE_S = {"local": 8, "ssh": 5}  # timeout_s; across hosts below the 15 s after which a silent host is lost
JOB_S = 400.0
PLACES = ("loop", "dispatch", "experts", "before combine", "combine", "backward", "optimizer", "checkpoint")
KINDS = ("kill", "stop", "hang")
HOOK = Path(__file__).parent / "faults"
TEXT = "".join(f"def f{n}(x, y):\n    return x + y * {n}\n" for n in range(300))


@dataclass
class Fault:
    """ranks: struck at the same place and step. what: of KINDS, or "cut": the cable of the second host."""

    what: str
    where: str
    ranks: tuple[int, ...]
    step: int
    delay: float
    found: float = float("nan")  # seconds from the fault until the launcher says so
    next_step: float = float("nan")  # seconds from the fault to the first step after it; none before the next fault
    wrong: list[str] = field(default_factory=list)

    def row(self) -> str:
        names = ",".join(map(str, self.ranks))
        told = f"{self.found:8.1f} s {self.next_step:8.1f} s"
        return (
            f"{self.what:<6}{self.where:<16}{names:<7}{self.step:>5} {told}  {'; '.join(self.wrong) or 'as it should'}"
        )


# ---- drawing --------------------------------------------------------------------------------------------------------


def draw_jobs(rounds: int, seed: int) -> list[tuple[int, list[Fault]]]:
    """(ranks, faults) of each job: every kind at every place in turn, in a random order."""
    pick = random.Random(seed)
    all_of_them = [(what, where) for what in KINDS for where in PLACES]
    all_of_them += [(what, "start") for what in KINDS] + [("kill", "anywhere"), ("stop", "anywhere")] * 2
    all_of_them += [("kill", "publish"), ("stop", "publish"), ("kill", "output"), ("stop", "output")]
    drawn: list[tuple[str, str]] = []
    while len(drawn) < rounds:
        drawn += pick.sample(all_of_them, len(all_of_them))
    jobs = []
    each = STEPS // WINDOW - 1
    for first in range(0, rounds, each):
        ranks = 2 + len(jobs) % 2
        faults = [draw(pick, ranks, n, *drawn[first + n]) for n in range(min(each, rounds - first))]
        faults.sort(key=lambda fault: fault.where == "output")  # it comes once, at the end
        for n, fault in enumerate(faults):
            fault.step += n * WINDOW if fault.where != "output" else 0  # the newest checkpoint may be of the last step
        jobs.append((ranks, faults))
    return jobs


def draw(pick: random.Random, ranks: int, number: int, what: str, where: str) -> Fault:
    struck = [0] if where == "publish" else [pick.randrange(ranks)]
    if ranks == 3 and where != "publish" and pick.random() < 0.4:  # two of three, at once
        struck = sorted(pick.sample(range(ranks), 2))
    elif ranks == 2 and what != "hang" and where != "publish" and pick.random() < 0.2:  # all: only the launcher is left
        struck = [0, 1]
    step = pick.randrange(2, 2 + WINDOW) if where != "output" else 0
    if where == "start" and number == 0:
        step = 0
    return Fault(what, where, tuple(struck), step, round(pick.uniform(0.0, 4.0 if where == "start" else 0.1), 2))


# ---- running --------------------------------------------------------------------------------------------------------


class Bench:
    """A folder with a config, and how its jobs are started: on this machine, or on two hosts of namespaces."""

    def __init__(self, folder: Path, hosts=None) -> None:
        self.folder, self.hosts = folder, hosts
        self.losses: dict[int, list[float]] = {}  # of undisturbed jobs, by ranks
        (folder / "text").mkdir(parents=True)
        (folder / "text" / "a.py").write_text(TEXT)
        (folder / "faults.toml").write_text(re.sub(r"(?m)^(cluster|record) = .*\n", "", CONFIG))
        self.env = {**os.environ, "OMP_NUM_THREADS": "1"}
        if hosts:
            nodes = [
                f'[[node]]\nname = "node-{n}"\nhost = "{address}"\nvendor = "cpu"\n'
                f'env = {{ PYTHONPATH = "{HOOK}", TRAIN_FAULTS = "{folder}/plan.json", OMP_NUM_THREADS = "1" }}\n'
                for n, address in enumerate(hosts.addresses)
            ]
            (folder / "cluster.toml").write_text("\n".join(nodes))

    def job(self, ranks: int, faults: list[Fault], name: str) -> tuple[list[Fault], bool, str]:
        """Run it. Returns the faults with their times, whether its losses are right, and what the launcher said."""
        log = self.folder / f"{name}.faults"
        log.touch()
        attempts = [
            [{**vars_of(fault), "rank": rank} for rank in fault.ranks if fault.what != "cut"] for fault in faults
        ]
        (self.folder / "plan.json").write_text(json.dumps({"log": str(log), "attempts": attempts}))
        said: list[str] = []
        if ranks not in self.losses and faults:
            assert self.job(ranks, [], f"undisturbed-{ranks}")[1]
            (self.folder / "plan.json").write_text(json.dumps({"log": str(log), "attempts": attempts}))
        with started(self.command(ranks, name), self.folder, self.env) as lines:
            code = self._follow(lines, faults, log, said)
        rows = self.folder / name / "metrics.jsonl"
        losses = [json.loads(line)["loss"] for line in rows.read_text().splitlines()] if rows.exists() else []
        if not faults:
            self.losses[ranks] = losses
        right = code == 0 and len(losses) == STEPS and losses == self.losses[ranks]
        return faults, right, "\n".join(said)

    def command(self, ranks: int, name: str) -> list[str]:
        words = ["--max-restarts", "20", "--shutdown-timeout", "3", "--threads-per-rank", "1"]
        if self.hosts:
            words += ["--engine", "ssh", self.hosts.ssh_args, "--cluster", "cluster.toml"]
        else:
            words += ["--nproc-per-node", str(ranks)]
            self.env |= {"PYTHONPATH": str(HOOK), "TRAIN_FAULTS": str(self.folder / "plan.json")}
        settings = {
            "steps": STEPS, "checkpoint_every": 4, "log_every": 1, "batch_size": 6, "sequence_length": 64,
            "output": name, "checkpoints": f"{name}-state", "timeout_s": DEADLINE_S["ssh" if self.hosts else "local"],
        }  # fmt: skip
        sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        return [sys.executable, "-m", "moe_runtime.launch.cli", "train", *words, "faults.toml", *sets]

    def _follow(self, lines: Lines, faults: list[Fault], log: Path, said: list[str]) -> int:
        """Read what the job says to its end, and note when; pulls the cable where a fault asks for it."""
        number, plugs = 0, []
        struck_at, seen = float("nan"), 0
        waiting = False  # for the next step after a restart
        for at, line in lines:
            said.append(line)
            fault = faults[number] if number < len(faults) else None
            step = re.search(r"step +(\d+)/", line)
            if step and waiting:
                faults[number - 1].next_step, waiting = at - struck_at, False
            if step and fault and fault.what == "cut" and int(step[1]) >= fault.step and not plugs:
                struck_at = time.time()
                plugs = [threading.Thread(target=self._cut, args=(fault.delay,))]
                plugs[0].start()
            if fault and " failed first" in line:
                if fault.what != "cut":
                    notes = [json.loads(note) for note in log.read_text().splitlines()][seen:]
                    struck_at = min((note["at"] for note in notes), default=float("nan"))
                    struck = re.findall(r"\d+", line.partition(" failed first")[0].partition("rank")[2])[:1]
                    if not notes:
                        fault.wrong.append("failed before it was struck")
                    elif int(struck[0]) not in fault.ranks:
                        fault.wrong.append(f"rank {struck[0]} was named")
                fault.found = at - struck_at
            if fault and "starting all ranks again" in line:
                notes = [json.loads(note) for note in log.read_text().splitlines()][seen:]
                seen += len(notes)
                if left := [note["pid"] for note in notes if is_running(note["pid"])]:
                    fault.wrong.append(f"process {left} is still there")
                number, waiting = number + 1, fault.where != "output"
                for plug in plugs:
                    plug.join()
                plugs = []
        if number < len(faults):
            faults[number].wrong.append("no restart")
        return lines.code

    def _cut(self, seconds: float) -> None:
        with self.hosts.unplugged(1):
            time.sleep(seconds)


def vars_of(fault: Fault) -> dict:
    return {key: getattr(fault, key) for key in ("what", "where", "step", "delay")}


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class Lines:
    """The lines of a process with the times they came at; raises TimeoutError where it does not end."""

    def __init__(self, process: subprocess.Popen) -> None:
        self._process, self._lines, self.code = process, queue.SimpleQueue(), -1
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put((time.time(), line.rstrip("\n")))
        self._lines.put(None)

    def __iter__(self):
        ends, last = time.monotonic() + JOB_S, ""
        while True:
            try:
                got = self._lines.get(timeout=max(0.0, ends - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"the job did not end within {JOB_S:g} s; its last line: {last}") from None
            if got is None:
                self.code = self._process.wait(30)
                return
            last = got[1]
            yield got


@contextmanager
def started(command: list[str], folder: Path, env: dict[str, str]):
    process = subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    try:
        yield Lines(process)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def summary(faults: list[Fault]) -> str:
    lines = [
        f"{len(faults)} faults",
        f"{'fault':<8}{'times':>6}  {'found after (median, most)':>28}  {'next step after (median, most)':>32}",
    ]
    for what in (*KINDS, "cut"):
        mine = [fault for fault in faults if fault.what == what]
        found = [fault.found for fault in mine if fault.found == fault.found]
        again = [fault.next_step for fault in mine if fault.next_step == fault.next_step]
        if found and again:
            numbers = [statistics.median(found), max(found), statistics.median(again), max(again)]
            told = "{:>19.1f} s {:>5.1f} s  {:>23.1f} s {:>5.1f} s".format(*numbers)
            lines.append(f"{what:<8}{len(mine):>6}  {told}")
    return "\n".join(lines)


def host_faults(pick: random.Random) -> list[Fault]:
    """On two hosts: the second one's cable out for some seconds, twice, and its rank struck."""
    places = [("cut", "the network"), ("kill", "dispatch"), ("stop", "experts"), ("hang", "backward")]
    faults = [Fault(what, where, (1,), 0, 0.0) for what, where in [*places, places[0]]]
    for n, fault in enumerate(faults):
        fault.step = n * WINDOW + pick.randrange(2, WINDOW)
        fault.delay = round(pick.uniform(6.5, 10.0), 1) if fault.what == "cut" else 0.0
    return faults


def run_jobs(bench: Bench, jobs: list[tuple[int, list[Fault]]], kind: str) -> tuple[list[Fault], bool]:
    """Run and print them all. Returns the faults and whether every job ended as it should."""
    everything, good = [], True
    for number, (ranks, faults) in enumerate(jobs):
        try:
            faults, right, said = bench.job(ranks, faults, f"{kind}{number}")
        except TimeoutError as error:
            right, said = False, str(error)
        everything += faults
        print(f"job {number}, {ranks} ranks ({kind}; rows: fault, where, ranks, step, found after, next step after)")
        print(f"  losses {'equal to the bit' if right else 'NOT EQUAL'}")
        for fault in faults:
            print(f"  {fault.row()}", flush=True)
        if not right or any(fault.wrong for fault in faults):
            good = False
            print(said, file=sys.stderr, flush=True)
    return everything, good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="faults in all on this machine (default: 40)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hosts", action="store_true", help="two network namespaces too (root and sshd)")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="moe-train-faults-"))
    try:
        faults, good = run_jobs(Bench(folder / "here"), draw_jobs(arguments.rounds, arguments.seed), "local")
        if arguments.hosts:
            from hosts import Hosts

            (folder / "net").mkdir()
            with Hosts(folder / "net", 2) as hosts:
                drawn = host_faults(random.Random(arguments.seed))
                more, fine = run_jobs(Bench(folder / "hosts", hosts), [(2, drawn)], "ssh")
                faults, good = faults + more, good and fine
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(summary(faults))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

"""Faults on purpose: `python tests/campaign.py --faults 300 --seed 1`, or `--minutes 30` for a soak.

Real jobs generate with ranks that are killed, stopped, hung or cut off, at random moments by seed. After every job:
each request was answered once and in order, with the text of one undisturbed process; nothing hung; no process and no
file in /dev/shm is left. Prints each fault, then a table of outages: from the fault to the first token that any other
rank completes after the interruption.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from hosts import Hosts

TESTS = Path(__file__).resolve().parent
MOE_LAUNCH = [sys.executable, "-m", "moe_runtime.launch.cli"]
SETTLES_S = 180.0  # for all ranks to work again after a fault, the time to start a rank included
POINTS = ("dispatch", "experts", "combine")
VIEW_POINTS = ("meeting", "reading", "placing", "ledger")  # on the way into the view after another loss


@dataclass
class Fault:
    """kind: for the table. ranks: that it strikes. outage_s: None where nothing can be measured (no interruption)."""

    kind: str
    ranks: tuple[int, ...]
    at: float = 0.0
    outage_s: float | None = None


@dataclass
class Files:
    """What all jobs share: a small DeepSeek-V3, prompts with their texts from one process, plans of replicas."""

    folder: Path
    prompts: list[str] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    max_new: int = 200

    def make(self) -> None:
        sys.path.insert(0, str(TESTS))
        from families import reference_model

        from moe_runtime.experts import placement

        sizes = {"num_hidden_layers": 4, "vocab_size": 512, "max_position_embeddings": 2048}
        reference_model("deepseek_v3", **sizes).save_pretrained(self.folder / "model")
        self.prompts = [f"prompt number {n} " + "x" * (n % 7) for n in range(24)]
        self.write_input(self.folder / "reference.jsonl", len(self.prompts))
        out = self.folder / "texts.jsonl"
        words = [*MOE_LAUNCH, "generate", *self.options(self.folder / "reference.jsonl", out), "--log-dir"]
        subprocess.run([*words, self.folder / "reference"], check=True, capture_output=True, env=environment({}))
        self.texts = {record["prompt"]: record["text"] for record in map(json.loads, out.read_text().splitlines())}
        for ranks in (3, 4):
            made = placement.plan(np.ones((3, 16)), [placement.Rank(1.0, slots=-(-32 // ranks))] * ranks)
            placement.save_plan(made, self.folder / f"replicas-{ranks}.json")

    def write_input(self, path: Path, count: int) -> None:
        lines = (json.dumps({"prompt": self.prompts[n % len(self.prompts)]}) for n in range(count))
        path.write_text("".join(f"{line}\n" for line in lines))

    def options(self, prompts: Path, out: Path) -> list[str]:
        words = ["--model", self.folder / "model", "--tokenizer", "bytes", "--input", prompts, "--output", out]
        return [*map(str, words), "--max-new-tokens", str(self.max_new), "--batch-size", "4"]


def environment(extra: dict[str, str]) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS), **extra}


class JobOver(Exception):
    """It had nothing left to do: `Job.end` says whether all is right."""


class Job:
    """One running job, and what can be done to it. more: for generate. launch: where its ranks are, if not all here.
    on: the command that runs another one where node 0 is."""

    def __init__(
        self,
        files: Files,
        ranks: int,
        on_loss: str,
        requests: int,
        *more: str,
        restarts: int = 0,
        launch: Sequence[object] = (),
        folder: Path | None = None,
        on: Callable[..., list[str]] = lambda *words: [str(word) for word in words],
    ) -> None:
        self.files, self.size, self.requests, self._on = files, ranks, requests, on
        self.folder = folder or new_folder(files)
        self.logs, self.out, self.mark = (
            self.folder / f"logs-{self.folder.name}",
            self.folder / "out.jsonl",
            mark_of(self.folder),
        )
        files.write_input(self.folder / "in.jsonl", requests)
        self.before = set(os.listdir("/dev/shm"))
        placed = ["--placement", str(files.folder / f"replicas-{ranks}.json")] if on_loss == "replica" else []
        self._launch = list(launch)
        launch = [*(launch or ("--nproc-per-node", ranks)), "--on-loss", on_loss, "--max-restarts", restarts]
        job = [*files.options(self.folder / "in.jsonl", self.out), *placed, "--timeout-s", "5", *more]
        self.log = (self.folder / "log.txt").open("w")
        words = [*MOE_LAUNCH, "run", *launch, "--log-dir", self.logs, TESTS / "faulty.py", *job]
        self.process = subprocess.Popen(
            on(*words),
            stdout=self.log,
            stderr=self.log,
            env=environment({"FAULTS": str(self.folder), "CAMPAIGN": self.mark}),
            start_new_session=True,
        )
        self.faults: list[Fault] = []

    @property
    def name(self) -> str:
        """The job's, for moe-launch."""
        if "--engine" not in self._launch:
            return self.logs.name
        told = (self.folder / "log.txt").read_text()
        return told.partition("moe-launch: job ")[2].partition(":")[0]

    def events(self) -> list[dict[str, Any]]:
        try:
            lines = (self.logs / "events.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def settled(self) -> tuple[int, list[int]]:
        """(number, members) of the newest view if all its ranks work in it, else (0, [])."""
        number, members = 0, []
        for event in self.events():
            if event["event"] == "view":
                number, members, works = event["number"], event["members"], False
            elif event["event"] == "settled" and event["view"] == number:
                works = True
        return (number, members) if number and works else (0, [])

    def wait_settled(self, above: int, size: int | None = None) -> tuple[int, list[int]]:
        ends = time.monotonic() + SETTLES_S
        while time.monotonic() < ends:
            number, members = self.settled()
            if number > above and (size is None or len(members) == size):
                return number, members
            if self.process.poll() is not None:
                raise JobOver(f"the job has ended ({self.process.returncode}): {self.tail()}")
            time.sleep(0.02)
        raise AssertionError(f"no view above {above} of {size} ranks within {SETTLES_S:g} s: {self.tail()}")

    def pids(self) -> dict[int, int]:
        """The process of each rank that lives."""
        found = {}
        for pid in marked(self.mark):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                variables = dict(word.split(b"=", 1) for word in words if b"=" in word)
                if b"RANK" in variables and b"faulty.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found[int(variables[b"RANK"])] = pid
        return found

    def coordinator(self) -> int:
        return next(
            pid
            for pid in marked(self.mark)
            if b"moe_runtime.control.server" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )

    def asks(self, command: str, *words: str) -> bool:
        """`moe-launch grow` or `drain`; false where the job has ended meanwhile."""
        words = self._on(*MOE_LAUNCH, command, self.name, *words)
        said = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False, env=environment({}))
        if said.returncode and self.process.poll() is None:
            time.sleep(3.0)  # it may be about to
        assert said.returncode == 0 or self.process.poll() is not None, said.stderr + self.tail()
        return said.returncode == 0

    def arm(self, rank: int, point: str, what: str) -> None:
        new = self.folder / f"{rank}.new"
        new.write_text(f"{point} {what}")
        (self.folder / f"{rank}.at").unlink(missing_ok=True)
        os.replace(new, self.folder / str(rank))

    def fired(self, rank: int, seconds: float = SETTLES_S) -> float:
        """When an armed fault struck."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            with contextlib.suppress(OSError, ValueError):
                return float((self.folder / f"{rank}.at").read_text())
            if self.process.poll() is not None:
                raise JobOver(f"the job has ended ({self.process.returncode}) before rank {rank} came to its fault")
            time.sleep(0.005)
        raise AssertionError(f"rank {rank} did not come to the point of its fault: {self.tail()}")

    def outage(self, fault: Fault) -> float | None:
        """From the fault to the end of the first pass, of a rank that it spared, in the view without the lost ones."""
        views = [e["time"] for e in self.events() if e["event"] == "view" and e["lost"] and e["time"] > fault.at]
        if not fault.ranks or not views:
            return None
        ends = []
        for path in self.folder.glob("*.passes"):
            if int(path.name.split(".")[0]) not in fault.ranks:
                times = np.frombuffer(path.read_bytes()[: path.stat().st_size // 8 * 8], dtype=np.float64)
                ends += times[times > views[0]][:1].tolist()
        return min(ends) - fault.at if ends else None

    def tail(self) -> str:
        return "\n" + "\n".join((self.folder / "log.txt").read_text().splitlines()[-25:])

    def end(self, timeout: float = 240.0) -> None:
        """Wait for its end; everything that must hold then. Raises AssertionError."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGTERM)
            raise AssertionError(f"the job hangs: {self.tail()}") from None
        assert code == 0, f"the job ended with {code}: {self.tail()}"
        records = [json.loads(line) for line in self.out.read_text().splitlines()]
        assert [record["line"] for record in records] == list(range(1, self.requests + 1)), "not each answered once"
        for record in records:
            assert record["text"] == self.files.texts[record["prompt"]], f"line {record['line']}: another text"
        ends = time.monotonic() + 5
        while (left := marked(self.mark)) and time.monotonic() < ends:
            time.sleep(0.05)
        assert not left, f"processes {left} are left"
        new = {name for name in set(os.listdir("/dev/shm")) - self.before if not name.startswith("moe-fuzz")}
        left_over = {name for name in new if not in_use(f"/dev/shm/{name}")}
        assert not left_over, f"{left_over} are left in /dev/shm"
        for fault in self.faults:
            fault.outage_s = self.outage(fault) if fault.outage_s is None else fault.outage_s
        shutil.rmtree(self.folder)


def new_folder(files: Files) -> Path:
    return Path(tempfile.mkdtemp(dir=files.folder, prefix="job-"))


def mark_of(folder: Path) -> str:
    return f"campaign {folder.name}"


def marked(mark: str) -> list[int]:
    """Processes that have inherited CAMPAIGN=mark."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with contextlib.suppress(OSError):
                if f"CAMPAIGN={mark}".encode() in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                    found.append(int(entry))
    return found


def in_use(path: str) -> bool:
    """Whether a process has it: then it is somebody else's, since all of ours have ended."""
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if entry.isdecimal() and path in Path(f"/proc/{entry}/maps").read_text():
                return True
    return not os.path.exists(path)


def strike(job: Job, kind: str, ranks: tuple[int, ...], chance: random.Random) -> Fault:
    """Do it; returns when it has struck."""
    fault = Fault(kind, ranks)
    where, _, what = kind.partition(": ")
    if where in POINTS:
        for rank in ranks:
            job.arm(rank, where, what)
        fault.at = min(job.fired(rank) for rank in ranks)
    elif where == "coordinator":
        pid = job.coordinator()
        fault.at = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        for rank in ranks:
            os.kill(job.pids()[rank], signal.SIGKILL)
    else:
        pids = [job.pids()[rank] for rank in ranks]
        number = signal.SIGSTOP if "stop" in kind else signal.SIGKILL
        fault.at = time.monotonic()
        for pid in pids:
            os.kill(pid, number)
    job.faults.append(fault)
    return fault


# (kind, how many ranks it strikes, how often it is drawn)
KINDS = [
    ("any moment: kill", 1, 5),
    ("any moment: stop", 1, 2),
    *[(f"{point}: {what}", 1, often) for point in POINTS for what, often in (("kill", 3), ("stop", 1), ("hang", 1))],
    ("any moment: kill two at once", 2, 2),
    ("any moment: stop two at once", 2, 1),
    ("coordinator: kill", 0, 2),
    ("coordinator: kill, and a rank", 1, 2),
]


def draw(chance: random.Random, members: list[int], least: int) -> tuple[str, tuple[int, ...]]:
    """A kind of fault, and whom it strikes, so that `least` ranks are left."""
    kinds = [(kind, count, often) for kind, count, often in KINDS if len(members) - count >= least]
    kind, count, _ = chance.choices(kinds, [often for *_, often in kinds])[0]
    return kind, tuple(sorted(chance.sample(members, count)))


def one_life(files: Files, chance: random.Random, ranks: int, on_loss: str, transport: str) -> list[Fault]:
    """A job without restarts: faults until one rank is left, or as many as replicas allow."""
    job = Job(files, ranks, on_loss, 24, "--runtime", f"transport={transport}")
    number, members = job.wait_settled(0)
    with contextlib.suppress(JobOver):
        while len(members) > (ranks - 1 if on_loss == "replica" else 1) and len(job.faults) < 4:
            time.sleep(chance.uniform(0.05, 0.6))
            kind, struck = draw(chance, members, ranks - 1 if on_loss == "replica" else 1)
            nested: list[int] = []
            if struck and on_loss == "reload" and chance.random() < 0.3:
                nested = [rank for rank in members if rank not in struck][1:2]  # one is left at least
            point = chance.choice(VIEW_POINTS)
            for rank in nested:
                job.arm(rank, point, "kill")
            strike(job, kind, struck, chance)
            job.faults += [Fault(f"{point}: kill", (rank,), job.fired(rank)) for rank in nested]
            if struck:
                number, members = job.wait_settled(number, len(members) - len(struck) - len(nested))
    job.end()
    return job.faults


def long_life(
    files: Files,
    chance: random.Random,
    ranks: int,
    on_loss: str,
    faults: int,
    seconds: float,
    watch: Watch | None = None,
) -> list[Fault]:
    """A job whose lost ranks are started again, and struck while they join and while experts move to them. Experts also
    move where that pays, and now and then a rank is added and drained again."""
    tokens = 3500 * min(faults, seconds / 7)  # a fault and the return of its ranks take some seconds
    moves = ["--runtime", "rebalance=auto", "--runtime", "rebalance_every=100"]
    job = Job(files, ranks, on_loss, int(tokens / files.max_new), *moves, restarts=100000)
    number, members = job.wait_settled(0)
    ends = time.monotonic() + seconds
    with contextlib.suppress(JobOver):
        while len(job.faults) < faults and time.monotonic() < ends:
            time.sleep(chance.uniform(0.1, 1.0))
            if watch:
                watch.look(job)
            if job.process.poll() is not None:
                break
            keep = [rank for rank in members if rank != 0 or watch is None]  # a soak looks at one process all the time
            kind, struck = draw(chance, keep, len(keep) - 1 if on_loss == "replica" else len(keep) - 2)
            nested = chance.random()
            others = [rank for rank in keep if rank not in struck] if on_loss != "replica" else []
            point = chance.choice(("rebalance", "switch", *VIEW_POINTS))
            if struck and 0.15 <= nested < 0.4 and others:
                job.arm(others[0], point, "kill")
            strike(job, kind, struck, chance)
            if not struck:
                continue
            if nested < 0.15 and len(struck) == 1:
                job.arm(struck[0], "rejoin", "kill")  # the process that takes its place
                job.faults.append(Fault("rejoin: kill", struck, job.fired(struck[0])))
            elif 0.15 <= nested < 0.4 and others:
                job.faults.append(Fault(f"{point}: kill", (others[0],), job.fired(others[0])))
            number, members = job.wait_settled(number, ranks)
            moved(job, number)
            if chance.random() < 0.1:
                number, members = job.wait_settled(number, ranks + 1) if job.asks("grow") else (number, members)
                added = max(members)
                if added >= ranks and job.asks("drain", str(added)):
                    number, members = job.wait_settled(number, ranks)
    job.end(600.0)
    return job.faults


def moved(job: Job, number: int) -> None:
    """Until the ranks that came hold experts."""
    ends = time.monotonic() + 10
    while time.monotonic() < ends and job.process.poll() is None:
        events = job.events()
        last = max(at for at, event in enumerate(events) if event["event"] == "view")
        if any(event["event"] == "note" and "moved" in event["note"] for event in events[last:]):
            return
        time.sleep(0.05)


@dataclass
class Watch:
    """Memory, descriptors and threads over time of what lives all along: rank 0, the coordinator, the launcher."""

    rows: dict[str, list[tuple[float, int, int, int]]] = field(default_factory=lambda: defaultdict(list))
    began: float = field(default_factory=time.monotonic)

    def look(self, job: Job) -> None:
        with contextlib.suppress(OSError, KeyError, StopIteration):
            named = {"rank 0": job.pids()[0], "coordinator": job.coordinator(), "launcher": job.process.pid}
            for name, pid in named.items():
                status = dict(
                    line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
                )
                row = int(status["VmRSS"].split()[0]), len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"])
                self.rows[f"{name} ({pid})"].append((time.monotonic() - self.began, *row))

    def lines(self) -> Iterator[str]:
        """First third against last third of what lived longest of each."""
        yield "what lives all along        minutes   MiB at first   MiB at last   descriptors   threads"
        for name, rows in self.rows.items():
            minutes = (rows[-1][0] - rows[0][0]) / 60
            if len(rows) < 6 or minutes < 1:
                continue
            third = len(rows) // 3
            first, last = (
                [statistics.median(column) for column in list(zip(*part, strict=True))[1:]]
                for part in (rows[:third], rows[-third:])
            )
            yield (
                f"{name:26s} {minutes:8.1f} {first[0] / 1024:14.1f} {last[0] / 1024:13.1f}   "
                f"{first[1]:4.0f} to {last[1]:4.0f} {first[2]:4.0f} to {last[2]:2.0f}"
            )


def cut(files: Files, chance: random.Random, hosts: int, each: int) -> list[Fault]:
    """Hosts made of network namespaces, one of which loses its cable; the part with the coordinator goes on."""
    with on_hosts(files, hosts, each) as (made, job):
        number, members = job.wait_settled(0)
        time.sleep(chance.uniform(0.1, 0.6))
        lost = chance.randrange(1, hosts)
        fault = Fault(f"network cut ({hosts} hosts of {each})", tuple(range(lost * each, lost * each + each)))
        with made.unplugged(lost):
            fault.at = time.monotonic()
            job.faults.append(fault)
            job.wait_settled(number, len(members) - each)
            job.end()
        return job.faults


@contextlib.contextmanager
def on_hosts(files: Files, hosts: int, each: int, requests: int = 24) -> Iterator[tuple[Hosts, Job]]:
    """A job on hosts made of network namespaces, with so many ranks on each."""
    from hosts import Hosts

    folder = new_folder(files)
    with Hosts(folder, hosts) as made:
        cluster = cluster_file(folder, [(address, each) for address in made.addresses])
        launch = ["--cluster", cluster, "--engine", "ssh", made.ssh_args, "--threads-per-rank", "1"]
        on = functools.partial(made.on, 0)
        job = Job(files, hosts * each, "reload", requests, launch=launch, folder=folder, on=on)
        yield made, job


def cluster_file(folder: Path, hosts: Sequence[tuple[str, int]]) -> Path:
    """hosts: their addresses, and how many ranks each has."""
    settings = f'env = {{ FAULTS = "{folder}", CAMPAIGN = "{mark_of(folder)}", PYTHONPATH = "{TESTS}" }}'
    (folder / "cluster.toml").write_text(
        "\n".join(
            f'[[node]]\nname = "n{n}"\nhost = "{host}"\nvendor = "cpu"\ndevices = {count}\n{settings}\n'
            for n, (host, count) in enumerate(hosts)
        )
    )
    return folder / "cluster.toml"


def table(faults: list[Fault]) -> Iterator[str]:
    yield "fault                                   count   outage: median    worst"
    kinds = defaultdict(list)
    for fault in faults:
        kinds[fault.kind].append(fault.outage_s)
    for kind, all_outages in sorted(kinds.items()):
        outages = [outage for outage in all_outages if outage is not None]
        told = f"{statistics.median(outages):12.2f} s {max(outages):7.2f} s" if outages else "  no interruption"
        yield f"{kind:40s} {len(all_outages):4d} {told}"
    outages = [f.outage_s for f in faults if f.outage_s is not None]
    yield f"all {len(faults)} faults: median {statistics.median(outages):.2f} s, worst {max(outages):.2f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=20, help="how many, about (default: 20)")
    parser.add_argument("--minutes", type=float, default=0.0, help="a soak of so long, of a job whose ranks come back")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("short", "long", "cut", "all"), default="all", help="kinds of jobs")
    parser.add_argument("--on-loss", choices=("reload", "replica"), help="of all jobs (default: either)")
    options = parser.parse_args()
    chance, done = random.Random(options.seed), list[Fault]()
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        files = Files(Path(folder))
        files.make()
        if options.minutes:
            watch = Watch()
            done = long_life(files, chance, 3, "reload", 1 << 30, options.minutes * 60, watch)
            print(*watch.lines(), *table(done), sep="\n")
            return 0
        jobs = 0
        while len(done) < options.faults:
            kind = options.only if options.only != "all" else chance.choices(("short", "long", "cut"), (5, 2, 1))[0]
            ranks, on_loss = chance.choice((3, 4)), chance.choice(("reload", "reload", "replica"))
            on_loss = options.on_loss or on_loss
            transport = chance.choice(("auto", "auto", "zeromq"))
            began = time.monotonic()
            if kind == "short":
                made = one_life(files, chance, ranks, on_loss, transport)
                told = f"{ranks} ranks, {on_loss}, {transport}"
            elif kind == "long":
                left = min(8, options.faults - len(done))
                made = long_life(files, chance, ranks, on_loss, left, 600)
                told = f"{ranks} ranks, {on_loss}, coming back"
            else:
                hosts, each = chance.choice(((3, 1), (2, 2), (2, 1)))
                made, told = cut(files, chance, hosts, each), f"{hosts} hosts of {each} ranks"
            jobs, done = jobs + 1, [*done, *made]
            for fault in made:
                outage = "no interruption" if fault.outage_s is None else f"{fault.outage_s:.2f} s"
                print(f"job {jobs} ({told}): {fault.kind}, ranks {list(fault.ranks)}: {outage}", flush=True)
            print(f"job {jobs}: right, after {time.monotonic() - began:.0f} s", flush=True)
    print(*table(done), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

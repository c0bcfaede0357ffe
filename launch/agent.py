"""One node's part of a job over several hosts: say who it is, start its ranks with torchrun's agent, watch, clean up.

Every engine starts one agent a node and leaves the rest to it. The agents agree through control.py; the ranks are
started by torch.distributed.run (elastic.py) and write into named pipes that the agent reads, so that logs and
prefixes are those of one machine. Run as a program it takes its job from stdin, one line of JSON, and ends when its
stdin ends: whoever started it is gone then. `--from-environment` is for engines without such a line.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..comm.vendors import VENDORS
from ..core import environment
from ..core.cluster import Cluster, Node
from ..core.errors import ConfigError
from . import preflight, records
from .control import BEAT_S, SILENCE_S, Controller, Link, Message, serve
from .local import say, signal_name, signals_to
from .machine import available_cores, free_port
from .output import LineCutter, Sink, failure_text, is_shown
from .sweep import __file__ as SWEEP
from .sweep import marked, sweep
from .worker import USER_ERROR_CODE, USER_ERRORS, one_line

_MARK = "MOE_RUNTIME_JOB_MARK"


@dataclass(frozen=True)
class Job:
    """What all agents of a job are told alike. nodes: in rank order; address, port: where node 0's controller listens.

    target: the worker's arguments. files: what every node must have, the same. wait_s: for all nodes to come.
    one_terminal: all agents write to one place, so only node 0 tells what concerns the whole job. tee: see is_shown.
    """

    name: str
    nodes: tuple[Node, ...]
    address: str
    port: int
    secret: str
    target: tuple[str, ...]
    files: tuple[str, ...]
    log_dir: str
    clean_stdout: bool = False
    threads: int | None = None
    shutdown_timeout: float = 10.0
    wait_s: float = 120.0
    engine: str = "torchrun"
    engine_args: tuple[str, ...] = ()
    one_terminal: bool = False
    tee: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Job:
        """Raises ConfigError for anything that is not a job."""
        try:
            table = json.loads(text)
            lists = {key: tuple(value) for key, value in table.items() if isinstance(value, list)}
            return Job(**{**table, **lists, "nodes": tuple(Node(**node) for node in table["nodes"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"this is no job of moe-launch's ({error}); an agent is started by an engine") from None


def run_node(job: Job, number: int, lifeline: int | None = None) -> int:
    """Be the agent of node `number` until the job is over; returns the job's exit code. Call from the main thread.

    lifeline: a descriptor whose end means that whoever started this agent is gone.
    """
    job = replace(job, address=_resolve(job))
    events: queue.SimpleQueue[int] = queue.SimpleQueue()
    if lifeline is not None:
        threading.Thread(target=_watch, args=(lifeline, events), daemon=True).start()
    served = _controller(job) if number == 0 else None
    with signals_to(events):
        agent = _Agent(job, number, events)
        try:
            code = agent.run()
        except USER_ERRORS as error:
            agent.give_up(one_line(error))
            raise
        finally:
            agent.close()
    if served is not None:
        served.join(job.shutdown_timeout + 10.0)
    return code


class _Agent:
    def __init__(self, job: Job, number: int, events: queue.SimpleQueue[int]) -> None:
        self._job, self._number, self._events = job, number, events
        self._node = job.nodes[number]
        self._link = Link(job.address, job.port, bytes.fromhex(job.secret))
        self._speaks = number == 0 or not job.one_terminal
        self._mark = secrets.token_hex(8)
        self._ranks: _Ranks | None = None
        self._signals: list[int] = []  # that this agent got
        self._record = records.write(
            job.name, engine=job.engine, address=job.address, port=job.port, secret=job.secret, log_dir=job.log_dir
        )

    def run(self) -> int:
        address = _own_address(self._job, self._number)
        node = self._node
        facts = preflight.look(address, node.interface, node.vendor, node.devices, self._job.files)
        facts["command"] = preflight.text_digest(json.dumps([self._job.name, self._job.target]))
        if self._speaks:
            where = f"{facts['address']} ({facts['interface'] or 'no interface found'})"
            versions = f"moe-runtime {facts['moe_runtime']}, torch {facts['torch']}"
            say(f"{self._node.name}: {where}, {versions}, {facts['free_gib']} GiB free")
        hello = {"kind": "hello", "node": self._number, "mark": self._mark, "host": facts["host"], "facts": facts}
        began = heard = time.monotonic()
        told: list[str] = []
        while True:
            self._link.send(hello if self._ranks is None else self._beat())
            for order in self._answers(BEAT_S):
                heard = time.monotonic()
                if order["kind"] == "wait" and self._speaks and heard - began > 3.0 and order["missing"] != told:
                    told = order["missing"]
                    say(f"waiting for {', '.join(told)} (at most {self._job.wait_s:g} s)")
                elif order["kind"] == "go" and self._ranks is None:
                    self._ranks = _Ranks(self._job, self._number, address, facts["interface"], order, self._mark)
                elif order["kind"] in ("stop", "refuse"):
                    return self._end(order["code"], order["why"])
            silence = time.monotonic() - heard
            if silence > (self._job.wait_s if self._ranks is None else SILENCE_S):
                return self._end(*self._no_answer(silence))

    def give_up(self, why: str) -> None:
        """Have the job end everywhere because of this node."""
        self._link.send({"kind": "stop", "code": USER_ERROR_CODE, "why": f"{self._node.name}: {why}"})
        self._link.send({"kind": "gone", "node": self._number, "mark": self._mark})

    def close(self) -> None:
        if self._ranks is not None:
            self._ranks.stop(0.0)
        self._link.close()

    def _answers(self, seconds: float) -> Iterator[Message]:
        """What the controller says within so long, less where this node has news itself; passes signals on to it."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends and not (self._ranks and self._ranks.has_news()):
            with suppress(queue.Empty):
                number = self._events.get_nowait()
                if number in self._signals:  # asked twice: no controller is waited for
                    yield {"kind": "stop", "code": 128 + number, "why": ""}
                self._signals.append(number)
                self._link.send({"kind": "stop", "code": 128 + number, "why": f"got {signal_name(number)}"})
            if answer := self._link.receive(0.05):
                yield answer

    def _beat(self) -> Message:
        assert self._ranks is not None
        return {"kind": "beat", "node": self._number, "mark": self._mark, **self._ranks.report()}

    def _no_answer(self, seconds: float) -> tuple[int, str]:
        where = f"{self._job.nodes[0].name} at {self._job.address}:{self._job.port}"
        if self._ranks is None:
            return USER_ERROR_CODE, (
                f"{self._node.name}: no answer from {where} within {seconds:.0f} s; is the job started there, with the "
                "same MOE_RUNTIME_JOB_SECRET, is the address right, and does a firewall let this host reach that port?"
            )
        return 1, f"{self._node.name}: lost touch with {where} for {seconds:.0f} s; its host or the network is down"

    def _end(self, code: int, why: str) -> int:
        if self._ranks is not None:
            if killed := self._ranks.stop(self._job.shutdown_timeout):
                say(f"{self._node.name}: {killed} did not stop within {self._job.shutdown_timeout:g} s and got SIGKILL")
        self._link.send({"kind": "gone", "node": self._number, "mark": self._mark})
        records.end(self._record, code)
        if why and self._speaks:
            for line in why.splitlines() if self._ranks is None else [why]:
                say(f"error: {line}" if code == USER_ERROR_CODE and self._ranks is None else line)
        return code


class _Ranks:
    """The ranks of this node: torchrun's agent as a child, and the pipes that its ranks write to."""

    def __init__(self, job: Job, number: int, address: str, interface: str, go: Message, mark: str) -> None:
        self._job, self._mark = job, f"{_MARK}={mark}"
        node = job.nodes[number]
        counts: Sequence[int] = go["devices"]
        self._first, self._count = sum(counts[:number]), counts[number]
        self._where = f"{node.name}, {address}"
        self._folder = Path(tempfile.mkdtemp(prefix="moe-launch-"))
        self._failures = self._folder / "failures.json"
        self._log_dir = Path(job.log_dir)
        self._log_dir.mkdir(parents=True, exist_ok=True)
        self._tails: dict[int, deque[str]] = {}
        self._told = False
        sources = [self._pipe(rank, stream) for rank in range(self._count) for stream in ("out", "err")]
        threads = job.threads or max(1, available_cores() // self._count)
        variables = {
            **environment.unless_set({**network_variables(node, address, interface), "OMP_NUM_THREADS": str(threads)}),
            **visible_variables(node),
            "PYTHONUNBUFFERED": "1",
            environment.OUTPUT: str(self._folder),
            _MARK: mark,
            **node.env,
        }
        python = node.python or sys.executable
        arguments = [
            *("--nnodes", str(len(counts)), "--node-rank", str(number), "--nproc-per-node", str(self._count)),
            *("--master-addr", job.address, "--master-port", str(go["store_port"]), "--rdzv-id", job.name),
            *("--rdzv-conf", f"timeout={max(30, int(job.wait_s))}", "--local-addr", address),
            *job.engine_args,
            *("--no-python", python, "-m", "moe_runtime.launch.worker", *job.target),
        ]
        command = [python, "-m", "moe_runtime.launch.elastic", str(self._failures), *arguments]
        child = environment.with_launcher_pid(environment.inherited(variables), os.getpid())
        try:
            self._process = subprocess.Popen(
                command,
                env=child,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
                start_new_session=True,
            )
        except OSError as error:
            raise ConfigError(f"{node.name}: cannot start {python}: {error}; set `python` of the node") from None
        assert self._process.stdout is not None
        sources.append((self._process.stdout.fileno(), -1, "err"))
        self._guard = _guard(self._mark)
        self._over = threading.Event()  # nobody writes any more
        self._relaying = threading.Thread(target=self._relay, args=(sources,), daemon=True)
        self._relaying.start()

    def has_news(self) -> bool:
        """The ranks have ended, and that has not been reported yet."""
        return not self._told and self._process.poll() is not None

    def report(self) -> Message:
        """State of each rank, and how they ended once they have."""
        ended = self._process.poll()
        ranks = {str(self._first + n): "running" if ended is None else "ended" for n in range(self._count)}
        if ended is None:
            return {"ranks": ranks}
        self._told = True
        self._drain()
        if ended == 0:
            return {"ranks": ranks, "code": 0}
        try:
            failures = json.loads(self._failures.read_text())
        except (OSError, ValueError):  # torchrun's agent itself failed
            failures = []
        for rank, code in failures:
            ranks[str(rank)] = f"failed ({code})"
        told = [self._failure(rank, code) for rank, code in failures] or [self._failure(-1, ended)]
        return {"ranks": ranks, **min(told, key=lambda failure: failure["blames_peer"])}

    def stop(self, timeout: float) -> str:
        """SIGTERM to the ranks by way of torchrun's agent, SIGKILL after `timeout` seconds; who needed that, or ""."""
        if self._guard.poll() is not None:
            return ""
        with suppress(ProcessLookupError):
            self._process.terminate()
        # torchrun's agent waits for those of other nodes once its own ranks are done, and hears no signal then.
        killed, ends = "", time.monotonic() + timeout
        while (left := self._has_ranks()) and time.monotonic() < ends:
            time.sleep(0.05)
        if left:
            last = self._first + self._count - 1
            killed = f"rank {last}" if self._count == 1 else f"one of ranks {self._first} to {last}"
        sweep(self._mark)  # whatever the ranks left behind, also after a good ending
        self._process.kill()
        self._process.wait()
        self._drain()
        self._guard.kill()
        self._guard.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
        return killed

    def _has_ranks(self) -> bool:
        return self._process.poll() is None and not set(marked(self._mark)) <= {self._process.pid}

    def _failure(self, rank: int, code: int) -> Message:
        tail = list(self._tails.get(rank, ()))
        ending = f"killed by {signal_name(-code)}" if code < 0 else f"exit code {code}"
        label = f"rank {rank} ({self._where})" if rank >= 0 else f"torchrun's agent ({self._where})"
        code = 128 - code if code < 0 else code
        log = self._log_dir / (f"rank_{rank}.log" if rank >= 0 else "torchrun.log")
        blames = any(line.split(":")[0].endswith(("PeerLost", "PeerTimeout")) for line in tail[-5:])
        return {"code": code, "why": failure_text(label, ending, code, tail, log), "blames_peer": blames}

    def _pipe(self, local_rank: int, stream: str) -> tuple[int, int, str]:
        path = self._folder / f"{local_rank}.{stream}"
        os.mkfifo(path, 0o600)
        # Open for both: reading neither blocks nor ends while ranks come and go.
        return os.open(path, os.O_RDWR | os.O_NONBLOCK), self._first + local_rank, stream

    def _drain(self) -> None:
        """Wait until what the ranks have written is shown; they are gone, so there is no more than the pipes hold."""
        self._over.set()
        self._relaying.join(5.0)

    def _relay(self, sources: list[tuple[int, int, str]]) -> None:
        console = {stream: Sink(number, lambda error: None) for stream, number in (("out", 1), ("err", 2))}
        logs: dict[int, Any] = {}
        cutters = {descriptor: LineCutter() for descriptor, _, _ in sources}
        with selectors.DefaultSelector() as selector:
            for source in sources:
                selector.register(source[0], selectors.EVENT_READ, source)
            while selector.get_map():
                ready = selector.select(0.1)
                if not ready and self._over.is_set():
                    break
                for key, _ in ready:
                    descriptor, rank, stream = key.data
                    try:
                        chunk = os.read(descriptor, 1 << 16)
                    except BlockingIOError:
                        continue
                    if not chunk:  # torchrun's own pipe has ended
                        selector.unregister(descriptor)
                        continue
                    if rank not in logs:
                        name = f"rank_{rank}.log" if rank >= 0 else "torchrun.log"
                        logs[rank] = (self._log_dir / name).open("ab", buffering=0)
                    if self._job.clean_stdout and rank == 0 and stream == "out":
                        console["out"].write(chunk)
                        logs[rank].write(chunk)
                        continue
                    for line in cutters[descriptor].feed(chunk):
                        self._show(line, rank, stream, console, logs[rank])
            for descriptor, rank, stream in sources:
                for line in cutters[descriptor].end():
                    self._show(line, rank, stream, console, logs[rank])
                if rank >= 0:
                    os.close(descriptor)
        for log in logs.values():
            log.close()

    def _show(self, line: str, rank: int, stream: str, console: Mapping[str, Sink], log: Any) -> None:
        if stream == "err":
            self._tails.setdefault(rank, deque(maxlen=500)).append(line)
        log.write(f"{line}\n".encode())
        # What torchrun says of itself is in its log, and in a failure of its own.
        if rank >= 0 and is_shown(self._job.tee, rank, stream):
            shown = "err" if self._job.clean_stdout else stream
            console[shown].write(f"[rank {rank}] {line}\n".encode())


def _controller(job: Job) -> threading.Thread:
    names = [node.name for node in job.nodes]
    devices: list[int] = []

    def check(facts: list[Mapping[str, Any]]) -> list[str]:
        devices[:] = [int(fact["devices"]) for fact in facts]
        return preflight.verdicts(names, facts) or memory(facts)

    def memory(facts: list[Mapping[str, Any]]) -> list[str]:
        sizes = [sizes for path in job.files if (sizes := preflight.checkpoint_bytes(path))]
        if not sizes or "--placement" in job.target or [node.devices for node in job.nodes] != devices:
            return []  # a placement of the user's own; or nodes that the command line does not describe
        return preflight.tight(job.nodes, facts, Cluster(job.nodes).rank_speeds(), sizes[0])

    def start() -> Message:
        return {"devices": devices, "store_port": free_port(job.address)}

    controller = Controller(names, check, start, job.wait_s, job.shutdown_timeout, time.monotonic())
    return serve(controller, job.address, job.port, bytes.fromhex(job.secret))


def _resolve(job: Job) -> str:
    """The address of node 0 as this host sees it. A name that means loopback here means another host elsewhere."""
    try:
        address = socket.gethostbyname(job.address)
    except OSError as error:
        raise ConfigError(f"{job.address}, the host of {job.nodes[0].name}, is not known here ({error})") from None
    if len(job.nodes) > 1 and address.startswith("127.") and not environment.is_loopback(job.address):
        raise ConfigError(
            f"{job.address} is {address} here, which other hosts cannot reach; give --master-addr with its address"
        )
    return address


def _own_address(job: Job, number: int) -> str:
    node = job.nodes[number]
    if node.interface:
        address = preflight.address_of(node.interface)
        if address is None:
            raise ConfigError(f"{node.name}: this host has no interface {node.interface} with an address")
        return address
    if number == 0 or environment.is_loopback(job.address):
        return job.address
    return environment.address_towards(job.address, job.port)


def network_variables(node: Node, address: str, interface: str) -> dict[str, str]:
    """The vendor's variables that say which interface to use: HCCL_IF_IP takes an address, all others a name."""
    row = VENDORS.get(node.vendor)
    named = {"GLOO_SOCKET_IFNAME"} | {name for name in (row.network_variables.value if row else ())}
    variables = {name: interface for name in named if name.endswith("_SOCKET_IFNAME") and interface}
    return variables | ({"HCCL_IF_IP": address} if "HCCL_IF_IP" in named else {})


def visible_variables(node: Node) -> dict[str, str]:
    """The vendor's variable that says which devices the node's ranks may see."""
    if node.visible_devices is None:
        return {}
    row = VENDORS.get(node.vendor)
    names = row.visible_devices.value if row else None
    if not isinstance(names, tuple):
        raise ConfigError(f"{node.name}: visible_devices: vendor {node.vendor} has no variable for it; use env")
    return {names[0]: node.visible_devices}


def _guard(mark: str) -> subprocess.Popen:
    """A process that outlives this one for a moment and sweeps up when it dies, however it dies."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", SWEEP, mark],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _watch(lifeline: int, events: queue.SimpleQueue[int]) -> None:
    while os.read(lifeline, 4096):
        pass
    events.put(signal.SIGHUP)


def main() -> int:
    try:
        match sys.argv[1:]:
            case ["--from-environment"]:
                text, number, host = environment.job_of_engine()
                job = Job.from_json(text)
                named = [n for n, node in enumerate(job.nodes) if node.host == host]
                return run_node(job, named[0] if len(named) == 1 else number)
            case [number] if number.isdecimal():
                line = b""
                while not line.endswith(b"\n"):  # byte by byte: nothing may be left in a buffer
                    byte = os.read(0, 1)
                    if not byte:
                        raise ConfigError("stdin ended before a job came")
                    line += byte
                return run_node(Job.from_json(line.decode()), int(number), lifeline=0)
        raise ConfigError("an agent is started by an engine of moe-launch: give NUMBER and a job on stdin")
    except USER_ERRORS as error:
        print(f"moe-launch: error: {one_line(error)}", file=sys.stderr)
        return USER_ERROR_CODE


if __name__ == "__main__":
    sys.exit(main())

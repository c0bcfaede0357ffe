"""A node's ranks, started by torch.distributed.run's own agent (elastic.py), which is a child of the node's agent.

They write into named pipes that are read here, so that logs and prefixes are those of one machine.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..core import environment
from ..core.errors import ConfigError
from .blame import StoppedFor, blamed, children, is_stopped, rank_of
from .control import BEAT_S, Message
from .job import Job, log_folder, network_variables, ranks_secret, secret_file, visible_variables
from .machine import available_cores
from .output import LineCutter, Sink, failure_text, is_shown
from .process import signal_name, start, start_guard
from .sweep import __file__ as SWEEP
from .sweep import marked, sweep

_MARK = "MOE_RUNTIME_JOB_MARK"


class Ranks:
    """The ranks of this node: torchrun's agent as a child, and the pipes that its ranks write to."""

    def __init__(self, job: Job, number: int, address: str, interface: str, go: Message, mark: str) -> None:
        self._job, self._mark = job, f"{_MARK}={mark}"
        node = job.nodes[number]
        counts: Sequence[int] = go["devices"]
        self._first, self._count = sum(counts[:number]), counts[number]
        self._where = f"{node.name}, {address}"
        self._folder = Path(tempfile.mkdtemp(prefix="moe-launch-"))
        self._failures = self._folder / "failures.json"
        self._log_dir = log_folder(job)
        self._tails: dict[int, deque[str]] = {}
        self._told = False
        self._stopped = StoppedFor(max(1, round(job.silence_s / BEAT_S)))
        sources = [self._pipe(rank, stream) for rank in range(self._count) for stream in ("out", "err")]
        threads = job.threads or max(1, available_cores() // self._count)
        # A key that follows from the job's name only would look like one and keep nobody out.
        guessable = job.engine == "torchrun" and environment.job_secret() is None
        variables = {
            **({} if guessable else secret_file(self._folder, ranks_secret(job))),
            **environment.unless_set({**network_variables(node, address, interface), "OMP_NUM_THREADS": str(threads)}),
            **visible_variables(node),
            "PYTHONUNBUFFERED": "1",
            environment.OUTPUT: str(self._folder),
            environment.RESTARTS: f"{job.attempt}/{job.max_restarts}",
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
        try:
            self._process = start(command, variables, stderr=subprocess.STDOUT)
        except OSError as error:
            raise ConfigError(f"{node.name}: cannot start {python}: {error}; set `python` of the node") from None
        assert self._process.stdout is not None
        sources.append((self._process.stdout.fileno(), -1, "err"))
        self._guard = start_guard(SWEEP, self._mark)
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
            return {"ranks": ranks, **self._stopped_rank()}
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
        # torchrun's agent ends the others with SIGTERM: what came of that is no cause.
        causes = [failure for failure in failures if failure[1] != -signal.SIGTERM] or failures
        told = [self._failure(rank, code) for rank, code in causes] or [self._failure(-1, ended)]
        return {"ranks": ranks, **min(told, key=lambda failure: failure["blames_peer"])}

    def stop(self, timeout: float) -> str:
        """SIGTERM to the ranks by way of torchrun's agent, SIGKILL after `timeout` seconds; who needed that, or "".

        SIGKILL at once to those that are stopped: they would not hear the other.
        """
        if self._guard.poll() is not None:
            return ""
        for pid in filter(is_stopped, children(self._process.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
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

    def _stopped_rank(self) -> Message:
        """A failure, where restarts are allowed and SIGSTOP has kept a rank from running for long enough."""
        if self._job.max_restarts <= 0:  # it may be meant to go on later
            return {}
        for pid in self._stopped.look(children(self._process.pid)):
            rank = rank_of(pid)
            how = f"stopped by SIGSTOP or its like for {self._job.silence_s:g} s (process {pid})"
            why = f"rank {rank} ({self._where}) failed first: {how} (log: {self._log(-1 if rank is None else rank)})"
            return {"code": 128 + signal.SIGSTOP, "why": why, "blames_peer": False}
        return {}

    def _has_ranks(self) -> bool:
        return self._process.poll() is None and not set(marked(self._mark)) <= {self._process.pid}

    def _failure(self, rank: int, code: int) -> Message:
        tail = list(self._tails.get(rank, ()))
        ending = f"killed by {signal_name(-code)}" if code < 0 else f"exit code {code}"
        label = f"rank {rank} ({self._where})" if rank >= 0 else f"torchrun's agent ({self._where})"
        blames = blamed(tail) if code == 1 else None
        code = 128 - code if code < 0 else code
        why = failure_text(label, ending, code, tail, self._log(rank), blames or ())
        return {"code": code, "why": why, "blames_peer": blames is not None}

    def _log(self, rank: int) -> Path:
        return self._log_dir / (f"rank_{rank}.log" if rank >= 0 else "torchrun.log")

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
                        logs[rank] = self._log(rank).open("ab", buffering=0)
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

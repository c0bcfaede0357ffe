"""The local engine: starts the ranks of one machine, relays their output, and leaves no process behind.

It knows processes and pipes and nothing of what the ranks compute. Every rank leads its own session, so one signal
reaches the rank and whatever it started. The first rank to fail decides the job's exit code; whom its end is put down
to is blame.py's to say.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from ..core import environment
from ..core.errors import ConfigError
from .blame import StoppedFor, blamed, culprit, is_stopped, last_error, where_it_is
from .output import LineCutter, Sink, failure_text, is_shown
from .process import say, signal_name, signals_to, start, start_guard
from .worker import USER_ERROR_CODE

if TYPE_CHECKING:
    from .keeper import Keeper

_DRAIN_SECONDS = 2.0  # for output still in the pipes after everyone was killed
_LOOK_S = 0.5  # between looks whether ranks are stopped
_CONSEQUENCE_S = 1.0  # after a failure that is put down to another rank, for that one's own or for others'
_DUMP_S = 0.5  # for a rank that hangs to write where it is


@dataclass(frozen=True)
class Rank:
    """What to start: the command, the variables laid over the launcher's own environment, and a name ("rank 0")."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    label: str


@dataclass(frozen=True)
class Fence:
    """From a keeper: kill this process, the job goes on without it."""

    rank: int
    pid: int


@dataclass(frozen=True)
class More:
    """From a keeper: start one more rank, of this number, on the node of the rank `like`."""

    rank: int
    like: int


@dataclass(frozen=True)
class Over:
    """From a keeper: the job has come to its end. why: "" where that is a good one."""

    why: str


class Ended(NamedTuple):
    """How a job ended. may_restart: a rank failed, and not by a mistake of the user's."""

    code: int
    may_restart: bool


def run_ranks(
    ranks: Sequence[Rank],
    log_dir: Path,
    *,
    shutdown_timeout: float = 10.0,
    clean_stdout: bool = False,
    tee: str | None = None,
    keep: Callable[[queue.SimpleQueue], Keeper] | None = None,
    first: int = 0,
    events: queue.SimpleQueue | None = None,
    stopped_s: float | None = None,
) -> Ended:
    """Start all ranks, wait for them, return how the job ended.

    Its code: 0 when every rank ended with 0; the first failing rank's exit code, or 128 + the signal that killed it;
    128 + the signal that the launcher itself got. With `clean_stdout` only the first rank's stdout reaches stdout, byte
    for byte, and everything else goes to stderr. tee: which lines are shown (is_shown). keep: of a job that survives
    losses: makes its keeper, which is given the events; then the coordinator says when the job is over. first: the
    first rank's number. events: who gives them takes signals himself and puts them there; else this must be the main
    thread. stopped_s: a rank that SIGSTOP has kept from running for so long has failed (its code is 128 + SIGSTOP);
    None: others' deadlines find it. Raises ConfigError when a rank or a log cannot be started.
    """
    takes_signals = events is None
    events = events or queue.SimpleQueue()  # gets a rank that ended, a signal's number, or a keeper's word
    console = [Sink(descriptor, lambda error: events.put(signal.SIGPIPE)) for descriptor in (1, 2)]
    running: list[_Running] = []

    def start_rank(number: int, rank: Rank) -> None:
        shown = [is_shown(tee, number, stream) for stream in ("out", "err")]
        exact = number == 0 or keeper is not None  # any rank may come to write the results
        running.append(_Running(rank, number, log_dir, events, console, clean_stdout, exact, shown))
        watch(running[-1].process.pid)
        if keeper is not None:
            keeper.started(number)

    ending: Over | _Failure | _Running | int | None
    with (
        signals_to(events) if takes_signals else nullcontext(),
        _guard() as watch,
        keep(events) if keep else nullcontext() as keeper,
    ):
        try:
            for number, rank in enumerate(ranks, first):
                extra = keeper.variables if keeper else {}
                start_rank(number, replace(rank, env={**rank.env, **extra}))
            if keeper is None:
                ending = _wait_for_ending(running, events, stopped_s)
            else:
                ending = _keep(running, events, keeper, start_rank, shutdown_timeout)
            if isinstance(ending, int):
                say(f"got {signal_name(ending)}; stopping the ranks (at most {shutdown_timeout:g} s)")
        finally:
            killed = _stop(running, events, shutdown_timeout)
    for ended in running:  # reaped only now, with no group left to signal: see _Running._wait
        with suppress(subprocess.TimeoutExpired):
            ended.process.wait(_DRAIN_SECONDS)
    if killed:
        say(f"{', '.join(killed)} did not stop and got SIGKILL")
    if isinstance(ending, int):
        return Ended(128 + ending, False)
    if ending is None:
        return Ended(0, False)
    if isinstance(ending, Over):
        return Ended(1, False)
    say(ending.summary())
    return Ended(ending.code, ending.code != USER_ERROR_CODE)


class _Running:
    """One started rank: its process, a thread that waits for its end, and a thread for each of its streams."""

    def __init__(
        self,
        rank: Rank,
        number: int,
        log_dir: Path,
        events: queue.SimpleQueue,
        console: list[Sink],
        clean: bool,
        exact: bool,
        shown: list[bool],
    ) -> None:
        self.label, self.rank, self.number = rank.label, rank, number
        self._shown_out, self._shown_err = shown
        self.code: int = -1  # not ended
        self.ending = ""
        self.log_path = _new_log(log_dir, rank.label.replace(" ", "_"))
        self.stderr_tail: deque[str] = deque(maxlen=500)
        try:
            log_file = self.log_path.open("wb", buffering=0)
            self.process = start(rank.argv, rank.env)
        except OSError as error:
            raise ConfigError(f"cannot start {rank.label}: {error}") from None
        log = Sink(log_file.fileno(), lambda error: say(f"{self.log_path}: {error}; the log stops here"))
        stdout = console[1] if clean and not exact else console[0]
        self.threads = [
            threading.Thread(target=self._wait, args=(events, log_file), daemon=True),
            threading.Thread(target=self._relay, args=(self.process.stdout, stdout, log, clean and exact), daemon=True),
            threading.Thread(target=self._relay, args=(self.process.stderr, console[1], log, False), daemon=True),
        ]
        for thread in self.threads:
            thread.start()

    def is_over(self) -> bool:
        """The rank has ended and nobody holds its output any more."""
        return not any(thread.is_alive() for thread in self.threads)

    def blames(self) -> tuple[int, ...] | None:
        """Once it has ended: see blame.blamed. Only an uncaught exception, code 1, can put it down to others."""
        if self.code != 1:
            return None
        self.threads[2].join(_DUMP_S)  # what it wrote last may still be in the pipe
        return blamed(list(self.stderr_tail))

    def _wait(self, events: queue.SimpleQueue, log_file: IO[bytes]) -> None:
        # WNOWAIT leaves a zombie, which keeps the process group's number from going to a stranger until we reap it.
        result = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        assert result is not None  # only WNOHANG gives None
        if result.si_code == os.CLD_EXITED:
            self.ending, self.code = f"exit code {result.si_status}", result.si_status
        else:
            self.ending, self.code = f"killed by {signal_name(result.si_status)}", 128 + result.si_status
        events.put(self)
        for thread in self.threads[1:]:
            thread.join()
        log_file.close()

    def _relay(self, source: IO[bytes], console: Sink, log: Sink, exact: bool) -> None:
        lines = LineCutter()
        prefix = f"[{self.label}] "
        with source:
            while chunk := source.read(1 << 16):
                if exact:
                    console.write(chunk)
                    log.write(chunk)
                    continue
                for line in lines.feed(chunk):
                    self._show(prefix, line, source, console, log)
        for line in lines.end():
            self._show(prefix, line, source, console, log)

    def _show(self, prefix: str, line: str, source: IO[bytes], console: Sink, log: Sink) -> None:
        if source is self.process.stderr:
            self.stderr_tail.append(line)
        if self._shown_err if source is self.process.stderr else self._shown_out:
            console.write(f"{prefix}{line}\n".encode())
        log.write(f"{line}\n".encode())

    def summary(self) -> str:
        return failure_text(self.label, self.ending, self.code, list(self.stderr_tail), self.log_path)


def _new_log(folder: Path, name: str) -> Path:
    """rank_1.log, and rank_1.2.log for the process that takes its place."""
    names = (f"{name}.log", *(f"{name}.{number}.log" for number in range(2, 1000)))
    return next(path for each in names if not (path := folder / each).exists())


def _keep(
    running: list[_Running],
    events: queue.SimpleQueue,
    keeper: Keeper,
    start_rank: Callable[[int, Rank], None],
    shutdown_timeout: float,
) -> Over | _Running | int | None:
    """What ends a job that survives losses: the coordinator's word, a mistake of the user's, or a signal. Lost ranks
    are started again while `restarts` lasts. What is wrong with an added rank is said, and ends nothing."""
    restarts, over, ends = keeper.survival.restarts, None, float("inf")
    added: set[int] = set()
    while time.monotonic() < ends:
        try:
            event = events.get(timeout=None if over is None else max(0.0, ends - time.monotonic()))
        except queue.Empty:
            break
        if isinstance(event, int):
            return event
        if isinstance(event, Over):
            over, ends = event, time.monotonic() + shutdown_timeout
        elif isinstance(event, Fence):
            for one in running:
                if one.process.pid == event.pid and one.code == -1:
                    _signal_groups([one], signal.SIGKILL)
        elif isinstance(event, More):
            added.add(event.rank)
            _add(event, running, start_rank)
        else:
            keeper.exited(event.number, event.process.pid, event.ending)
            if event.code == USER_ERROR_CODE and event.number not in added:
                return event
            if event.code != 0 and over is None:
                say(f"{event.label} has ended ({event.ending}); its log: {event.log_path}")
                if restarts and event.code != USER_ERROR_CODE:
                    restarts -= 1
                    say(f"starting {event.label} again ({restarts} restarts left)")
                    start_rank(event.number, event.rank)
        if all(one.code != -1 for one in running):
            failed = [one for one in running if one.code != 0]
            if over is None and failed and len(failed) == len(running):
                return failed[-1]
            if over is not None or not failed:
                break
    return over if over is not None and over.why else None


def _add(more: More, running: list[_Running], start_rank: Callable[[int, Rank], None]) -> None:
    here = {one.number for one in running}
    like = next((one.rank for one in running if one.number == more.like), None)
    if like is None or more.rank in here:
        say(f"rank {more.rank} is not started: rank {more.like} is none of this host's")
        return
    env = {**like.env, **environment.one_more(like.env, more.rank, more.like, len(here))}
    say(f"starting rank {more.rank}, on the node of rank {more.like}")
    try:
        start_rank(more.rank, replace(like, env=env, label=f"rank {more.rank}"))
    except ConfigError as error:
        say(f"{error}; the job goes on without it")


@dataclass(frozen=True)
class _Failure:
    """Why an attempt has ended. how: of a rank that has not ended itself. witness: who waited for it in vain."""

    rank: _Running
    code: int
    how: str = ""
    witness: _Running | None = None

    def summary(self) -> str:
        if not self.how:
            return self.rank.summary()
        lines = [f"{self.rank.label} failed first: {self.how} (log: {self.rank.log_path})"]
        if stack := where_it_is(list(self.rank.stderr_tail)):
            lines += ["where it was, the innermost call first:", *stack]
        if self.witness is not None:
            lines.append(f"{self.witness.label} waited for it: {last_error(list(self.witness.stderr_tail))}")
        return "\n".join(lines)


def _wait_for_ending(
    running: list[_Running], events: queue.SimpleQueue[_Running | int], stopped_s: float | None
) -> _Failure | int | None:
    """What ends the job: the first rank that fails, a signal to the launcher, or None when all ended well."""
    left = {rank.process.pid: rank for rank in running}
    stopped = StoppedFor(max(1, round((stopped_s or 0.0) / _LOOK_S)))
    while left:
        try:
            event = events.get(timeout=None if stopped_s is None else _LOOK_S)
        except queue.Empty:
            for pid in stopped.look(left):
                how = f"stopped by SIGSTOP or its like for {stopped_s:g} s (process {pid})"
                return _Failure(left[pid], 128 + signal.SIGSTOP, how)
            continue
        if isinstance(event, int):
            return event
        if event.code != 0:
            return _cause(event, running, events)
        del left[event.process.pid]
    return None


def _cause(first: _Running, running: list[_Running], events: queue.SimpleQueue[_Running | int]) -> _Failure | int:
    """Who is to be named where `first` was the first to fail, or a signal that came meanwhile."""
    failed: dict[int, tuple[int, ...] | None] = {}
    event, ends = first, time.monotonic() + _CONSEQUENCE_S
    while True:
        if event.code != 0:
            failed[event.number] = event.blames()
        if None in failed.values() or all(rank.code != -1 for rank in running):
            break
        try:
            got = events.get(timeout=max(0.0, ends - time.monotonic()))
        except queue.Empty:
            break
        if isinstance(got, int):
            return got
        event = got
    alive = {rank.number: rank for rank in running if rank.code == -1}
    stopped = [number for number, rank in alive.items() if is_stopped(rank.process.pid)]
    named = running[culprit(failed, alive, stopped)]
    if named.code != -1:
        return _Failure(named, named.code)
    pid = named.process.pid
    if named.number in stopped:
        return _Failure(named, first.code, f"stopped by SIGSTOP or its like (process {pid})", first)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGQUIT)  # to itself alone: it writes where it is (worker.py)
    time.sleep(_DUMP_S)
    return _Failure(named, first.code, f"it does not answer (process {pid})", first)


def _stop(running: list[_Running], events: queue.SimpleQueue[_Running | int], timeout: float) -> list[str]:
    """SIGTERM to every rank's process group, SIGKILL after `timeout` seconds; returns who needed the latter.

    SIGKILL at once to those that are stopped.
    Also after a good ending: a rank that is done may have left processes behind.
    """
    _signal_groups(running, signal.SIGTERM)
    stopped = [rank for rank in running if rank.code == -1 and is_stopped(rank.process.pid)]
    _signal_groups(stopped, signal.SIGKILL)  # they would not hear the other
    began = time.monotonic()
    while not all(rank.is_over() for rank in running) and time.monotonic() < began + timeout:
        with suppress(queue.Empty):
            if events.get(timeout=0.02) == signal.SIGINT and time.monotonic() > began + 1.0:
                break  # a second Ctrl-C: the user will not wait (timeout(1) sends its signal twice at once)
    killed = [rank.label for rank in running if rank.code == -1 or rank in stopped]
    _signal_groups(running, signal.SIGKILL)
    deadline = time.monotonic() + _DRAIN_SECONDS
    for rank in running:
        for thread in rank.threads:  # one that outlasts this reads from a process that left the rank's session
            thread.join(max(0.0, deadline - time.monotonic()))
    return killed


def _signal_groups(running: list[_Running], number: int) -> None:
    for rank in running:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(rank.process.pid, number)


# Ranks die with the launcher by themselves (worker.py), their children do not. The guard outlives the launcher for a
# moment: its stdin ends when the launcher dies, even by SIGKILL, and it kills the groups it was told about.
_GUARD = """
import os, signal, sys
for group in [int(line) for line in sys.stdin]:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
"""


@contextmanager
def _guard() -> Iterator[Callable[[int], None]]:
    guard = start_guard("-c", _GUARD, "moe-launch-guard")
    told = guard.stdin
    assert told is not None  # it is a pipe

    def watch(group: int) -> None:
        with suppress(BrokenPipeError):
            told.write(f"{group}\n".encode())

    try:
        yield watch
    finally:
        guard.kill()
        guard.wait()
        told.close()

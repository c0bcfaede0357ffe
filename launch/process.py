"""Child processes, signals and the launcher's own words: what the engines and the agent do alike."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from ..core.environment import inherited, with_launcher_pid


def start(argv: Sequence[str], env: Mapping[str, str], stderr: int = subprocess.PIPE) -> subprocess.Popen:
    """Start a child that leads its own session, reads nothing, and writes to pipes of ours; it learns our process id.

    env: laid over our own environment. stderr: subprocess.STDOUT joins both streams. Raises OSError.
    """
    return subprocess.Popen(
        argv,
        env=with_launcher_pid(inherited(env), os.getpid()),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        bufsize=0,
        start_new_session=True,
    )


def start_guard(*arguments: str) -> subprocess.Popen:
    """A bare Python that lives on when we die, however we die: its stdin ends then. arguments: the interpreter's."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        start_new_session=True,
    )


@contextmanager
def signals_to(events: queue.SimpleQueue) -> Iterator[None]:
    """Turn signals to the launcher into events; SimpleQueue.put is safe inside a handler."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup stays in force
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, lambda received, frame: events.put(received)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def signal_name(number: int) -> str:
    """SIGTERM for 15."""
    return {entry.value: entry.name for entry in signal.Signals}.get(number, f"signal {number}")


def say(text: str) -> None:
    """One line of the launcher's own, on stderr."""
    with suppress(OSError):  # stderr may be the very pipe that nobody reads any more
        print(f"moe-launch: {text}", file=sys.stderr, flush=True)

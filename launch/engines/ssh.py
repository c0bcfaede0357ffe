"""Start one agent a node over ssh, from one host; they end when this process does, however it ends.

A job goes over ssh's stdin, never its command line (other users see that), and the open stdin is the agents' lifeline.
"""

from __future__ import annotations

import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from ...core.errors import ConfigError
from ..job import Job
from ..process import say, signals_to

_SSH_FAILED = 255  # ssh(1), EXIT STATUS
_TOGETHER_S = 30.0


def command(job: Job, number: int, ssh_args: Sequence[str]) -> list[str]:
    """The ssh command for one node."""
    node = job.nodes[number]
    settings = [f"{name}={value}" for name, value in node.env.items()]
    agent = [node.python or sys.executable, "-m", "moe_runtime.launch.agent", str(number)]
    remote = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(['env', *settings, *agent])}"
    # Of two values of an option ssh takes the first: the user's.
    return ["ssh", "-T", *ssh_args, "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", node.host, remote]


def run(job: Job, ssh_args: Sequence[str]) -> int:
    """Start the agents, wait for all, return the job's exit code."""
    if not shutil.which("ssh"):
        raise ConfigError("--engine ssh: there is no ssh on PATH; install an OpenSSH client, or use another engine")
    events: queue.SimpleQueue[int] = queue.SimpleQueue()
    children: list[subprocess.Popen] = []
    with signals_to(events):
        try:
            for number in range(len(job.nodes)):
                child = subprocess.Popen(command(job, number, ssh_args), stdin=subprocess.PIPE, start_new_session=True)
                children.append(child)
                assert child.stdin is not None
                with suppress(BrokenPipeError):  # it has failed already: its exit code says so
                    child.stdin.write(job.to_json().encode() + b"\n")
                    child.stdin.flush()
            return _wait(job, children, events)
        finally:
            for child in children:
                with suppress(OSError):
                    child.stdin.close()  # type: ignore[union-attr]
            _end(children, job.shutdown_timeout + 10.0)


def _wait(job: Job, children: list[subprocess.Popen], events: queue.SimpleQueue[int]) -> int:
    failed_since = 0.0
    while True:
        with suppress(queue.Empty):
            number = events.get(timeout=0.05)
            say(f"got {signal.Signals(number).name}; stopping the job (at most {job.shutdown_timeout:g} s)")
            return 128 + number
        codes = [child.poll() for child in children]
        if job.on_loss != "fail":  # hosts may be lost; node 0 knows how the job goes
            if codes[0] is not None:
                return codes[0]
            continue
        if _SSH_FAILED in codes:
            node = job.nodes[codes.index(_SSH_FAILED)]
            say(
                f"error: {node.name} (host {node.host}): ssh could not start the job there, or lost it (its message is "
                f"above); `ssh {node.host} true` must work without a password"
            )
            return 2 if all(code in (None, _SSH_FAILED) for code in codes) else 1
        if any(codes):  # the agents end together, unless one could not take part
            failed_since = failed_since or time.monotonic()
        late = failed_since and time.monotonic() - failed_since > _TOGETHER_S
        if None not in codes or codes[0] is not None or late:
            return next((code for code in codes if code), 0)


def _end(children: list[subprocess.Popen], seconds: float) -> None:
    """Wait for agents that have been told to end, then end ssh itself."""
    ends = time.monotonic() + seconds
    for child in children:
        with suppress(subprocess.TimeoutExpired):
            child.wait(max(0.1, ends - time.monotonic()))
        child.kill()
        child.wait()

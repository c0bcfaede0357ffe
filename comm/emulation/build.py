"""The emulated device's library: compiled on first use into the user's cache folder, by one process at a time.

Refuses to wait past its deadline. The lock is flock(2) on a file: it ends with the process that holds it, so a build
that was killed leaves nothing behind that others wait for.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from ...core import environment
from ...core.errors import VendorUnavailable

SOURCES = tuple(Path(__file__).with_name(name) for name in ("device.cpp", "kernels.cpp"))
_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-fvisibility=hidden")
_INSTALL = "install a C++17 compiler (for instance g++) or name one in CXX"


def device_library(deadline_s: float = 300.0) -> Path:
    """The compiled library, built now if this source was never built for this torch.

    Raises VendorUnavailable, in one line, where it cannot be built or another process has not built it in time.
    """
    folder = environment.user_cache_folder() / "moe_runtime"
    library = folder / f"emulated-{_digest()}.so"
    if library.is_file():
        return library
    deadline = time.monotonic() + deadline_s
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(library.with_suffix(".lock"), deadline, deadline_s):
            if not library.is_file():
                _build(library, deadline)
    except OSError as error:
        raise VendorUnavailable(
            f"the emulated device is built in {folder}, which cannot be used ({error.strerror or error}); "
            "set XDG_CACHE_HOME to a folder that this user can write to"
        ) from error
    return library


def _digest() -> str:
    parts = (torch.__version__, str(sysconfig.get_config_var("SOABI")), " ".join(_FLAGS))
    sources = b"\0".join(source.read_bytes() for source in SOURCES)
    return hashlib.sha256(sources + "\0".join(parts).encode()).hexdigest()[:20]


@contextlib.contextmanager
def _locked(path: Path, deadline: float, deadline_s: float) -> Iterator[None]:
    with open(path, "a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise VendorUnavailable(
                        f"another process has held {path} for {deadline_s:g} s while it builds the emulated device; "
                        "look for its compiler, or try again when it has ended"
                    ) from None
                time.sleep(0.05)
        yield


def _build(library: Path, deadline: float) -> None:
    compiler = _compiler()
    headers = Path(torch.__path__[0]) / "include"
    if not (headers / "torch" / "library.h").is_file():
        raise VendorUnavailable(
            f"the emulated device is built against torch's C++ headers, and torch {torch.__version__} came without "
            f"them ({headers}); install a torch that has them"
        )
    print(f"building the emulated device with {Path(compiler[0]).name}, about 30 s, once", file=sys.stderr, flush=True)
    unfinished = library.with_suffix(f".{os.getpid()}.tmp")
    libraries = Path(torch.__path__[0]) / "lib"
    command = [
        *compiler,
        *_FLAGS,
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        # As a system folder: warnings are for our source, not for torch's.
        *("-isystem", str(headers)),
        *map(str, SOURCES),
        *("-o", str(unfinished)),
        *(f"-L{libraries}", "-lc10", "-ltorch_cpu", "-ltorch"),
    ]
    try:
        code, said = _run(command, deadline)
        if code:
            raise VendorUnavailable(
                f"the emulated device does not compile with {compiler[0]} against torch {torch.__version__}: "
                f"{_first_error(said)}; {_INSTALL}"
            )
        if said.strip():  # warnings: not expected, and not to be hidden
            print(said, file=sys.stderr, flush=True)
        os.replace(unfinished, library)
    finally:
        unfinished.unlink(missing_ok=True)


def _compiler() -> list[str]:
    named = shlex.split(environment.cxx_compiler() or "")
    candidates = [named] if named else [["c++"], ["g++"]]
    for candidate in candidates:
        if shutil.which(candidate[0]):
            return candidate
    missing = f"CXX names {named[0]!r}, which is not there" if named else "neither c++ nor g++ is on the search path"
    raise VendorUnavailable(f"the emulated device is built on first use with a C++ compiler, and {missing}; {_INSTALL}")


def _run(command: list[str], deadline: float) -> tuple[int, str]:
    """Exit code and messages of the compiler, which is ended with all its children when the deadline passes."""
    compiler = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment.inherited({"LC_ALL": "C"}),
        start_new_session=True,
    )
    try:
        said, _ = compiler.communicate(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise VendorUnavailable(
            f"{command[0]} had not compiled the emulated device when the deadline passed; allow more time"
        ) from None
    finally:
        if compiler.poll() is None:
            os.killpg(compiler.pid, signal.SIGKILL)
            compiler.communicate()
    return compiler.returncode, said


def _first_error(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "it said nothing")

"""Facts about this machine that launchers and benchmarks need."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import socket
from pathlib import Path

from ..core.errors import MoeRuntimeError
from ..core.free_memory import free_host_bytes


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_name() -> str:
    """The processor's model name, as far as the system says."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.is_file() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"


def free_port(address: str = "127.0.0.1") -> int:
    """A TCP port that is free at this moment."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


def allow_open_files(most: int = 65536) -> None:
    """Let this process hold as many open files as the system allows it, up to `most`: connections are files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most if hard == resource.RLIM_INFINITY else min(most, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def reset_peak_memory() -> bool:
    """Start this process's high-water mark of resident memory anew; False where the system cannot (see proc(5))."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident_bytes(peak: bool = False) -> int:
    """This process's resident memory now, or its high-water mark. Raises MoeRuntimeError where it is not Linux."""
    field, status = "VmHWM:" if peak else "VmRSS:", Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else ():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise MoeRuntimeError(f"{status} has no {field[:-1]}; resident memory is known on Linux only")


def free_gib() -> float | None:
    """Host memory that new processes can have, in GiB; None where the system does not say."""
    free = free_host_bytes()
    return None if free is None else round(free / (1 << 30), 1)


def trim_memory() -> None:
    """Have the C library give freed memory back to the system, where it can (glibc, see malloc_trim(3))."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

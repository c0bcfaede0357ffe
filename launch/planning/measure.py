"""How fast CPU ranks of this host are, measured in less than a second, for --dry-run.

All ranks of the host are measured together and each gets its part: they share cores and memory when they run. Says
nothing of other hosts and of accelerators; those stand in the cluster file (`tflops`, `memory_gb_s`).
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from ...core.cluster import Cluster, Node
from ...core.errors import MoeRuntimeError
from ..machine import available_cores
from ..preflight import is_here
from .rates import Device, given_device

_SECONDS = 0.15  # for each of the three measurements
_BYTES = 256 << 20  # of all ranks together: more than a cache holds


def devices_of(cluster: Cluster, dtype: str, threads: int | None) -> list[Device | None]:
    """Of each rank [R]: what the cluster file gives, else what is measured here now; None where neither is possible.

    dtype: of the products. threads: of a rank; None is the launcher's default.
    """
    found: dict[str, Device | None] = {}
    unknown = [node for node in cluster.nodes if node.tflops is None and _is_cpu_here(node)]
    ranks = sum(node.devices for node in unknown)
    measured = measure_cpu(ranks, threads or max(1, available_cores() // ranks), dtype) if ranks else None
    for node in cluster.nodes:
        if node.tflops is not None and node.memory_gb_s is not None:
            found[node.name] = given_device(node.tflops, node.memory_gb_s)
        else:
            found[node.name] = measured if node in unknown else None
    return [found[node.name] for node in cluster.rank_nodes()]


def measure_cpu(ranks: int, threads: int, dtype: str) -> Device:
    """One of `ranks` CPU ranks with `threads` threads each, while all of them are busy.

    Threads of this process play the ranks: as many as the cores have room for, the others wait for their turn.
    """
    import torch

    at_once, before = min(ranks, max(1, available_cores() // threads)), torch.get_num_threads()
    torch.set_num_threads(threads)  # of every thread that computes
    meeting = threading.Barrier(at_once, timeout=60.0)
    try:
        with ThreadPoolExecutor(at_once) as pool:
            found = list(pool.map(lambda _: _rates(meeting, at_once, dtype), range(at_once)))
    finally:
        torch.set_num_threads(before)
    flops, read, copied = (statistics.fmean(rates) * at_once / ranks for rates in zip(*found, strict=True))
    alike = f"{ranks} ranks on {available_cores()} cores, " if ranks > 1 else ""
    source = (
        f"measured here now ({alike}{threads} thread{'s'[: threads > 1]} each): {flops / 1e12:.3g} TFLOP/s in {dtype}, "
        f"{read / 1e9:.3g} GB/s read, {copied / 1e9:.3g} GB/s copied"
    )
    return Device(flops, read, copied, source)


def _rates(meeting: threading.Barrier, at_once: int, dtype: str) -> tuple[float, float, float]:
    """(multiply-adds times 2, bytes read, bytes copied) per second of this thread, beside the others."""
    import torch

    kind = getattr(torch, dtype)
    rows, weights = torch.ones(512, 1024, dtype=kind), torch.ones(1024, 1024, dtype=kind)
    buffer = torch.ones(_BYTES // at_once // 4)
    target, num_bytes = torch.empty_like(buffer), buffer.numel() * 4
    return (
        2 * 512 * 1024 * 1024 / _seconds(meeting, lambda: torch.nn.functional.linear(rows, weights)),
        num_bytes / _seconds(meeting, buffer.sum),
        num_bytes / _seconds(meeting, lambda: target.copy_(buffer)),
    )


def _is_cpu_here(node: Node) -> bool:
    """Whether the node's ranks compute on this host's CPU. An emulated device does."""
    if node.vendor not in ("auto", "cpu") and not node.emulate:
        return False
    return is_here(node.host) and (node.vendor == "cpu" or bool(node.emulate) or _found_cpu())


def _found_cpu() -> bool:
    from ...comm.detect import detect

    try:
        return detect().vendor == "cpu"
    except MoeRuntimeError:  # an accelerator that cannot be used: the job will say so
        return False


def _seconds(meeting: threading.Barrier, work: Callable[[], object]) -> float:
    """The median of one call's seconds, from when all threads are there; the first call is not counted."""
    work()
    meeting.wait()
    taken, end = [], time.perf_counter() + _SECONDS
    while not taken or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)

"""Figures: copies, products and exchanges on this rank's device. The median of several runs, after one to warm up."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from ...comm import staging
from .context import Context
from .verdicts import MEASURED, SKIPPED, Outcome

_RUNS = 5
MIB = 1 << 20


def _copied_bytes(context: Context) -> int:
    return (256 if context.on_chip else 8) * MIB


def _seconds(context: Context, action: Callable[[], object], repeats: int = 1) -> float:
    times = []
    for _ in range(_RUNS + 1):
        context.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            action()
        context.synchronize()
        times.append((time.perf_counter() - start) / repeats)
    return statistics.median(times[1:])


def device_copy(context: Context) -> Outcome:
    """Bytes read and written, as STREAM counts them."""
    source = torch.ones(_copied_bytes(context), dtype=torch.uint8, device=context.device)
    place = torch.empty_like(source)
    return _rate(2 * source.numel(), _seconds(context, lambda: place.copy_(source)))


def host_copy(to_device: bool) -> Callable[[Context], Outcome]:
    def run(context: Context) -> Outcome:
        if context.device.type == "cpu":
            return Outcome(SKIPPED, "a CPU's memory is the host's")
        pin = staging.can_pin(context.device.type)
        host = torch.ones(_copied_bytes(context), dtype=torch.uint8, pin_memory=pin)
        device = torch.ones(_copied_bytes(context), dtype=torch.uint8, device=context.device)
        given, place = (host, device) if to_device else (device, host)
        return _rate(host.numel(), _seconds(context, lambda: place.copy_(given, non_blocking=pin)))

    return run


def _rate(size: int, seconds: float) -> Outcome:
    return Outcome(MEASURED, figures=((size / seconds / 1e9, "GB/s"),))


def product(dtype: torch.dtype) -> Callable[[Context], Outcome]:
    """A square matrix product: 4096 wide on a chip, 256 on a CPU."""

    def run(context: Context) -> Outcome:
        width = 4096 if context.on_chip else 256
        a, b = (torch.randn(width, width).to(dtype).to(context.device) for _ in range(2))
        seconds = _seconds(context, lambda: a @ b)
        return Outcome(MEASURED, figures=((2 * width**3 / seconds / 1e12, "TFLOP/s"),))

    return run


def exchange(size: int) -> Callable[[Context], Outcome]:
    """all_to_all_v of `size` bytes, whole KiB, to every rank; GB/s of what leaves a rank for others."""

    def run(context: Context) -> Outcome:
        transport = context.runtime.transport
        if transport.size == 1:
            return Outcome(SKIPPED, "it takes two ranks")
        count = size // 1024
        rows = torch.ones(count * transport.size, 1024, dtype=torch.uint8, device=context.device)
        counts = [count] * transport.size
        seconds = _seconds(context, lambda: transport.all_to_all_v(rows, counts, counts, "check"), 3)
        sent = count * 1024 * (transport.size - 1)
        return Outcome(MEASURED, figures=((sent / seconds / 1e9, "GB/s"), (seconds * 1e6, "us")))

    return run

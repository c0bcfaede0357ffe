"""One rank of `bench dispatch`: it checks every subject against a dense oracle, then measures them in turn.

What a round is: each rank leaves a barrier, dispatches its T tokens, hands the rows it got straight to combine, and
stops its clock when combine has returned. So experts cost nothing, and both exchanges, all index work and all copies
are in. The barrier is a word of shared memory per rank, on which ranks spin: they leave it about a microsecond apart
where each has a core. Nothing is subtracted. memcpy moves the payload that ours must move, there and back, between
warm buffers, on all ranks at once: for "expand" a row per (token, choice), else a row per (token, rank).
"""

from __future__ import annotations

import cProfile
import gc
import json
import mmap
import os
import pstats
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

import moe_runtime

from ...comm import mpi
from ...comm.formats import BLOCK
from ...comm.transport import deadline
from ...core import environment
from ...core.errors import MoeRuntimeError, PeerTimeout, VendorUnavailable
from ..machine import reset_peak_memory, resident_bytes
from .dispatch import FLOOR, FLOOR_EXPAND, OURS, OURS_EXPAND, PLAIN_GLOO, PLAIN_MPI, Settings, schedule
from .plain import Exchange, PlainPath, over_torch
from .world import answer

ROW_DTYPE = torch.bfloat16
_PROFILE_FUNCTIONS = 15
_SPINS = 200  # of the barrier before this rank offers its core to others
# How far a value may be off, of itself. bf16: partial sums and the sum are rounded, 2^-9 each. fp8: e4m3 keeps 3 bits,
# so that the nearest is 2^-4 away at most.
_TOLERANCE = {"bf16": 2.0**-6, "fp8": 2.0**-3.5}
_OF_LARGEST = 2.0**-12  # and of the largest of its row: fp8 has fewer bits for values far below their block's largest


@dataclass(frozen=True)
class Batch:
    """A rank's tokens: x [T, H] bf16, topk_ids [T, K] int64 without repeats, topk_weights [T, K] float32."""

    x: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor

    @classmethod
    def random(cls, settings: Settings, tokens: int, rank: int) -> Batch:
        generator = torch.Generator().manual_seed((settings.seed << 20) + (tokens << 6) + rank)
        x = torch.randn(tokens, settings.hidden, generator=generator).to(ROW_DTYPE)
        scores, ids = torch.rand(tokens, settings.experts, generator=generator).topk(settings.top_k)
        return cls(x, ids, scores / scores.sum(1, keepdim=True))


class Subject(Protocol):
    def run(self, batch: Batch, factors_E: torch.Tensor | None = None) -> Any:
        """One round; y [T, H] where there is one. factors_E float32: what each expert multiplies rows by; None: no
        expert is run, and rows go home as they came."""
        ...


class Ours:
    """runtime.dispatcher. `expand` is dispatch's."""

    def __init__(self, dispatcher: Any, rank: int, expand: bool) -> None:
        self._dispatcher, self._expand = dispatcher, expand
        self._experts = torch.from_numpy(np.array(dispatcher.placement.rank_experts(0, rank)))  # of the local slots

    def run(self, batch: Batch, factors_E: torch.Tensor | None = None) -> torch.Tensor:
        rows, handle = self.start(batch)()
        if factors_E is not None:
            rows = self._compute(rows, handle, factors_E[self._experts])
        return self._dispatcher.combine(rows, handle)

    def halves(self, batch: Batch) -> Iterator[str]:
        """A round that pauses after each half, and names it."""
        finish = self.start(batch)
        yield "start dispatch"
        rows, handle = finish()
        yield "finish dispatch"
        finish = self._dispatcher.start_combine(rows, handle)
        yield "start combine"
        finish()
        yield "finish combine"

    def start(self, batch: Batch) -> Callable[[], tuple[torch.Tensor, Any]]:
        return self._dispatcher.start_dispatch(batch.x, batch.topk_ids, batch.topk_weights, expand=self._expand)

    def _compute(self, rows: torch.Tensor, handle: Any, factors_S: torch.Tensor) -> torch.Tensor:
        if self._expand:
            factors_M = factors_S.repeat_interleave(torch.as_tensor(handle.rows_per_slot))
            return (rows * factors_M.unsqueeze(1)).to(rows.dtype)
        slots_NK = handle.topk_slots.long()
        weights_NK = handle.topk_weights * factors_S[slots_NK.clamp(min=0)]  # a weight is 0 where there is no slot
        return (rows * weights_NK.sum(1, keepdim=True)).to(rows.dtype)


class Plain:
    def __init__(self, exchange: Exchange, rank: int, experts_per_rank: list[int], settings: Settings) -> None:
        wire = "float8_e4m3fn" if settings.dtype == "fp8" else None
        self._path = PlainPath(exchange, rank, experts_per_rank, settings.hidden, ROW_DTYPE, wire)
        first = sum(experts_per_rank[:rank])
        self._experts = slice(first, first + experts_per_rank[rank])

    def run(self, batch: Batch, factors_E: torch.Tensor | None = None) -> torch.Tensor:
        rows, handle = self._path.dispatch(batch.x, batch.topk_ids)
        if factors_E is not None:
            factors_N = factors_E[self._experts].repeat_interleave(handle.rows_per_expert)
            rows = (rows * factors_N.unsqueeze(1)).to(rows.dtype)
        return self._path.combine(rows, handle, batch.topk_weights)


class Floor:
    """memcpy of the bytes that must move: `there`, then `home`, between two buffers that are in memory."""

    def __init__(self, there: int, home: int) -> None:
        self._one, self._other = (np.ones(max(there, home), dtype=np.uint8) for _ in range(2))
        self._there, self._home = there, home

    def run(self, batch: Batch, factors_E: torch.Tensor | None = None) -> None:
        np.copyto(self._other[: self._there], self._one[: self._there])
        np.copyto(self._one[: self._home], self._other[: self._home])


class SpinBarrier:
    """Ranks of one machine meet at words of a shared file, 64 bytes apart. `wait` raises PeerTimeout."""

    def __init__(self, path: Path, rank: int, size: int, timeout_s: float) -> None:
        with path.open("r+b") as file:
            self._words = memoryview(mmap.mmap(file.fileno(), 64 * size)).cast("q")
        self._rank, self._size, self._timeout_s, self._round = rank, size, timeout_s, 0

    def wait(self) -> None:
        self._round += 1
        self._words[8 * self._rank] = self._round
        ends = time.monotonic() + self._timeout_s
        for peer in range(self._size):
            spins = 0
            while self._words[8 * peer] < self._round:
                spins += 1
                if spins > _SPINS:
                    os.sched_yield()
                    if time.monotonic() > ends:
                        raise PeerTimeout(
                            f"rank {self._rank} waited {self._timeout_s:g} s at a barrier for rank {peer}",
                            waiting_rank=self._rank,
                            ranks=(peer,),
                            phase="barrier",
                        )


def measure(settings: Settings, folder: Path, rank: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """The answer of one rank, as JSON has it. Seconds by size, subject and round are this rank's own."""
    torch.set_num_threads(1)
    environment.keep_gloo_on_loopback()
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / "store"), settings.ranks),
        rank=rank,
        world_size=settings.ranks,
        timeout=deadline(settings.timeout_s),
    )
    wanted = {"transport": settings.transport, "timeout_s": settings.timeout_s, "device": "cpu"}
    wanted |= {"wire_format": "fp8"} if settings.dtype == "fp8" else {}
    with moe_runtime.init(wanted) as runtime, torch.no_grad():
        barrier = SpinBarrier(folder / "barrier", rank, settings.ranks, settings.timeout_s)
        dispatcher = runtime.dispatcher(settings.hidden, settings.experts, settings.top_k, ROW_DTYPE)
        ours = {OURS: Ours(dispatcher, rank, False), OURS_EXPAND: Ours(dispatcher, rank, True)}
        slot_rank = dispatcher.placement.slot_rank
        plain, not_measured = plain_paths(settings, rank, np.bincount(slot_rank, minlength=settings.ranks).tolist())
        memory = peak_memory(settings, rank, ours)
        memory["transport"] = runtime.transport.describe()
        gc.collect()
        gc.disable()  # a collection would fall into somebody's round
        sizes, profiles = [], []
        for tokens in settings.tokens:
            batch = Batch.random(settings, tokens, rank)
            num_bytes = bytes_to_move(batch, slot_rank, settings)
            floors = {name: Floor(*num_bytes[name]) for name in (FLOOR, FLOOR_EXPAND)}
            subjects: dict[str, Subject] = {**ours, **plain, **floors}
            errors = check({**ours, **plain}, batch, settings)
            seconds = time_in_turn(subjects, batch, settings, barrier, progress)
            moved = {name: sum(num_bytes[name]) for name in subjects}
            sizes.append({"tokens": tokens, "seconds": seconds, "bytes": moved, "relative_error": errors})
            if settings.profile:
                profiles += [profile(name, one, batch, barrier, rank) for name, one in ours.items()]
            gc.collect()
        described = runtime.describe().splitlines()
    dist.destroy_process_group()
    return {
        "sizes": sizes, "memory": memory, "not_measured": not_measured, "describe": described, "profile": profiles,
    }  # fmt: skip


def plain_paths(settings: Settings, rank: int, experts_per_rank: list[int]) -> tuple[dict[str, Plain], dict[str, str]]:
    """({subject: path}, {subject: why it is not measured})."""
    exchanges = {PLAIN_GLOO: over_torch(dist.group.WORLD)}
    reason = settings.no_mpi
    if not reason:
        try:
            exchanges[PLAIN_MPI] = mpi.AlltoallV(settings.ranks)
        except VendorUnavailable as error:
            reason = str(error)
    made = {name: Plain(exchange, rank, experts_per_rank, settings) for name, exchange in exchanges.items()}
    return made, {PLAIN_MPI: reason} if reason else {}


def bytes_to_move(batch: Batch, slot_rank: np.ndarray, settings: Settings) -> dict[str, tuple[int, int]]:
    """(there, home) by subject: payload bytes of this rank's rows to the experts and of their results; no counts, no
    routing weights. Rows for experts of this very rank are in: they are copied too.
    """
    rank_TK = torch.from_numpy(slot_rank).long()[batch.topk_ids]
    pairs = rank_TK.numel()
    unique = int(torch.zeros(len(rank_TK), settings.ranks).scatter_(1, rank_TK, 1.0).sum())
    home = settings.hidden * ROW_DTYPE.itemsize
    there = settings.hidden + 4 * -(-settings.hidden // BLOCK) if settings.dtype == "fp8" else home
    once, each = (unique * there, unique * home), (pairs * there, pairs * home)
    # Ours sends a token once to a rank also where it expands there; the results come home one by one.
    return {
        OURS: once, OURS_EXPAND: (once[0], each[1]), PLAIN_GLOO: each, PLAIN_MPI: each, FLOOR: once, FLOOR_EXPAND: each,
    }  # fmt: skip


def check(subjects: dict[str, Subject], batch: Batch, settings: Settings) -> dict[str, float]:
    """The relative error (of norms) of every subject, with experts that differ. Raises MoeRuntimeError for a wrong one.

    Expert e multiplies rows by a factor of its own, so the dense result is a product of each token, known here.
    """
    factors_E = 0.5 + (torch.arange(settings.experts) % 31) / 16
    dense = batch.x.float() * (batch.topk_weights * factors_E[batch.topk_ids]).sum(1, keepdim=True)
    allowed = _TOLERANCE[settings.dtype] * dense.abs() + _OF_LARGEST * dense.abs().amax(1, keepdim=True)
    errors = {}
    for name, subject in subjects.items():
        y = subject.run(batch, factors_E).float()
        errors[name] = float((y - dense).norm() / dense.norm())
        wrong = ~((y - dense).abs() <= allowed)  # also a nan
        if wrong.any():
            raise MoeRuntimeError(
                f"{name} does not compute what the dense oracle does ({len(batch.x)} tokens, {settings.dtype}): "
                f"{int(wrong.sum())} of {wrong.numel()} values differ, relative error {errors[name]:.2g}; nothing is "
                "measured"
            )
    return errors


def time_in_turn(
    subjects: dict[str, Subject],
    batch: Batch,
    settings: Settings,
    barrier: SpinBarrier,
    progress: Callable[[str], None],
) -> dict[str, list[float]]:
    """This rank's seconds of every round, by subject."""
    tokens = len(batch.x)
    warm_up = settings.warm_up_cycles(tokens)
    cycles = [list(subjects)] * warm_up + schedule(*settings.cycles(tokens), list(subjects))
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    told = 0.0
    for number, names in enumerate(cycles):
        if time.monotonic() - told > 2:
            told = time.monotonic()
            progress(f"{tokens} tokens, cycle {max(0, number - warm_up)}/{len(cycles) - warm_up}")
        for name in names:
            run = subjects[name].run
            for _ in range(settings.lead_in(tokens)):
                barrier.wait()
                run(batch)
            barrier.wait()
            start = time.perf_counter()
            y = run(batch)
            took = time.perf_counter() - start
            del y  # outside of the next one's round
            if number >= warm_up:
                seconds[name].append(took)
    return seconds


def peak_memory(settings: Settings, rank: int, ours: dict[str, Ours]) -> dict[str, Any]:
    """Bytes by which this rank's resident memory grew at most while ours ran at the largest size, by subject.

    Before anything else runs, so that no other subject's memory is taken for ours. Pages of other ranks' windows that
    this rank wrote to are counted; those of its own that were touched before are not.
    """
    for one in ours.values():
        one.run(Batch.random(settings, 1, rank))
    batch, grown = Batch.random(settings, max(settings.tokens), rank), {}
    for name, one in ours.items():
        has_reset = reset_peak_memory()
        before = resident_bytes() if has_reset else _max_resident_bytes()
        for _ in range(2):
            y = one.run(batch)
            del y
        grown[name] = (resident_bytes(peak=True) if has_reset else _max_resident_bytes()) - before
    return grown


def _max_resident_bytes() -> int:
    """Of the whole life of this process, where its mark cannot be reset."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def profile(name: str, ours: Ours, batch: Batch, barrier: SpinBarrier, rank: int) -> dict[str, Any]:
    """Where a round's time goes on rank 0: by halves, without a profiler, then by function, under cProfile.

    start dispatch: plan, exchange of counts, packing and writing rows. finish dispatch: waiting, unpacking, the plan of
    the expansion. start combine: writing results. finish combine: waiting and the sums. Functions are those with the
    longest time of their own; all figures are per round.
    """
    rounds = 50 if len(batch.x) <= 128 else 4
    halves: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        barrier.wait()
        last = time.perf_counter()
        for half in ours.halves(batch):
            halves[half].append(time.perf_counter() - last)
            last = time.perf_counter()
    profiler = cProfile.Profile()
    for _ in range(rounds):
        barrier.wait()
        if rank == 0:
            profiler.runcall(ours.run, batch)
        else:
            ours.run(batch)
    return {
        "tokens": len(batch.x),
        "subject": name,
        "rounds": rounds,
        "halves_s": {half: statistics.median(times) for half, times in halves.items()},
        "functions": longest_functions(profiler, rounds) if rank == 0 else [],
    }


def longest_functions(profiler: cProfile.Profile, rounds: int) -> list[dict[str, Any]]:
    stats = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    total = sum(own for _, _, own, _, _ in stats.values())
    longest = sorted(stats.items(), key=lambda item: -item[1][2])[:_PROFILE_FUNCTIONS]
    return [
        {
            "function": function if file == "~" else f"{'/'.join(Path(file).parts[-2:])}:{line} {function}",
            "own_s": own / rounds,
            "share": own / total,
            "calls": calls / rounds,
        }
        for (file, line, function), (_, calls, own, _, _) in longest
    ]


def main() -> int:
    folder = Path(sys.argv[1])
    given = json.loads((folder / "settings.json").read_text())
    settings = Settings(**{**given, "tokens": tuple(given["tokens"])})
    rank = environment.read_world().rank

    def progress(line: str) -> None:
        if rank == 0:
            with (folder / "progress").open("a") as file:
                file.write(f"{line}\n")

    answer(folder, rank, lambda: measure(settings, folder, rank, progress))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How prompts reach ranks: rounds of forward passes, and between them one message from every rank.

All ranks know the requests and, from the messages, how many each rank has not finished; so all deal the next ones out
alike, without asking anyone. A rank's reserve lasts for a round; one that has nothing left only takes part in the
others' expert layers.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

import moe_runtime

from ...comm.wire import all_gather_message
from ...overlap import TwoHalves
from .batch import RunningBatch
from .batch import Sequence as Ended
from .requests import Request

PASSES = 16  # of a round, at most: few against what a sequence takes, many against the message after them

_TRIES, _PASSES_TRIED = 4, 2
_WORTH = 0.97  # halves must be that much faster


class Results(Protocol):
    """Who gets the results: some [line, text, number of new tokens, their log-probabilities], then when to look."""

    def take(self, results: list[list]) -> None: ...
    def write(self) -> None: ...


def generate(
    runtime: moe_runtime.Runtime, batches: Sequence[RunningBatch], requests: Sequence[Request], sink: Results | None
) -> None:
    """Continue every request and write what comes to `sink` (rank 0's). Every rank calls with the same requests.

    batches: this rank's running batch, or the two halves of it, on every rank alike.
    """
    queue, held = deque(requests), [0] * runtime.size
    # No longer than a sequence can take: as many as run wait, so few places stay empty for the rest of a round.
    passes = min(PASSES, batches[0].settings.max_new_tokens)
    room = 2 * sum(batch.settings.batch_size for batch in batches)
    halves = TwoHalves(batches[0].model) if len(batches) == 2 else None
    while True:
        for rank in deal(len(queue), held, room):
            request = queue.popleft()
            held[rank] += 1
            if rank == runtime.rank:
                batch = min(batches, key=lambda batch: batch.held)
                batch.add(request.number, request.prompt, request.max_new_tokens)
        if not any(held):
            break
        with torch.inference_mode():
            if halves is not None:
                ended = run_halves(halves, batches, passes)
            else:
                with runtime.join(batches[0].model):
                    ended = batches[0].run(passes)
        mine = [[one.number, one.text, len(one.tokens), one.logprobs] for one in ended]
        for rank, results in enumerate(all_gather_message(runtime.transport, mine, "results")):
            held[rank] -= len(results)
            if sink is not None:
                sink.take(results)
        if sink is not None:
            sink.write()
    if halves is not None:
        halves.close()


def run_halves(halves: TwoHalves, batches: Sequence[RunningBatch], passes: int) -> list[Ended]:
    """RunningBatch.run of both halves, by turns."""
    ended: list[Ended] = []

    def steps(batch: RunningBatch) -> Callable[[], bool]:
        left = iter(range(passes))

        def step() -> bool:
            if not batch.held or next(left, None) is None:
                return False
            ended.extend(batch.step())
            return True

        return step

    halves.run(steps(batches[0]), steps(batches[1]))
    return ended


def halves_pay(
    runtime: moe_runtime.Runtime, model: Any, batch_size: int, prompt: int, chunk: int, new: int
) -> tuple[bool, str]:
    """Whether sequences of `prompt` + `new` tokens come faster in two halves by turns, and why; every rank alike.

    Measured: a pass as in decoding (batch_size tokens) and one as in prefill (chunk tokens at most), without a cache.
    """
    if runtime.size == 1:
        return False, "halves: off, rows do not travel"
    length = max(1, min(prompt, chunk // 2))
    shapes = {"decode": (batch_size, 1), "prefill": (2, length)}
    found = {name: _measure(runtime, model, *shape) for name, shape in shapes.items()}
    passes = {"decode": new / batch_size, "prefill": prompt / (2 * length)}  # of one sequence
    at_once, by_turns = (sum(passes[name] * found[name][kind] for name in found) for kind in (0, 1))
    pays = by_turns < _WORTH * at_once
    told = ", ".join(
        f"{name} pass of {rows * columns} tokens {at_once * 1e3:.1f} ms at once and {by_turns * 1e3:.1f} ms"
        for (name, (rows, columns)), (at_once, by_turns) in zip(shapes.items(), found.values(), strict=True)
    )
    return pays, f"halves: {'on' if pays else 'off'}, measured by turns: {told}"


def _measure(runtime: moe_runtime.Runtime, model: Any, rows: int, columns: int) -> tuple[float, float]:
    """Seconds of a pass of ids [rows, columns] at once, and in halves by turns: the slowest rank's medians."""
    whole = torch.ones(rows, columns, dtype=torch.int64, device=runtime.device)
    first, second = whole.chunk(2)
    halves = TwoHalves(model)
    taken: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for _ in range(_TRIES):
            began = time.perf_counter()
            with runtime.join(model):
                passes = _passes(model, whole)
                while passes():
                    pass
            between = time.perf_counter()
            halves.run(_passes(model, first), _passes(model, second))
            taken[0].append(between - began)
            taken[1].append(time.perf_counter() - between)
    halves.close()
    mine = [statistics.median(seconds[1:]) / _PASSES_TRIED for seconds in taken]
    said = all_gather_message(runtime.transport, mine, "whether halves pay")
    return max(seconds[0] for seconds in said), max(seconds[1] for seconds in said)


def _passes(model: Any, ids: torch.Tensor) -> Callable[[], bool]:
    """A function that makes a forward pass each time, _PASSES_TRIED times."""
    left = iter(range(_PASSES_TRIED))

    def one() -> bool:
        if next(left, None) is None:
            return False
        model(input_ids=ids, use_cache=False)
        return True

    return one


def deal(waiting: int, held: Sequence[int], room: int) -> list[int]:
    """The ranks that the next requests go to, in order: each to the rank that has the fewest, none above `room`."""
    held, ranks = list(held), list[int]()
    while len(ranks) < waiting and min(held) < room:
        ranks.append(held.index(min(held)))
        held[ranks[-1]] += 1
    return ranks

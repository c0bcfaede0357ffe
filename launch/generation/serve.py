"""How prompts reach ranks: rounds of forward passes, and between them one message from every rank.

All ranks know the requests and, from the messages, how many each rank has not finished; so all deal the next ones out
alike, without asking anyone. A rank's reserve lasts for a round; one that has nothing left only takes part in the
others' expert layers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch

import moe_runtime

from ...comm.wire import all_gather_message
from .batch import RunningBatch
from .requests import Request

PASSES = 16  # of a round, at most: few against what a sequence takes, many against the message after them


class Results(Protocol):
    """Who gets the results: some [line, text, number of new tokens, their log-probabilities], then when to look."""

    def take(self, results: list[list]) -> None: ...
    def write(self) -> None: ...


def generate(
    runtime: moe_runtime.Runtime, batch: RunningBatch, requests: Sequence[Request], sink: Results | None
) -> None:
    """Continue every request and write what comes to `sink` (rank 0's). Every rank calls with the same requests."""
    queue, held = deque(requests), [0] * runtime.size
    # No longer than a sequence can take: as many as run wait, so few places stay empty for the rest of a round.
    passes = min(PASSES, batch.settings.max_new_tokens)
    while True:
        for rank in deal(len(queue), held, 2 * batch.settings.batch_size):
            request = queue.popleft()
            held[rank] += 1
            if rank == runtime.rank:
                batch.add(request.number, request.prompt, request.max_new_tokens)
        if not any(held):
            return
        with runtime.join(batch.model), torch.inference_mode():
            ended = batch.run(passes)
        mine = [[one.number, one.text, len(one.tokens), one.logprobs] for one in ended]
        for rank, results in enumerate(all_gather_message(runtime.transport, mine, "results")):
            held[rank] -= len(results)
            if sink is not None:
                sink.take(results)
        if sink is not None:
            sink.write()


def deal(waiting: int, held: Sequence[int], room: int) -> list[int]:
    """The ranks that the next requests go to, in order: each to the rank that has the fewest, none above `room`."""
    held, ranks = list(held), list[int]()
    while len(ranks) < waiting and min(held) < room:
        ranks.append(held.index(min(held)))
        held[ranks[-1]] += 1
    return ranks

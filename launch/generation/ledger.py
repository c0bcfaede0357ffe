"""Who has which request: pure, and equal on all ranks after every round, so that any of them can take over from any."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .requests import Request

Result = list[Any]  # [line, text, number of new tokens, their log-probabilities]


@dataclass
class News:
    """What a rank says after a round. done: results. tokens: of each sequence [line, how many tokens were said before,
    the tokens after those, their log-probabilities]; all of them when it is said for the first time in a view."""

    done: list[Result] = field(default_factory=list)
    tokens: list[list[Any]] = field(default_factory=list)

    def as_message(self) -> list[Any]:
        return [self.done, self.tokens]


@dataclass
class Known:
    """What a rank knows when a view begins. held: lines of its sequences. done: its own results that not all ranks have
    for certain, and those of the last round. since: the view in which it came. sink: it writes the results."""

    held: list[int]
    done: list[Result]
    since: int
    sink: bool

    def as_message(self) -> list[Any]:
        return [self.held, self.done, self.since, self.sink]


class Ledger:
    """waiting: lines nobody works on. held: the lines each rank of the view works on. done: results. tokens: what
    sequences have so far, [tokens, log-probabilities]."""

    def __init__(self, requests: Iterable[Request], size: int) -> None:
        self.requests = {request.number: request for request in requests}
        self.waiting = deque(self.requests)
        self.held: list[set[int]] = [set() for _ in range(size)]
        self.done: dict[int, Result | None] = {}  # None: on other ranks only, from before this one came
        self.tokens: dict[int, tuple[list[int], list[float]]] = {}
        self._latest: list[Result] = []
        self._holds: list[list[int]] = []  # what ranks said they hold when the view began

    def deal(self, room: int, closed: Iterable[int] = ()) -> list[tuple[int, Request]]:
        """(rank, request) for the next ones: each to the rank that has the fewest, none above `room` or closed."""
        closed, dealt = set(closed), []
        open_ranks = [rank for rank in range(len(self.held)) if rank not in closed]
        while self.waiting and open_ranks:
            rank = min(open_ranks, key=lambda rank: len(self.held[rank]))
            if len(self.held[rank]) >= room:
                break
            number = self.waiting.popleft()
            self.held[rank].add(number)
            dealt.append((rank, self.requests[number]))
        return dealt

    def is_over(self) -> bool:
        return not self.waiting and not any(self.held)

    def take(self, said: Sequence[Sequence[Any]]) -> list[Result]:
        """All ranks' News of a round (as messages), in rank order; the results that are new."""
        self._latest = []
        for rank, (done, tokens) in enumerate(said):
            for number, before, added, logprobs in tokens:
                known = self.tokens.setdefault(number, ([], []))
                known[0][before:] = added
                known[1][before if logprobs else 0 :] = logprobs
            for result in done:
                self.held[rank].discard(result[0])
                self.tokens.pop(result[0], None)
                if result[0] not in self.done:
                    self.done[result[0]] = result
                    self._latest.append(result)
        return self._latest

    def known(self, held: Iterable[int], own: Iterable[Result], since: int, sink: bool) -> Known:
        """What this rank has to say when a view begins. own: its results of a round that did not come to its end."""
        return Known(list(held), [*self._latest, *own], since, sink)

    def begin(self, said: Sequence[Sequence[Any]]) -> list[Result]:
        """A view begins; said: all ranks' Known (as messages), in rank order. The results that are new here.

        A sequence that no rank holds waits again. One that two ranks hold cannot be: a rank that lost touch is dead.
        """
        new = []
        latest: dict[int, Result] = {}
        for _, done, _, _ in said:
            for result in done:
                latest[result[0]] = result
                if result[0] not in self.done:
                    self.done[result[0]] = result
                    new.append(result)
        self._holds = [held for held, _, _, _ in said]
        self._divide()
        self._latest = list(latest.values())  # until a round comes to its end, others may have missed this
        return new

    def agree(self, sure: Iterable[int]) -> None:
        """Exactly these lines are done: what the rank that writes the results has, or has written; all ranks alike."""
        self.done = {number: self.done.get(number) for number in sure if number in self.requests}
        self._divide()

    def _divide(self) -> None:
        self.held = [{number for number in held if number not in self.done} for held in self._holds]
        taken = set().union(*self.held)
        self.waiting = deque(n for n in self.requests if n not in self.done and n not in taken)
        for number in self.done:
            self.tokens.pop(number, None)


def sink_of(said: Sequence[Sequence[Any]]) -> int:
    """Which rank of a view writes the results: who did, else the one that has been there longest."""
    return min(range(len(said)), key=lambda rank: (not said[rank][3], said[rank][2], rank))

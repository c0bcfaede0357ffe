"""Generation that survives: random histories of rounds, losses, takeovers and ranks that come, on the real code.

The code of a rank (SurvivingGeneration, Ledger, Sink) runs in a thread; what joins ranks is played here, so that an
exchange can come to its end on some ranks and break on others.
"""

from __future__ import annotations

import argparse
import json
import random
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from moe_runtime.core.errors import PeerLost
from moe_runtime.launch.generation import survive
from moe_runtime.launch.generation.output import Sink, take_up
from moe_runtime.launch.generation.requests import Request
from moe_runtime.launch.generation.survive import SurvivingGeneration

PATIENCE_S = 20.0


class Ended(BaseException):
    """The process of this rank has ended, at the next place where it would wait."""


def tokens_of(number: int) -> list[int]:
    return [number * 100 + at for at in range(3 + number % 5)]


class Batch:
    """What survive.py needs of RunningBatch: each step gives every running sequence its next token."""

    def __init__(self, rank: Rank) -> None:
        self.model, self._rank, self._sequences = None, rank, []
        self.settings = SimpleNamespace(batch_size=2, max_new_tokens=2)

    def sequences(self):
        return list(self._sequences)

    def take_back(self):
        pass

    @property
    def held(self):
        return len(self._sequences)

    def add(self, number, prompt, limit, tokens, logprobs):
        assert tokens_of(number)[: len(tokens)] == list(tokens), "a gap in what was known of a sequence"
        assert number not in [one.number for one in self._sequences]
        self._sequences.append(SimpleNamespace(number=number, tokens=list(tokens), logprobs=list(logprobs), text=None))

    def step(self):
        self._rank.may_break()
        ended = []
        for one in list(self._sequences)[:2]:
            one.tokens.append(tokens_of(one.number)[len(one.tokens)])
            one.logprobs.append(-0.5 * one.tokens[-1])
            if len(one.tokens) == len(tokens_of(one.number)):
                one.text = f"text {one.number}"
                self._sequences.remove(one)
                ended.append(one)
        return ended


class Rank:
    """One process: stands for the runtime too."""

    def __init__(self, world: World, number: int, joins: bool) -> None:
        self.world, self.number, self.joins = world, number, joins
        self.rank, self.size = 0, 1
        self.view = SimpleNamespace(number=0, ranks=(), placement=None)
        self.where, self.given, self.answer = "", None, None  # at what it waits, what it says there, what it is told
        self.over, self.result, self.error = False, None, None
        self.transport, self.draining, self.progress = self, [], None
        self._go = threading.Event()
        self.job = SurvivingGeneration(self, Batch(self), world.requests, world.open_sink)
        self.thread = threading.Thread(target=self._main, daemon=True)

    def may_act(self) -> bool:
        return True

    def _main(self) -> None:
        try:
            self.result = self.job.run()
            if self.result and self.job.sink is not None:
                self.job.sink.close()
        except Ended:
            pass
        except BaseException as error:  # noqa: BLE001 - shown by the test
            self.error = error
        self.over, self.where = True, ""
        self.world.moved.set()

    def wait(self, where: str, given):
        self._go.clear()
        self.where, self.given = where, given
        self.world.moved.set()
        assert self._go.wait(PATIENCE_S), f"rank {self.number} waits at {where}"
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    def goes_on(self, answer) -> None:
        self.where, self.answer = "", answer
        self._go.set()

    def may_break(self) -> None:
        if self.world.breaking and self.world.pick.random() < 0.5:
            raise PeerLost("broken", rank=None, phase="pass")

    # what survive.py asks the runtime

    def recover(self, model, error=None):
        view = self.wait("recover", error)
        if self.number not in view.ranks:
            return False
        self.joins, self.view = False, view
        self.rank, self.size = view.ranks.index(self.number), len(view.ranks)
        return True

    def ready(self, model, notes=()):
        pass

    def take_notes(self):
        return []

    def next_view(self):
        return self.world.boundary

    def join(self, model):
        return nullcontext()

    def spread(self, model, closed=()):
        pass

    def drained(self, position):
        self.world.empty.add(self.view.ranks[position])


class World:
    def __init__(self, seed: int, folder, size: int, count: int) -> None:
        self.pick = random.Random(seed)
        self.moved = threading.Event()
        self.requests = [Request(number, f"prompt {number}") for number in range(1, count + 1)]
        self.path = folder / f"{seed}.jsonl"
        self.path.unlink(missing_ok=True)
        self.breaking, self.boundary, self.empty = False, 0, set()
        self.next_number, self.steps, self.views = size, 0, 1
        self.ranks = [Rank(self, number, joins=False) for number in range(size)]
        self.view = self._new_view(range(size))
        for rank in self.ranks:
            rank.view, rank.rank, rank.size = self.view, rank.number, size
        self._run(self.ranks)

    def open_sink(self, goes_on: bool):
        arguments = argparse.Namespace(json=False, logprobs=True, output=self.path, input=None)
        kept = take_up(self.path, self.requests, True) if goes_on else []
        sink = Sink(self.requests, kept, arguments)
        sink.start()
        return sink, {record["line"] for record in kept}

    def _new_view(self, numbers):
        numbers = tuple(sorted(numbers))
        placement = SimpleNamespace(slot_rank=np.arange(len(numbers)), num_ranks=len(numbers))
        view = SimpleNamespace(number=self.views, ranks=numbers, placement=placement)
        self.views += 1
        return view

    def _run(self, ranks) -> None:
        for rank in ranks:
            rank.thread.start()
        self._settle()

    def _settle(self) -> None:
        """Until every rank waits or is over."""
        while any(not rank.where and not rank.over for rank in self.ranks):
            assert self.moved.wait(PATIENCE_S)
            self.moved.clear()
        for rank in self.ranks:
            if rank.error is not None:
                raise rank.error

    def alive(self):
        return [rank for rank in self.ranks if not rank.over]

    def step(self) -> None:
        self.steps += 1
        members = [rank for rank in self.alive() if rank.number in self.view.ranks and rank.view is self.view]
        gathering = [rank for rank in members if rank.where != "recover"]
        whole = len(members) == len(self.view.ranks) == len(gathering) and len({r.where for r in gathering}) == 1
        if whole and not self.breaking:
            if gathering[0].where == "results":
                self.check_alike(gathering)
            chance = self.pick.random()
            if chance < 0.08:
                self._arrive()
            if chance < 0.75:
                return self._complete(gathering, gathering)
            self.breaking = True
            done = [rank for rank in gathering if self.pick.random() < 0.5]
            dead = [rank for rank in gathering if self.pick.random() < 0.3]
            if len(dead) == len(gathering):
                dead = dead[1:]
            self._complete(gathering, done)
            for rank in dead:
                if not rank.over:
                    rank.goes_on(Ended())
            return self._settle()
        for rank in gathering:  # the exchange has broken for all of them
            rank.goes_on(PeerLost("broken", rank=None, phase=rank.where))
        self._settle()
        left = self.alive()
        if left and all(rank.where == "recover" for rank in left):
            self._take_up(left)
        return None

    def _complete(self, gathering, ranks) -> None:
        said = [json.loads(json.dumps(rank.given)) for rank in gathering]
        for rank in ranks:
            rank.goes_on(json.loads(json.dumps(said)))
        self._settle()

    def _arrive(self) -> None:
        """A rank comes, or one is to leave."""
        draining = {number for rank in self.alive() for number in rank.world.leaving(rank)}
        if self.pick.random() < 0.5 and len(self.alive()) < 5:
            rank = Rank(self, self.next_number, joins=True)
            self.next_number += 1
            self.ranks.append(rank)
            self._run([rank])
            self.boundary = self.views
        elif len(self.view.ranks) - len(draining) > 1:
            leaves = self.pick.choice([n for n in self.view.ranks if n not in draining])
            for rank in self.alive():
                if rank.number in self.view.ranks:
                    rank.draining = [*rank.draining, self.view.ranks.index(leaves)]
            self.boundary = self.views

    def leaving(self, rank):
        return [rank.view.ranks[position] for position in rank.draining if position < len(rank.view.ranks)]

    def _take_up(self, left) -> None:
        leave = {number for rank in left for number in self.leaving(rank)} if self.boundary else set()
        numbers = [rank.number for rank in left if rank.number not in leave] or [rank.number for rank in left]
        self.view = self._new_view(numbers)
        self.breaking, self.boundary = False, 0
        gone = [rank for rank in left if rank.number not in numbers]
        for rank in [*gone, *(rank for rank in left if rank.number in numbers)]:
            rank.draining = []
            rank.goes_on(self.view)
            if rank in gone:
                self._wait_for(rank)
        self._settle()

    def _wait_for(self, rank) -> None:
        """The others meet when it has left (coordinator.py)."""
        rank.thread.join(PATIENCE_S)
        assert rank.over and rank.result is False, rank.error

    def check_alike(self, ranks) -> None:
        first = ranks[0].job.ledger
        for rank in ranks[1:]:
            other = rank.job.ledger
            assert list(other.waiting) == list(first.waiting), "ranks disagree on what waits"
            assert other.held == first.held, "ranks disagree on who works on what"
            assert set(other.done) == set(first.done), "ranks disagree on what is done"
        for place, rank in enumerate(ranks):
            mine = {one.number for one in rank.job._batch.sequences()}

            told = {result[0] for result in rank.given[0][0]}
            assert mine - set(first.done) <= first.held[place] <= mine | told, "it is not worked on"
        for rank in ranks:
            for number, (tokens, logprobs) in rank.job.ledger.tokens.items():
                assert tokens == tokens_of(number)[: len(tokens)] and len(logprobs) == len(tokens)


def run_history(seed: int, folder) -> World:
    world = World(seed, folder, 1 + seed % 4, 3 + seed % 13)
    while world.alive():
        assert world.steps < 2000, "it does not end"
        if all(rank.joins for rank in world.alive()):
            for rank in world.alive():  # came when the work was over
                rank.goes_on(Ended())
            world._settle()
            break
        world.step()
    lines = [json.loads(line) for line in world.path.read_text().splitlines()]
    assert [line["line"] for line in lines] == [request.number for request in world.requests]
    for line in lines:
        expected = tokens_of(line["line"])
        assert line["text"] == f"text {line['line']}" and line["tokens"] == len(expected)
        assert line["logprobs"] == [-0.5 * token for token in expected]
    return world


@pytest.fixture
def gathered(monkeypatch):
    monkeypatch.setattr(survive, "all_gather_message", lambda rank, message, phase: rank.wait(phase, message))


def test_every_result_is_written_once_in_order_whatever_breaks(gathered, tmp_path, capsys):
    for seed in range(400):
        try:
            run_history(seed, tmp_path)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error

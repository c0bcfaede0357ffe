"""Who holds the others up, judged on a small model of ranks that exchange rows: the causes are known there."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.control.coordinator import Coordinator
from moe_runtime.control.server import in_words
from moe_runtime.control.slow import DRAIN_AFTER, EVERY_S, GONE_AFTER, Look, Watch, judge
from moe_runtime.control.words import PROTOCOL

PASSES = 20  # between two looks


@dataclass
class World:
    """Ranks that wait for each other in dispatch and combine, as transports do. Seconds; per_row at all ranks alike."""

    size: int
    rows: dict[int, float] = field(default_factory=dict)  # times the others' 100 a pass
    slower: dict[int, float] = field(default_factory=dict)  # times per row
    dense: dict[int, float] = field(default_factory=dict)  # times the others' 4 ms
    delay: dict[int, float] = field(default_factory=dict)  # of every way from and to a rank
    speed: dict[int, float] = field(default_factory=dict)  # as the cluster file would have it
    exact: bool = True
    noise: random.Random = field(default_factory=lambda: random.Random(0))
    hiccup: tuple[int, int] = (-1, -1)  # (look, rank): that rank takes ten times as long, in one interval

    def history(self, looks: int = 6) -> list[Look]:
        self.clock, self.told = 0.0, {n: self.counters(n) for n in range(self.size)}
        found = [self.look()]
        for number in range(looks - 1):
            for _ in range(PASSES):
                self.one_pass(self.hiccup[1] if self.hiccup[0] == number else -1)
            found.append(self.look())
        return found

    def counters(self, rank: int) -> dict:
        waits = {peer: 0.0 for peer in range(self.size) if peer != rank}
        counted = {"passes": 0, "rows": 0, "experts_s": 0.0, "wait_s": waits}
        return {**counted, "waits_exact": self.exact, "speed": self.speed.get(rank, 1.0)}

    def look(self) -> Look:
        return Look(self.clock, {n: {**told, "wait_s": dict(told["wait_s"])} for n, told in self.told.items()})

    def one_pass(self, stumbles: int) -> None:
        ranks, jitter = range(self.size), self.noise.uniform
        scale = [10.0 if n == stumbles else 1.0 for n in ranks]
        begins = [0.004 * self.dense.get(n, 1.0) * jitter(0.9, 1.1) * scale[n] for n in ranks]
        for half in ("dispatch", "combine"):
            ends = list(begins)
            for n in ranks:
                for peer in self.told[n]["wait_s"]:
                    comes = begins[peer] + self.delay.get(n, 0.0) + self.delay.get(peer, 0.0)
                    self.told[n]["wait_s"][peer] += max(0.0, comes - begins[n])
                    ends[n] = max(ends[n], comes)
            begins = ends
            for n in ranks if half == "dispatch" else ():
                rows = round(100 * self.rows.get(n, 1.0))
                took = rows * 1e-4 * self.slower.get(n, 1.0) * jitter(0.9, 1.1) * scale[n]
                self.told[n]["rows"] += rows
                self.told[n]["experts_s"] += took
                begins[n] += took
        for n in ranks:
            self.told[n]["passes"] += 1
        self.clock += max(begins)


sizes, seeds = st.integers(2, 9), st.integers(0, 9999).map(random.Random)


def named(world: World) -> list[tuple[int, str]]:
    return [(slow.rank, slow.kind) for slow in judge(world.history())]


@settings(max_examples=60, deadline=None)
@given(sizes, seeds, st.tuples(st.integers(0, 4), st.integers(0, 8)), st.booleans())
def test_equal_ranks_are_not_slow_whatever_the_noise_and_one_hiccup(size, noise, hiccup, exact):
    assert named(World(size, noise=noise, hiccup=hiccup, exact=exact)) == []


@settings(max_examples=60, deadline=None)
@given(sizes, seeds, st.data(), st.floats(1.8, 8.0), st.booleans())
def test_a_rank_that_computes_slower_is_named_with_how_much(size, noise, data, times, exact):
    rank, hiccup = (data.draw(st.integers(0, size - 1)) for _ in range(2))
    world = World(size, slower={rank: times}, noise=noise, hiccup=(2, hiccup), exact=exact)
    [slow] = judge(world.history())
    assert (slow.rank, slow.kind) == (rank, "compute") and slow.ratio == pytest.approx(times, rel=0.2)


@settings(max_examples=60, deadline=None)
@given(sizes, seeds, st.data(), st.floats(0.01, 0.6), st.floats(0.5, 12.0))
def test_a_rank_with_few_rows_that_holds_nobody_up_is_not_named_as_slow(size, noise, data, share, times):
    """Weights are read for one row as for many: seconds per row are high there, and nobody waits."""
    rank = data.draw(st.integers(0, size - 1))
    times = min(times, 0.9 / share)
    assert rank not in dict(named(World(size, rows={rank: share}, slower={rank: times}, noise=noise)))


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 9), seeds, st.data(), st.sampled_from(["link", "late", "load"]))
def test_what_the_others_wait_for_is_told_apart(size, noise, data, kind):
    rank = data.draw(st.integers(0, size - 1))
    cause = {"link": {"delay": {rank: 0.02}}, "late": {"dense": {rank: 4.0}}, "load": {"rows": {rank: 3.0}}}[kind]
    assert named(World(size, noise=noise, **cause)) == [(rank, kind)]


def test_two_ranks_cannot_tell_whose_way_it_is_and_blame_nobody():
    assert named(World(2, delay={0: 0.02})) == []


def test_where_the_transport_does_not_know_who_was_late_waits_say_nothing():
    assert named(World(4, delay={0: 0.02}, exact=False)) == []


def test_a_rank_is_judged_by_the_speed_that_the_cluster_file_gives_it():
    half = {"slower": {2: 2.0}, "rows": {2: 0.5}}
    assert named(World(4, **half, speed={2: 0.5})) == []
    assert named(World(4, slower={2: 2.0}, speed={2: 0.5})) == [(2, "load")]
    assert named(World(4, slower={2: 4.0}, rows={2: 0.5}, speed={2: 0.5})) == [(2, "compute")]


def test_too_short_a_history_and_ranks_that_begin_anew_say_nothing():
    history = World(3, slower={1: 5.0}).history(8)
    assert judge(history[:3]) == [] == judge([]) and judge(history[:4])
    again = [Look(look.time, {**look.metrics, 1: history[7 - n].metrics[1]}) for n, look in enumerate(history)]
    assert judge(again) == []  # all its counters fall
    for odd in (
        {},
        {"passes": 3},
        {**history[0].metrics[1], "rows": "many"},
        {**history[0].metrics[1], "wait_s": {0: "x"}},
    ):
        assert judge([Look(look.time, {0: look.metrics[0], 1: odd}) for look in history]) == []


def feed(watch: Watch, world: World, now: float, looks: int = 8) -> tuple[list[dict], list[int], float]:
    events, drains = [], []
    for look in world.history(looks):
        told, drain = watch.look(now + look.time, look.metrics)
        events += told
        drains += drain
    return events, drains, now + look.time + 1.0


def test_looks_are_some_seconds_apart():
    watch = Watch()
    assert watch.is_due(5.0)
    watch.look(5.0, {})
    assert not watch.is_due(5.0 + EVERY_S / 2) and watch.is_due(5.0 + EVERY_S)


def test_a_finding_is_told_once_and_once_when_it_is_over():
    watch = Watch()
    events, drains, now = feed(watch, World(4, slower={1: 3.0}), 0.0)
    assert [(e["rank"], e["slow"], e["over"]) for e in events] == [(1, "compute", False)] and not drains
    events, _, now = feed(watch, World(4), now, looks=10)
    assert [(e["rank"], e["over"]) for e in events] == [(1, True)] and not watch.slow
    assert GONE_AFTER > 1


def test_a_rank_that_leaves_is_forgotten():
    watch = Watch()
    _, _, now = feed(watch, World(4, slower={3: 3.0}), 0.0)
    events, _, _ = feed(watch, World(3), now, looks=1)
    assert [(e["rank"], e["over"]) for e in events] == [(3, True)]


@pytest.mark.parametrize(("limit", "asked"), [(0.0, []), (2.0, [1]), (4.0, [])])
def test_a_drain_is_asked_for_once_and_only_above_the_limit_for_long(limit, asked):
    watch = Watch(limit)
    events, drains, now = feed(watch, World(4, slower={1: 3.0}), 0.0, looks=3 + DRAIN_AFTER - 1)
    assert events and drains == []
    _, drains, _ = feed(watch, World(4, slower={1: 3.0}), now, looks=3 * DRAIN_AFTER)
    assert drains == asked


def watched_job(limit: float, world: World, looks: int) -> Coordinator:
    """A coordinator whose ranks have settled and beat with the world's counters."""
    job, now = Coordinator(world.size, 3.0, 0.0), 1.0
    job.watch = Watch(limit)

    def say(number: int, kind: str, **fields) -> None:
        job.receive(b"%d" % number, {"protocol": PROTOCOL, "rank": number, "mark": "m", "kind": kind, **fields}, now)

    for number in range(world.size):
        say(number, "hello", host="h", pid=number, view=0, members=[], pids=[], settled=False)
    job.tick(now)
    for number in range(world.size):
        say(number, "settled", view=1)
    for look in world.history(looks):
        for _ in range(int(EVERY_S / 0.5)):
            now += 0.5
            for number, metrics in look.metrics.items():
                say(number, "beat", view=1, knows=1, time=now, metrics=metrics)
            job.tick(now)
    return job


def test_a_coordinator_names_a_slow_rank_and_drains_it_above_the_limit():
    job = watched_job(2.0, World(3, slower={1: 3.0}), 14)
    found = [(e["event"], e["rank"]) for e in job.events if e["event"] in ("slow", "drain")]
    assert found == [("slow", 1), ("drain", 1)]
    [slow] = job.status(99.0)["slow"]
    assert (slow["rank"], slow["kind"]) == (1, "compute")
    [event] = [e for e in job.events if e["event"] == "slow"]
    assert in_words(event).startswith("rank 1 holds the others up (compute): ") and "us a row" in in_words(event)
    assert "not hold the others up any more" in in_words({**event, "over": True})
    assert [e["event"] for e in watched_job(0.0, World(3, slower={1: 3.0}), 14).events].count("drain") == 0


def test_a_drain_that_cannot_be_is_said():
    job = watched_job(1.5, World(1), 3)
    job.watch.look = lambda now, metrics: ([], [0])
    job._look_for_slow([], 100.0)
    [note] = [e for e in job.events if e["event"] == "note"]
    assert note["note"] == "slow enough to be drained, but no rank would be left"


def test_no_drain_for_load_or_links():
    for cause in ({"rows": {1: 5.0}}, {"delay": {1: 0.05}}, {"dense": {1: 9.0}}):
        events, drains, _ = feed(Watch(1.01), World(4, **cause), 0.0, looks=20)
        assert events and not drains


def test_a_look_at_many_ranks_does_not_hold_the_coordinator_up():
    history = World(256, slower={7: 3.0}).history(4)
    began = time.perf_counter()
    assert [slow.rank for slow in judge(history)] == [7]
    took = time.perf_counter() - began
    print(f"judging 256 ranks: {took * 1e3:.0f} ms")
    assert took < 2.0

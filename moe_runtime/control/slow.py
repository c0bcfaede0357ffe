"""Which ranks hold the others up, and why, from what all ranks count (metrics.py): pure, and slow to accuse.

A rank's speed is its seconds per row of experts, times the speed that the cluster file gives it, beside the median of
the others. Who is waited for says more: a rank that is waited for and waits for nobody is late by itself; one that
waits for others as long as they wait for it has a slow way to them. What counts is the median over several looks, so
that one hiccup is nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median, median_low
from typing import Any

EVERY_S = 2.0  # between two looks
LOOKS = 6  # that a judgement is made of
GONE_AFTER = 3  # looks without the finding, until it is over
DRAIN_AFTER = 5  # looks above the limit in a row, until the rank is to be drained

SLOWER = 1.4  # times the median of the others, per row
LONGER = 1.1  # and altogether
FEW_ROWS = 0.2  # of the others' median: fixed costs rule there
LEAST_ROWS = 64  # in an interval
LEAST_S = 0.005  # of computing experts in an interval
WAITED = 0.1  # of a pass's time
MORE = 3.0  # times as long as for the others


@dataclass(frozen=True)
class Slow:
    """What is wrong with a rank. kind: "compute" (slower per row), "load" (more rows, no slower), "late" (slow outside
    experts), "link" (slow ways to it). ratio: to the median of the others; per row for compute, rows for load, else
    how long it is waited for."""

    rank: int
    kind: str
    ratio: float
    why: str


@dataclass(frozen=True)
class Look:
    """All members' metrics at a time in seconds, by rank number; as the latest beat of each had them."""

    time: float
    metrics: Mapping[int, Mapping[str, Any]]


@dataclass(frozen=True)
class _Interval:
    """What a rank did between two looks. waits: for each peer."""

    seconds: float
    passes: int
    rows: int
    experts_s: float
    waits: Mapping[int, float]
    exact: bool


def judge(history: Sequence[Look]) -> list[Slow]:
    """The ranks that hold others up, in order. history: the oldest look first; fewer than four looks say nothing."""
    if not history:
        return []
    pairs = list(pairwise(history))
    done = {n: [made for before, after in pairs if (made := _between(n, before, after))] for n in history[-1].metrics}
    known = {n: _Rank(made, history[-1].metrics[n].get("speed") or 1.0) for n, made in done.items() if len(made) >= 3}
    slow = _slow_per_row(known)
    waited = _waited_for({n: rank for n, rank in known.items() if rank.exact}, {one.rank for one in slow})
    return sorted([*slow, *waited], key=lambda found: (found.rank, found.kind))


def _between(rank: int, before: Look, after: Look) -> _Interval | None:
    """What `rank` did; None where the rank was not there, began anew, or made no pass."""
    old, new = before.metrics.get(rank, {}), after.metrics.get(rank, {})
    if not (_is_usable(old) and _is_usable(new)) or after.time <= before.time:
        return None
    passes, rows = new["passes"] - old["passes"], new["rows"] - old["rows"]
    experts_s = new["experts_s"] - old["experts_s"]
    waits = {peer: seconds - old["wait_s"].get(peer, 0.0) for peer, seconds in new["wait_s"].items()}
    if passes <= 0 or min(rows, experts_s, *waits.values(), 0.0) < 0:
        return None
    return _Interval(after.time - before.time, passes, rows, experts_s, waits, new.get("waits_exact") is True)


def _is_usable(told: Mapping[str, Any]) -> bool:
    """A rank that loads has counted nothing yet; one of another version may count otherwise."""
    waits = told.get("wait_s")
    if not isinstance(waits, dict):
        return False
    numbers = [told.get(name) for name in ("passes", "rows", "experts_s")]
    return all(isinstance(number, (int, float)) for number in (*numbers, told.get("speed", 1.0), *waits.values()))


class _Rank:
    """What a rank usually does: medians over intervals. per_row: seconds at speed 1, None where it has too few rows."""

    def __init__(self, made: Sequence[_Interval], speed: float) -> None:
        self.exact = all(one.exact for one in made)
        self.rows = median(one.rows / one.passes for one in made)
        self.load = self.rows / speed
        self.experts_s = median(one.experts_s / one.passes for one in made)
        self.pass_s = median(one.seconds / one.passes for one in made)
        self.waits = {p: median(one.waits.get(p, 0.0) / one.passes for one in made) for p in made[-1].waits}
        enough = [one for one in made if one.rows >= LEAST_ROWS and one.experts_s >= LEAST_S]
        self.per_row = median(one.experts_s / one.rows for one in enough) * speed if len(enough) >= 3 else None


def _slow_per_row(ranks: Mapping[int, _Rank]) -> list[Slow]:
    """One with few rows takes long for each, since weights are read for one row as for many; so a rank is slow only
    where its experts take longer altogether, too."""
    found = []
    for n, rank in ranks.items():
        others = [other for m, other in ranks.items() if m != n and other.per_row is not None]
        if rank.per_row is None or not others or rank.rows < FEW_ROWS * median(other.rows for other in others):
            continue
        usual = median(other.per_row for other in others if other.per_row is not None)
        longer = rank.experts_s > LONGER * median(other.experts_s for other in others)
        if longer and rank.per_row > SLOWER * usual:
            why = f"{rank.per_row * 1e6:.1f} us a row of experts, the others usually take {usual * 1e6:.1f} us"
            found.append(Slow(n, "compute", round(rank.per_row / usual, 2), why))
    return found


def _waited_for(ranks: Mapping[int, _Rank], slow: Collection[int]) -> list[Slow]:
    """Ranks that are waited for much longer than the others, and what that comes from. slow: those slower per row."""
    if len(ranks) < 2:
        return []
    # Seconds a pass. The lower median: where one of two others has a slow way itself, its waits are its own matter.
    waited_for = {n: median_low([r.waits.get(n, 0.0) for m, r in ranks.items() if m != n]) for n in ranks}
    pass_s = median(rank.pass_s for rank in ranks.values())
    found = []
    for n, rank in ranks.items():
        others = [m for m in ranks if m != n]
        waited, usual = waited_for[n], median(waited_for[m] for m in others)
        if waited < WAITED * pass_s or waited < MORE * usual:
            continue
        own = median(rank.waits.get(p, 0.0) for p in others)
        more = rank.experts_s - median(ranks[m].experts_s for m in others)
        ratio = round(waited / max(usual, 0.01 * pass_s), 1)
        told = f"the others wait {waited * 1e3:.1f} ms a pass for it, and it {own * 1e3:.1f} ms for them"
        if own > 0.5 * waited:
            found.append(Slow(n, "link", ratio, f"{told}: the way between is slow"))
        elif more < 0.5 * waited:
            why = f"{told}, its experts take no longer: dense layers, or other work on its host"
            found.append(Slow(n, "late", ratio, why))
        elif n not in slow:
            most = rank.load / max(1.0, median(ranks[m].load for m in others))
            found.append(Slow(n, "load", round(most, 2), f"{told}: {most:.1f} times the rows for its speed"))
    return found


class Watch:
    """Looks every EVERY_S seconds, and says what has changed. drain_above: how many times as slow per row as the others
    a rank may be, DRAIN_AFTER looks in a row, until it is to be drained; 0: for ever."""

    def __init__(self, drain_above: float = 0.0) -> None:
        self.drain_above = drain_above
        self.slow: dict[tuple[int, str], Slow] = {}
        self._history: deque[Look] = deque(maxlen=LOOKS)
        self._absent: dict[tuple[int, str], int] = {}  # looks without a finding that stands
        self._above: dict[int, int] = {}  # looks above the limit, in a row

    def is_due(self, now: float) -> bool:
        return not self._history or now - self._history[-1].time >= EVERY_S

    def look(self, now: float, metrics: Mapping[int, Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[int]]:
        """metrics: of the view's members. Returns (events of what has changed, ranks to be drained now)."""
        if self._history and self._history[-1].metrics.keys() != metrics.keys():
            self._history.clear()  # another view: what was counted in the old one says nothing
        self._history.append(Look(now, {n: dict(told) for n, told in metrics.items()}))
        seen = {(slow.rank, slow.kind): slow for slow in judge(self._history)}
        events = [_event(slow, over=False) for key, slow in seen.items() if key not in self.slow]
        for key in list(self.slow):
            self._absent[key] = 0 if key in seen else self._absent.get(key, 0) + 1
            if self._absent[key] >= GONE_AFTER or key[0] not in metrics:
                events.append(_event(self.slow.pop(key), over=True))
                del self._absent[key]
        self.slow.update(seen)
        return events, self._to_drain(seen.values())

    def _to_drain(self, seen: Any) -> list[int]:
        above = [s.rank for s in seen if s.kind == "compute" and 0 < self.drain_above < s.ratio]
        self._above = {n: self._above.get(n, 0) + 1 for n in above}
        return [n for n, looks in self._above.items() if looks == DRAIN_AFTER]


def _event(slow: Slow, over: bool) -> dict[str, Any]:
    return {"rank": slow.rank, "slow": slow.kind, "ratio": slow.ratio, "why": slow.why, "over": over}

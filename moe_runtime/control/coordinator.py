"""Who is in the job: the coordinator decides on views and touches no socket: messages in, messages out, the time given.

A rank is lost when its process has ended, when it has not been heard of for `silence_s`, or when others report that
the exchange of rows stops because of it. Whoever is lost without having ended is killed by who started it (`fence`),
and is told to end and not answered otherwise: a rank that has had no answer for less than `silence_s` ends by itself
(agent.py). Only then the others get a view without it. A process that is in the view gives up its place in no other
way: one of the same number that comes meanwhile waits. A rank that has been drained leaves by itself; until it has, the
members of the view without it do not meet. A new view needs half of the ranks that are not known to have
ended, and the coordinator is in that half: where a network is cut, the part without the coordinator gets no views, and
a coordinator with the smaller part stops the job.

A coordinator that is started again goes on from the newest view that any rank tells it of. Processes are told apart by
their ids, which views carry, and numbers of views that nobody here has heard of are not given out again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from . import hangs
from .slow import Watch
from .words import BEAT_S, MAX_STACKS, OVER, Message, bounded, problem_with

Out = list[tuple[bytes, Message]]

HOST_S = 1.0  # for who starts ranks on a host, who speaks ten times a second, to be taken for out of reach
FENCE_S = 1.0  # for who started a rank to say that it has ended, once asked to kill it
SUSPECT_S = 0.3  # from a report of a lost rank to believing it: an exit, or its own report, is often just behind
MOST_AT_ONCE = 64  # ranks that hosts have been asked to add and have not started yet
STACKS_S = 1.0  # for stacks of all ranks to come in, before one is killed
MOST_REASONS = 50  # that are counted one by one
LOADING_S = 30.0  # of silence while ranks load: importing and compiling can hold up an agent
RETURN_S = 2.0  # for ranks to come back to a coordinator that was started again
_WHY = 1000  # characters of a reason, at most
_TABLE_BYTES = 8 << 20  # of all members' values of one key
_KEYS = 64  # of tables in one view
_BEAT_S_PER_RANK = 0.0005  # each beat takes some 0.1 ms here: at most a fifth of one core for beats


@dataclass
class View:
    """number: counts up. members: rank numbers, increasing; a rank's place among them is its rank in the view.
    at_boundary: taken up between two steps by all; otherwise at once, by ending whatever exchange is under way."""

    number: int
    members: tuple[int, ...]
    why: str = ""
    at_boundary: bool = False
    pids: tuple[int, ...] = ()  # of the members' processes

    def as_message(self) -> list[Any]:
        return [self.number, list(self.members), self.why, self.at_boundary, list(self.pids)]


@dataclass
class _Rank:
    """What is known of a process. state: starting, ready (to be admitted), member, draining, leaving, done,
    ended."""

    number: int
    mark: str
    sender: bytes
    host: str
    pid: int
    heard: float
    state: str = "starting"
    view: int = 0  # the latest that it has settled in
    claimed: int = 0  # the newest that it had heard of when it said hello
    report: Message | None = None  # that it has lost another, in the present view
    reported: float = 0.0
    phase: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    stacks: Message | None = None


class Coordinator:
    """size: ranks that the job starts with. returning: how many earlier coordinators of the same job have ended; others
    may be in a view already. events: what people are told, oldest first; whoever owns this empties the list."""

    def __init__(self, size: int, silence_s: float, now: float, returning: int = 0) -> None:
        self.size, self.silence_s = size, silence_s
        self.state = "returning" if returning else "starting"
        self.view = View(0, ())
        self.ranks: dict[int, _Rank] = {}
        self.why = ""
        self.events: list[dict[str, Any]] = []
        self.refused: Counter[str] = Counter()  # messages that were none, by what was wrong with them
        self.reports: list[dict[str, Any]] = []  # hang reports that have not been written yet
        self.watch = Watch()  # for ranks that hold the others up
        self.outages: list[float] = []  # seconds, of each that is over
        self._hosts: dict[str, tuple[bytes, float]] = {}
        self._started: dict[str, list[int]] = {}  # numbers of the ranks that each host has started
        self._growing: dict[int, tuple[str, int]] = {}  # rank -> (host, like which rank), until its host has started it
        self._began = now
        self._posts: dict[str, dict[int, bytes]] = {}  # in the present view
        self._fencing: dict[int, tuple[float, str]] = {}  # rank -> (since, why), asked for and not confirmed
        self._losses: dict[int, str] = {}  # ranks that are gone for certain and are in the view still
        self._ended: set[tuple[int, str]] = set()  # (rank, mark) that may not come back
        self._draining: dict[int, bool] = {}  # rank -> its experts are elsewhere
        self._leaving: dict[int, float | None] = {}  # drained ranks; since when others wait for it
        self._meets_from = now + silence_s if returning else now  # by then nobody lives of whom this one cannot know
        self._held = False  # there may be tables that nobody has got
        self._asked_stacks = 0.0
        self._hang: Message | None = None
        self._lost_at = 0.0
        self.news = False  # something was received that `tick` should look at soon; whoever owns this resets it
        self._returning = int(returning)
        self._claims: list[View] = []
        self._free = 1  # the lowest number that a view may get
        self._ended_meanwhile: dict[tuple[int, int], str] = {}  # (rank, pid) that ended while there was no coordinator
        self._can_recover = False  # all ranks have loaded, and have said that they take up new views from here on

    # ---- messages -------------------------------------------------------------------------------------------------

    def receive(self, sender: bytes, message: Any, now: float) -> Out:
        """What has to be said because of a message. Time is looked at in `tick` alone."""
        problem = problem_with(message)
        if problem:
            self.refused[problem if len(self.refused) < MOST_REASONS else "other messages"] += 1
            return [(sender, {"kind": "refused", "why": problem})]
        kind = message["kind"]
        self.news = self.news or kind not in ("beat", "host", "post", "status")
        if kind in ("status", "drain", "grow", "stop"):
            return [(sender, self._asked(kind, message, now))]
        if kind in ("host", "exited"):
            self._hosts[message["host"]] = (sender, now)
            if kind == "host":
                self._started[message["host"]] = message["ranks"]
                self._growing = {n: where for n, where in self._growing.items() if n not in message["ranks"]}
            else:
                self._exited(message["rank"], message["pid"], message["how"], now)
            return [(sender, self._for_host(message["host"]))]
        if self.state == "stopping":
            return [(sender, {"kind": "heard", "time": 0.0, "stop": self.why or OVER})]
        number, mark = message["rank"], message["mark"]
        rank = self.ranks.get(number)
        known = rank is not None and rank.mark == mark
        if (number, mark) in self._ended or known and number in self._fencing:
            return [(sender, {"kind": "refused", "why": f"rank {number} was taken for lost; this process must end"})]
        if kind == "hello":
            return self._hello(sender, message, now)
        if not known:
            return [(sender, {"kind": "again"})]  # say hello first: this coordinator does not know it yet
        rank.sender, rank.heard = sender, now
        if kind == "beat":  # most messages are beats
            rank.phase = bounded(message["state"]) if "state" in message else rank.phase
            rank.metrics = bounded(message["metrics"]) if "metrics" in message else rank.metrics
            if message["view"] > rank.view:
                self._on_settled(rank, message, now)
            return [(sender, {"kind": "heard", "time": message["time"], **self._told(rank, message["knows"])})]
        if kind == "post":
            return self._post(rank, message, now)
        getattr(self, f"_on_{kind}")(rank, message, now)
        return []

    def _hello(self, sender: bytes, message: Message, now: float) -> Out:
        number, claimed, old = message["rank"], message["view"], self.ranks.get(message["rank"])
        new = _Rank(number, message["mark"], sender, message["host"], message["pid"], now, claimed=claimed)
        new.view = claimed if message["settled"] else 0
        if self.state in ("returning", "starting") and claimed:
            if self._returning and self.state == "starting":
                self.state, self._began = "returning", now
            members, pids = tuple(message["members"]), tuple(message["pids"])
            self._claims.append(View(claimed, members, "the coordinator has come back", pids=pids))
            self._draining.update({n: False for n in message.get("draining", [])})
        if old is not None and old.mark == new.mark:
            old.sender, old.heard = sender, now
        elif self.state == "returning":
            if old is not None and (old.claimed or not claimed):
                return []  # two processes of one number: the other one has been in a view, or came first
            self.ranks[number] = new
        elif old is not None and not old.mark and old.pid == new.pid and self._is_in_view(old):
            new.state = old.state  # it is late to come back to a coordinator that was started again
            self.ranks[number] = new
            self._fencing.pop(number, None)
        elif claimed:
            self._ended.add((number, new.mark))
            return [(sender, {"kind": "refused", "why": f"rank {number} was taken for lost; this process must end"})]
        elif old is not None and (self._is_in_view(old) or number in self._leaving):
            if old.state != "done":
                self._suspect(old, "another process has taken its place", now)
            return []  # it says hello again with its next beat
        else:
            if old is not None and self.state == "starting":
                self._gone(old, "another process has taken its place", now)
            self.ranks[number] = new
        out = [(sender, {"kind": "heard", "time": 0.0, "beat_s": self._beat_s(), **self._told(self.ranks[number])})]
        if self.state == "running" and claimed > self.view.number:
            self._free = max(self._free, claimed + 1)
            self._announce(self.view.members, f"rank {number} knew a later view", now, at_boundary=False)
            out += self._to_all()
        return out

    def _begin(self, now: float) -> Out:
        """The first view, once all ranks are here."""
        if self.state != "starting" or len(self.ranks) != self.size:
            return []
        self.state = "running"
        self._announce(tuple(sorted(self.ranks)), "all ranks are here", now, at_boundary=False)
        return self._to_all()

    def _is_in_view(self, rank: _Rank) -> bool:
        return rank.number in self.view.members and rank.state in ("member", "draining", "done")

    def _on_lost(self, rank: _Rank, message: Message, now: float) -> None:
        if message["view"] == self.view.number and rank.report is None and self._is_in_view(rank):
            suspects = [number for number in message["suspects"] if number in self.view.members]
            message = {**message, "why": message["why"][:_WHY], "suspects": suspects[:_WHY]}
            rank.report, rank.reported = message, now
            rank.phase = bounded(message["state"]) if "state" in message else rank.phase
            self._event("report", now, rank=rank.number, suspects=message["suspects"], why=message["why"])

    def _post(self, rank: _Rank, message: Message, now: float) -> Out:
        """A member's value of one key. One that says its own again has missed the table."""
        key, members = message["key"], self.view.members
        if message["view"] != self.view.number or not self._is_in_view(rank):
            return []
        if len(message["value"]) > _TABLE_BYTES // len(members) or len(self._posts) >= _KEYS and key not in self._posts:
            return [(rank.sender, {"kind": "refused", "why": f"rank {rank.number}: too much to post ({key[:40]})"})]
        posted = self._posts.setdefault(key, {})
        again = rank.number in posted
        posted[rank.number] = message["value"]
        self._leaving = {n: now if since is None else since for n, since in self._leaving.items()}
        if message.get("answered") and again:
            return []
        return self._table(key, [rank.number] if again else members, now)

    def _table(self, key: str, to: Sequence[int], now: float) -> Out:
        """All members' values, in the order of the view, once the last one has come and nobody can be in the way."""
        posted, members = self._posts[key], self.view.members
        if len(posted) < len(members):
            return []
        self._held = bool(self._leaving) or now < self._meets_from
        values = [posted[number] for number in members]
        table = {"kind": "table", "view": self.view.number, "key": key, "values": values}
        return [] if self._held else [(self.ranks[number].sender, table) for number in to]

    def _on_ready(self, rank: _Rank, message: Message, now: float) -> None:
        if rank.state == "starting":
            rank.state = "ready"

    def _on_settled(self, rank: _Rank, message: Message, now: float) -> None:
        for note in message.get("notes", [])[:8]:
            self._event("note", now, rank=rank.number, note=str(note)[:_WHY])
        if self.state == "running" and message["view"] > self.view.number:
            return  # no view that was ever announced
        news = rank.view < message["view"] == self.view.number
        rank.view = max(rank.view, message["view"])
        if news and self._settled():
            self._can_recover = True
            outage = round(now - self._lost_at, 3) if self._lost_at else None
            self.outages += [outage] if outage else []
            self._event("settled", now, view=self.view.number, outage_s=outage)
            self._lost_at = 0.0

    def _on_drained(self, rank: _Rank, message: Message, now: float) -> None:
        if message["of"] in self._draining:
            self._draining[message["of"]] = True

    def _on_done(self, rank: _Rank, message: Message, now: float) -> None:
        self._leaving.pop(rank.number, None)
        rank.state = "done"

    def _on_stacks(self, rank: _Rank, message: Message, now: float) -> None:
        rank.stacks = {**message, "text": message["text"][-MAX_STACKS:], "state": bounded(message.get("state", {}))}

    # ---- time -----------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> Out:
        """What has to be said because time has passed, or because of what was just received."""
        if self.state == "returning":
            self._return(now)
        if self.state == "starting":
            return self._begin(now)
        if self.state != "running":
            return []
        out: Out = []
        members = [self.ranks[number] for number in self.view.members if number in self.ranks]
        out += self._weigh_silence(members, now)
        for number, since in self._leaving.items():
            if since is not None and now - since > self.silence_s:
                self._suspect(self.ranks[number], "has been drained and does not leave", now)
        out += self._weigh_reports(members, now)
        for number, (since, why) in list(self._fencing.items()):
            rank = self.ranks[number]
            heard = self._hosts.get(rank.host, (b"", now))[1]
            # Where its host does not answer either, the rank has ended by itself once it has been silent for so long.
            if now - since > (FENCE_S if now - heard < HOST_S else 0.0) and now - rank.heard > self.silence_s:
                self._gone(rank, why, now)
        out += self._fences()
        if self._held and not self._leaving:
            out += [each for key in self._posts for each in self._table(key, self.view.members, now)]
        if members and all(rank.state == "done" for rank in members):
            self._stop("", now)
            out += self._to_all()
        elif self._losses and not self._fencing:
            out += self._without_losses(now)
        elif not self._losses and not self._fencing and self._settled():
            if self.watch.is_due(now):
                self._look_for_slow(members, now)
            out += self._boundary(now)
        return out

    def _weigh_silence(self, members: list[_Rank], now: float) -> Out:
        """Stacks of all are asked for when a rank has been silent for half the time that is allowed."""
        limit = self.silence_s if self._can_recover else max(self.silence_s, LOADING_S)
        silent = [
            rank
            for rank in members
            if rank.state != "done" and rank.number not in self._losses and now - rank.heard > limit / 2
        ]
        lost = [rank for rank in silent if now - rank.heard > limit]
        out: Out = []
        if silent and self._hang is None:
            out = self._ask_stacks(members, now)
        elif not silent and self._hang is not None and not any(rank.report for rank in members):
            self._hang = None  # it was but slow
        if lost and self._hang is not None and "written" not in self._hang:
            why = f"{hangs.names([rank.number for rank in lost])} silent for {limit:g} s"
            self._report_hang(members, lost[0].number, why, now)
        for rank in lost:
            self._suspect(rank, f"has not been heard of for {limit:g} s", now)
        return out

    def _ask_stacks(self, members: list[_Rank], now: float) -> Out:
        self._hang, self._asked_stacks = {}, now
        for rank in members:
            rank.stacks = None
        return [(rank.sender, {"kind": "stacks"}) for rank in members if rank.sender]

    def _look_for_slow(self, members: list[_Rank], now: float) -> None:
        changes, to_drain = self.watch.look(now, {rank.number: rank.metrics for rank in members})
        for change in changes:
            self._event("slow", now, **change)
        for number in to_drain:
            answer = self._asked("drain", {"rank": number}, now)
            if answer["kind"] == "refused":
                self._event("note", now, rank=number, note=f"slow enough to be drained, but {answer['why']}")

    def _weigh_reports(self, members: list[_Rank], now: float) -> Out:
        """Whom to believe: a rank that others wait for and that reports nobody itself is stuck, or out of reach."""
        reports = [rank for rank in members if rank.report is not None]
        if not reports or self._losses or self._fencing:
            return []
        first = min(rank.reported for rank in reports)
        out: Out = []
        if self._hang is None and any(rank.report["timed_out"] for rank in reports):
            out = self._ask_stacks(members, now)
        if self._hang is not None and "written" not in self._hang:
            waited = now - self._asked_stacks
            if now - first < SUSPECT_S or (waited < STACKS_S and not all(rank.stacks for rank in members)):
                return out  # others may be about to say whom they wait for, too
            stuck = blame([(rank.number, rank.report["suspects"]) for rank in reports], self.view.members)
            whom = "" if stuck is None else f"; rank {stuck} is stuck, or cannot be reached"
            waiting = hangs.names([rank.number for rank in reports])
            self._report_hang(members, stuck, f"{waiting} waited in vain{whom}", now)
        if now - first < SUSPECT_S:
            return out
        blamed = blame([(rank.number, rank.report["suspects"]) for rank in reports], self.view.members)
        if blamed is not None:
            said = next(r.report["why"] for r in reports if blamed in r.report["suspects"])
            self._suspect(self.ranks[blamed], f"others wait for it in vain ({said})", now)
            out += self._fences()
        elif now - first > self.silence_s:  # the exchange broke and nobody is to blame: all begin anew
            self._announce(self.view.members, "an exchange broke; all ranks live", now, at_boundary=False)
            out += self._to_all()
        return out

    def _without_losses(self, now: float) -> Out:
        """The next view after losses, or the end where too few are left to be sure that nobody else goes on."""
        done = [n for n in self.view.members if self.ranks[n].state == "done" and n not in self._losses]
        survivors = tuple(n for n in self.view.members if n not in self._losses and n not in done)
        unsure = [n for n in self._losses if (n, self.ranks[n].mark) not in self._ended]
        told = "; ".join(f"rank {n}: {why}" for n, why in sorted(self._losses.items()))[:_WHY]
        if unsure and any(now - self.ranks[n].heard > 5 * self._beat_s() for n in survivors):
            return []  # they may be on the other side of the same cut: each is heard again, or lost as well
        if not self._can_recover:
            self._stop(f"{told}, before all ranks had loaded: start the job again", now)
        elif done and not survivors:
            who = f"{len(done)} of {len(self.view.members)} ranks are done"
            self._stop(f"{who}, the others are lost ({told}): look whether all results are there", now)
        elif not has_quorum(len(survivors), len(unsure)):
            whom = ", ".join(f"rank {n}" for n in unsure)[:_WHY]
            self._stop(
                f"cannot go on with {len(survivors)} of {len(self.view.members)} ranks: {whom} may live on the other "
                f"side of a cut network ({told})",
                now,
            )
        elif not survivors:
            self._stop(f"no rank is left ({told})", now)
        else:
            for number in self._losses:
                self._ended.add((number, self.ranks[number].mark))
            self._announce(survivors, told, now, at_boundary=False, lost=sorted(self._losses))
        return self._to_all()

    def _boundary(self, now: float) -> Out:
        """Ranks that come, and those that have been drained leave, between two steps of all."""
        if any(self.ranks[number].state == "done" for number in self.view.members):
            return []  # the work is over
        here = [rank for rank in self.ranks.values() if now - rank.heard <= self.silence_s]
        ready = sorted(rank.number for rank in here if rank.state == "ready")
        leave = [number for number, empty in self._draining.items() if empty and number in self.view.members]
        members = tuple(sorted({*self.view.members, *ready} - set(leave)))
        if members == self.view.members or not members:
            return []
        why = [f"rank {number} joins" for number in ready] + [f"rank {number} is drained" for number in leave]
        self._announce(members, "; ".join(why)[:_WHY], now, at_boundary=True)
        return self._to_all()

    def _return(self, now: float) -> None:
        """Started again: go on with the newest view that anyone was in, once its members are back or late."""
        newest = max(self._claims, key=lambda view: view.number, default=None)
        if newest is None:  # nobody was in a view yet
            if self._ended_meanwhile and now - self._began > max(RETURN_S, self.silence_s):
                told = "; ".join(f"rank {number}: {how}" for (number, _), how in self._ended_meanwhile.items())
                self._stop(f"no rank has come back that was in a view ({told[:_WHY]})", now)
            elif len(self.ranks) == self.size:
                self.state = "starting"
            return
        members = dict(zip(newest.members, newest.pids, strict=True))
        here = all(self._is_back(number, pid) for number, pid in members.items())
        if not here and now - self._began < max(RETURN_S, self.silence_s):
            return
        self.state, self.view = "running", newest
        # Each view that the earlier one may have announced without any of these hearing of it had lost a member, or was
        # reported from by one that is lost now.
        self._free = newest.number + 1 + self._returning * 2 * len(members)
        self._can_recover = newest.number > 1 or any(rank.view for rank in self.ranks.values())
        self._draining = {number: False for number in self._draining if number in members}
        for number, rank in list(self.ranks.items()):
            if members.get(number) == rank.pid:
                rank.state = rank.state if rank.state == "done" else "member"
            elif number in members or (number, rank.pid) in self._ended_meanwhile:
                del self.ranks[number]  # it has been taken for lost, or waits until the one before it is gone
            elif rank.claimed:
                rank.state, self._leaving[number] = "leaving", None
        for number, pid in members.items():
            if number not in self.ranks:
                self.ranks[number] = _Rank(number, "", b"", "", pid, self._began, "member")
            if number in self._draining and self.ranks[number].state == "member":
                self.ranks[number].state = "draining"
            if how := self._ended_meanwhile.get((number, pid)):
                self._gone(self.ranks[number], how, now, certain=True)
        self._event("coordinator", now, view=newest.number, members=list(newest.members))

    def _is_back(self, number: int, pid: int) -> bool:
        rank = self.ranks.get(number)
        return (number, pid) in self._ended_meanwhile or rank is not None and rank.pid == pid

    # ---- decisions ------------------------------------------------------------------------------------------------

    def _announce(
        self, members: tuple[int, ...], why: str, now: float, at_boundary: bool, lost: Sequence[int] = ()
    ) -> None:
        self._free = max(self._free, self.view.number + 1)
        self.view = View(self._free, members, why, at_boundary, tuple(self.ranks[n].pid for n in members))
        self._posts, self._losses, self._hang = {}, {}, None
        if lost and not self._lost_at:
            self._lost_at = now
        for rank in self.ranks.values():
            rank.report, rank.stacks = None, None
            if rank.number in members:
                rank.state = "draining" if rank.number in self._draining else "member"
            elif rank.state in ("member", "draining"):
                rank.state = "ended" if rank.number in lost else "leaving"
                if rank.state == "leaving":
                    self._leaving[rank.number] = None
        # A rank that was empty may have been given lost experts.
        self._draining = {n: at_boundary and empty for n, empty in self._draining.items() if n in members}
        if members and set(members) <= set(self._draining):
            for number in members:
                self.ranks[number].state = "member"
                self._event("note", now, rank=number, note="stays: no rank would be left that is not being drained")
            self._draining = {}
        self._event("view", now, number=self.view.number, members=list(members), lost=list(lost), why=why)

    def _suspect(self, rank: _Rank, why: str, now: float) -> None:
        """Have it killed; it counts as lost when that is confirmed, or when it must have ended by itself."""
        if rank.state == "done":  # it works no more
            self._losses.setdefault(rank.number, f"has left; {why}")
            self._ended.add((rank.number, rank.mark))
        elif rank.number not in self._fencing and rank.number not in self._losses:
            self._fencing[rank.number] = (now, why)
            self._lost_at = self._lost_at or now
            self._event("suspect", now, rank=rank.number, why=why)

    def _gone(self, rank: _Rank, why: str, now: float, certain: bool = False) -> None:
        _, why = self._fencing.pop(rank.number, (now, why))  # why it was killed says more than that it was
        self._leaving.pop(rank.number, None)
        if certain:
            self._ended.add((rank.number, rank.mark))
        if rank.number in self.view.members and rank.state in ("member", "draining"):
            self._losses.setdefault(rank.number, why)
            self._lost_at = self._lost_at or now
            self._event("lost", now, rank=rank.number, why=why)
        elif rank.state != "done":
            rank.state = "ended"
            if self.state == "starting":
                self._stop(f"rank {rank.number}: {why}, before the job began", now)

    def _exited(self, number: int, pid: int, how: str, now: float) -> None:
        rank, how = self.ranks.get(number), how[:_WHY]
        if self.state == "returning":
            self._ended_meanwhile[number, pid] = how
        elif rank is not None and rank.pid == pid and (number, rank.mark) not in self._ended:
            self._gone(rank, how, now, certain=True)
        elif rank is None and self.state == "starting":
            self._stop(f"rank {number}: {how}, before the job began", now)
        elif rank is None:  # one that was to be added, before it had said a word
            self.ranks[number] = _Rank(number, "", b"", "", pid, now, "ended")

    def _settled(self) -> bool:
        return all(self.ranks[n].view == self.view.number for n in self.view.members if n in self.ranks)

    def _stop(self, why: str, now: float) -> None:
        if self.state != "stopping":
            self.state, self.why = "stopping", why[: 4 * _WHY]
            self._event("end", now, why=why)

    # ---- answers --------------------------------------------------------------------------------------------------

    def _told(self, rank: _Rank, knows: int = 0) -> Message:
        """What every answer to a rank carries. knows: the newest view that it has heard of."""
        if self.state == "stopping":
            return {"stop": self.why or OVER}
        if self.state != "running":
            return {}
        told: Message = {"draining": sorted(self._draining)}
        if self._joins(rank):
            told["joins"] = True
        elif self.view.number > knows:
            told["view"] = self.view.as_message()
        return told

    def _joins(self, rank: _Rank) -> bool:
        """It has come to a job that had begun, and was in no view yet."""
        return not self._is_in_view(rank) and not rank.claimed and not rank.view

    def _to_all(self) -> Out:
        told: dict[bool, Message] = {}  # few messages for many ranks: each is turned into bytes once
        out: Out = []
        for rank in self.ranks.values():
            if rank.sender and rank.state != "ended":
                joins = self._joins(rank)
                if joins not in told:
                    told[joins] = {"kind": "heard", "time": 0.0, "beat_s": self._beat_s(), **self._told(rank)}
                out.append((rank.sender, told[joins]))
        return out

    def _beat_s(self) -> float:
        """Between two beats of a rank: many ranks beat less often, never too seldom for LEASE."""
        return min(max(BEAT_S, max(self.size, len(self.ranks)) * _BEAT_S_PER_RANK), self.silence_s / 6)

    def _for_host(self, host: str) -> Message:
        fence = [[n, self.ranks[n].pid] for n in self._fencing if n in self.ranks and self.ranks[n].host == host]
        over = {"over": True, "why": self.why} if self.state == "stopping" else {}
        start = [[number, like] for number, (where, like) in self._growing.items() if where == host]
        members = list(self.view.members)
        return {"kind": "host", "fence": fence, "start": start, "view": self.view.number, "members": members, **over}

    def _fences(self) -> Out:
        hosts = {self.ranks[number].host for number in self._fencing if number in self.ranks}
        return [(self._hosts[host][0], self._for_host(host)) for host in hosts if host in self._hosts]

    def _asked(self, kind: str, message: Message, now: float) -> Message:
        if kind == "stop":
            self._stop(message.get("why", "asked to stop"), now)
            return {"kind": "stopping"}
        if kind == "drain":
            number = message["rank"]
            if self.state != "running":
                return {"kind": "refused", "why": f"the job is {self.state}"}
            if number not in self.view.members:
                return {"kind": "refused", "why": f"rank {number} is not in view {self.view.number}"}
            if set(self.view.members) <= {*self._draining, number}:
                return {"kind": "refused", "why": "no rank would be left"}
            self._draining.setdefault(number, False)
            if self.ranks[number].state == "member":
                self.ranks[number].state = "draining"
            self._event("drain", now, rank=number)
            return {"kind": "draining", "rank": number}
        if kind == "grow":
            return self._grow(message["ranks"], message.get("like", max(self.view.members, default=0)), now)
        return self.status(now)

    def _grow(self, count: int, like: int, now: float) -> Message:
        """Have the host of rank `like` start more ranks. They join as those do that come back."""
        if self.state != "running":
            return {"kind": "refused", "why": f"the job is {self.state}"}
        if like not in self.view.members:
            return {"kind": "refused", "why": f"rank {like} is not in view {self.view.number}"}
        if not 1 <= count <= MOST_AT_ONCE - len(self._growing):
            return {"kind": "refused", "why": f"{count} ranks: from 1 to {MOST_AT_ONCE} can be added at once"}
        host, hosts = self.ranks[like].host, {self.ranks[number].host for number in self.view.members}
        unheard = [name for name in hosts if name not in self._hosts or now - self._hosts[name][1] >= HOST_S]
        if unheard:  # it may have started ranks of whose numbers a coordinator that has come back does not know
            where = unheard[0].partition(" ")[0] or "a host"
            return {"kind": "refused", "why": f"who starts ranks on {where} is out of reach"}
        taken = {*self.ranks, *self._growing, *(number for numbers in self._started.values() for number in numbers)}
        numbers = list(range(max(taken) + 1, max(taken) + 1 + count))
        self._growing |= {number: (host, like) for number in numbers}
        self._event("grow", now, ranks=numbers, like=like, host=host)
        return {"kind": "growing", "ranks": numbers}

    def status(self, now: float) -> Message:
        """Everything that people may want to see."""
        return {
            "kind": "status",
            "state": self.state,
            "why": self.why,
            "view": self.view.number,
            "members": list(self.view.members),
            "view_why": self.view.why,
            "settled": self._settled(),
            "outages": list(self.outages),
            "slow": [
                {"rank": one.rank, "kind": one.kind, "ratio": one.ratio, "why": one.why}
                for one in self.watch.slow.values()
            ],
            "refused": dict(self.refused),
            "ranks": [
                {
                    "rank": rank.number,
                    "host": rank.host,
                    "pid": rank.pid,
                    "state": rank.state,
                    "heard_s": round(now - rank.heard, 3),
                    "view": rank.view,
                    "at": rank.phase,
                    "metrics": rank.metrics,
                }
                for _, rank in sorted(self.ranks.items())
            ],
        }

    def _event(self, what: str, now: float, **fields: Any) -> None:
        self.events.append({"event": what, "time": now, **fields})

    def _report_hang(self, members: list[_Rank], stuck: int | None, why: str, now: float) -> None:
        self._hang = {"written": True}
        self.reports.append(hangs.build(self.view.number, members, stuck, why, now))


def has_quorum(survivors: int, unsure: int) -> bool:
    """Whether `survivors` ranks that this coordinator hears may go on while `unsure` others may live unseen."""
    return survivors >= unsure


def blame(reports: Sequence[tuple[int, Sequence[int]]], members: Sequence[int]) -> int | None:
    """The rank to remove, from who waits for whom (rank, ranks it waits for); None where nobody can be named.

    One that others wait for and that waits for nobody itself is stuck; the lowest of them goes first. Where all who are
    waited for wait as well, the ways between them are cut: the one whom most wait for, the highest among equals.
    """
    waiting = {rank for rank, _ in reports}
    votes = [suspect for _, suspects in reports for suspect in set(suspects) if suspect in members]
    if not votes:
        return None
    stuck = [suspect for suspect in votes if suspect not in waiting]
    if stuck:
        return min(stuck, key=lambda rank: (-stuck.count(rank), rank))
    return max(votes, key=lambda rank: (votes.count(rank), rank))

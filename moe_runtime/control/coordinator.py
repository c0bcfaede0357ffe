"""Who is in the job: the coordinator decides on views and touches no socket: messages in, messages out, the time given.

A rank is lost when its process has ended, when it has not been heard of for `silence_s`, or when others report that
the exchange of rows stops because of it. Whoever is lost without having ended is killed by who started it (`fence`), or
has stopped by itself: a rank that hears nothing from here for less than `silence_s` ends (member.py). Only then the
others get a view without it. A new view needs half of the ranks that are not known to have ended, and the coordinator
is in that half: where a network is cut, the part without the coordinator gets no views, and a coordinator with the
smaller part stops the job.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from . import hangs
from .slow import Watch
from .words import Message, problem_with

Out = list[tuple[bytes, Message]]

HOST_S = 1.0  # for who starts ranks on a host, who speaks ten times a second, to be taken for out of reach
FENCE_S = 1.0  # for who started a rank to say that it has ended, once asked to kill it
SUSPECT_S = 0.3  # from a report of a lost rank to believing it: an exit, or its own report, is often just behind
STACKS_S = 1.0  # for stacks of all ranks to come in, before one is killed
MOST_REASONS = 50  # that are counted one by one
LOADING_S = 30.0  # of silence while ranks load: importing and compiling can hold up an agent
RETURN_S = 2.0  # for ranks to come back to a coordinator that was started again


@dataclass
class View:
    """number: counts up. members: rank numbers, increasing; a rank's place among them is its rank in the view.
    at_boundary: taken up between two steps by all; otherwise at once, by ending whatever exchange is under way."""

    number: int
    members: tuple[int, ...]
    why: str = ""
    at_boundary: bool = False


@dataclass
class _Rank:
    """What is known of a rank. state: starting, ready (to be admitted), member, draining, done, ended."""

    number: int
    mark: str
    sender: bytes
    host: str
    pid: int
    heard: float
    state: str = "starting"
    view: int = 0  # the latest that it has settled in
    report: Message | None = None  # that it has lost another, in the present view
    reported: float = 0.0
    phase: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    stacks: Message | None = None


class Coordinator:
    """size: ranks that the job starts with. returning: others may be in a view already, since an earlier coordinator
    of the same job has ended. events: what people are told, oldest first; whoever owns this empties the list."""

    def __init__(self, size: int, silence_s: float, now: float, returning: bool = False) -> None:
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
        self._began = now
        self._posts: dict[str, dict[int, bytes]] = {}
        self._fencing: dict[int, tuple[float, str]] = {}  # rank -> (since, why), asked for and not confirmed
        self._losses: dict[int, str] = {}  # ranks that are gone for certain and are in the view still
        self._ended: set[tuple[int, str]] = set()  # (rank, mark) that may not come back
        self._draining: dict[int, bool] = {}  # rank -> its experts are elsewhere
        self._asked_stacks = 0.0
        self._hang: Message | None = None
        self._lost_at = 0.0
        self._claims: list[View] = []
        self._ended_meanwhile: dict[int, str] = {}  # ranks that ended while there was no coordinator
        self._can_recover = False  # all ranks have loaded, and have said that they take up new views from here on

    # ---- messages -------------------------------------------------------------------------------------------------

    def receive(self, sender: bytes, message: Message, now: float) -> Out:
        problem = problem_with(message)
        if problem:
            self.refused[problem if len(self.refused) < MOST_REASONS else "other messages"] += 1
            return [(sender, {"kind": "refused", "why": problem})]
        kind = message["kind"]
        if kind in ("status", "drain", "stop"):
            return [(sender, self._asked(kind, message, now)), *self.tick(now)]
        if kind in ("host", "exited"):
            self._hosts[message["host"]] = (sender, now)
            if kind == "exited":
                self._exited(message["rank"], message["pid"], message["how"], now)
            return [(sender, self._for_host(message["host"])), *self.tick(now)]
        number, mark = message["rank"], message["mark"]
        if (number, mark) in self._ended:
            return [(sender, {"kind": "refused", "why": f"rank {number} was taken for lost; this process must end"})]
        if kind == "hello":
            return [*self._hello(sender, message, now), *self.tick(now)]
        rank = self.ranks.get(number)
        if rank is None or rank.mark != mark:
            return [(sender, {"kind": "again"})]  # say hello first: this coordinator does not know it yet
        rank.sender, rank.heard = sender, now
        getattr(self, f"_on_{kind}")(rank, message, now)
        if kind == "beat":  # most messages are beats: what time brings is looked at in `tick` alone
            return [(sender, {"kind": "heard", "time": message["time"], **self._told(rank)})]
        out: Out = []
        if kind == "post":
            out = self._table(message["key"], message["view"])
        return [*out, *self.tick(now)]

    def _hello(self, sender: bytes, message: Message, now: float) -> Out:
        number, old = message["rank"], self.ranks.get(message["rank"])
        if old is not None and not old.mark:  # a member that came back late to a coordinator that was started again
            old.mark, old.host, old.pid, old.view = message["mark"], message["host"], message["pid"], message["view"]
        if old is not None and old.mark != message["mark"] and old.state != "ended":
            self._gone(old, "another process has taken its place", now)
        if old is None or old.mark != message["mark"]:
            rank = _Rank(number, message["mark"], sender, message["host"], message["pid"], now)
            self.ranks[number] = rank
        rank = self.ranks[number]
        rank.sender, rank.heard = sender, now
        if self.state == "returning" and message["view"]:
            self._claims.append(View(message["view"], tuple(message["members"]), "the coordinator has come back"))
            rank.view = message["view"] if message["settled"] else 0
            self._can_recover = self._can_recover or message["settled"] or message["view"] > 1
        elif self.state == "starting" and len(self.ranks) == self.size:
            self.state = "running"
            self._announce(tuple(sorted(self.ranks)), "all ranks are here", now, at_boundary=False)
        return [(sender, {"kind": "heard", "time": 0.0, **self._told(rank)})]

    def _on_beat(self, rank: _Rank, message: Message, now: float) -> None:
        rank.phase, rank.metrics = message.get("state", rank.phase), message.get("metrics", rank.metrics)

    def _on_lost(self, rank: _Rank, message: Message, now: float) -> None:
        if message["view"] == self.view.number and rank.report is None:
            rank.report, rank.reported = message, now
            rank.phase = message.get("state", rank.phase)
            self._event("report", now, rank=rank.number, suspects=message["suspects"], why=message["why"])

    def _on_post(self, rank: _Rank, message: Message, now: float) -> None:
        if message["view"] == self.view.number:
            self._posts.setdefault(message["key"], {})[rank.number] = message["value"]

    def _on_ready(self, rank: _Rank, message: Message, now: float) -> None:
        if rank.state == "starting" and rank.number not in self.view.members:
            rank.state = "ready"

    def _on_settled(self, rank: _Rank, message: Message, now: float) -> None:
        before = self._settled()
        rank.view = max(rank.view, message["view"])
        for note in message.get("notes", []):
            self._event("note", now, rank=rank.number, note=str(note))
        if self._settled() and not before:
            self._can_recover = True
            outage = round(now - self._lost_at, 3) if self._lost_at else None
            self.outages += [outage] if outage else []
            self._event("settled", now, view=self.view.number, outage_s=outage)
            self._lost_at = 0.0

    def _on_drained(self, rank: _Rank, message: Message, now: float) -> None:
        if message["of"] in self._draining:
            self._draining[message["of"]] = True

    def _on_done(self, rank: _Rank, message: Message, now: float) -> None:
        rank.state = "done"

    def _on_stacks(self, rank: _Rank, message: Message, now: float) -> None:
        rank.stacks = message

    # ---- time -----------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> Out:
        """What has to be said because time has passed, or because of what was just received."""
        if self.state == "returning":
            self._return(now)
        if self.state != "running":
            return []
        out: Out = []
        members = [self.ranks[number] for number in self.view.members if number in self.ranks]
        out += self._weigh_silence(members, now)
        out += self._weigh_reports(members, now)
        for number, (since, why) in list(self._fencing.items()):
            heard = self._hosts.get(self.ranks[number].host, (b"", 0.0))[1]
            # Where its host does not answer either, the rank has stopped by itself by now.
            if now - since > (FENCE_S if now - heard < HOST_S else 0.0):
                del self._fencing[number]
                self._gone(self.ranks[number], why, now)
        out += self._fences()
        if self._losses and not self._fencing:
            out += self._without_losses(now)
        elif not self._losses and not self._fencing and self._settled():
            out += self._boundary(now)
        if members and all(rank.state == "done" for rank in members):
            self._stop("", now)
            out += self._to_all()
        elif self.watch.is_due(now) and self._settled():
            self._look_for_slow(members, now)
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
        survivors = tuple(n for n in self.view.members if n not in self._losses)
        unsure = [n for n in self._losses if (n, self.ranks[n].mark) not in self._ended]
        told = "; ".join(f"rank {n}: {why}" for n, why in sorted(self._losses.items()))
        if not self._can_recover:
            self._stop(f"{told}, before all ranks had loaded: start the job again", now)
        elif not has_quorum(len(survivors), len(unsure)):
            whom = ", ".join(f"rank {n}" for n in unsure)
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
        ready = [rank.number for rank in self.ranks.values() if rank.state == "ready"]
        leave = [number for number, empty in self._draining.items() if empty and number in self.view.members]
        members = tuple(sorted({*self.view.members, *ready} - set(leave)))
        if members == self.view.members or not members:
            return []
        why = [f"rank {number} joins" for number in ready] + [f"rank {number} is drained" for number in leave]
        self._announce(members, "; ".join(why), now, at_boundary=True)
        return self._to_all()

    def _return(self, now: float) -> None:
        """Started again: go on with the newest view that anyone was in, once its members are back or late."""
        newest = max(self._claims, key=lambda view: view.number, default=None)
        here = newest is not None and all(n in self.ranks or n in self._ended_meanwhile for n in newest.members)
        if not here and now - self._began < max(RETURN_S, self.silence_s):
            return
        if newest is None:  # nobody was in a view yet
            self.state = "starting"
            if len(self.ranks) == self.size:
                self.state = "running"
                self._announce(tuple(sorted(self.ranks)), "all ranks are here", now, at_boundary=False)
            return
        self.state, self.view = "running", newest
        for number in newest.members:
            if number in self.ranks:
                self.ranks[number].state = "member"
            else:
                self.ranks[number] = _Rank(number, "", b"", "", 0, self._began, "member")
        for number, how in self._ended_meanwhile.items():
            if number in newest.members and not self.ranks[number].mark:
                self._gone(self.ranks[number], how, now, certain=True)
        self._event("coordinator", now, view=newest.number, members=list(newest.members))

    # ---- decisions ------------------------------------------------------------------------------------------------

    def _announce(
        self, members: tuple[int, ...], why: str, now: float, at_boundary: bool, lost: Sequence[int] = ()
    ) -> None:
        taken = [self.view.number, *(rank.phase.get("view", 0) for rank in self.ranks.values())]
        self.view = View(max(n for n in taken if isinstance(n, int)) + 1, members, why, at_boundary)
        self._posts, self._losses, self._hang = {}, {}, None
        if lost and not self._lost_at:
            self._lost_at = now
        for rank in self.ranks.values():
            rank.report, rank.stacks = None, None
            if rank.number in members:
                rank.state = "draining" if rank.number in self._draining else "member"
            elif rank.state in ("member", "draining"):
                rank.state = "ended" if rank.number in lost else "done"
        for number in [n for n in self._draining if n not in members]:
            del self._draining[number]
        self._event("view", now, number=self.view.number, members=list(members), lost=list(lost), why=why)

    def _suspect(self, rank: _Rank, why: str, now: float) -> None:
        """Have it killed; it counts as lost when that is confirmed, or FENCE_S has passed."""
        if rank.number not in self._fencing and rank.number not in self._losses:
            self._fencing[rank.number] = (now, why)
            self._lost_at = self._lost_at or now
            self._event("suspect", now, rank=rank.number, why=why)

    def _gone(self, rank: _Rank, why: str, now: float, certain: bool = False) -> None:
        self._fencing.pop(rank.number, None)
        if certain:
            self._ended.add((rank.number, rank.mark))
        if rank.number in self.view.members and rank.state in ("member", "draining"):
            self._losses.setdefault(rank.number, why)
            self._lost_at = self._lost_at or now
            self._event("lost", now, rank=rank.number, why=why)
        elif rank.state != "done":
            rank.state = "ended"
            if self.state == "starting":
                self._stop(f"rank {rank.number} {why} before the job began", now)

    def _exited(self, number: int, pid: int, how: str, now: float) -> None:
        rank = self.ranks.get(number)
        if rank is not None and rank.pid == pid and (number, rank.mark) not in self._ended:
            self._gone(rank, how, now, certain=True)
        elif rank is None and self.state == "starting":
            self._stop(f"rank {number} {how} before the job began", now)
        elif rank is None and self.state == "returning":
            self._ended_meanwhile[number] = how

    def _settled(self) -> bool:
        return all(self.ranks[n].view == self.view.number for n in self.view.members if n in self.ranks)

    def _stop(self, why: str, now: float) -> None:
        if self.state != "stopping":
            self.state, self.why = "stopping", why
            self._event("end", now, why=why)

    # ---- answers --------------------------------------------------------------------------------------------------

    def _told(self, rank: _Rank) -> Message:
        """What every answer to a rank carries."""
        if self.state == "stopping":
            return {"stop": self.why or "the job has ended"}
        view = self.view
        told: Message = {"draining": sorted(self._draining)}
        if view.number and (rank.number in view.members or rank.view):
            told["view"] = [view.number, list(view.members), view.why, view.at_boundary]
        elif view.number:
            told["joins"] = True
        return told

    def _to_all(self) -> Out:
        return [
            (rank.sender, {"kind": "heard", "time": 0.0, **self._told(rank)})
            for rank in self.ranks.values()
            if rank.sender and rank.state not in ("ended",)
        ]

    def _table(self, key: str, view: int) -> Out:
        """What all members have posted under a key, to all of them, once the last one has."""
        posted = self._posts.get(key, {})
        if view != self.view.number or set(posted) != set(self.view.members):
            return []
        table = [posted[number] for number in self.view.members]
        return [
            (self.ranks[n].sender, {"kind": "table", "view": view, "key": key, "values": table})
            for n in self.view.members
        ]

    def _for_host(self, host: str) -> Message:
        fence = [[n, self.ranks[n].pid] for n in self._fencing if n in self.ranks and self.ranks[n].host == host]
        over = {"over": True, "why": self.why} if self.state == "stopping" else {}
        members = list(self.view.members)
        return {"kind": "host", "fence": fence, "view": self.view.number, "members": members, **over}

    def _fences(self) -> Out:
        hosts = {self.ranks[number].host for number in self._fencing if number in self.ranks}
        return [(self._hosts[host][0], self._for_host(host)) for host in hosts if host in self._hosts]

    def _asked(self, kind: str, message: Message, now: float) -> Message:
        if kind == "stop":
            self._stop(message.get("why", "asked to stop"), now)
            return {"kind": "stopping"}
        if kind == "drain":
            number = message["rank"]
            if number not in self.view.members:
                return {"kind": "refused", "why": f"rank {number} is not in view {self.view.number}"}
            if set(self.view.members) <= {*self._draining, number}:
                return {"kind": "refused", "why": "no rank would be left"}
            self._draining.setdefault(number, False)
            self.ranks[number].state = "draining"
            self._event("drain", now, rank=number)
            return {"kind": "draining", "rank": number}
        return self.status(now)

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

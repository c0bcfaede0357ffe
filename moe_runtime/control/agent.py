"""A rank's side of the control plane, pure: messages in, messages out, the time given. member.py gives it a thread.

What must arrive is said again until it is answered or has no meaning any more, since a connection that breaks loses
what was under way. An agent whose messages are not answered for LEASE x silence_s has to end its process: the others
may go on without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .words import BEAT_S, LEASE, TO_RANK, Message, problem_with, view_of

FIRST_S = 0.5  # between beats until the coordinator has said how often: many agents may start at once
REPEAT_S = 1.0  # between two times that something unanswered is said


@dataclass(frozen=True)
class Notice:
    """A view as the coordinator announced it. members: rank numbers; at_boundary: taken up between two steps; pids: the
    members' process ids, so that a later process of the same number is no member."""

    number: int
    members: tuple[int, ...]
    why: str
    at_boundary: bool
    pids: tuple[int, ...] = ()


class Agent:
    """Methods named after a kind of message give that message, to be sent at once.

    newest: the newest view. stopped: why the job is to end. joins: the job has begun without this rank. must_end: why
    this process has to end now, or "". acknowledged: when the latest message was sent that has been answered.
    """

    def __init__(self, number: int, mark: str, host: str, pid: int, silence_s: float, now: float) -> None:
        self.number, self.silence_s = number, silence_s
        self.state: dict[str, Any] = {"phase": "starting"}
        self.metrics: dict[str, Any] = {}
        self.newest: Notice | None = None
        self.stopped: str | None = None
        self.joins = False
        self.draining: list[int] = []
        self.settled_in = 0
        self.must_end = ""
        self.acknowledged = now
        self.tables: dict[str, tuple[int, list[bytes]]] = {}
        self._mark, self._host, self._pid = mark, host, pid
        self._standing: dict[str, Message] = {}  # said again and again
        self._beat_s, self._beaten, self._repeated = FIRST_S, now, now

    # ---- what the rank says ----------------------------------------------------------------------------------------

    def hello(self) -> Message:
        newest = self.newest or Notice(0, (), "", False)
        settled = self.settled_in == newest.number > 0
        seen = {"view": newest.number, "members": list(newest.members), "pids": list(newest.pids), "settled": settled}
        return self._from_me("hello", host=self._host, pid=self._pid, draining=list(self.draining), **seen)

    def post(self, view: int, key: str, value: bytes) -> Message:
        """For `tables`. Forgets the table of an earlier view."""
        self.tables.pop(key, None)
        return self._stands(f"post {key}", self._from_me("post", view=view, key=key, value=value, answered=False))

    def lost(self, view: int, suspects: Sequence[int], why: str, timed_out: bool) -> Message:
        about = {"suspects": list(suspects), "why": why, "timed_out": timed_out, "state": dict(self.state)}
        return self._stands("lost", self._from_me("lost", view=view, **about))

    def settled(self, view: int, notes: Sequence[str] = ()) -> Message:
        """Said once: every beat has the view."""
        self.settled_in = view
        for name in [name for name in self._standing if name == "lost" or name.startswith("post ")]:
            del self._standing[name]  # all members have all tables, or they could not work together
        self._standing.pop("ready", None)
        return self._from_me("settled", view=view, notes=list(notes))

    def ready(self) -> Message:
        return self._stands("ready", self._from_me("ready"))

    def drained(self, of: int) -> Message:
        """Said once: whoever says it goes on saying it."""
        return self._from_me("drained", of=of)

    def done(self) -> Message:
        self._standing.clear()
        return self._stands("done", self._from_me("done"))

    def stacks(self, text: str) -> Message:
        return self._from_me("stacks", text=text, state=dict(self.state))

    # ---- time and answers ------------------------------------------------------------------------------------------

    def wait_s(self, now: float) -> float:
        """Until `tick` has something to do."""
        return max(0.0, self._beaten + self._beat_s - now)

    def tick(self, now: float) -> list[Message]:
        """What is due. Sets must_end."""
        if not self.may_act(now) and self.settled_in:
            self.must_end = (
                f"the coordinator has not answered for {LEASE * self.silence_s:.1f} s; the others may go on without "
                "this rank, so it ends here"
            )
            return []
        if self.wait_s(now):
            return []
        self._beaten = now
        known = self.newest.number if self.newest else 0
        about = {"state": dict(self.state), "metrics": dict(self.metrics)}
        out = [self._from_me("beat", view=self.settled_in, knows=known, time=now, **about)]
        if now - self._repeated >= REPEAT_S:
            self._repeated = now
            out += self._standing.values()
        return out

    def may_act(self, now: float) -> bool:
        """Whether nobody can have gone on without this rank yet."""
        return now - self.acknowledged < LEASE * self.silence_s

    def receive(self, message: Any) -> list[Message]:
        """What the coordinator says, and what there is to say to it at once. A message that is none is dropped."""
        if not isinstance(message, dict) or problem_with(message, TO_RANK):
            return []
        match message["kind"]:
            case "again":
                return [self.hello(), *self._standing.values()]
            case "refused":
                self.must_end = message["why"]
            case "table":
                self._table(message)
            case "heard":
                self._heard(message)
        return []

    def passed(self, view: int) -> bool:
        """Whether a newer view has come that does not wait for a boundary."""
        return self.newest is not None and self.newest.number > view and not self.newest.at_boundary

    def _table(self, message: Message) -> None:
        key, post = message["key"], self._standing.get(f"post {message['key']}")
        if post is not None and post["view"] == message["view"]:
            self.tables[key] = (message["view"], message["values"])
            post["answered"] = True

    def _heard(self, message: Message) -> None:
        self.acknowledged = max(self.acknowledged, message["time"])
        self.draining = message.get("draining", self.draining)
        self._beat_s = min(max(BEAT_S / 10, message.get("beat_s", self._beat_s)), LEASE * self.silence_s / 4)
        self.joins = self.joins or message.get("joins", False)
        if self.stopped is None:
            self.stopped = message.get("stop")
        view = view_of(message.get("view", []))
        if view is not None and (self.newest is None or view[0] > self.newest.number):
            self.newest = Notice(*view)

    def _stands(self, name: str, message: Message) -> Message:
        self._standing[name] = message
        return message

    def _from_me(self, kind: str, **fields: Any) -> Message:
        return {"kind": kind, "rank": self.number, "mark": self._mark, **fields}

"""A rank's agent: a thread that beats for it, hears of new views, and ends an exchange that waits for a rank that is
gone. It also ends the process where the coordinator has not answered for so long that others may have gone on without.
"""

from __future__ import annotations

import os
import queue
import secrets
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..comm.locks import JobKeys, calls
from ..comm.messages import open_socket, pack, unpack, zmq
from ..core.errors import MoeRuntimeError, PeerTimeout, ViewPassed
from .words import BEAT_S, MAX_BYTES, PROTOCOL, Message

LEASE = 0.7  # of silence_s: without an answer for so long this process ends


@dataclass(frozen=True)
class Notice:
    """A view as the coordinator announced it. members: rank numbers; at_boundary: taken up between two steps."""

    number: int
    members: tuple[int, ...]
    why: str
    at_boundary: bool


class Member:
    """The agent of rank `number`. Other threads call everything but `_run`.

    state: what the rank is doing (phase, layer, step ...), written by the rank as it goes and sent with every beat;
    metrics: numbers for people. on_view: called in the agent's thread when a view is announced that does not wait for
    a boundary.
    """

    def __init__(self, address: str, port: int, keys: JobKeys, number: int, silence_s: float, host: str) -> None:
        self.number, self.silence_s, self._host = number, silence_s, host
        self.where = f"{address}:{port}"
        self.state: dict[str, Any] = {"phase": "starting"}
        self.metrics: dict[str, Any] = {}
        self.on_view: Callable[[Notice], None] = lambda notice: None
        self.draining: list[int] = []
        self.stopped: str | None = None  # why the job is to end
        self.joins = False  # the job has begun, and this rank is not in it yet
        self.settled_in = 0
        self._mark = secrets.token_hex(8)
        self._newest: Notice | None = None
        self._tables: dict[str, tuple[int, list[bytes]]] = {}
        self._changed = threading.Condition()
        self._to_send: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._standing: dict[str, Message] = {}  # said again to a coordinator that has come back
        self._wake_read, self._wake_write = os.pipe()
        self._acknowledged = time.monotonic()  # when the latest message was sent that was answered
        self._ended = False
        self._context = zmq.Context()
        self._socket = open_socket(self._context, zmq.DEALER)
        self._socket.maxmsgsize = MAX_BYTES
        self._socket.reconnect_ivl, self._socket.reconnect_ivl_max = 50, 200
        calls(self._socket, keys)
        self._socket.connect(f"tcp://{address}:{port}")
        self._thread = threading.Thread(target=self._run, name="agent", daemon=True)
        self._thread.start()

    # ---- what the rank calls ---------------------------------------------------------------------------------------

    @property
    def newest(self) -> Notice | None:
        """The newest view that is known here."""
        return self._newest

    def may_act(self) -> bool:
        """Whether nobody can have gone on without this rank yet: asked before writing where others may write."""
        return time.monotonic() - self._acknowledged < LEASE * self.silence_s

    def first_view(self, deadline_s: float) -> Notice | None:
        """The view that the job begins with, or None where it has begun without this rank. Raises as await_view."""
        with self._changed:
            self._changed.wait_for(lambda: self.joins or self._newest or self.stopped is not None, deadline_s)
        return None if self.joins and self.stopped is None else self.await_view(0, 0.0)

    def await_view(self, after: int, deadline_s: float) -> Notice:
        """The newest view with a number above `after`. Raises PeerTimeout; MoeRuntimeError where the job is to end."""
        with self._changed:
            arrived = self._changed.wait_for(
                lambda: self.stopped is not None or (self._newest is not None and self._newest.number > after),
                deadline_s,
            )
        if self.stopped is not None:
            raise MoeRuntimeError(f"rank {self.number}: {self.stopped}")
        if not arrived:
            raise PeerTimeout(
                f"rank {self.number}, phase new view: the coordinator at {self.where} announced no view after {after} "
                f"within {deadline_s:g} s",
                waiting_rank=self.number,
                ranks=(),
                phase="new view",
            )
        assert self._newest is not None
        return self._newest

    def exchange(self, view: int, key: str, value: bytes, deadline_s: float) -> list[bytes]:
        """Every member's value, in the order of the view's members. Raises as await_view, and ViewPassed where a newer
        view that does not wait for a boundary has come meanwhile."""
        self._say({"kind": "post", "view": view, "key": key, "value": value}, standing=f"post {key}")
        ends = time.monotonic() + deadline_s

        def is_over() -> bool:
            table = self._tables.get(key)
            return self.stopped is not None or self._passed(view) or (table is not None and table[0] == view)

        with self._changed:
            arrived = self._changed.wait_for(is_over, max(0.0, ends - time.monotonic()))
        if self.stopped is not None:
            raise MoeRuntimeError(f"rank {self.number}: {self.stopped}")
        if self._passed(view):
            raise ViewPassed(f"rank {self.number}: view {view} has passed")
        if not arrived:
            raise PeerTimeout(
                f"rank {self.number}, phase meeting in view {view}: not all of its members came to the coordinator "
                f"({key}) within {deadline_s:g} s",
                waiting_rank=self.number,
                ranks=(),
                phase="meeting",
            )
        self._standing.pop(f"post {key}", None)
        return self._tables.pop(key)[1]

    def report_lost(self, view: int, suspects: Sequence[int], why: str, timed_out: bool) -> None:
        """An exchange of `view` has failed; suspects: rank numbers."""
        message = {"kind": "lost", "view": view, "suspects": list(suspects), "why": why, "timed_out": timed_out}
        self._say({**message, "state": dict(self.state)}, standing="lost")

    def settled(self, view: int, notes: Sequence[str] = ()) -> None:
        """This rank works in `view`, and takes up others from here on."""
        self.settled_in = view
        self._standing.pop("lost", None)
        self._say({"kind": "settled", "view": view, "notes": list(notes)})

    def ready(self) -> None:
        """This rank can be admitted."""
        self._say({"kind": "ready"}, standing="ready")

    def drained(self, of: int) -> None:
        """Rank `of` holds no experts any more."""
        self._say({"kind": "drained", "of": of})

    def leave(self) -> None:
        """This rank's work is done."""
        self._standing.clear()
        self._say({"kind": "done"}, standing="done")

    def close(self) -> None:
        """Stop beating."""
        self._ended = True
        self._wake()
        self._thread.join(2.0)
        if not self._thread.is_alive():
            os.close(self._wake_read)
            os.close(self._wake_write)

    # ---- the thread ------------------------------------------------------------------------------------------------

    def _say(self, message: Message, standing: str = "") -> None:
        if standing:
            self._standing[standing] = message
        self._to_send.put(message)
        self._wake()

    def _wake(self) -> None:
        os.write(self._wake_write, b"x")

    def _passed(self, view: int) -> bool:
        return self._newest is not None and self._newest.number > view and not self._newest.at_boundary

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake_read, zmq.POLLIN)
        self._hello()
        beaten = 0.0
        while True:
            ready = dict(poller.poll(max(0.0, beaten + BEAT_S - time.monotonic()) * 1000))
            if self._wake_read in ready:
                os.read(self._wake_read, 4096)
            self._send_all()
            while self._socket.poll(0):
                self._take(self._socket.recv())
            now = time.monotonic()
            if now - beaten >= BEAT_S:
                beaten = now
                self._send({"kind": "beat", "view": self.settled_in, "time": now, "state": dict(self.state),
                            "metrics": dict(self.metrics)})  # fmt: skip
            if self._ended:
                self._send_all()  # what was said since: that this rank is done, often
                break
            if not self.may_act() and self.settled_in:
                self._end_process(
                    f"the coordinator at {self.where} has not answered for {LEASE * self.silence_s:.1f} s; the others "
                    "may go on without this rank, so it ends here"
                )
        self._socket.close(linger=300)
        self._context.term()

    def _send_all(self) -> None:
        while not self._to_send.empty():
            self._send(self._to_send.get())

    def _hello(self) -> None:
        newest = self._newest
        number, members = (newest.number, list(newest.members)) if newest else (0, [])
        about = {"host": self._host, "pid": os.getpid(), "settled": self.settled_in == number > 0}
        self._send({"kind": "hello", "view": number, "members": members, **about})

    def _send(self, message: Message) -> None:
        body = {"protocol": PROTOCOL, "rank": self.number, "mark": self._mark, **message}
        try:
            self._socket.send(pack(body), flags=zmq.DONTWAIT)
        except zmq.Again:
            return  # no coordinator now: what must not be lost is said again to the next one

    def _take(self, data: bytes) -> None:
        try:
            message = unpack(data)
        except ValueError:
            return
        kind = message.get("kind")
        if kind == "again":
            self._hello()
            for standing in list(self._standing.values()):
                self._send(standing)
            if self.settled_in:
                self._send({"kind": "settled", "view": self.settled_in})
        elif kind == "refused":
            self._end_process(str(message.get("why")))
        elif kind == "stacks":
            self._send({"kind": "stacks", "text": stacks()[-MAX_BYTES // 2 :], "state": dict(self.state)})
        elif kind == "table":
            with self._changed:
                self._tables[message["key"]] = (message["view"], message["values"])
                self._changed.notify_all()
        elif kind == "heard":
            self._heard(message)

    def _heard(self, message: Message) -> None:
        self._acknowledged = max(self._acknowledged, message["time"] or self._acknowledged)
        self.draining = message.get("draining", self.draining)
        with self._changed:
            if message.get("joins") and not self.joins:
                self.joins = True
                self._changed.notify_all()
            if "stop" in message and self.stopped is None:
                self.stopped = message["stop"]
                self._changed.notify_all()
            if "view" not in message:
                return
            number, members, why, at_boundary = message["view"]
            if self._newest is not None and number <= self._newest.number:
                return
            self._newest = Notice(number, tuple(members), why, at_boundary)
            self._changed.notify_all()
        if not at_boundary:
            self.on_view(self._newest)

    def _end_process(self, why: str) -> None:
        if self._ended:
            return
        print(f"moe-runtime: rank {self.number}: {why}", file=sys.stderr, flush=True)
        os._exit(1)


def stacks() -> str:
    """The Python stack of every thread of this process but the caller's."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    own = threading.get_ident()
    told = []
    for ident, frame in sys._current_frames().items():
        if ident != own:
            lines = "".join(traceback.format_stack(frame))
            told.append(f"thread {names.get(ident, ident)}:\n{lines}")
    return "\n".join(told)

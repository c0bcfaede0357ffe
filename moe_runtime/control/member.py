"""A rank's agent in a thread: it beats for the rank, hears of new views, and ends an exchange that waits for a rank
that is gone. It also ends the process where agent.py says so.
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
from typing import Any

from ..comm.locks import JobKeys, calls
from ..comm.messages import open_socket, pack, unpack, zmq
from ..core.errors import MoeRuntimeError, PeerTimeout, ViewPassed
from .agent import Agent, Notice
from .words import MAX_BYTES, MAX_STACKS, PROTOCOL, Message

__all__ = ["Member", "Notice", "stacks"]


class Member:
    """The agent of rank `number`. Other threads call everything but `_run`.

    state: what the rank is doing (phase, layer, step ...), written by the rank as it goes and sent with every beat;
    metrics: numbers for people. on_view: called in the agent's thread when a view is announced that does not wait for
    a boundary.
    """

    def __init__(self, address: str, port: int, keys: JobKeys, number: int, silence_s: float, host: str) -> None:
        self.number, self.silence_s = number, silence_s
        self.where = f"{address}:{port}"
        self._agent = Agent(number, secrets.token_hex(8), host, os.getpid(), silence_s, time.monotonic())
        self.state = self._agent.state
        self.on_view: Callable[[Notice], None] = lambda notice: None
        self._changed = threading.Condition()  # held while the agent is called
        self._to_send: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._wake_read, self._wake_write = os.pipe()
        self._closed = False
        self._context = zmq.Context()
        self._socket = open_socket(self._context, zmq.DEALER)
        self._socket.maxmsgsize = 16 * MAX_BYTES  # a table has a value of every rank
        self._socket.reconnect_ivl, self._socket.reconnect_ivl_max = 50, 200
        calls(self._socket, keys)
        self._socket.connect(f"tcp://{address}:{port}")
        self._thread = threading.Thread(target=self._run, name="agent", daemon=True)
        self._thread.start()

    # ---- what the rank calls ---------------------------------------------------------------------------------------

    @property
    def newest(self) -> Notice | None:
        """The newest view that is known here."""
        return self._agent.newest

    @property
    def stopped(self) -> str | None:
        """Why the job is to end; words.OVER where nothing is wrong; None while it goes on."""
        return self._agent.stopped

    @property
    def metrics(self) -> dict[str, Any]:
        return self._agent.metrics

    @metrics.setter
    def metrics(self, counters: dict[str, Any]) -> None:
        self._agent.metrics = counters

    @property
    def draining(self) -> list[int]:
        """Numbers of the ranks that are being drained."""
        return self._agent.draining

    def may_act(self) -> bool:
        """Whether nobody can have gone on without this rank yet: asked before writing where others may write."""
        return self._agent.may_act(time.monotonic())

    def first_view(self, deadline_s: float) -> Notice | None:
        """The view that the job begins with, or None where it has begun without this rank. Raises as await_view."""
        agent = self._agent
        with self._changed:
            self._changed.wait_for(lambda: agent.joins or agent.newest or agent.stopped is not None, deadline_s)
        return None if agent.joins and agent.stopped is None else self.await_view(0, 0.0)

    def await_view(self, after: int, deadline_s: float) -> Notice:
        """The newest view with a number above `after`. Raises PeerTimeout; MoeRuntimeError where the job is to end."""
        agent = self._agent
        with self._changed:
            arrived = self._changed.wait_for(
                lambda: agent.stopped is not None or (agent.newest is not None and agent.newest.number > after),
                deadline_s,
            )
        if agent.stopped is not None:
            raise MoeRuntimeError(f"rank {self.number}: {agent.stopped}")
        if not arrived:
            raise PeerTimeout(
                f"rank {self.number}, phase new view: the coordinator at {self.where} announced no view after {after} "
                f"within {deadline_s:g} s",
                waiting_rank=self.number,
                ranks=(),
                phase="new view",
            )
        assert agent.newest is not None
        return agent.newest

    def exchange(self, view: int, key: str, value: bytes, deadline_s: float) -> list[bytes]:
        """Every member's value, in the order of the view's members. Raises as await_view, and ViewPassed where a newer
        view that does not wait for a boundary has come meanwhile."""
        agent, ends = self._agent, time.monotonic() + deadline_s
        self._say(lambda: agent.post(view, key, value))

        def is_over() -> bool:
            return agent.stopped is not None or agent.passed(view) or key in agent.tables

        with self._changed:
            arrived = self._changed.wait_for(is_over, max(0.0, ends - time.monotonic()))
            table = agent.tables.pop(key, None)
        if agent.stopped is not None:
            raise MoeRuntimeError(f"rank {self.number}: {agent.stopped}")
        if agent.passed(view):
            raise ViewPassed(f"rank {self.number}: view {view} has passed")
        if not arrived or table is None:
            raise PeerTimeout(
                f"rank {self.number}, phase meeting in view {view}: not all of its members came to the coordinator "
                f"({key}) within {deadline_s:g} s",
                waiting_rank=self.number,
                ranks=(),
                phase="meeting",
            )
        return table[1]

    def report_lost(self, view: int, suspects: Sequence[int], why: str, timed_out: bool) -> None:
        """An exchange of `view` has failed; suspects: rank numbers."""
        self._say(lambda: self._agent.lost(view, suspects, why, timed_out))

    def settled(self, view: int, notes: Sequence[str] = ()) -> None:
        """This rank works in `view`, and takes up others from here on."""
        self._say(lambda: self._agent.settled(view, notes))

    def ready(self) -> None:
        """This rank can be admitted."""
        self._say(self._agent.ready)

    def drained(self, of: int) -> None:
        """Rank `of` holds no experts any more."""
        self._say(lambda: self._agent.drained(of))

    def leave(self) -> None:
        """This rank's work is done."""
        self._say(self._agent.done)

    def close(self) -> None:
        """Stop beating."""
        self._closed = True
        self._wake()
        self._thread.join(2.0)
        if not self._thread.is_alive():
            os.close(self._wake_read)
            os.close(self._wake_write)

    # ---- the thread ------------------------------------------------------------------------------------------------

    def _say(self, make: Callable[[], Message]) -> None:
        with self._changed:
            self._to_send.put(make())
        self._wake()

    def _wake(self) -> None:
        os.write(self._wake_write, b"x")

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake_read, zmq.POLLIN)
        self._say(self._agent.hello)
        while True:
            ready = dict(poller.poll(self._agent.wait_s(time.monotonic()) * 1000 + 1))
            if self._wake_read in ready:
                os.read(self._wake_read, 4096)
            self._send_all()
            while self._socket.poll(0):
                self._take(self._socket.recv())
            with self._changed:
                due = self._agent.tick(time.monotonic())
            for message in due:
                self._send(message)
            if self._closed:
                self._send_all()  # what was said since: that this rank is done, often
                break
            if self._agent.must_end:
                print(f"moe-runtime: rank {self.number}: {self._agent.must_end}", file=sys.stderr, flush=True)
                os._exit(1)
        self._socket.close(linger=300)
        self._context.term()

    def _send_all(self) -> None:
        while not self._to_send.empty():
            self._send(self._to_send.get())

    def _send(self, message: Message) -> None:
        try:
            self._socket.send(pack({"protocol": PROTOCOL, **message}), flags=zmq.DONTWAIT)
        except zmq.Again:
            return  # no coordinator now: what must not be lost is said again

    def _take(self, data: bytes) -> None:
        try:
            message = unpack(data)
        except ValueError:
            return
        with self._changed:
            before = self._agent.newest
            answers = self._agent.receive(message)
            if isinstance(message, dict) and message.get("kind") == "stacks":
                answers.append(self._agent.stacks(stacks()[-MAX_STACKS:]))
            self._changed.notify_all()
        for answer in answers:
            self._send(answer)
        newest = self._agent.newest
        if newest is not None and newest is not before and not newest.at_boundary:
            self.on_view(newest)


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

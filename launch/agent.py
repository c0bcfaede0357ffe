"""One node's part of a job over several hosts: say who it is, start its ranks with torchrun's agent, watch, clean up.

Every engine starts one agent a node and leaves the rest to it. The agents agree through control.py; ranks.py starts
the ranks. Run as a program it takes its job from stdin, one line of JSON, and ends when its
stdin ends: whoever started it is gone then. `--from-environment` is for engines without such a line.
"""

from __future__ import annotations

import functools
import json
import os
import queue
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ..core import environment
from ..core.cluster import Cluster
from ..core.errors import CheckpointError, ConfigError
from . import devices, preflight, reach, records
from .control import BEAT_S, SILENCE_S, Controller, Link, Message, serve
from .job import Job, next_attempt, visible_variables
from .machine import free_port
from .process import say, signal_name, signals_to
from .ranks import Ranks
from .surviving import SurvivingRanks
from .worker import USER_ERROR_CODE, USER_ERRORS, one_line


def run_node(job: Job, number: int, lifeline: int | None = None) -> int:
    """Be the agent of node `number` until the job is over; returns the job's exit code. Call from the main thread.

    lifeline: a descriptor whose end means that whoever started this agent is gone.
    """
    job = replace(job, address=_resolve(job))
    events: queue.SimpleQueue[int] = queue.SimpleQueue()
    if lifeline is not None:
        threading.Thread(target=_watch, args=(lifeline, events), daemon=True).start()
    with signals_to(events):
        while True:
            code, again = _attempt(job, number, events)
            if not again:
                return code
            job = next_attempt(job)
            if number == 0 or not job.one_terminal:
                say(f"starting all ranks again ({job.attempt} of at most {job.max_restarts} restarts)")


def _attempt(job: Job, number: int, events: queue.SimpleQueue[int]) -> tuple[int, bool]:
    """Take part until the ranks have ended: the exit code, and whether all agents are to begin again."""
    served = _controller(job) if number == 0 else None
    agent = _Agent(job, number, events)
    try:
        code = agent.run()
    except USER_ERRORS as error:
        agent.give_up(one_line(error))
        raise
    finally:
        agent.close()
    if served is not None:
        served.join(job.shutdown_timeout + 10.0)
    return code, agent.again


class _Agent:
    def __init__(self, job: Job, number: int, events: queue.SimpleQueue[int]) -> None:
        self._job, self._number, self._events = job, number, events
        self._node = job.nodes[number]
        self._link = Link(job.address, job.port, bytes.fromhex(job.secret))
        self._speaks = number == 0 or not job.one_terminal
        self._mark = secrets.token_hex(8)
        self._ranks: Ranks | SurvivingRanks | None = None
        self._door: reach.Door | None = None
        self._signals: list[int] = []  # that this agent got
        self.again = False  # the controller wants all ranks started once more
        self._record = records.write(
            job.name, engine=job.engine, address=job.address, port=job.port, secret=job.secret, log_dir=job.log_dir
        )

    def run(self) -> int:
        address = _own_address(self._job, self._number)
        node = self._node
        facts = preflight.look(address, node.interface, node.vendor, node.devices, self._job.files)
        facts["command"] = preflight.text_digest(json.dumps([self._job.name, self._job.target]))
        facts["found"] = devices.seen(node, {**visible_variables(node), **node.env})
        facts["door"] = self._open_door(address) if len(self._job.nodes) > 1 else 0
        if self._speaks:
            say(preflight.introduce(node.name, facts))
        me = {"node": self._number, "mark": self._mark, "host": facts["host"]}
        news = {"kind": "hello", **me, "facts": facts}
        began = heard = time.monotonic()
        told: list[str] = []
        while True:
            self._link.send(news if self._ranks is None else self._beat())
            for order in self._answers(BEAT_S):
                heard = time.monotonic()
                if order["kind"] == "wait" and self._speaks and heard - began > 3.0 and order["missing"] != told:
                    told = order["missing"]
                    say(f"waiting for {', '.join(told)} (at most {self._job.wait_s:g} s)")
                elif order["kind"] == "try" and news["kind"] == "hello":
                    where = f"{self._node.name} (host {facts['host']})"
                    news = {"kind": "tried", **me, "unreachable": reach.unreachable(where, order["targets"])}
                    break  # and send it
                elif order["kind"] == "go" and self._ranks is None:
                    self._close_door()
                    start = Ranks if self._job.on_loss == "fail" else SurvivingRanks
                    self._ranks = start(self._job, self._number, address, facts["interface"], order, self._mark)
                    if isinstance(self._ranks, SurvivingRanks):
                        records.add(self._record, **records.coordinator(*self._ranks.coordinator))
                elif order["kind"] in ("stop", "refuse"):
                    self.again = bool(order.get("restart")) and not self._signals
                    return self._end(order["code"], order["why"])
            silence = time.monotonic() - heard
            if silence > (self._job.wait_s if self._ranks is None else SILENCE_S):
                return self._end(*self._no_answer(silence))

    def give_up(self, why: str) -> None:
        """Have the job end everywhere because of this node."""
        self._link.send({"kind": "stop", "code": USER_ERROR_CODE, "why": f"{self._node.name}: {why}"})
        self._link.send({"kind": "gone", "node": self._number, "mark": self._mark})

    def close(self) -> None:
        if self._ranks is not None:
            self._ranks.stop(0.0)
        self._close_door()
        self._link.close()

    def _open_door(self, address: str) -> int:
        try:
            self._door = reach.Door(address)
        except OSError as error:
            raise ConfigError(f"{self._node.name}: cannot listen at {address} ({error}); is it this host's?") from None
        return self._door.port

    def _close_door(self) -> None:
        if self._door is not None:
            self._door.close()
            self._door = None

    def _answers(self, seconds: float) -> Iterator[Message]:
        """What the controller says within so long, less where this node has news itself; passes signals on to it."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends and not (self._ranks and self._ranks.has_news()):
            with suppress(queue.Empty):
                number = self._events.get_nowait()
                if number in self._signals:  # asked twice: no controller is waited for
                    yield {"kind": "stop", "code": 128 + number, "why": ""}
                self._signals.append(number)
                self._link.send({"kind": "stop", "code": 128 + number, "why": f"got {signal_name(number)}"})
            if answer := self._link.receive(0.05):
                yield answer

    def _beat(self) -> Message:
        assert self._ranks is not None
        return {"kind": "beat", "node": self._number, "mark": self._mark, **self._ranks.report()}

    def _no_answer(self, seconds: float) -> tuple[int, str]:
        where = f"{self._job.nodes[0].name} at {self._job.address}:{self._job.port}"
        if self._ranks is None:
            return USER_ERROR_CODE, (
                f"{self._node.name}: no answer from {where} within {seconds:.0f} s; is the job started there, with the "
                "same MOE_RUNTIME_JOB_SECRET, is the address right, and does a firewall let this host reach that port?"
            )
        return 1, f"{self._node.name}: lost touch with {where} for {seconds:.0f} s; its host or the network is down"

    def _end(self, code: int, why: str) -> int:
        if self._ranks is not None:
            if killed := self._ranks.stop(self._job.shutdown_timeout):
                say(f"{self._node.name}: {killed} did not stop within {self._job.shutdown_timeout:g} s and got SIGKILL")
        self._link.send({"kind": "gone", "node": self._number, "mark": self._mark})
        if not self.again:
            records.end(self._record, code)
        if why and self._speaks:
            for line in why.splitlines() if self._ranks is None else [why]:
                say(f"error: {line}" if code == USER_ERROR_CODE and self._ranks is None else line)
        return code


def _controller(job: Job) -> threading.Thread:
    names = [node.name for node in job.nodes]
    counts: list[int] = []

    def check(facts: list[Mapping[str, Any]]) -> list[str]:
        if problems := preflight.malformed(names, facts):
            return problems
        counts[:] = [int(fact["devices"]) for fact in facts]
        differ = [
            line
            for node, fact in zip(job.nodes, facts, strict=True)
            for line in devices.problems(node, fact["host"], fact["found"])
        ]
        return preflight.verdicts(names, facts) + differ or memory(facts)

    def memory(facts: list[Mapping[str, Any]]) -> list[str]:
        try:
            sizes = [sizes for path in job.files if (sizes := preflight.checkpoint_bytes(path))]
        except CheckpointError as error:
            return [f"{names[0]}: {one_line(error)}"]
        if not sizes or "--placement" in job.target or [node.devices for node in job.nodes] != counts:
            return []  # a placement of the user's own; or nodes that the command line does not describe
        words = list(job.target)
        asked = words[words.index("--expert-dtype") + 1] if "--expert-dtype" in words else "auto"
        nodes = [node if asked == "auto" else replace(node, expert_dtype=asked) for node in job.nodes]
        return preflight.tight(nodes, facts, Cluster(job.nodes).rank_speeds(), sizes[0])

    def start() -> Message:
        return {"devices": counts, "store_port": free_port(job.address)}

    left = job.attempt < job.max_restarts and job.on_loss == "fail"
    targets = functools.partial(reach.targets, names)
    survives = job.on_loss != "fail"
    controller = Controller(
        names, check, start, job.wait_s, job.shutdown_timeout, time.monotonic(), left, targets, survives
    )
    return serve(controller, job.address, job.port, bytes.fromhex(job.secret))


def _resolve(job: Job) -> str:
    """The address of node 0 as this host sees it. A name that means loopback here means another host elsewhere."""
    ends = time.monotonic() + (job.wait_s if job.engine == "k8s" else 0.0)  # a pod has no name before it runs
    while True:
        try:
            address = socket.gethostbyname(job.address)
            break
        except OSError as error:
            if time.monotonic() >= ends:
                told = f"{job.address}, the host of {job.nodes[0].name}, is not known here ({error})"
                raise ConfigError(told) from None
        time.sleep(0.5)
    if len(job.nodes) > 1 and address.startswith("127.") and not environment.is_loopback(job.address):
        raise ConfigError(
            f"{job.address} is {address} here, which other hosts cannot reach; give --master-addr with its address"
        )
    return address


def _own_address(job: Job, number: int) -> str:
    node = job.nodes[number]
    if node.interface:
        address = preflight.address_of(node.interface)
        if address is None:
            raise ConfigError(f"{node.name}: this host has no interface {node.interface} with an address")
        return address
    if number == 0 or environment.is_loopback(job.address):
        return job.address
    return environment.address_towards(job.address, job.port)


def _watch(lifeline: int, events: queue.SimpleQueue[int]) -> None:
    while os.read(lifeline, 4096):
        pass
    events.put(signal.SIGHUP)


def main() -> int:
    try:
        match sys.argv[1:]:
            case ["--from-environment"]:
                text, number, host = environment.job_of_engine()
                job = Job.from_json(text)
                named = [n for n, node in enumerate(job.nodes) if node.host == host]
                return run_node(job, named[0] if len(named) == 1 else number)
            case [number] if number.isdecimal():
                line = b""
                while not line.endswith(b"\n"):  # byte by byte: nothing may be left in a buffer
                    byte = os.read(0, 1)
                    if not byte:
                        raise ConfigError("stdin ended before a job came")
                    line += byte
                return run_node(Job.from_json(line.decode()), int(number), lifeline=0)
        raise ConfigError("an agent is started by an engine of moe-launch: give NUMBER and a job on stdin")
    except USER_ERRORS as error:
        print(f"moe-launch: error: {one_line(error)}", file=sys.stderr)
        return USER_ERROR_CODE


if __name__ == "__main__":
    sys.exit(main())

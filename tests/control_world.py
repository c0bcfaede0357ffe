"""A world in virtual time: one Coordinator, the agents of some processes, and a network that can be cut.

Agents and the coordinator are the real ones (moe_runtime.control); what a rank does with views, and who starts ranks on
a host, is played here as Runtime.recover, generation/survive.py and keeper.py do it. Nothing sleeps.
"""

from __future__ import annotations

import heapq
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from moe_runtime.comm.messages import pack, unpack
from moe_runtime.control.agent import Agent, Notice
from moe_runtime.control.coordinator import Coordinator
from moe_runtime.control.words import PROTOCOL

SILENCE_S = 2.0
TIMEOUT_S = 4.0  # of an exchange
WAITS_S = 20.0  # for a first view
LOAD_S = 0.5
BEAT_S = 0.25  # of hosts, and of ranks here
TICK_S = 0.1
DELAY_S = 0.08  # of a message, at most


@dataclass
class Link:
    """From one process to the coordinator. Order is kept. cut: nothing arrives; what is sent meanwhile waits here
    (to the coordinator) or is lost (from it), as ZeroMQ has it. generation: of the connection."""

    cut: bool = False
    generation: int = 0
    waiting: list[bytes] = field(default_factory=list)
    last: bytes | None = None
    up_at: float = 0.0
    down_at: float = 0.0


@dataclass
class Process:
    number: int
    pid: int
    host: str
    agent: Agent
    link: Link = field(default_factory=Link)
    alive: bool = True
    stopped: bool = False
    phase: str = "first"  # ready, building, gathering, working, over
    entered: Notice | None = None
    since: float = 0.0
    trouble_at: float | None = None
    drained: bool = False  # it took a view without it, as all others did
    seen: list[int] = field(default_factory=list)  # numbers of views
    removed: bool = False

    def is_in(self, view: Notice) -> bool:
        return (self.number, self.pid) in zip(view.members, view.pids, strict=True)


class World:
    """size: ranks on `hosts` hosts. Facts that must hold at every moment are asserted here."""

    def __init__(self, seed: int, size: int, hosts: int = 2) -> None:
        self.pick = random.Random(seed)
        self.now, self._events, self._count = 100.0, [], 0
        self.coordinator: Coordinator | None = Coordinator(size, SILENCE_S, self.now)
        self.size, self.restarts, self.next_pid = size, 0, 1000
        self.hosts = {f"h{n}": Link() for n in range(hosts)}
        self.processes: list[Process] = []
        self.exits: dict[str, list[dict]] = {host: [] for host in self.hosts}
        self.started: dict[str, set[int]] = {host: set() for host in self.hosts}
        self.peers_cut: set[frozenset[int]] = set()
        self.log: list[str] = []
        self.finished = self.loaded = False
        self.on_view: Callable[[], None] | None = None  # called once, with the next view that is announced
        self.newest = 0
        for number in range(size):
            self.start(number)
        for host in self.hosts:
            self._every(BEAT_S, lambda host=host: self._host_beats(host))
        self._every(TICK_S, self._tick)

    # ---- time ------------------------------------------------------------------------------------------------------

    def run(self, seconds: float) -> None:
        ends = self.now + seconds
        while self._events and self._events[0][0] <= ends:
            self.now, _, action = heapq.heappop(self._events)
            action()
        self.now = ends

    def run_until(self, is_so: Callable[[], bool], at_most: float) -> bool:
        ends = self.now + at_most
        while not is_so() and self.now < ends:
            self.run(0.25)
        return is_so()

    def _at(self, delay: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now + delay, self._count, action))

    def _every(self, seconds: float, action: Callable[[], bool | None]) -> None:
        def again() -> None:
            if action() is not False:
                self._at(seconds, again)

        self._at(self.pick.random() * seconds, again)

    def say(self, what: str) -> None:
        self.log.append(f"{self.now:8.2f} {what}")

    # ---- the network -----------------------------------------------------------------------------------------------

    def _up(self, link: Link, sender: object, message: dict) -> None:
        data = pack({"protocol": PROTOCOL, **message})
        if link.cut or self.coordinator is None:
            link.waiting.append(data)
            return
        link.last, generation, epoch = data, link.generation, self.restarts
        link.up_at = max(link.up_at, self.now + self.pick.random() * DELAY_S) + 1e-6
        self._at(link.up_at - self.now, lambda: self._arrives(link, generation, epoch, sender, data))

    def _arrives(self, link: Link, generation: int, epoch: int, sender: object, data: bytes) -> None:
        if link.cut or generation != link.generation or epoch != self.restarts or self.coordinator is None:
            return  # it was under way when the connection broke
        self._coordinator_says(self.coordinator.receive(self._name(sender, link), unpack(data), self.now))
        self._watch()

    def _name(self, sender: object, link: Link) -> bytes:
        return f"{sender if isinstance(sender, str) else sender.pid} {link.generation}".encode()

    def _coordinator_says(self, out: list[tuple[bytes, dict]]) -> None:
        for to, message in out:
            data = pack({"protocol": PROTOCOL, **message})
            assert len(data) < 10_000
            who, _, generation = to.decode().partition(" ")
            target = who if who in self.hosts else next((p for p in self.processes if str(p.pid) == who), None)
            link = self.hosts[who] if who in self.hosts else target.link if target else None
            if link is None or link.cut or str(link.generation) != generation:
                continue
            link.down_at = max(link.down_at, self.now + self.pick.random() * DELAY_S) + 1e-6
            at = link.generation
            self._at(link.down_at - self.now, lambda t=target, d=data, i=link, g=at: self._comes_down(t, i, g, d))

    def _comes_down(self, target: str | Process, link: Link, generation: int, data: bytes) -> None:
        if link.cut or generation != link.generation:
            return
        if isinstance(target, str):
            self._host_hears(target, unpack(data))
        elif target.stopped:
            self._at(0.05, lambda: self._comes_down(target, link, generation, data))
        elif target.alive:
            for answer in target.agent.receive(unpack(data)):
                self._up(link, target, answer)
            self._look(target)

    def cut(self, link: Link) -> None:
        link.cut = True
        link.generation += 1  # what was under way is lost

    def heal(self, link: Link, sender: object) -> None:
        link.cut = False
        self._connect(link, sender)

    def _connect(self, link: Link, sender: object) -> None:
        waiting, link.waiting = link.waiting, []
        if link.last is not None and self.pick.random() < 0.3:
            waiting.insert(0, link.last)  # said twice
        for data in waiting:
            self._up(link, sender, {k: v for k, v in unpack(data).items() if k != "protocol"})

    # ---- the coordinator -------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        if self.coordinator is not None:
            self._coordinator_says(self.coordinator.tick(self.now))
            self._watch()

    def _watch(self) -> None:
        for event in self.coordinator.events:
            json.dumps(event)
            self.loaded = self.loaded or event["event"] == "settled"
            if event["event"] in ("view", "suspect") and self.on_view is not None:
                self._at(self.pick.random() * 2 * DELAY_S, self.on_view)
                self.on_view = None
            if event["event"] in ("view", "suspect", "lost", "end"):
                self.say(f"  {event}")
        json.dumps(self.coordinator.reports)
        self.coordinator.events, self.coordinator.reports = [], []
        assert self.coordinator.state != "running" or self.coordinator.view.number >= self.newest, "an older view"

    def end_coordinator(self) -> None:
        self.say("coordinator ends")
        self.coordinator = None

    def return_coordinator(self) -> None:
        self.restarts += 1
        self.say("coordinator returns")
        self.coordinator = Coordinator(self.size, SILENCE_S, self.now, self.restarts)
        for process in self.processes:
            process.link.generation += 1
            if not process.link.cut and process.alive and not process.stopped:
                self._connect(process.link, process)
        for host, link in self.hosts.items():
            link.generation += 1
            for message in self.exits[host]:
                self._up(link, host, message)
            if not link.cut:
                self._connect(link, host)

    def ask(self, message: dict) -> dict:
        answer = self.coordinator.receive(b"people 0", {"protocol": PROTOCOL, **message}, self.now)[0][1]
        return unpack(pack(answer))

    # ---- hosts (keeper.py) -----------------------------------------------------------------------------------------

    def _host_beats(self, host: str) -> None:
        if not self.hosts[host].cut and self.coordinator is not None:
            message = {"kind": "host", "host": host, "mark": host, "ranks": sorted(self.started[host])}
            self._up(self.hosts[host], host, message)

    def _host_hears(self, host: str, answer: dict) -> None:
        for number, pid in answer.get("fence", []):
            process = next(p for p in self.processes if p.pid == pid)
            assert process.number == number and process.host == host
            if process.alive:
                self.end(process, "killed by its host")
        for number, like in answer.get("start", []):
            if number not in self.started[host]:
                assert any(p.number == like and p.host == host for p in self.processes)
                assert not any(p.number == number for p in self.processes), "a number was given twice"
                self.start(number, host)

    def start(self, number: int, host: str = "") -> Process:
        self.next_pid += 1
        before = [p.host for p in self.processes if p.number == number]
        host = host or (before[0] if before else f"h{number % len(self.hosts)}")
        self.started[host].add(number)
        agent = Agent(number, f"m{self.next_pid}", host, self.next_pid, SILENCE_S, self.now)
        process = Process(number, self.next_pid, host, agent, since=self.now)
        self.processes.append(process)
        self.say(f"rank {number} starts as {process.pid}")
        self._up(process.link, process, agent.hello())
        self._every(0.1, lambda: self._runs(process))
        return process

    def end(self, process: Process, how: str, told: bool = True) -> None:
        """told: its host sees it."""
        self.say(f"rank {process.number} ({process.pid}): {how}")
        process.alive = False
        about = {"kind": "exited", "host": process.host, "mark": process.host, "rank": process.number}
        message = {**about, "pid": process.pid, "how": how}
        if told:
            self.exits[process.host].append(message)
            self._up(self.hosts[process.host], process.host, message)

    # ---- what a rank does ------------------------------------------------------------------------------------------

    def _runs(self, process: Process) -> bool:
        """One look of the agent's thread and the rank's; false once it has ended."""
        if not process.alive:
            return False
        if not process.stopped:
            for message in process.agent.tick(self.now):
                self._up(process.link, process, message)
            self._look(process)
            if process.phase == "working" and process.agent.draining and self.pick.random() < 0.1:
                for number in process.agent.draining:  # whatever it holds has moved
                    self._up(process.link, process, process.agent.drained(number))
        return process.alive

    def _look(self, process: Process) -> None:
        agent, newest = process.agent, process.agent.newest
        if newest is not None and (not process.seen or process.seen[-1] != newest.number):
            assert not process.seen or newest.number > process.seen[-1], "a view's number went back"
            assert not (process.removed and process.is_in(newest)), "a rank that was removed is in a view again"
            process.seen.append(newest.number)
            process.removed = not process.is_in(newest)
        if agent.must_end:
            return self.end(process, agent.must_end)
        if agent.stopped is not None:
            return self.end(process, f"stops: {agent.stopped}")
        if process.phase == "over":
            if self.now - process.since > 0.3:
                self.end(process, "exit code 0")
            return None
        if process.phase in ("first", "ready") and self.now - process.since > WAITS_S:
            return self.end(process, "no view was announced")
        if process.phase == "first":
            if agent.joins:
                process.phase, process.since = "loading", self.now
            elif newest is not None:
                self._enter(process, newest)
        elif process.phase == "loading" and self.now - process.since > LOAD_S:
            process.phase, process.since = "ready", self.now
            self._up(process.link, process, agent.ready())
        elif process.phase == "ready" and newest is not None:
            self._enter(process, newest)
        elif process.phase in ("building", "gathering", "working", "lost"):
            self._in_view(process)
        return None

    def _enter(self, process: Process, view: Notice) -> None:
        if not process.is_in(view):
            assert process.number not in view.members, "it would take another process's place"
            return self._leave(process)
        process.entered, process.phase, process.since, process.trouble_at = view, "building", self.now, None
        self._up(process.link, process, process.agent.post(view.number, "who", f"{process.pid}".encode()))
        return None

    def _leave(self, process: Process) -> None:
        process.phase, process.since, process.drained = "over", self.now, True
        self._up(process.link, process, process.agent.done())

    def _in_view(self, process: Process) -> None:
        agent, view = process.agent, process.entered
        if agent.passed(view.number) or process.phase == "lost" and agent.newest.number > view.number:
            if not agent.settled_in and view.number == 1:
                return self.end(process, "the exchange broke before it had loaded")
            return self._enter(process, agent.newest)
        if process.phase == "building" and "who" in agent.tables:
            number, values = agent.tables.pop("who")
            assert number == view.number and values == [f"{pid}".encode() for pid in view.pids]
            process.phase, process.since = "gathering", self.now
        peers = self._peers(process)
        arrived = all(p is not None and p.phase in ("gathering", "working") and p.entered == view for p in peers)
        if process.phase == "gathering" and arrived and self.now - process.since > LOAD_S * (view.number == 1):
            process.phase = "working"
            self._settles(process, view)
            self._up(process.link, process, agent.settled(view.number))
        elif process.phase == "working" and self._all_know(view, peers):
            for peer in peers:
                if peer.phase == "working":
                    self._enter(peer, peer.agent.newest)
        elif process.phase != "lost":
            self._trouble(process, peers)
        return None

    def _peers(self, process: Process) -> list[Process | None]:
        """The members of its view, itself too; None for those that have ended."""
        return [next((p for p in self.processes if p.pid == pid and p.alive), None) for pid in process.entered.pids]

    def _all_know(self, view: Notice, peers: list[Process | None]) -> bool:
        newest = [p.agent.newest for p in peers if p is not None and p.phase == "working" and not p.stopped]
        whole = len(newest) == len(peers) and all(p.entered == view for p in peers)
        links = any(frozenset((a.pid, b.pid)) in self.peers_cut for a in peers for b in peers if a and b)
        return whole and not links and all(n.number > view.number and n.at_boundary for n in newest)

    def _trouble(self, process: Process, peers: list[Process | None]) -> None:
        """The exchange of rows breaks, or its deadline passes: whom does it wait for?"""
        waits_for, quick = [], False
        for number, peer in zip(process.entered.members, peers, strict=True):
            if peer is process:
                continue
            gone = peer is None or frozenset((process.pid, peer.pid)) in self.peers_cut
            elsewhere = not gone and peer.phase in ("lost", "over")
            late = not gone and process.phase == "gathering" and peer.entered != process.entered
            if gone or elsewhere or late or peer.stopped:
                waits_for.append(number)
                quick = quick or gone
        if process.phase == "building":
            waits_for, quick = [], False
        if not waits_for and process.phase != "building":
            process.trouble_at = None
        elif process.trouble_at is None:
            deadline = TIMEOUT_S if not quick or self.pick.random() < 0.3 else 0.5 * self.pick.random()
            process.trouble_at = max(self.now, process.since if process.phase == "building" else 0.0) + deadline
        elif self.now >= process.trouble_at:
            if not process.agent.settled_in and process.entered.number == 1:
                return self.end(process, "the exchange broke before it had loaded")
            process.phase, process.trouble_at = "lost", None
            about = (process.entered.number, waits_for, "an exchange broke", not quick)
            self._up(process.link, process, process.agent.lost(*about))
        return None

    def _settles(self, process: Process, view: Notice) -> None:
        """The fact that all rests on: nobody outside of the newest view that works can still act."""
        self.newest = max(self.newest, view.number)
        assert view.number == self.newest, "an older view began to work"
        for other in self.processes:
            if other.alive and not other.is_in(view) and other.agent.settled_in and not other.drained:
                assert not other.agent.may_act(self.now), (
                    f"{other.pid} may still act in view {other.agent.settled_in}, {process.pid} works in {view.number}"
                )

    # ---- what people and chance do ---------------------------------------------------------------------------------

    def alive(self) -> list[Process]:
        return [process for process in self.processes if process.alive]

    def finish(self) -> None:
        """The work is done: every rank finds out in the same round."""
        working = [p for p in self.alive() if p.phase == "working" and not p.stopped]
        if not working or any(p is None or p.phase != "working" or p.stopped for p in self._peers(working[0])):
            return
        self.say("the work is done")
        self.finished = True
        for process in self._peers(working[0]):
            process.phase, process.since = "over", self.now
            self._up(process.link, process, process.agent.done())

    def is_at_rest(self) -> bool:
        """Everybody alive works in one view and the coordinator knows it, or the job has stopped."""
        coordinator = self.coordinator
        if coordinator.state == "stopping":
            return not self.alive()
        alive = self.alive()
        views = {p.entered.number if p.entered else 0 for p in alive}
        return (
            coordinator.state == "running"
            and bool(alive)
            and all(p.phase == "working" for p in alive)
            and views == {coordinator.view.number}
            and sorted(p.number for p in alive) == list(coordinator.view.members)
            and coordinator.status(self.now)["settled"]
        )

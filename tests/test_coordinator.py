"""The coordinator and its agents: every rule by itself, and thousands of random schedules of faults in virtual time."""

from __future__ import annotations

import json
import os

import pytest
from control_world import LEASE_S, SILENCE_S, TIMEOUT_S, World
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.comm.messages import pack
from moe_runtime.control import coordinator as rules
from moe_runtime.control.coordinator import FENCE_S, blame, has_quorum

# From the last fault to rest: a broken exchange's deadline, blame or silence, fence and lease, and that a few times
# where one fault hides behind another.
BOUND_S = 3 * (TIMEOUT_S + 2 * SILENCE_S + FENCE_S)


@pytest.fixture(autouse=True)
def loading_is_quick(monkeypatch):
    monkeypatch.setattr(rules, "LOADING_S", 3 * SILENCE_S)


# ---- random schedules -------------------------------------------------------------------------------------------------


def fault(world: World) -> None:
    pick = world.pick
    alive = world.alive()
    kind = pick.choice(KINDS)
    process = pick.choice(alive) if alive else None
    host = pick.choice(list(world.hosts))
    if kind == "coordinator":
        if world.coordinator is not None:
            world.end_coordinator()
            world._at(pick.choice((0.1, 0.3, 0.8, 2.5)), lambda: world.coordinator or world.return_coordinator())
    elif kind in ("cut host", "cut host and ranks"):
        links = [(world.hosts[host], host)]
        if kind == "cut host and ranks":
            links += [(p.link, p) for p in alive if p.host == host]
        world.say(f"{kind} {host}")
        seconds = pick.choice((0.3, 1.0, 2.5, 6.0))
        for link, sender in links:
            world.cut(link)
            world._at(seconds, lambda link=link, sender=sender: world.heal(link, sender))
    elif kind == "start":
        dead = [n for n in range(world.size) if not any(p.number == n for p in alive)]
        number = pick.choice(dead) if dead else pick.randrange(world.size) if pick.random() < 0.1 else None
        if number is not None and world.newest:
            world.start(number)
    elif kind == "finish" and pick.random() < 0.3:
        world.finish()
    elif process is None:
        return
    elif kind == "kill":
        world.end(process, "SIGKILL", told=pick.random() < 0.7)
    elif kind == "stop":
        world.say(f"SIGSTOP {process.number} ({process.pid})")
        process.stopped = True
        world._at(pick.choice((0.5, 1.3, 2.2, 5.0)), lambda: setattr(process, "stopped", False))
    elif kind == "cut rank":
        world.say(f"cut {process.number} ({process.pid})")
        world.cut(process.link)
        world._at(pick.choice((0.1, 1.0, 1.9, 5.0)), lambda: world.heal(process.link, process))
    elif kind == "cut peers":
        other = pick.choice(alive)
        if other is not process:
            pair = frozenset((process.pid, other.pid))
            world.say(f"cut between {process.number} and {other.number}")
            world.peers_cut.add(pair)
            world._at(pick.choice((0.5, 3.0, 8.0)), lambda: world.peers_cut.discard(pair))
    elif kind == "drain" and world.coordinator is not None:
        world.say(f"drain {process.number}: {world.ask({'kind': 'drain', 'rank': process.number})}")


KINDS = ("kill", "kill", "stop", "cut rank", "cut host", "cut host and ranks", "cut peers", "coordinator", "start",
         "start", "drain", "finish")  # fmt: skip


def run_schedule(seed: int) -> World:
    world = World(seed, 2 + seed % 4, 1 + seed // 4 % 3)
    try:
        world.run(world.pick.choice((0.0, 0.3, 1.0, 3.0, 3.0)))
        for _ in range(world.pick.randint(1, 6)):
            fault(world)
            world.run(world.pick.choice((0.0, 0.05, 0.3, 1.0, 3.0, 6.0)))
        world.run(8.0)  # all that heals has healed
        for process in world.alive():
            process.stopped = False
        world.rested = world.run_until(world.is_at_rest, BOUND_S)
        assert world.rested, "no rest"
        check_end(world)
    except AssertionError as error:
        told = json.dumps(world.coordinator.status(world.now), indent=1) if world.coordinator else ""
        raise AssertionError("\n".join([f"seed {seed}: {error}", *world.log, told])) from error
    return world


def check_end(world: World) -> None:
    coordinator = world.coordinator
    status = coordinator.status(world.now)
    pack(status)
    json.dumps(status)
    if coordinator.state != "stopping":
        return
    why = coordinator.why
    if not why:
        assert world.finished
    elif "no rank is left" in why:
        assert not any(p.alive for p in world.processes)
    elif "before the job began" in why:
        assert not world.newest
    elif "had loaded" in why:
        assert not world.loaded, why
    elif "cut network" in why:
        assert len(coordinator._losses) > 1 or len(coordinator.view.members) == 1, why
    else:
        assert "no rank has come back" in why, why


COUNT = int(os.environ.get("X", "300"))


def test_random():
    for seed in range(COUNT):
        run_schedule(seed)

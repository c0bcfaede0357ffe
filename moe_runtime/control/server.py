"""The coordinator as a process: `python -m moe_runtime.control.server`, its settings a line of JSON on stdin.

It ends when the job is over, or when its stdin ends: whoever started it is gone then. What happens is written to
events.jsonl in the job's folder of logs, hang reports to hang-N.json beside it, and printed once.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..comm.locks import Doorkeeper, job_keys, listens, set_bounds
from ..comm.messages import open_socket, pack, unpack, zmq
from ..core.errors import ConfigError
from . import hangs
from .coordinator import Coordinator, Out
from .endpoint import REFRESH_S, Endpoint
from .slow import Watch
from .words import MAX_BYTES, PROTOCOL

TICK_S = 0.05
_AT_ONCE = 1000  # answers that are made before they are sent
_LAST_WORDS_S = 3.0  # for ranks to have heard that the job is over


@dataclass(frozen=True)
class Settings:
    """size: ranks the job starts with. returning: how many earlier coordinators of this job have ended.

    metrics_port: where Prometheus finds /metrics, at the same address; 0: nowhere. drain_slower_than: how many times as
    slow as the others a rank may stay before it is drained (slow.py); 0: for ever.
    """

    address: str
    port: int
    secret: str
    size: int
    silence_s: float
    log_dir: str
    returning: int = 0
    metrics_port: int = 0
    drain_slower_than: float = 0.0

    @staticmethod
    def from_json(text: str) -> Settings:
        table = json.loads(text)
        return Settings(**{field.name: table[field.name] for field in fields(Settings) if field.name in table})


def serve(settings: Settings, lifeline: int) -> int:
    """Run until the job is over; the exit code: 0, or 1 where it had to stop, 3 where nobody needs it any more."""
    context = zmq.Context()
    door = open_socket(context, zmq.ROUTER)
    keys = job_keys(bytes.fromhex(settings.secret))
    keeper = Doorkeeper(context, keys)
    listens(door, keys)
    set_bounds(door, 2 * MAX_BYTES)  # beyond this ZeroMQ ends the connection without a word; up to it we count
    keeper.watch(door)
    _bind(door, f"tcp://{settings.address}:{settings.port}")
    now = time.monotonic()
    coordinator = Coordinator(settings.size, settings.silence_s, now, settings.returning)
    coordinator.watch = Watch(settings.drain_slower_than)
    endpoint = _metrics(settings)
    log = Log(Path(settings.log_dir))
    ticked, over_at = 0.0, 0.0
    while not over_at or now - over_at < _LAST_WORDS_S:
        out = []
        waits = door.poll(TICK_S * 1000)
        while waits:  # all that has come, before time is looked at: this process may have been held up itself
            now = time.monotonic()
            sender, *frames = door.recv_multipart()
            try:
                message = unpack(frames[0], MAX_BYTES) if len(frames) == 1 else None
            except ValueError as what:
                coordinator.refused[str(what)] += 1
            else:
                out += coordinator.receive(sender, message, now)
            waits = len(out) < _AT_ONCE and door.poll(0)
        now = time.monotonic()
        if now - ticked >= TICK_S or coordinator.news:
            ticked, coordinator.news = now, False
            out += coordinator.tick(now)
            if select.select([lifeline], [], [], 0)[0] and not os.read(lifeline, 4096):
                return 3
            if coordinator.state == "stopping" and not over_at:
                over_at = now
        for _, answer in out:
            if answer["kind"] == "status":
                answer["refused"] = {**keeper.refused, **answer["refused"]}
        _send(door, out)
        log.write(coordinator)
        if endpoint is not None and now - endpoint.refreshed >= REFRESH_S:
            endpoint.status, endpoint.refreshed = coordinator.status(now), now
    keeper.close()
    door.close(linger=500)
    context.term()
    return 1 if coordinator.why else 0


def _metrics(settings: Settings) -> Endpoint | None:
    """A job does not depend on being watched: where /metrics cannot be had it is said, and the job runs."""
    try:
        return Endpoint(settings.address, settings.metrics_port) if settings.metrics_port else None
    except ConfigError as error:
        print(f"moe-launch: {error}; this job runs without /metrics", file=sys.stderr, flush=True)
        return None


def _send(door: zmq.Socket, out: Out) -> None:
    packed: dict[int, bytes] = {}  # one message for many ranks is turned into bytes once
    for to, answer in out:
        if to:
            data = packed.get(id(answer))
            if data is None:
                data = packed[id(answer)] = pack({"protocol": PROTOCOL, **answer})
            door.send_multipart([to, data])


def _bind(door: zmq.Socket, where: str) -> None:
    ends = time.monotonic() + 5.0
    while True:
        try:
            door.bind(where)
            return
        except zmq.ZMQError:  # an earlier coordinator's port, for a moment
            if time.monotonic() > ends:
                raise
        time.sleep(0.02)


class Log:
    """Events as JSON lines, hang reports as files of their own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = (folder / "events.jsonl").open("a", encoding="utf-8")

    def write(self, coordinator: Coordinator) -> None:
        """What is new."""
        for event in coordinator.events:
            self._file.write(json.dumps({**event, "at": time.time()}) + "\n")
            if told := in_words(event):
                print(f"moe-launch: {told}", file=sys.stderr, flush=True)
        if coordinator.events:
            self._file.flush()
        for report in coordinator.reports:
            path = self._next()
            path.write_text(json.dumps({**report, "at": time.time()}, indent=1))
            print(f"moe-launch: {hangs.in_words(report, path)}", file=sys.stderr, flush=True)
        coordinator.events, coordinator.reports = [], []

    def _next(self) -> Path:
        number = len(list(self._folder.glob("hang-*.json"))) + 1
        return self._folder / f"hang-{number}.json"


def in_words(event: dict[str, Any]) -> str:
    """An event for people, or "" for what only the log needs."""
    match event["event"]:
        case "view":
            return f"view {event['number']}: ranks {in_short(event['members'])} ({event['why']})"
        case "settled" if event["outage_s"]:
            return f"view {event['view']}: all its ranks work again after {event['outage_s']:.2f} s"
        case "note":
            return f"rank {event['rank']}: {event['note']}"
        case "slow" if event["over"]:
            return f"rank {event['rank']} does not hold the others up any more ({event['slow']})"
        case "slow":
            return f"rank {event['rank']} holds the others up ({event['slow']}): {event['why']}"
        case "drain":
            return f"rank {event['rank']} is being drained"
        case "grow":
            return f"more ranks are started like rank {event['like']}: {in_short(event['ranks'])}"
        case "coordinator":
            return f"the coordinator has come back, in view {event['view']}"
        case "end" if event["why"]:
            return event["why"]
    return ""


def in_short(numbers: Sequence[int]) -> str:
    """0, 1, 5-999"""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    told = [f"{a}" if a == b else f"{a}, {b}" if b == a + 1 else f"{a}-{b}" for a, b in runs]
    return ", ".join(told[:50]) + (" ..." if len(told) > 50 else "")


def main() -> int:
    return serve(Settings.from_json(sys.stdin.readline()), 0)


if __name__ == "__main__":
    sys.exit(main())

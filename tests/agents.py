"""A thousand agents and one coordinator: `python tests/agents.py --agents 100 300 1000` (docs/survival.md).

The coordinator is the real process, and so are its sockets, keys and messages; ranks are agents without a rank, in one
process, that beat as member.py does. What is measured: the coordinator's time and memory while ranks only beat, and how
long it takes from a rank's death until every other agent knows the new view, where the death is told by who started the
rank (`exited`) and where it is known by silence alone.
"""

from __future__ import annotations

import argparse
import json
import resource
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_runtime.comm.locks import calls, job_keys
from moe_runtime.comm.messages import open_socket, pack, unpack, zmq
from moe_runtime.control.agent import Agent
from moe_runtime.control.words import MAX_BYTES, PROTOCOL
from moe_runtime.launch.bench.model import machine_line
from moe_runtime.launch.machine import free_port

SILENCE_S = 3.0
LATE_S = 60.0


@dataclass
class One:
    agent: Agent
    socket: zmq.Socket
    due: float = 0.0
    view_at: float = 0.0  # when it learned of its newest view


class Crowd:
    """All agents of a job. Use it as a context manager: it starts the coordinator, and ends it."""

    def __init__(self, count: int, folder: Path) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = 8 * count + 200
        if soft < needed:
            if hard != resource.RLIM_INFINITY and hard < needed:
                raise SystemExit(f"{count} agents need {needed} open files, this user may have {hard}: ulimit -Hn")
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        self.port, secret = free_port(), secrets.token_hex(32)
        about = {"address": "127.0.0.1", "port": self.port, "secret": secret, "size": count}
        settings = {**about, "silence_s": SILENCE_S, "log_dir": str(folder)}
        command = [sys.executable, "-m", "moe_runtime.control.server"]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=(folder / "stderr").open("w"))
        self.server.stdin.write(json.dumps(settings).encode() + b"\n")
        self.server.stdin.flush()
        self.context = zmq.Context()
        self.context.set(zmq.MAX_SOCKETS, count + 100)
        self.poller = zmq.Poller()
        self._keys = job_keys(bytes.fromhex(secret))
        self.host = self._socket()
        self.agents: dict[zmq.Socket, One] = {}
        now = time.monotonic()
        for number in range(count):
            agent = Agent(number, f"m{number}", "here", 10_000 + number, SILENCE_S, now)
            socket = self._socket()
            self.agents[socket] = One(agent, socket)
            self._send(socket, agent.hello())

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stdin.close()
        if self.server.wait(10.0) not in (0, 1, 3):
            raise SystemExit(f"the coordinator ended with {self.server.returncode}")
        self.context.destroy(linger=0)

    def _socket(self) -> zmq.Socket:
        socket = open_socket(self.context, zmq.DEALER)
        socket.maxmsgsize = 16 * MAX_BYTES
        calls(socket, self._keys)
        socket.connect(f"tcp://127.0.0.1:{self.port}")
        self.poller.register(socket, zmq.POLLIN)
        return socket

    def _send(self, socket: zmq.Socket, message: dict[str, Any]) -> None:
        socket.send(pack({"protocol": PROTOCOL, **message}))

    def step(self) -> None:
        """What has come, and beats that are due."""
        for socket, _ in self.poller.poll(10):
            one = self.agents.get(socket)
            while socket.poll(0):
                message = unpack(socket.recv())
                if one is None:
                    continue
                before = one.agent.newest
                for answer in one.agent.receive(message):
                    self._send(socket, answer)
                if one.agent.newest is not before:
                    one.view_at = time.monotonic()
        now = time.monotonic()
        for one in list(self.agents.values()):
            if now >= one.due:
                for message in one.agent.tick(now):
                    self._send(one.socket, message)
                one.due = now + one.agent.wait_s(now)
                if one.agent.must_end:
                    raise SystemExit(f"rank {one.agent.number}: {one.agent.must_end}")

    def run(self, seconds: float) -> None:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            self.step()

    def everybody_knows(self, view: int) -> None:
        """Until all agents know a view, and work in it."""
        ends = time.monotonic() + LATE_S
        while any(one.agent.newest is None or one.agent.newest.number < view for one in self.agents.values()):
            if time.monotonic() > ends or self.server.poll() is not None:
                raise SystemExit(f"view {view} is not known everywhere after {LATE_S:g} s")
            self.step()
        for one in self.agents.values():
            self._send(one.socket, one.agent.settled(view))
        self.run(1.0)

    def end(self, how_many: int, told: bool) -> list[float]:
        """Some ranks die; seconds until each of the others knows the next view. told: their host says so."""
        view = max(one.agent.newest.number for one in self.agents.values())
        for socket in list(self.agents)[:how_many]:
            one = self.agents.pop(socket)
            self.poller.unregister(socket)
            socket.close(linger=0)
            if told:
                about = {"rank": one.agent.number, "pid": 10_000 + one.agent.number, "how": "signal 9"}
                self._send(self.host, {"kind": "exited", "host": "here", "mark": "h", **about})
        began = time.monotonic()
        self.everybody_knows(view + 1)
        return [one.view_at - began for one in self.agents.values()]

    def server_use(self) -> tuple[float, float]:
        """(seconds of processor time so far, MiB in memory now) of the coordinator."""
        proc = Path(f"/proc/{self.server.pid}")
        fields = (proc / "stat").read_text().rpartition(")")[2].split()
        pages = int((proc / "statm").read_text().split()[1])
        seconds = (int(fields[11]) + int(fields[12])) / 100
        return seconds, pages * resource.getpagesize() / (1 << 20)


def measure(count: int, beats_s: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="moe-agents-") as scratch, Crowd(count, Path(scratch)) as crowd:
        began = time.monotonic()
        crowd.everybody_knows(1)
        start_s = time.monotonic() - began - 1.0
        crowd.run(2.0)
        used, own, at = crowd.server_use()[0], time.process_time(), time.monotonic()
        crowd.run(beats_s)
        took = time.monotonic() - at
        share = (crowd.server_use()[0] - used) / took
        crowd_share = (time.process_time() - own) / took
        told = crowd.end(1, told=True)
        crowd.run(1.0)
        several = crowd.end(max(1, count // 100), told=True)
        crowd.run(1.0)
        silent = crowd.end(1, told=False)
        memory = crowd.server_use()[1]
        times = {"told": told, "several": several, "silent": silent}
        spread = {k: {"median_s": statistics.median(v), "worst_s": max(v)} for k, v in times.items()}
        beat_s = next(iter(crowd.agents.values())).agent._beat_s
        return {
            "agents": count,
            "start_s": start_s,
            "beat_s": beat_s,
            "coordinator_share": share,
            "agents_share": crowd_share,
            "coordinator_mib": memory,
            **spread,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--seconds", type=float, default=10.0, help="of beating, while the coordinator is looked at")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = [measure(count, arguments.seconds) for count in arguments.agents]
    if arguments.json:
        print(json.dumps({"machine": machine_line(), "silence_s": SILENCE_S, "rows": rows}))
        return 0
    print(f"machine: {machine_line()}; silence {SILENCE_S:g} s; median and worst of all agents, in milliseconds")
    print(f"{'agents':>7}{'start':>8}{'a beat':>8}{'CPU':>7}{'memory':>10}{'told':>16}{'1 % told':>16}{'silent':>16}")
    for row in rows:
        pairs = [f"{row[k]['median_s'] * 1e3:.0f} {row[k]['worst_s'] * 1e3:.0f}" for k in ("told", "several", "silent")]
        print(
            f"{row['agents']:>7}{row['start_s']:>7.1f}s{row['beat_s']:>7.2f}s{row['coordinator_share']:>7.1%}"
            f"{row['coordinator_mib']:>6.0f} MiB" + "".join(f"{pair:>16}" for pair in pairs)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

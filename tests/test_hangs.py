"""Hang reports from real processes: a coordinator, three ranks' agents, one of them stuck; and their words."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from ranks import run_ranks

from moe_runtime.comm.locks import calls, job_keys
from moe_runtime.comm.messages import open_socket, pack, unpack, zmq
from moe_runtime.control import hangs
from moe_runtime.control.member import Member
from moe_runtime.control.words import PROTOCOL
from moe_runtime.core.errors import PeerTimeout
from moe_runtime.launch.machine import free_port

SECRET = "5e" * 32
STUCK = 2


def start_coordinator(folder: Path, port: int, **settings) -> subprocess.Popen:
    """The server process; its stderr goes to a file in `folder`."""
    about = {"address": "127.0.0.1", "port": port, "secret": SECRET, "size": 3, "log_dir": str(folder), **settings}
    with (folder / "stderr").open("w") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "moe_runtime.control.server"], stdin=subprocess.PIPE, stderr=file, text=True
        )
    server.stdin.write(json.dumps(about) + "\n")
    server.stdin.flush()  # and stays open: its end would end the server
    return server


class HostAgent(threading.Thread):
    """Kills the ranks that the coordinator wants gone, as who started them does. fenced: [rank, process id] of each."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.port, self.fenced, self.over = port, [], threading.Event()
        self.start()

    def run(self) -> None:
        context = zmq.Context()
        link = open_socket(context, zmq.DEALER)
        calls(link, job_keys(bytes.fromhex(SECRET)))
        link.connect(f"tcp://127.0.0.1:{self.port}")
        about = {"protocol": PROTOCOL, "host": socket.gethostname(), "mark": "h"}
        while not self.over.wait(0.05):
            link.send(pack({**about, "kind": "host", "ranks": []}))
            for rank, pid in unpack(link.recv())["fence"] if link.poll(50) else ():
                if [rank, pid] not in self.fenced:
                    self.fenced.append([rank, pid])
                    with suppress(ProcessLookupError):  # it was told to end, and has
                        os.kill(pid, signal.SIGKILL)
                    link.send(pack({**about, "kind": "exited", "rank": rank, "pid": pid, "how": "was killed"}))
        link.close(linger=0)
        context.term()


def wait_in_vain(member: Member, seconds: float) -> PeerTimeout:
    """What a transport does whose peer does not come."""
    member.state.update({"phase": "dispatch", "layer": 3, "pass": 18, "tokens": 5, "sent": [], "received": []})
    time.sleep(seconds)
    text = f"rank {member.number}, phase dispatch: rank {STUCK} did not come within {seconds:g} s"
    return PeerTimeout(text, waiting_rank=member.number, ranks=(STUCK,), phase="dispatch")


def a_loop_that_does_not_end(seconds: float) -> None:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        sum(range(1000))


def be_a_rank(port: int, how: str, told_by: str, silence_s: float) -> tuple[int, ...]:
    """Join, then wait for the stuck rank in vain, or be it; the members of the view after that."""
    number = int(os.environ["RANK"])
    member = Member("127.0.0.1", port, job_keys(bytes.fromhex(SECRET)), number, silence_s, socket.gethostname())
    first = member.await_view(0, 20.0)
    member.settled(first.number)
    if number == STUCK:
        member.state.update(
            {"phase": "experts", "layer": 3, "pass": 17, "tokens": 4, "sent": [1, 1, 2], "received": [2, 3, 2]}
        )
        time.sleep(0.5)  # all have said so
        if how == "loop":
            a_loop_that_does_not_end(60.0)
        os.kill(os.getpid(), signal.SIGSTOP)
    if told_by == "others":
        error = wait_in_vain(member, 1.0)
        member.report_lost(first.number, error.ranks, str(error), timed_out=True)
    else:
        member.state.update({"phase": "dispatch", "layer": 3, "pass": 18, "tokens": 5, "sent": [], "received": []})
    second = member.await_view(first.number, 30.0)
    member.settled(second.number)
    member.leave()
    time.sleep(0.5)
    member.close()
    return second.members


@pytest.mark.parametrize(("how", "told_by"), [("loop", "others"), ("stopped", "others"), ("stopped", "silence")])
def test_who_waits_for_whom_and_where_the_stuck_rank_is(tmp_path, how, told_by):
    """A rank in a loop of Python's still answers with its stack; a process that is stopped is silent."""
    silence_s = 3.0 if told_by == "silence" else 10.0
    port = free_port()
    server, agent = start_coordinator(tmp_path, port, silence_s=silence_s), HostAgent(port)
    try:
        members = run_ranks(be_a_rank, 3, port, how, told_by, silence_s, expect_dead=(STUCK,))
        assert server.wait(20) == 0
    finally:
        agent.over.set()
        agent.join()
        server.kill()
        server.wait()
    assert members[:2] == [(0, 1)] * 2 and [fenced for fenced, _ in agent.fenced] == [STUCK]
    told = (tmp_path / "stderr").read_text()
    print(told)
    [file] = tmp_path.glob("hang-*.json")
    report = json.loads(file.read_text())
    ranks = {rank["rank"]: rank for rank in report["ranks"]}
    assert report["stuck"] == STUCK and set(ranks) == {0, 1, 2} and abs(report["at"] - time.time()) < 60
    assert all("in be_a_rank" in ranks[n]["stacks"] for n in (0, 1))
    assert ranks[STUCK]["at"]["received"] == [2, 3, 2]
    assert told.count("hang in view 1") == 1 and told.count(str(file)) == 1
    lines = {n: re.findall(rf"^  rank {n} \(host .*\): (.*)$", told, re.MULTILINE) for n in ranks}
    assert all(len(found) == 1 for found in lines.values())
    assert "experts of layer 3, pass 17, 4 tokens, rows to each rank [1, 1, 2]" in lines[STUCK][0]
    for n in (0, 1):
        assert "dispatch of layer 3, pass 18, 5 tokens" in lines[n][0]
    if told_by == "others":
        assert all(f"waits for rank 2: rank {n}, phase dispatch" in lines[n][0] for n in (0, 1))
    if how == "loop":
        assert "its main thread is in a_loop_that_does_not_end (" in lines[STUCK][0]
        assert "a_loop_that_does_not_end" in ranks[STUCK]["stacks"]
    else:
        assert "the whole process is stopped, or cut off" in lines[STUCK][0]
        assert ranks[STUCK]["stacks"] == hangs.NO_ANSWER and ranks[STUCK]["heard_s"] > 0.9


def rank(number: int, report: dict | None = None, stacks: str = "", phase: dict | None = None):
    said = {"text": stacks, "state": phase or {}} if stacks else None
    return SimpleNamespace(
        number=number, host="h", pid=100 + number, heard=9.0, report=report, stacks=said, phase=phase or {}
    )


def test_of_many_ranks_those_that_matter_are_shown():
    waits = {"suspects": [90], "why": "no rows within 5 s"}
    members = [rank(n, waits if n in (50, 51) else None, "thread x:\n") for n in range(100)]
    report = hangs.build(4, members, 90, "ranks 50, 51 waited in vain", 10.0)
    words = hangs.in_words(report, "hang-1.json").splitlines()
    assert words[0] == "hang in view 4: ranks 50, 51 waited in vain"
    assert [line.split()[1] for line in words[1:4]] == ["90", "50", "51"] and len(words) < 25
    assert "and 84 ranks more" in words[-2] and len(report["ranks"]) == 100


@pytest.mark.parametrize(("at", "words"), [
    ({}, "has not said what it does"),
    ({"phase": "starting"}, "starting"),
    ({"phase": "dense", "layer": 2, "pass": 5, "tokens": 8}, "dense, after expert layer 2, pass 5, 8 tokens"),
    ({"phase": "combine", "layer": 2, "pass": 5, "tokens": 8, "sent": [1, 2], "received": [3, 4]},
     "combine of layer 2, pass 5, 8 tokens, rows to each rank [1, 2], rows from each rank [3, 4]"),
])  # fmt: skip
def test_where_a_rank_is_in_words(at, words):
    assert hangs.where(at) == words


def test_names_of_ranks():
    assert hangs.names([3]) == "rank 3" and hangs.names([1, 2]) == "ranks 1, 2"
    assert hangs.names(range(20)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more"


def test_the_innermost_frame_is_the_main_threads():
    stacks = (
        'thread agent:\n  File "a.py", line 1, in poll\n    x\n\nthread MainThread:\n'
        '  File "m.py", line 5, in main\n    f()\n  File "/x y/b.py", line 7, in f\n    g()\n'
    )
    assert hangs.innermost(stacks) == "in f (/x y/b.py:7)" and hangs.innermost("") == "nowhere in Python"

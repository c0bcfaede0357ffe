"""`moe-launch top`: what is shown, and a live job (a coordinator's process, two ranks' agents) on a terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families
from test_hangs import SECRET, start_coordinator

from moe_runtime.comm.locks import job_keys
from moe_runtime.control.member import Member
from moe_runtime.control.prometheus import CONTENT_TYPE
from moe_runtime.launch import records
from moe_runtime.launch.machine import free_port
from moe_runtime.launch.top import lines, rates, short

COMMAND = (sys.executable, "-m", "moe_runtime.launch.cli", "top")


def rank(number: int, passes: int, host: str = "node-a", **more) -> dict:
    counted = {
        "passes": passes, "tokens": 10 * passes, "rows": 640 * passes, "requests": number + 1,
        "dispatch_s": 0.001 * passes, "experts_s": 0.012 * passes, "combine_s": 0.0005 * passes,
        "memory_bytes": 3 << 29,
    }  # fmt: skip
    state = {"state": "member", "at": {"phase": "dispatch", "layer": 12}, "heard_s": 0.06}
    return {"rank": number, "host": host, "pid": 100 + number, "metrics": counted, **state, **more}


def status(*ranks: dict, **more) -> dict:
    return {
        "job": "generate-1", "state": "running", "why": "", "view": 3, "view_why": "rank 2: was killed by SIGKILL",
        "members": [one["rank"] for one in ranks], "settled": True, "outages": [], "slow": [], "ranks": list(ranks),
        **more,
    }  # fmt: skip


def test_a_picture():
    slow = [{"rank": 1, "kind": "compute", "ratio": 2.0, "why": "30.0 us a row of experts"}]
    before, after = status(rank(0, 100), rank(1, 50)), status(rank(0, 120), rank(1, 70), outages=[0.5, 0.75], slow=slow)
    assert lines(after, before, 2.0, 80) == [
        "generate-1: running",
        "view 3: rank 2: was killed by SIGKILL",
        "2 ranks, 200.0 tokens/s, 3 requests done, 2 outages of 1.25 s in all",
        "",
        "rank  host   state    doing       heard   tok/s  rows/s  disp   exp  comb   mem",
        "   0  node-a member   dispatch 12  0.1s     100    6.4k   1.0  12.0   0.5  1.5G",
        "   1! node-a member   dispatch 12  0.1s     100    6.4k   1.0  12.0   0.5  1.5G",
        "! rank 1 (compute): 30.0 us a row of experts",
    ]


def test_the_first_look_and_ranks_that_began_anew_have_no_rates():
    now = status(rank(0, 20), rank(1, 30), rank(2, 0, metrics={}, at={}, state="starting"))
    told = lines(now, None, 0.0, 80)
    assert told[2].startswith("3 ranks, - tokens/s") and all(line.count(" - ") >= 3 for line in told[5:8])
    assert rates(now, status(rank(0, 20), rank(1, 40)), 1.0).keys() == {0}  # rank 1 counts from 0 again
    assert rates(now, status(rank(0, 10, pid=7)), 1.0) == {}  # another process
    assert rates(now, status(rank(0, 10)), 1.0)[0].tokens_s == 100


@pytest.mark.parametrize("width", [20, 40, 80, 81, 200])
def test_no_line_is_wider_than_the_window_and_80_columns_hold_every_number(width):
    hosts = ["a-very-long-host-name.of.a.cluster", "b"]
    odd = {"metrics": {**rank(0, 10**9)["metrics"]}, "heard_s": 12345.6, "state": "draining"}
    ranks = [rank(n, 10**9, host, **odd) for n, host in enumerate(hosts)]
    why = "; ".join(f"rank {n}: was killed by SIGKILL" for n in range(30))
    slow = [{"rank": 0, "kind": "link", "ratio": 9.0, "why": "the others wait " * 20}]
    told = lines(status(*ranks, view_why=why, slow=slow), status(*[rank(n, 0) for n in (0, 1)]), 0.5, width)
    assert max(map(len, told)) <= width and not any("\x1b" in line for line in told)
    if width >= 80:
        assert [line.rstrip()[-4:] for line in told if re.match(r" +[01]", line)] == ["1.5G"] * 2
        assert (hosts[0] in "\n".join(told)) == (width == 200)


@pytest.mark.parametrize(("number", "text"), [
    (0, "0"), (7, "7"), (7.25, "7.2"), (99.96, "100"), (999.4, "999"), (999.6, "1.0k"), (12345, "12.3k"), (3e6, "3M"),
    (123.4e9, "123G"), (5e16, "50000T"),
])  # fmt: skip
def test_numbers_are_short(number, text):
    assert short(number) == text
    assert len(short(number)) <= 6


def test_bytes_count_in_1024():
    assert (short(1 << 30, 1024), short(900 << 20, 1024), short(2048, 1024)) == ("1G", "900M", "2K")


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A running job of two ranks that count tokens: their agents, and the port of /metrics."""
    port, folder = free_port(), tmp_path / "logs"
    folder.mkdir()
    server = start_coordinator(folder, port, silence_s=20.0, size=2, metrics_port=(metrics_port := free_port()))
    members = [Member("127.0.0.1", port, job_keys(bytes.fromhex(SECRET)), number, 20.0, "vm") for number in range(2)]
    over = threading.Event()

    def work() -> None:
        began = time.monotonic()
        while not over.wait(0.02):
            passes = int(100 * (time.monotonic() - began))
            for member in members:
                member.metrics = rank(member.number, passes)["metrics"]
                member.state.update({"phase": "experts", "layer": 1})

    thread = threading.Thread(target=work)
    thread.start()
    for member in members:
        member.settled(member.await_view(0, 20.0).number)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder_of_records = tmp_path / "moe_runtime" / "jobs"
    folder_of_records.mkdir(parents=True)
    known = {
        "pid": os.getpid(),
        "host": "h",
        "started": time.time(),
        "code": None,
        "engine": "local",
        "log_dir": str(folder),
    }
    watched = {**known, "job": "watched", **records.coordinator("127.0.0.1", port, SECRET)}
    for record in (
        watched,
        {**known, "job": "plain"},
        {**watched, "job": "over", "code": 0},
        {**watched, "job": "gone", "coordinator": ["127.0.0.1", free_port()]},
    ):
        (folder_of_records / f"{record['job']}.json").write_text(json.dumps(record))
    yield SimpleNamespace(members=members, metrics_port=metrics_port)
    over.set()
    thread.join()
    for member in members:
        member.leave()
        member.close()
    server.wait(10)


def test_prometheus_reads_the_same_job(job):
    ends, text = time.monotonic() + 10, ""
    while "generated_tokens" not in text and time.monotonic() < ends:
        with urllib.request.urlopen(f"http://127.0.0.1:{job.metrics_port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
            assert answer.headers["Content-Type"] == CONTENT_TYPE
    found = {family.name: family.samples for family in text_string_to_metric_families(text)}
    tokens = {sample.labels["rank"]: sample.value for sample in found["moe_runtime_generated_tokens"]}
    assert tokens.keys() == {"0", "1"} and min(tokens.values()) > 0
    assert found["moe_runtime_up"][0].value == 1 and found["moe_runtime_view_members"][0].value == 2


def top(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=60)


def test_one_look_at_a_live_job(job):
    ran = top("watched", "--once", "--every", "0.5")
    assert ran.returncode == 0 and not ran.stderr, ran.stderr
    print(ran.stdout)
    told = ran.stdout.splitlines()
    assert told[:2] == ["watched: running", "view 1: all ranks are here"] and len(told) == 8
    assert 1500 < float(re.search(r"([\d,.]+) tokens/s", told[2])[1].replace(",", "")) < 2500
    assert all(line.split()[2:5] == ["member", "experts", "1"] for line in told[5:7])
    answer = json.loads(top("watched", "--once", "--every", "0.5", "--json").stdout)
    assert answer["job"] == "watched" and answer["rates"]["1"]["experts_ms"] == pytest.approx(12.0)


@pytest.mark.parametrize(("name", "code", "words"), [
    ("plain", 3, "job plain has no coordinator to ask; moe-launch status says what is known of it"),
    ("over", 3, "job over is not running: it ended with 0"),
    ("unknown", 2, "job unknown: this host has no part in it"),
    ("gone", 3, "no answer from its coordinator at 127.0.0.1:"),
])  # fmt: skip
def test_a_job_that_cannot_be_watched_is_said_so_in_one_line(job, name, code, words):
    ran = top(name)
    assert ran.returncode == code and words in ran.stderr and len(ran.stderr.splitlines()) == 1 and not ran.stdout


class Terminal:
    """`moe-launch top` on a terminal of its own."""

    def __init__(self, columns: int, rows: int, *words: str) -> None:
        self.master, slave = pty.openpty()
        self.resize(columns, rows, None)
        self.process = subprocess.Popen(
            [*COMMAND, *words], stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)
        self.text = ""

    def resize(self, columns: int, rows: int, pid: int | None) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        if pid is not None:
            os.kill(pid, signal.SIGWINCH)

    def read_until(self, pattern: str, seconds: float = 20.0) -> str:
        """What came since the last call, up to what matches."""
        ends = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text, flags=re.DOTALL)):
            assert time.monotonic() < ends, f"{pattern} did not come: {self.text!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                self.text += os.read(self.master, 1 << 16).decode()
        before, self.text = self.text[: found.end()], self.text[found.end() :]
        return before


def test_a_terminal_is_redrawn_follows_its_size_and_ctrl_c_leaves_it_clean(job):
    terminal = Terminal(80, 24, "watched", "--every", "3")
    try:
        first = terminal.read_until(r"\x1b\[J")
        assert first.startswith("\x1b[?25l\x1b[2J\x1b[H") and "watched: running" in first and " mem\x1b[K" in first
        began = time.monotonic()
        terminal.resize(40, 6, terminal.process.pid)
        small = terminal.read_until(r"lines more[^\x1b]*\x1b\[K\s*\x1b\[J")
        assert time.monotonic() - began < 2.0  # not at the next look
        shown = [re.sub(r"\x1b\[\??\d*[A-Za-z]", "", line) for line in small.rpartition("\x1b[H")[2].split("\n")]
        assert len(shown) == 6 and shown[-1] == "" and max(len(line.rstrip()) for line in shown) <= 40
        os.write(terminal.master, b"\x03")
        assert terminal.process.wait(10) == 0
        assert "Traceback" not in terminal.read_until(r"\x1b\[\?25h")
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)


def test_the_end_of_a_job_ends_it(job):
    watching = subprocess.Popen([*COMMAND, "watched", "--every", "0.3"], stderr=subprocess.PIPE, text=True, stdout=-3)
    time.sleep(1.5)
    for member in job.members:
        member.leave()
    _, stderr = watching.communicate(timeout=20)
    assert watching.returncode == 3 and "job watched is ending" in stderr


def test_a_picture_after_another_where_output_is_no_terminal(job, tmp_path: Path):
    with (tmp_path / "out").open("w") as out:
        watching = subprocess.Popen([*COMMAND, "watched", "--every", "0.2"], stdout=out, stderr=subprocess.PIPE)
        time.sleep(3.0)
        watching.send_signal(signal.SIGINT)
        _, stderr = watching.communicate(timeout=10)
    told = (tmp_path / "out").read_text()
    assert watching.returncode == 0 and not stderr and told.count("watched: running") >= 3 and "\x1b" not in told

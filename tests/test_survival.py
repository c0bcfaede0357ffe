"""Jobs that lose ranks: what `--on-loss` promises, a short part of tests/campaign.py and what that does not look at."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from campaign import (
    MOE_LAUNCH,
    Files,
    Job,
    cluster_file,
    cut,
    environment,
    long_life,
    marked,
    new_folder,
    on_hosts,
    strike,
)
from hosts import Slurm
from strangers import Relay, dealer, listening
from test_locks import attack

from moe_runtime.control.client import Client
from moe_runtime.control.words import MAX_BYTES
from moe_runtime.launch import records
from moe_runtime.launch.status import ask_coordinator


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    made = Files(tmp_path_factory.mktemp("survival"), max_new=120)
    made.make()
    return made


@pytest.mark.parametrize(
    "kind", ["combine: kill", "dispatch: hang", "any moment: stop", "coordinator: kill, and a rank"]
)
def test_a_lost_rank_costs_no_request_and_no_text(files: Files, kind: str) -> None:
    job = Job(files, 3, "reload", 24)
    number, _ = job.wait_settled(0)
    fault = strike(job, kind, (1,), random.Random(1))
    assert job.wait_settled(number)[1] == [0, 2]
    job.end()
    assert fault.outage_s is not None and fault.outage_s < 20


def test_replicas_take_over_and_the_writer_of_results_may_be_lost(files: Files) -> None:
    job = Job(files, 3, "replica", 24)
    number, _ = job.wait_settled(0)
    fault = strike(job, "experts: kill", (0,), random.Random(1))
    job.wait_settled(number, 2)
    assert not any("read from the checkpoint" in event.get("note", "") for event in job.events())
    job.end()
    assert fault.outage_s is not None and fault.outage_s < 10


def test_ranks_come_back_and_may_be_struck_again_meanwhile(files: Files) -> None:
    faults = long_life(files, random.Random(5), 3, "reload", 3, 120.0)
    assert len(faults) >= 3


def test_two_lost_at_once_leave_one_that_does_all(files: Files) -> None:
    job = Job(files, 3, "reload", 24, "--runtime", "transport=zeromq")
    number, _ = job.wait_settled(0)
    strike(job, "any moment: kill two at once", (0, 2), random.Random(1))
    assert job.wait_settled(number, 1)[1] == [1]
    job.end()


@pytest.mark.parametrize(("point", "transport"), [("meeting", "auto"), ("placing", "zeromq"), ("ledger", "auto")])
def test_a_loss_while_the_view_after_another_one_is_made(files: Files, point: str, transport: str) -> None:
    job = Job(files, 4, "reload", 24, "--runtime", f"transport={transport}")
    number, _ = job.wait_settled(0)
    job.arm(1, point, "kill")
    strike(job, "any moment: kill", (0,), random.Random(1))
    job.fired(1)
    assert job.wait_settled(number, 2)[1] == [2, 3]
    job.end()


def test_a_rank_that_reads_lost_experts_for_long_is_waited_for(files: Files) -> None:
    job = Job(files, 3, "reload", 24)
    number, _ = job.wait_settled(0)
    job.arm(1, "reading", "late")
    strike(job, "any moment: kill", (0,), random.Random(1))
    assert job.wait_settled(number)[1] == [1, 2]
    job.end()


def test_a_rank_is_drained_by_command_also_the_one_that_writes_results(files: Files) -> None:
    job = Job(files, 3, "reload", 60)
    job.wait_settled(0)
    assert job.asks("drain", "0")
    assert job.wait_settled(0, 2)[1] == [1, 2]
    job.end()


def test_ranks_are_added_to_a_running_job_and_those_it_began_with_may_go(files: Files) -> None:
    job = Job(files, 2, "reload", 200, "--rebalance")
    job.wait_settled(0)
    assert job.asks("grow", "--ranks", "2")
    number, members = job.wait_settled(0, 4)
    assert members == [0, 1, 2, 3]
    moved = wait_for_event(job, "experts have moved", event="note")["note"]
    assert not moved.endswith(" 0] now") and " 0," not in moved.partition("before, ")[2], moved
    strike(job, "any moment: kill two at once", (0, 1), random.Random(1))
    assert job.wait_settled(number, 2)[1] == [2, 3]
    job.end()


NODES = """[[node]]
name = "quick"
host = "localhost"
vendor = "cpu"
devices = 2

[[node]]
name = "slow"
host = "localhost"
vendor = "cpu"
emulate_speed = 0.1
"""


def test_a_slow_rank_gets_less_work_while_others_are_lost_and_added_beside_it(files: Files) -> None:
    (files.folder / "nodes.toml").write_text(NODES)
    nodes = ("--cluster", str(files.folder / "nodes.toml"))
    moves = ("--runtime", "rebalance=auto", "--runtime", "rebalance_every=30")
    job = Job(files, 3, "replica", 120, *moves, *nodes, launch=nodes)
    number, _ = job.wait_settled(0)
    ends = time.monotonic() + 60
    while (share := share_of(job, 2)) > 0.2 and time.monotonic() < ends:  # a third, while nobody has measured
        pass
    assert 0 < share < 0.2
    wait_for_event(job, event="slow", rank=2, slow="compute")
    strike(job, "any moment: kill", (0,), random.Random(1))
    number, members = job.wait_settled(number, 2)
    assert members == [1, 2] and job.asks("grow", "--like", "2")
    assert job.wait_settled(number, 3)[1] == [1, 2, 3]
    wait_for_event(job, "experts have moved", event="note")
    job.end()


def share_of(job: Job, rank: int) -> float:
    """Of the rows that all ranks compute within a second."""
    seen = []
    for _ in range(2):
        ranks = ask_coordinator(records.read(job.logs.name), {"kind": "status"})["ranks"]
        seen.append({one["rank"]: one["metrics"].get("rows", 0) for one in ranks})
        time.sleep(1.0)
    rows = {number: count - seen[0][number] for number, count in seen[1].items()}
    return rows[rank] / max(1, sum(rows.values()))


def wait_for_event(job: Job, note: str = "", **wanted: object) -> dict:
    """The latest with these fields; note: what its note says."""
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        found = [event for event in job.events() if wanted.items() <= event.items() and note in event.get("note", "")]
        if found:
            return found[-1]
        time.sleep(0.1)
    raise AssertionError(f"no {wanted} {note}: {job.tail()}")


def test_strangers_at_the_coordinator_are_turned_away_and_counted_and_nothing_else_listens(files: Files) -> None:
    job = Job(files, 3, "reload", 120)
    job.wait_settled(0)
    record = records.read(job.logs.name)
    (address, port), secret = record["coordinator"], bytes.fromhex(record["coordinator_secret"])
    relay = Relay(address, port)
    client = Client(address, relay.port, secret)
    assert client.ask({"kind": "status"}, 10)["refused"] == {}
    attack(address, port, relay.sent)
    for message in ({"kind": "status", "protocol": 99}, {"kind": "nonsense"}, {"kind": "drain", "rank": "1"}):
        assert client.ask(message, 10)["kind"] == "refused"
    with dealer(address, port, secret) as one:
        one.send(b"\xc1")
        one.send(b"x" * (MAX_BYTES + 1))
        one.send(b"x" * 5 * MAX_BYTES)  # ends its connection
        assert not one.poll(500)
    refused = client.ask({"kind": "status"}, 10)["refused"]
    client.close()
    assert sum(count for reason, count in refused.items() if reason.startswith("connections")) >= 1000, refused
    assert sum(count for reason, count in refused.items() if not reason.startswith("connections")) == 5, refused
    listen = {pid: listening(pid) for pid in marked(job.mark)}
    assert listen.pop(job.coordinator()) == {(address, port)} and address == "127.0.0.1"
    assert not any(listen.values()), listen
    job.end()


def test_without_replicas_that_policy_ends_the_job_in_one_clear_line(files: Files) -> None:
    job = Job(files, 3, "reload", 24)  # its folder and input
    job.process.send_signal(signal.SIGTERM)
    job.process.wait(60)
    words = ["--nproc-per-node", "2", "--on-loss", "replica", "--log-dir", str(job.folder / "again")]
    options = files.options(job.folder / "in.jsonl", job.folder / "again.jsonl")
    running = subprocess.Popen(
        [*MOE_LAUNCH, "generate", *words, *options],
        stderr=subprocess.PIPE,
        text=True,
        env=environment({"CAMPAIGN": f"{job.mark} again"}),
    )
    job.logs, job.process = job.folder / "again", running
    job.wait_settled(0)
    victim = next(pid for pid in marked(f"{job.mark} again") if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(victim, signal.SIGKILL)
    _, told = running.communicate(timeout=60)
    assert running.returncode == 2
    assert "plan replicas, or give --on-loss reload" in told


def test_renormalising_is_said_and_counted(files: Files) -> None:
    job = Job(files, 3, "renormalise", 24)
    number, _ = job.wait_settled(0)
    strike(job, "any moment: kill", (2,), random.Random(1))
    job.wait_settled(number, 2)
    assert job.process.wait(120) == 0, job.tail()
    told = (job.folder / "log.txt").read_text()
    assert "WARNING: no rank holds" in told and "results differ from here on" in told
    assert "renormalised:" in told
    assert len(job.out.read_text().splitlines()) == 24


def test_the_half_with_the_coordinator_goes_on(files: Files) -> None:
    (fault,) = cut(files, random.Random(1), 2, 1)
    assert fault.outage_s is not None and fault.outage_s < 20


def test_under_slurm_a_lost_rank_comes_back_on_its_node(files: Files, tmp_path: Path) -> None:
    with Slurm(tmp_path) as slurm:
        folder = new_folder(files)
        launch = ["--engine", "slurm", "--master-addr", "127.0.0.1", "--threads-per-rank", "1"]
        launch += ["--cluster", cluster_file(folder, [("n1", 1), ("n2", 2)])]
        found = [f"{name}={slurm.env[name]}" for name in ("SLURM_CONF", "PATH")]
        job = Job(
            files,
            3,
            "reload",
            200,
            restarts=1,
            launch=launch,
            folder=folder,
            on=lambda *words: ["env", *found, *map(str, words)],
        )
        number, _ = job.wait_settled(0)
        strike(job, "any moment: kill", (2,), random.Random(1))
        assert job.wait_settled(number, 3)[1] == [0, 1, 2]
        job.end()


def test_a_rank_is_added_on_the_host_that_is_named(files: Files) -> None:
    with on_hosts(files, 2, 1, 200) as (_, job):
        job.wait_settled(0)
        assert job.asks("grow", "--like", "1")
        assert job.wait_settled(0, 3)[1] == [0, 1, 2]
        networks = [os.readlink(f"/proc/{pid}/ns/net") for _, pid in sorted(job.pids().items())]
        assert networks[0] != networks[1] == networks[2]
        job.end()


def test_fewer_than_half_stop_and_say_so(files: Files) -> None:
    with on_hosts(files, 3, 1, 200) as (made, job):
        job.wait_settled(0)
        with made.unplugged(0):
            assert job.process.wait(90) == 1
        assert "cannot go on with 1 of 3 ranks" in (job.folder / "log.txt").read_text()

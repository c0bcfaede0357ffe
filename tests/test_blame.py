"""Which rank a job's end is put down to: the one that is dead, stopped or hangs, and never one that waited for it."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest
from ranks import RankFailed, run_ranks
from test_launch import launch, script

import moe_runtime
from moe_runtime.launch.blame import StoppedFor, blamed, culprit, is_stopped
from moe_runtime.launch.machine import free_port


def traceback_of(message: str, prefix: str = "") -> list[str]:
    lines = ["Traceback (most recent call last):", '  File "job.py", line 1, in <module>', "    train()", message]
    return [*(prefix + line for line in lines), "a thread's last words"]


@pytest.mark.parametrize(("message", "ranks"), [
    ("PeerTimeout: rank 0, phase combine, sending [1, 2]: waited 8 s for ranks [1, 2] over shm (rank 1: half; rank 2: "
     "nothing)", (1, 2)),
    ("PeerLost: rank 0, phase dispatch: rank 3 (process 77) has ended; look at its log", (3,)),
    ("PeerLost: rank 12, phase rendezvous: one of ranks [2] left while meeting (closed)", (2,)),
    ("PeerTimeout: no rank is named", ()),
    ("RuntimeError: rank 1 is odd", None),
])  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "[rank0]: "])  # torch.distributed's own, where it has a group
def test_an_error_says_whom_it_is_about(message, ranks, prefix):
    assert blamed(traceback_of(f"moe_runtime.core.errors.{message}", prefix)) == ranks


@pytest.mark.parametrize("transport", ["gloo", "shm", "zeromq"])
def test_what_transports_say_of_a_rank_that_does_not_come_is_understood(transport):
    with pytest.raises(RankFailed) as failed:
        run_ranks(wait_in_vain, 2, transport)
    assert blamed(str(failed.value).splitlines()) == (1,)


def wait_in_vain(transport: str) -> None:
    with moe_runtime.init({"timeout_s": 3, "transport": transport}) as runtime:
        if runtime.rank == 1:
            time.sleep(20)
        runtime.transport.barrier("test")


@pytest.mark.parametrize(("failed", "running", "stopped", "named"), [
    ({0: (1,), 1: None}, [2], [2], 1),  # its own end explains the other's
    ({0: (1,)}, [1, 2], [2], 2),  # rank 1 waits for rank 2, which is stopped
    ({0: (2,), 1: (2,)}, [2], [], 2),
    ({0: (1, 2), 1: (2,)}, [2], [], 2),
    ({0: (1,)}, [2], [], 0),  # rank 1 has ended well: what rank 0 says is all there is
    ({2: ()}, [0, 1], [], 2),
])  # fmt: skip
def test_the_cause_is_named_and_not_its_consequences(failed, running, stopped, named):
    assert culprit(failed, running, stopped) == named


def test_a_process_is_stopped_for_long_only_if_every_look_found_it_so():
    process = subprocess.Popen(["sleep", "60"])
    try:
        looks = StoppedFor(2)
        process.send_signal(signal.SIGSTOP)
        wait_until_stopped(process.pid, True)
        assert looks.look([process.pid]) == []
        process.send_signal(signal.SIGCONT)
        wait_until_stopped(process.pid, False)
        assert looks.look([process.pid]) == []
        process.send_signal(signal.SIGSTOP)
        wait_until_stopped(process.pid, True)
        assert looks.look([process.pid]) == [] and looks.look([process.pid]) == [process.pid]
    finally:
        process.kill()
        process.wait()
    assert not is_stopped(process.pid)


def wait_until_stopped(pid: int, stopped: bool) -> None:
    ends = time.monotonic() + 10
    while is_stopped(pid) != stopped:
        assert time.monotonic() < ends
        time.sleep(0.01)


RESTARTED = 'if os.environ["TORCHELASTIC_RESTART_COUNT"] == "1": sys.exit(0)\n'
WAITS = """
class PeerTimeout(Exception): pass
wait_for_others()
time.sleep(1)
raise PeerTimeout(f"rank {rank}, phase dispatch: waited 1 s for ranks [1] over gloo")
"""


def test_a_stopped_rank_is_found_without_anybody_waiting_for_it_and_killed_before_the_restart(tmp_path):
    stops = "ready()\nos.kill(os.getpid(), signal.SIGSTOP) if rank == '1' else time.sleep(100)\n"
    job = script(tmp_path, RESTARTED + stops)
    words = ("run", "--nproc-per-node", "2", "--max-restarts", "1", "--silence", "1", "--log-dir", "logs", job)
    began = time.monotonic()
    result = launch(tmp_path, *words)
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - began < 9  # the 10 s of --shutdown-timeout are for ranks that can hear
    assert "rank 1 failed first: stopped by SIGSTOP or its like for 1 s" in result.stderr
    assert not is_stopped(int((tmp_path / "rank_1.pid").read_text()))


def test_the_stopped_rank_is_named_where_another_waited_for_it_in_vain(tmp_path):
    """Without restarts nobody looks for stopped ranks: the deadline of the one that waits ends the job."""
    job = script(tmp_path, "ready()\nif rank == '1': os.kill(os.getpid(), signal.SIGSTOP)\n" + WAITS)
    result = launch(tmp_path, "run", "--nproc-per-node", "2", "--log-dir", "logs", job)
    assert result.returncode == 1, result.stderr
    summary = result.stderr[result.stderr.index("moe-launch: rank 1 failed first: stopped by SIGSTOP or its like") :]
    assert "rank 0 waited for it: " in summary and "PeerTimeout: rank 0, phase dispatch" in summary


def test_a_rank_that_hangs_is_named_with_the_line_it_hangs_in(tmp_path):
    hangs = "def never_ends():\n    while True: time.sleep(0.01)\nready()\nif rank == '1': never_ends()\n"
    job = script(tmp_path, hangs + WAITS)
    result = launch(tmp_path, "run", "--nproc-per-node", "2", "--shutdown-timeout", "1", "--log-dir", "logs", job)
    assert result.returncode == 1, result.stderr
    summary = result.stderr[result.stderr.index("moe-launch: rank 1 failed first: it does not answer") :]
    assert "in never_ends" in summary and "rank 0 waited for it: " in summary and "PeerTimeout: rank 0" in summary


def test_a_rank_that_lost_a_peer_just_before_the_peers_end_was_seen_is_not_named(tmp_path):
    job = script(
        tmp_path,
        """
        class PeerLost(Exception): pass
        ready(); wait_for_others()
        if rank == "0": raise PeerLost("rank 0, phase combine: rank 1 closed its connection")
        time.sleep(0.5)
        sys.exit(9)
        """,
    )
    result = launch(tmp_path, "run", "--nproc-per-node", "2", "--log-dir", "logs", job)
    assert result.returncode == 9 and "rank 1 failed first: exit code 9" in result.stderr


def torchrun_of_one_node(folder, *words):
    engine = ("--engine", "torchrun", "--nnodes", "1", "--node-rank", "0", "--nproc-per-node", "2", "--silence", "1")
    return launch(folder, "run", *engine, "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--log-dir", "logs", *words)


def test_torchruns_agent_too_is_told_of_a_stopped_rank(tmp_path):
    stops = "ready()\nos.kill(os.getpid(), signal.SIGSTOP) if rank == '1' else time.sleep(100)\n"
    result = torchrun_of_one_node(tmp_path, "--max-restarts", "1", script(tmp_path, RESTARTED + stops))
    assert result.returncode == 0, result.stderr
    assert "rank 1 (node 0, 127.0.0.1) failed first: stopped by SIGSTOP or its like for 1 s" in result.stderr
    assert not is_stopped(int((tmp_path / "rank_1.pid").read_text()))


def test_torchruns_agent_names_the_rank_that_another_waited_for(tmp_path):
    hangs = "ready()\nif rank == '1': time.sleep(100)\n"
    result = torchrun_of_one_node(tmp_path, "--shutdown-timeout", "2", script(tmp_path, hangs + WAITS))
    assert result.returncode == 1, result.stderr
    assert "rank 1 failed first, by what rank 0 (node 0, 127.0.0.1) says: exit code 1" in result.stderr


def late_rank_0() -> None:
    if os.environ["RANK"] == "0":
        time.sleep(20)
    with moe_runtime.init({"timeout_s": 2, "transport": "shm"}):
        pass


def test_a_rank_0_that_never_opens_the_store_is_who_was_waited_for():
    with pytest.raises(RankFailed) as failed:
        run_ranks(late_rank_0, 2)
    assert blamed(str(failed.value).splitlines()) == (0,)

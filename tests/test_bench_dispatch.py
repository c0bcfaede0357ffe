"""`moe-launch bench dispatch`: the plain path is right, the report says what it must, failures end in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moe_runtime.comm.threads import ThreadWorld
from moe_runtime.core.errors import ConfigError, MoeRuntimeError
from moe_runtime.launch import cli
from moe_runtime.launch.bench import dispatch, dispatch_ranks, plain, world
from moe_runtime.launch.bench.dispatch import FLOOR, OURS, OURS_EXPAND, PLAIN, PLAIN_GLOO, PLAIN_MPI, SUBJECTS

SMALL = ["--hidden", "256", "--experts", "18", "--top-k", "4"]
MPIRUN, NO_MPIRUN = world.find_mpirun()
needs_mpirun = pytest.mark.skipif(MPIRUN is None, reason=NO_MPIRUN)


def settings(**changes) -> dispatch.Settings:
    arguments = dispatch.parse(["--tokens", "1", *SMALL])
    return dispatch.replace(dispatch.worlds_of(arguments, "")[0], **changes)


# ---------------------------------------------------------------- the plain path


def run_plain(tokens: list[int], experts_per_rank: list[int], hidden: int, wire: str | None, top_k: int, skew: bool):
    """[(result, what a dense layer gives, allowed error)] by rank; expert e multiplies rows by e + 1."""
    num_experts = sum(experts_per_rank)
    factors_E = torch.arange(1, num_experts + 1, dtype=torch.float32)

    def rank_body(transport):
        rank = transport.rank
        generator = torch.Generator().manual_seed(rank)
        x = torch.randn(tokens[rank], hidden, generator=generator)
        ids = torch.rand(tokens[rank], num_experts, generator=generator).topk(top_k).indices
        if skew:  # every token to the same experts, of which the last rank holds all
            ids = torch.arange(num_experts - top_k, num_experts).repeat(tokens[rank], 1)
        weights = torch.rand(tokens[rank], top_k, generator=generator)
        path = plain.PlainPath(
            lambda *sent: transport.all_to_all_v(*sent, "plain"), rank, experts_per_rank, hidden, x.dtype, wire
        )
        rows, handle = path.dispatch(x, ids)
        assert len(rows) == handle.rows_per_expert.sum()
        first = sum(experts_per_rank[:rank])
        mine = factors_E[first : first + experts_per_rank[rank]]
        y = path.combine(rows * mine.repeat_interleave(handle.rows_per_expert).unsqueeze(1), handle, weights)
        return y, x * (weights * factors_E[ids]).sum(1, keepdim=True)

    return ThreadWorld(len(tokens), 20).run(rank_body)


@pytest.mark.parametrize("wire", [None, "float8_e4m3fn"])
@pytest.mark.parametrize(
    "tokens, experts_per_rank, skew",
    [
        ([5], [8], False),
        ([40, 40], [4, 4], False),
        ([70, 1, 33], [3, 5, 1], False),
        ([0, 6, 2, 9], [2, 2, 2, 2], False),
        ([0, 0], [4, 4], False),
        ([9, 7, 8], [2, 2, 4], True),
    ],
)
def test_the_plain_path_is_a_dense_layer(tokens, experts_per_rank, skew, wire):
    tolerance = dict(rtol=2**-4, atol=1e-3) if wire else dict(rtol=1e-5, atol=1e-5)
    outcomes = run_plain(tokens, experts_per_rank, 136, wire, 3, skew)
    for y, dense in outcomes:
        torch.testing.assert_close(y, dense, **tolerance)


def test_weighted_sums_are_accumulated_in_float32():
    rows, weights = torch.randn(100 * 8, 24).bfloat16(), torch.rand(100, 8)
    exact = (rows.view(100, 8, 24).double() * weights.unsqueeze(2)).sum(1)
    torch.testing.assert_close(plain.weighted_sums(rows, weights).double(), exact, rtol=2**-8, atol=1e-6)


# ---------------------------------------------------------------- what is measured, and when


def test_subjects_take_turns_and_the_plain_paths_rest_in_between():
    cycles = dispatch.schedule(5, 2, list(SUBJECTS))
    assert cycles[0] == cycles[2] == cycles[4] == list(SUBJECTS)
    assert cycles[1] == cycles[3] == [name for name in SUBJECTS if name not in PLAIN]


def test_small_sizes_have_many_rounds_and_large_ones_enough():
    def rounds(tokens: int, **changes) -> tuple[int, int]:
        cycles = dispatch.schedule(*settings(**changes).cycles(tokens), list(SUBJECTS))
        return sum(OURS in names for names in cycles), sum(PLAIN_MPI in names for names in cycles)

    assert min(rounds(128)) >= 200
    assert rounds(4096) >= (10, 3)
    assert rounds(4096, rounds=2.0)[0] == 2 * rounds(4096)[0]
    assert min(rounds(4096, rounds=0.01)) == 1


def test_bytes_that_must_move():
    """Two ranks of 9 experts; a token with experts on both crosses twice, with four on one rank once."""
    ids = torch.tensor([[0, 1, 2, 3], [0, 1, 9, 17]])
    batch = dispatch_ranks.Batch(torch.zeros(2, 256), ids, torch.ones(2, 4))
    slot_rank = torch.arange(18).div(9, rounding_mode="floor").int().numpy()
    moved = dispatch_ranks.bytes_to_move(batch, slot_rank, settings(dtype="fp8"))
    fp8, bf16 = 256 + 2 * 4, 256 * 2
    assert moved[FLOOR] == moved[OURS] == (3 * fp8, 3 * bf16)
    assert moved[PLAIN_GLOO] == (8 * fp8, 8 * bf16)
    assert moved[OURS_EXPAND] == (3 * fp8, 8 * bf16)
    assert dispatch_ranks.bytes_to_move(batch, slot_rank, settings())[FLOOR] == (3 * bf16, 3 * bf16)


def test_a_round_takes_what_its_slowest_rank_takes_and_ratios_are_of_the_same_cycle():
    with_plain = settings(quick=True)  # the plain paths rest in every other cycle
    size = {"tokens": 1, "relative_error": {}, "bytes": dict.fromkeys(SUBJECTS, 7)}
    seconds = {name: [1.0, 1.0, 1.0] for name in SUBJECTS} | {name: [8.0, 2.0] for name in PLAIN}
    slower = seconds | {OURS: [4.0, 9.0, 2.0]}
    answers = [{"sizes": [{**size, "seconds": each}], "not_measured": {PLAIN_MPI: "why"}} for each in (seconds, slower)]
    rows = {row["subject"]: row for row in dispatch.make_rows(with_plain, answers)}
    assert (rows[OURS]["median_s"], rows[OURS]["p99_s"], rows[OURS]["min_s"]) == (4.0, 9.0, 2.0)
    assert rows[PLAIN_GLOO]["over_ours"] == (8 / 4 + 2 / 2) / 2
    assert rows[OURS]["over_floor"] == 4.0
    assert rows[FLOOR]["over_ours_expand"] == 1.0


def test_p99_is_a_round_that_was_seen():
    seen = dispatch.statistics_of([float(n) for n in range(200)])
    assert (seen["rounds"], seen["p99_s"], seen["min_s"]) == (200, 197.0, 0.0)


class Fake:
    """A subject whose result is the dense one, but for what `spoil` does to it."""

    def __init__(self, spoil) -> None:
        self.spoil = spoil

    def run(self, batch, factors_E=None):
        y = batch.x.float() * (batch.topk_weights * factors_E[batch.topk_ids]).sum(1, keepdim=True)
        return self.spoil(y).bfloat16()


def swap_two_rows(y):
    return y[[1, 0, *range(2, len(y))]]


def spoil_one_value(y):
    y[3, 5] *= 1.2
    return y


def make_one_nan(y):
    y[0, 0] = torch.nan
    return y


@pytest.mark.parametrize("dtype", dispatch.DTYPES)
@pytest.mark.parametrize("spoil", [swap_two_rows, spoil_one_value, make_one_nan, torch.zeros_like])
def test_the_check_sees_a_wrong_subject(spoil, dtype):
    wanted = settings(dtype=dtype)
    batch = dispatch_ranks.Batch.random(wanted, 8, 0)
    assert dispatch_ranks.check({"good": Fake(lambda y: y)}, batch, wanted)["good"] < 0.01
    with pytest.raises(MoeRuntimeError, match="bad does not compute"):
        dispatch_ranks.check({"good": Fake(lambda y: y), "bad": Fake(spoil)}, batch, wanted)


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def ran() -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moe_runtime.launch.cli", "bench", "dispatch", "--quick", "--json", "--profile"]
        + ["--dtype", "fp8", *SMALL],
        capture_output=True, text=True, timeout=150,
    )  # fmt: skip


def test_json_is_one_object_with_every_subject_at_every_size(ran):
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    (made,) = report["worlds"]
    assert (report["transport"], report["malloc"], report["hidden"]) == ("shm", "system", 256)
    assert {(row["tokens"], row["subject"]) for row in report["rows"]} == {(t, s) for t in (1, 128) for s in SUBJECTS}
    for row in report["rows"]:
        assert (row["ranks"], row["dtype"]) == (2, "fp8")
        if row["subject"] == PLAIN_MPI and MPIRUN is None:
            assert row["not_measured"] == NO_MPIRUN
            continue
        assert row["rounds"] == (4 if row["subject"] in PLAIN else 8)
        assert 0 < row["min_s"] <= row["median_s"] <= row["p99_s"]
        assert row["bytes_per_rank"] > 0 and row["over_ours"] > 0 and row["over_ours_expand"] > 0
        assert ("over_floor" in row) == (row["subject"] in (OURS, OURS_EXPAND))
        assert ("relative_error" in row) == (row["subject"] in (OURS, OURS_EXPAND, *PLAIN))
    assert made["order"] == [name for name in SUBJECTS if name != PLAIN_MPI or MPIRUN]
    assert made["started_by"] == ("mpirun" if MPIRUN else "moe-launch")
    assert any("shm" in line for line in made["describe"])
    assert made["memory"]["tokens"] == 128 and len(made["memory"]["ranks"]) == 2
    assert all(rank[OURS] >= 0 and "touched" in rank["transport"][0] for rank in made["memory"]["ranks"])
    assert "cycle" in ran.stderr


def test_the_profile_names_halves_and_functions(ran):
    profiles = json.loads(ran.stdout)["worlds"][0]["profile"]
    assert [(part["tokens"], part["subject"]) for part in profiles] == [
        (1, OURS), (1, OURS_EXPAND), (128, OURS), (128, OURS_EXPAND),
    ]  # fmt: skip
    for part in profiles:
        assert list(part["halves_s"]) == ["start dispatch", "finish dispatch", "start combine", "finish combine"]
        own = [entry["own_s"] for entry in part["functions"]]
        assert own == sorted(own, reverse=True) and own[0] > 0
        assert any("dispatch" in entry["function"] or "_C." in entry["function"] for entry in part["functions"])


def test_the_table_has_a_line_per_row_and_says_what_is_missing(ran):
    report = json.loads(ran.stdout)
    report["worlds"][0]["not_measured"] = {PLAIN_MPI: "no MPI here"}
    report["rows"] = [
        {**row, "not_measured": "no MPI here"} if row["subject"] == PLAIN_MPI else row for row in report["rows"]
    ]
    lines = dispatch.render(report).splitlines()
    assert sum(line.split()[1:2] == ["plain,"] for line in lines) == 2
    assert f"{PLAIN_MPI}: not measured: no MPI here" in lines
    assert max(map(len, lines)) < 180


BROKEN = """
from moe_runtime.launch.bench import dispatch_ranks, plain
right = plain.weighted_sums
plain.weighted_sums = lambda rows, weights: right(rows, weights.flip(1))
dispatch_ranks.main()
"""


def test_without_mpi_and_with_a_wrong_subject_the_bench_fails_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(world.tempfile, "tempdir", str(tmp_path))
    Path("broken_bench.py").write_text(BROKEN)
    monkeypatch.setattr(dispatch, "RANK_MODULE", "broken_bench")
    monkeypatch.setattr(world, "find_mpirun", lambda: (None, "there is none"))
    assert cli.main(["bench", "dispatch", "--quick", "--tokens", "3", "--dtype", "bf16", *SMALL]) == 1
    said = capsys.readouterr()
    assert said.out == "" and "ranks start without MPI: there is none" in said.err
    last = said.err.splitlines()[-1]
    assert last.startswith("moe-launch: error: bench dispatch: rank ")
    assert f"{PLAIN_GLOO} does not compute what the dense oracle does (3 tokens, bf16)" in last


def test_without_mpi_the_reason_is_in_the_answer():
    wanted = settings(no_mpi="there is none")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        made, missing = dispatch_ranks.plain_paths(wanted, 0, [18])
    finally:
        torch.distributed.destroy_process_group()
    assert list(made) == [PLAIN_GLOO] and missing == {PLAIN_MPI: "there is none"}


def test_no_mpirun_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(world.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    command, reason = world.find_mpirun()
    assert command is None and "no mpirun" in reason


@pytest.mark.parametrize(
    "words, told",
    [
        ("--ranks 1", "at least 2 ranks"),
        ("--ranks two", "invalid int value: 'two'"),
        ("--tokens 0", "--tokens must be at least 1"),
        ("--dtype fp4", "invalid choice: 'fp4'"),
        ("--top-k 9 --experts 8", "--top-k must be in 1..8"),
        ("--ranks 4 --experts 3 --top-k 1", "fewer than ranks"),
        ("--rounds 0", "--rounds must be"),
        ("--rounds nan", "--rounds must be"),
        ("--timeout-s 0", "--timeout-s must be"),
        ("--malloc mine", "invalid choice: 'mine'"),
        ("--transport pigeon", "invalid choice: 'pigeon'"),
        ("--no-mpi --transport mpi", "contradict"),
        ("--token 1", "unrecognized arguments"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(words, told, capsys):
    assert cli.main(["bench", "dispatch", *words.split()]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1 and told in said.err


# ---------------------------------------------------------------- ranks that fail

RANK = """
import os, signal, sys, time
from pathlib import Path
from moe_runtime.core.environment import read_world
from moe_runtime.core.errors import ConfigError
from moe_runtime.launch.bench.world import answer
folder, rank = Path(sys.argv[1]), read_world().rank
def work():
    if rank == 0:
        (folder / "progress").write_text("under way\\n")
    {body}
    return {{"rank": rank}}
answer(folder, rank, work)
"""
BODIES = {
    "well": "pass",
    "dies": "time.sleep(1)\n    os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(60)",
    "raises": "time.sleep(60 * rank)\n    raise RuntimeError('two\\nlines')",
    "refuses": "raise ConfigError('no such thing')",
    "is silent": "time.sleep(60)",
}


def run_body(folder: Path, monkeypatch, name: str, mpirun: list[str] | None, timeout_s: float = 20) -> list[dict]:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(world.tempfile, "tempdir", str(folder))
    Path("rank_body.py").write_text(RANK.format(body=BODIES[name]))
    told: list[str] = []  # nothing where a rank fails first
    try:
        return world.run_world("rank_body", folder, 2, timeout_s, mpirun, told.append)
    finally:
        assert told in ([], ["under way"])
        assert left_of(folder) == []


def left_of(folder: Path) -> list[int]:
    """Processes that know of the folder, a moment after."""
    mine, ends = os.getpid(), time.monotonic() + 5
    while True:
        left = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if str(folder).encode() in path.read_bytes() and int(path.parent.name) != mine:
                    left.append(int(path.parent.name))
            except OSError:  # it has ended
                continue
        if not left or time.monotonic() > ends:
            return left
        time.sleep(0.05)


STARTERS = [None, pytest.param(MPIRUN, marks=needs_mpirun)]


@pytest.mark.parametrize("mpirun", STARTERS, ids=["alone", "mpirun"])
def test_answers_come_back_by_rank(tmp_path, monkeypatch, mpirun):
    assert run_body(tmp_path, monkeypatch, "well", mpirun) == [{"rank": 0}, {"rank": 1}]


@pytest.mark.parametrize("mpirun", STARTERS, ids=["alone", "mpirun"])
def test_a_rank_that_dies_ends_the_others(tmp_path, monkeypatch, mpirun):
    with pytest.raises(world.RanksFailed, match="^rank 1 .*signal 9") as caught:
        run_body(tmp_path, monkeypatch, "dies", mpirun)
    assert "\n" not in str(caught.value)
    assert Path(str(caught.value).rpartition("log: ")[2].rstrip(")")).is_file()


def test_a_rank_that_raises_says_why_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(world.RanksFailed, match=r"^rank 0: RuntimeError: two lines \(log: "):
        run_body(tmp_path, monkeypatch, "raises", None)


def test_a_users_mistake_found_by_the_ranks_is_a_config_error(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no such thing"):
        run_body(tmp_path, monkeypatch, "refuses", None)


@pytest.mark.parametrize("mpirun", STARTERS, ids=["alone", "mpirun"])
def test_ranks_without_progress_are_ended_at_the_deadline(tmp_path, monkeypatch, mpirun):
    with pytest.raises(world.RanksFailed, match="no progress for 3 s, the last was: under way"):
        run_body(tmp_path, monkeypatch, "is silent", mpirun, timeout_s=3)


@pytest.mark.parametrize("mpirun", STARTERS, ids=["alone", "mpirun"])
def test_ranks_end_with_a_bench_that_is_killed(tmp_path, mpirun):
    (tmp_path / "rank_body.py").write_text(RANK.format(body=BODIES["is silent"]))
    code = (
        "from pathlib import Path; from moe_runtime.launch.bench import world; "
        f"world.run_world('rank_body', Path({str(tmp_path)!r}), 2, 60, {mpirun!r}, "
        "lambda line: print(line, flush=True))"
    )
    bench = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        assert bench.stdout.readline() == "under way\n"
    finally:
        bench.kill()
        bench.communicate()
    assert left_of(tmp_path) == []


def test_a_barrier_waits_for_all_and_not_for_ever(tmp_path):
    (tmp_path / "barrier").write_bytes(bytes(2 * 64))
    here, there = (dispatch_ranks.SpinBarrier(tmp_path / "barrier", rank, 2, 0.2) for rank in (0, 1))
    with pytest.raises(TimeoutError, match="rank 0 waited 0.2 s at a barrier for rank 1"):
        here.wait()
    there.wait()  # rank 0 has come already

"""`moe-launch check`: what it says of emulated vendors and the CPU, of faults, of ranks that die, and how it judges."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks

import moe_runtime
from moe_runtime.comm.detect import Detection
from moe_runtime.comm.emulation import build
from moe_runtime.comm.quirks import can_reduce, dtype_name, presized_variables
from moe_runtime.comm.vendors import UNKNOWN, VENDORS, fact
from moe_runtime.errors import ConfigError, VendorUnavailable
from moe_runtime.launch import cli
from moe_runtime.launch.conformance import claims, plan, report, suite
from moe_runtime.launch.conformance.collectives import reduced
from moe_runtime.launch.conformance.context import DTYPES, compare, open_context, sample
from moe_runtime.launch.conformance.probes import Probe, probes
from moe_runtime.launch.conformance.verdicts import (
    AS_CLAIMED,
    DIFFERS,
    ENDLESS,
    FAILED,
    GROUPS,
    MEASURED,
    NEW,
    PASSED,
    REFUSED,
    SKIPPED,
    WORKS,
    WRONG,
    Claim,
    Outcome,
    Row,
    Subject,
    exit_code,
    judge,
    make_row,
    merge,
    summary,
)

MOE_LAUNCH = [sys.executable, "-m", "moe_runtime.launch.cli"]
EMULATED = ("ascend", "biren", "enflame", "hygon")


@pytest.fixture(scope="module", autouse=True)
def library():
    """Built here, so that no test's deadline includes the compiler."""
    try:
        build.device_library()
    except VendorUnavailable as error:
        if "with a C++ compiler" in str(error):
            pytest.skip(str(error))
        raise


# ---------------------------------------------------------------- verdicts


def claim(*results: str, when: str = "") -> Claim:
    """A claim that agrees with these results; with none of them, one that says nothing."""
    return Claim(" or ".join(results) or UNKNOWN, frozenset(results) if results else None, "a source", "primary", when)


CHIP, NEEDED = Subject(), Subject(required=True)
EMULATION = Subject(emulated=True, chip=False)
CPU = Subject(chip=False)
HOST = Subject(emulated=True, chip=False, numerics=True)


@pytest.mark.parametrize(
    ("said", "result", "subject", "verdict"),
    [
        ([claim(WORKS)], WORKS, CHIP, AS_CLAIMED),
        ([claim(WORKS)], REFUSED, CHIP, DIFFERS),
        ([claim(WORKS)], "mixed", CHIP, DIFFERS),
        ([claim(REFUSED)], WORKS, CHIP, DIFFERS),
        ([claim(REFUSED, WRONG)], WRONG, CHIP, AS_CLAIMED),
        ([claim()], WORKS, CHIP, NEW),
        ([claim()], WORKS, EMULATION, "skipped: nothing is claimed, and an emulation is no evidence"),
        ([claim()], WORKS, CPU, "skipped: nothing is claimed, and nothing needs it"),
        ([claim(WORKS), claim()], REFUSED, CHIP, NEW),  # one reading says nothing: this may be its chip
        ([claim(WORKS), claim()], WORKS, CHIP, AS_CLAIMED),
        ([], WORKS, NEEDED, PASSED),
        ([], WRONG, NEEDED, FAILED),
        ([claim()], REFUSED, NEEDED, FAILED),
        ([claim(WORKS)], REFUSED, NEEDED, DIFFERS),
        ([claim(REFUSED)], WORKS, HOST, "skipped: an emulated device computes as its host does"),
        ([claim("npu")], "npu", CHIP, AS_CLAIMED),
        ([claim("npu")], "musa", CHIP, DIFFERS),
        ([], MEASURED, CHIP, MEASURED),
        ([claim(WORKS)], SKIPPED, CHIP, "skipped: because"),
        ([claim(WORKS)], "hung", CHIP, FAILED),
        ([claim(REFUSED)], "lost", EMULATION, FAILED),
    ],
)
def test_a_verdict_compares_what_was_claimed_with_what_was_seen(said, result, subject, verdict):
    assert judge(said, result, subject, "because")[0] == verdict


RESULTS = (WORKS, WRONG, REFUSED, "mixed", "hung", "lost", MEASURED, SKIPPED, "npu")
CLAIMS = st.lists(st.sets(st.sampled_from((WORKS, WRONG, REFUSED, "npu"))).map(lambda results: claim(*results)))
SUBJECTS = st.builds(Subject, st.booleans(), st.booleans(), st.booleans(), st.booleans())


@given(CLAIMS, st.sampled_from(RESULTS), SUBJECTS)
def test_no_verdict_says_more_than_was_claimed_and_seen(said, result, subject):
    verdict, _ = judge(said, result, subject, "because")
    agreeing = [one for one in said if one.results and result in one.results]
    assert (verdict == AS_CLAIMED) == bool(agreeing and result not in (*ENDLESS, MEASURED, SKIPPED))
    if verdict == DIFFERS:
        assert said and not agreeing and all(one.results for one in said)
    if verdict == NEW:
        assert subject.chip and not agreeing
    if result in ENDLESS:
        assert verdict == FAILED
    if verdict == PASSED:
        assert subject.required and result == WORKS
    assert exit_code([verdict]) == int(verdict in (FAILED, DIFFERS))


@given(st.lists(st.sampled_from(RESULTS), min_size=1))
def test_ranks_are_one_result_only_where_they_agree(results):
    merged = merge([Outcome(result) for result in results])
    if set(results) & ENDLESS:
        assert merged in ENDLESS
    else:
        ran = set(results) - {SKIPPED}
        assert merged == (SKIPPED if not ran else ran.pop() if len(ran) == 1 else "mixed")


def test_a_row_names_the_reading_that_matches_and_the_ranks_that_differ():
    said = [claim(REFUSED, when="old chip"), claim(WORKS, when="new chip")]
    row = make_row("device", "x", "ascend", said, {0: Outcome(WORKS), 1: Outcome(WORKS)}, CHIP)
    assert (row.verdict, row.seen) == (AS_CLAIMED, "works [matches the reading: new chip]")
    assert row.claimed == "refused (old chip); works (new chip)" and not row.emulated
    row = make_row("device", "x", "ascend", said, {0: Outcome(WORKS), 1: Outcome(REFUSED, "refused (no)")}, CHIP)
    assert (row.verdict, row.seen) == (DIFFERS, "rank 0: works; rank 1: refused (no)")
    assert [rank["result"] for rank in row.rank_details] == [WORKS, REFUSED]
    figures = {rank: Outcome(MEASURED, figures=((0.02 * (rank + 1), "GB/s"), (1500.0, "us"))) for rank in range(2)}
    row = make_row("measured", "x", "ascend (emulated)", [], figures, EMULATION)
    assert row.seen == "20 to 40 MB/s, 1,500 us (emulated: host memory of this machine)"


# ---------------------------------------------------------------- claims


@pytest.mark.parametrize("vendor", VENDORS.values(), ids=VENDORS)
def test_claims_come_from_the_table_with_their_source(vendor):
    for probe in probes(None, on_chips=True):
        for one in probe.claim(vendor) if probe.claim else ():
            assert one.said and one.source and one.confidence, probe.what
            assert one.results is None or one.results, probe.what
    for dtype in map(dtype_name, DTYPES):
        assert claims.moves(vendor, dtype) and claims.reduces(vendor, dtype)
        if not vendor.collective_dtypes.is_known:
            assert claims.moves(vendor, dtype)[0].results is None
        # What the transport reduces as it is, by the same table, nobody may claim to be refused.
        if vendor.reduce_dtypes.is_known and can_reduce(vendor, dtype):
            assert all(WORKS in one.results for one in claims.reduces(vendor, dtype))


def test_an_uneven_exchange_needs_its_buffer_sized_where_the_table_says_so():
    (sized,), (unsized,) = claims.uneven(VENDORS["enflame"], True), claims.uneven(VENDORS["enflame"], False)
    assert WORKS in sized.results and WORKS not in unsized.results
    assert claims.uneven(VENDORS["biren"], True)[0].results is None


# ---------------------------------------------------------------- data


@pytest.mark.parametrize("dtype", DTYPES, ids=map(dtype_name, DTYPES))
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_samples_tell_ranks_apart_and_their_sums_are_exact(dtype, ranks):
    parts = [sample(dtype, 240, 1 + rank, ranks) for rank in range(ranks)]
    assert all(compare([("", part, parts[0])]).result == WRONG for part in parts[1:])
    if dtype == torch.bool:
        assert torch.equal(reduced(parts, "sum"), torch.stack(parts).any(0))
    elif dtype.is_floating_point:
        assert torch.equal(reduced(parts, "sum").double(), torch.stack([part.double() for part in parts]).sum(0))
    else:
        whole = [sum(values) for values in zip(*(part.tolist() for part in parts), strict=True)]
        assert reduced(parts, "sum").tolist() == whole  # nothing wrapped


def test_a_difference_is_told_by_its_place_and_values():
    got = torch.tensor([1.0, 2.0, -0.0])
    assert compare([("x", got, got.clone())]).result == WORKS
    assert compare([("x", got, torch.tensor([1.0, 3.0, 0.0]))]).seen.endswith(
        "x: 2 of 3 elements, [1] is 2.0 and not 3.0"
    )
    assert "not (3,) float64" in compare([("x", got, got.double())]).seen


# ---------------------------------------------------------------- a run on two ranks


def run_suite(folder: Path, chosen=lambda probe: True, change=lambda runtime: None, todo=None, deadline_s=60.0) -> list:
    """What jobs/check.py does on a rank; the lines that rank 0 would write."""
    lines: list[dict] = []
    with moe_runtime.init({"cluster": str(folder / "cluster.toml"), "timeout_s": 60}) as runtime:
        change(runtime)
        context = open_context(runtime, deadline_s, loaded_with_torch=frozenset(sys.modules), vendor_named=True)
        lines.append({"header": suite.header(context)})
        todo = todo or [probe for probe in probes(None, context.all_on_chips) if chosen(probe)]
        if suite.run(context, todo, lines.append):
            lines.append({"end": True})
            context.control.barrier("test (end)")
        context.control.close()
    return json.loads(json.dumps(lines))


def checked(folder: Path, vendor: str, function=run_suite, ranks: int = 2) -> report.Report:
    """The report of `function`, which gives run_suite's lines, on ranks of a vendor."""
    planned = plan.plan_vendor(vendor, ranks)
    if vendor != "cpu" and not planned.emulated:
        pytest.skip(f"{vendor} is on this machine")
    (folder / "cluster.toml").write_text(planned.cluster)
    env = presized_variables(VENDORS[vendor].quirks, 4096, 4, 4096)
    lines = run_ranks(function, ranks, folder, env=env)[0]
    made = report.complete(planned.header(), lines, "exit code 3", planned.rows)
    return report.with_report_file(made, folder / "check.jsonl")


def text_of(made: report.Report) -> str:
    out = io.StringIO()
    report.show(made, out)
    return out.getvalue()


def verdicts(made: report.Report) -> dict[tuple[str, str], str]:
    return {(row.group, row.what): row.verdict for row in made.rows}


# What sets each vendor apart: (group, what) -> the beginning of its verdict.
MARKS = {
    "biren": {
        ("collectives", "all_to_all_single, odd sizes"): AS_CLAIMED,
        ("collectives", "all_to_all_single, uneven"): "skipped: nothing is claimed",
        ("device", "float64 stored"): "skipped: an emulated device",
        ("transport", "all_to_all_v, uneven and empty"): PASSED,
    },
    "enflame": {
        ("collectives", "all_to_all_single, uneven"): AS_CLAIMED,
        ("collectives", "all_to_all_single, strided"): AS_CLAIMED,
        ("device", "memory query"): AS_CLAIMED,
    },
    "hygon": {
        ("device", "device type"): "skipped: torch has such a device itself",
        ("collectives", "backend registered"): "skipped: torch has 'nccl' itself",
        ("collectives", "all_reduce of float32"): "skipped: nothing is claimed",
        ("dispatch", "bfloat16, expand=True"): PASSED,
    },
}


@pytest.mark.parametrize("vendor", MARKS)
def test_an_emulated_vendor_passes_and_every_row_says_emulated(tmp_path, vendor):
    made = checked(tmp_path, vendor)
    found = verdicts(made)
    assert made.exit_code == 0 and not made.ended
    assert not {FAILED, DIFFERS, NEW} & set(found.values())
    assert all(row.emulated for row in made.rows) and made.header["emulated"]
    assert {row.group for row in made.rows} == set(GROUPS) - {"cluster"}
    for mark, verdict in MARKS[vendor].items():
        assert found[mark].startswith(verdict), mark
    text = text_of(made)
    assert "EMULATED: no chip was here" in text and report.UNREPORTED in text and "paste" not in text
    assert text.count("(emulated)") >= len(made.rows)
    for row in made.rows:
        assert (MEASURED in row.verdict and row.group == "measured") <= ("emulated: host memory" in row.seen)


def test_the_cpu_is_as_the_table_says_and_nothing_is_emulated(tmp_path):
    made = checked(tmp_path, "cpu")
    assert made.exit_code == 0 and not any(row.emulated for row in made.rows)
    assert not {FAILED, DIFFERS, NEW} & {row.verdict for row in made.rows}
    assert verdicts(made)["collectives", "all_reduce of float8_e4m3fn"] == AS_CLAIMED
    text = text_of(made)
    assert report.UNREPORTED not in text and "emulated" not in text.lower() and "paste" not in text


def test_one_rank_skips_what_takes_two(tmp_path):
    made = checked(tmp_path, "ascend", ranks=1)
    found = verdicts(made)
    assert made.exit_code == 0
    assert found["collectives", "send, recv"] == "skipped: it takes two ranks of this vendor"
    assert found["collectives", "all_to_all_single of int8"] == AS_CLAIMED
    assert found["transport", "all_gather"].startswith(SKIPPED) and found["dispatch", "float32, expand=True"] == PASSED


# ---------------------------------------------------------------- faults


def with_false_claims(folder: Path) -> list:
    VENDORS["cpu"] = dataclasses.replace(
        VENDORS["cpu"], collective_dtypes=fact(frozenset({"float32", "int16"}), "a false source", when="an old gloo")
    )
    moved = [f"all_to_all_single of {name}" for name in ("float32", "int16", "float64")]
    return run_suite(folder, lambda probe: probe.what in moved)


def test_what_differs_from_a_claim_gives_exit_1_and_something_to_paste(tmp_path):
    made = checked(tmp_path, "cpu", with_false_claims)
    assert made.exit_code == 1
    assert [row.verdict for row in made.rows] == [AS_CLAIMED, DIFFERS, DIFFERS]
    block = text_of(made).partition("```")[2].rpartition("```")[0]
    for said in ("differs: collectives, all_to_all_single of int16 [cpu]", "a false source", "an old gloo",
                 "seen:    refused (", "torch ", "Python "):  # fmt: skip
        assert said in block
    assert "of float32" not in block


def on_a_chip(folder: Path) -> list:
    """The emulated device, taken for a real one."""

    def disguise(runtime) -> None:
        runtime.place = dataclasses.replace(runtime.place, kind="ascend")

    return run_suite(folder, lambda probe: probe.group in ("device", "transport"), disguise)


def test_a_real_chips_news_and_differences_are_for_an_issue(tmp_path):
    made = checked(tmp_path, "ascend", on_a_chip)
    made = dataclasses.replace(made, header=made.header | {"emulated": False})
    found = verdicts(made)
    assert found["device", "plug-in module"] == found["device", "plug-in loads with torch"] == DIFFERS
    assert found["device", "float64 stored"] == NEW and found["device", "memory query"] == AS_CLAIMED
    assert found["transport", "all_gather"] == PASSED
    assert made.exit_code == 1 and not any(row.emulated for row in made.rows)
    text = text_of(made)
    assert "differs: device, plug-in module [ascend]" in text and "new: device, float64 stored [ascend]" in text
    assert report.UNREPORTED in text and "(emulated)" not in text.partition("transport:")[2]


def raises_on_rank_1(context) -> Outcome:
    if context.runtime.rank == 1:
        raise RuntimeError("not on this rank\nand a long tail")
    return Outcome(WORKS)


def hangs_on_rank_1(context) -> Outcome:
    if context.runtime.rank == 1:
        time.sleep(600)
    return Outcome(WORKS)


def trouble(folder: Path) -> list:
    suite.GRACE_S = 0.1
    ran = [Probe("transport", "uneven luck", raises_on_rank_1, required=True)]
    ran += [Probe("transport", "hang", hangs_on_rank_1), Probe("transport", "later", hangs_on_rank_1)]
    return run_suite(folder, todo=ran, deadline_s=1.0)


def test_a_probe_that_hangs_fails_and_ends_the_run_with_what_was_learned(tmp_path):
    made = checked(tmp_path, "cpu", trouble)
    uneven, hang, later = made.rows
    assert (uneven.verdict, uneven.seen) == (FAILED, "rank 0: works; rank 1: refused (not on this rank)")
    assert hang.verdict == FAILED and "rank 1: did not end within 1.1 s" in hang.seen
    assert later.verdict == "skipped: the probe before it did not end"
    assert made.exit_code == 1 and "not every probe was run" in text_of(made)


def test_a_report_is_complete_wherever_the_ranks_ended(tmp_path):
    planned = plan.plan_vendor("cpu", 2)
    row = Row("device", "a", "cpu", "-", "", "", "works", PASSED, False).as_dict()
    lines = [{"plan": [["device", "a"], ["device", "b"], ["device", "c"]]}, {"begin": ["device", "a"]}, {"row": row},
             {"begin": ["device", "b"]}]  # fmt: skip
    path = tmp_path / "check.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"row": {"gro')
    assert report.read_lines(path) == lines
    made = report.complete(planned.header(), lines, "exit code 137 (SIGKILL)", ())
    assert [row.verdict for row in made.rows] == [PASSED, FAILED, "skipped: the probe before it did not end"]
    assert "SIGKILL" in made.rows[1].seen and made.exit_code == 1
    made = report.complete(planned.header(), [], "exit code 1", ())
    assert [row.verdict for row in made.rows] == [FAILED] and made.exit_code == 1
    made = report.complete(planned.header(), [*lines[:3], {"end": True}], "exit code 0", ())
    assert not made.ended


def test_a_device_that_torch_cannot_reach_is_a_failure_and_one_that_it_can_gets_no_more_ranks(monkeypatch):
    found = Detection("hygon", "hy-smi is on the search path", "cuda", ("hygon",), usable=False)
    planned = plan._on_device(found, named=False, ranks=None)
    assert planned.vendor == "cpu" and [row.verdict for row in planned.rows] == [FAILED]
    assert report.complete(planned.header(), [{"end": True}], "", planned.rows).exit_code == 1
    monkeypatch.setattr(torch, "npu", types.SimpleNamespace(device_count=lambda: 1), raising=False)
    found = Detection("ascend", "torch_npu was imported", "npu", ("ascend",))
    planned = plan._on_device(found, named=False, ranks=None)
    assert (planned.num_ranks, planned.emulated) == (1, False) and report.UNREPORTED in planned.notes
    assert 'vendor = "ascend"' in planned.cluster and "emulate" not in planned.cluster
    with pytest.raises(ConfigError, match="there are 1 npu devices here"):
        plan._on_device(found, named=False, ranks=2)


# ---------------------------------------------------------------- the command


def one_line_of_error(capsys, *words: str) -> str:
    assert cli.main(["check", *words]) == 2
    said = capsys.readouterr()
    (line,) = [line for line in said.err.splitlines() if line.startswith("moe-launch: error: ")]
    assert not said.out
    return line


def test_a_users_mistake_is_one_line_and_exit_2(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert all(name in one_line_of_error(capsys, "--vendor", "nonsense") for name in VENDORS)
    assert "give one of them" in one_line_of_error(capsys, "--vendor", "cpu", "--cluster", "c.toml")
    assert "no-such.toml" in one_line_of_error(capsys, "--cluster", "no-such.toml")
    assert "seconds above 0" in one_line_of_error(capsys, "--timeout-s", "0")
    assert not list(tmp_path.iterdir())


def test_a_dry_run_shows_the_ranks_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["check", "--vendor", "cpu", "--nproc-per-node", "3", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.count("launch.jobs.check") == 3 and "rank 2" in out
    assert not list(tmp_path.iterdir())


def check(folder: Path, *words: str) -> subprocess.CompletedProcess:
    command = [*MOE_LAUNCH, "check", "--log-dir", "logs", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=180)


def test_json_is_one_object_with_everything_the_text_says(tmp_path):
    ran = check(tmp_path, "--vendor", "ascend", "--json")
    assert ran.returncode == 0, ran.stderr
    (line,) = ran.stdout.splitlines()
    made = json.loads(line)
    if not made["header"]["emulated"]:
        pytest.skip("ascend is on this machine")
    assert all(row["emulated"] for row in made["rows"]) and made["exit_code"] == 0 and made["ended"] == ""
    assert not {FAILED, DIFFERS} & {row["verdict"] for row in made["rows"]}
    for row in made["rows"]:
        assert set(row) == {"group", "what", "vendor", "claimed", "confidence", "source", "seen", "verdict",
                            "emulated", "rank_details"}  # fmt: skip
        assert bool(row["source"]) == (row["claimed"] != "-")
    assert [rank["device"] for rank in made["header"]["ranks"]] == ["npu:0", "npu:0"]
    rows = tuple(Row(**row) for row in made["rows"])
    text = text_of(report.Report(made["header"], rows, made["ended"]))
    shown = [line.strip() for line in text.splitlines() if line.startswith("  ") and "(emulated)" in line]
    assert len(shown) == len(rows)
    for row, line in zip(rows, shown, strict=True):
        head, _, why = row.verdict.partition(":")
        assert line.startswith(row.what) and line.endswith(f"{head} (emulated)" + (f":{why}" if why else ""))
    assert made["summary"] == summary(row.verdict for row in rows) and made["summary"] in text
    assert "collectives" in ran.stderr  # progress


CLUSTER = """
[[node]]
name = "a"
emulate = "ascend"
[[node]]
name = "b"
emulate = "biren"
memory_gib = 32
[[node]]
name = "c"
vendor = "cpu"
"""


def test_a_cluster_of_two_emulated_vendors_and_a_cpu(tmp_path):
    (tmp_path / "cluster.toml").write_text(CLUSTER)
    ran = check(tmp_path, "--cluster", "cluster.toml")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = report.read_lines(tmp_path / "logs" / "check.jsonl")
    rows = [Row(**line["row"]) for line in lines if "row" in line]
    assert {row.vendor: row.emulated for row in rows} == {
        "ascend (emulated)": True, "biren (emulated)": True, "cpu": False,
        "ascend (emulated), biren (emulated), cpu": True,
    }  # fmt: skip
    assert not {FAILED, DIFFERS} & {row.verdict for row in rows}
    seen = {row.what: row.seen for row in rows if row.group == "cluster"}
    assert seen["ranks met"] == "3 ranks on 3 islands" and torch.__version__ in seen["versions"]
    assert seen["wire formats for 'fp8,int8,exact', float32 rows"].startswith("rows travel as int8: ranks 0-2")
    for said in ("EMULATED, but for ranks [2]", "islands: ascend (emulated) [0]; biren (emulated) [1]; cpu [2]",
                 "rank 2    ", "supa:0", f"biren: {report.UNREPORTED}", "all_reduce of int8 [cpu]"):  # fmt: skip
        assert said in ran.stdout


def test_a_rank_that_is_killed_in_a_probe_leaves_a_report(tmp_path):
    words = ["check", "--vendor", "cpu", "--log-dir", "logs"]
    with open(tmp_path / "out", "wb") as out, open(tmp_path / "err", "wb") as err:
        launcher = subprocess.Popen([*MOE_LAUNCH, *words], cwd=tmp_path, stdout=out, stderr=err)
    try:
        lines = tmp_path / "logs" / "check.jsonl"
        deadline = time.monotonic() + 120
        while not lines.exists() or '"begin": ["dispatch"' not in lines.read_text():
            assert time.monotonic() < deadline and launcher.poll() is None
            time.sleep(0.01)
        os.kill(rank_process(launcher.pid, 1), signal.SIGKILL)
        assert launcher.wait(60) == 1
    finally:
        launcher.kill()
        launcher.wait()
    out = (tmp_path / "out").read_text()
    assert "all_to_all_v, uneven and empty" in out and "passed" in out  # what was learned before
    assert "failed" in out and "skipped: the probe before it did not end" in out
    assert "not every probe was run" in out and "paste this into an issue" in out
    assert "rank 1" in (tmp_path / "err").read_text()


def rank_process(launcher: int, rank: int) -> int:
    """The process id of a rank, by what the launcher put into its environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = folder.joinpath("stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == launcher and f"\0RANK={rank}\0".encode() in folder.joinpath("environ").read_bytes():
                return int(folder.name)
        except OSError:
            continue
    raise AssertionError(f"no rank {rank} of launcher {launcher}")

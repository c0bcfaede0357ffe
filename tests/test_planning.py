"""`moe-launch plan` and `simulate`: transformers' own sizes, figures that follow from what is given, nothing silent."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, family_config, reference_model, write_checkpoint

from moe_runtime.core.cluster import Cluster, Link, Node
from moe_runtime.experts import placement, traces
from moe_runtime.experts.placement.nodes import replicas_taken
from moe_runtime.launch import cli
from moe_runtime.launch.planning import published
from moe_runtime.launch.planning.rates import Device, given_device, make_rates
from moe_runtime.launch.planning.shape import ModelShape, read_shape, shape_of
from moe_runtime.launch.planning.steps import Work, buffers, predict

ROOT = Path(__file__).resolve().parent.parent
V3, MIXED = str(ROOT / "configs/deepseek-v3/config.json"), str(ROOT / "configs/mixed-24.toml")
GIB = 2**30


def launch(capsys, *words: object) -> tuple[int, str, str]:
    code = cli.main([str(word) for word in words])
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture(scope="module")
def loads(tmp_path_factory) -> Path:
    """Two workloads of V3's shape in one step each, and one that drifts over six steps."""
    folder = tmp_path_factory.mktemp("loads")
    base, random = traces.synthetic_load(), np.random.default_rng(1)
    other = base * random.lognormal(0, 0.4, base.shape)
    steps = np.stack([base[:6] * random.lognormal(0, 0.1 * step, (6, 256)) for step in range(6)])
    for name, load in (("one", base[None]), ("two", other[None]), ("drift", steps)):
        traces.save(traces.LoadTrace(np.rint(load)), folder / f"{name}.npz")
    return folder


# ---------------------------------------------------------------- sizes


def test_deepseek_v3_has_its_published_size():
    shape = read_shape(V3)
    assert (shape.num_layers, shape.num_experts, shape.top_k, shape.hidden) == (58, 256, 8, 7168)
    assert shape.layers == tuple(range(3, 61)) and shape.stored == "fp8"
    assert round((shape.dense_weights + 58 * 256 * shape.expert_weights) / 1e9) == 671
    assert shape.expert_bytes == pytest.approx(3 * 7168 * 2048 * (1 + 4 / 128**2))


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_of_transformers_model(family, tmp_path):
    write_checkpoint(tmp_path, family)
    shape = read_shape(tmp_path, "float32")
    everything = sum(p.numel() for p in reference_model(family).parameters())
    assert shape.num_experts == 16
    assert shape.dense_weights + shape.num_layers * 16 * shape.expert_weights == everything


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "deepseek_v4"])
def test_the_kv_cache_has_the_size_of_transformers_own(family):
    tokens = 40  # more than gpt_oss's sliding window
    with torch.no_grad():
        out = reference_model(family)(input_ids=torch.ones(1, tokens, dtype=torch.long), use_cache=True)
    cache = out.past_key_values if "past_key_values" in out else out.cache
    held = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values", "indexer_keys")]
    wanted = sum(tensor.numel() * tensor.element_size() for tensor in held if tensor is not None)
    assert shape_of(family_config(family), family, "float32").cache_bytes(tokens) == wanted


def test_a_cache_of_its_own_kind_is_not_guessed_at():
    assert shape_of(family_config("deepseek_v4"), "v4", "float32").cache_bytes(40) is None


# ---------------------------------------------------------------- plan


def test_plan_says_who_holds_what_and_what_limits_it(capsys, loads, tmp_path):
    code, out, _ = launch(
        capsys, "plan", "--model", V3, "--cluster", MIXED, "--load", loads / "one.npz", "--out", tmp_path / "plan.json",
        "--tflops", 400, "--memory-gb-s", 1500, "--json",
    )  # fmt: skip
    report = json.loads(out)
    ranks = report["ranks"]
    assert code == 0 and report["slots"] == 288 and sum(row["slots"] for row in ranks) == 288
    for row, memory in zip(ranks, [96] * 8 + [64] * 8 + [48] * 8, strict=True):
        held = row["dense_bytes"] + row["expert_bytes"]
        assert row["left_bytes"] == pytest.approx(memory * GIB - held) and row["left_bytes"] >= 0
    assert sum(row["share_of_rows"] for row in ranks) == pytest.approx(1)
    assert report["bound"] <= report["step"] <= 1.03 * report["bound"] < report["even_step"]
    assert sum(report["limits"].values()) == 58
    plan = placement.load_plan(tmp_path / "plan.json")
    assert plan.times().max(axis=1).sum() == pytest.approx(report["step"])


def test_plan_for_people_names_its_assumptions(capsys):
    code, out, _ = launch(capsys, "plan", "--model", V3, "--cluster", MIXED)
    assert code == 0
    for said in (
        "no load given: all experts alike", "nothing measured: times are in rows of a device of speed 1", "predicted:",
        "no placement can be below", "what limits it:", "16-23 slow", "links are left out",
    ):  # fmt: skip
        assert said in out


def test_a_faster_device_takes_less_time_and_reading_experts_takes_some(capsys):
    def step(*words: object) -> float:
        return json.loads(launch(capsys, "plan", "--model", V3, "--cluster", MIXED, *words, "--json")[1])["step"]

    slow, fast = step("--tflops", 100, "--tokens", 64), step("--tflops", 1000, "--tokens", 64)
    assert fast < slow < step("--tflops", 100, "--memory-gb-s", 100, "--tokens", 64)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model", "no/such", "--cluster", MIXED], "no/such: cannot read the model's config"),
        (["--model", V3, "--cluster", "no/such.toml"], "no/such.toml: cannot read the cluster file"),
        (["--model", V3, "--cluster", MIXED, "--load", "no/such.npz"], "no/such.npz: cannot read the trace"),
        (["--model", V3, "--cluster", MIXED, "--reserve-gib", "14"], "GiB short; add ranks or memory, or reserve less"),
        (
            ["--model", V3, "--cluster", MIXED, "--dtype", "bfloat16"],
            "hold the experts in 8 bits (--dtype fp8 ",
        ),
        (["--model", V3, "--cluster", MIXED, "--reserve-gib", "20"], "rank 16 (node slow) has 48 GiB; the dense part"),
        (["--model", V3, "--cluster", MIXED, "--slots", "2000"], "2000 slots, but the ranks hold at most"),
        (["--model", V3, "--cluster", MIXED, "--memory-gb-s", "5"], "--memory-gb-s without --tflops"),
        (["--model", V3, "--cluster", MIXED, "--plot", "plan.txt"], "must end in .png, .pdf or .svg"),
        (["--model", V3, "--cluster", MIXED, "--tokens", "0"], "--tokens must be at least 1"),
        (["--model", V3], "--cluster"),
    ],
)
def test_what_cannot_be_planned_is_one_line(capsys, words, told):
    code, out, err = launch(capsys, "plan", *words)
    assert code == 2 and not out and told in err and err.count("\n") == 1


def test_a_load_of_another_model_is_refused(capsys, loads):
    code, _, err = launch(capsys, "plan", "--model", V3, "--cluster", MIXED, "--load", loads / "drift.npz")
    assert code == 2 and "a load of 6 layers and 256 experts" in err


def test_plots_are_written_whole_or_refused_in_a_line(capsys, loads, tmp_path, monkeypatch):
    words = ["plan", "--model", V3, "--cluster", MIXED, "--load", loads / "one.npz", "--plot", tmp_path / "plan.png"]
    assert launch(capsys, *words)[0] == 0
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"
    words = ["simulate", "--trace", loads / "drift.npz", "--ranks", 8, "--plot", tmp_path / "simulate.svg"]
    assert launch(capsys, *words)[0] == 0
    assert b"<svg" in (tmp_path / "simulate.svg").read_bytes()[:1000]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = launch(capsys, *words)
    assert code == 2 and "pip install 'moe-runtime[plot]'" in err


# ---------------------------------------------------------------- dry runs


def test_a_dry_run_says_what_each_rank_would_hold(capsys):
    folder = Path(V3).parent
    words = ["generate", "--model", folder, "--cluster", MIXED, "--prompt", "x", "--keep-fp8", "--dry-run"]
    code, out, _ = launch(capsys, *words)
    assert code == 0 and out.startswith("predicted, all experts alike")
    assert out.count("slots for 256 experts in each of 58 layers") == 24
    assert "18 slots for 256 experts in each of 58 layers: 42.8 GiB (fp8) beside a dense part of 31.9 GiB" in out
    assert "KV cache 102.9 MiB; 20.7 GiB left" in out  # 61 layers, 576 values a token, 8 x (128 + 64) tokens
    words.remove("--keep-fp8")
    assert (
        "what ranks would hold is not known: 256 experts of 4.76 GiB (all layers) do not fit"
        in launch(capsys, *words)[1]
    )
    code, out, _ = launch(capsys, "train", ROOT / "configs/demo.toml", "--dry-run")
    assert code == 0 and "10 slots for 16 experts" in out and "6 slots for 16 experts" in out
    assert "measured here now (2 ranks on " in out and out.count("AdamW state") == 2
    assert out.count("optimizer step of 2,048 tokens in all: ") == 3 and "is the slowest, bound by " in out


def test_a_dry_run_takes_rates_from_the_cluster_file_and_says_where_it_has_none(capsys, tmp_path):
    (tmp_path / "cluster.toml").write_text(
        """
        [[node]]
        name = "big-1"
        host = "big-1.invalid"
        vendor = "ascend"
        memory_gib = 400
        tflops = 200
        memory_gb_s = 1000
        [[node]]
        name = "big-2"
        host = "big-2.invalid"
        vendor = "hygon"
        memory_gib = 336.6
        """
    )
    words = ["generate", "--engine", "ssh", "--cluster", tmp_path / "cluster.toml", "--prompt", "x", "--dry-run"]
    code, out, err = launch(capsys, *words, "--model", ROOT / "configs/deepseek-v3", "--keep-fp8", "--batch-size", "2")
    assert code == 0, err
    assert "rates of big-1: given in the cluster file: 200 TFLOP/s, 1000 GB/s" in out
    assert "no seconds for big-2: not a CPU of this host; give tflops and memory_gb_s" in out
    assert "exchange not counted between big-1 and big-2: give a [[link]]" in out
    assert out.count("  decode step of 2 tokens a rank: ") == 1 and "without exchange between big-1 and big-2" in out
    # The weights alone fit on big-2; with the buffers they do not.
    left = [line for line in out.splitlines() if line.startswith("  buffers: ")]
    assert left[0].endswith(" GiB left") and "DOES NOT FIT, " in left[1] and left[1].endswith(" MiB short")


@pytest.mark.parametrize("word", ["0", "many"])
def test_a_dry_run_with_a_bad_number_says_so(capsys, word):
    words = ["generate", "--model", Path(V3).parent, "--cluster", MIXED, "--prompt", "x", "--dry-run"]
    code, _, told = launch(capsys, *words, "--batch-size", word)
    assert code == 2 and f"argument --batch-size: '{word}' is not a whole number of at least 1" in told


# ---------------------------------------------------------------- steps

SMALL = ModelShape("made up", 4, 16, 4, 512, 300_000, 2_000_000, "bfloat16", 2, cache=((100, None),))
DECODE, PREFILL = Work("decode", 8, 8), Work("prefill", 1024, 8)
TRAIN = Work("train", 1024, 1024, trains=True)


def small_steps(work: Work, *devices: Device, gbit_s: float | None = None, shape: ModelShape = SMALL, **node):
    nodes = tuple(Node(f"n{n}", host=f"h{n}", **node) for n in range(len(devices)))
    links = (Link(("n0", "n1"), gbit_s, 1.0),) if gbit_s else ()
    placed = placement.proportional(4, 16, [1.0] * len(devices))
    return predict(shape, Cluster(nodes, links), placed, devices, work)


def test_twice_the_bandwidth_halves_a_step_that_reads_weights_and_no_other():
    (slow,), (fast,) = (small_steps(DECODE, given_device(1, gb_s)) for gb_s in (1, 2))
    assert slow.bound.cause == "reading weights" and fast.seconds == pytest.approx(slow.seconds / 2, rel=0.02)
    (slow,), (fast,) = (small_steps(PREFILL, given_device(1, gb_s)) for gb_s in (1e5, 2e5))
    assert slow.bound.cause == "matmul" and fast.seconds == pytest.approx(slow.seconds, rel=0.02)


def test_a_step_is_the_sum_of_what_is_read_and_multiplied():
    (step,) = small_steps(PREFILL, given_device(2, 4))
    read = (2_000_000 + 4 * 16 * 300_000) * 2 / 4e9  # with so many tokens every expert is active
    products = 2 * 1024 * (2_000_000 + 4 * 4 * 300_000) / 2e12
    assert step.seconds == pytest.approx(read + products) and set(step.parts) == {"dense", "experts", "exchange"}
    assert step.parts["exchange"] == 0


def test_a_slow_link_becomes_the_bound_and_is_named():
    device = given_device(1, 100)
    fast, slow = (small_steps(PREFILL, device, device, gbit_s=gbit_s) for gbit_s in (1e5, 1))
    assert fast[0].bound.part == "experts" and slow[0].bound.cause == "link n0-n1 at 1 Gbit/s"
    # A token has one of its 4 experts on the other node with 15/16; out and home, 1 KiB each, in all 4 layers.
    wanted = 4 * 1024 * 15 / 16 * 2 * 1024 / (1e9 / 8) + 2 * 4 * 1e-6
    assert slow[0].parts["exchange"] == pytest.approx(wanted)
    without = small_steps(PREFILL, device, device)[0]
    assert without.parts["exchange"] == 0 and without.unknown == (("n0", "n1"),)


def test_a_rank_without_rates_has_no_seconds_and_emulated_slowness_counts():
    device = given_device(1, 1)
    known, unknown = small_steps(DECODE, device, None)
    assert known is not None and unknown is None
    (slowed,) = small_steps(DECODE, device, emulate_speed=0.5)
    (full,) = small_steps(DECODE, device)
    assert slowed.parts["experts"] == pytest.approx(2 * full.parts["experts"])
    assert slowed.parts["dense"] == full.parts["dense"]


def test_training_multiplies_three_times_and_holds_gradients_and_optimizer_state():
    device, many = given_device(1, 1e6), placement.proportional(4, 16, [1.0])
    (forward,), (whole,) = small_steps(PREFILL, device), small_steps(TRAIN, device)
    assert whole.parts["experts"] == pytest.approx(3 * forward.parts["experts"])
    assert whole.parts["optimizer"] > 0
    (extra,) = buffers(SMALL, Cluster((Node("a"),)), many, TRAIN)
    weights = 2_000_000 + 4 * 16 * 300_000  # held in bfloat16: float32 gradients, two moments and a master
    assert extra["gradients"] == 4 * weights and extra["AdamW state"] == 12 * weights
    (rows,) = (b["dispatch rows"] for b in buffers(SMALL, Cluster((Node("a"),)), many, PREFILL))
    assert extra["dispatch rows"] == pytest.approx(4 * rows)  # the backward pass needs those of every layer


def test_a_cached_latent_is_expanded_in_every_decode_step():
    shape = dataclasses.replace(SMALL, expand_weights=50_000)
    (step,) = small_steps(Work("decode", 8, 8, cached=1000), given_device(1, 1e6), shape=shape)
    assert step.parts["attention"] == pytest.approx(2 * 1000 * 50_000 / 1e12)
    assert step.bound.cause == "expanding the KV cache"


# ---------------------------------------------------------------- rates


def calibration(tmp_path: Path, per_row: float, per_expert: float) -> Path:
    """What `bench experts --layer --json` would write on a machine of these rates."""
    found = {"machine": "made up", "ranks": 2, "shape": {"hidden": 512, "intermediate": 256, "top_k": 8}, "tokens": {}}
    for tokens, hit in ((1, 4), (32, 60), (1024, 128)):
        seconds = tokens * 8 / 2 * per_row + hit * per_expert
        found["tokens"][str(tokens)] = {"hit": [hit, hit], "seconds": seconds}
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(found))
    return path


def options_of(*words: object):
    return cli._parser().parse_args(["plan", "--model", V3, "--cluster", MIXED, *map(str, words)])


def test_calibration_finds_the_rates_that_made_the_figures(tmp_path):
    path, shape = calibration(tmp_path, 1e-5, 2e-4), read_shape(V3)
    rated = make_rates(options_of("--calibration", path), shape)
    scale = 7168 * 2048 / (512 * 256)
    assert rated.seconds_per_row == pytest.approx(1e-5 * scale) and "made up" in rated.source
    assert rated.seconds_per_expert == pytest.approx(2e-4 * scale)


@pytest.mark.parametrize(
    ("text", "told"), [("no json", "not what"), ('{"shape": {}, "tokens": {}, "ranks": 2}', "two or more are needed")]
)
def test_a_calibration_that_is_none_is_refused(capsys, tmp_path, text, told):
    (tmp_path / "bench.json").write_text(text)
    words = ["plan", "--model", V3, "--cluster", MIXED, "--calibration", tmp_path / "bench.json"]
    code, _, err = launch(capsys, *words)
    assert code == 2 and told in err
    code, _, err = launch(capsys, *words, "--tflops", 3)
    assert code == 2 and "say the same thing" in err


def test_deepseek_v3_on_seven_vendors_fits_and_a_dry_run_shows_every_rank(capsys):
    words = ["generate", "--engine", "ssh", "--cluster", ROOT / "configs/seven-vendors.toml", "--prompt", "Hello"]
    code, out, err = launch(capsys, *words, "--model", ROOT / "configs/deepseek-v3", "--keep-fp8", "--dry-run")
    assert code == 0, err
    lines = out.splitlines()
    ranks = [line for line in lines if line.startswith("rank ")]
    assert len(ranks) == 64 and len({line.split("island ")[1] for line in ranks}) == 7
    assert sum("4 slots for 256 experts in each of 58 layers: 9.5 GiB (fp8)" in line for line in lines) == 64
    assert sum(line.startswith("ssh ") for line in lines) == 7


# ---------------------------------------------------------------- simulate


def rows_of(capsys, *words: object) -> list[dict]:
    code, out, err = launch(capsys, "simulate", *words, "--json")
    assert code == 0, err
    return json.loads(out)["rows"]


def test_fresh_and_shifted_are_what_plans_say_of_themselves(capsys, loads):
    rows = rows_of(
        capsys, "--trace", loads / "one.npz", loads / "two.npz", "--ranks", 32, "--slots", 288, "--policy", "even",
        "eplb", "fast", "robust", "--dispatch", "static", "split",
    )  # fmt: skip
    one, two = (traces.read_load(loads / f"{name}.npz").total for name in ("one", "two"))
    plan = placement.plan(one, 32, 288)
    found = {(r["policy"], r["dispatch"], r["fitted_on"], r["judged_on"]): r["balancedness"] for r in rows}
    assert found["fast", "static", "one.npz", "one.npz"] == pytest.approx(plan.balancedness())
    assert found["fast", "split", "one.npz", "two.npz"] == pytest.approx(plan.balancedness(two, "split"))
    assert found["even", "static", "-", "one.npz"] < found["eplb", "equal", "one.npz", "one.npz"] < 1
    robust = placement.plan(np.stack([two / two.sum(axis=1, keepdims=True)]), 32, 288, policy="robust")
    assert found["robust", "static", "all others", "one.npz"] == pytest.approx(robust.balancedness(one))
    assert all(0 < row["of_bound"] <= 1 + 1e-9 for row in rows)
    assert all(0 < row["crossings"] < 3 for row in rows)  # 4 nodes


def test_following_a_drift_step_by_step_moves_less(capsys, loads):
    rows = rows_of(
        capsys, "--trace", loads / "drift.npz", "--ranks", 8, "--slots", 288, "--policy", "fast", "warm", "--gbit-s",
        100, "--expert-mib", 42,
    )  # fmt: skip
    fast, warm = (next(r for r in rows if (r["policy"], r["question"]) == (p, "next window")) for p in ("fast", "warm"))
    assert warm["moved"] < fast["moved"] / 4 and warm["balancedness"] > fast["balancedness"] - 0.02
    assert fast["moved_bytes"] == pytest.approx(fast["moved"] * 42 * 2**20)
    assert fast["stall_s"] >= fast["moved_bytes"] / 8 / (100e9 / 8)  # the busiest of 8 ranks gets at least the mean
    assert fast["crossings"] is None  # one node


def test_crossings_are_counted_where_routing_is_known(capsys, tmp_path):
    load = traces.synthetic_load(2, 64, 4096, seed=3)
    ids = traces.synthetic_routing(load, 3000)
    traces.save(traces.RoutingTrace(ids, 64), tmp_path / "routing.npz")
    traces.save(traces.LoadTrace(np.stack([traces.RoutingTrace(ids, 64).load])), tmp_path / "load.npz")
    words = ["--trace", tmp_path / "load.npz", "--ranks", 8, "--node-size", 2, "--policy", "fast", "nodes"]
    rows = {row["policy"]: row for row in rows_of(capsys, *words, "--routing", tmp_path / "routing.npz")}
    plan = placement.plan(traces.RoutingTrace(ids, 64).load, [placement.Rank(node=r // 2) for r in range(8)], 72)
    node = plan.ranks.node[plan.slot_rank]
    visited = []
    for layer in range(2):
        slots = replicas_taken(ids[:, layer], plan.slot_expert[layer], plan.slot_share[layer])
        visited += [0.75 * len(set(node[row])) for row in slots]  # a token begins on one of the 4 nodes
    assert rows["fast"]["crossings"] == pytest.approx(np.mean(visited))
    assert rows["nodes"]["crossings"] < rows["fast"]["crossings"]
    code, _, err = launch(capsys, "simulate", *words)
    assert code == 2 and "policy nodes needs --routing" in err


def test_thousands_of_ranks(capsys, loads):
    (row,) = rows_of(capsys, "--trace", loads / "one.npz", "--ranks", 2048, "--policy", "fast")
    assert row["ranks"] == row["slots"] == 2048 and row["of_bound"] > 0.97


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "give --cluster FILE, or --ranks N"),
        (["--ranks", "8", "--cluster", MIXED], "give --cluster FILE, or --ranks N"),
        (["--ranks", "8", "--gbit-s", "0"], "--gbit-s must be above 0"),
        (["--ranks", "8", "--slots", "100"], "100 slots for 256 experts"),
        (["--ranks", "8", "--policy", "best"], "--policy"),
    ],
)
def test_what_cannot_be_simulated_is_one_line(capsys, loads, words, told):
    code, out, err = launch(capsys, "simulate", "--trace", loads / "one.npz", *words)
    assert code == 2 and not out and told in err.splitlines()[-1]


def test_simulate_for_people(capsys, loads):
    code, out, _ = launch(capsys, "simulate", "--trace", loads / "drift.npz", "--cluster", MIXED, "--policy", "fast")
    assert code == 0 and out.startswith("predicted; an expert is 42.0 MiB") and "next window" in out


# ---------------------------------------------------------------- beside published figures


def test_the_documents_tables_are_what_the_program_prints():
    text = (ROOT / "docs" / "planning.md").read_text()
    assert published.tables() in text


def test_no_published_figure_is_above_a_prediction_that_leaves_things_out():
    for ranks, measured in published.DEEPEP_DISPATCH.items():
        assert 0.5 < published.low_latency_us(ranks, published.FP8_ROW) / measured < 1
    for serving in published.SERVING:
        assert 0.4 < serving.published / published.tokens_per_second(serving)[0] < 1

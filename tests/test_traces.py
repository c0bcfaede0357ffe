"""Traces and plans on disk: what is written is read back, what is damaged is refused in one line."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from moe_runtime.errors import ConfigError
from moe_runtime.experts import placement, traces
from moe_runtime.experts.traces import LoadTrace, RoutingTrace

SHAPES = arrays.array_shapes(min_dims=3, max_dims=3, max_side=5)


@settings(deadline=None, max_examples=30)
@given(load=SHAPES.flatmap(lambda shape: arrays.arrays(np.int64, shape, elements=st.integers(0, 2**40))))
def test_a_load_trace_comes_back_as_it_was(tmp_path_factory, load):
    path = tmp_path_factory.mktemp("trace") / "load.npz"
    trace = LoadTrace(load, tuple(range(3, 3 + load.shape[1])), {"model": "DeepSeek-V3", "step": 7})
    traces.save(trace, path)
    again = traces.read_load(path)
    assert np.array_equal(again.load, load) and again.load.dtype == load.dtype
    assert (again.layers, again.metadata) == (trace.layers, trace.metadata)
    assert np.array_equal(again.total, load.sum(axis=0))


@settings(deadline=None, max_examples=30)
@given(ids=SHAPES.flatmap(lambda shape: arrays.arrays(np.int32, shape, elements=st.integers(-1, 7))))
def test_a_routing_trace_comes_back_as_it_was_and_counts_its_load(tmp_path_factory, ids):
    path = tmp_path_factory.mktemp("trace") / "routing.npz"
    traces.save(RoutingTrace(ids, 8), path)
    again = traces.read_routing(path)
    assert np.array_equal(again.topk_ids, ids) and again.num_experts == 8
    for layer in range(ids.shape[1]):
        wanted = [(ids[:, layer] == expert).sum() for expert in range(8)]
        assert again.load[layer].tolist() == wanted


def test_sglangs_json_is_read_without_its_dense_layers(tmp_path):
    count = np.zeros((5, 4))
    count[2:] = np.arange(12).reshape(3, 4) + 1
    (tmp_path / "one.json").write_text(json.dumps({"logical_count": count.tolist()}))
    trace = traces.read_load(tmp_path / "one.json")
    assert trace.layers == (2, 3, 4) and np.array_equal(trace.load, count[None, 2:])
    (tmp_path / "steps.json").write_text(json.dumps({"rank": 0, "logical_count": [count.tolist(), count.tolist()]}))
    assert np.array_equal(traces.read_load(tmp_path / "steps.json").total, 2 * count[2:])


def test_an_npz_of_others_may_give_counts(tmp_path):
    np.savez(tmp_path / "counts.npz", counts=np.ones((3, 2, 4), np.int32), tokens=np.ones(3), prompt=np.arange(3))
    assert traces.read_load(tmp_path / "counts.npz").load.shape == (3, 2, 4)


def test_megatrons_lines_become_one_routing_by_step_and_rank(tmp_path):
    def line(step, layer, rank, ids):
        row = {"step": step, "stage": 0, "block": "decoder", "layer": layer, "rank": rank}
        return json.dumps(row | {"num_tokens": len(ids), "topk": 2, "top_indices": ids})

    (tmp_path / "1.jsonl").write_text("\n".join([line(0, 4, 1, [[5, 6]]), line(0, 3, 1, [[1, 2]])]) + "\n\n")
    (tmp_path / "0.jsonl").write_text("\n".join([line(0, 3, 0, [[0, 1], [2, 3]]), line(0, 4, 0, [[7, 6], [5, 4]])]))
    trace = traces.read_megatron_routing([tmp_path / "1.jsonl", tmp_path / "0.jsonl"], 8)
    assert trace.layers == (3, 4)
    assert trace.topk_ids.tolist() == [[[0, 1], [7, 6]], [[2, 3], [5, 4]], [[1, 2], [5, 6]]]
    (tmp_path / "0.jsonl").write_text(line(0, 3, 0, [[0, 1]]))
    with pytest.raises(ConfigError, match="step 0, rank 0 lacks layer 4"):
        traces.read_megatron_routing([tmp_path / "1.jsonl", tmp_path / "0.jsonl"], 8)
    (tmp_path / "0.jsonl").write_text('{"step": 0}')
    with pytest.raises(ConfigError, match="0.jsonl: line 1 is no Megatron routing record"):
        traces.read_megatron_routing([tmp_path / "0.jsonl"], 8)


def damaged(folder):
    """name -> (file, how it is read, what the error says)."""
    whole = folder / "whole.npz"
    traces.save(LoadTrace(np.ones((1, 2, 3))), whole)
    cases = {
        "missing": (None, "cannot read"),
        "empty": (b"", "no trace that can be read safely"),
        "noise": (b"noise" * 99, "no trace that can be read safely"),
        "half": (whole.read_bytes()[: whole.stat().st_size // 2], "no trace that can be read safely"),
    }
    for name, (content, message) in cases.items():
        if content is not None:
            (folder / f"{name}.npz").write_bytes(content)
        yield folder / f"{name}.npz", traces.read_load, message
    np.savez(folder / "pickled.npz", load=np.array([{"a": 1}], dtype=object))
    yield folder / "pickled.npz", traces.read_load, "read safely"
    np.savez(folder / "other.npz", weights=np.ones(3))
    yield folder / "other.npz", traces.read_load, "it has weights; expected load"
    yield folder / "other.npz", traces.read_routing, "it has weights; expected topk_ids"
    yield whole, traces.read_routing, "a load trace where a routing trace is wanted"
    np.savez(folder / "negative.npz", load=-np.ones((1, 2, 3)))
    yield folder / "negative.npz", traces.read_load, "negative"
    np.savez(folder / "flat.npz", load=np.ones(3))
    yield folder / "flat.npz", traces.read_load, r"numbers \[steps, L, E\]"
    np.savez(folder / "newer.npz", load=np.ones((1, 2, 3)), head=np.array('{"schema": 99, "kind": "load"}'))
    yield folder / "newer.npz", traces.read_load, "trace schema 99, this version reads 1"
    np.savez(folder / "head.npz", load=np.ones((1, 2, 3)), head=np.array("{"))
    yield folder / "head.npz", traces.read_load, "head of the trace is damaged"
    np.save(folder / "bare.npy", np.ones((1, 2, 3)))
    yield folder / "bare.npy", traces.read_load, "one bare array"
    texts = {
        "broken": ("{", "not valid JSON"),
        "nothing": ("[]", 'no "logical_count"'),
        "words": ('{"logical_count": [["a"]]}', "no array of numbers"),
        "ragged": ('{"logical_count": [[1, 2], [3]]}', "no array of numbers"),
        "zero": ('{"logical_count": [[0, 0]]}', "zero everywhere"),
        "deep": ('{"logical_count": [[[[1]]]]}', "4 dimensions"),
    }
    for name, (text, message) in texts.items():
        (folder / f"{name}.json").write_text(text)
        yield folder / f"{name}.json", traces.read_load, message


def test_damaged_traces_are_refused_in_one_line_that_names_the_file(tmp_path):
    for path, read, message in damaged(tmp_path):
        with pytest.raises(ConfigError, match=message) as caught:
            read(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_synthetic_loads_and_routings_are_reproducible_and_agree():
    load = traces.synthetic_load(2, 64)
    assert np.array_equal(load, traces.synthetic_load(2, 64)) and (load >= 0).all()
    ids = traces.synthetic_routing(load, 2000, top_k=6)
    assert np.array_equal(ids, traces.synthetic_routing(load, 2000, top_k=6))
    assert all(len(set(row.tolist())) == 6 for row in ids.reshape(-1, 6))
    assert max(len(set((row // 8).tolist())) for row in ids.reshape(-1, 6)) <= 4  # group-limited
    for layer in range(2):
        assert np.corrcoef(RoutingTrace(ids, 64).load[layer], load[layer])[0, 1] > 0.98


# ---------------------------------------------------------------- plans


@pytest.fixture
def plan() -> placement.Plan:
    ranks = [placement.Rank(speed=speed, slots=5, node=node) for node, speed in enumerate((1.0, 1 / 3, 0.1))]
    return placement.plan(traces.synthetic_load(3, 12), ranks)


def test_a_plan_comes_back_to_the_last_bit(tmp_path, plan):
    placement.save_plan(plan, tmp_path / "plan.json")
    again = placement.load_plan(tmp_path / "plan.json")
    assert isinstance(again, placement.Plan) and again.digest() == plan.digest()
    assert np.array_equal(again.times(), plan.times()) and np.array_equal(again.bound(), plan.bound())
    assert again.policy == plan.policy and np.array_equal(again.ranks.node, plan.ranks.node)
    bare = placement.proportional(2, 6, [1.0, 2.0])
    placement.save_plan(bare, tmp_path / "bare.json")
    again = placement.load_plan(tmp_path / "bare.json")
    assert type(again) is placement.Placement and again.digest() == bare.digest()


def test_a_plan_that_cannot_be_written_leaves_the_old_one(tmp_path, plan, monkeypatch):
    path = tmp_path / "plan.json"
    placement.save_plan(plan, path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        placement.save_plan(placement.proportional(1, 4, [1.0]), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["plan.json"]
    with pytest.raises(ConfigError, match="cannot write here"):
        placement.save_plan(plan, tmp_path / "no" / "plan.json")


def test_damaged_plans_are_refused_in_one_line_that_names_the_file(tmp_path, plan):
    path = tmp_path / "plan.json"
    placement.save_plan(plan, path)
    whole = json.loads(path.read_text())
    cases = [
        ("{", "not valid JSON"),
        ("[]", "no plan of moe-runtime"),
        (whole | {"schema": 2}, "plan schema 2, this version reads 1"),
        ({key: value for key, value in whole.items() if key != "slot_rank"}, "slot_rank missing"),
        (whole | {"slot_rank": "abc"}, "damaged"),
        (whole | {"slot_expert": [[0] * 15] * 3}, "write the plan again"),
        (whole | {"plan": {**whole["plan"], "load": [[1.0]]}}, "do not fit"),
        (whole | {"plan": {}}, "plan.cost missing"),
    ]
    for content, message in cases:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(ConfigError, match=message) as caught:
            placement.load_plan(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot read"):
        placement.load_plan(tmp_path / "none.json")


def test_exports_say_the_same_in_the_forms_of_others(tmp_path):
    made = placement.plan(traces.synthetic_load(2, 8), 3, 12)
    placement.export_sglang(made, tmp_path / "sglang.json", layers=(1, 3), num_layers=5)
    table = json.loads((tmp_path / "sglang.json").read_text())["physical_to_logical_map"]
    assert [len(row) for row in table] == [12] * 5 and table[1] == made.slot_expert[0].tolist()
    assert table[3] == made.slot_expert[1].tolist() and set(table[0]) == set(range(8))

    placement.export_vllm(made, tmp_path / "vllm.json")
    tables = json.loads((tmp_path / "vllm.json").read_text())
    for layer in range(2):
        for expert in range(8):
            slots = [slot for slot in tables["logical_to_physical_map"][layer][expert] if slot >= 0]
            assert len(slots) == tables["logical_replica_count"][layer][expert]
            assert all(tables["physical_to_logical_map"][layer][slot] == expert for slot in slots)

    placement.export_vllm_ascend(made, tmp_path / "ascend.json")
    ascend = json.loads((tmp_path / "ascend.json").read_text())
    assert ascend["moe_layer_count"] == 2
    devices = ascend["layer_list"][1]["device_list"]
    assert [device["device_expert"] for device in devices] == [made.rank_experts(1, rank) for rank in range(3)]


@pytest.mark.parametrize("export", ["export_sglang", "export_vllm", "export_vllm_ascend"])
def test_plans_with_unequal_slots_cannot_be_exported_to_those_who_need_equal_ones(tmp_path, export):
    made = placement.plan(traces.synthetic_load(1, 8), 3, 10)
    with pytest.raises(ConfigError, match="equal numbers of slots per rank, this plan has 3 to 4"):
        getattr(placement, export)(made, tmp_path / "out.json")
    assert not list(tmp_path.iterdir())


def test_layer_numbers_that_do_not_fit_the_plan_are_refused(tmp_path):
    made = placement.plan(traces.synthetic_load(2, 8), 4, 8)
    with pytest.raises(ConfigError, match="3 layer numbers for a plan of 2 layers"):
        placement.export_sglang(made, tmp_path / "out.json", layers=(0, 1, 2))

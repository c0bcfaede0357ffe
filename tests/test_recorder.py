"""Recording: what is written is what the tokens of plain transformers selected, whatever ranks computed them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from families import write_checkpoint
from ranks import RankFailed, run_ranks
from transformers import AutoModelForCausalLM

import moe_runtime
from moe_runtime.experts import traces
from moe_runtime.layer import experts_modules
from moe_runtime.recorder import Recorder, layer_numbers

PASSES = 5


def batch(number: int) -> torch.Tensor:
    return torch.randint(2, 128, (3, 9), generator=torch.Generator().manual_seed(number))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recorder") / "model"
    write_checkpoint(folder, "deepseek_v3", num_hidden_layers=4)  # the first is dense
    return folder


@pytest.fixture(scope="module")
def selected(checkpoint) -> np.ndarray:
    """[passes, sequences, positions, L, K]: what plain transformers selects."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    seen: list[np.ndarray] = []
    for module in experts_modules(model).values():
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1].numpy().copy()))
    with torch.no_grad():
        for number in range(PASSES):
            model(batch(number))
    ids = np.stack(seen).reshape(PASSES, 3, 3, 9, -1)  # passes, L, sequences, positions, K
    return ids.transpose(0, 2, 3, 1, 4)


def record(checkpoint: Path, path: Path, split: list[int], routing: bool, limit_mib: int | None) -> str:
    with moe_runtime.init({"timeout_s": 60}) as runtime, torch.no_grad():
        model = runtime.load_model(checkpoint, dtype=torch.float32)
        first = sum(split[: runtime.rank])
        model(batch(99)[first : first + split[runtime.rank]])  # before it begins
        if limit_mib is None:
            recorder = runtime.record(model, path, routing)
        else:
            recorder = Recorder(model, runtime.transport, path, routing, limit_mib)
            recorder._load = recorder._load[:2]  # so little memory that passes share rows
        with recorder:
            for number in range(PASSES):
                model(batch(number)[first : first + split[runtime.rank]])
        model(batch(98)[first : first + split[runtime.rank]])  # after it has ended
        return recorder.note


def counts(ids: np.ndarray) -> np.ndarray:
    return np.stack([np.bincount(ids[..., layer, :].ravel(), minlength=16) for layer in range(3)])


@pytest.mark.parametrize("split", [[3], [2, 1], [2, 0, 1]])
def test_loads_are_what_transformers_selects(checkpoint, selected, tmp_path, split):
    run_ranks(record, len(split), checkpoint, tmp_path / "load.npz", split, False, None)
    trace = traces.read_load(tmp_path / "load.npz")
    assert (trace.load == np.stack([counts(ids) for ids in selected])).all()
    assert trace.layers == (1, 2, 3) and trace.metadata["ranks"] == len(split)


@pytest.mark.parametrize("split", [[3], [2, 1], [2, 0, 1]])
def test_routing_is_what_transformers_selects(checkpoint, selected, tmp_path, split):
    run_ranks(record, len(split), checkpoint, tmp_path / "routing.npz", split, True, None)
    trace = traces.read_routing(tmp_path / "routing.npz")
    assert (np.sort(trace.topk_ids) == np.sort(selected.reshape(-1, 3, 4))).all() and trace.num_experts == 16


def test_a_long_recording_puts_passes_together_and_says_so(checkpoint, selected, tmp_path):
    notes = run_ranks(record, 2, checkpoint, tmp_path / "load.npz", [2, 1], False, 1)
    trace = traces.read_load(tmp_path / "load.npz")
    assert trace.metadata["passes_per_row"] == 4 and notes[0] == "4 passes in each row"
    by_pass = np.stack([counts(ids) for ids in selected])
    assert (trace.load == np.stack([by_pass[:4].sum(0), by_pass[4:].sum(0)])).all()


def generate_unevenly(checkpoint: Path, path: Path) -> int:
    with moe_runtime.init({"timeout_s": 60}) as runtime:
        model = runtime.load_model(checkpoint, dtype=torch.float32)
        with runtime.record(model, path):
            model.generate(batch(0)[:1, : 4 + runtime.rank], max_new_tokens=2 + 3 * runtime.rank, do_sample=False)
        return runtime.size


def test_ranks_that_finish_at_different_times_are_counted(checkpoint, tmp_path):
    run_ranks(generate_unevenly, 2, checkpoint, tmp_path / "load.npz")
    load = traces.read_load(tmp_path / "load.npz").load
    assert load.sum(axis=2).tolist() == [[9 * 4] * 3, [2 * 4] * 3, *[[4] * 3] * 3]  # tokens times top-4


def record_nowhere(checkpoint: Path) -> None:
    with moe_runtime.init({"timeout_s": 60}) as runtime:
        runtime.record(runtime.load_model(checkpoint, dtype=torch.float32), "/no/such/folder/load.npz")


def test_a_path_that_cannot_be_written_is_told_before_anything_is_recorded(checkpoint):
    with pytest.raises(RankFailed, match="there is no folder /no/such/folder"):
        run_ranks(record_nowhere, 2, checkpoint)


def test_layer_numbers_come_from_the_names():
    assert layer_numbers(["model.layers.3.mlp.experts", "model.layers.10.mlp.experts"]) == (3, 10)
    assert layer_numbers(["model.layers.3.mlp.experts", "mtp.experts"]) is None

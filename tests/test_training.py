"""Training over ranks is training of one process on the joined batch: same losses, same weights, and replicas equal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import family_config, write_checkpoint
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moe_runtime
from moe_runtime.experts.placement import from_owners
from moe_runtime.launch.data import Batches

STEPS, BATCH, LENGTH = 20, 4, 16


def joined_batch(step: int) -> torch.Tensor:
    return torch.randint(2, 128, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))


def optimizer_of(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    """Twenty steps of plain transformers on the joined batch: losses and final weights."""
    folder = tmp_path_factory.mktemp("training")
    torch.set_num_threads(1)
    model = write_checkpoint(folder / "model", "deepseek_v3").train()
    optimizer, losses = optimizer_of(model), []
    for step in range(STEPS):
        ids = joined_batch(step)
        loss = F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1  # it does learn
    save_file({"losses": torch.tensor(losses)}, folder / "losses.safetensors")
    model.save_pretrained(folder / "trained")
    return folder


def train_on_rank(folder: Path, splits: list[int], replicated: bool) -> list[float]:
    with moe_runtime.init({"timeout_s": 60}) as runtime:
        placement = None
        if replicated:  # experts 0 and 3 on every rank, the others round robin
            everywhere = list(range(runtime.size))
            owners = [everywhere if e in (0, 3) else [e % runtime.size] for e in range(16)]
            placement = from_owners([owners], runtime.size)
        model = runtime.load_model(folder / "model", dtype=torch.float32, placement=placement).train()
        optimizer, losses = optimizer_of(model), []
        start = sum(splits[: runtime.rank])
        for step in range(STEPS):
            ids = joined_batch(step)[start : start + splits[runtime.rank]]
            logits = model(input_ids=ids[:, :-1]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / (BATCH * LENGTH)
            optimizer.zero_grad()
            loss.backward()
            runtime.sync_gradients(model)
            runtime.clip_grad_norm(model, 1.0)
            optimizer.step()
            joined = loss.detach().clone()
            runtime.transport.all_reduce(joined, "test loss")
            losses.append(joined.item())
        runtime.save_model(model, folder / f"trained-{runtime.size}-{replicated}")
        return losses


@pytest.mark.parametrize("replicated", [False, True])
@pytest.mark.parametrize("splits", [[3, 1], [2, 0, 2]])
def test_twenty_steps_equal_one_process(one_process, splits, replicated):
    results = run_ranks(train_on_rank, len(splits), one_process, splits, replicated)
    expected = load_file(one_process / "losses.safetensors")["losses"].tolist()
    np.testing.assert_allclose(results[0], expected, rtol=1e-4, atol=1e-4)
    ours = AutoModelForCausalLM.from_pretrained(one_process / f"trained-{len(splits)}-{replicated}")
    theirs = AutoModelForCausalLM.from_pretrained(one_process / "trained")
    for name, value in theirs.state_dict().items():
        # Twenty AdamW steps of 3e-3: Adam divides by the gradient's size, so rounding of tiny gradients shows.
        torch.testing.assert_close(
            ours.state_dict()[name], value, rtol=1e-3, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def fresh_weights(folder: Path) -> None:
    with moe_runtime.init({"timeout_s": 60}) as runtime:
        model = runtime.create_model(family_config("deepseek_v3"), seed=5)
        runtime.save_model(model, folder / f"fresh-{runtime.size}")


def test_fresh_weights_do_not_depend_on_the_number_of_ranks(tmp_path):
    for size in (1, 3):
        run_ranks(fresh_weights, size, tmp_path)
    one, three = (load_file(tmp_path / f"fresh-{size}" / "model.safetensors") for size in (1, 3))
    assert one.keys() == three.keys()
    assert all(torch.equal(one[name], three[name]) for name in one)
    assert one["model.layers.1.mlp.experts.3.up_proj.weight"].std() > 0.01


def test_the_joined_batch_does_not_depend_on_the_number_of_ranks():
    batches = Batches(np.arange(1000, dtype=np.int16) % 128, LENGTH, BATCH, seed=1)
    for step in (0, 3, 40):  # 62 windows: step 40 is in the third epoch
        parts = torch.cat([batches.of_rank(step, rank, 3) for rank in range(3)])
        assert torch.equal(parts, batches.of_rank(step, 0, 1))
        assert parts.shape == (BATCH, LENGTH + 1)

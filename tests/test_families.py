"""Every family, sharded over 1 to 4 ranks, against one process running transformers' own model (float32).

Logits, loss and every gradient agree to 1e-5, greedy tokens are equal, and ranks hold different numbers of sequences,
one of them none. 16 experts on 3 ranks is a split that transformers' own expert parallelism refuses.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, write_checkpoint
from ranks import run_ranks
from safetensors.torch import load_file, save_file

import moe_runtime
from moe_runtime.experts.placement import from_owners

# Sequences of each rank, by world size: unequal, and with an empty rank from 3 ranks on.
SPLITS = {1: [3], 2: [2, 1], 3: [2, 0, 1], 4: [1, 1, 0, 1]}
LENGTH, NEW_TOKENS = 20, 6


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """family -> folder with a checkpoint and what one process makes of it; built once per family and settings."""
    made: dict[tuple, Path] = {}

    def build(family: str, **changes) -> Path:
        key = (family, *sorted(changes.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(family)
            write_oracle(made[key], family, **changes)
        return made[key]

    return build


def write_oracle(folder: Path, family: str, **changes) -> None:
    torch.set_num_threads(1)
    model = write_checkpoint(folder / "model", family, **changes)
    ids = torch.randint(2, 128, (3, LENGTH), generator=torch.Generator().manual_seed(7))
    logits = model(ids).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    out = {"ids": ids, "logits": logits.detach(), "loss": loss.detach().view(1)}
    out |= {f"grad.{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    out["tokens"] = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    save_file({name: tensor.contiguous() for name, tensor in out.items()}, folder / "oracle.safetensors")


def check_rank(folder: Path, split: list[int], settings: dict, owners: list | None = None) -> dict:
    """Runs on every rank: load, compare logits, loss, gradients and greedy tokens of this rank's sequences."""
    expected = load_file(folder / "oracle.safetensors")
    with moe_runtime.init({"timeout_s": 60, **settings}) as runtime:
        placement = from_owners(owners, runtime.size) if owners else None
        model = runtime.load_model(folder / "model", dtype=torch.float32, placement=placement)
        start = sum(split[: runtime.rank])
        mine = slice(start, start + split[runtime.rank])
        ids = expected["ids"][mine].to(runtime.device)

        logits = model(ids).logits
        torch.testing.assert_close(logits.cpu(), expected["logits"][mine], rtol=1e-5, atol=1e-5)
        total = expected["ids"][:, 1:].numel()
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / total
        loss.backward()
        runtime.sync_gradients(model)
        whole_loss = loss.detach().cpu().clone().view(1)
        runtime.transport.all_reduce(whole_loss, "test loss")
        torch.testing.assert_close(whole_loss, expected["loss"], rtol=1e-5, atol=1e-5)
        compared = compare_gradients(model, expected, runtime)

        with torch.no_grad():
            tokens = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        if len(ids):
            assert torch.equal(tokens.cpu(), expected["tokens"][mine])
        return {"compared": compared, "load": runtime.load(model).sum().item()}


def compare_gradients(model, expected: dict, runtime) -> int:
    from moe_runtime.layer import experts_modules

    experts = {f"{name}.": module.moe_runtime_layer for name, module in experts_modules(model).items()}
    compared = 0
    for name, parameter in model.named_parameters():
        reference = expected.get(f"grad.{name}")
        owner = next((layer for prefix, layer in experts.items() if name.startswith(prefix)), None)
        if reference is None:  # a parameter that one process gives no gradient either
            assert parameter.grad is None or not parameter.grad.cpu().any(), name
            continue
        if owner is not None:
            reference = reference[owner.placement.rank_experts(owner.index, runtime.rank)]
        torch.testing.assert_close(
            parameter.grad.cpu(), reference, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"gradient of {name}: {m}"
        )
        compared += 1
    return compared


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_one_process(oracle, family, size):
    results = run_ranks(check_rank, size, oracle(family), SPLITS[size], {})
    assert all(result["compared"] > 10 for result in results)
    assert len({result["load"] for result in results}) == 1


@pytest.mark.parametrize("choice", ["static", "local", "balanced"])
@pytest.mark.parametrize("size", [2, 3])
def test_replicas_equal_one_process_whatever_the_choice(oracle, choice, size):
    owners = [sorted({e % size, (e // 2 + 1) % size}) for e in range(16)]
    run_ranks(check_rank, size, oracle("deepseek_v3"), SPLITS[size], {"replica_choice": choice}, [owners])


@pytest.mark.parametrize("top_k", [1, 2, 3, 5, 6, 7, 8])
def test_top_k(oracle, top_k):
    run_ranks(check_rank, 3, oracle("deepseek_v3", num_experts_per_tok=top_k), SPLITS[3], {})


@pytest.mark.parametrize("settings", [{"per_expert_sums": True}, {"expert_kernel": "transformers"}])
@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v4", "gpt_oss"])
def test_other_paths(oracle, family, settings):
    run_ranks(check_rank, 3, oracle(family), SPLITS[3], settings)

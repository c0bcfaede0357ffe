"""Parts of training: float32 masters, DeepSeek's balancing, recomputing without repeating exchanges, spans of time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import family_config
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks

import moe_runtime
from moe_runtime.balance import BIAS, Balance, RouterBalance, bias_step, sequence_loss, z_loss
from moe_runtime.core.errors import ConfigError
from moe_runtime.core.spans import Spans, spans
from moe_runtime.experts.placement import from_owners
from moe_runtime.optimizer import MasterAdamW, accumulate_in_float32
from moe_runtime.recompute import recompute

IDS = torch.randint(2, 128, (4, 17), generator=torch.Generator().manual_seed(3))


def part_of(runtime) -> torch.Tensor:
    """This rank's sequences; where there are three ranks the last has none."""
    busy = max(1, runtime.size - (runtime.size == 3))
    if runtime.rank >= busy:
        return IDS[:0]
    return IDS[len(IDS) * runtime.rank // busy : len(IDS) * (runtime.rank + 1) // busy]


def text_loss(model, ids) -> torch.Tensor:
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / IDS[:, 1:].numel()


# ---- float32 masters -------------------------------------------------------------------------------------------------


def test_float32_parameters_take_torchs_own_steps():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.randn(5, 3)) for _ in range(2))
    theirs.data.copy_(ours)
    mine, torchs = MasterAdamW([ours], lr=0.1, weight_decay=0.1), torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.1)
    for step in range(5):
        for parameter, optimizer in ((ours, mine), (theirs, torchs)):
            parameter.grad = torch.full_like(parameter, 0.1 * step - 0.2)
            optimizer.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_are_the_rounded_masters_of_a_float32_run(dtype, fused):
    """Steps far below half precision's resolution of the weight are not lost."""
    wide = torch.nn.Parameter(torch.ones(64))
    half = torch.nn.Parameter(torch.ones(64, dtype=dtype))
    accumulate_in_float32([half])
    settings = {"lr": 1e-4, "weight_decay": 0.0, "fused": fused}
    optimizers = [torch.optim.AdamW([wide], **settings), MasterAdamW([half], **settings)]
    for _ in range(100):
        wide.grad = torch.linspace(0.5, 1.5, 64)
        half.grad = torch.linspace(0.5, 1.5, 64)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(optimizers[1].state[half]["master"], wide.data)
    assert torch.equal(half.data, wide.data.to(dtype)) and half.data.max() < 1


def test_gradients_of_micro_batches_add_up_in_float32():
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    assert accumulate_in_float32([weight])
    for value in (1.0, *[2.0**-10] * 8):  # each too small for bfloat16 to add to 1
        (weight * torch.tensor([value], dtype=torch.bfloat16)).sum().backward()
    assert weight.grad.dtype == torch.float32 and weight.grad.item() == 1.0 + 8 * 2.0**-10


def train_in_bfloat16(replicated: bool) -> dict:
    with moe_runtime.init({"timeout_s": 60}) as runtime:
        owners = [list(range(runtime.size)) if e in (0, 3) else [e % runtime.size] for e in range(16)]
        placement = from_owners([owners], runtime.size) if replicated else None
        model = runtime.create_model(family_config("deepseek_v3"), torch.bfloat16, seed=1, placement=placement).train()
        accumulate_in_float32(model.parameters())
        optimizer, losses = MasterAdamW(model.parameters(), lr=3e-3), []
        for _ in range(6):
            optimizer.zero_grad()
            loss = text_loss(model, part_of(runtime))
            loss.backward()
            runtime.sync_gradients(model)
            runtime.clip_grad_norm(model, 1.0)
            optimizer.step()
            joined = loss.detach().double()
            runtime.transport.all_reduce(joined, "test")
            losses.append(joined.item())
        return {"losses": losses, "master": optimizer.state[model.lm_head.weight]["master"].sum().item()}


@pytest.mark.parametrize("replicated", [False, True])
def test_bfloat16_with_masters_trains_alike_on_any_number_of_ranks(replicated):
    one, three = (run_ranks(train_in_bfloat16, size, replicated and size > 1) for size in (1, 3))
    assert one[0]["losses"][-1] < one[0]["losses"][0] - 0.1
    np.testing.assert_allclose(three[0]["losses"], one[0]["losses"], rtol=5e-3)
    assert len({rank["master"] for rank in three}) == 1


# ---- balancing -------------------------------------------------------------------------------------------------------


def test_the_bias_moves_against_the_load():
    assert torch.equal(bias_step(torch.tensor([4, 2, 0]), 0.001), torch.tensor([-0.001, 0.0, 0.001]))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(2, 12), st.data())
def test_the_sequence_loss_is_the_papers_formula(sequences, length, experts, data):
    """Equations 17 to 20 of the DeepSeek-V3 report, one sequence at a time, in numpy; a balanced sequence gives 1."""
    top_k = data.draw(st.integers(1, experts))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    scores = rng.uniform(0.01, 1, (sequences * length, experts))
    ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(sequences * length)])
    expected = 0.0
    for b in range(sequences):
        rows = slice(b * length, (b + 1) * length)
        f = np.array([experts / (top_k * length) * (ids[rows] == e).sum() for e in range(experts)])
        p = (scores[rows] / scores[rows].sum(1, keepdims=True)).mean(0)
        expected += (f * p).sum()
    ours = sequence_loss(torch.from_numpy(scores).float(), torch.from_numpy(ids), sequences)
    assert ours.item() == pytest.approx(expected, rel=1e-5)
    even = torch.full((experts, experts), 0.5)
    assert sequence_loss(even, torch.arange(experts)[:, None], 1).item() == pytest.approx(1.0)


def test_the_z_loss_is_the_square_of_the_log_of_the_sum():
    logits = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    expected = np.log(2) ** 2 + np.log(np.e + np.e**2) ** 2
    assert z_loss(logits).item() == pytest.approx(expected, rel=1e-6)


def train_balanced(balance: Balance, steps: int, family: str = "deepseek_v3") -> dict:
    with moe_runtime.init({"timeout_s": 60}) as runtime:
        model = runtime.create_model(family_config(family), seed=1).train()
        watched = RouterBalance(model, runtime.transport, balance)
        optimizer, ids = torch.optim.AdamW(model.parameters(), lr=1e-3), part_of(runtime)
        first = norm = None
        for _ in range(steps):
            optimizer.zero_grad()
            loss = text_loss(model, ids)
            extra = watched.loss(len(ids), len(IDS), IDS[:, 1:].numel())
            (loss + extra).backward()
            runtime.sync_gradients(model)
            norm = runtime.clip_grad_norm(model, 1.0)
            optimizer.step()
            load = watched.step()
            first = load.clone() if first is None else first
        bias = [getattr(router, BIAS).clone() for router in watched.routers.values() if hasattr(router, BIAS)]
        watched.close()
        biases = torch.stack(bias or [first[0]]).numpy()
        return {"first": first.numpy(), "last": load.numpy(), "norm": norm, "bias": biases}


@pytest.mark.parametrize("balance", [Balance(0.01), Balance(0.0, 0.1, 0.01), Balance(0.002, 0.1, 0.01)])
def test_balancing_is_that_of_one_process_on_the_joined_batch(balance):
    """Loads, biases and gradients; one of three ranks has no tokens."""
    one, three = (run_ranks(train_balanced, size, balance, 3) for size in (1, 3))
    assert one[0]["first"].sum() == IDS[:, 1:].numel() * 4
    for rank in three:
        np.testing.assert_array_equal(rank["first"], one[0]["first"])
        np.testing.assert_allclose(rank["bias"], one[0]["bias"], atol=1e-6)
        assert rank["norm"] == pytest.approx(one[0]["norm"], rel=1e-4)
    assert (one[0]["bias"] != 0).any() == (balance.bias_rate > 0)


def test_the_bias_alone_lowers_the_largest_load():
    before, after = (run_ranks(train_balanced, 1, Balance(rate), 60)[0]["last"] for rate in (0.0, 0.01))
    assert (after.max(1) / after.mean(1)).max() < 0.8 * (before.max(1) / before.mean(1)).max()


def test_a_family_without_the_bias_is_refused_and_told_what_helps():
    with pytest.raises(AssertionError, match="Qwen3Moe.*sequence_loss"):
        run_ranks(train_balanced, 1, Balance(0.01), 1, "qwen3_moe")
    run_ranks(train_balanced, 1, Balance(0.0, 0.1, 0.1), 1, "qwen3_moe")


# ---- recomputing -----------------------------------------------------------------------------------------------------


def counted(start, exchanges: list[int]):
    def begin(*arguments, **named):
        exchanges[0] += 1
        return start(*arguments, **named)

    return begin


def one_backward(what: str) -> dict:
    with moe_runtime.init({"timeout_s": 60}) as runtime:
        model = runtime.create_model(family_config("deepseek_v3", num_hidden_layers=3), seed=1).train()
        recompute(model, what)
        exchanges, kept = [0], [0]
        for name in ("start_all_to_all_v", "start_rows", "start_counted_rows"):
            if hasattr(runtime.transport, name):
                setattr(runtime.transport, name, counted(getattr(runtime.transport, name), exchanges))

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[0] += tensor.numel() * tensor.element_size()
            return tensor

        spans.on = True
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = text_loss(model, part_of(runtime))
        kept_forward = kept[0]
        loss.backward()
        spans.on = False
        runtime.sync_gradients(model)
        gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
        return {"exchanges": exchanges[0], "kept": kept_forward, "gradients": gradients, "seconds": spans.take()}


def test_recomputing_keeps_less_repeats_no_exchange_and_changes_no_gradient():
    ran = {what: run_ranks(one_backward, 3, what) for what in ("none", "experts", "all")}
    for rank in range(3):
        none, experts, everything = (ran[what][rank] for what in ("none", "experts", "all"))
        assert none["exchanges"] == experts["exchanges"] == everything["exchanges"] > 0
        for other in (experts, everything):
            for name, value in none["gradients"].items():
                np.testing.assert_allclose(other["gradients"][name], value, rtol=1e-5, atol=1e-7)
        if rank < 2:
            assert everything["kept"] < experts["kept"] < none["kept"]
    with pytest.raises(ConfigError, match="none, experts, all"):
        recompute(torch.nn.Linear(1, 1), "some")


# ---- spans -----------------------------------------------------------------------------------------------------------


def test_every_part_of_a_step_has_its_span():
    for rank in run_ranks(one_backward, 2, "experts"):
        names = {f"{part}{way}" for part in ("dispatch", "experts", "combine") for way in ("", " (backward)")}
        assert names <= set(rank["seconds"]) and all(rank["seconds"][name] > 0 for name in names)


def test_a_span_within_its_own_kind_counts_once_and_off_counts_nothing():
    ours = Spans()
    with ours("a"):
        pass
    assert ours.take() == {}
    ours.on = True
    with ours("a"), ours("a"):
        pass
    ours.end("never begun")
    assert list(ours.take()) == ["a"] and ours.take() == {}

"""Live rebalancing: tokens, logits and training stay what they are while experts move; what fails changes nothing."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import write_checkpoint
from ranks import RankFailed, run_ranks
from test_checkpoint import write_fp8
from transformers import AutoModelForCausalLM

import moe_runtime
from moe_runtime.core.errors import ConfigError
from moe_runtime.experts.placement import from_owners, proportional
from moe_runtime.migration import Migration
from moe_runtime.pays import Pays
from moe_runtime.rebalance import Look, seconds_per_token

EXPERTS, LAYERS = 16, 2


def shuffled(size: int, seed: int):
    """A placement of random owners: unequal numbers of slots, some experts on several ranks, layers unlike."""
    random = np.random.default_rng(seed)
    owners = [random.permutation(size)[: random.integers(1, size + 1)].tolist() for _ in range(EXPERTS)]
    for rank in range(size):
        owners[rank] = sorted({*owners[rank], rank})  # none without a slot
    return from_owners([[owners[e] for e in random.permutation(EXPERTS)] for _ in range(LAYERS)], size)


class Shuffle:
    """A policy that always moves, somewhere else every time."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, look: Look):
        return shuffled(self.size, look.number)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rebalance") / "model"
    write_checkpoint(folder, "deepseek_v3", num_hidden_layers=LAYERS + 1)
    return folder


def prompts(number: int) -> torch.Tensor:
    return torch.randint(2, 128, (3, 6), generator=torch.Generator().manual_seed(number))


def greedy(model, ids: torch.Tensor) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=60, do_sample=False)


# ---------------------------------------------------------------- while generating


def generate_and_move(checkpoint: Path, split: list[int], rounds: int, settings: dict) -> dict:
    with moe_runtime.init({"timeout_s": 60, **settings}) as runtime:
        model = runtime.load_model(checkpoint, dtype=torch.float32)
        runtime.rebalance_by(model, Shuffle(runtime.size), every=1)
        first, tokens = sum(split[: runtime.rank]), []
        for number in range(rounds):
            mine = prompts(number)[first : first + split[runtime.rank]]
            tokens.append(greedy(model, mine[:, : 6 - runtime.rank]).tolist())  # ranks finish at different times
        rebalancer = model.moe_runtime_rebalancer
        return {
            "tokens": tokens,
            "switches": rebalancer.switches,
            "rolled back": rebalancer.rolled_back,
            "view": runtime.view.number,
            "dispatchers": len(runtime._dispatchers),
            "load": runtime.load(model).sum(axis=1).tolist(),
            "described": runtime.describe(),
        }


@pytest.mark.parametrize(
    ("split", "rounds", "settings"),
    [
        ([2, 1], 12, {"rebalance_slice_mib": 8}),
        ([2, 1], 3, {"rebalance_slice_mib": 0.02, "transport": "gloo"}),
        ([2, 1], 3, {"transport": "zeromq", "replica_choice": "balanced"}),
        ([2, 0, 1], 3, {"rebalance_slice_mib": 0.02, "replica_choice": "local"}),
        ([3], 2, {}),
    ],
)
def test_greedy_tokens_do_not_notice_that_experts_move(checkpoint, split, rounds, settings):
    results = run_ranks(generate_and_move, len(split), checkpoint, split, rounds, settings, timeout=300)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    torch.set_num_threads(2)
    fed = 0
    for rank, result in enumerate(results):
        first = sum(split[:rank])
        for number in range(rounds):
            mine = prompts(number)[first : first + split[rank], : 6 - rank]
            expected = greedy(model, mine) if len(mine) else mine
            assert result["tokens"][number] == expected.tolist(), (rank, number)
            fed += expected.shape[0] * (expected.shape[1] - 1) if len(mine) else 0
    assert len({result["switches"] for result in results}) == 1 and results[0]["rolled back"] == 0
    assert results[0]["switches"] >= (200 if rounds == 12 else 10)
    for result in results:
        assert result["view"] == result["switches"] + 1  # the first view is that of loading
        assert result["dispatchers"] == 1  # those of old placements are gone
        assert result["load"] == [fed * 4] * LAYERS  # top-4 of every token, none lost when slots changed hands
        assert f"{result['switches']} switches" in result["described"]


def logits_on_the_way(checkpoint: Path, settings: dict) -> list:
    """The logits of one batch before, in every pass of, and after a move; and whether the placement changed."""
    with moe_runtime.init({"timeout_s": 60, "rebalance_slice_mib": 0.02, **settings}) as runtime, torch.no_grad():
        model = runtime.load_model(checkpoint, dtype=torch.float32)
        mine = prompts(0)[runtime.rank : runtime.rank + 1]
        before = model(mine).logits
        new = shuffled(runtime.size, 5)
        runtime.rebalance(model, new)
        passes = []
        while model.moe_runtime_rebalancer.migration is not None:
            passes.append(model(mine).logits)
        passes.append(model(mine).logits)
        assert runtime.view.placement is new and len(passes) > 4
        return [float((logits - before).abs().max()) for logits in passes]


def test_logits_are_the_same_before_during_and_after(checkpoint):
    for differences in run_ranks(logits_on_the_way, 2, checkpoint, {}):
        assert max(differences) < 1e-5


def test_and_to_the_last_bit_with_per_expert_sums(checkpoint):
    for differences in run_ranks(logits_on_the_way, 2, checkpoint, {"per_expert_sums": True}):
        assert max(differences) == 0.0


VENDORS = """
[[node]]
name = "a"
emulate = "biren"
[[node]]
name = "b"
emulate = "ascend"
devices = 2
"""


def test_experts_move_between_emulated_vendors(checkpoint, tmp_path):
    (tmp_path / "cluster.toml").write_text(VENDORS)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    expected = greedy(model, prompts(0)).tolist()
    results = run_ranks(generate_on_devices, 3, checkpoint, str(tmp_path / "cluster.toml"))
    assert [tokens for _, tokens in results] == [[tokens] for tokens in expected]
    assert results[0][0] >= 2


def generate_on_devices(checkpoint: Path, cluster: str) -> list:
    with moe_runtime.init({"timeout_s": 60, "cluster": cluster, "rebalance_slice_mib": 0.02}) as runtime:
        model = runtime.load_model(checkpoint, dtype=torch.float32)
        runtime.rebalance_by(model, Shuffle(runtime.size), every=1)
        tokens = greedy(model, prompts(0)[runtime.rank : runtime.rank + 1].to(runtime.device))
        return [model.moe_runtime_rebalancer.switches, tokens.tolist()]


def move_family(folder: Path, keep_fp8: bool) -> float:
    with moe_runtime.init({"timeout_s": 60}) as runtime, torch.no_grad():
        model = runtime.load_model(folder, dtype=torch.float32, keep_fp8=keep_fp8)
        before = model(prompts(0)).logits
        num_layers = runtime.view.placement.num_layers
        owners = [[1 - e % 2] if e % 3 else [0, 1] for e in range(EXPERTS)]
        runtime.rebalance(model, from_owners([owners] * num_layers, 2), wait=True)
        return float((model(prompts(0)).logits - before).abs().max())


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "deepseek_v4"])
def test_biases_and_other_layouts_move_along(tmp_path, family):
    write_checkpoint(tmp_path / "model", family)
    assert max(run_ranks(move_family, 2, tmp_path / "model", False)) < 1e-5


def test_experts_that_stay_in_fp8_move_with_their_scales(tmp_path):
    folder = write_fp8(tmp_path / "model", hidden_size=256, moe_intermediate_size=128)
    assert max(run_ranks(move_family, 2, folder, True)) < 1e-5


# ---------------------------------------------------------------- what fails


def fails(checkpoint: Path, how: str) -> list:
    with moe_runtime.init({"timeout_s": 60, "rebalance_slice_mib": 0.02}) as runtime, torch.no_grad():
        model = runtime.load_model(checkpoint, dtype=torch.float32)
        mine = prompts(0)[runtime.rank : runtime.rank + 1]
        before, view = model(mine).logits, runtime.view
        if runtime.rank == 1 and how == "corruption":
            take_in = Migration._take_in

            def flip(self) -> None:
                arrive = self._arrive
                if self.progress.done == 2:

                    def damaged() -> torch.Tensor:
                        received = arrive().clone()
                        received.view(-1)[7] ^= 1
                        return received

                    self._arrive = damaged
                take_in(self)

            Migration._take_in = flip
        if runtime.rank == 1 and how == "memory":

            def none_left(self) -> None:
                raise MemoryError("no more")

            Migration.set_aside = none_left
        sys.stderr = io.StringIO()
        runtime.rebalance(model, shuffled(runtime.size, 5))
        if how == "weights":
            model.model.layers[1].mlp.experts.down_proj.data.mul_(1.0)  # a view: torch does not count this
            model.model.layers[1].mlp.experts.down_proj.mul_(1.0)
        for _ in range(60):
            if model.moe_runtime_rebalancer.migration is None:
                break
            model(mine)
        said, sys.stderr = sys.stderr.getvalue(), sys.__stderr__
        assert runtime.view is view and torch.equal(model(mine).logits, before)
        Migration.set_aside, Migration._take_in = ORIGINAL
        runtime.rebalance(model, shuffled(runtime.size, 6), wait=True)  # the next one is not hindered
        torch.testing.assert_close(model(mine).logits, before, rtol=1e-5, atol=1e-5)
        return [model.moe_runtime_rebalancer.rolled_back, said, runtime.describe()]


ORIGINAL = Migration.set_aside, Migration._take_in


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("corruption", r"the checksum of layer \d, expert \d+, rank 0 -> rank 1 differs"),
        ("memory", r"rank 1 has no memory for it \(no more\)"),
        ("weights", r"rank 0's weights changed meanwhile; in training give optimizer="),
    ],
)
def test_a_move_that_fails_leaves_the_old_placement_in_force(checkpoint, how, told):
    import re

    results = run_ranks(fails, 2, checkpoint, how)
    assert [rolled_back for rolled_back, _, _ in results] == [1, 1]
    assert re.search(f"rolled back at pass .*the old placement stays in force: {told}", results[0][1])
    assert all(re.search(told, described) for _, _, described in results)


def disagree(checkpoint: Path, what: str) -> str:
    with moe_runtime.init({"timeout_s": 60}) as runtime, torch.no_grad():
        model = runtime.load_model(checkpoint, dtype=torch.float32)
        new = shuffled(2, 5)
        if what == "placement" and runtime.rank == 1:
            new = shuffled(2, 6)
        if what == "ranks":
            new = proportional(LAYERS, EXPERTS, [1.0] * 3)
        if what == "training":
            model.train()
        runtime.rebalance(model, new)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("placement", "rank 1 disagrees with rank 0 on placement"),
        ("ranks", "the placement has num_ranks = 3, the model 2"),
        ("training", "a model in training needs optimizer="),
    ],
)
def test_what_cannot_be_is_refused_in_words(checkpoint, what, told):
    with pytest.raises(RankFailed, match=told):
        run_ranks(disagree, 2, checkpoint, what)


def stall(checkpoint: Path) -> str:
    with moe_runtime.init({"timeout_s": 60, "rebalance_stall_s": 0.3, "rebalance_slice_mib": 0.02}) as runtime:
        model = runtime.load_model(checkpoint, dtype=torch.float32)
        sys.stderr = io.StringIO()
        runtime.rebalance(model, shuffled(2, 5))
        with torch.no_grad():
            model(prompts(0))
        time.sleep(1.0)  # no pass comes
        said, sys.stderr = sys.stderr.getvalue(), sys.__stderr__
        runtime.finish_rebalance(model)
        assert runtime.view.number == 2
        return said


def test_a_watchdog_tells_of_a_move_that_stands_still(checkpoint):
    for said in run_ranks(stall, 2, checkpoint):
        assert said.count("rebalance has not moved for") == 1
        assert "waiting for the next forward pass; the old placement is in force" in said


# ---------------------------------------------------------------- while training


def train(checkpoint: Path, split: list[int], every: int, optimizer_name: str) -> list:
    with moe_runtime.init({"timeout_s": 60, "rebalance_slice_mib": 0.02}) as runtime:
        model = runtime.load_model(checkpoint, dtype=torch.float32).train()
        optimizer = getattr(torch.optim, optimizer_name)(model.parameters(), lr=1e-3)
        if every:
            runtime.rebalance_by(model, Shuffle(runtime.size), every=every)
        first, losses, norms = sum(split[: runtime.rank]), [], []
        for step in range(12):
            ids = prompts(step)[first : first + split[runtime.rank]]
            logits = model(input_ids=ids[:, :-1]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / 15
            optimizer.zero_grad()
            loss.backward()
            runtime.sync_gradients(model)
            norms.append(runtime.clip_grad_norm(model, 1.0))  # of gradients that have moved with their experts
            optimizer.step()
            runtime.rebalance_step(model, optimizer)
            joined = loss.detach().clone()
            runtime.transport.all_reduce(joined, "test loss")
            losses.append(joined.item())
        rebalancer = model.moe_runtime_rebalancer
        return [rebalancer.switches, rebalancer.rolled_back, losses, norms]


@pytest.mark.parametrize(("split", "optimizer"), [([2, 1], "AdamW"), ([1, 0, 2], "AdamW"), ([2, 1], "SGD")])
def test_training_does_not_notice_that_experts_move(checkpoint, split, optimizer):
    still = run_ranks(train, len(split), checkpoint, split, 0, optimizer)
    moving = run_ranks(train, len(split), checkpoint, split, 2, optimizer)
    assert still[0][:2] == [0, 0] and moving[0][:2] == [5, 0]
    for moved, stayed in zip(moving[0][2:], still[0][2:], strict=True):
        np.testing.assert_allclose(moved, stayed, rtol=1e-5, atol=1e-5)


def step_too_early(checkpoint: Path) -> list:
    """An optimizer step while weights travel: they are old when they arrive."""
    with moe_runtime.init({"timeout_s": 60}) as runtime:
        model = runtime.load_model(checkpoint, dtype=torch.float32).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        runtime.rebalance(model, shuffled(runtime.size, 3), optimizer)
        model(prompts(0)).logits.logsumexp(-1).sum().backward()
        sys.stderr = io.StringIO()
        optimizer.step()
        runtime.finish_rebalance(model)
        sys.stderr = sys.__stderr__
        return [runtime.view.number, runtime.describe()]


def test_a_step_before_all_have_come_takes_the_move_back(checkpoint):
    for view, described in run_ranks(step_too_early, 2, checkpoint):
        assert view == 1 and "weights changed meanwhile" in described


# ---------------------------------------------------------------- when it pays


def look_at(load: np.ndarray, bytes_per_s: float = 1e9, cost=(1e-3, 1e-3)) -> Look:
    placement = proportional(1, load.shape[1], [1.0, 1.0])
    return Look(1, 100, placement, load, np.array(cost), [1_000_000], bytes_per_s)


def test_it_moves_when_that_pays_and_says_why():
    skewed, flat = np.array([[400, 400, 10, 10]]), np.array([[100, 100, 100, 100]])
    policy = Pays()
    new = policy(look_at(skewed))
    assert sorted(new.rank_experts(0, 0)) != [0, 1] and policy.decision.endswith("moving")
    assert policy(look_at(flat)) is None and policy.decision.endswith("stays")
    assert policy(look_at(skewed, bytes_per_s=1e3)) is None  # an hour to move, to save some seconds
    assert policy(look_at(np.zeros((1, 4)))) is None and "no tokens" in policy.decision
    slow = policy(look_at(np.array([[100, 90, 110, 100]]), cost=(1e-3, 4e-3)))
    assert slow is None or len(slow.rank_experts(0, 1)) == 2  # slots stay where they are


def test_seconds_per_token_come_from_the_cluster_file_where_nothing_was_measured():
    assert seconds_per_token([(2.0, 100), (0.0, 0)], [1.0, 0.5]).tolist() == [0.02, 0.04]
    assert seconds_per_token([(0.0, 0), (0.0, 0)], [1.0, 0.5]).tolist() == [1.0, 2.0]


def automatic(checkpoint: Path) -> list:
    settings = {"timeout_s": 60, "rebalance": "auto", "rebalance_every": 4}
    with moe_runtime.init(settings) as runtime:
        model = runtime.load_model(checkpoint, dtype=torch.float32)
        tokens = [greedy(model, prompts(number)[runtime.rank : runtime.rank + 1]).tolist() for number in range(2)]
        return [tokens, runtime.describe()]


def test_auto_looks_and_leaves_tokens_alone(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    for rank, (tokens, described) in enumerate(run_ranks(automatic, 2, checkpoint)):
        expected = [greedy(model, prompts(number)[rank : rank + 1]).tolist() for number in range(2)]
        assert tokens == expected
        assert "looks every 4 passes" in described and "rebalancing, last look: after 4 passes" in described


def with_a_policy_that_fails(checkpoint: Path) -> str:
    def policy(look: Look):
        raise ConfigError("no idea")

    with moe_runtime.init({"timeout_s": 60}) as runtime, torch.inference_mode():
        model = runtime.load_model(checkpoint, dtype=torch.float32)
        runtime.rebalance_by(model, policy, every=1)
        for _ in range(3):
            model(prompts(0))
        return runtime.describe()


def test_a_policy_that_cannot_plan_is_told_of_and_nothing_moves(checkpoint):
    for described in run_ranks(with_a_policy_that_fails, 2, checkpoint):
        assert "0 switches" in described and "last look: the policy could not plan: no idea" in described


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="rebalance must be off or auto"):
        moe_runtime.init({"rebalance": "on"})
    with pytest.raises(ConfigError, match="rebalance_every must be above 0"):
        moe_runtime.init({"rebalance_every": 0})

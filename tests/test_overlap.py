"""Computing while rows travel: the same results, in the same order of exchanges, and errors that come through."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from families import family_config, reference_model, write_checkpoint
from ranks import RankFailed, run_ranks

import moe_runtime
from moe_runtime.core.errors import ConfigError
from moe_runtime.overlap import EarlyModule, TwoHalves
from moe_runtime.turns import ByTurns, pass_turn


def test_two_functions_take_turns_and_never_run_at_once():
    seen: list[str] = []
    running = threading.Lock()

    def work(name: str, turns: int):
        for number in range(turns):
            with running:  # nobody else is between two turns
                seen.append(f"{name}{number}")
                time.sleep(0.001)
            pass_turn()
        return name

    turns = ByTurns()
    for _ in range(2):  # the thread is used again
        seen.clear()
        assert turns.run(lambda: work("a", 3), lambda: work("b", 5)) == ("a", "b")
        assert seen == ["a0", "b0", "a1", "b1", "a2", "b2", "b3", "b4"]
    turns.close()
    pass_turn()  # nothing to pass to


@pytest.mark.parametrize("who", [0, 1])
def test_the_first_error_is_raised_and_the_other_goes_no_further(who):
    went = []

    def fails():
        pass_turn()
        raise ConfigError("broken")

    def goes_on():
        for number in range(5):
            went.append(number)
            pass_turn()

    turns = ByTurns()
    with pytest.raises(ConfigError, match="broken"):
        turns.run(*((fails, goes_on) if who == 0 else (goes_on, fails)))
    assert len(went) < 5
    assert turns.run(lambda: 1, lambda: 2) == (1, 2)
    turns.close()


def test_the_second_thread_has_the_callers_grad_mode():
    turns = ByTurns()
    with torch.inference_mode():
        assert turns.run(lambda: None, torch.is_inference_mode_enabled)[1]
    with torch.no_grad():
        assert not turns.run(lambda: None, torch.is_grad_enabled)[1]
    assert turns.run(lambda: None, torch.is_grad_enabled)[1]
    turns.close()


def test_an_early_output_is_used_once_and_for_its_own_input_only():
    linear = torch.nn.Linear(3, 3)
    early, x, other = EarlyModule(linear), torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    expected, of_other = linear(x), linear(other)
    early.early(x.view(-1, 3))
    assert torch.equal(linear(x), expected)
    early.early(x.view(-1, 3))
    assert torch.equal(linear(other), of_other)
    assert torch.equal(linear(x), expected)


def logits_of_halves(folder, prompts: list, splits: list) -> list:
    """This rank's sequences in two halves: logits of each; a half may have none, or more passes than the other."""
    with moe_runtime.init({"timeout_s": 60}) as runtime:
        model = runtime.load_model(folder, dtype=torch.float32)
        made: list[list] = [[], []]
        todo = [list(half) for half in splits[runtime.rank]]

        def step(half: int):
            def one() -> bool:
                if not todo[half]:
                    return False
                ids = torch.tensor([prompts[todo[half].pop(0)]])
                made[half].append(model(input_ids=ids, use_cache=False).logits.numpy())
                return True

            return one

        halves = TwoHalves(model)
        with torch.inference_mode():
            halves.run(step(0), step(1))
            halves.run(step(0), step(1))  # nothing left: all agree at once
        halves.close()
        assert runtime.size == 1 or "shared experts: computed while rows travel" in runtime.describe()
        return made


@pytest.mark.parametrize("splits", [
    [[[0, 1], [2, 3]]],
    [[[0, 1, 2], [3]], [[], [4]]],
    [[[0], [1]], [[], []], [[2, 3, 4], []]],
])  # fmt: skip
def test_halves_give_what_transformers_gives(tmp_path, splits):
    model = write_checkpoint(tmp_path / "model", "deepseek_v3")
    prompts = [torch.randint(2, 128, (5 + 3 * n,)).tolist() for n in range(5)]
    for ours, mine in zip(
        run_ranks(logits_of_halves, len(splits), tmp_path / "model", prompts, splits), splits, strict=True
    ):
        for made, numbers in zip(ours, mine, strict=True):
            assert len(made) == len(numbers)
            for logits, number in zip(made, numbers, strict=True):
                expected = model(input_ids=torch.tensor([prompts[number]])).logits
                torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-5, atol=1e-5)


def halves_that_rebalance() -> None:
    with moe_runtime.init({"timeout_s": 60, "rebalance": "auto"}) as runtime:
        halves = TwoHalves(runtime.create_model(family_config("deepseek_v3")))
        try:
            halves.run(lambda: False, lambda: False)
        finally:
            halves.close()


def test_halves_and_live_rebalancing_exclude_each_other():
    with pytest.raises(RankFailed, match="switch rebalancing off"):
        run_ranks(halves_that_rebalance, 2)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v4", "glm4_moe"])
def test_shared_experts_of_other_families_are_found(family):
    from moe_runtime.overlap import _SHARED

    names = {name.rpartition(".")[2] for name, _ in reference_model(family).named_modules()}
    assert names & set(_SHARED)

"""Placements that lose and gain ranks: survivors keep what they hold, lost experts find a place, new ranks hold none.

And what a model does with such placements, against transformers on one process: ranks without a slot, experts that
nobody holds.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from families import write_checkpoint
from held import admit, keep
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import RankFailed, run_ranks
from test_placement import owner_tables
from transformers import AutoModelForCausalLM

import moe_runtime
from moe_runtime.core.placement import Placement
from moe_runtime.errors import ConfigError
from moe_runtime.experts.placement import Rank, export_sglang, from_owners, load_plan, plan, proportional, save_plan
from moe_runtime.experts.replicas import BalancedChooser
from moe_runtime.experts.routing import ReplicaChooser, lost_selections, renormalise
from moe_runtime.layer import describe_lacking
from moe_runtime.lost_experts import grow
from moe_runtime.model import expert_layers
from moe_runtime.optimizer import MasterAdamW, accumulate_in_float32
from moe_runtime.pays import Pays
from moe_runtime.rebalance import Look
from moe_runtime.training_state import Checkpoints

FIELDS = ("slot_expert", "slot_rank", "slot_share", "absent")


def held_by(placement: Placement) -> list[list[list[int]]]:
    """[rank][layer] -> experts."""
    return [
        [placement.rank_experts(layer, rank) for layer in range(placement.num_layers)]
        for rank in range(placement.num_ranks)
    ]


@st.composite
def placements(draw):
    """Random owners and random shares: some replicas have a share of 0."""
    placement = from_owners(*draw(owner_tables()))
    raw = draw(st.lists(st.integers(0, 3), min_size=placement.num_slots, max_size=placement.num_slots))
    share = np.tile(np.array(raw, dtype=np.float64), (placement.num_layers, 1))
    for layer, experts in enumerate(placement.slot_expert):
        for expert in range(placement.num_experts):
            mine = experts == expert
            share[layer, mine] = share[layer, mine] / share[layer, mine].sum() if share[layer, mine].sum() else 0
            share[layer, np.flatnonzero(mine)[0]] += 1 - share[layer, mine].sum()
    return replace(placement, slot_share=share)


@st.composite
def losses(draw):
    """(a placement, its survivors in any order): at least one."""
    placement = draw(placements())
    order = draw(st.permutations(range(placement.num_ranks)))
    return placement, list(order[: draw(st.integers(1, placement.num_ranks))])


# ---------------------------------------------------------------- keep


@given(losses())
def test_survivors_keep_their_slots_under_their_new_numbers(drawn):
    placement, survivors = drawn
    kept = keep(placement, survivors)  # a Placement: that shares sum to 1 is checked there
    assert kept.num_ranks == len(survivors) and kept.num_experts == placement.num_experts
    assert held_by(kept) == [held_by(placement)[rank] for rank in survivors]
    for layer in range(placement.num_layers):
        alive = {e for rank in survivors for e in placement.rank_experts(layer, rank)}
        assert kept.absent_experts(layer) == sorted(set(range(placement.num_experts)) - alive)


@given(losses())
def test_shares_keep_their_proportions(drawn):
    placement, survivors = drawn
    kept = keep(placement, survivors)
    old = np.concatenate([np.arange(placement.num_slots)[placement.rank_slots(rank)] for rank in survivors])
    for layer, experts in enumerate(kept.slot_expert):
        for expert in set(experts.tolist()):
            before, after = (
                placement.slot_share[layer, old][experts == expert],
                kept.slot_share[layer, experts == expert],
            )
            expected = before / before.sum() if before.sum() > 0 else np.full(len(before), 1 / len(before))
            np.testing.assert_allclose(after, expected, rtol=1e-12)
            if (placement.slot_expert[layer] == expert).sum() == len(before):
                assert np.array_equal(before, after)  # to the bit where it has lost no replica


@given(placements())
def test_nothing_changes_where_all_survive(placement):
    assert keep(placement, range(placement.num_ranks)).digest() == placement.digest()


@given(losses(), st.data())
def test_losing_one_after_the_other_is_losing_them_at_once(drawn, data):
    placement, survivors = drawn
    fewer = data.draw(st.lists(st.sampled_from(range(len(survivors))), min_size=1, unique=True))
    twice, once = keep(keep(placement, survivors), fewer), keep(placement, [survivors[i] for i in fewer])
    assert np.array_equal(twice.slot_expert, once.slot_expert) and np.array_equal(twice.slot_rank, once.slot_rank)
    assert all(twice.absent_experts(layer) == once.absent_experts(layer) for layer in range(once.num_layers))


# ---------------------------------------------------------------- admit


@given(losses(), st.data())
def test_new_ranks_hold_nothing_and_the_others_what_they_held(drawn, data):
    kept = keep(*drawn)
    positions = data.draw(st.sets(st.integers(0, kept.num_ranks + 1), max_size=2))
    size = kept.num_ranks + len(positions)
    positions = sorted(positions & set(range(size)))
    admitted = admit(kept, kept.num_ranks + len(positions), positions)
    held = held_by(admitted)
    assert all(held[position] == [[]] * kept.num_layers for position in positions)
    assert [held[rank] for rank in range(len(held)) if rank not in positions] == held_by(kept)
    assert np.array_equal(admitted.slot_share, kept.slot_share)
    assert keep(admitted, [r for r in range(len(held)) if r not in positions]).digest() == kept.digest()


def test_new_ranks_come_last_where_nothing_else_is_said():
    assert held_by(admit(proportional(1, 4, [1, 1]), 4)) == [[[0, 1]], [[2, 3]], [[]], [[]]]


# ---------------------------------------------------------------- grow


@st.composite
def growths(draw):
    """(a placement that may lack experts, speeds, room, load)."""
    kept = keep(*draw(losses()))
    ranks = kept.num_ranks
    speeds = draw(st.lists(st.floats(0.1, 10), min_size=ranks, max_size=ranks))
    room = draw(st.lists(st.none() | st.integers(0, 4), min_size=ranks, max_size=ranks))
    counts = st.lists(st.integers(0, 50), min_size=kept.num_experts, max_size=kept.num_experts)
    load = draw(st.none() | st.lists(counts, min_size=kept.num_layers, max_size=kept.num_layers))
    return kept, speeds, room, load if load is None else np.array(load)


@given(growths())
@settings(max_examples=300)
def test_every_expert_has_a_place_and_nothing_has_moved(drawn):
    kept, speeds, room, load = drawn
    most = max(len(kept.absent_experts(layer)) for layer in range(kept.num_layers))
    count = np.bincount(kept.slot_rank, minlength=kept.num_ranks)
    limit = [min(kept.num_experts - n, r if r is not None else 99) for n, r in zip(count, room, strict=True)]
    if sum(limit) < most:
        with pytest.raises(ConfigError, match=rf"no rank holds {most} experts .*: {most - sum(limit)} slots lack"):
            grow(kept, speeds, room, load)
        return
    grown = grow(kept, speeds, room, load)  # a Placement without absent experts: each is held, checked there
    added = np.bincount(grown.slot_rank, minlength=kept.num_ranks) - count
    assert grown.absent is None and added.sum() == most and (added >= 0).all() and (added <= limit).all()
    for before, after in zip(held_by(kept), held_by(grown), strict=True):
        assert all(set(b) <= set(a) for b, a in zip(before, after, strict=True))
    assert grow(kept, speeds, room, load).digest() == grown.digest()
    for layer, experts in enumerate(kept.slot_expert):  # shares stay, but where a replica came
        for slot, (expert, rank) in enumerate(zip(experts.tolist(), kept.slot_rank.tolist(), strict=True)):
            if (grown.slot_expert[layer] == expert).sum() == (experts == expert).sum():
                at = grown.rank_slots(rank).start + grown.rank_experts(layer, rank).index(expert)
                assert grown.slot_share[layer, at] == kept.slot_share[layer, slot]


def times(placement: Placement, load: np.ndarray, speeds) -> np.ndarray:
    """[L, R]"""
    tokens = np.take_along_axis(load, placement.slot_expert.astype(np.int64), 1) * placement.slot_share
    return np.stack([np.bincount(placement.slot_rank, row, placement.num_ranks) / speeds for row in tokens])


@given(growths(), st.data())
def test_the_slowest_rank_is_within_the_proven_bound_where_room_is_plenty(drawn, data):
    """List scheduling on ranks of any speed: (all tokens + (R - 1) x the largest that was placed) / all speed."""
    kept, speeds, _, _ = drawn
    kept = replace(kept, slot_expert=kept.slot_expert[:1], slot_share=kept.slot_share[:1],
                   absent=None if kept.absent is None else kept.absent[:1])  # fmt: skip
    counts = data.draw(st.lists(st.integers(1, 50), min_size=kept.num_experts, max_size=kept.num_experts))
    load, absent, speeds = np.array([counts], dtype=float), kept.absent_experts(0), np.array(speeds)
    grown = grow(kept, speeds, [None] * kept.num_ranks, load)
    largest = load[0, absent].max(initial=0)
    bound = (load.sum() + (kept.num_ranks - 1) * largest) / speeds.sum()
    assert times(grown, load, speeds).max() <= max(times(kept, load, speeds).max(), bound) * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_it_is_near_what_any_owners_of_the_lost_experts_could_reach(seed):
    """Against all ways to give 6 experts to 3 ranks: at most a tenth above the best of them."""
    random = np.random.default_rng(seed)
    load, speeds = random.integers(1, 100, (1, 16)).astype(float), np.array([1.0, 2.0, 3.0])
    kept = keep(proportional(1, 16, [1, 1, 1, 1.6]), [0, 1, 2])
    lost, kept_times = kept.absent_experts(0), times(kept, load, speeds)[0]
    assert len(lost) == 6
    best = min(
        (kept_times + np.bincount(owners, load[0, lost], 3) / speeds).max()
        for owners in product(range(3), repeat=len(lost))
    )
    assert times(grow(kept, speeds, [None] * 3, load), load, speeds).max() <= best * 1.1


@pytest.mark.parametrize("replicas, most", [(0, 1.006), (16, 1.003)])
def test_it_is_near_the_planner_s_bound_for_many_layers(replicas, most):
    """58 layers of 256 experts, planned for 8 ranks of which one is lost, against a bound for every placement there
    is, those that would move all experts about included; growing moves none."""
    load = np.random.default_rng(5).gamma(2.0, 100.0, (58, 256))
    kept = keep(plan(load, 8, 256 + replicas), [0, 1, 2, 4, 5, 6, 7])
    grown = grow(kept, [1.0] * 7, [None] * 7, load)
    slots = np.bincount(grown.slot_rank).tolist()
    bound = plan(load, [Rank(slots=count) for count in slots], sum(slots)).bound()
    assert times(grown, load, np.ones(7)).max(axis=1).sum() <= bound.sum() * most


def test_slots_left_over_take_what_keeps_the_slowest_rank_busy():
    """Layer 0 lacks one expert, layer 1 two: in layer 0 the second new slot takes a part of expert 0, which is hot."""
    whole = from_owners([[[0, 2], [0, 1], [1], [2]], [[0, 1], [0, 1], [2], [2]]], 3)
    load = np.array([[90.0, 10, 10, 10], [10, 10, 10, 10]])
    kept = keep(whole, [0, 1])
    assert [kept.absent_experts(layer) for layer in range(2)] == [[3], [2, 3]]
    grown = grow(kept, [1, 1], [0, None], load)
    assert held_by(grown) == [[[0, 1], [0, 1]], [[0, 1, 2, 3], [0, 1, 2, 3]]]
    assert grown.slot_share[0].tolist() == pytest.approx([55 / 90, 0.5, 35 / 90, 0.5, 1, 1])
    assert times(grown, load, np.ones(2))[0].tolist() == pytest.approx([60, 60])
    assert grown.slot_share[1].tolist() == [0.5, 0.5, 0.5, 0.5, 1, 1]


def test_no_room_is_told_in_slots():
    kept = keep(proportional(2, 12, [1, 1, 1]), [0, 2])
    with pytest.raises(ConfigError, match=r"no rank holds 4 experts of layer 0, .*room for 3 .*: 1 slots lack"):
        grow(kept, [1, 1], [1, 2])


def test_numbers_that_do_not_fit_a_growth_are_refused():
    kept = keep(proportional(1, 4, [1, 1]), [0])
    for speeds, room, load, message in [
        ([0.0], [None], None, "a speed above 0"),
        ([1.0], [], None, "a room for each"),
        ([1.0], [None], np.ones((2, 4)), "a load of shape"),
        ([1.0], [None], np.full((1, 4), np.nan), "a load of shape"),
    ]:
        with pytest.raises(ConfigError, match=message):
            grow(kept, speeds, room, load)


# ---------------------------------------------------------------- experts that nobody holds


def lacking() -> Placement:
    """Experts 0 and 1 on rank 0, 1 and 2 on rank 1; nobody holds expert 3, nor in layer 1 expert 0."""
    return Placement(
        np.array([[0, 1, 1, 2], [1, 3, 2, 3]], dtype=np.int32),
        np.array([0, 0, 1, 1], dtype=np.int32),
        np.array([[1, 0.5, 0.5, 1], [1, 0.5, 1, 0.5]]),
        4,
        2,
        absent=np.array([[False, False, False, True], [True, False, False, False]]),
    )


@pytest.mark.parametrize(
    "absent, message",
    [
        (None, r"layer 0, expert 3: .*\(no rank holds it\)"),
        ([[False] * 4, [True, False, False, False]], r"layer 0, expert 3: .*\(no rank holds it\)"),
        ([[False, True, False, True], [True, False, False, False]], "layer 0, expert 1 is said to be absent, but"),
        ([[False, False, False, True]], r"absent must be bool \[L, E\]"),
        ([[0, 0, 0, 1], [1, 0, 0, 0]], r"absent must be bool \[L, E\]"),
    ],
)
def test_an_expert_may_be_nowhere_only_where_that_is_said(absent, message):
    with pytest.raises(ConfigError, match=message):
        replace(lacking(), absent=None if absent is None else np.array(absent))


def test_what_a_placement_lacks_is_part_of_it(tmp_path):
    placement, whole = lacking(), from_owners([[[0], [0, 1], [1], [1]]] * 2, 2)
    assert placement.has_replicas() and not keep(proportional(1, 4, [1, 1]), [0]).has_replicas()
    assert replace(whole, absent=np.zeros((2, 4), dtype=bool)).digest() == whole.digest()
    none_left = keep(admit(whole, 3), [2])
    assert none_left.num_slots == 0 and none_left.absent.all()
    fewer = replace(none_left, num_experts=2, absent=np.ones((2, 2), dtype=bool))
    assert len({p.digest() for p in (placement, whole, none_left, fewer)}) == 4

    for each in (placement, none_left):
        save_plan(each, tmp_path / "plan.json")
        again = load_plan(tmp_path / "plan.json")
        assert again.digest() == each.digest() and np.array_equal(again.absent, each.absent)
    with pytest.raises(ConfigError, match="SGLang needs every expert in some slot; no rank holds 2 experts, such as"):
        export_sglang(placement, tmp_path / "sglang.json")


@pytest.mark.parametrize(
    "absent, message",
    [
        ([[3]], "absent must be 2 lists"),
        ([[3], [4]], "absent: layer 1 names 4"),
        ([[3], [True]], "absent: layer 1 names True"),
        ([[3], 0], "a table of the plan is damaged"),
        ([[3], []], r"layer 1, expert 0: .*\(no rank holds it\)"),
    ],
)
def test_a_damaged_list_of_absent_experts_is_refused(tmp_path, absent, message):
    save_plan(lacking(), tmp_path / "plan.json")
    found = json.loads((tmp_path / "plan.json").read_text()) | {"absent": absent}
    (tmp_path / "plan.json").write_text(json.dumps(found))
    with pytest.raises(ConfigError, match=message):
        load_plan(tmp_path / "plan.json")


@given(losses(), st.integers(0, 20), st.integers(1, 6), st.integers(0, 2**32 - 1))
@settings(deadline=None)  # what compiles is compiled on the way
def test_choosers_leave_out_what_nobody_holds(drawn, tokens, top_k, seed):
    kept = keep(*drawn)
    ids = torch.randint(-1, kept.num_experts, (tokens, top_k), generator=torch.Generator().manual_seed(seed))
    ones, everyone = [1.0] * kept.num_ranks, list(range(kept.num_ranks))

    def gather(counts: torch.Tensor) -> torch.Tensor:  # the other ranks have no tokens
        return torch.cat([counts[None], counts.new_zeros(kept.num_ranks - 1, len(counts))])

    for layer in range(kept.num_layers):
        there = (ids >= 0) & ~torch.isin(ids, torch.tensor(kept.absent_experts(layer), dtype=torch.int64))
        for chooser in (
            ReplicaChooser(kept, layer),
            ReplicaChooser(kept, layer, near=[[0], everyone]),
            BalancedChooser(kept, layer, 0, ones, [0.0] * kept.num_ranks, everyone, gather),
        ):
            slots = chooser.choose(ids)
            assert torch.equal(slots >= 0, there) and (slots >= -1).all()
            expert_of_slot = torch.from_numpy(kept.slot_expert[layer].astype(np.int64))
            assert torch.equal(expert_of_slot[slots[there]], ids[there])
            assert torch.equal(lost_selections(ids, slots), (ids >= 0) & ~there)


def test_callers_with_experts_of_their_own_are_told_what_nobody_holds():
    with moe_runtime.init({"timeout_s": 30}) as runtime:
        kept = keep(proportional(1, 4, [1, 1]), [0])
        dispatcher = runtime.dispatcher(8, 4, 2, placement=kept)
        x, weights = torch.ones(2, 8), torch.ones(2, 2)
        with pytest.raises(ConfigError, match="dispatch: token 1 selects expert 3, which no rank holds; give -1 for"):
            dispatcher.dispatch(x, torch.tensor([[0, 1], [0, 3]]), weights)
        rows, handle = dispatcher.dispatch(x, torch.tensor([[0, 1], [0, -1]]), weights)
        assert dispatcher.combine(rows, handle).tolist() == [[2.0] * 8, [1.0] * 8]


def test_nothing_is_planned_or_moved_while_experts_are_absent():
    policy = Pays()
    look = Look(1, 100, lacking(), np.ones((2, 4)), np.array([1e-3, 1e-3]), [1000, 1000], 1e9)
    assert policy(look) is None and "no rank holds 2 experts, such as expert 3 of layer 0" in policy.decision


# ---------------------------------------------------------------- the weights of the others


def plain_renormalise(weights, ids, lost):
    """One token after the other, in float64."""
    result = weights.double().clone()
    for token in range(len(weights)):
        if lost[token].any():
            selected = [k for k in range(ids.shape[1]) if ids[token, k] >= 0]
            left = [k for k in selected if not lost[token, k]]
            total, rest = (
                sum(weights[token, k].double() for k in selected),
                sum(weights[token, k].double() for k in left),
            )
            for k in range(ids.shape[1]):
                result[token, k] = weights[token, k].double() * total / rest if k in left and rest > 0 else 0
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@given(st.integers(0, 30), st.integers(1, 6), st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_weights_of_the_rest_have_the_sum_that_all_had(dtype, tokens, top_k, seed):
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, 8, (tokens, top_k), generator=random)
    weights = torch.rand(tokens, top_k, generator=random).to(dtype)
    lost = (torch.rand(tokens, top_k, generator=random) < 0.4) & (ids >= 0)
    got = renormalise(weights, ids, lost)
    rounding = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.double(), plain_renormalise(weights, ids, lost), rtol=rounding, atol=1e-6)
    assert got.dtype == dtype and torch.equal(got[~lost.any(-1)], weights[~lost.any(-1)])  # to the bit
    if dtype == torch.float64 and tokens:
        torch.autograd.gradcheck(lambda w: renormalise(w, ids, lost), weights.requires_grad_())


def test_gradients_stay_numbers_where_a_token_has_lost_everything():
    weights = torch.tensor([[0.5, 0.5], [0.2, 0.8]], requires_grad=True)
    renormalise(weights, torch.tensor([[0, 1], [0, 2]]), torch.tensor([[True, True], [True, False]])).sum().backward()
    assert weights.grad.tolist() == [[0, 0], [1, 1]]


# ---------------------------------------------------------------- models on such placements


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("survive") / "model"
    write_checkpoint(folder, "deepseek_v3", num_hidden_layers=3)
    return folder


IDS = torch.randint(2, 128, (3, 12), generator=torch.Generator().manual_seed(7))
TWO_LAYERS = [[[e % 2] for e in range(16)], [[e // 8] for e in range(16)]]


def expected_logits(checkpoint: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(checkpoint).eval()(IDS).logits


def one_rank_without_slots(checkpoint: Path, position: int, config: dict) -> dict:
    """Logits, greedy tokens and training of a world in which one rank holds no expert, and then is given some."""
    with moe_runtime.init({"timeout_s": 60, **config}) as runtime:
        whole = from_owners(TWO_LAYERS if runtime.size == 3 else [[[0]] * 16] * 2, runtime.size - 1)
        placement = admit(whole, runtime.size, [position])
        model = runtime.load_model(checkpoint, dtype=torch.float32, placement=placement)
        mine = IDS[runtime.rank : runtime.rank + 1].to(runtime.device)
        found = {"slots": [layer.num_experts for layer in expert_layers(model)], "described": runtime.describe()}
        with torch.no_grad():
            found["without"] = model(mine).logits.cpu().numpy()
            found["tokens"] = model.generate(mine, max_new_tokens=4, do_sample=False).tolist()
        runtime.save_model(model, checkpoint.with_name(f"again-{runtime.size}-{position}"))
        model(mine).logits.logsumexp(-1).sum().backward()
        runtime.sync_gradients(model)
        found["norm"] = runtime.clip_grad_norm(model, 1e9)
        model.zero_grad()
        runtime.rebalance(model, proportional(2, 16, [1.0] * runtime.size), wait=True)
        with torch.no_grad():
            found["given"] = model(mine).logits.cpu().numpy()
            runtime.rebalance(model, placement, wait=True)  # and everything is taken from it
            found["taken"] = model(mine).logits.cpu().numpy()
        return found


@pytest.mark.parametrize(
    ("size", "position", "config"),
    [
        (3, 2, {}),
        (3, 0, {"transport": "gloo", "per_expert_sums": True}),
        (2, 1, {"transport": "zeromq", "expert_kernel": "transformers"}),
        (3, 1, {"replica_choice": "balanced", "transport": "islands"}),
    ],
)
def test_a_rank_without_slots_takes_part_like_any_other(checkpoint, size, position, config):
    expected = expected_logits(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    results = run_ranks(one_rank_without_slots, size, checkpoint, position, config)
    model(IDS[:size]).logits.logsumexp(-1).sum().backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    for rank, result in enumerate(results):
        assert (result["slots"] == [0, 0]) == (rank == position)
        assert "slots per rank" in result["described"]
        for state in ("without", "given", "taken"):
            np.testing.assert_allclose(result[state], expected[rank : rank + 1].numpy(), rtol=1e-5, atol=1e-5)
        tokens = model.generate(IDS[rank : rank + 1], max_new_tokens=4, do_sample=False)
        assert result["tokens"] == tokens.tolist()
        assert result["norm"] == pytest.approx(float(norm), rel=1e-5)
    again = AutoModelForCausalLM.from_pretrained(checkpoint.with_name(f"again-{size}-{position}"))
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def train_without_slots(checkpoint: Path, dtype: torch.dtype, folder: Path) -> None:
    """Rank 1 holds no expert while two steps are trained and saved; what is loaded again is the same, and moves."""
    with moe_runtime.init({"timeout_s": 60}) as runtime:
        placement, made = admit(proportional(2, 16, [1.0]), 2), []
        for _ in range(2):
            model = runtime.load_model(checkpoint, dtype=dtype, placement=placement).train()
            accumulate_in_float32(model.parameters())
            made.append((model, MasterAdamW(model.parameters(), lr=1e-3)))

        def step(model, optimizer) -> None:
            optimizer.zero_grad()
            model(IDS[:1]).logits.float().logsumexp(-1).sum().backward()
            runtime.sync_gradients(model)
            optimizer.step()

        (model, optimizer), (again, other) = made
        step(model, optimizer)
        step(model, optimizer)
        checkpoints = Checkpoints(runtime, folder)
        checkpoints.save(2, model, optimizer)
        checkpoints.close()
        assert Checkpoints(runtime, folder).load(again, other)["step"] == 2
        runtime.rebalance(again, proportional(2, 16, [1.0] * 2), other, wait=True)
        step(model, optimizer)
        step(again, other)
        runtime.rebalance(again, placement, other, wait=True)
        for (name, one), two in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-2, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rank_without_slots_trains_saves_and_is_given_experts(checkpoint, dtype, tmp_path):
    run_ranks(train_without_slots, 2, checkpoint, dtype, tmp_path / "state")


def without_experts(checkpoint: Path, renormalising: bool) -> list:
    """Rank 1 of three has been lost with its experts."""
    with moe_runtime.init({"timeout_s": 60}) as runtime, torch.no_grad():
        kept = keep(proportional(2, 16, [1.0] * 3), [0, 2])
        model = runtime.load_model(checkpoint, dtype=torch.float32, placement=kept)
        layers = [layer.moe_runtime_layer for layer in expert_layers(model)]
        for layer in layers:
            layer.renormalise = renormalising
        logits = model(IDS[runtime.rank : runtime.rank + 1]).logits
        counts = [(s.lacking.tokens, s.lacking.touched, s.lacking.selections) for s in layers]
        with pytest.raises(ConfigError, match="a model that lacks experts cannot be saved: no rank holds 10 experts"):
            runtime.save_model(model, checkpoint.with_name("lacks"))
        with pytest.raises(ConfigError, match=r"no rank holds 10 experts, .* cannot travel"):
            runtime.rebalance(model, proportional(2, 16, [1.0] * 2))
        return [logits.numpy(), counts, describe_lacking(layers), describe_lacking(layers[:1])]


def test_a_model_that_lacks_experts_is_transformers_with_their_weights_given_to_the_others(checkpoint):
    kept = keep(proportional(2, 16, [1.0] * 3), [0, 2])
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    counts: list[list[tuple]] = []

    def without(layer: int):
        def hook(module, args):
            x, ids, weights = args
            lost = torch.isin(ids, torch.tensor(kept.absent_experts(layer)))
            counts[-1].append((len(ids), int(lost.any(-1).sum()), int(lost.sum())))
            return x, ids, plain_renormalise(weights, ids, lost).float()

        return hook

    for layer in range(2):
        model.model.layers[layer + 1].mlp.experts.register_forward_pre_hook(without(layer))
    for rank, (logits, counted, line, first) in enumerate(run_ranks(without_experts, 2, checkpoint, True)):
        counts.append([])
        with torch.no_grad():
            np.testing.assert_allclose(logits, model(IDS[rank : rank + 1]).logits.numpy(), rtol=1e-5, atol=1e-5)
        assert counted == counts[-1] and counted[0][1] > 0
        tokens, touched, selections = (sum(column) for column in zip(*counted, strict=True))
        words = f"renormalised: {touched} of {tokens} tokens lacked {selections / touched:.1f} experts on average"
        assert line == [f"{words} (2 layers together)"] and first[0].endswith("(a layer)")


def test_a_token_that_lacks_an_expert_is_an_error_where_nobody_chose_to_go_on(checkpoint):
    with pytest.raises(RankFailed, match=r"layer 0: token \d+ selects expert \d+, which no rank holds; read it"):
        run_ranks(without_experts, 2, checkpoint, False)

"""The owner table, how experts are apportioned to ranks of different speed, and which replica a token takes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from moe_runtime import Placement
from moe_runtime.errors import ConfigError
from moe_runtime.experts.placement import apportion, from_owners, proportional
from moe_runtime.experts.routing import ReplicaChooser

SPEED = st.floats(1e-3, 1e3)


@st.composite
def ranks_and_experts(draw):
    speeds = draw(st.lists(SPEED, min_size=1, max_size=12))
    return draw(st.integers(len(speeds), 300)), speeds


@st.composite
def owner_tables(draw, replicas: bool = True):
    """(owners[layer][expert] -> ranks, number of ranks), with the same number of slots per rank in every layer."""
    num_ranks, num_experts = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    ranks = st.lists(st.integers(0, num_ranks - 1), min_size=1, max_size=num_ranks if replicas else 1, unique=True)
    layer = draw(st.lists(ranks, min_size=num_experts, max_size=num_experts))
    return [draw(st.permutations(layer)) for _ in range(draw(st.integers(1, 3)))], num_ranks


# ---------------------------------------------------------------- how many experts each rank gets


@given(ranks_and_experts())
@example((3, [1.0, 1.0, 1.0]))
@example((16, [1e-3, 1e3]))
@example((256, [1.0] * 7))
def test_apportion_gives_out_every_expert_and_at_least_one_to_each_rank(drawn):
    num_experts, speeds = drawn
    counts = apportion(num_experts, speeds)
    assert len(counts) == len(speeds) and sum(counts) == num_experts and min(counts) >= 1
    assert counts == apportion(num_experts, list(speeds))


@given(ranks_and_experts())
def test_a_faster_rank_never_gets_fewer_experts_than_a_slower_one(drawn):
    num_experts, speeds = drawn
    by_speed = [count for _, count in sorted(zip(speeds, apportion(num_experts, speeds), strict=True))]
    assert by_speed == sorted(by_speed)


@given(ranks_and_experts(), st.data())
def test_a_rank_that_becomes_faster_never_loses_experts(drawn, data):
    num_experts, speeds = drawn
    rank = data.draw(st.integers(0, len(speeds) - 1))
    faster = [*speeds[:rank], speeds[rank] * data.draw(st.floats(1.0, 50.0)), *speeds[rank + 1 :]]
    assert apportion(num_experts, faster)[rank] >= apportion(num_experts, speeds)[rank]


@given(ranks_and_experts())
def test_shares_follow_speed_when_there_are_experts_enough(drawn):
    """Within one expert of the quota, for every rank whose quota leaves room for the one it has anyway."""
    num_experts, speeds = drawn
    quota = num_experts * np.array(speeds) / sum(speeds)
    assume((quota >= 1).all())
    assert (np.abs(apportion(num_experts, speeds) - quota) < 1 + 1e-6).all()


@given(st.lists(st.floats(min_value=5e-324, allow_nan=False, allow_infinity=False), min_size=1, max_size=6))
@example([1e308, 1e308, 1e308])
@example([5e-324, 1e308])
def test_any_positive_speeds_are_taken(speeds):
    counts = apportion(40, speeds)
    assert sum(counts) == 40 and min(counts) >= 1


def test_apportion_in_numbers():
    assert apportion(256, [1, 1, 1, 1]) == [64] * 4
    assert apportion(16, [1, 1, 1]) == [6, 5, 5]  # the remainder goes to the lower rank
    assert apportion(16, [3, 1]) == [12, 4]
    assert apportion(4, [1000, 1, 1, 1]) == [1, 1, 1, 1]
    assert apportion(100, [1e-9, 1]) == [1, 99]


def test_more_ranks_than_experts_are_refused():
    with pytest.raises(ConfigError, match="5 ranks for 4 experts.* start at most 4 ranks"):
        apportion(4, [1.0] * 5)


@pytest.mark.parametrize("speed", [0.0, -1.0, float("nan"), float("inf")])
def test_speeds_that_are_not_positive_numbers_are_refused(speed):
    with pytest.raises(ConfigError, match="rank speeds must be positive numbers"):
        apportion(8, [1.0, speed])


# ---------------------------------------------------------------- placements


@given(ranks_and_experts(), st.integers(1, 4))
def test_proportional_gives_each_rank_a_run_of_experts_in_every_layer(drawn, num_layers):
    num_experts, speeds = drawn
    placement = proportional(num_layers, num_experts, speeds)
    assert (placement.num_layers, placement.num_slots, placement.num_ranks) == (num_layers, num_experts, len(speeds))
    assert not placement.has_replicas() and (placement.slot_share == 1).all()
    for layer in range(num_layers):
        runs = [placement.rank_experts(layer, rank) for rank in range(len(speeds))]
        assert [len(run) for run in runs] == apportion(num_experts, speeds)
        assert sum(runs, []) == list(range(num_experts))


@given(owner_tables())
def test_from_owners_puts_every_expert_where_it_was_asked_to(drawn):
    owners, num_ranks = drawn
    placement = from_owners(owners, num_ranks)
    assert placement.num_experts == len(owners[0]) and placement.num_ranks == num_ranks
    assert placement.has_replicas() == any(len(ranks) > 1 for ranks in owners[0])
    slots = [placement.rank_slots(rank) for rank in range(num_ranks)]
    assert slots[0].start == 0 and slots[-1].stop == placement.num_slots
    assert all(before.stop == after.start for before, after in zip(slots, slots[1:], strict=False))
    for layer, ranks_of in enumerate(owners):
        for rank in range(num_ranks):
            here = placement.rank_experts(layer, rank)
            assert here == [expert for expert, ranks in enumerate(ranks_of) if rank in ranks]
        for expert, ranks in enumerate(ranks_of):
            shares = placement.slot_share[layer][placement.slot_expert[layer] == expert]
            assert shares.tolist() == [1 / len(ranks)] * len(ranks)


@pytest.mark.parametrize(
    "owners, message",
    [
        ([], "no MoE layers"),
        ([[[0], []]], r"layer 0, expert 1: .*sum to 0, not 1 \(no rank holds it\)"),
        ([[[0], [2]]], r"slot_rank must be .* within 0..1"),
        ([[[0], [-1]]], r"slot_rank must be .* within 0..1"),
        ([[[0, 0], [1]]], "layer 0.* distinct"),
        ([[[0], [1]], [[0], [0]]], "layer 1 puts other numbers of slots on the ranks than layer 0"),
        ([[[0], [1]], [[0]]], "layer 1"),
        ([[[0], [1]], [[0], [1], [1]]], "layer 1"),
        ([[[0, 1], [0]], [[0], [0], [1]]], "layer 1 names an expert outside 0..1"),
    ],
)
def test_owners_that_cannot_be_placed_are_refused(owners, message):
    with pytest.raises(ConfigError, match=message):
        from_owners(owners, 2)


def valid() -> Placement:
    """Experts 0..2 on rank 0 and 1..3 on rank 1, in two layers."""
    return from_owners([[[0], [0, 1], [0, 1], [1]]] * 2, 2)


def changed(field: str, at, value) -> dict:
    array = getattr(valid(), field).copy()
    array[at] = value
    return {field: array}


BAD_PLACEMENTS = {
    "an expert below 0": (changed("slot_expert", (1, 0), -1), "layer 1 names an expert outside 0..3"),
    "an expert too many": (changed("slot_expert", (1, 5), 4), "layer 1 names an expert outside 0..3"),
    "an expert held twice over": (changed("slot_expert", (1, 5), 2), "layer 1, expert 2: .*sum to 2, not 1"),
    "experts out of order": (
        changed("slot_expert", (0, slice(0, 2)), [1, 0]) | changed("slot_share", (0, slice(0, 2)), [0.5, 1.0]),
        "layer 0: .*increasing order",
    ),
    "ranks that decrease": (changed("slot_rank", 5, 0), "slot_rank must be non-decreasing"),
    "a rank below 0": (changed("slot_rank", 0, -1), "slot_rank must be .* within 0..1"),
    "a rank too many": (changed("slot_rank", 5, 2), "slot_rank must be .* within 0..1"),
    "fewer ranks than named": ({"num_ranks": 1}, "slot_rank must be .* within 0..0"),
    "more experts than held": ({"num_experts": 5}, r"layer 0, expert 4: .*\(no rank holds it\)"),
    "shares that miss 1": (changed("slot_share", (1, 1), 0.4), r"layer 1, expert 1: .*sum to 0\.9, not 1"),
    "a share that is no number": (changed("slot_share", (0, 0), np.nan), "layer 0, expert 0"),
    "a negative share": (changed("slot_share", (0, [1, 3]), [1.5, -0.5]), "layer 0.* negative share"),
    "one dimension": ({"slot_expert": valid().slot_expert[0]}, r"do not agree on \[L, S\]"),
    "shares of another shape": ({"slot_share": valid().slot_share[:, :-1]}, r"do not agree on \[L, S\]"),
    "ranks of another length": ({"slot_rank": valid().slot_rank[:-1]}, r"do not agree on \[L, S\]"),
}


@pytest.mark.parametrize("name", BAD_PLACEMENTS)
def test_placements_that_cannot_hold_are_refused(name):
    change, message = BAD_PLACEMENTS[name]
    with pytest.raises(ConfigError, match=message):
        replace(valid(), **change)


def test_a_rank_never_holds_an_expert_twice():
    table = np.array([[0, 1, 1]], dtype=np.int32)
    with pytest.raises(ConfigError, match="distinct"):
        Placement(table, np.zeros(3, np.int32), np.array([[1.0, 0.5, 0.5]]), 2, 1)


# ---------------------------------------------------------------- the hash that ranks compare


@given(owner_tables(), owner_tables())
@example(([[[0], [0]]], 1), ([[[0], [0]]], 2))
@example(([[[0], [1]]], 2), ([[[1], [0]]], 2))
@example(([[[0], [1]]], 2), ([[[0], [1]]] * 2, 2))
def test_digests_are_equal_exactly_when_placements_are(one, other):
    one, other = from_owners(*one), from_owners(*other)
    fields = ("slot_expert", "slot_rank", "slot_share", "num_experts", "num_ranks")
    same = all(np.array_equal(getattr(one, field), getattr(other, field)) for field in fields)
    assert (one.digest() == other.digest()) == same
    assert 0 <= one.digest() < 2**63


DIFFERENT = {
    "owner": from_owners([[[1], [0, 1], [0, 1], [0]]] * 2, 2),
    "one layer": from_owners([[[0], [0, 1], [0, 1], [1]], [[0, 1], [0], [0, 1], [1]]], 2),
    "layers": from_owners([[[0], [0, 1], [0, 1], [1]]], 2),
    "share": replace(valid(), **changed("slot_share", (0, [1, 3]), [0.5 + 2**-40, 0.5 - 2**-40])),
    "ranks": replace(valid(), num_ranks=3),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_the_digest_tells_placements_apart_that_differ_in(what):
    assert DIFFERENT[what].digest() != valid().digest()


def test_the_digest_does_not_depend_on_how_arrays_are_stored():
    placement = valid()
    stored = replace(
        placement,
        slot_expert=np.asfortranarray(placement.slot_expert.astype(np.int64)),
        slot_rank=placement.slot_rank.astype(">i4"),
    )
    assert stored.digest() == placement.digest()


# ---------------------------------------------------------------- which replica a token takes


@given(owner_tables(), st.integers(0, 20), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_replicas_are_chosen_among_the_slots_of_the_expert(drawn, tokens, top_k, seed):
    placement = from_owners(*drawn)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, placement.num_experts, (tokens, top_k), generator=generator)
    for layer in range(placement.num_layers):
        slots = ReplicaChooser(placement, layer).choose(ids)
        assert slots.dtype == torch.int64 and slots.shape == ids.shape
        assert ((slots == -1) == (ids == -1)).all() and (slots >= -1).all()
        expert_of_slot = torch.from_numpy(placement.slot_expert[layer].astype(np.int64))
        assert torch.equal(expert_of_slot[slots[ids >= 0]], ids[ids >= 0])
        assert torch.equal(slots, ReplicaChooser(placement, layer).choose(ids.to(torch.int32)))


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.9, 0.1), (0.2, 0.3, 0.5), (0.25,) * 4, (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("first", [0, 3])
def test_replicas_get_their_shares_of_the_tokens(shares, first):
    """Within 2 % of 10000 tokens, for an expert among others, and of any 500 tokens in a row within 5 %."""
    ranks = len(shares)
    placement = from_owners([[list(range(ranks)), [0], list(range(ranks)), list(range(ranks))]], ranks)
    share = placement.slot_share.copy()
    share[placement.slot_expert == first] = shares
    placement = replace(placement, slot_share=share)
    ids = torch.stack([torch.full((10_000,), first), torch.ones(10_000, dtype=torch.int64)], dim=1)
    slots = ReplicaChooser(placement, 0).choose(ids)[:, 0].numpy()
    rank_of_token = placement.slot_rank[slots]
    assert (np.abs(np.bincount(rank_of_token, minlength=ranks) / 10_000 - shares) <= 0.02).all()
    for start in range(0, 9_500, 250):
        run = np.bincount(rank_of_token[start : start + 500], minlength=ranks) / 500
        assert (np.abs(run - shares) <= 0.05).all()
    assert set(np.flatnonzero(np.bincount(rank_of_token, minlength=ranks))) == {r for r, s in enumerate(shares) if s}


def test_each_layer_has_replicas_of_its_own():
    placement = from_owners([[[0, 1], [0]], [[0], [0, 1]]], 2)
    ids = torch.tensor([[0, 1]] * 50)
    first, second = (ReplicaChooser(placement, layer).choose(ids) for layer in (0, 1))
    assert set(first[:, 0].tolist()) == {0, 2} and set(first[:, 1].tolist()) == {1}
    assert set(second[:, 0].tolist()) == {0} and set(second[:, 1].tolist()) == {1, 2}

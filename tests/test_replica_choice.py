"""Which replica a token takes: near ones first, or split anew for every batch so that the slowest rank is soon done."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from test_placement import owner_tables

import moe_runtime
from moe_runtime.core.errors import ConfigError
from moe_runtime.experts import placement as placements
from moe_runtime.experts import replicas
from moe_runtime.experts.placement import Rank, from_owners
from moe_runtime.experts.routing import ReplicaChooser


@st.composite
def batches(draw):
    """(placement, ids of each rank [T, K], seconds per token of each rank, node of each rank)."""
    owners, num_ranks = draw(owner_tables())
    placement = from_owners(owners, num_ranks)
    top_k = draw(st.integers(1, 4))
    tokens = draw(st.lists(st.integers(0, 40), min_size=num_ranks, max_size=num_ranks))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    favourite = random.integers(-1, placement.num_experts)  # some batches are skewed
    ids = []
    for count in tokens:
        drawn = random.integers(-1, placement.num_experts, (count, top_k))
        ids.append(np.where(random.random((count, top_k)) < 0.3, favourite, drawn))
    cost = random.choice([0.5, 1.0, 3.0], num_ranks)
    return placement, ids, cost, np.sort(random.integers(0, 3, num_ranks))


def chosen_by_all(placement, layer, ids, cost, nodes) -> list[np.ndarray]:
    """What every rank chooses, the exchange of counts being done by hand."""
    counts = [np.bincount(i[i >= 0], minlength=placement.num_experts) for i in ids]
    gathered = torch.from_numpy(np.stack(counts))

    def of_rank(rank: int) -> np.ndarray:
        def gather(mine: torch.Tensor) -> torch.Tensor:
            assert torch.equal(mine, gathered[rank])
            return gathered

        chooser = replicas.BalancedChooser(placement, layer, rank, cost, np.zeros(len(cost)), nodes, gather)
        return chooser.choose(torch.from_numpy(ids[rank])).numpy()

    return [of_rank(rank) for rank in range(len(ids))]


def slowest(placement, tokens_S, cost) -> float:
    return float((np.bincount(placement.slot_rank, tokens_S, len(cost)) * cost).max())


@given(batches(), st.data())
@settings(deadline=None)
def test_a_balanced_batch_goes_to_slots_of_its_experts_and_meets_the_quotas(drawn, data):
    placement, ids, cost, nodes = drawn
    layer = data.draw(st.integers(0, placement.num_layers - 1))
    slots = chosen_by_all(placement, layer, ids, cost, nodes)
    for mine, taken in zip(ids, slots, strict=True):
        assert taken.shape == mine.shape and ((taken < 0) == (mine < 0)).all()
        assert (placement.slot_expert[layer][taken[taken >= 0]] == mine[mine >= 0]).all()
    counts = sum(np.bincount(i[i >= 0], minlength=placement.num_experts) for i in ids)
    gather = torch.from_numpy
    quotas = replicas.BalancedChooser(placement, layer, 0, cost, 0 * cost, nodes, gather).quotas(counts)
    assert (np.bincount(placement.slot_expert[layer], quotas, placement.num_experts) == counts).all()
    all_slots = np.concatenate([taken[taken >= 0] for taken in slots])
    assert (np.bincount(all_slots, minlength=placement.num_slots) == quotas).all()


@given(batches())
@settings(deadline=None)
def test_a_balanced_batch_is_as_fast_as_its_shares_and_rounding_allow(drawn):
    placement, ids, cost, nodes = drawn
    slots = np.concatenate([taken[taken >= 0] for taken in chosen_by_all(placement, 0, ids, cost, nodes)])
    by_slot = np.bincount(slots, minlength=placement.num_slots)
    counts = sum(np.bincount(i[i >= 0], minlength=placement.num_experts) for i in ids)
    static = counts[placement.slot_expert[0]] * placement.slot_share[0]
    # Rounding gives a slot less than one token more, and a rank has so many slots.
    rounding = (np.bincount(placement.slot_rank, minlength=len(cost)) * cost).max()
    assert slowest(placement, by_slot, cost) <= slowest(placement, static, cost) * 1.001 + rounding


def test_own_replicas_come_first_then_those_of_the_node():
    everywhere = from_owners([[[0, 1, 2, 3]]], 4)
    ids = [np.zeros((tokens, 1), int) for tokens in (10, 30, 0, 40)]  # 20 for each rank
    slots = chosen_by_all(everywhere, 0, ids, np.ones(4), np.array([0, 0, 1, 1]))
    taken = [np.bincount(mine.ravel(), minlength=4).tolist() for mine in slots]
    assert taken == [[10, 0, 0, 0], [10, 20, 0, 0], [0, 0, 0, 0], [0, 0, 20, 20]]


def test_a_slow_rank_takes_fewer_tokens():
    everywhere = from_owners([[[0, 1]]], 2)
    slots = chosen_by_all(everywhere, 0, [np.zeros((60, 1), int), np.zeros((30, 1), int)], np.array([1.0, 2.0]), [0, 0])
    assert np.bincount(np.concatenate(slots).ravel()).tolist() == [60, 30]


def test_compiled_and_plain_python_choose_alike():
    random = np.random.default_rng(1)
    load = random.integers(1, 400, (1, 40))
    plan = placements.plan(load, 8, 56)
    counts = random.integers(0, 50, (8, 40))
    chooser = replicas.BalancedChooser(plan, 0, 3, plan.ranks.cost, plan.ranks.fixed, [0] * 4 + [1] * 4, None)
    plain = [getattr(f, "py_func", f) for f in (replicas.whole_quotas, replicas.tokens_to_slots, replicas.deal)]
    tokens = counts.sum(0)[plan.slot_expert[0]] * plan.slot_share[0]
    table = (chooser._slots, chooser._begin)
    ids = np.repeat(np.arange(40), counts[3])
    answers = []
    for quotas_of, take_of, dealt in (plain, (replicas.whole_quotas, replicas.tokens_to_slots, replicas.deal)):
        quota = quotas_of(tokens, *table)
        take = take_of(quota, counts, plan.slot_rank, np.repeat([0, 1], 4), *table, 3)
        answers.append((quota.tolist(), take.tolist(), dealt(ids, take, *table).tolist()))
    assert answers[0] == answers[1]


@given(owner_tables(), st.integers(0, 60), st.data())
def test_local_stays_on_the_rank_then_on_the_node(drawn, tokens, data):
    owners, num_ranks = drawn
    placement = from_owners(owners, num_ranks)
    rank = data.draw(st.integers(0, num_ranks - 1))
    node = {rank} | set(data.draw(st.lists(st.integers(0, num_ranks - 1))))
    ids = torch.arange(tokens).remainder(placement.num_experts).view(-1, 1)
    slots = ReplicaChooser(placement, 0, near=[[rank], node]).choose(ids)
    for expert, slot in zip(ids.view(-1).tolist(), slots.view(-1).tolist(), strict=True):
        there = set(owners[0][expert])
        assert placement.slot_expert[0, slot] == expert
        owner = placement.slot_rank[slot]
        assert owner == rank if rank in there else owner in node if node & there else owner in there


def balanced_on_ranks(speeds: list[float]) -> list:
    """A skewed batch through runtime.dispatcher: tokens that each rank computes, and the sums that come home."""
    owners = [list(range(len(speeds)))] * 4
    cost = [Rank(speed=speed, slots=4) for speed in speeds]
    plan = placements.plan(np.ones((1, 4)), cost, 4 * len(speeds))
    assert plan.slot_expert.shape == from_owners([owners], len(speeds)).slot_expert.shape
    with moe_runtime.init({"timeout_s": 60, "replica_choice": "balanced"}) as runtime:
        tokens = 90 if runtime.rank == 0 else 0
        x = torch.randn(tokens, 16)
        dispatcher = runtime.dispatcher(16, 4, 2, placement=plan)
        ids = torch.tensor([[0, 1]]).repeat(tokens, 1)
        rows, handle = dispatcher.dispatch(x, ids, torch.full((tokens, 2), 0.5))
        home = dispatcher.combine(rows, handle)
        torch.testing.assert_close(home, x)
        return [int(handle.rows_per_slot.sum()), runtime.describe()]


def test_ranks_compute_by_their_speed():
    results = run_ranks(balanced_on_ranks, 2, [1.0, 0.5])
    assert [tokens for tokens, _ in results] == [120, 60]


def describes(choice: str) -> str:
    with moe_runtime.init({"replica_choice": choice}) as runtime:
        runtime._shard(_model(), from_owners([[[0, 1] if e < 2 else [e % 2] for e in range(16)]], 2))
        return runtime.describe()


def _model():
    from families import family_config

    from moe_runtime.model import empty_model

    return empty_model(family_config("deepseek_v3"), torch.float32)


@pytest.mark.parametrize(
    "choice, said",
    [("static", "by the placement's shares"), ("local", "this rank's"), ("balanced", "balanced by every batch's")],
)
def test_describe_says_which(choice, said):
    assert f"replica choice: {said}" in run_ranks(describes, 2, choice)[1]


def test_an_unknown_choice_is_refused():
    with pytest.raises(ConfigError, match="replica_choice must be one of static, local, balanced, got 'best'"):
        moe_runtime.init({"replica_choice": "best"})

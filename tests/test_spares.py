"""No expert is left on one rank alone where slots allow it."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from test_lost_experts import held_by, placements

from moe_runtime.core.placement import Placement
from moe_runtime.experts.placement import Rank, plan
from moe_runtime.pays import Pays
from moe_runtime.rebalance import Look
from moe_runtime.spares import with_spares
from moe_runtime.views import spread


def copies(placement: Placement) -> np.ndarray:
    """[L, E]."""
    return np.stack([np.bincount(row, minlength=placement.num_experts) for row in placement.slot_expert])


@given(placements(), st.booleans())
def test_no_expert_is_on_one_rank_alone_where_there_are_slots(placement, with_load):
    load = np.arange(placement.num_layers * placement.num_experts).reshape(placement.num_layers, -1)
    safe = with_spares(
        placement, load if with_load else None
    )  # a Placement: no expert twice on a rank, shares sum to 1
    before, after = copies(placement), copies(safe)
    if placement.num_slots < 2 * placement.num_experts or before.min() >= 2:
        assert safe is placement
        return
    assert after.min() == 2 and ((after >= 2) >= (before >= 2)).all()
    assert np.array_equal(safe.slot_rank, placement.slot_rank)
    old, new = ([[set(layer) for layer in rank] for rank in held_by(one)] for one in (placement, safe))
    came = sum(len(b - a) for rank in zip(old, new, strict=True) for a, b in zip(*rank, strict=True))
    assert came == (before == 1).sum()


def test_the_slot_of_fewest_tokens_gives_way_and_its_share_goes_to_the_others():
    slots, ranks = [0, 1, 0, 2, 0, 2], [0, 0, 1, 1, 2, 2]
    placement = Placement(
        np.array([slots], dtype=np.int32),
        np.array(ranks, dtype=np.int32),
        np.array([[0.5, 1, 0.3, 0.5, 0.2, 0.5]]),
        3,
        3,
    )
    safe = with_spares(placement)
    assert safe.slot_expert.tolist() == [[0, 1, 0, 2, 1, 2]]
    np.testing.assert_allclose(safe.slot_share, [[0.625, 1, 0.375, 0.5, 0, 0.5]])


def test_a_policy_that_keeps_spares_does_so_where_speed_alone_would_not():
    given_up = 0
    for seed in range(40):
        load = np.random.default_rng(seed).pareto(1.0, (2, 8)) * 1000
        start = with_spares(plan(np.ones((2, 8)), [Rank(1.0, slots=6)] * 3))
        assert copies(start).min() == 2
        look = Look(1, 100, start, load, np.array([1e-3, 1e-3, 4e-3]), [1000, 1000], 1e9)
        plain, spared = Pays()(look), Pays(spares=True)(look)
        given_up += plain is not None and copies(plain).min() == 1
        assert spared is None or copies(spared).min() == 2
    assert given_up, "this shows nothing"


@given(st.integers(3, 5), st.data())
def test_spreading_keeps_spares(ranks, data):
    start = plan(np.ones((2, 16)), [Rank(1.0, slots=-(-32 // ranks))] * ranks)
    closed = [data.draw(st.integers(0, ranks - 1))]
    moved = spread(start, [1.0] * ranks, closed, start.num_slots, spares=True)
    assert copies(moved).min() == 2 and held_by(moved)[closed[0]] == [[], []]

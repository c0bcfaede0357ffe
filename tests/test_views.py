"""From what ranks hold to the placement of a new view: placement_of, after_loss, spread."""

from __future__ import annotations

import numpy as np
import pytest
from held import admit, keep
from hypothesis import given
from hypothesis import strategies as st
from test_lost_experts import held_by, losses, placements

from moe_runtime.core.errors import ConfigError
from moe_runtime.experts.placement import proportional
from moe_runtime.views import Held, after_loss, placement_of, spread


def all_held(placement):
    return [Held(*Held.of(placement, rank, None).as_message()) for rank in range(placement.num_ranks)]


@given(placements())
def test_what_all_ranks_say_they_hold_is_the_placement_they_are_in(placement):
    again = placement_of(all_held(placement), placement.num_experts)
    assert held_by(again) == held_by(placement) and again.absent is None
    np.testing.assert_allclose(again.slot_share, placement.slot_share, atol=1e-12)


@given(losses())
def test_after_a_loss_every_expert_is_held_again_or_the_user_is_told(drawn):
    placement, survivors = drawn
    found, size = keep(placement, survivors), len(survivors)
    load = np.ones((found.num_layers, found.num_experts))
    about = ([1.0] * size, [None] * size, load)
    if found.absent is None:
        assert after_loss(found, "replica", *about, False) == (found, "")
        return
    grown, told = after_loss(found, "reload", *about, True)
    assert grown.absent is None and "read from the checkpoint again" in told
    same, told = after_loss(found, "renormalise", *about, False)
    assert same is found and told.startswith("WARNING: ")
    with pytest.raises(ConfigError, match="plan replicas, or give --on-loss reload"):
        after_loss(found, "replica", *about, True)
    with pytest.raises(ConfigError, match="not loaded from a checkpoint"):
        after_loss(found, "reload", *about, False)


@given(st.integers(1, 4), st.integers(5, 12), st.data())
def test_who_leaves_is_emptied_who_has_come_is_given_some_and_every_expert_stays_held(ranks, experts, data):
    placement = admit(proportional(2, experts, [1.0] * ranks), ranks + data.draw(st.integers(0, 1)))
    size = placement.num_ranks
    closed = data.draw(st.sets(st.integers(0, size - 1), max_size=size - 1))
    moved = spread(placement, [1.0] * size, sorted(closed))
    count = np.bincount((moved or placement).slot_rank, minlength=size)
    assert all((count[rank] == 0) == (rank in closed) for rank in range(size))
    assert (moved or placement).absent is None
    if moved is not None:
        assert spread(moved, [1.0] * size, sorted(closed)) is None


def test_a_rank_for_which_there_is_no_expert_left_is_not_asked_for_again_and_again():
    placement = admit(proportional(2, 4, [1.0] * 4), 5)
    moved = spread(placement, [1.0] * 5)
    assert moved is None or spread(moved, [1.0] * 5) is None

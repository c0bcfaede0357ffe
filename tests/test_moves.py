"""What travels between two placements, in which pieces."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.experts.placement import from_owners
from moe_runtime.moves import cut_slices, kept_slots, list_moves, order_in_place


@st.composite
def changes(draw):
    """(old, new) placements of the same experts on the same ranks, with slots of their own."""
    num_ranks, num_experts, layers = draw(st.integers(1, 5)), draw(st.integers(1, 9)), draw(st.integers(1, 3))
    ranks = st.lists(st.integers(0, num_ranks - 1), min_size=1, max_size=num_ranks, unique=True)

    def placement():
        owners = draw(st.lists(ranks, min_size=num_experts, max_size=num_experts))
        return from_owners([draw(st.permutations(owners)) for _ in range(layers)], num_ranks)

    return placement(), placement()


@given(changes(), st.lists(st.integers(1, 90), min_size=3, max_size=3))
def test_every_expert_that_a_rank_lacks_comes_from_one_that_has_it(change, sizes):
    old, new = change
    sizes = sizes[: old.num_layers]
    moves = list_moves(old, new, sizes)
    for layer in range(old.num_layers):
        for rank in range(old.num_ranks):
            lacks = set(new.rank_experts(layer, rank)) - set(old.rank_experts(layer, rank))
            coming = [move for move in moves if (move.layer, move.destination) == (layer, rank)]
            assert sorted(move.expert for move in coming) == sorted(lacks)
            assert all(move.expert in old.rank_experts(layer, move.source) for move in coming)
            assert all(move.num_bytes == sizes[layer] for move in coming)


@given(changes(), st.integers(1, 90), st.integers(1, 200))
def test_slices_hold_all_bytes_in_order_and_no_rank_more_than_the_limit(change, size, limit):
    moves = list_moves(*change, [size] * change[0].num_layers)
    slices = cut_slices(moves, limit)
    seen = [0] * len(moves)
    for chunks in slices:
        assert chunks
        out, into = {}, {}
        for chunk in chunks:
            move, length = moves[chunk.move], chunk.end - chunk.begin
            assert chunk.begin == seen[chunk.move] and length > 0
            seen[chunk.move] = chunk.end
            out[move.source] = out.get(move.source, 0) + length
            into[move.destination] = into.get(move.destination, 0) + length
        assert max(*out.values(), *into.values()) <= limit
        assert chunks == sorted(chunks, key=lambda c: (moves[c.move].source, moves[c.move].destination, c.move))
    assert seen == [move.num_bytes for move in moves]


@given(st.sets(st.integers(0, 30), min_size=1), st.data())
def test_rows_that_stay_reach_their_slots_inside_one_array(before, data):
    before = sorted(before)
    after = sorted(data.draw(st.sets(st.integers(0, 30), min_size=len(before), max_size=len(before))))
    kept = np.array([before.index(expert) if expert in before else -1 for expert in after])
    rows = list(before)
    for source, target in order_in_place(kept):
        rows[target] = rows[source]
    assert all(rows[slot] == expert for slot, expert in enumerate(after) if kept[slot] >= 0)


def test_kept_slots_and_moves_of_a_small_change():
    old = from_owners([[[0], [0], [1], [1]]], 2)
    new = from_owners([[[0], [1], [0], [0, 1]]], 2)
    assert kept_slots(old, new, 0, 0).tolist() == [0, -1, -1]
    assert kept_slots(old, new, 0, 1).tolist() == [-1, 1]
    assert [str(move) for move in list_moves(old, new, [5])] == [
        "layer 0, expert 2, rank 1 -> rank 0",
        "layer 0, expert 3, rank 1 -> rank 0",
        "layer 0, expert 1, rank 0 -> rank 1",
    ]

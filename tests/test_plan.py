"""The dispatch plan against a brute-force oracle, C against numpy bit for bit, and the C module against hostile
arguments."""

from __future__ import annotations

import sys
import threading
import time
from array import array as Growing
from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_runtime.comm import plan
from moe_runtime.core import native
from moe_runtime.core.errors import ConfigError

needs_c = pytest.mark.skipif(native.extension is None, reason=f"the C extension is {native.reason}")
BACKENDS = ["numpy", pytest.param("C", marks=needs_c)]
DISPATCH = {"numpy": plan.plan_dispatch_numpy, "C": plan.plan_dispatch}
EXPAND = {"numpy": plan.plan_expand_numpy, "C": plan.plan_expand}


# ---------------------------------------------------------------- the oracle: plain loops, no numpy arithmetic


def dispatch_oracle(slots_TK: list[list[int]], slot_rank: list[int], num_ranks: int):
    counts, tokens, slots = [], [], []
    for rank in range(num_ranks):
        rows = [t for t, row in enumerate(slots_TK) if any(s >= 0 and slot_rank[s] == rank for s in row)]
        counts.append(len(rows))
        tokens += rows
        for t in rows:
            slots.append([s - slot_rank.index(rank) if s >= 0 and slot_rank[s] == rank else -1 for s in slots_TK[t]])
    return counts, tokens, slots


def expand_oracle(recv_slots_NK: list[list[int]], num_local_slots: int):
    entries = sorted((s, n, k) for n, row in enumerate(recv_slots_NK) for k, s in enumerate(row) if s >= 0)
    counts = [sum(1 for entry in entries if entry[0] == slot) for slot in range(num_local_slots)]
    return counts, [n for _, n, _ in entries], [k for _, _, k in entries]


def check_dispatch(actual: plan.DispatchPlan, expected, top_k: int) -> None:
    arrays = (actual.send_counts, actual.send_tokens, actual.send_slots)
    assert [a.dtype for a in arrays] == [np.int64, np.int64, np.int32]
    assert actual.send_slots.shape == (len(expected[1]), top_k)
    assert tuple(a.tolist() for a in arrays) == expected


def check_expand(actual: plan.ExpandPlan, expected) -> None:
    arrays = (actual.rows_per_slot, actual.row_index, actual.k_index)
    assert [a.dtype for a in arrays] == [np.int64] * 3
    assert tuple(a.tolist() for a in arrays) == expected


# ---------------------------------------------------------------- what is drawn


@st.composite
def tables(draw, num_slots: int, dtypes):
    """A table of slots: empty, wide, narrow, repeated slots, all -1."""
    top_k = draw(st.integers(1, 9))
    slot = st.integers(-1, num_slots - 1)
    rows = draw(st.lists(st.lists(slot, min_size=top_k, max_size=top_k), max_size=20))
    return np.array(rows, draw(st.sampled_from(dtypes))).reshape(len(rows), top_k)


@st.composite
def routings(draw):
    num_ranks = draw(st.integers(1, 6))  # some of them hold no slot
    slot_rank = np.array(sorted(draw(st.lists(st.integers(0, num_ranks - 1), max_size=12))), np.int32)
    return draw(tables(len(slot_rank), [np.int32, np.int64])), slot_rank, num_ranks


@st.composite
def received(draw):
    num_local_slots = draw(st.integers(0, 9))
    return draw(tables(num_local_slots, [np.int32])), num_local_slots


def table(rows, dtype=np.int64) -> np.ndarray:
    return np.array(rows, dtype)


def ranks(*slot_rank: int) -> np.ndarray:
    return np.array(slot_rank, np.int32)


# ---------------------------------------------------------------- facts


@pytest.mark.parametrize("backend", BACKENDS)
@given(routing=routings())
@example(routing=(np.zeros((0, 8), np.int32), ranks(0, 0, 1), 2))  # no token
@example(routing=(table([[-1], [-1]]), ranks(), 3))  # no slot at all
@example(routing=(table([[2, 2, 2, 0]]), ranks(0, 0, 2), 4))  # repeated slots; ranks 1 and 3 hold none
@settings(deadline=None)
def test_dispatch_is_the_oracles(backend, routing):
    slots_TK, slot_rank, num_ranks = routing
    expected = dispatch_oracle(slots_TK.tolist(), slot_rank.tolist(), num_ranks)
    check_dispatch(DISPATCH[backend](slots_TK, slot_rank, num_ranks), expected, slots_TK.shape[1])


@pytest.mark.parametrize("backend", BACKENDS)
@given(rows=received())
@example(rows=(np.zeros((0, 8), np.int32), 4))
@example(rows=(table([[-1, -1]], np.int32), 0))
@example(rows=(table([[1, 1], [0, 1]], np.int32), 3))
@settings(deadline=None)
def test_expand_is_the_oracles(backend, rows):
    recv_slots, num_local_slots = rows
    check_expand(EXPAND[backend](recv_slots, num_local_slots), expand_oracle(recv_slots.tolist(), num_local_slots))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_goes_once_to_each_rank(backend):
    result = DISPATCH[backend](table([[0, 3, 1, -1], [-1, -1, -1, -1], [3, 2, 3, 4]]), ranks(0, 0, 1, 1, 3), 4)
    assert result.send_counts.tolist() == [1, 2, 0, 1]
    assert result.send_tokens.tolist() == [0, 0, 2, 2]
    assert result.send_slots.tolist() == [[0, -1, 1, -1], [-1, 1, -1, -1], [1, 0, 1, -1], [-1, -1, -1, 0]]


@needs_c
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("num_ranks", [1, 2, 8, 64])
def test_c_and_numpy_agree_bitwise_at_real_size(num_ranks, dtype):
    generator = np.random.default_rng(num_ranks)
    slot_rank = np.sort(generator.integers(0, num_ranks, 256)).astype(np.int32)
    slots_TK = generator.integers(-1, 256, (1031, 8)).astype(dtype)
    by_c, by_numpy = (f(slots_TK, slot_rank, num_ranks) for f in (plan.plan_dispatch, plan.plan_dispatch_numpy))
    for name in ("send_counts", "send_tokens", "send_slots"):
        ours, twin = getattr(by_c, name), getattr(by_numpy, name)
        assert (ours.dtype, ours.shape, ours.tobytes()) == (twin.dtype, twin.shape, twin.tobytes()), name
    by_c, by_numpy = (f(by_c.send_slots, 256) for f in (plan.plan_expand, plan.plan_expand_numpy))
    for name in ("rows_per_slot", "row_index", "k_index"):
        ours, twin = getattr(by_c, name), getattr(by_numpy, name)
        assert (ours.dtype, ours.shape, ours.tobytes()) == (twin.dtype, twin.shape, twin.tobytes()), name


def test_without_the_extension_the_twins_run(monkeypatch):
    monkeypatch.setattr(native, "extension", None)
    check_dispatch(plan.plan_dispatch(table([[0, 1]]), ranks(0, 1), 2), ([1, 1], [0, 0], [[0, -1], [-1, 0]]), 2)
    check_expand(plan.plan_expand(table([[1, 0]], np.int32), 2), ([1, 1], [0, 0], [1, 0]))


# ---------------------------------------------------------------- what a user gets wrong: the same words from both

BAD_DISPATCH = {
    "slot past the last": ((table([[0, 1], [1, 2]]), ranks(0, 1), 2), r"token 1, k 1: slot 2 .* number of slots, 2"),
    "slot below -1": ((table([[0], [-2]]), ranks(0, 1), 2), r"token 1, k 0: slot -2 "),
    "first of several": ((table([[0, 9], [-7, 9]]), ranks(0, 1), 2), r"token 0, k 1: slot 9 "),
    "beyond int32": ((table([[2**40]]), ranks(0), 1), r"token 0, k 0: slot 1099511627776 "),
    "lowest int64": ((table([[-(2**63)]]), ranks(0), 1), r"token 0, k 0: slot -9223372036854775808 "),
    "no slots": ((table([[0]]), ranks(), 1), r"token 0, k 0: slot 0 .* number of slots, 0"),
    "rank past the last": ((table([[0]]), ranks(0, 2), 2), r"slot_rank: slot 1 lives on rank 2"),
    "negative rank": ((table([[0]]), ranks(0, -(2**31)), 2), r"slot_rank: slot 1 lives on rank -2147483648"),
    "ranks decrease": ((table([[0]]), ranks(0, 1, 0), 2), r"slot_rank: decreases at slot 2, to rank 0"),
    "no rank": ((table([[0]]), ranks(0), 0), r"num_ranks: .* not 0"),
    "too many ranks": ((table([[0]]), ranks(0), 2**40), r"num_ranks: "),
    "float ranks": ((table([[0]]), ranks(0), 1.0), r"num_ranks: .* not 1.0"),
    "list": (([[0]], ranks(0), 1), r"slots_TK: must be a numpy array, not list"),
    "float slots": ((table([[0]], np.float64), ranks(0), 1), r"slots_TK: must be int32 or int64, not float64"),
    "int64 slot_rank": ((table([[0]]), table([0]), 1), r"slot_rank: must be int32, not int64"),
    "flat slots": ((table([0]), ranks(0), 1), r"slots_TK: must have 2 dimensions, not shape \(1,\)"),
    "transposed": ((table([[0, 0], [0, 0]]).T, ranks(0), 1), r"slots_TK: must be C-contiguous"),
}
BAD_EXPAND = {
    "slot past the last": ((table([[0, -1], [-1, 3]], np.int32), 3), r"row 1, k 1: slot 3 .* number of slots, 3"),
    "slot below -1": ((table([[-2]], np.int32), 3), r"row 0, k 0: slot -2 "),
    "int64": ((table([[0]]), 3), r"recv_slots_NK: must be int32, not int64"),
    "negative count": ((table([[-1]], np.int32), -1), r"num_local_slots: .* not -1"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", BAD_DISPATCH)
def test_dispatch_names_what_is_wrong(case, backend):
    arguments, message = BAD_DISPATCH[case]
    with pytest.raises(ConfigError, match=message):
        DISPATCH[backend](*arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", BAD_EXPAND)
def test_expand_names_what_is_wrong(case, backend):
    arguments, message = BAD_EXPAND[case]
    with pytest.raises(ConfigError, match=message):
        EXPAND[backend](*arguments)


@needs_c
@pytest.mark.parametrize("case", BAD_DISPATCH)
def test_both_twins_say_the_same(case):
    said = []
    for function in DISPATCH.values():
        with pytest.raises(ConfigError) as caught:
            function(*BAD_DISPATCH[case][0])
        said.append(str(caught.value))
    assert said[0] == said[1]


# ---------------------------------------------------------------- the C module, called by someone careless or hostile


def dispatch_arguments() -> dict[str, np.ndarray]:
    """Valid arguments of dispatch_fill; the first three are those of dispatch_count."""
    return {
        "slots_TK": table([[0, 2], [1, -1], [2, 3]]),
        "slot_rank": ranks(0, 0, 1, 1),
        "send_counts": table([2, 2]),
        "send_tokens": np.zeros(4, np.int64),
        "send_slots": np.zeros((4, 2), np.int32),
    }


def expand_arguments() -> dict[str, np.ndarray]:
    """Valid arguments of expand_fill; the first two are those of expand_count."""
    return {
        "recv_slots_NK": table([[0, 1], [1, -1]], np.int32),
        "rows_per_slot": table([1, 2]),
        "row_index": np.zeros(3, np.int64),
        "k_index": np.zeros(3, np.int64),
    }


FUNCTIONS = {
    "dispatch_count": (dispatch_arguments, 3, {"send_counts"}),
    "dispatch_fill": (dispatch_arguments, 5, {"send_tokens", "send_slots"}),
    "expand_count": (expand_arguments, 2, {"rows_per_slot"}),
    "expand_fill": (expand_arguments, 4, {"row_index", "k_index"}),
}


def call(function: str, **changes):
    make, count, _ = FUNCTIONS[function]
    return getattr(native.extension, function)(*list({**make(), **changes}.values())[:count])


def each_argument(outputs_only: bool = False) -> list:
    return [
        pytest.param(function, name, id=f"{function}-{name}")
        for function, (make, count, outputs) in FUNCTIONS.items()
        for name in list(make())[:count]
        if name in outputs or not outputs_only
    ]


def strided(array: np.ndarray) -> np.ndarray:
    """The same values with a gap after each item of the last dimension."""
    wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
    wide[..., ::2] = array
    return wide[..., ::2]


def misaligned(array: np.ndarray) -> np.ndarray:
    raw = np.zeros(array.nbytes + 1, np.uint8)
    result = raw[1:].view(array.dtype).reshape(array.shape)
    result[...] = array
    return result


UNUSABLE = {
    "not an array": lambda a: None,
    "a list": lambda a: a.tolist(),
    "a number": lambda a: 7,
    "bytes": lambda a: a.tobytes(),
    "float64": lambda a: a.astype(np.float64),
    "float32": lambda a: a.astype(np.float32),
    "int16": lambda a: a.astype(np.int16),
    "uint32": lambda a: a.astype(np.uint32),
    "uint64": lambda a: a.astype(np.uint64),
    "complex64, of 8 bytes": lambda a: a.astype(np.complex64),
    "datetime": lambda a: a.astype("datetime64[s]"),
    "objects": lambda a: a.astype(object),
    "a record": lambda a: np.zeros(a.shape, [("x", np.int32)]),
    "other byte order": lambda a: a.astype(a.dtype.newbyteorder()),
    "one dimension more": lambda a: a[None],
    "no dimension": lambda a: a.ravel()[:1].reshape(()),
    "strided": strided,
    "reversed": lambda a: a[::-1],
    "broadcast": lambda a: np.broadcast_to(a.ravel()[0], a.shape),
    "misaligned": misaligned,
}


@needs_c
@pytest.mark.parametrize("function", FUNCTIONS)
def test_valid_arguments_are_taken(function):
    assert call(function) == {"dispatch_count": 4, "expand_count": 3}.get(function)


@needs_c
@pytest.mark.parametrize("how", UNUSABLE)
@pytest.mark.parametrize("function, name", each_argument())
def test_unusable_arrays_are_refused_by_name(function, name, how):
    with pytest.raises(ValueError, match=f"^{name}: "):
        call(function, **{name: UNUSABLE[how](FUNCTIONS[function][0]()[name])})


@needs_c
@pytest.mark.parametrize("function, name", each_argument())
def test_integers_of_the_other_width_are_refused(function, name):
    array = FUNCTIONS[function][0]()[name]
    other = array.astype(np.int32 if array.dtype == np.int64 else np.int64)
    if name == "slots_TK":  # the one that may be either
        call(function, **{name: other})
    else:
        with pytest.raises(ValueError, match=f"^{name}: must be {array.dtype}"):
            call(function, **{name: other})


@needs_c
@pytest.mark.parametrize("function, name", each_argument(outputs_only=True))
def test_read_only_outputs_are_refused(function, name):
    output = FUNCTIONS[function][0]()[name]
    output.flags.writeable = False
    with pytest.raises(ValueError, match=f"^{name}: must be an array that can be written to"):
        call(function, **{name: output})
    with pytest.raises(ValueError, match=f"^{name}: must be an array that can be written to"):
        call(function, **{name: memoryview(output)})


@needs_c
@pytest.mark.parametrize("function", FUNCTIONS)
def test_read_only_inputs_are_taken(function):
    make, count, outputs = FUNCTIONS[function]
    arguments = make()
    for name in set(list(arguments)[:count]) - outputs:
        arguments[name].flags.writeable = False
    call(function, **arguments)


@needs_c
@pytest.mark.parametrize(
    "function, name, length",
    [
        (function, name, length)
        for function, names in {
            "dispatch_fill": ("send_counts", "send_tokens", "send_slots"),
            "expand_fill": ("rows_per_slot", "row_index", "k_index"),
        }.items()
        for name in names
        for length in (0, 1, 9)
    ],
)
def test_lengths_that_disagree_are_refused(function, name, length):
    array = FUNCTIONS[function][0]()[name]
    with pytest.raises(ValueError):
        call(function, **{name: np.resize(array, (length, *array.shape[1:]))})


@needs_c
def test_outputs_of_another_width_are_refused():
    for width in (0, 1, 3):
        with pytest.raises(ValueError, match="^send_slots: "):
            call("dispatch_fill", send_slots=np.zeros((4, width), np.int32))


@needs_c
def test_outputs_that_overlap_are_refused():
    memory = np.zeros(64, np.int64)
    overlapping = {"send_tokens": memory[:4], "send_slots": memory[3:7].view(np.int32).reshape(4, 2)}
    with pytest.raises(ValueError, match="^send_tokens and send_slots overlap"):
        call("dispatch_fill", **overlapping)
    with pytest.raises(ValueError, match="^row_index and k_index overlap"):
        call("expand_fill", row_index=memory[:3], k_index=memory[2:5])
    neighbours = {"row_index": memory[:3], "k_index": memory[3:6]}
    assert call("expand_fill", **neighbours) is None


@needs_c
@pytest.mark.parametrize(
    "function, output, source",
    [
        ("dispatch_count", "send_counts", "slots_TK"),
        ("dispatch_fill", "send_tokens", "slots_TK"),
        ("dispatch_fill", "send_tokens", "send_counts"),
        ("dispatch_fill", "send_slots", "slot_rank"),
        ("expand_count", "rows_per_slot", "recv_slots_NK"),
        ("expand_fill", "row_index", "rows_per_slot"),
        ("expand_fill", "k_index", "recv_slots_NK"),
    ],
)
def test_an_output_on_top_of_an_input_is_refused(function, output, source):
    arguments = FUNCTIONS[function][0]()
    memory = np.zeros(256, np.uint8)
    for name in (source, output):
        part = memory[: arguments[name].nbytes].view(arguments[name].dtype).reshape(arguments[name].shape)
        part[...] = arguments[name]
        arguments[name] = part
    with pytest.raises(ValueError, match="overlap in memory"):
        call(function, **arguments)


@needs_c
def test_inputs_may_share_memory():
    shared = ranks(0, 0, 1, 1)
    counts = np.zeros(2, np.int64)
    assert native.extension.dispatch_count(shared.reshape(2, 2), shared, counts) == 2
    assert counts.tolist() == [2, 0]


@needs_c
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_wrong_number_of_arguments_is_a_type_error(function):
    make, count, _ = FUNCTIONS[function]
    for given_count in (0, count - 1, count + 1):
        with pytest.raises(TypeError, match=f"expected {count} arguments, got {given_count}"):
            getattr(native.extension, function)(*([*make().values(), 0, 0][:given_count]))


TWO_COUNTS = st.lists(st.integers(-1, 4) | st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=2)


@needs_c
@given(counts=TWO_COUNTS, rows=st.integers(0, 6))
@example(counts=[2**62, -(2**62) + 4], rows=4)  # a sum that comes out right although no part of it can be
@example(counts=[3, 1], rows=4)
@settings(deadline=None)
def test_counts_of_other_slots_never_write_outside_the_outputs(counts, rows):
    """What a thread that changes the routing between the two calls would cause."""
    guarded = [np.full(rows + 8, 77, np.int64), np.full((rows + 8, 2), 77, np.int32)]
    tokens, slots = (a[4 : 4 + rows] for a in guarded)
    if counts == [2, 2] and rows == 4:
        assert call("dispatch_fill", send_tokens=tokens, send_slots=slots) is None
    else:
        with pytest.raises(ValueError, match="^send_counts: "):
            call("dispatch_fill", send_counts=table(counts), send_tokens=tokens, send_slots=slots)
    for array in guarded:
        assert (array[:4] == 77).all() and (array[4 + rows :] == 77).all()


@needs_c
@given(counts=TWO_COUNTS, rows=st.integers(0, 6))
@example(counts=[0, 3], rows=3)
@settings(deadline=None)
def test_counts_of_other_rows_never_write_outside_the_outputs(counts, rows):
    guarded = [np.full(rows + 8, 77, np.int64) for _ in range(2)]
    row_index, k_index = (a[4 : 4 + rows] for a in guarded)
    if counts == [1, 2] and rows == 3:
        assert call("expand_fill", row_index=row_index, k_index=k_index) is None
    else:
        with pytest.raises(ValueError, match="^rows_per_slot: "):
            call("expand_fill", rows_per_slot=table(counts), row_index=row_index, k_index=k_index)
    for array in guarded:
        assert (array[:4] == 77).all() and (array[4 + rows :] == 77).all()


@needs_c
def test_a_table_that_claims_endless_rows_of_no_columns_returns_at_once():
    endless = np.zeros((2**50, 0), np.int32)
    assert native.extension.expand_count(endless, np.zeros(2, np.int64)) == 0
    assert native.extension.dispatch_count(endless, ranks(0), np.zeros(1, np.int64)) == 0


@needs_c
@pytest.mark.parametrize("length, outcome", [(3, nullcontext()), (1, pytest.raises(ValueError, match="^k_index: "))])
def test_buffers_are_given_back(length, outcome):
    """An array.array cannot grow while anyone holds its buffer: neither after success nor after an error."""
    growing = {
        "rows_per_slot": Growing("q", [1, 2]),
        "row_index": Growing("q", [0] * 3),
        "k_index": Growing("q", [0] * length),
    }
    with outcome:
        call("expand_fill", **growing)
    for values in growing.values():
        values.append(0)


@needs_c
def test_the_gil_is_released_while_c_works():
    """The main thread runs inside one call of another, although that one is never asked to make way."""
    slots_TK, counts = np.zeros((2_000_000, 8), np.int32), np.zeros(1, np.int64)
    ticks, seen = 0, 0

    def work():
        nonlocal seen
        before = ticks
        native.extension.dispatch_count(slots_TK, ranks(0), counts)
        seen = ticks - before

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # otherwise the interpreter itself may switch right after the call
    try:
        thread = threading.Thread(target=work)
        thread.start()
        while thread.is_alive():
            ticks += 1
            time.sleep(0)
    finally:
        sys.setswitchinterval(interval)
    assert counts.tolist() == [2_000_000]
    assert seen > 0

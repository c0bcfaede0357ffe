"""The contract of dispatch and combine, for 1 to 4 ranks and for whatever transport joins them.

Routings and tokens are seeded for every rank, so each rank knows what all others send and traces received rows to
their source by value. Experts are elementwise (x * scale_e + shift_e): their results do not depend on how rows are
batched, so differences between placements can be told from rounding. The oracle is plain torch in float64.
"""

from __future__ import annotations

import functools
import os
import re
import time
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ranks import run_ranks

import moe_runtime
from moe_runtime.errors import ConfigError, MoeRuntimeError, PeerLost, PeerTimeout
from moe_runtime.experts.placement import from_owners, proportional

SIZES = [1, 2, 3, 4]
FORMS = [True, False]  # expand
ALL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Case:
    """One exchange: `tokens` of each rank (repeated cyclically), how ids are drawn, and where the experts live."""

    tokens: tuple[int, ...] = (5, 9, 3, 7)
    routing: str = "distinct"
    hidden: int = 16
    experts: int = 10
    top_k: int = 4
    dtype: torch.dtype = torch.float32
    where: str = "equal"
    ids_dtype: torch.dtype = torch.int64

    def placement(self, size: int):
        experts, last = range(self.experts), size - 1
        owners = {
            "equal": None,
            "most on the last rank": [[r] if r < last and e == r else [last] for e in experts for r in [min(e, last)]],
            "none on rank 0": [[1 + e % last if last else 0] for e in experts],
            "interleaved": [[e % size] for e in experts],
            "replicas": [sorted({e % size, (e // 2 + 1) % size}) for e in experts],
            "everywhere": [list(range(size)) for _ in experts],
        }[self.where]
        return proportional(1, self.experts, [1.0] * size) if owners is None else from_owners([owners], size)

    def ids(self, rank: int) -> torch.Tensor:
        """[T, K] expert ids of one rank; any rank can draw any other's."""
        tokens, generator = self.tokens[rank % len(self.tokens)], torch.Generator().manual_seed(100 + rank)
        order = torch.rand(tokens, self.experts, generator=generator).argsort(1)[:, : self.top_k]
        repeated = torch.randint(self.experts, (tokens, self.top_k), generator=generator)
        holes = torch.rand(tokens, self.top_k, generator=generator) < 0.4
        return {
            "distinct": order,
            "repeated": repeated,
            "holes": repeated.masked_fill(holes, -1),
            "nothing": torch.full_like(repeated, -1),
            "first expert": torch.zeros_like(repeated),
            "last expert": torch.full_like(repeated, self.experts - 1),
            "half the experts": repeated % max(self.experts // 2, 1),
        }[self.routing].to(self.ids_dtype)

    def tokens_of(self, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(x [T, H], ids [T, K], weights [T, K]) of one rank. x[:, 0] numbers the tokens, so no two rows are equal."""
        ids, generator = self.ids(rank), torch.Generator().manual_seed(200 + rank)
        x = torch.randn(len(ids), self.hidden, generator=generator, dtype=torch.float64)
        x[:, 0] = 64 * rank + torch.arange(len(ids)) - 100
        weights = torch.rand(ids.shape, generator=generator, dtype=torch.float64)
        return x.to(self.dtype), ids, weights.to(torch.float64 if self.dtype == torch.float64 else torch.float32)

    def expert_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale [E, H], shift [E, H]) of the elementwise experts."""
        generator = torch.Generator().manual_seed(300)
        draw = functools.partial(torch.randn, self.experts, self.hidden, generator=generator, dtype=torch.float64)
        return draw().to(self.dtype), draw().to(self.dtype)


CASES = {
    "distinct experts": Case(),
    "repeated experts": Case(routing="repeated"),
    "ids of -1": Case(routing="holes"),
    "no expert selected": Case(routing="nothing"),
    "all to the first expert": Case(routing="first expert"),
    "all to the last expert": Case(routing="last expert"),
    "ranks without rows": Case(routing="half the experts"),
    "no token anywhere": Case(tokens=(0,)),
    "only rank 0 has tokens": Case(tokens=(7, 0, 0, 0)),
    "rank 0 has no token": Case(tokens=(0, 4, 1, 6), routing="holes"),
    "many rows": Case(tokens=(300, 500), hidden=600, experts=32, top_k=8),
    "one token": Case(tokens=(1,), top_k=1),
    "H = 1": Case(hidden=1),
    "H = 7": Case(hidden=7),
    "H = 129": Case(hidden=129),
    "H = 129, bfloat16": Case(hidden=129, dtype=torch.bfloat16),
    "H = 7, bfloat16, K = 3": Case(hidden=7, dtype=torch.bfloat16, top_k=3),
    "int32 ids": Case(routing="holes", ids_dtype=torch.int32),
    "most slots on the last rank": Case(where="most on the last rank", routing="holes"),
    "a rank without slots": Case(where="none on rank 0", routing="holes"),
    "interleaved": Case(where="interleaved"),
    "replicas": Case(where="replicas", routing="holes", tokens=(20, 31, 0, 9)),
    "an expert on every rank": Case(where="everywhere", routing="repeated", tokens=(11, 20, 8, 0)),
    **{f"K = {k}": Case(top_k=k, routing=("distinct", "holes")[k % 2]) for k in range(1, 9)},
    **{str(dtype): Case(dtype=dtype, routing="holes", where="replicas") for dtype in ALL_DTYPES},
}


def apply_experts(case: Case, placement, rank: int, rows, handle, values=None) -> torch.Tensor:
    """What a caller does between dispatch and combine, for both forms, in the most careless way that is allowed.

    Without rows it returns a tensor that has nothing to do with them. Where an expert is elsewhere it computes with
    another one and counts on the weight there, 0, to hide that; gradients must be hidden as well.
    """
    scale, shift = values or case.expert_values()
    expert_of_slot = torch.from_numpy(placement.slot_expert[0, placement.rank_slots(rank)].astype("int64"))
    if not len(rows):
        return torch.zeros(rows.shape, dtype=case.dtype)
    if handle.expand:
        expert_M = expert_of_slot.repeat_interleave(torch.from_numpy(handle.rows_per_slot))
        return rows * scale[expert_M] + shift[expert_M]
    partial = torch.zeros(rows.shape, dtype=torch.float64 if case.dtype == torch.float64 else torch.float32)
    for k in range(case.top_k):
        expert_N = expert_of_slot[handle.topk_slots[:, k].clamp(min=0).long()]
        out = rows * scale[expert_N] + shift[expert_N]
        partial = partial + out.to(partial.dtype) * handle.topk_weights[:, k : k + 1]
    return partial.to(case.dtype)


def oracle(x, ids, weights, scale, shift) -> tuple[torch.Tensor, torch.Tensor]:
    """(y [T, H] in float64, the sum of the absolute values that went into it), in plain torch."""
    x, weights, scale, shift = (t.double() for t in (x, weights, scale, shift))
    ids = ids.long()
    chosen = (weights * (ids >= 0)).unsqueeze(-1)  # [T, K, 1]
    scaled, shifted = x.unsqueeze(1) * scale[ids.clamp(min=0)], shift[ids.clamp(min=0)]
    return (chosen * (scaled + shifted)).sum(1), (chosen * (scaled.abs() + shifted.abs())).sum(1)


def assert_equals_oracle(case: Case, y, x, ids, weights) -> None:
    expected, magnitude = oracle(x, ids, weights, *case.expert_values())
    assert y.dtype == case.dtype and y.shape == x.shape
    allowed = torch.finfo(case.dtype).eps * (case.top_k + 4) * magnitude
    assert ((y.double() - expected).abs() <= allowed).all()


def as_bytes(row: torch.Tensor) -> bytes:
    return row.detach().contiguous().view(torch.uint8).numpy().tobytes()


# ---------------------------------------------------------------- what arrives, and what comes home


def trace_case(runtime, case: Case, expand: bool) -> list[tuple[int, int, int, int]]:
    """One dispatch on this rank: (source rank, token, k, expert) of every (row, slot) pair that arrived here."""
    placement = case.placement(runtime.size)
    dispatcher = runtime.dispatcher(case.hidden, case.experts, case.top_k, case.dtype, placement)
    rows, handle = dispatcher.dispatch(*case.tokens_of(runtime.rank), expand=expand)
    sent = [case.tokens_of(rank) for rank in range(runtime.size)]
    source_of = {as_bytes(row): (rank, t) for rank, (x, _, _) in enumerate(sent) for t, row in enumerate(x)}
    experts_here = placement.rank_experts(0, runtime.rank)

    assert rows.dtype == case.dtype and rows.shape[1] == case.hidden
    assert len(handle.rows_per_slot) == len(experts_here)
    sources = [source_of[as_bytes(row)] for row in rows]  # a KeyError here is a row that nobody sent
    pairs = []
    if expand:
        assert rows.shape[0] == handle.rows_per_slot.sum() == len(handle.choice_index)
        slot_M = torch.arange(len(experts_here)).repeat_interleave(torch.from_numpy(handle.rows_per_slot))
        for (rank, token), k, slot in zip(sources, handle.choice_index.tolist(), slot_M.tolist(), strict=True):
            pairs.append((rank, token, k, experts_here[slot]))
        arrived = {(rank, token) for rank, token, _, _ in pairs}
    else:
        arrived = set(sources)
        assert len(arrived) == len(sources), "a token crossed to this rank more than once"
        assert handle.topk_slots.shape == handle.topk_weights.shape == (len(rows), case.top_k)
        for (rank, token), slots, weights in zip(sources, handle.topk_slots, handle.topk_weights, strict=True):
            assert (weights[slots < 0] == 0).all()
            assert torch.equal(weights[slots >= 0], sent[rank][2][token][slots >= 0])
            pairs += [(rank, token, k, experts_here[s]) for k, s in enumerate(slots.tolist()) if s >= 0]
        assert [sum(rank == r for r, _ in sources) for rank in range(runtime.size)] == handle.recv_counts
        assert [rank for rank, _ in sources] == sorted(rank for rank, _ in sources)
    # Rows that crossed = distinct (token, rank) pairs: never one per expert.
    assert sum(handle.recv_counts) == len(arrived)
    return sorted(pairs)


def trace_all(cases: dict[str, Case]) -> dict:
    with moe_runtime.init({"timeout_s": 60}) as runtime:
        return {(name, expand): trace_case(runtime, case, expand) for name, case in cases.items() for expand in FORMS}


@pytest.mark.parametrize("size", SIZES)
def test_every_selected_expert_gets_its_token_once_and_nobody_else_does(size):
    per_rank = run_ranks(trace_all, size, CASES)
    for name, case in CASES.items():
        ids = [case.ids(rank) for rank in range(size)]
        wanted = sorted(
            (rank, token, k, int(ids[rank][token, k]))
            for rank in range(size)
            for token, k in (ids[rank] >= 0).nonzero().tolist()
        )
        for expand in FORMS:
            got = sorted(pair for traced in per_rank for pair in traced[name, expand])
            assert got == wanted, (name, expand)
            if case.where in ("replicas", "everywhere"):
                continue
            owner = {int(e): int(r) for e, r in zip(*_first_layer(case.placement(size)), strict=True)}
            for rank, traced in enumerate(per_rank):
                assert all(owner[expert] == rank for _, _, _, expert in traced[name, expand]), (name, expand)


def _first_layer(placement):
    return placement.slot_expert[0], placement.slot_rank


def run_case(runtime, case: Case, expand: bool, placement=None) -> torch.Tensor:
    placement = placement or case.placement(runtime.size)
    dispatcher = runtime.dispatcher(case.hidden, case.experts, case.top_k, case.dtype, placement)
    rows, handle = dispatcher.dispatch(*case.tokens_of(runtime.rank), expand=expand)
    return dispatcher.combine(apply_experts(case, placement, runtime.rank, rows, handle), handle)


def combine_all(cases: dict[str, Case]) -> int:
    """Every case and form: equal to the oracle, the same bits when repeated, also with several threads."""
    compared = 0
    with moe_runtime.init({"timeout_s": 60}) as runtime:
        for name, case in cases.items():
            for expand in FORMS:
                y = run_case(runtime, case, expand)
                try:
                    assert_equals_oracle(case, y, *case.tokens_of(runtime.rank))
                    torch.set_num_threads(3)
                    assert torch.equal(y, run_case(runtime, case, expand)), "other bits the second time"
                except AssertionError as error:
                    raise AssertionError(f"{name}, expand={expand}: {error}") from error
                finally:
                    torch.set_num_threads(1)
                compared += 1
    return compared


@pytest.mark.parametrize("size", SIZES)
def test_combine_equals_plain_torch_and_repeats_bit_for_bit(size):
    assert run_ranks(combine_all, size, CASES) == [2 * len(CASES)] * size


def combine_under_placements(case: Case) -> int:
    with moe_runtime.init({"timeout_s": 60}) as runtime:
        places = ["equal", "most on the last rank", "none on rank 0", "interleaved", "replicas", "everywhere"]
        first, *others = (run_case(runtime, replace(case, where=where), expand=True) for where in places)
        assert all(torch.equal(first, other) for other in others)
        return len(others)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_expanded_combine_has_the_same_bits_under_every_placement(size, dtype):
    case = Case(tokens=(40, 0, 33, 21), routing="holes", top_k=8, hidden=33, dtype=dtype)
    assert run_ranks(combine_under_placements, size, case) == [5] * size


def test_expanded_combine_has_the_same_bits_on_any_number_of_ranks():
    """Rank 0 alone has tokens: what it gets must not depend on who else is there."""
    case = Case(tokens=(40, 0, 0, 0), routing="holes", top_k=8, hidden=33)
    with moe_runtime.init() as runtime:
        alone = run_case(runtime, case, expand=True)
    for size in (2, 4):
        assert as_bytes(alone) == run_ranks(result_bytes, size, case)[0]


def result_bytes(case: Case) -> bytes:
    with moe_runtime.init({"timeout_s": 60}) as runtime:
        return as_bytes(run_case(runtime, case, expand=True))


def two_handles_at_once(case: Case) -> int:
    with moe_runtime.init({"timeout_s": 60}) as runtime:
        placement, (x, ids, weights) = case.placement(runtime.size), case.tokens_of(runtime.rank)
        dispatcher = runtime.dispatcher(case.hidden, case.experts, case.top_k, case.dtype, placement)
        batches = [(x, ids, weights), (x[:2] * 2, ids[:2], weights[:2])]
        sent = [dispatcher.dispatch(*batch, expand=expand) for batch in batches for expand in FORMS]
        for batch, (rows, handle) in reversed(list(zip([b for b in batches for _ in FORMS], sent, strict=True))):
            y = dispatcher.combine(apply_experts(case, placement, runtime.rank, rows, handle), handle)
            assert_equals_oracle(case, y, *batch)
        return len(sent)


def test_handles_may_be_outstanding_together_and_combined_in_any_order():
    assert run_ranks(two_handles_at_once, 3, Case(tokens=(5, 0, 9), routing="holes")) == [4] * 3


# ---------------------------------------------------------------- gradients

GRADIENT_CASES = {
    "distinct": Case(dtype=torch.float64),
    "float32": Case(routing="holes"),
    "bfloat16": Case(routing="holes", dtype=torch.bfloat16, hidden=9),
    "replicas": Case(dtype=torch.float64, where="replicas", routing="holes", hidden=7),
    "slots without rows": Case(dtype=torch.float64, routing="half the experts"),
    "slots without rows, one rank does all": Case(dtype=torch.float64, routing="first expert"),
    "a rank without slots": Case(dtype=torch.float64, where="none on rank 0"),
    "a rank without tokens": Case(dtype=torch.float64, tokens=(4, 0, 6, 0), routing="holes"),
    "rank 0 without tokens": Case(dtype=torch.float64, tokens=(0, 3, 0, 2)),
    "no token anywhere": Case(dtype=torch.float64, tokens=(0,)),
    "no expert selected": Case(dtype=torch.float64, routing="nothing"),
}


def gradients_of_rank(cases: dict[str, Case]) -> int:
    """Loss = sum(y * g) over all ranks; gradients of x, weights and this rank's experts against the oracle's."""
    compared = 0
    with moe_runtime.init({"timeout_s": 60}) as runtime:
        for name, case in cases.items():
            for expand in FORMS:
                try:
                    compared += check_gradients(runtime, case, expand)
                except AssertionError as error:
                    raise AssertionError(f"{name}, expand={expand}: {error}") from error
    return compared


def check_gradients(runtime, case: Case, expand: bool) -> int:
    placement = case.placement(runtime.size)
    dispatcher = runtime.dispatcher(case.hidden, case.experts, case.top_k, case.dtype, placement)
    leaves = (*case.tokens_of(runtime.rank)[::2], *case.expert_values())
    x, weights, scale, shift = (leaf.clone().requires_grad_() for leaf in leaves)
    ids = case.ids(runtime.rank)
    rows, handle = dispatcher.dispatch(x, ids, weights, expand=expand)
    y = dispatcher.combine(apply_experts(case, placement, runtime.rank, rows, handle, (scale, shift)), handle)
    (y * upstream(case, runtime.rank)).sum().backward()

    # Every rank repeats the whole world in float64: expert gradients are sums over all ranks' tokens.
    scale_64, shift_64 = (v.double().requires_grad_() for v in case.expert_values())
    expected = {}
    for rank in range(runtime.size):
        x_64, weights_64 = (t.double().requires_grad_() for t in case.tokens_of(rank)[::2])
        y_64, _ = oracle(x_64, case.ids(rank), weights_64, scale_64, shift_64)
        (y_64 * upstream(case, rank)).sum().backward()
        expected[rank] = (x_64.grad, weights_64.grad)
    eps = torch.finfo(case.dtype).eps
    close = functools.partial(torch.testing.assert_close, rtol=16 * eps, atol=3000 * eps, check_dtype=False)
    assert x.grad.dtype == x.dtype and weights.grad.dtype == weights.dtype
    close(x.grad.double(), expected[runtime.rank][0])
    close(weights.grad.double(), expected[runtime.rank][1])
    if not placement.has_replicas():
        here = placement.rank_experts(0, runtime.rank)
        for grad, whole in ((scale.grad, scale_64.grad), (shift.grad, shift_64.grad)):
            grad = torch.zeros(case.experts, case.hidden) if grad is None else grad  # no local slot at all
            close(grad[here].double(), whole[here])
            assert not grad[[e for e in range(case.experts) if e not in here]].any()
    return 1


def upstream(case: Case, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(400 + rank)
    return torch.randn(len(case.ids(rank)), case.hidden, generator=generator, dtype=torch.float64).to(case.dtype)


@pytest.mark.parametrize("size", SIZES)
def test_gradients_equal_plain_torch(size):
    assert run_ranks(gradients_of_rank, size, GRADIENT_CASES) == [2 * len(GRADIENT_CASES)] * size


@pytest.mark.parametrize("expand", FORMS)
@pytest.mark.parametrize("routing", ["holes", "repeated", "first expert", "nothing"])
def test_gradcheck(routing, expand):
    case = Case(tokens=(3,), routing=routing, hidden=3, experts=4, top_k=3, dtype=torch.float64)
    x, ids, weights = case.tokens_of(0)
    x[:, 0] = torch.arange(3) - 1.0  # numbering as for tracing would only cost finite differences their precision
    with moe_runtime.init() as runtime:
        dispatcher = runtime.dispatcher(3, 4, 3, torch.float64)

        def layer(x, weights, scale, shift):
            rows, handle = dispatcher.dispatch(x, ids, weights, expand=expand)
            return dispatcher.combine(
                apply_experts(case, dispatcher.placement, 0, rows, handle, (scale, shift)), handle
            )

        inputs = [t.requires_grad_() for t in (x, weights, *case.expert_values())]
        assert torch.autograd.gradcheck(layer, inputs)


# ---------------------------------------------------------------- one rank, any routing


@st.composite
def routings(draw):
    experts, top_k, tokens = draw(st.integers(1, 9)), draw(st.integers(1, 8)), draw(st.integers(0, 12))
    ids = draw(st.lists(st.integers(-1, experts - 1), min_size=tokens * top_k, max_size=tokens * top_k))
    dtype = draw(st.sampled_from(ALL_DTYPES))
    case = Case((tokens,), "given", draw(st.sampled_from([1, 2, 7, 16, 129])), experts, top_k, dtype)
    return case, torch.tensor(ids, dtype=torch.int64).view(tokens, top_k)


@given(drawn=routings(), expand=st.booleans())
@example(drawn=(Case((1,), "given", 1, 1, 1), torch.tensor([[0]])), expand=True)
@example(drawn=(Case((2,), "given", 7, 3, 2), torch.tensor([[2, 2], [-1, 2]])), expand=False)
@settings(deadline=None, max_examples=100)
def test_any_routing_on_one_rank_equals_the_oracle(drawn, expand):
    case, ids = drawn
    generator = torch.Generator().manual_seed(ids.numel())
    x = torch.randn(len(ids), case.hidden, generator=generator).to(case.dtype)
    weights = torch.rand(ids.shape, generator=generator).to(
        torch.float64 if case.dtype == torch.float64 else torch.float32
    )
    with moe_runtime.init() as runtime:
        dispatcher = runtime.dispatcher(case.hidden, case.experts, case.top_k, case.dtype)
        rows, handle = dispatcher.dispatch(x, ids, weights, expand=expand)
        assert handle.rows_per_slot.tolist() == [int((ids == e).sum()) for e in range(case.experts)]
        assert len(rows) == (int((ids >= 0).sum()) if expand else int((ids >= 0).any(1).sum()))
        y = dispatcher.combine(apply_experts(case, dispatcher.placement, 0, rows, handle), handle)
    assert_equals_oracle(case, y, x, ids, weights)


# ---------------------------------------------------------------- ranks that disagree


def message_of(kind: type[Exception], call, *args, **kwargs) -> str:
    with pytest.raises(kind) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


COMMON = dict(hidden_size=16, num_experts=8, top_k=2, dtype=torch.float32, placement=None)
DISAGREEMENTS = {  # what rank 1 asks for instead -> what every rank must be told
    "num_experts": ({"num_experts": 9}, ["rank 1", "num_experts", "9", "8"]),
    "hidden_size": ({"hidden_size": 32}, ["rank 1", "hidden_size", "32", "16"]),
    "top_k": ({"top_k": 3}, ["rank 1", "top_k", "3", "2"]),
    "dtype": ({"dtype": torch.bfloat16}, ["rank 1", "dtype", "bfloat16", "float32"]),
    "placement": ({"placement": "other"}, ["rank 1", "placement"]),
}


def disagree() -> dict[str, str]:
    said = {}
    with moe_runtime.init({"timeout_s": 30}) as runtime:
        for name, (change, _) in DISAGREEMENTS.items():
            wanted = COMMON | (change if runtime.rank == 1 else {})
            if wanted["placement"] == "other":
                wanted["placement"] = proportional(1, 8, [1.0, 2.0, 1.0])
            said[name] = message_of(ConfigError, runtime.dispatcher, **wanted)
    return said


def test_ranks_that_disagree_are_told_which_rank_and_which_field():
    for said in run_ranks(disagree, 3):
        for name, (_, words) in DISAGREEMENTS.items():
            assert all(word in said[name] for word in words), said[name]


def dispatch_at(layers: list[int], expands: list[bool]) -> str:
    placement = proportional(3, 8, [1.0] * len(layers))
    with moe_runtime.init({"timeout_s": 30}) as runtime:
        dispatcher = runtime.dispatcher(16, 8, 4, placement=placement, layer=layers[runtime.rank])
        tokens = Case(experts=8).tokens_of(runtime.rank)
        return message_of(MoeRuntimeError, dispatcher.dispatch, *tokens, expand=expands[runtime.rank])


def test_ranks_at_different_layers_are_told_which():
    for rank, said in enumerate(run_ranks(dispatch_at, 3, [1, 2, 1], [True] * 3)):
        assert "layer 1" in said and "layer 2" in said and "forward passes" in said
        assert f"rank {1 if rank != 1 else 0} " in said


def test_ranks_that_use_different_forms_are_told_so():
    for said in run_ranks(dispatch_at, 2, [0, 0], [True, False]):
        assert "expand=True" in said and "expand=False" in said


# ---------------------------------------------------------------- ranks that die or do not come

DEADLINE_S = 3.0


def step_with_death(transport: str, phase: str, dying: int) -> tuple[str, str, float]:
    """A whole forward and backward in which one rank's process ends when it comes to `phase`."""
    case = Case(tokens=(6,), hidden=64)
    with moe_runtime.init({"timeout_s": DEADLINE_S, "transport": transport}) as runtime:
        if runtime.rank == dying:
            # all_to_all_v goes through the first as well
            for name in ("start_all_to_all_v", "start_rows", "start_counted_rows"):
                if hasattr(runtime.transport, name):
                    setattr(runtime.transport, name, dies_in(phase, getattr(runtime.transport, name)))
        placement = case.placement(runtime.size)
        dispatcher = runtime.dispatcher(case.hidden, case.experts, case.top_k, case.dtype, placement)
        x, ids, weights = case.tokens_of(runtime.rank)
        x.requires_grad_()
        began = time.monotonic()
        with pytest.raises((PeerLost, PeerTimeout)) as caught:
            rows, handle = dispatcher.dispatch(x, ids, weights)
            dispatcher.combine(apply_experts(case, placement, runtime.rank, rows, handle), handle).sum().backward()
        waited = time.monotonic() - began
        assert caught.value.phase in str(caught.value) and f"rank {runtime.rank}" in str(caught.value)
        return type(caught.value).__name__, caught.value.phase, waited


def dies_in(phase: str, exchange):
    """`exchange`, in which a process ends that calls it for `phase`, the last argument."""

    def dies(*arguments):
        if arguments[-1] == phase:
            os._exit(17)
        return exchange(*arguments)

    return dies


PHASES = ["dispatch (counts)", "dispatch", "combine", "backward of combine", "backward of dispatch"]
# In shared memory counts come with the rows.
DEATHS = [("gloo", phase) for phase in PHASES] + [("shm", phase) for phase in PHASES[1:]]


@pytest.mark.parametrize("size, dying", [(2, 1), (3, 0)])
@pytest.mark.parametrize("transport, phase", DEATHS)
def test_a_rank_that_dies_ends_the_others_within_the_deadline(transport, phase, size, dying):
    results = run_ranks(step_with_death, size, transport, phase, dying, expect_dead=(dying,))
    assert results[dying] is None
    for result in (r for rank, r in enumerate(results) if rank != dying):
        kind, seen_in, waited = result
        assert seen_in in PHASES[PHASES.index(phase) :]
        assert waited < DEADLINE_S + 3
        assert kind == "PeerLost" or waited >= DEADLINE_S - 0.5


def name_the_lost_rank() -> int | None:
    with moe_runtime.init({"timeout_s": 20}) as runtime:
        dispatcher = runtime.dispatcher(16, 10, 4)
        if runtime.rank == 1:
            os._exit(17)
        began = time.monotonic()
        with pytest.raises(PeerLost, match="rank 1") as caught:
            dispatcher.dispatch(*Case().tokens_of(0))
        assert time.monotonic() - began < 5, "a closed connection is known at once, not at the deadline"
        return caught.value.rank


def test_the_lost_rank_is_named():
    assert run_ranks(name_the_lost_rank, 2, expect_dead=(1,))[0] == 1


def one_rank_never_calls(transport: str, silent: int) -> tuple[str, float] | None:
    with moe_runtime.init({"timeout_s": 1.5, "transport": transport}) as runtime:
        dispatcher = runtime.dispatcher(16, 10, 4)
        if runtime.rank == silent:
            time.sleep(5)
            return None
        began = time.monotonic()
        with pytest.raises(PeerTimeout) as caught:
            dispatcher.dispatch(*Case().tokens_of(runtime.rank))
        assert caught.value.waiting_rank == runtime.rank and silent in caught.value.ranks
        assert caught.value.phase.startswith("dispatch") and "1.5 s" in str(caught.value)
        return str(caught.value), time.monotonic() - began


@pytest.mark.parametrize("transport", ["gloo", "shm"])
def test_a_rank_that_never_calls_is_waited_for_until_the_deadline(transport):
    said, waited = run_ranks(one_rank_never_calls, 2, transport, 1)[0]
    assert "rank 0, phase dispatch" in said and "[1]" in said
    assert 1.0 < waited < 4.0


# ---------------------------------------------------------------- arguments that cannot be used


BAD_TENSORS = {  # what becomes of (x [4, 6] float32, ids [4, 3], weights [4, 3]) with 8 experts -> what is said
    "x of another width": (lambda x, i, w: (x[:, :5], i, w), r"\[T, 6\].*\(4, 5\)"),
    "x of one dimension": (lambda x, i, w: (x.view(-1), i, w), r"\[T, 6\].*\(24,\)"),
    "x of another dtype": (lambda x, i, w: (x.double(), i, w), "float32.*float64"),
    "ids of another width": (lambda x, i, w: (x, i[:, :2], w), r"\(4, 3\).*\(4, 2\)"),
    "ids of another length": (lambda x, i, w: (x, i[:2], w), r"\(4, 3\).*\(2, 3\)"),
    "ids of one dimension": (lambda x, i, w: (x, i.view(-1), w), r"\(4, 3\).*\(12,\)"),
    "ids of three dimensions": (lambda x, i, w: (x, i[None], w), r"\(4, 3\).*\(1, 4, 3\)"),
    "ids that are no expert": (lambda x, i, w: (x, i + 6, w), r"topk_ids\[0, 2\] = 8 is not an expert \(0\.\.7"),
    "ids below -1": (lambda x, i, w: (x, i - 2, w), r"topk_ids\[0, 0\] = -2 is not an expert"),
    "misshapen ids that are no expert": (lambda x, i, w: (x, i.view(-1) + 6, w), r"\(4, 3\).*\(12,\)"),
    "ids in float": (lambda x, i, w: (x, i.float(), w), "ids.*float32"),
    "ids as booleans": (lambda x, i, w: (x, i.bool(), w), "ids.*bool"),
    "weights of another width": (lambda x, i, w: (x, i, w[:, :1]), r"\(4, 3\).*\(4, 1\)"),
}


def usable_tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.zeros(4, 6), torch.arange(12).view(4, 3) % 8, torch.ones(4, 3)


def refuse_tensors(replicas: bool) -> dict[str, str]:
    said = {}
    with moe_runtime.init({"timeout_s": 10}) as runtime:
        owners = [list(range(runtime.size)) if replicas else [e % runtime.size] for e in range(8)]
        dispatcher = runtime.dispatcher(6, 8, 3, placement=from_owners([owners], runtime.size))
        for name, (change, _) in BAD_TENSORS.items():
            try:
                dispatcher.dispatch(*change(*usable_tensors()))
                said[name] = "taken"
            except ConfigError as error:
                said[name] = str(error)
            except (RuntimeError, ValueError, IndexError, PeerTimeout) as error:
                said[name] = f"not a ConfigError: {error!r}"
        # What was refused was refused before anything was sent: the ranks still understand each other.
        x, ids, weights = usable_tensors()
        rows, handle = dispatcher.dispatch(x + runtime.rank, ids, weights)
        assert torch.equal(dispatcher.combine(rows, handle), 3 * (x + runtime.rank))
    return said


@pytest.fixture(scope="module")
def refused():
    """(size, replicas) -> what each rank is told about each of BAD_TENSORS."""
    return functools.cache(lambda size, replicas: run_ranks(refuse_tensors, size, replicas))


@pytest.mark.parametrize("size, replicas", [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("name", BAD_TENSORS)
def test_wrong_tensors_are_refused_before_anything_is_sent(refused, name, size, replicas):
    for said in refused(size, replicas):
        assert re.search(BAD_TENSORS[name][1], said[name]), said[name]


BAD_DISPATCHERS = {
    "no hidden": (dict(hidden_size=0), "hidden_size"),
    "no choice": (dict(top_k=0), "top_k"),
    "no expert": (dict(num_experts=0), "experts"),
    "whole numbers": (dict(dtype=torch.int64), "dtype.*int64"),
    "a layer the placement has not": (dict(placement=proportional(2, 8, [1.0]), layer=2), "layer 2"),
    "a layer below 0": (dict(layer=-1), "layer -1"),
    "a placement for other experts": (dict(placement=proportional(1, 9, [1.0])), "9 experts.*8|8.*9 experts"),
    "a placement for other ranks": (dict(placement=proportional(1, 8, [1.0, 1.0])), "2 ranks.* 1"),
}


@pytest.mark.parametrize("name", BAD_DISPATCHERS)
def test_wrong_dispatchers_are_refused(name):
    change, message = BAD_DISPATCHERS[name]
    with moe_runtime.init() as runtime, pytest.raises(ConfigError, match=message):
        runtime.dispatcher(**{"hidden_size": 6, "num_experts": 8, "top_k": 3, **change})


@pytest.mark.parametrize("expand", FORMS)
@pytest.mark.parametrize("change", [lambda rows: rows[:-1], lambda rows: rows[:, :-1], lambda rows: rows.view(-1)])
def test_combine_refuses_rows_of_another_shape(change, expand):
    with moe_runtime.init() as runtime:
        dispatcher = runtime.dispatcher(6, 8, 3)
        rows, handle = dispatcher.dispatch(*usable_tensors(), expand=expand)
        with pytest.raises(ConfigError, match=rf"\({len(rows)}, 6\)"):
            dispatcher.combine(change(rows.contiguous()), handle)


def threads_after_close() -> tuple[int, int]:
    import gc
    import os

    with moe_runtime.init({"timeout_s": 20, "transport": "gloo"}) as runtime:
        runtime.transport.barrier("test")
        during = len(os.listdir("/proc/self/task"))
    gc.collect()
    return during, len(os.listdir("/proc/self/task"))


def test_close_ends_the_transports_threads():
    """A gloo thread that outlives close can abort the process when the interpreter shuts down."""
    for during, after in run_ranks(threads_after_close, 2):
        assert after < during


def dispatches_again(transport: str, expand: bool) -> int:
    with moe_runtime.init({"timeout_s": 20, "transport": transport}) as runtime:
        calls = []

        def counting(name: str, exchange):
            def counted(*arguments):
                calls.append((name, arguments[-1]))
                return exchange(*arguments)

            return counted

        for name in ("start_all_to_all_v", "start_rows", "start_counted_rows"):  # all_to_all_v goes through the first
            if hasattr(runtime.transport, name):
                setattr(runtime.transport, name, counting(name, getattr(runtime.transport, name)))
        dispatcher = runtime.dispatcher(hidden_size=8, num_experts=6, top_k=2)
        generator = torch.Generator().manual_seed(runtime.rank)
        ids, weights = torch.randint(0, 6, (5, 2), generator=generator), torch.rand(5, 2, generator=generator)
        first = torch.randn(5, 8, generator=generator)
        _, handle = dispatcher.dispatch(first, ids, weights, expand=expand)
        other = torch.randn(5, 8, generator=generator)
        fresh_rows, fresh = dispatcher.dispatch(other, ids, weights * 2, expand=expand)
        calls.clear()
        rows, again = dispatcher.dispatch(other, ids, weights * 2, expand=expand, handle=handle)
        assert calls == [("start_rows" if transport == "shm" else "start_all_to_all_v", "dispatch")]
        assert torch.equal(rows, fresh_rows) and torch.equal(again.topk_weights, fresh.topk_weights)
        assert torch.equal(dispatcher.combine(rows, again), dispatcher.combine(fresh_rows, fresh))
        with pytest.raises(ConfigError, match="another routing"):
            dispatcher.dispatch(other, ids.flip(0) * 0, weights, expand=expand, handle=handle)
        return len(calls)


@pytest.mark.parametrize("transport", ["gloo", "shm"])
@pytest.mark.parametrize("expand", [True, False])
def test_a_cached_handle_skips_the_counts_exchange(transport, expand):
    run_ranks(dispatches_again, 3, transport, expand)

"""Dispatch and combine on this rank's device, against plain torch in float64 on the CPU.

Experts are elementwise (x * scale + shift). Where rows travel in a wire format, the oracle packs and unpacks them on
the CPU, so that what the format loses is expected and everything else is a fault.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moe_runtime.expert_dispatcher import ExpertDispatcher

from ...comm import formats
from ...comm.dispatch import Dispatcher
from ...comm.nodes import NodeDispatcher, gateways
from ...comm.quirks import dtype_name
from ...core.cluster import load_cluster
from ...core.errors import ConfigError
from ...experts.placement import from_owners
from .context import Context, first_difference, same_bits
from .verdicts import SKIPPED, WORKS, WRONG, Outcome

EXPERTS, TOP_K = 10, 4


@dataclass(frozen=True)
class Case:
    """tokens: of each rank, repeated cyclically. where: which ranks hold an expert."""

    tokens: tuple[int, ...] = (5, 9, 3, 7)
    routing: str = "distinct"
    hidden: int = 16
    where: str = "interleaved"

    def ids(self, rank: int) -> torch.Tensor:
        """[T, K] expert ids; any rank can draw any other's."""
        tokens, generator = self.tokens[rank % len(self.tokens)], torch.Generator().manual_seed(100 + rank)
        order = torch.rand(tokens, EXPERTS, generator=generator).argsort(1)[:, :TOP_K]
        drawn = torch.randint(EXPERTS, (tokens, TOP_K), generator=generator)
        holes = torch.rand(tokens, TOP_K, generator=generator) < 0.4
        return {
            "distinct": order,
            "repeated": drawn,
            "holes": drawn.masked_fill(holes, -1),
            "nothing": torch.full_like(drawn, -1),
            "one expert": torch.full_like(drawn, EXPERTS - 1),
            "half the experts": drawn % (EXPERTS // 2),
        }[self.routing]

    def owners(self, expert: int, size: int) -> list[int]:
        return {
            "interleaved": [expert % size],
            "not on rank 0": [1 + expert % (size - 1) if size > 1 else 0],
            "replicas": sorted({expert % size, (expert // 2 + 1) % size}),
        }[self.where]


CASES = {
    "distinct experts": Case(),
    "repeated experts": Case(routing="repeated"),
    "ids of -1": Case(routing="holes"),
    "no expert selected": Case(routing="nothing"),
    "all to one expert": Case(routing="one expert"),
    "ranks without rows": Case(routing="half the experts", where="not on rank 0"),
    "no token anywhere (T = 0)": Case(tokens=(0,)),
    "only rank 0 has tokens": Case(tokens=(7, 0, 0, 0)),
    "rank 0 has no token": Case(tokens=(0, 4, 1, 6), routing="holes"),
    "H = 1": Case(hidden=1),
    "H = 7": Case(hidden=7),
    "H = 129": Case(hidden=129),
    "replicas": Case(routing="holes", where="replicas"),
    "many rows": Case(tokens=(200, 131), hidden=300, routing="holes"),
}
WIRE_CASES = tuple(CASES[name] for name in ("ids of -1", "H = 129", "no token anywhere (T = 0)", "many rows"))


def exact(dtype: torch.dtype, expand: bool) -> Callable[[Context], Outcome]:
    """Every case with the runtime's own dispatcher; its results twice, with the same bits."""

    def run(context: Context) -> Outcome:
        for name, case in CASES.items():
            placement = _placement(case, context)
            dispatcher = context.runtime.dispatcher(case.hidden, EXPERTS, TOP_K, dtype, placement)
            problem = _try(context, case, dispatcher, placement, dtype, expand, lambda x, owner: x)
            if problem:
                return Outcome(WRONG, f"{name}: {problem}")
        return Outcome(WORKS, f"{len(CASES)} routings equal the oracle, twice with the same bits")

    return run


def over_the_wire(name: str, dtype: torch.dtype = torch.float32) -> Callable[[Context], Outcome]:
    """Rows of `dtype` in the wire format `name` between every two ranks that can."""

    def run(context: Context) -> Outcome:
        if context.runtime.size == 1:
            return Outcome(SKIPPED, "it takes two ranks")
        try:
            agreed = agree(context, [name], dtype)
        except ConfigError as error:
            return Outcome(SKIPPED, f"not agreed: {str(error).partition('; add one')[0]}")
        for case in WIRE_CASES:
            placement = _placement(case, context)
            made = _dispatcher(context, case, placement, dtype, agreed)
            travels = _travels(context, agreed, dtype)
            for expand in (False, True):
                problem = _try(context, case, ExpertDispatcher(made, placement, 0), placement, dtype, expand, travels)
                if problem:
                    return Outcome(WRONG, f"H = {case.hidden}, {case.routing}, expand={expand}: {problem}")
        return Outcome(WORKS, f"{2 * len(WIRE_CASES)} exchanges equal the oracle, twice with the same bits")

    return run


def agree(context: Context, wanted: list[str], dtype: torch.dtype) -> list[list[str]]:
    """formats.agree for the ranks of this world. ConfigError where some pair has no format."""
    names = [f"rank {rank} ({kind})" for rank, kind in enumerate(context.kinds)]
    return formats.agree(wanted, context.able, dtype, names)


def describe_agreement(context: Context, wanted: list[str], dtype: torch.dtype) -> list[str]:
    """The lines of formats.describe, or why there is no agreement."""
    try:
        return formats.describe(agree(context, wanted, dtype), context.able, dtype) or ["one rank: nothing travels"]
    except ConfigError as error:
        return [f"none: {error}"]


def _placement(case: Case, context: Context) -> Any:
    size = context.runtime.size
    return from_owners([[case.owners(expert, size) for expert in range(EXPERTS)]], size)


def _dispatcher(context: Context, case: Case, placement: Any, dtype: torch.dtype, agreed: list[list[str]]) -> Any:
    nodes = rank_nodes(context)
    shape = dict(
        hidden_size=case.hidden, num_experts=EXPERTS, top_k=TOP_K, dtype=dtype, placement_digest=placement.digest(),
        device=context.device, formats=agreed,
    )  # fmt: skip
    if nodes is None:
        return Dispatcher(context.runtime.transport, placement.slot_rank, **shape)
    return NodeDispatcher(context.runtime.transport, placement.slot_rank, rank_node=nodes, **shape)


def rank_nodes(context: Context) -> list[int] | None:
    """The node of each rank where dispatch goes by nodes, as the runtime decides it."""
    file = context.runtime.config.cluster
    names = [node.name for node in load_cluster(file).rank_nodes()] if file else []
    numbers = list(dict.fromkeys(names))
    return [numbers.index(name) for name in names] if 1 < len(numbers) < len(names) else None


def _travels(context: Context, agreed: list[list[str]], dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """What becomes of rows on their way from this rank to an owner."""
    rank, nodes = context.runtime.rank, rank_nodes(context)

    def travel(x: torch.Tensor, owner: int) -> torch.Tensor:
        if nodes is not None and nodes[owner] == nodes[rank]:
            return x
        via = owner if nodes is None else int(gateways(nodes, rank)[nodes[owner]])
        if via == rank:
            return x
        form = formats.FORMATS[agreed[rank][via]]
        return formats.decode(*formats.encode(x, form), form, dtype)

    return travel


def _try(
    context: Context,
    case: Case,
    dispatcher: ExpertDispatcher,
    placement: Any,
    dtype: torch.dtype,
    expand: bool,
    travels: Callable[[torch.Tensor, int], torch.Tensor],
) -> str:
    """One case, twice: "" or what is wrong with it."""
    ids, generator = case.ids(context.runtime.rank), torch.Generator().manual_seed(200 + context.runtime.rank)
    x = torch.randn(len(ids), case.hidden, generator=generator).to(dtype)
    weights = torch.rand(ids.shape, generator=generator)
    experts = _experts(case.hidden, dtype)
    first, second = (_once(context, dispatcher, placement, x, ids, weights, experts, expand) for _ in range(2))
    expected, allowed = _oracle(placement, dispatcher, x, ids, weights, experts, travels)
    off = (first.cpu().double() - expected).abs()
    if not (off <= allowed).all():
        at = int((off - allowed).nan_to_num(nan=torch.inf).view(-1).argmax())
        got, wanted = float(first.cpu().reshape(-1)[at]), float(expected.reshape(-1)[at])
        return (
            f"{int((~(off <= allowed)).sum())} of {off.numel()} results unlike the oracle, such as {got} for {wanted}"
        )
    if not same_bits(first.cpu(), second.cpu()):
        return f"other bits the second time: {first_difference(second.cpu(), first.cpu())}"
    return ""


def _experts(hidden: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale [E, H], shift [E, H])."""
    generator = torch.Generator().manual_seed(300)
    scale, shift = (torch.randn(EXPERTS, hidden, generator=generator) for _ in range(2))
    return scale.to(dtype), shift.to(dtype)


def _once(
    context: Context,
    dispatcher: ExpertDispatcher,
    placement: Any,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    experts: tuple[torch.Tensor, torch.Tensor],
    expand: bool,
) -> torch.Tensor:
    device = context.device
    rows, handle = dispatcher.dispatch(x.to(device), ids.to(device), weights.to(device), expand=expand)
    here = placement.slot_expert[0, placement.rank_slots(context.runtime.rank)].astype("int64")
    scale, shift = (values[here].to(device) for values in experts)  # [S, H], of this rank's slots
    if expand:
        slot_M = torch.from_numpy(np.repeat(np.arange(len(here)), handle.rows_per_slot)).to(device)
        return dispatcher.combine(rows * scale[slot_M] + shift[slot_M], handle)
    sums = torch.zeros(rows.shape, dtype=torch.float32, device=device)
    for k in range(TOP_K if len(here) else 0):
        slot_N = handle.topk_slots[:, k].clamp(min=0).long()
        sums += (rows * scale[slot_N] + shift[slot_N]).float() * handle.topk_weights[:, k : k + 1]
    return dispatcher.combine(sums.to(x.dtype), handle)


def _oracle(
    placement: Any,
    dispatcher: ExpertDispatcher,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    experts: tuple[torch.Tensor, torch.Tensor],
    travels: Callable[[torch.Tensor, int], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y [T, H] float64, how far results in x's dtype may be from it).

    Which replica takes a row makes no difference but for its format; replicas are only used where rows travel exact.
    """
    scale, shift = (values.double() for values in experts)
    owner_E = [int(placement.slot_rank[np.flatnonzero(placement.slot_expert[0] == e)[0]]) for e in range(EXPERTS)]
    arrived = torch.stack([travels(x, owner).double() for owner in range(placement.num_ranks)])  # [R, T, H]
    owner_TK = torch.tensor(owner_E)[ids.clamp(min=0)]
    x_TKH = arrived[owner_TK, torch.arange(len(ids)).unsqueeze(1)]
    chosen = (weights.double() * (ids >= 0)).unsqueeze(-1)
    scaled, shifted = x_TKH * scale[ids.clamp(min=0)], shift[ids.clamp(min=0)]
    magnitude = (chosen * (scaled.abs() + shifted.abs())).sum(1)
    return (chosen * (scaled + shifted)).sum(1), torch.finfo(x.dtype).eps * (TOP_K + 4) * magnitude


EXACT = tuple(itertools.product((torch.float32, torch.bfloat16, torch.float16), (False, True)))
WIRES = tuple(name for name in formats.FORMATS if name != dtype_name(torch.float32))

"""The expert-parallel experts layer: the one place where comm and experts meet.

A transformers experts module becomes expert-parallel by changing its class to a subclass of its own: it keeps its
name in the model, its activation and its flags, holds only this rank's experts, and its forward goes through
dispatch and combine.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from .comm.dispatch import IDLE, WORKING, Dispatcher, DispatchHandle
from .comm.rows import combine_rows
from .core.errors import ConfigError
from .core.placement import Placement
from .core.spans import spans
from .experts.compute import grouped_experts
from .experts.routing import ReplicaChooser, lost_selections, refuse_lost, renormalise
from .turns import note_states, pass_turn

if TYPE_CHECKING:
    from .recorder import Recorder

# What transformers' `use_experts_implementation` leaves on every module that shares the experts interface.
INTERFACE_MARKS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_apply_gate", "num_experts")


@dataclass
class Lacking:
    """What this rank's tokens did not get because no rank held it: of `tokens`, `touched` lacked `selections`."""

    tokens: int = 0
    touched: int = 0
    selections: int = 0

    def add(self, lost_TK: torch.Tensor) -> None:
        lost_T = lost_TK.sum(-1)
        self.tokens += len(lost_T)
        self.touched += int((lost_T > 0).sum())
        self.selections += int(lost_T.sum())


@dataclass
class LayerState:
    """What one expert-parallel layer knows besides its weights."""

    index: int  # among the model's expert layers
    placement: Placement
    dispatcher: Dispatcher
    chooser: ReplicaChooser
    per_expert_sums: bool  # send one row per (token, expert) home, so that sums do not depend on the placement
    transformers_kernel: bool  # compute with transformers' own experts function instead of grouped_experts
    tokens_per_slot: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    expert_seconds: float = 0.0  # spent computing experts
    dispatch_seconds: float = 0.0  # spent sending rows and waiting for them, forward; combine_seconds likewise
    combine_seconds: float = 0.0
    rows_computed: int = 0  # (token, expert) pairs
    rows_sent: int = 0  # to other ranks' experts; results come back as many times
    rows_received: int = 0
    progress: dict[str, Any] | None = None  # what this rank is doing, for hang reports; all layers share it
    recorder: Recorder | None = None
    recompute: bool = False  # compute experts again in backward instead of keeping what they made (recompute.py)
    slowdown: float = 1.0  # emulated: experts take this many times as long as they would
    earlier_tokens: np.ndarray | None = None  # per expert, computed under placements before this one
    passes: int = 0
    before_exchange: Callable[[int], None] | None = None  # live rebalancing (rebalance.py)
    meanwhile: Callable[[torch.Tensor], None] | None = None  # what is computed while rows travel (overlap.py)
    states: list[int] = field(default_factory=list)  # of all ranks, at the latest exchange
    expert_dtypes: tuple[str, ...] = ()  # what each rank holds its experts in (expert_dtypes.py), once loaded
    renormalise: bool = False  # go on without experts that no rank holds; else a token that selects one is an error
    lacking: Lacking = field(default_factory=Lacking)

    def note(self, phase: str, **counts: Any) -> None:
        """Write to `progress` in one step, since another thread reads it: phase, layer, pass, and counts.

        phase: "rebalance", "dispatch", "experts", "combine", or "dense" between two expert layers. tokens: this rank's.
        sent, received: rows to and from each rank of the view, empty while they are not known.
        """
        if self.progress is not None:
            self.progress.update({"phase": phase, "layer": self.index, "pass": self.passes, **counts})

    def travelling(self, phase: str, **counts: Any) -> _Travelling:
        """A block in which rows are sent or waited for: noted, a span, its time added to the phase's seconds."""
        self.note(phase, **counts)
        return _Travelling(self, phase)

    def count_rows(self, handle: DispatchHandle) -> None:
        """Add what a dispatch brought and took away; a hop between nodes counts as well."""
        own = self.dispatcher.transport.rank
        self.rows_computed += len(handle.order.row_index)
        for hop in (handle, handle.outer):
            if hop is not None:
                self.rows_sent += sum(hop.route.send_counts) - hop.route.send_counts[own]
                self.rows_received += sum(hop.recv_counts) - hop.recv_counts[own]

    def tokens_per_expert(self, rank: int) -> np.ndarray:
        """Tokens that this rank has computed for each expert [E] int64, whatever slots they have been in."""
        tokens = np.zeros(self.placement.num_experts, dtype=np.int64)
        tokens[self.placement.rank_experts(self.index, rank)] = self.tokens_per_slot
        return tokens if self.earlier_tokens is None else tokens + self.earlier_tokens

    def fold_tokens(self, rank: int) -> None:
        """Keep the count by expert, before slots hold others."""
        self.earlier_tokens = self.tokens_per_expert(rank)
        self.tokens_per_slot[:] = 0


class _Travelling:
    """LayerState.travelling's block: a class, since a generator takes four times as long."""

    __slots__ = ("_layer", "_name", "_span", "_start")

    def __init__(self, layer: LayerState, phase: str) -> None:
        self._layer, self._name, self._span = layer, f"{phase}_seconds", spans(phase)

    def __enter__(self) -> None:
        self._start = time.perf_counter()
        self._span.__enter__()

    def __exit__(self, *_: object) -> None:
        self._span.__exit__(None, None, None)
        setattr(self._layer, self._name, getattr(self._layer, self._name) + time.perf_counter() - self._start)


class ExpertParallel:
    """Mixed into a transformers experts class; `moe_runtime_layer` is its LayerState."""

    moe_runtime_layer: LayerState

    def forward(self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """hidden_states [..., H], topk_ids [T, K] (global expert ids), topk_weights [T, K] -> [..., H]."""
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        return self.exchange(x_TH, topk_ids, topk_weights, WORKING).view_as(hidden_states)

    def exchange(self, x_TH: torch.Tensor, topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor, state: int):
        """The request path of DESIGN.md: replica choice, dispatch, experts, combine."""
        layer = self.moe_runtime_layer
        if layer.before_exchange is not None:
            layer.note("rebalance")
            layer.before_exchange(layer.index)
        layer.passes += 1
        slots_TK = layer.chooser.choose(topk_ids_TK)
        if layer.placement.absent is not None:
            topk_weights_TK = weights_of_the_rest(layer, topk_ids_TK, slots_TK, topk_weights_TK)
        if layer.recorder is not None:
            layer.recorder.add(layer.index, topk_ids_TK)
        waiting = {"tokens": x_TH.shape[0], "sent": [], "received": []}
        with layer.travelling("dispatch", **waiting):
            arrive = layer.dispatcher.start_dispatch(
                x_TH, slots_TK, topk_weights_TK, expand=layer.per_expert_sums, tag=layer.index, state=state
            )
        if layer.meanwhile is not None and state == WORKING:
            layer.meanwhile(x_TH)
        pass_turn()
        with layer.travelling("dispatch", **waiting):
            rows, handle = arrive()
        layer.count_rows(handle)
        counts = {"sent": handle.route.send_counts, "received": handle.recv_counts}
        layer.note("experts", **counts)
        layer.tokens_per_slot += handle.rows_per_slot
        layer.states = handle.states
        note_states(handle.states)
        start = time.perf_counter()
        with spans("experts"):
            if layer.recompute and self.training and torch.is_grad_enabled():
                outputs = checkpoint(self._compute, rows, handle, use_reentrant=False, preserve_rng_state=False)
            else:
                outputs = self._compute(rows, handle)
        spans.around_backward("experts (backward)", outputs, rows)
        if layer.slowdown > 1:
            time.sleep((time.perf_counter() - start) * (layer.slowdown - 1))
        layer.expert_seconds += time.perf_counter() - start
        with layer.travelling("combine"):
            bring_home = layer.dispatcher.start_combine(outputs, handle)
        pass_turn()
        with layer.travelling("combine", **counts):
            y_TH = bring_home()
        layer.note("dense")
        return y_TH

    def idle_exchange(self, chain: torch.Tensor) -> torch.Tensor:
        """Take part with no token of one's own. `chain` [0, H] ties successive layers' backward passes together."""
        nothing = chain.new_empty(0, self.moe_runtime_layer.dispatcher.top_k)
        return self.exchange(chain, nothing.long(), nothing.float(), IDLE)

    def _compute(self, rows: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        layer = self.moe_runtime_layer
        if layer.transformers_kernel and not handle.expand and rows.shape[0]:
            # transformers marks "not mine" with the id num_experts, and skips those rows.
            ids = handle.topk_slots.masked_fill(handle.topk_slots < 0, self.num_experts).to(torch.int64)
            return super().forward(rows, ids, handle.topk_weights)
        if handle.expand:
            identity = torch.arange(rows.shape[0], device=rows.device)
            return grouped_experts(self, rows, identity, handle.rows_per_slot)
        outputs = grouped_experts(self, rows, handle.row_index, handle.rows_per_slot)
        weights_M = handle.topk_weights[handle.row_index, handle.choice_index]
        return combine_rows(outputs, handle.row_index, rows.shape[0], weights_M)


def weights_of_the_rest(
    layer: LayerState, topk_ids_TK: torch.Tensor, slots_TK: torch.Tensor, topk_weights_TK: torch.Tensor
) -> torch.Tensor:
    """The weights of what is left of each token's experts (`renormalise`); what is not is counted in the layer's state.

    Raises ConfigError where a token lacks an expert and nobody has chosen to go on without.
    """
    lost_TK = lost_selections(topk_ids_TK, slots_TK)
    if not layer.renormalise:
        cure = "read it from the checkpoint (refit.py), or choose to renormalise the weights of the others"
        refuse_lost(topk_ids_TK, lost_TK, f"expert layer {layer.index}", cure)
    layer.lacking.add(lost_TK)
    return renormalise(topk_weights_TK, topk_ids_TK, lost_TK)


def describe_lacking(states: Sequence[LayerState]) -> list[str]:
    """A line on what this rank's tokens did without, all layers together; none where that is nothing."""
    tokens = sum(state.lacking.tokens for state in states)
    touched = sum(state.lacking.touched for state in states)
    if not touched:
        return []
    each = sum(state.lacking.selections for state in states) / touched
    layers = "a layer" if len(states) == 1 else f"{len(states)} layers together"
    return [f"renormalised: {touched:,} of {tokens:,} tokens lacked {each:.1f} experts on average ({layers})"]


def refuse_absent(model: torch.nn.Module, what: str) -> None:
    """Raises ConfigError, on every rank alike, where no rank holds some experts. what: "saved"."""
    for module in experts_modules(model).values():
        said = module.moe_runtime_layer.placement.say_absent() if isinstance(module, ExpertParallel) else ""
        if said:
            raise ConfigError(f"a model that lacks experts cannot be {what}: {said}; read them again first (refit.py)")


@functools.cache
def expert_parallel_class(base: type) -> type:
    """The expert-parallel subclass of a transformers experts class, under the same name."""
    return type(base.__name__, (ExpertParallel, base), {"__module__": base.__module__})


def is_experts_module(module: torch.nn.Module) -> bool:
    """Whether a module shares transformers' experts interface (some 60 families do)."""
    return all(hasattr(module, mark) for mark in INTERFACE_MARKS) and not isinstance(module, ExpertParallel)


def experts_modules(model: torch.nn.Module) -> dict[str, Any]:
    """The model's expert layers by name, in the order the model runs them; parallel already or not."""
    return {n: m for n, m in model.named_modules() if isinstance(m, ExpertParallel) or is_experts_module(m)}

"""Gradients across ranks: the dense part is replicated, the experts are sharded, replicas are equal.

Every rank's loss must already be divided by the tokens of all ranks; then sums over ranks are the gradients of the
mean loss over the joined batch, as one process would compute them.
"""

from __future__ import annotations

import torch

from .comm.transport import Transport
from .layer import ExpertParallel

BUCKET_BYTES = 64 << 20
_CACHED = 1 << 16  # elements: their float64 copy stays in the cache


def split_parameters(model: torch.nn.Module) -> tuple[list[torch.nn.Parameter], dict[ExpertParallel, list]]:
    """Trainable parameters: (dense, {expert layer: its own}). Tied parameters appear once."""
    experts: dict[ExpertParallel, list] = {}
    for module in model.modules():
        if isinstance(module, ExpertParallel):
            experts[module] = [p for p in module.parameters(recurse=False) if p.requires_grad]
    owned = {id(p) for parameters in experts.values() for p in parameters}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in owned], experts


def sync_gradients(model: torch.nn.Module, transport: Transport) -> None:
    """Sum dense gradients over all ranks, and a replicated expert's over its replicas. Missing ones count as zero."""
    if transport.size == 1:
        return
    dense, experts = split_parameters(model)
    for bucket in _buckets(dense):
        flat = torch.cat([gradient_of(p).reshape(-1) for p in bucket])
        transport.all_reduce(flat, "sum of dense gradients")
        for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = part.view_as(parameter)
    for layer, parameters in experts.items():
        _sync_replicas(layer, parameters, transport)


def clip_grad_norm(model: torch.nn.Module, transport: Transport, max_norm: float) -> float:
    """Scale gradients (already synchronised) to a global norm of at most `max_norm`; returns the norm before.

    The norm is that of the whole model: dense parameters once, every expert once however many replicas it has.
    """
    dense, experts = split_parameters(model)
    square = torch.zeros((), dtype=torch.float64)
    for layer, parameters in experts.items():
        first = _first_replicas(layer)
        for parameter in parameters:
            gradient = gradient_of(parameter)
            square += _square_sum(gradient if len(first) == len(gradient) else gradient[first])
    transport.all_reduce(square, "gradient norm")
    square += sum(_square_sum(gradient_of(p)) for p in dense)
    norm = float(square.sqrt())
    if norm > max_norm:
        scale = max_norm / (norm + 1e-6)
        for parameter in [*dense, *(p for parameters in experts.values() for p in parameters)]:
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
    return norm


def _square_sum(gradient: torch.Tensor) -> float:
    if gradient.device.type != "cpu":
        # In float64 where that exists; Biren's devices have none.
        wide = gradient.double() if gradient.device.type == "cuda" else gradient.float()
        return float(wide.pow(2).sum())
    parts = (part.double() for part in gradient.reshape(-1).split(_CACHED))
    return sum(float(part.dot(part)) for part in parts)


def gradient_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    """A parameter's gradient, zeros where it has none; in float32 where gradients are collected so (optimizer.py)."""
    if parameter.grad is not None:
        return parameter.grad
    return torch.zeros_like(parameter, dtype=getattr(parameter, "grad_dtype", None) or parameter.dtype)


def _buckets(parameters: list[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """Runs of parameters of one dtype, of about BUCKET_BYTES each, in the model's order (equal on all ranks)."""
    buckets: list[list[torch.nn.Parameter]] = []
    size = 0
    for parameter in parameters:
        if not buckets or size > BUCKET_BYTES or buckets[-1][-1].dtype != parameter.dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.numel() * parameter.element_size()
    return buckets


def _first_replicas(layer: ExpertParallel) -> list[int]:
    """This rank's local slots that are the first of their expert."""
    state = layer.moe_runtime_layer
    expert = state.placement.slot_expert[state.index]
    mine = state.placement.rank_slots(state.dispatcher.transport.rank)
    return [slot - mine.start for slot in range(mine.start, mine.stop) if expert[slot] not in expert[:slot]]


def _sync_replicas(layer: ExpertParallel, parameters: list[torch.nn.Parameter], transport: Transport) -> None:
    state = layer.moe_runtime_layer
    if not state.placement.has_replicas():
        return
    expert = state.placement.slot_expert[state.index].tolist()
    replicated = sorted({e for e in expert if expert.count(e) > 1})
    mine = state.placement.rank_experts(state.index, transport.rank)
    for parameter in parameters:
        gradient = gradient_of(parameter)
        total = gradient.new_zeros((len(replicated), *gradient.shape[1:]))
        for row, e in enumerate(replicated):
            if e in mine:
                total[row] = gradient[mine.index(e)]
        transport.all_reduce(total, "sum of replicas' gradients")
        for row, e in enumerate(replicated):
            if e in mine:
                gradient[mine.index(e)] = total[row]
        parameter.grad = gradient

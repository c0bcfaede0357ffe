"""Grouped expert compute over the interface that transformers' experts modules share.

One expert after the other over the rows that chose it: on CPU this beats transformers' grouped_mm for most shapes
(docs/performance.md). It follows the module's own flags (bias, gate, transposed and concatenated weights, post-expert
norm) and calls the module's own activation, so it serves every family that uses the interface.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from .fp8 import dequantize_blocks


def expert_parameters(module: torch.nn.Module) -> list[str]:
    """The names of the module's own parameters that hold one entry per expert along dimension 0."""
    return [name for name, p in module.named_parameters(recurse=False) if p.dim() >= 1]


def grouped_experts(
    module: torch.nn.Module, rows_NH: torch.Tensor, row_index_M: torch.Tensor, rows_per_slot: np.ndarray
) -> torch.Tensor:
    """Unweighted outputs [M, H] of every (row, slot) pair, in slot order.

    module: a transformers experts module whose parameters hold this rank's slots. rows_NH [N, H].
    row_index_M [M] int64: the row of each pair, grouped by slot; rows_per_slot [S_local]: pairs per slot.
    Differentiable in the rows and in the parameters, also where M is 0.
    """
    counts = rows_per_slot.tolist()
    pairs = rows_NH.index_select(0, row_index_M)
    first, second = ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"
    outputs = []
    weights = {name: _per_slot(module, name, rows_NH.dtype) for name in (first, second)}
    for slot, x in enumerate(pairs.split(counts)):
        if not counts[slot]:
            continue
        hidden = _project(module, x, weights[first](slot), first, slot)
        hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
        out = _project(module, hidden, weights[second](slot), second, slot)
        outputs.append(module.post_expert_norm(out) if module.has_post_expert_norm else out)
    if outputs:
        return torch.cat(outputs)
    # No row for any slot: still a function of the parameters, so that backward reaches the exchange on every rank.
    touched = sum((p.reshape(-1)[:0].float().sum() for p in module.parameters()), pairs.new_zeros(()))
    return pairs + touched.to(pairs.dtype)


def _per_slot(module: torch.nn.Module, name: str, dtype: torch.dtype):
    """A function from slot to that slot's weight in `dtype`; FP8 weights are dequantised one expert at a time."""
    weight = getattr(module, name)
    scale = getattr(module, f"{name}_scale_inv", None)
    if scale is not None:
        return lambda slot: dequantize_blocks(weight[slot], scale[slot], dtype)
    if torch.is_grad_enabled() and weight.requires_grad:
        # One unbind: its backward writes the gradient once. Indexing slot by slot would build a zero tensor of the
        # size of all experts for each of them.
        return weight.unbind(0).__getitem__
    return weight.__getitem__


def _project(module: torch.nn.Module, x: torch.Tensor, weight: torch.Tensor, name: str, slot: int) -> torch.Tensor:
    out = x @ weight if module.is_transposed else F.linear(x, weight)
    return out + getattr(module, f"{name}_bias")[slot] if module.has_bias else out

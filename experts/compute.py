"""Grouped expert compute over the interface that transformers' experts modules share.

Slots with few rows, as in decode, take the C kernel: one call for all of them, which reads each weight once and FP8
and INT8 weights as they are. Slots with many rows take torch, one expert after the other, as does everything that C
does not know (transposed weights, float64, devices) and everything that needs gradients. `describe()` says which runs.

Both follow the module's own flags (bias, gate, transposed and concatenated weights, post-expert norm) and call the
module's own activation, so they serve every family that uses the interface.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ..core import native
from ..core.memory import pool
from ..core.tensors import byte_rows
from .blocks import BLOCK, LARGEST, dequantize_blocks

# Rows of a slot up to which C is the faster one, by the dtype of the weights: docs/performance.md. torch multiplies
# float16 without vector instructions on CPUs that have none of their own for it.
FEW_ROWS = {torch.bfloat16: 16, torch.float32: 16, torch.float16: 128, torch.float8_e4m3fn: 16, torch.int8: 16}
_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in FEW_ROWS}
_TILE_ROWS = 2 * BLOCK  # of a weight in blocks, dequantised at a time: they stay in the cache for their product
_BYTES_PER_THREAD = 1 << 18  # of weights: below this a thread costs more than it brings


def expert_parameters(module: torch.nn.Module) -> list[str]:
    """The names of the module's own parameters that hold one entry per expert along dimension 0."""
    return [name for name, p in module.named_parameters(recurse=False) if p.dim() >= 1]


def describe() -> str:
    """What computes experts here, in one line."""
    if not c_is_fast():
        why = native.reason if native.extension is None else "this machine has no fused multiply-add"
        return f"expert compute: torch, one expert at a time (no C kernel: {why})"
    limits = ", ".join(f"{_NAMES[dtype]} {rows}" for dtype, rows in FEW_ROWS.items())
    return (
        f"expert compute: C ({native.extension.simd_name()}, {torch.get_num_threads()} threads) for up to so many rows "
        f"of an expert: {limits}; torch, one expert at a time, for more and for gradients"
    )


def grouped_experts(
    module: torch.nn.Module, rows_NH: torch.Tensor, row_index_M: torch.Tensor, rows_per_slot: np.ndarray
) -> torch.Tensor:
    """Unweighted outputs [M, H] of every (row, slot) pair, in slot order.

    module: a transformers experts module whose parameters hold this rank's slots. rows_NH [N, H].
    row_index_M [M] int64: the row of each pair, grouped by slot; rows_per_slot [S_local]: pairs per slot.
    Differentiable in the rows and in the parameters, also where M is 0.
    """
    few = rows_per_slot <= _most_rows_in_c(module, rows_NH)
    if row_index_M.numel() and few.all():
        return _few_rows(module, rows_NH, row_index_M, rows_per_slot)
    if not row_index_M.numel() or needs_gradient(module, rows_NH):
        return _differentiable(module, rows_NH, row_index_M, rows_per_slot)
    outputs = rows_NH.new_empty(row_index_M.shape[0], rows_NH.shape[1])
    if rows_per_slot[few].any():
        pairs = torch.from_numpy(np.flatnonzero(few.repeat(rows_per_slot)))
        outputs[pairs] = _few_rows(module, rows_NH, row_index_M[pairs], np.where(few, rows_per_slot, 0))
    ends = rows_per_slot.cumsum()
    for slot in np.flatnonzero(~few & (rows_per_slot > 0)).tolist():
        pairs = slice(int(ends[slot] - rows_per_slot[slot]), int(ends[slot]))
        outputs[pairs] = _many_rows(module, rows_NH.index_select(0, row_index_M[pairs]), slot)
    return outputs


def needs_gradient(module: torch.nn.Module, rows: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and (rows.requires_grad or any(p.requires_grad for p in module.parameters()))


def _slot_of_pair(rows_per_slot: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.arange(len(rows_per_slot)).repeat(rows_per_slot))


def _projections(module: torch.nn.Module) -> tuple[str, str]:
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


# ---------------------------------------------------------------- torch


def _differentiable(
    module: torch.nn.Module, rows_NH: torch.Tensor, row_index_M: torch.Tensor, rows_per_slot: np.ndarray
) -> torch.Tensor:
    pairs = x = rows_NH.index_select(0, row_index_M)
    if not len(pairs):
        # No row for any slot: still a function of the parameters, so that backward reaches the exchange on every rank.
        touched = sum((p.reshape(-1)[:0].float().sum() for p in module.parameters()), pairs.new_zeros(()))
        return pairs + touched.to(pairs.dtype)
    slot_of_pair = _slot_of_pair(rows_per_slot).to(x.device) if module.has_bias else None
    for name in _projections(module):
        x = _differentiable_product(module, name, x, rows_per_slot.tolist())
        if module.has_bias:
            x = x + getattr(module, f"{name}_bias").index_select(0, slot_of_pair)
        if name != "down_proj":
            x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
    return module.post_expert_norm(x) if module.has_post_expert_norm else x


def _differentiable_product(module: torch.nn.Module, name: str, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Rows grouped by slot times their slot's weight; weights in blocks are dequantised one expert at a time."""
    weight, scale = getattr(module, name), getattr(module, f"{name}_scale_inv", None)
    if scale is not None:
        weights = (dequantize_blocks(weight[slot], scale[slot], x.dtype) for slot, rows in enumerate(counts) if rows)
        parts = [part for part in x.split(counts) if len(part)]
        return torch.cat([_linear(module, part, w) for part, w in zip(parts, weights, strict=True)])
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    return _SlotProducts.apply(x, weight, counts, module.is_transposed)


class _SlotProducts(torch.autograd.Function):
    """Rows [M, K] grouped by slot times weight [S, N, K] ([S, K, N] when transposed) -> [M, N].

    Products and gradients of all slots are written where they belong: autograd would make one of each, then copy all of
    them into one tensor.
    """

    @staticmethod
    def forward(ctx, x, weight, counts, is_transposed):
        ctx.save_for_backward(x, weight)
        ctx.counts, ctx.is_transposed = counts, is_transposed
        out = _empty((x.shape[0], weight.shape[2 if is_transposed else 1]), x)
        for part, w, y in zip(x.split(counts), weight, out.split(counts), strict=True):
            if len(part):
                torch.mm(part, w if is_transposed else w.t(), out=y)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = _empty(x.shape, x) if ctx.needs_input_grad[0] else None
        grad_weight = _empty(weight.shape, weight) if ctx.needs_input_grad[1] else None
        begin = 0
        for slot, count in enumerate(ctx.counts):
            rows = slice(begin, begin := begin + count)
            if grad_x is not None and count:
                w = weight[slot]
                torch.mm(grad[rows], w.t() if ctx.is_transposed else w, out=grad_x[rows])
            if grad_weight is None:
                continue
            if not count:
                grad_weight[slot].zero_()
                continue
            left, right = (x, grad) if ctx.is_transposed else (grad, x)
            torch.mm(left[rows].t(), right[rows], out=grad_weight[slot])
        return grad_x, grad_weight, None, None


def _empty(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """As `like`, but of this shape: on CPUs from memory that is used again, without page faults."""
    return pool.empty(shape, like.dtype) if like.is_cpu else like.new_empty(shape)


def _many_rows(module: torch.nn.Module, x: torch.Tensor, slot: int) -> torch.Tensor:
    """All of one slot's rows, without gradients."""
    for name in _projections(module):
        scale, weight = getattr(module, f"{name}_scale_inv", None), getattr(module, name)[slot]
        if scale is None:
            x = _linear(module, x, weight)
        else:
            x = _linear_in_blocks(x, weight, scale[slot], module.is_transposed)
        if module.has_bias:
            x = x + getattr(module, f"{name}_bias")[slot]
        if name != "down_proj":
            x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
    return module.post_expert_norm(x) if module.has_post_expert_norm else x


def _linear(module: torch.nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight if module.is_transposed else F.linear(x, weight)


def _linear_in_blocks(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, is_transposed: bool) -> torch.Tensor:
    """x [M, K] times a weight in blocks, [N, K] ([K, N] when transposed), dequantised some rows at a time into one
    buffer.

    At once in float32: see _few_rows_product.
    """
    if is_transposed or x.device.type != "cpu" or native.extension is None or x.dtype == torch.float32:
        whole = dequantize_blocks(weight, scale, x.dtype)
        return x @ whole if is_transposed else F.linear(x, whole)
    out = x.new_empty(x.shape[0], weight.shape[0])
    tile = x.new_empty(min(_TILE_ROWS, weight.shape[0]), weight.shape[1])
    for begin in range(0, weight.shape[0], _TILE_ROWS):
        part = weight[begin : begin + _TILE_ROWS]
        blocks = scale[begin // BLOCK : -(-(begin + len(part)) // BLOCK)]
        values = tile[: len(part)]
        _in_parts(
            len(part) // BLOCK or 1,
            part.numel(),
            lambda index, count, part=part, blocks=blocks, values=values: _dequantize_part(
                part, blocks, values, index, count
            ),
        )
        out[:, begin : begin + len(part)] = F.linear(x, values)
    return out


def _dequantize_part(part: torch.Tensor, blocks: torch.Tensor, values: torch.Tensor, index: int, count: int) -> None:
    """Blocks of rows `index` of `count` of a tile of a weight in blocks into the same rows of `values`."""
    begin, end = len(blocks) * index // count, len(blocks) * (index + 1) // count
    rows = slice(begin * BLOCK, end * BLOCK)
    dequantize_blocks(part[rows], blocks[begin:end], values.dtype, out=values[rows])


# ---------------------------------------------------------------- C


def c_is_fast() -> bool:
    return native.extension is not None and native.extension.experts_is_fast("")


def _most_rows_in_c(module: torch.nn.Module, rows_NH: torch.Tensor) -> int:
    """Rows of a slot up to which C computes it; -1 where C cannot, or must not."""
    on_cpu = rows_NH.device.type == "cpu" and rows_NH.dtype in FEW_ROWS and rows_NH.dtype not in LARGEST
    if not on_cpu or module.is_transposed or not c_is_fast() or needs_gradient(module, rows_NH):
        return -1
    return min(_most_rows_of(module, name, rows_NH.dtype) for name in _projections(module))


def _most_rows_of(module: torch.nn.Module, name: str, dtype: torch.dtype) -> int:
    weight = getattr(module, name)
    is_scaled = getattr(module, f"{name}_scale_inv", None) is not None
    if weight.dtype not in (LARGEST if is_scaled else (dtype,)) or not weight.is_contiguous():
        return -1
    return FEW_ROWS[dtype if dtype == torch.float32 else weight.dtype]


def _few_rows(
    module: torch.nn.Module, rows_NH: torch.Tensor, row_index_M: torch.Tensor, rows_per_slot: np.ndarray
) -> torch.Tensor:
    """One product, one activation and one product for the pairs of all slots together."""
    x, row_index = rows_NH, row_index_M
    slot_of_pair = _slot_of_pair(rows_per_slot) if module.has_bias else None
    for name in _projections(module):
        scale = getattr(module, f"{name}_scale_inv", None)
        x = _few_rows_product(x, row_index, getattr(module, name), scale, rows_per_slot)
        if module.has_bias:
            x = x + getattr(module, f"{name}_bias").index_select(0, slot_of_pair)
        if name != "down_proj":
            x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
        row_index = None
    return module.post_expert_norm(x) if module.has_post_expert_norm else x


def _few_rows_product(
    x: torch.Tensor,
    row_index_M: torch.Tensor | None,
    weight: torch.Tensor,
    scale_inv: torch.Tensor | None,
    rows_per_slot: np.ndarray,
) -> torch.Tensor:
    """product(), but float32 rows meet weights in blocks dequantised: who computes in float32 compares results, and
    weights that stay in blocks then give the bits of those that were dequantised while loading.
    """
    if scale_inv is None or x.dtype != torch.float32:
        return product(x, row_index_M, weight, scale_inv, rows_per_slot)
    pairs = x if row_index_M is None else x.index_select(0, row_index_M)
    return torch.cat(
        [
            product(
                rows,
                None,
                dequantize_blocks(weight[slot], scale_inv[slot], x.dtype)[None],
                None,
                rows_per_slot[slot, None],
            )
            for slot, rows in enumerate(pairs.split(rows_per_slot.tolist()))
            if len(rows)
        ]
    )


def product(
    x: torch.Tensor,
    row_index_M: torch.Tensor | None,
    weight: torch.Tensor,
    scale_inv: torch.Tensor | None,
    rows_per_slot: np.ndarray,
    simd: str = "",
) -> torch.Tensor:
    """[M, N] in x's dtype: row row_index_M[m] of x [T, K] (m itself for None) times the weights of pair m's slot.

    weight [S, N, K], contiguous, in x's dtype, or float8_e4m3fn or int8 with scale_inv [S, ceil(N/128), ceil(K/128)];
    rows_per_slot [S] int64, adding up to M. In C, with torch.get_num_threads() threads, whose number does not change a
    bit; nor does what other rows there are. ValueError for what does not fit together.
    """
    num_slots, num_outputs, num_inputs = weight.shape
    num_pairs = x.shape[0] if row_index_M is None else row_index_M.shape[0]
    out = torch.empty(num_pairs, num_outputs, dtype=x.dtype)
    scales = None
    if scale_inv is not None:
        scales = scale_inv.detach().float().reshape(-1, scale_inv.shape[-1]).contiguous().numpy()
    arguments = (
        *(byte_rows(x), _NAMES[x.dtype]),
        None if row_index_M is None else row_index_M.contiguous().numpy(),
        *(byte_rows(weight.view(num_slots * num_outputs, num_inputs)), _NAMES[weight.dtype], scales),
        *(rows_per_slot, byte_rows(out), _NAMES[x.dtype]),
    )
    touched = int(np.count_nonzero(rows_per_slot)) * num_outputs * num_inputs * weight.element_size()
    _in_parts(
        torch.get_num_threads(),
        touched,
        lambda index, count: native.extension.experts_product(*arguments, index, count, simd),
    )
    return out


# ---------------------------------------------------------------- threads

_pool: ThreadPoolExecutor | None = None  # of threads that wait for parts; made when first needed


def _forget_pool() -> None:
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_pool)  # threads do not come along


def _in_parts(most: int, weight_bytes: int, work: Callable[[int, int], None]) -> None:
    """Call work(index, count) for every part, each in a thread of its own; the first one in this thread."""
    global _pool
    count = max(1, min(most, torch.get_num_threads(), weight_bytes // _BYTES_PER_THREAD))
    if count > 1 and (_pool is None or _pool._max_workers < count - 1):
        _pool = ThreadPoolExecutor(count - 1, thread_name_prefix="experts")
    others = [_pool.submit(work, index, count) for index in range(1, count)]
    try:
        work(0, count)
    finally:
        for other in others:
            other.result()

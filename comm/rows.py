"""Token rows: packed for the wire, unpacked, and summed by token. Hidden values, their scales, weights and slots.

Pure functions of tensors, on any device. On a CPU the C extension does the work where it is built; the torch twins
(`*_torch`) give the same results bit for bit, where a nan equals every other, and raise the same errors.
moe_runtime.core.native.describe() says whether C runs, native.extension.simd_name() with which instructions. C uses one
thread per call.

The parts of a packed row lie apart from each other, so that payloads travel as bytes with their scales beside them, and
every part starts at a multiple of 16 bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from ..core import native
from ..core.errors import ConfigError
from ..core.memory import pool
from ..core.tensors import aligned, byte_rows, takes_c
from . import cuda
from .formats import FORMATS, WireFormat, decode, encode_into, num_scales, payload_bytes
from .quirks import dtype_name

_ROW_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # what C knows as rows
ALIGN = 16  # bytes
_CACHED_BYTES = 1 << 23  # results above this do not stay in caches


@dataclass(frozen=True)
class RowLayout:
    """Where the parts of a packed row of H hidden values and K choices lie, in bytes."""

    hidden_size: int
    top_k: int
    dtype: torch.dtype  # of the rows that dispatch takes and gives
    wire: WireFormat
    weight_dtype: torch.dtype

    @cached_property
    def scales_at(self) -> int:
        return round_up(payload_bytes(self.wire, self.hidden_size))

    @cached_property
    def weights_at(self) -> int:
        return round_up(self.scales_at + 4 * num_scales(self.wire, self.hidden_size))

    @cached_property
    def slots_at(self) -> int:
        return round_up(self.weights_at + self.top_k * self.weight_dtype.itemsize)

    @cached_property
    def row_bytes(self) -> int:
        return round_up(self.slots_at + self.top_k * 4)

    @property
    def gradient_bytes(self) -> int:
        """A row of gradients has no slots."""
        return self.slots_at


def layout_of(hidden_size: int, top_k: int, dtype: torch.dtype, wire: str) -> RowLayout:
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return RowLayout(hidden_size, top_k, dtype, FORMATS[wire], weight_dtype)


# ---------------------------------------------------------------- packed rows

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # hidden, weights, slots


def pack(
    x_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    tokens_N: torch.Tensor,
    slots_NK: torch.Tensor,
    layout: RowLayout,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """uint8 [N, row_bytes]: row n is token tokens_N[n] (int64) with its local slots slots_NK[n] (int32, -1 elsewhere).

    Weights whose expert is elsewhere are 0. What lies between the parts is not set. `out`, where given, is filled and
    returned: uint8 [N, row_bytes] on x's device, also rows of a larger buffer, at multiples of 16 bytes. Not
    differentiable. ConfigError for an `out` that does not fit and, on a CPU, for tokens that x_TH does not have.
    """
    if out is None and cuda.takes("pack", x_TH, layout):
        return cuda.pack(x_TH, weights_TK, tokens_N, slots_NK, layout)
    packed = _packed_like(x_TH, len(tokens_N), layout, out)
    if not len(tokens_N):
        return packed
    if x_TH.dtype not in _ROW_DTYPES or not takes_c(x_TH, tokens_N, slots_NK):
        return _pack_torch(x_TH, weights_TK, tokens_N, slots_NK, layout, packed)
    _in_c(
        "pack_rows",
        byte_rows(x_TH),
        dtype_name(x_TH.dtype),
        _array(weights_TK, layout.weight_dtype),
        _array(tokens_N, torch.int64),
        _array(slots_NK, torch.int32),
        packed.numpy(),
        layout.wire.name,
        *_places(layout),
        "",
    )
    return packed


def packer(
    x_TH: torch.Tensor, weights_TK: torch.Tensor, tokens_N: np.ndarray, slots_NK: np.ndarray, layout: RowLayout
) -> Callable[[int, int, torch.Tensor], None]:
    """A function (begin, end, out) that packs rows begin..end into `out`: pack, with what all calls share done once.

    On a CPU. tokens_N int64 and slots_NK int32 are a plan's arrays.
    """
    if x_TH.dtype not in _ROW_DTYPES or not takes_c(x_TH):
        tokens, slots = torch.from_numpy(tokens_N), torch.from_numpy(slots_NK)
        return lambda begin, end, out: pack(x_TH, weights_TK, tokens[begin:end], slots[begin:end], layout, out)
    x, weights = byte_rows(x_TH), _array(weights_TK, layout.weight_dtype)
    dtype, places = dtype_name(x_TH.dtype), _places(layout)

    def fill(begin: int, end: int, out: torch.Tensor) -> None:
        packed, which = out.numpy(), slice(begin, end)
        _in_c("pack_rows", x, dtype, weights, tokens_N[which], slots_NK[which], packed, layout.wire.name, *places, "")

    return fill


def pack_torch(
    x_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    tokens_N: torch.Tensor,
    slots_NK: torch.Tensor,
    layout: RowLayout,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The torch twin of pack: same arguments, bytes and errors, on any device."""
    packed = _packed_like(x_TH, len(tokens_N), layout, out)
    return _pack_torch(x_TH, weights_TK, tokens_N, slots_NK, layout, packed) if len(tokens_N) else packed


def _pack_torch(
    x_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    tokens_N: torch.Tensor,
    slots_NK: torch.Tensor,
    layout: RowLayout,
    packed: torch.Tensor,
) -> torch.Tensor:
    _check_tokens(tokens_N, len(x_TH))
    hidden, scales, weights, slots = _parts(packed, layout)
    if layout.wire.dtype == x_TH.dtype:
        torch.index_select(x_TH.detach(), 0, tokens_N, out=hidden)
    else:
        encode_into(x_TH.detach().index_select(0, tokens_N), layout.wire, hidden, scales)
    weights.copy_(weights_TK.detach().to(x_TH.device).index_select(0, tokens_N).masked_fill(slots_NK < 0, 0))
    slots.copy_(slots_NK)
    return packed


def unpack(packed: torch.Tensor, layout: RowLayout, *, copy: bool = False, out: Parts | None = None) -> Parts:
    """(hidden [N, H] in the layout's dtype, weights [N, K], slots [N, K] int32) of packed rows uint8 [N, row_bytes].

    Hidden values that travelled as they are stay a view of `packed`, unless `copy`: that leaves nothing which the next
    rows in the same memory would change. Everything else is contiguous and new. `out`, where given, is filled and
    returned: three contiguous tensors of those shapes and dtypes, where `packed` is.
    """
    if out is None and cuda.takes("unpack", packed, layout):
        return cuda.unpack(packed, layout)
    if not takes_c(packed):
        return unpack_torch(packed, layout, copy=copy, out=out)
    if out is None:
        as_they_are = layout.wire.dtype == layout.dtype and not copy
        hidden, weights, slots = new_parts(len(packed), layout, packed.device, hidden=not as_they_are)
    else:
        hidden, weights, slots = out
    _in_c(
        "unpack_rows",
        byte_rows(packed),
        layout.wire.name,
        None if hidden is None else byte_rows(hidden),
        dtype_name(layout.dtype),
        weights.numpy(),
        slots.numpy(),
        *_places(layout),
        "",
    )
    if hidden is None:
        hidden = packed.narrow(1, 0, payload_bytes(layout.wire, layout.hidden_size)).view(layout.dtype)
    return hidden, weights, slots


def unpack_torch(packed: torch.Tensor, layout: RowLayout, *, copy: bool = False, out: Parts | None = None) -> Parts:
    """The torch twin of unpack: same arguments and results, on any device."""
    hidden, scales, weights, slots = _parts(packed, layout)
    if out is not None:
        decoded = hidden if layout.wire.dtype == layout.dtype else decode(hidden, scales, layout.wire, layout.dtype)
        for given, part in zip(out, (decoded, weights, slots), strict=True):
            given.copy_(part)
        return out
    if layout.wire.dtype != layout.dtype:
        hidden = decode(hidden, scales, layout.wire, layout.dtype)
    elif copy:
        hidden = _new(hidden)
    return hidden, _new(weights), _new(slots)


def new_parts(count: int, layout: RowLayout, device: torch.device, hidden: bool = True) -> Parts:
    """What unpack gives, not set; without the hidden values where those stay where they are."""
    rows, shape = None, (count, layout.hidden_size)
    if hidden:
        on_cpu = device.type == "cpu"
        rows = pool.empty(shape, layout.dtype) if on_cpu else torch.empty(shape, dtype=layout.dtype, device=device)
    weights = torch.empty(count, layout.top_k, dtype=layout.weight_dtype, device=device)
    return rows, weights, torch.empty(count, layout.top_k, dtype=torch.int32, device=device)


def pack_gradients(rows_NH: torch.Tensor, weights_NK: torch.Tensor, layout: RowLayout) -> torch.Tensor:
    """uint8 [N, gradient_bytes] of the gradients of unpack's rows and weights; `layout` is an exact one."""
    packed = torch.empty(rows_NH.shape[0], layout.gradient_bytes, dtype=torch.uint8, device=rows_NH.device)
    hidden, _, weights, _ = _parts(packed, layout)
    hidden.copy_(rows_NH)
    weights.copy_(weights_NK)
    return packed


def unpack_gradients(packed: torch.Tensor, layout: RowLayout) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, _, weights, _ = _parts(packed, layout)
    return hidden, weights


def _parts(
    packed: torch.Tensor, layout: RowLayout
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """(hidden, scales or None, weights, slots) as strided views of packed rows; slots may be cut off."""

    def part(begin: int, size: int, dtype: torch.dtype) -> torch.Tensor:
        return packed[:, begin : begin + size].view(dtype)

    hidden = part(0, payload_bytes(layout.wire, layout.hidden_size), layout.wire.dtype)
    scale_bytes = 4 * num_scales(layout.wire, layout.hidden_size)
    scales = part(layout.scales_at, scale_bytes, torch.float32) if scale_bytes else None
    weights = part(layout.weights_at, layout.top_k * layout.weight_dtype.itemsize, layout.weight_dtype)
    slots = packed[:, layout.slots_at : layout.slots_at + layout.top_k * 4]
    return hidden, scales, weights, slots.view(torch.int32) if packed.shape[1] == layout.row_bytes else slots


def _packed_like(x_TH: torch.Tensor, count: int, layout: RowLayout, out: torch.Tensor | None) -> torch.Tensor:
    if out is None:
        return torch.empty(count, layout.row_bytes, dtype=torch.uint8, device=x_TH.device)
    wanted = (torch.uint8, torch.Size((count, layout.row_bytes)), x_TH.device)
    if (out.dtype, out.shape, out.device) != wanted:
        raise ConfigError(
            f"out: must be uint8 {list(wanted[1])} on {x_TH.device}, got {dtype_name(out.dtype)} {list(out.shape)} on "
            f"{out.device}"
        )
    apart = out.stride(0) if count > 1 else layout.row_bytes
    if out.stride(1) != 1 or apart < layout.row_bytes or apart % ALIGN or out.data_ptr() % ALIGN:
        raise ConfigError(f"out: rows must be contiguous, apart from each other and at multiples of {ALIGN} bytes")
    return out


def _places(layout: RowLayout) -> tuple[int, int, int]:
    return layout.scales_at, layout.weights_at, layout.slots_at


def round_up(size: int) -> int:
    return (size + ALIGN - 1) // ALIGN * ALIGN


# ---------------------------------------------------------------- rows in another order


def gather(
    rows_NH: torch.Tensor,
    order_M: torch.Tensor,
    out: torch.Tensor | None = None,
    visit: Callable[[], torch.Tensor] | None = None,
) -> torch.Tensor:
    """[M, H]: row m is row order_M[m] (int64) of rows_NH. `out`, where given, is filled and returned.

    visit: gives a permutation [M] in which equal entries of order_M are neighbours; for large rows that are wanted
    several times, so that each is read from memory once. Asked for where that helps.

    Differentiable where `out` is not given; the gradient is combine_rows, whose order of adding is fixed. Raises
    ConfigError, on a CPU, for rows that are not there.
    """
    if out is None and rows_NH.requires_grad and torch.is_grad_enabled():
        return _Gather.apply(rows_NH, order_M)
    return _gather(rows_NH.detach(), order_M, out, visit)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_NH, order_M):
        ctx.save_for_backward(order_M)
        ctx.num_rows = rows_NH.shape[0]
        return _gather(rows_NH, order_M, None)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_MH):
        (order_M,) = ctx.saved_tensors
        return combine_rows(grad_MH, order_M, ctx.num_rows), None


def _gather(
    rows_NH: torch.Tensor,
    order_M: torch.Tensor,
    out: torch.Tensor | None,
    visit: Callable[[], torch.Tensor] | None = None,
) -> torch.Tensor:
    if not takes_c(rows_NH, order_M):
        return torch.index_select(rows_NH, 0, order_M, out=out)
    if out is None:
        out = pool.empty((len(order_M), rows_NH.shape[1]), rows_NH.dtype)
    table = byte_rows(out)
    order = _array(visit(), torch.int64) if visit is not None and table.nbytes > _CACHED_BYTES else None
    _in_c("gather_rows", byte_rows(rows_NH), _array(order_M, torch.int64), table, order)
    return out


# ---------------------------------------------------------------- sums


def combine_rows(
    rows_NH: torch.Tensor,
    tokens_N: torch.Tensor,
    num_tokens: int,
    weights_N: torch.Tensor | None = None,
    choices_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [num_tokens, H] in the dtype of the rows: the sum of each token's rows, 0 where it has none.

    rows_NH of any float dtype, also a strided view; tokens_N int64 [N], 0 <= token < num_tokens, in any order. Added in
    float32 (float64 stays), always in the same order, and rounded once: in the order of the rows, or by choices_N [N]
    where it is given, ties in their own order. weights_N [N]: a factor of each row; the product too is rounded to
    float32 before it is added. Differentiable in rows_NH and weights_N. ConfigError, on a CPU, for tokens outside.

    Bit for bit the same on every device: C on a CPU, a kernel of comm/cuda.py on CUDA, torch in passes elsewhere;
    torch's index_add adds in any order on CUDA.
    """
    differentiable = rows_NH.requires_grad or (weights_N is not None and weights_N.requires_grad)
    if not (differentiable and torch.is_grad_enabled()):
        return _sum_rows(rows_NH, weights_N, tokens_N, choices_N, num_tokens)
    return _CombineRows.apply(rows_NH, weights_N, tokens_N, choices_N, num_tokens)


def combine_rows_torch(
    rows_NH: torch.Tensor,
    tokens_N: torch.Tensor,
    num_tokens: int,
    weights_N: torch.Tensor | None = None,
    choices_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """The torch twin of combine_rows, for any device. Holds float32 copies of all rows and sums while it works."""
    _check_tokens(tokens_N, num_tokens)
    wide = cuda.sum_dtype(rows_NH.dtype)
    weights = None if weights_N is None else weights_N.to(wide)
    if rows_NH.device.type == "cpu" and choices_N is None:  # a CPU adds them one after the other
        values = rows_NH.to(wide) if weights is None else rows_NH.to(wide) * weights.unsqueeze(1)
        return values.new_zeros(num_tokens, values.shape[1]).index_add(0, tokens_N, values).to(rows_NH.dtype)
    order, starts = cuda.order_of_rows(tokens_N, choices_N, num_tokens)
    return cuda.sum_in_passes(rows_NH, order, starts, weights).to(rows_NH.dtype)


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_NH, weights_N, tokens_N, choices_N, num_tokens):
        ctx.save_for_backward(tokens_N, weights_N, rows_NH if ctx.needs_input_grad[1] else None)
        ctx.row_dtype = rows_NH.dtype
        return _sum_rows(rows_NH, weights_N, tokens_N, choices_N, num_tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TH):
        tokens_N, weights_N, rows_NH = ctx.saved_tensors
        grad_NH = grad_TH.index_select(0, tokens_N)
        if weights_N is None:
            return grad_NH.to(ctx.row_dtype), None, None, None, None
        wide = cuda.sum_dtype(ctx.row_dtype)
        grad_NH = grad_NH.to(wide)
        grad_rows = (grad_NH * weights_N.to(wide).unsqueeze(1)).to(ctx.row_dtype)
        grad_weights = None if rows_NH is None else (grad_NH * rows_NH.to(wide)).sum(1).to(weights_N.dtype)
        return grad_rows, grad_weights, None, None, None


def _sum_rows(
    rows_NH: torch.Tensor,
    weights_N: torch.Tensor | None,
    tokens_N: torch.Tensor,
    choices_N: torch.Tensor | None,
    num_tokens: int,
) -> torch.Tensor:
    if rows_NH.dtype in _ROW_DTYPES and takes_c(rows_NH, tokens_N):
        return _combine_in_c(rows_NH, tokens_N, num_tokens, weights_N, choices_N)
    if cuda.takes("sum", rows_NH):
        order, starts = cuda.order_of_rows(tokens_N, choices_N, num_tokens)
        weights = None if weights_N is None else weights_N.to(cuda.sum_dtype(rows_NH.dtype))
        return cuda.sum_by_kernel(rows_NH, order, starts, weights, rows_NH.dtype)
    return combine_rows_torch(rows_NH, tokens_N, num_tokens, weights_N, choices_N)


def _combine_in_c(
    rows_NH: torch.Tensor,
    tokens_N: torch.Tensor,
    num_tokens: int,
    weights_N: torch.Tensor | None,
    choices_N: torch.Tensor | None,
) -> torch.Tensor:
    sums = pool.empty((num_tokens, rows_NH.shape[1]), rows_NH.dtype)
    _in_c(
        "sum_rows",
        byte_rows(rows_NH),
        dtype_name(rows_NH.dtype),
        _array(tokens_N, torch.int64),
        None if weights_N is None else _array(weights_N, cuda.sum_dtype(rows_NH.dtype)),
        None if choices_N is None else _array(choices_N.argsort(stable=True), torch.int64),
        byte_rows(sums),
        "",
    )
    return sums


# ---------------------------------------------------------------- tensors for C


def _in_c(function: str, *arguments: object) -> None:
    try:
        getattr(native.extension, function)(*arguments)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _array(values: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    if values.requires_grad or values.dtype != dtype or not (values.is_cpu and values.is_contiguous()):
        values = values.detach().to("cpu", dtype).contiguous()
    return aligned(values).numpy()


def _new(part: torch.Tensor) -> torch.Tensor:
    return part.clone(memory_format=torch.contiguous_format)


def _check_tokens(tokens_N: torch.Tensor, num_tokens: int) -> None:
    """On a CPU only: elsewhere looking means waiting for the device."""
    if tokens_N.device.type != "cpu":
        return
    wrong = (tokens_N < 0) | (tokens_N >= num_tokens)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ConfigError(f"tokens: row {row} is of token {int(tokens_N[row])}, which is not in 0..{num_tokens - 1}")

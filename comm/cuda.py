"""Rows packed, unpacked and summed on CUDA devices: our kernels through cupy where it loads, torch's operations else.

The one importer of cupy. Kernels read and write torch's memory through DLPack, on torch's current stream. The twins are
torch: comm/rows.py for pack and unpack, sum_in_passes for sums; both give the same bits, and `describe` says which run.
Left to torch on purpose: rows that are only cast on the wire, and unpacking rows that travelled as they are (a view).

Nobody has run these kernels on a GPU yet. What was done instead: NVIDIA's compilers take them, and tests execute their
text on the host against the twins (tests/test_cuda_kernels.py; tests/test_cuda.py is for a machine with a device).
Therefore `available` compares a small example with the twins at first use, and differing kernels stay off.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .cuda_source import THREADS, source

if TYPE_CHECKING:
    from .rows import RowLayout

_C_TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "Bfloat16",
    torch.float16: "Float16",
    torch.float8_e4m3fn: "E4m3fn",
    torch.float8_e4m3fnuz: "E4m3fnuz",
    torch.int8: "signed char",
}
_ROW_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# ---------------------------------------------------------------- what runs


@functools.cache
def available() -> tuple[bool, str]:
    """Whether this process uses the kernels, and the reason why it does not, or cupy's version.

    Tried once: cupy is imported, the kernels are compiled and compared with their twins on a small example.
    """
    if not torch.cuda.is_available():
        return False, "no CUDA device"
    try:
        import cupy
    except ModuleNotFoundError as error:
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        return False, f"{error.name} is not installed (install the cupy that is built for {built})"
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return False, f"cupy does not load: {_one_line(error)}"
    named = f"cupy {cupy.__version__}"
    try:
        wrong = _kernels_that_differ()
    except (OSError, RuntimeError, ImportError, TypeError, BufferError, cupy.cuda.compiler.CompileException) as error:
        return False, f"{named} does not run the kernels: {_one_line(error)}"
    return (False, f"other bits than torch with {named}: {', '.join(wrong)}") if wrong else (True, named)


def takes(work: str, tensor: torch.Tensor, layout: RowLayout | None = None) -> bool:
    """The one decision between kernel and twin. work: "pack" (tensor: x), "unpack" (packed rows) or "sum" (rows)."""
    if tensor.device.type != "cuda":
        return False
    if layout is None:
        able = tensor.dtype in _ROW_TYPES
    elif work == "pack":
        able = tensor.dtype in _ROW_TYPES and (layout.wire.scaled or layout.wire.dtype == tensor.dtype)
    else:
        able = layout.wire.scaled
    return able and available()[0]


def describe() -> str:
    """One line for runtime.describe() on a CUDA device."""
    used, why = available()
    return f"rows on cuda: {'our kernels through' if used else 'torch only, our kernels are off:'} {why}"


# ---------------------------------------------------------------- packed rows


def pack(
    x_TH: torch.Tensor, weights_TK: torch.Tensor, tokens_N: torch.Tensor, slots_NK: torch.Tensor, layout: RowLayout
) -> torch.Tensor:
    """comm/rows.py's pack in one launch, scales and payload included: uint8 [N, row_bytes], the same bits.

    For x in the wire's own dtype, and for scaled formats. tokens_N must be token numbers: nothing checks them here.
    """
    rows = _unit_stride(x_TH.detach())
    packed = torch.empty(len(tokens_N), layout.row_bytes, dtype=torch.uint8, device=rows.device)
    if not len(tokens_N):
        return packed
    weights = weights_TK.detach().to(rows.device, layout.weight_dtype)
    choices = (weights, tokens_N.long(), slots_NK.int(), np.int64(layout.top_k), packed, np.int64(layout.row_bytes))
    parts: tuple[np.int64, ...] = (np.int64(layout.weights_at), np.int64(layout.slots_at))
    stride, hidden, itemsize = np.int64(rows.stride(0)), np.int64(layout.hidden_size), np.int64(rows.itemsize)
    types = {"WEIGHT": layout.weight_dtype}
    if not layout.wire.scaled:
        _launch("pack_exact", types, len(packed), rows, stride * itemsize, hidden * itemsize, *choices, *parts)
    else:
        types |= {"ROW": rows.dtype, "WIRE": layout.wire.dtype}
        parts = (np.int64(layout.scales_at), *parts)
        largest = np.float32(layout.wire.largest or 0)
        _launch("pack_scaled", types, len(packed), rows, stride, hidden, largest, *choices, *parts)
    return packed


def unpack(packed: torch.Tensor, layout: RowLayout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """comm/rows.py's unpack in one launch, for scaled formats: (hidden [N, H], weights [N, K], slots [N, K] int32)."""
    count, device = len(packed), packed.device
    hidden = torch.empty(count, layout.hidden_size, dtype=layout.dtype, device=device)
    weights = torch.empty(count, layout.top_k, dtype=layout.weight_dtype, device=device)
    slots = torch.empty(count, layout.top_k, dtype=torch.int32, device=device)
    if count:
        packed = packed.contiguous()
        if packed.data_ptr() % 16:  # a slice of something else: its parts would not lie as their types need
            packed = packed.clone()
        types = {"ROW": layout.dtype, "WIRE": layout.wire.dtype, "WEIGHT": layout.weight_dtype}
        sizes = (layout.row_bytes, layout.hidden_size, layout.top_k)
        places = (layout.scales_at, layout.weights_at, layout.slots_at)
        _launch("unpack_scaled", types, count, packed, *map(np.int64, sizes + places), hidden, weights, slots)
    return hidden, weights, slots


# ---------------------------------------------------------------- sums in a fixed order


def order_of_rows(
    tokens_N: torch.Tensor, choices_N: torch.Tensor | None, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(order [N], starts [num_tokens + 1]) int64: the rows of token t are order[starts[t]:starts[t + 1]], in order."""
    by_choice = None if choices_N is None else choices_N.argsort(stable=True)
    tokens = tokens_N if by_choice is None else tokens_N[by_choice]
    tokens, order = tokens.sort(stable=True)
    starts = torch.searchsorted(tokens, torch.arange(num_tokens + 1, device=tokens.device))
    return order if by_choice is None else by_choice[order], starts


def sum_in_passes(
    rows_NH: torch.Tensor, order: torch.Tensor, starts: torch.Tensor, weights_N: torch.Tensor | None = None
) -> torch.Tensor:
    """The slow twin of sum_by_kernel, for any device: pass j adds the j-th row of every token, so that no two rows of
    one pass meet. Sums [num_tokens, H] in float32 or float64.
    """
    values = rows_NH.to(sum_dtype(rows_NH.dtype))
    if weights_N is not None:
        values = values * weights_N.unsqueeze(1)
    counts = starts.diff()
    sums = values.new_zeros(len(counts), values.shape[1])
    for number in range(int(counts.max()) if len(counts) else 0):
        tokens = (counts > number).nonzero().squeeze(1)
        rows = order[starts[tokens] + number]
        sums[tokens] = sums[tokens] + values[rows]
    return sums


def sum_by_kernel(
    rows_NH: torch.Tensor, order: torch.Tensor, starts: torch.Tensor, weights_N: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Sums [num_tokens, H] in one launch; in `dtype` where the rows are too, else in float32 or float64."""
    rows = _unit_stride(rows_NH.detach())
    wide = sum_dtype(rows.dtype)
    made = dtype if dtype == rows.dtype else wide
    sums = torch.empty(len(starts) - 1, rows.shape[1], dtype=made, device=rows.device)
    if not len(rows) or not len(sums):
        return sums.zero_()
    factors = rows.new_empty(1, dtype=wide) if weights_N is None else weights_N.detach()
    types = {"ROW": rows.dtype, "SUM": wide, "OUT": made, "WEIGHTED": int(weights_N is not None)}
    sizes = (np.int64(rows.stride(0)), np.int64(rows.shape[1]))
    _launch("sum_rows", types, len(sums), rows, *sizes, order, starts, factors, sums)
    return sums


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------- launches


def _launch(kernel: str, types: dict[str, Any], blocks: int, *arguments: Any) -> None:
    """Run a kernel on torch's current stream of its tensors' device. Whole numbers and floats are numpy's, by size.

    The first argument may be strided rows, with values side by side; other tensors are made contiguous.
    """
    import cupy

    device = arguments[0].device
    function = _compiled(kernel, tuple((name, _C_TYPES.get(kind, kind)) for name, kind in types.items()))
    with torch.cuda.device(device), cupy.cuda.Device(device.index):
        with cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream, device.index):
            shared = (a if isinstance(a, np.generic) else cupy.from_dlpack(a) for a in as_arguments(arguments))
            function((blocks,), (THREADS,), tuple(shared))


@functools.cache
def _compiled(kernel: str, macros: tuple[tuple[str, Any], ...]) -> Any:
    import cupy

    return cupy.RawKernel(source(kernel, macros), kernel)


def as_arguments(arguments: tuple[Any, ...]) -> list[Any]:
    """Tensors as views of their bytes, since cupy has neither bfloat16 nor 8-bit floats; numbers as they are."""
    rows, *others = arguments
    flat = (a if isinstance(a, np.generic) else a.contiguous().as_strided((a.numel(),), (1,)) for a in others)
    return [a.view(torch.uint8) if isinstance(a, torch.Tensor) else a for a in (rows, *flat)]


def _unit_stride(rows: torch.Tensor) -> torch.Tensor:
    """Rows [N, H] whose values lie side by side: themselves where they do. Rows may lie apart from each other."""
    if rows.shape[1] == 1:
        return rows.as_strided(rows.shape, (rows.stride(0), 1))  # the stride of a single value may be anything
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _kernels_that_differ() -> list[str]:
    """The kernels that give other bits than their twins on a small example of this process's current device."""
    from . import rows  # which asks this module what to use, and has the twins

    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(5, 200, generator=generator).bfloat16(), torch.rand(5, 3, generator=generator)
    tokens, slots = torch.tensor([4, 0, 2, 4]), torch.arange(-4, 8, dtype=torch.int32).view(4, 3)
    wrong = []
    for wire, name in (("bfloat16", "pack_exact"), ("float8_e4m3fn", "pack_scaled")):
        layout = rows.layout_of(200, 3, x.dtype, wire)
        expected = rows.unpack(rows.pack(x, weights, tokens, slots, layout), layout)
        packed = pack(x.cuda(), weights.cuda(), tokens.cuda(), slots.cuda(), layout)
        if not _same(rows.unpack(packed.cpu(), layout), expected):
            wrong.append(name)
        elif layout.wire.scaled and not _same(unpack(packed, layout), expected):
            wrong.append("unpack_scaled")
    order, starts = order_of_rows(tokens, None, 5)
    sums = sum_by_kernel(x[:4].cuda(), order.cuda(), starts.cuda(), weights[:4, 0].cuda(), torch.float32)
    same = _same([sums], [sum_in_passes(x[:4], order, starts, weights[:4, 0])])
    return wrong if same else [*wrong, "sum_rows"]


def _same(got: Any, expected: Any) -> bool:
    return all(torch.equal(a.cpu(), b) for a, b in zip(got, expected, strict=True))

"""Weights of 8 bits with one float32 scale per 128x128 block (`weight_scale_inv`): DeepSeek's FP8, and INT8.

Sources of the formats, as config.json's `quantization_config` says them: FP8 is DeepSeek-V3's (quant_method fp8, fmt
e4m3, weight_block_size [128, 128]); INT8 that of the Block-INT8 DeepSeek checkpoints which SGLang loads (quant_method
blockwise_int8). value = stored x weight_scale_inv of its block, in both.

On a CPU the C extension does the work where it is built, in one thread per call and without a float32 copy of the
weight; the torch twins (`*_torch`) give the same bits, where a nan equals every other.
"""

from __future__ import annotations

import torch

from ..core import native
from ..core.tensors import byte_rows, takes_c

BLOCK = 128
FORMATS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}  # what the largest value of a block becomes
_NAMES = {
    dtype: str(dtype).removeprefix("torch.")
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, *LARGEST)
}


def num_blocks(shape: torch.Size | tuple[int, ...], block: tuple[int, int] = (BLOCK, BLOCK)) -> tuple[int, int]:
    """Blocks down and across a matrix, the last two of `shape`; those at its edges may be smaller."""
    return -(-shape[-2] // block[0]), -(-shape[-1] // block[1])


def dequantize_blocks(
    weight: torch.Tensor,
    scale_inv: torch.Tensor,
    dtype: torch.dtype,
    block: tuple[int, int] = (BLOCK, BLOCK),
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """[rows, cols] float8 or int8 and [ceil(rows/b0), ceil(cols/b1)] float32 to [rows, cols] in `dtype`.

    `out`, where given, is filled and returned: contiguous, in `dtype`; not differentiable then. Raises ValueError when
    the scales do not cover the weight.
    """
    differentiable = scale_inv.requires_grad and torch.is_grad_enabled() and out is None
    if differentiable or weight.dtype not in LARGEST or not _takes_c(dtype, weight, scale_inv):
        values = dequantize_blocks_torch(weight, scale_inv, dtype, block)
        return values if out is None else out.copy_(values)
    _check_scales(weight, scale_inv, block)
    values = torch.empty(weight.shape, dtype=dtype) if out is None else out
    scales = scale_inv.detach().float().contiguous().numpy()
    native.extension.dequantize_rows(
        byte_rows(weight), _NAMES[weight.dtype], scales, *block, byte_rows(values), _NAMES[dtype], ""
    )
    return values


def dequantize_blocks_torch(
    weight: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype, block: tuple[int, int] = (BLOCK, BLOCK)
) -> torch.Tensor:
    """The torch twin of dequantize_blocks: same arguments, values and errors, on any device."""
    needed = _check_scales(weight, scale_inv, block)
    rows, cols = weight.shape
    values = weight.to(torch.float32)
    if rows % block[0] == 0 and cols % block[1] == 0:
        blocks = values.view(needed[0], block[0], needed[1], block[1])
        return blocks.mul_(scale_inv.float()[:, None, :, None]).view(rows, cols).to(dtype)
    full = scale_inv.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :cols]
    return values.mul_(full).to(dtype)


def quantize_blocks(
    weight: torch.Tensor, block: int = BLOCK, to: torch.dtype = torch.float8_e4m3fn
) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, cols] float to (`to` [rows, cols], float32 scales [ceil(rows/b), ceil(cols/b)]).

    to: float8_e4m3fn or int8. The scale of a block is its largest absolute value / the format's largest (448, 127); a
    block with a nan or an infinite value has a scale that is none. Not differentiable.
    """
    if not _takes_c(weight.dtype, weight):
        return quantize_blocks_torch(weight, block, to)
    rows, cols = weight.shape
    quantised = torch.empty(rows, cols, dtype=to)
    scale = torch.empty(num_blocks(weight.shape, (block, block)))
    native.extension.quantize_rows(
        *(byte_rows(weight), _NAMES[weight.dtype]),
        *(byte_rows(quantised), _NAMES[quantised.dtype], scale.numpy()),
        *(block, block, "weight", ""),
    )
    return quantised, scale


@torch.no_grad()
def quantize_blocks_torch(
    weight: torch.Tensor, block: int = BLOCK, to: torch.dtype = torch.float8_e4m3fn
) -> tuple[torch.Tensor, torch.Tensor]:
    """The torch twin of quantize_blocks: same arguments and values, on any device."""
    rows, cols = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -cols % block, 0, -rows % block))
    blocks = padded.view(padded.shape[0] // block, block, padded.shape[1] // block, block)
    scale = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-12) / LARGEST[to]
    values = blocks / scale[:, None, :, None]
    if to == torch.int8:
        values = values.round().nan_to_num(nan=0.0)  # int8 has no nan: the scale says it
    quantised = values.to(to).view(padded.shape)
    return quantised[:rows, :cols].contiguous(), scale


def _check_scales(weight: torch.Tensor, scale_inv: torch.Tensor, block: tuple[int, int]) -> tuple[int, int]:
    needed = num_blocks(weight.shape, block)
    if tuple(scale_inv.shape) != needed:
        raise ValueError(
            f"scales of shape {tuple(scale_inv.shape)} for a weight of {tuple(weight.shape)}: need {needed}"
        )
    return needed


def _takes_c(dtype: torch.dtype, *tensors: torch.Tensor) -> bool:
    """Whether C runs: `dtype` is that of the values outside the blocks."""
    return dtype in _NAMES and dtype not in LARGEST and takes_c(*tensors)

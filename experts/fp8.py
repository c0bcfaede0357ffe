"""DeepSeek's FP8 weights: float8_e4m3fn values with one float32 scale per 128x128 block (`weight_scale_inv`).

Source of the format: the DeepSeek-V3 checkpoint's config.json (`quantization_config`: quant_method fp8, fmt e4m3,
weight_block_size [128, 128]); value = float8 x weight_scale_inv of its block.
"""

from __future__ import annotations

import torch

BLOCK = 128


def dequantize_blocks(
    weight: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype, block: tuple[int, int] = (BLOCK, BLOCK)
) -> torch.Tensor:
    """[rows, cols] float8 and [ceil(rows/b0), ceil(cols/b1)] float32 to [rows, cols] in `dtype`.

    Raises ValueError when the scales do not cover the weight.
    """
    rows, cols = weight.shape
    needed = (-(-rows // block[0]), -(-cols // block[1]))
    if tuple(scale_inv.shape) != needed:
        raise ValueError(
            f"scales of shape {tuple(scale_inv.shape)} for a weight of {tuple(weight.shape)}: need {needed}"
        )
    values = weight.to(torch.float32)
    if rows % block[0] == 0 and cols % block[1] == 0:
        blocks = values.view(needed[0], block[0], needed[1], block[1])
        return blocks.mul_(scale_inv.float()[:, None, :, None]).view(rows, cols).to(dtype)
    full = scale_inv.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :cols]
    return values.mul_(full).to(dtype)


def quantize_blocks(weight: torch.Tensor, block: int = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, cols] float to (float8_e4m3fn [rows, cols], float32 scales [ceil(rows/b), ceil(cols/b)]).

    The scale of a block is its largest absolute value / 448, the largest finite e4m3 value.
    """
    rows, cols = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -cols % block, 0, -rows % block))
    blocks = padded.view(padded.shape[0] // block, block, padded.shape[1] // block, block)
    scale = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-12) / 448.0
    quantised = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn).view(padded.shape)
    return quantised[:rows, :cols].contiguous(), scale

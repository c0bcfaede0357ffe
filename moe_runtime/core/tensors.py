"""Tensors as the C extension takes them: rows of bytes, where they lie. Owns no operation; comm and experts do."""

from __future__ import annotations

import numpy as np
import torch

from . import native


def takes_c(*tensors: torch.Tensor) -> bool:
    """Whether the C extension is there and can reach all of these tensors."""
    if native.extension is None:
        return False
    for tensor in tensors:  # a loop: this is asked several times for every token that is decoded
        if not tensor.is_cpu:
            return False
    return True


def byte_rows(rows: torch.Tensor) -> np.ndarray:
    """Rows [N, H] as uint8 [N, H * itemsize]: the same memory, unless C could not read it as it lies."""
    rows = aligned(rows.detach() if rows.requires_grad else rows)
    if rows.stride(1) != 1 or rows.shape[1] == 1:  # the stride of a single value may be anything
        rows = rows.contiguous().as_strided(rows.shape, (rows.shape[1], 1))
    return (rows if rows.dtype == torch.uint8 else rows.view(torch.uint8)).numpy()


def aligned(values: torch.Tensor) -> torch.Tensor:
    """`values` at an address that fits its items; a received frame or a mapped file may begin anywhere.

    8 bytes is what the widest item of a packed row (uint8) needs.
    """
    needed = 8 if values.dtype == torch.uint8 else values.dtype.itemsize
    return values.clone() if values.data_ptr() % needed else values


def empty_weights(shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """torch.empty for weights that are read from beginning to end: on large pages where the system gives them."""
    weights = torch.empty(shape, dtype=dtype, device=device)
    if takes_c(weights) and weights.dim() > 1 and weights.numel():
        native.extension.use_huge_pages(byte_rows(weights.view(-1, weights.shape[-1])))
    return weights

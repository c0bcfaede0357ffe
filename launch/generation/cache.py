"""Rows in and out of transformers' own DynamicCache: the one file that knows how its layers keep their tensors.

Rows of a batch end at the same column; shorter ones have padding on the left. A layer keeps all columns, or with a
sliding window the latest `window - 1`, so that rows of two caches are laid side by side once both have a common length.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache

# Layers whose tensors are all [rows, ..., columns, ...], by name: the third is not in every transformers 5. Others
# (V4's compressed states, linear attention) keep what cannot be padded or cut by columns.
_SPLICED = {"DynamicLayer", "DynamicSlidingWindowLayer", "DynamicIndexedLayer"}
_COLUMNS = {"keys": -2, "values": -2, "indexer_keys": 1}  # attribute -> dimension of the columns


def can_splice(cache: DynamicCache) -> bool:
    """Whether rows can enter and leave."""
    layers = {type(layer).__name__ for layer in cache.layers}
    positions = any(getattr(layer, "indexer_position_ids", None) is not None for layer in cache.layers)
    return layers <= _SPLICED and not positions


def keep_rows(cache: DynamicCache, rows: torch.Tensor, length: int) -> None:
    """Keep these rows ([N] int64, on the cache's device) and each one's latest `length` columns."""
    for layer in cache.layers:
        for name, tensor in _tensors(layer).items():
            setattr(layer, name, _fit(tensor.index_select(0, rows), name, layer, length))
        _set_length(layer, length)


def append_rows(cache: DynamicCache, other: DynamicCache, length: int) -> None:
    """Put the other cache's rows below; all rows get `length` columns."""
    for layer, more in zip(cache.layers, other.layers, strict=True):
        added = _tensors(more)
        for name, tensor in _tensors(layer).items():
            both = [_fit(part, name, layer, length) for part in (tensor, added[name])]
            setattr(layer, name, torch.cat(both))
        _set_length(layer, length)


def cut_columns(cache: DynamicCache, length: int) -> bool:
    """Drop every column after the first `length`, which only some layers may have; whether that is possible.

    A layer with a sliding window has dropped its oldest column for the newest already.
    """
    if not can_splice(cache) or any(hasattr(layer, "sliding_window") for layer in cache.layers):
        return False
    for layer in cache.layers:
        for name, tensor in _tensors(layer).items():
            if tensor.shape[_COLUMNS[name]] < length:
                return False
            setattr(layer, name, tensor.narrow(_COLUMNS[name], 0, length))
        _set_length(layer, length)
    return True


def _tensors(layer: Any) -> dict[str, torch.Tensor]:
    found = {name: getattr(layer, name, None) for name in _COLUMNS}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _fit(tensor: torch.Tensor, name: str, layer: Any, length: int) -> torch.Tensor:
    """Columns cut, or zeros added, on the left, so that as many are there as the layer keeps of `length`."""
    dim, width = _COLUMNS[name], min(length, getattr(layer, "sliding_window", length + 1) - 1)
    has = tensor.shape[dim]
    if has >= width:
        return tensor.narrow(dim, has - width, width)
    after = -dim - 1 if dim < 0 else tensor.dim() - 1 - dim  # F.pad counts dimensions from the last
    return F.pad(tensor, [0, 0] * after + [width - has, 0])


def _set_length(layer: Any, length: int) -> None:
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = length

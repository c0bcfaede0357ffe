"""A packed row: what dispatch sends for one token to one rank. Hidden values, their scales, weights and slots.

Pure functions of tensors, on any device. The parts of a row lie apart from each other, so that payloads travel as
bytes with their scales beside them, and every part starts at a multiple of 16 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .formats import FORMATS, WireFormat, decode, encode_into, num_scales, payload_bytes

ALIGN = 16  # bytes


@dataclass(frozen=True)
class RowLayout:
    """Where the parts of a packed row of H hidden values and K choices lie, in bytes."""

    hidden_size: int
    top_k: int
    dtype: torch.dtype  # of the rows that dispatch takes and gives
    wire: WireFormat
    weight_dtype: torch.dtype

    @property
    def scales_at(self) -> int:
        return round_up(payload_bytes(self.wire, self.hidden_size))

    @property
    def weights_at(self) -> int:
        return round_up(self.scales_at + 4 * num_scales(self.wire, self.hidden_size))

    @property
    def slots_at(self) -> int:
        return round_up(self.weights_at + self.top_k * self.weight_dtype.itemsize)

    @property
    def row_bytes(self) -> int:
        return round_up(self.slots_at + self.top_k * 4)

    @property
    def gradient_bytes(self) -> int:
        """A row of gradients has no slots."""
        return self.slots_at


def layout_of(hidden_size: int, top_k: int, dtype: torch.dtype, wire: str) -> RowLayout:
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return RowLayout(hidden_size, top_k, dtype, FORMATS[wire], weight_dtype)


def pack(
    x_TH: torch.Tensor, weights_TK: torch.Tensor, tokens_N: torch.Tensor, slots_NK: torch.Tensor, layout: RowLayout
) -> torch.Tensor:
    """uint8 [N, row_bytes]: row n is token tokens_N[n] (int64) with its local slots slots_NK[n] (int32, -1 elsewhere).

    Weights whose expert is elsewhere are 0. What lies between the parts is not set.
    """
    packed = torch.empty(len(tokens_N), layout.row_bytes, dtype=torch.uint8, device=x_TH.device)
    if not len(tokens_N):
        return packed
    hidden, scales, weights, slots = _parts(packed, layout)
    if layout.wire.dtype == x_TH.dtype:
        torch.index_select(x_TH.detach(), 0, tokens_N, out=hidden)
    else:
        encode_into(x_TH.detach().index_select(0, tokens_N), layout.wire, hidden, scales)
    weights.copy_(weights_TK.detach().to(x_TH.device).index_select(0, tokens_N).masked_fill(slots_NK < 0, 0))
    slots.copy_(slots_NK)
    return packed


def unpack(packed: torch.Tensor, layout: RowLayout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden [N, H] in the layout's dtype, weights [N, K], slots [N, K] int32) of packed rows uint8 [N, row_bytes].

    Hidden values that travelled as they are stay a view of `packed`.
    """
    hidden, scales, weights, slots = _parts(packed, layout)
    if layout.wire.dtype != layout.dtype:
        hidden = decode(hidden, scales, layout.wire, layout.dtype)
    return hidden, weights.contiguous(), slots.contiguous()


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


def round_up(size: int) -> int:
    return (size + ALIGN - 1) // ALIGN * ALIGN

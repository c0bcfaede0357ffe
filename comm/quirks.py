"""What the vendors' limits mean for one exchange: pure functions that a transport calls, and its callers never see.

Each quirk of `vendors.Quirk` that changes what is sent is applied by one function here; what a vendor's documents do
not say is handled in the way that is right on all of them (payloads as bytes). Nothing here talks to a device library.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..core.errors import ConfigError, VendorUnavailable
from .vendors import UNKNOWN, Fact, Quirk, Vendor

# ---------------------------------------------------------------- the exchange, with every quirk of sizes and payloads

# call(received, sent, receive_splits, send_splits) begins the library's all_to_all_single along dimension 0 and
# returns what waits for it.
Exchange = Callable[[torch.Tensor, torch.Tensor, list[int], list[int]], Callable[[], None]]


def start_exchange(
    vendor: Vendor,
    send: torch.Tensor,
    send_counts: Sequence[int],
    recv_counts: Sequence[int],
    call: Exchange,
    largest_bytes: int | None = None,
    limit_bytes: int | None = None,
) -> Callable[[], torch.Tensor]:
    """Begin an exchange of rows `send` [sum(send_counts), ...], grouped by destination.

    The returned function waits for it and gives rows [sum(recv_counts), ...] grouped by source. `largest_bytes`: see
    padded_sizes; `needs_largest` says who needs it. `limit_bytes`: see check_presized.
    """
    row_bytes = as_bytes(send[:0]).shape[1]
    check_presized(vendor.quirks, row_bytes * max(sum(send_counts), sum(recv_counts)), limit_bytes)
    padded = bool(_PADDED & vendor.quirks)
    if not padded:
        payload = payload_view(send, vendor)
        received = payload.new_empty((sum(recv_counts), *payload.shape[1:]))
        wait = call(received, payload, list(recv_counts), list(send_counts))
    else:
        send_sizes, recv_sizes = ([count * row_bytes for count in counts] for counts in (send_counts, recv_counts))
        send_padded = padded_sizes(send_sizes, vendor.quirks, largest_bytes)
        recv_padded = padded_sizes(recv_sizes, vendor.quirks, largest_bytes)
        received = send.new_empty(sum(recv_padded), dtype=torch.uint8)
        payload = pad_chunks(as_bytes(send).view(-1), send_sizes, send_padded)
        wait = call(received, payload, recv_padded, send_padded)

    def finish() -> torch.Tensor:
        wait()
        rows = received
        if padded:
            rows = cut_chunks(received, recv_sizes, recv_padded).view(sum(recv_counts), row_bytes)
        return rows if rows.dtype == send.dtype else from_bytes(rows, send.dtype, send.shape[1:])

    return finish


def needs_largest(vendor: Vendor) -> bool:
    """Whether the ranks must agree on the largest message before an exchange."""
    return Quirk.UNEVEN_SPLITS_UNSTATED in vendor.quirks


# ---------------------------------------------------------------- payloads: what a row of any dtype travels as


def travels_as_bytes(vendor: Vendor, dtype: torch.dtype) -> bool:
    """Whether rows of `dtype` are sent as uint8: FP8 always does, and so does what the library may not know."""
    if is_fp8(dtype) and Quirk.PAYLOAD_AS_UINT8 in vendor.quirks:
        return True
    return dtype_name(dtype) not in _in_every_reading(vendor.collective_dtypes)


def payload_view(tensor: torch.Tensor, vendor: Vendor) -> torch.Tensor:
    """`tensor` [N, ...] as the vendor's library takes it: itself, or its bytes uint8 [N, bytes per row].

    Shares memory wherever `tensor` was contiguous; use it on a receive buffer only if that is contiguous.
    """
    ready = collective_ready(tensor, vendor.quirks)
    return as_bytes(ready) if travels_as_bytes(vendor, ready.dtype) else ready


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor [N, ...] of any dtype as uint8 [N, bytes per row]; a scalar as [1, bytes]. Copies only if strided."""
    rows = tensor.shape[0] if tensor.dim() else 1
    width = tensor.element_size()
    for extent in tensor.shape[1:]:
        width *= extent
    # An empty tensor has no bytes to view, and -1 could not be inferred from it.
    if not tensor.numel():
        return tensor.new_empty((rows, width), dtype=torch.uint8)
    return tensor.contiguous().view(-1).view(torch.uint8).view(rows, width)


def from_bytes(payload: torch.Tensor, dtype: torch.dtype, row_shape: Sequence[int]) -> torch.Tensor:
    """The inverse of as_bytes: uint8 [N, bytes per row] to `dtype` [N, *row_shape]."""
    rows = payload.shape[0]
    if not payload.numel():
        return payload.new_empty((rows, *row_shape), dtype=dtype)
    flat = payload.contiguous().view(-1)
    # A view as a wider dtype needs an aligned start, which a slice of a larger buffer may not have.
    if flat.storage_offset() % dtype.itemsize:
        flat = flat.clone()
    return flat.view(dtype).view(rows, *row_shape)


def collective_ready(tensor: torch.Tensor, quirks: frozenset[Quirk]) -> torch.Tensor:
    """`tensor` itself where the library takes it, else contiguous and with at least one dimension."""
    if Quirk.DIM_AT_LEAST_1 in quirks and not tensor.dim():
        tensor = tensor.reshape(1)
    if Quirk.CONTIGUOUS_ONLY in quirks and not tensor.is_contiguous():
        tensor = tensor.contiguous()
    return tensor


# ---------------------------------------------------------------- sizes: what a message may measure

_GRANULE = {Quirk.SIZES_PAD_512: 512}
_PADDED = frozenset({*_GRANULE, Quirk.UNEVEN_SPLITS_UNSTATED})


def padded_sizes(sizes: Sequence[int], quirks: frozenset[Quirk], largest: int | None = None) -> list[int]:
    """Bytes to send to each rank so that the library takes them, from the bytes there are to send.

    `largest`: the largest message between any two ranks of the group, which all ranks must have agreed on before.
    Only a vendor whose uneven splits are not documented needs it; ConfigError where it is missing or too small.
    """
    if Quirk.UNEVEN_SPLITS_UNSTATED in quirks:
        if largest is None or largest < max(sizes, default=0):
            raise ConfigError(
                f"even splits need the largest message of the group; got {largest} for messages of {list(sizes)} bytes"
            )
        sizes = [largest] * len(sizes)
    return _padded_to_granule(sizes, quirks)


def granule(quirks: frozenset[Quirk]) -> int:
    """What the size of every message must be a multiple of, in bytes."""
    return max((size for quirk, size in _GRANULE.items() if quirk in quirks), default=1)


def _padded_to_granule(sizes: Sequence[int], quirks: frozenset[Quirk]) -> list[int]:
    unit = granule(quirks)
    return [-(-size // unit) * unit for size in sizes]


def pad_chunks(payload: torch.Tensor, sizes: Sequence[int], padded: Sequence[int]) -> torch.Tensor:
    """uint8 [sum(sizes)], one chunk per rank, to uint8 [sum(padded)], each chunk followed by zeros."""
    if list(sizes) == list(padded):
        return payload
    out = payload.new_zeros(sum(padded))
    for start, size, source in zip(_starts(padded), sizes, _starts(sizes), strict=True):
        out[start : start + size] = payload[source : source + size]
    return out


def cut_chunks(padded_payload: torch.Tensor, sizes: Sequence[int], padded: Sequence[int]) -> torch.Tensor:
    """The inverse of pad_chunks, for what was received: uint8 [sum(padded)] to uint8 [sum(sizes)]."""
    if list(sizes) == list(padded):
        return padded_payload
    chunks = [padded_payload[start : start + size] for start, size in zip(_starts(padded), sizes, strict=True)]
    return torch.cat(chunks) if chunks else padded_payload[:0]


def whole_message(tensor: torch.Tensor, vendor: Vendor) -> torch.Tensor:
    """A tensor as one message that the library takes: its bytes, uint8 1-D, padded where sizes must be.

    Shares memory with a contiguous tensor that needs no padding; see `take_message` for what was received.
    """
    data = as_bytes(tensor).view(-1)
    (size,) = _padded_to_granule([len(data)], vendor.quirks)
    return pad_chunks(data, [len(data)], [size])


def take_message(message: torch.Tensor, tensor: torch.Tensor) -> None:
    """Copy what came in `message` (made by whole_message from `tensor`) into `tensor`, where they differ."""
    if message.data_ptr() != tensor.data_ptr():
        size = tensor.numel() * tensor.element_size()
        tensor.detach().copy_(from_bytes(message[:size].unsqueeze(0), tensor.dtype, tensor.shape).view(tensor.shape))


def _starts(sizes: Sequence[int]) -> list[int]:
    return [0, *itertools.accumulate(sizes)][: len(sizes)]


PRESIZED_VARIABLE = "ECCL_ALLTOALLV_MAXSIZE"


def presized_variables(quirks: frozenset[Quirk], tokens_per_rank: int, ranks: int, hidden_size: int) -> dict[str, str]:
    """Environment variables to set before the library starts; {} for a vendor that sizes its buffers itself.

    Bytes by the vendor's recipe, tokens * ranks * (hidden + 16 + 16) * 2. Source: EnflameTechnology/vllm-gcu,
    docs/source/tutorials/multi_node.md.
    """
    if Quirk.PRESIZED_ALLTOALLV not in quirks:
        return {}
    return {PRESIZED_VARIABLE: str(tokens_per_rank * ranks * (hidden_size + 32) * 2)}


def check_presized(quirks: frozenset[Quirk], total_bytes: int, limit_bytes: int | None) -> None:
    """Raise ConfigError before an uneven all-to-all of `total_bytes` that the buffer cannot hold."""
    if Quirk.PRESIZED_ALLTOALLV in quirks and (limit_bytes is None or total_bytes > limit_bytes):
        held = "no size was set" if limit_bytes is None else f"it holds {limit_bytes}"
        raise ConfigError(
            f"an uneven all-to-all of {total_bytes} bytes does not fit the library's buffer: {held}; "
            f"set {PRESIZED_VARIABLE} to at least {total_bytes} before the job starts, on every rank"
        )


# ---------------------------------------------------------------- reductions

_FP8 = frozenset({"float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"})

NOT_REDUCED: dict[Quirk, frozenset[str]] = {
    Quirk.NO_FP8_REDUCE: _FP8,
    Quirk.NO_UINT8_REDUCE: frozenset({"uint8", "bool"}),
    Quirk.SIGN_NOT_KEPT: frozenset({"int8", "uint32", "uint64"}),
    Quirk.NO_FLOAT64: frozenset({"float64"}),
    Quirk.NO_INT64_REDUCE: frozenset({"int64"}),
    Quirk.NO_FLOAT16_REDUCE: frozenset({"float16"}),
}

# Where a dtype cannot be reduced, the first of these that can: every value fits, and going back wraps or rounds as the
# narrow sum would. bool becomes a count, whose truth is the "or" (sum, max) or the "and" (min) of the ranks' values.
_WIDER: dict[str, tuple[str, ...]] = {
    "bool": ("int32",),
    "uint8": ("int32",),
    "int8": ("int32",),
    "int16": ("int32",),
    "uint16": ("int32",),
    "int32": ("int64",),
    "uint32": ("int64",),
    "float16": ("float32",),
    "bfloat16": ("float32",),
}

_OPS = ("sum", "max", "min", "avg")


@dataclass(frozen=True)
class Reduction:
    """How to reduce on a vendor's library: convert to `dtype`, call `op`, divide by `divisor`, convert back."""

    dtype: torch.dtype
    op: str
    divisor: int = 1


def plan_reduction(vendor: Vendor, dtype: torch.dtype, op: str, size: int) -> Reduction:
    """The way to reduce tensors of `dtype` over `size` ranks with `op` ("sum", "max", "min" or "avg").

    Raises ConfigError for an unknown op and for an average of integers, VendorUnavailable for a dtype that the
    vendor's library cannot reduce and that has no wider one.
    """
    if op not in _OPS:
        raise ConfigError(f"reduction {op!r} is not one of {', '.join(_OPS)}")
    if op == "avg" and not dtype.is_floating_point:
        raise ConfigError(f"an average of {dtype_name(dtype)} has no meaning; sum, or convert to float32")
    divided = op == "avg" and Quirk.AVG_BY_SUM in vendor.quirks
    name = dtype_name(dtype)
    # The sum of an average leaves float16's range sooner than the average does.
    names = (*_WIDER.get(name, ()), name) if divided and name == "float16" else (name, *_WIDER.get(name, ()))
    chosen = next((name for name in names if can_reduce(vendor, name)), None)
    if chosen is None:
        raise VendorUnavailable(_refusal(vendor, name))
    return Reduction(getattr(torch, chosen), "sum" if divided else op, size if divided else 1)


def reduce_in_place(
    tensor: torch.Tensor, plan: Reduction, call: Callable[[torch.Tensor, str], None], pad_bytes: int = 1
) -> None:
    """Run `plan` on `tensor`; `call(work, op)` is the library's all-reduce in place of a contiguous tensor.

    pad_bytes: what the size of a message must be a multiple of (`granule`).
    """
    work = tensor.detach().to(plan.dtype).contiguous().view(-1)
    message = work if pad_bytes == 1 else F.pad(work, (0, -len(work) % (pad_bytes // work.element_size())))
    call(message, plan.op)
    work = message[: len(work)]
    if plan.divisor != 1:
        work.div_(plan.divisor)
    # Where nothing had to change `work` is a view of `tensor`, and the result is already there.
    if work.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(work.view(tensor.shape))


def can_reduce(vendor: Vendor, name: str) -> bool:
    """Whether the vendor's library reduces the dtype called `name`, on every chip and version that is documented."""
    if any(name in names for quirk, names in NOT_REDUCED.items() if quirk in vendor.quirks):
        return False
    stated = vendor.reduce_dtypes if vendor.reduce_dtypes.is_known else vendor.collective_dtypes
    if stated.is_known:
        return name in _in_every_reading(stated)
    # Nothing is stated: the types that every library on record reduces are tried, FP8 is not.
    return name not in _FP8


def _refusal(vendor: Vendor, name: str) -> str:
    quirks = [quirk for quirk, names in NOT_REDUCED.items() if quirk in vendor.quirks and name in names]
    why = f"{quirks[0].what} ({quirks[0].sources[vendor.name]})" if quirks else "not among the types documented"
    accepted = [other for other in ("float32", "bfloat16", "float16", "int32", "int64") if can_reduce(vendor, other)]
    return (
        f"{vendor.title}'s {vendor.collective_library.value} cannot reduce {name}: {why} "
        f"Convert to one of {', '.join(accepted)} first."
    )


# ---------------------------------------------------------------- operations that are not there

_OPERATIONS = {
    "recv_any_source": Quirk.NO_RECV_ANY_SOURCE,
    "gather": Quirk.NO_GATHER,
    "scatter": Quirk.NO_GATHER,
    "batch_isend_irecv": Quirk.NO_P2P_BATCH,
}


def require_operation(vendor: Vendor, operation: str) -> None:
    """Raise VendorUnavailable where the vendor's library lacks `operation`, or documents it as unverified."""
    quirk = _OPERATIONS.get(operation)
    if quirk is not None and quirk in vendor.quirks:
        raise VendorUnavailable(
            f"{vendor.title}: {operation} is not to be used: {quirk.what} ({quirk.sources[vendor.name]}); "
            "use all_to_all_v, or send and recv with a named rank"
        )


# ---------------------------------------------------------------- names of dtypes


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_fp8(dtype: torch.dtype) -> bool:
    return dtype_name(dtype) in _FP8


def _in_every_reading(stated: Fact) -> frozenset[str]:
    """The dtypes on which all readings agree: which chip it is, and which version, is not known here."""
    if UNKNOWN in stated.values:
        return frozenset()
    return frozenset.intersection(*stated.values)

"""What an emulated collective library refuses: the limits that the vendor table documents, checked on each call.

Pure functions of a vendor, a call and its tensors. Where the table says UNKNOWN nothing is refused except the
reduction of FP8. A refusal is RuntimeError, as a library's own would be; an operation that is not there at all is
quirks.require_operation's VendorUnavailable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch

from ..quirks import PRESIZED_VARIABLE, can_reduce, dtype_name, granule
from ..vendors import Quirk, Vendor


def refuse(vendor: Vendor, call: str, why: str) -> NoReturn:
    """Raise RuntimeError in the name of the vendor's emulated library."""
    raise RuntimeError(f"emulated {vendor.collective_library.value} ({vendor.title}), {call}: {why}")


def check_payload(vendor: Vendor, call: str, tensor: torch.Tensor, device_type: str) -> None:
    """Refuse a tensor that the library does not move: elsewhere, of a type it lacks, strided, a scalar, a wrong size.

    A dtype must be documented in every reading: which chip and version it is, the caller does not know.
    """
    if tensor.device.type != device_type:
        refuse(vendor, call, f"tensors must be on {device_type}, got one on {tensor.device}")
    name, stated = dtype_name(tensor.dtype), vendor.collective_dtypes
    if stated.is_known and not all(name in names for names in stated.values):
        refuse(vendor, call, f"{name} is not among the types documented for every chip and version; send its bytes")
    if Quirk.CONTIGUOUS_ONLY in vendor.quirks and not tensor.is_contiguous():
        refuse(vendor, call, f"the tensor is not contiguous (strides {tensor.stride()} of {tuple(tensor.shape)})")
    if Quirk.DIM_AT_LEAST_1 in vendor.quirks and not tensor.dim():
        refuse(vendor, call, "a tensor without dimensions is no payload; reshape it to [1]")
    check_message(vendor, call, tensor.numel() * tensor.element_size())


def check_message(vendor: Vendor, call: str, size: int) -> None:
    """Refuse a message of `size` bytes where sizes have a granule."""
    unit = granule(vendor.quirks)
    if size % unit:
        refuse(vendor, call, f"a message of {size} bytes is no multiple of {unit}; pad it")


def check_reduction(vendor: Vendor, call: str, dtype: torch.dtype, average: bool) -> None:
    """Refuse a dtype that the library cannot reduce, and an average where it has none."""
    name = dtype_name(dtype)
    if not can_reduce(vendor, name):
        refuse(vendor, call, f"{name} cannot be reduced")
    if average and Quirk.AVG_BY_SUM in vendor.quirks:
        refuse(vendor, call, "there is no average; sum, then divide")


def check_splits(
    vendor: Vendor, splits: Sequence[int], tensor: torch.Tensor, ranks: int, presized_bytes: int | None
) -> None:
    """Refuse the splits along dimension 0 of one side of an all-to-all; an empty list means even splits."""
    call = "all_to_all_single"
    rows = tensor.shape[0] if tensor.dim() else 1
    if splits and (len(splits) != ranks or sum(splits) != rows):
        refuse(vendor, call, f"splits {list(splits)} are not {ranks} numbers that add up to {rows} rows")
    row_bytes = tensor.numel() * tensor.element_size() // rows if rows else 0
    for split in splits or [rows // ranks]:
        check_message(vendor, call, split * row_bytes)
    if len(set(splits)) < 2:
        return
    if Quirk.UNEVEN_SPLITS_UNSTATED in vendor.quirks:
        refuse(vendor, call, f"uneven splits {list(splits)} are not documented; pad every chunk to the largest")
    size = rows * row_bytes
    if Quirk.PRESIZED_ALLTOALLV in vendor.quirks and (presized_bytes is None or size > presized_bytes):
        holds = "has no size" if presized_bytes is None else f"holds {presized_bytes} bytes"
        refuse(vendor, call, f"the buffer for uneven splits {holds}, this needs {size}; set {PRESIZED_VARIABLE}")

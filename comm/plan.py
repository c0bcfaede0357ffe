"""The dispatch plan: which token rows go to which rank, and which received rows feed which local slot.

Pure functions, numpy arrays in and out; nothing is sent here. The C extension does the work where it is built; the
numpy twins give the same arrays bit for bit and raise the same errors. moe_runtime.core.native.describe() says which
one runs. Arrays are taken as they are: a wrong dtype or layout is an error, never a silent copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..core import native
from ..core.errors import ConfigError

__all__ = ["DispatchPlan", "ExpandPlan", "plan_dispatch", "plan_dispatch_numpy", "plan_expand", "plan_expand_numpy"]

_INT32, _INT64 = np.dtype(np.int32), np.dtype(np.int64)
_INT32_MAX = np.iinfo(np.int32).max  # slots and ranks are int32


@dataclass(frozen=True, eq=False)
class DispatchPlan:
    """What one rank sends: N rows, grouped by destination rank, a token once per rank that holds one of its slots.

    send_counts [R]    int64: the number of rows for each rank; N is their sum.
    send_tokens [N]    int64: the token of each row; increasing inside a rank.
    send_slots  [N, K] int32: entry k is the token's k-th slot, counted from the first slot of the row's rank, where
                              it lives on that rank, and -1 elsewhere.
    """

    send_counts: np.ndarray
    send_tokens: np.ndarray
    send_slots: np.ndarray


@dataclass(frozen=True, eq=False)
class ExpandPlan:
    """How received rows spread over local slots: M entries sorted by slot, then by row, then by k.

    rows_per_slot [num_local_slots] int64: the number of entries of each slot; M is their sum.
    row_index     [M] int64: the received row of each entry. A row that names a slot twice appears twice.
    k_index       [M] int64: the k of each entry, the column of the row's weight.
    """

    rows_per_slot: np.ndarray
    row_index: np.ndarray
    k_index: np.ndarray


def plan_dispatch(slots_TK: np.ndarray, slot_rank: np.ndarray, num_ranks: int) -> DispatchPlan:
    """Decide which token rows go to which rank.

    slots_TK  [T, K] int32 or int64, C-contiguous: global slot ids, -1 where nothing is selected.
    slot_rank [S] int32, C-contiguous: the rank each slot lives on; non-decreasing, within 0..num_ranks-1.

    Raises ConfigError for arrays of another kind, for a slot id below -1 or from S on (naming token, k and slot), and
    for a slot_rank that decreases or leaves 0..num_ranks-1.
    """
    if native.extension is None:
        return plan_dispatch_numpy(slots_TK, slot_rank, num_ranks)
    num_ranks = _check_count("num_ranks", num_ranks, 1)
    send_counts = np.empty(num_ranks, np.int64)
    try:
        num_rows = native.extension.dispatch_count(slots_TK, slot_rank, send_counts)
        send_tokens = np.empty(num_rows, np.int64)
        send_slots = np.empty((num_rows, slots_TK.shape[1]), np.int32)
        native.extension.dispatch_fill(slots_TK, slot_rank, send_counts, send_tokens, send_slots)
    except (ValueError, TypeError, AttributeError) as error:  # C checks all that matters; this says it better
        _check_dispatch(slots_TK, slot_rank, num_ranks)
        raise ConfigError(str(error)) from None
    return DispatchPlan(send_counts, send_tokens, send_slots)


def plan_dispatch_numpy(slots_TK: np.ndarray, slot_rank: np.ndarray, num_ranks: int) -> DispatchPlan:
    """The numpy twin of plan_dispatch: same arguments, arrays and errors. Takes T * R bytes while it works."""
    num_ranks = _check_dispatch(slots_TK, slot_rank, num_ranks)
    _check_slot_rank(slot_rank, num_ranks)
    _check_slots(slots_TK, len(slot_rank), "token")

    # One extra slot on "rank -1" stands for -1 ids, which index it from the end.
    first_slot = np.searchsorted(slot_rank, slot_rank)  # per slot: the first slot of its rank
    rank_TK = np.append(slot_rank, np.int32(-1))[slots_TK]
    local_TK = np.append(np.arange(len(slot_rank)) - first_slot, -1).astype(np.int32)[slots_TK]

    goes_RT = np.zeros((num_ranks, len(slots_TK)), np.bool_)
    token, k = np.nonzero(rank_TK >= 0)
    goes_RT[rank_TK[token, k], token] = True
    row_rank, send_tokens = np.nonzero(goes_RT)
    send_slots = np.where(rank_TK[send_tokens] == row_rank[:, None], local_TK[send_tokens], np.int32(-1))
    return DispatchPlan(np.count_nonzero(goes_RT, axis=1).astype(np.int64), send_tokens.astype(np.int64), send_slots)


def plan_expand(recv_slots_NK: np.ndarray, num_local_slots: int) -> ExpandPlan:
    """Decide which received rows feed which local slot.

    recv_slots_NK [N, K] int32, C-contiguous: local slots as in DispatchPlan.send_slots, -1 elsewhere.
    num_local_slots: how many slots this rank holds.

    Raises ConfigError for an array of another kind and for a slot below -1 or from num_local_slots on (naming row, k
    and slot).
    """
    if native.extension is None:
        return plan_expand_numpy(recv_slots_NK, num_local_slots)
    num_local_slots = _check_count("num_local_slots", num_local_slots, 0)
    rows_per_slot = np.empty(num_local_slots, np.int64)
    try:
        num_entries = native.extension.expand_count(recv_slots_NK, rows_per_slot)
        row_index, k_index = np.empty(num_entries, np.int64), np.empty(num_entries, np.int64)
        native.extension.expand_fill(recv_slots_NK, rows_per_slot, row_index, k_index)
    except (ValueError, TypeError, AttributeError) as error:
        _check_expand(recv_slots_NK, num_local_slots)
        raise ConfigError(str(error)) from None
    return ExpandPlan(rows_per_slot, row_index, k_index)


def plan_expand_numpy(recv_slots_NK: np.ndarray, num_local_slots: int) -> ExpandPlan:
    """The numpy twin of plan_expand: same arguments, arrays and errors."""
    num_local_slots = _check_expand(recv_slots_NK, num_local_slots)
    _check_slots(recv_slots_NK, num_local_slots, "row")
    row_index, k_index = np.nonzero(recv_slots_NK >= 0)
    slot = recv_slots_NK[row_index, k_index]
    by_slot = np.argsort(slot, kind="stable")  # nonzero is in row-major order, and stays so inside a slot
    rows_per_slot = np.bincount(slot, minlength=num_local_slots)
    return ExpandPlan(*(a.astype(np.int64) for a in (rows_per_slot, row_index[by_slot], k_index[by_slot])))


def _check_dispatch(slots_TK: np.ndarray, slot_rank: np.ndarray, num_ranks: int) -> int:
    _check_array("slots_TK", slots_TK, 2, (_INT32, _INT64))
    _check_array("slot_rank", slot_rank, 1, (_INT32,))
    return _check_count("num_ranks", num_ranks, 1)


def _check_expand(recv_slots_NK: np.ndarray, num_local_slots: int) -> int:
    _check_array("recv_slots_NK", recv_slots_NK, 2, (_INT32,))
    return _check_count("num_local_slots", num_local_slots, 0)


def _check_array(name: str, array: np.ndarray, dimensions: int, dtypes: tuple[np.dtype, ...]) -> None:
    if not isinstance(array, np.ndarray):
        raise ConfigError(f"{name}: must be a numpy array, not {type(array).__name__}")
    if array.dtype not in dtypes:
        raise ConfigError(f"{name}: must be {' or '.join(map(str, dtypes))}, not {array.dtype}")
    if array.ndim != dimensions:
        raise ConfigError(f"{name}: must have {dimensions} dimension{'s'[: dimensions - 1]}, not shape {array.shape}")
    if not (array.flags.c_contiguous and array.flags.aligned):
        raise ConfigError(f"{name}: must be C-contiguous and aligned; pass numpy.ascontiguousarray(...)")


def _check_count(name: str, count: int, least: int) -> int:
    if not isinstance(count, (int, np.integer)) or not least <= count <= _INT32_MAX:
        raise ConfigError(f"{name}: must be a whole number in {least}..{_INT32_MAX}, not {count!r}")
    return int(count)


def _check_slot_rank(slot_rank: np.ndarray, num_ranks: int) -> None:
    outside = (slot_rank < 0) | (slot_rank >= num_ranks)
    decreases = np.diff(slot_rank, prepend=slot_rank[:1]) < 0
    wrong = outside | decreases
    if not wrong.any():
        return
    slot = int(np.argmax(wrong))
    if outside[slot]:
        raise ConfigError(f"slot_rank: slot {slot} lives on rank {slot_rank[slot]}, which is not a rank")
    raise ConfigError(f"slot_rank: decreases at slot {slot}, to rank {slot_rank[slot]}")


def _check_slots(slots: np.ndarray, num_slots: int, row_name: str) -> None:
    wrong = (slots < -1) | (slots >= num_slots)
    if wrong.any():
        row, k = divmod(int(np.argmax(wrong)), slots.shape[1])
        raise ConfigError(
            f"{row_name} {row}, k {k}: slot {slots[row, k]} is neither -1 nor below the number of slots, {num_slots}"
        )

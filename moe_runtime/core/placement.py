"""The owner table: which expert each slot holds, on which rank each slot lives, each replica's share.

Pure data. Planning (which placement is good) is moe_runtime.experts.placement's work; here is only what a
placement is and when it is valid. Experts need not divide evenly over ranks, ranks may hold unequal numbers of
slots, and an expert may have replicas.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from .errors import ConfigError

MOST = 1 << 20  # experts, ranks: tables have an entry for each, and a damaged number must not take all memory


@dataclass(frozen=True)
class Placement:
    """Where the experts live.

    slot_expert [L, S] int32: the expert that slot s of MoE layer l holds.
    slot_rank   [S]    int32: the rank that slot s lives on; non-decreasing, the same in every layer.
    slot_share  [L, S] float64: the part of its expert's tokens a slot takes; a layer's shares of one expert sum to 1.
    num_experts, num_ranks: E and R.
    absent      [L, E] bool, or None for none: experts that no rank holds, after a rank that held them was lost.

    Within a rank the slots of a layer are in increasing expert order, and a rank never holds the same expert
    twice. Raises ConfigError when any of this does not hold.
    """

    slot_expert: np.ndarray
    slot_rank: np.ndarray
    slot_share: np.ndarray
    num_experts: int
    num_ranks: int
    absent: np.ndarray | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        expert, rank, share = self.slot_expert, self.slot_rank, self.slot_share
        if expert.ndim != 2 or rank.shape != expert.shape[1:] or share.shape != expert.shape:
            raise ConfigError(
                f"placement: shapes slot_expert {expert.shape}, slot_rank {rank.shape}, slot_share {share.shape} "
                "do not agree on [L, S], [S], [L, S]"
            )
        if not (0 < self.num_experts <= MOST and 0 < self.num_ranks <= MOST):
            raise ConfigError(f"placement: {self.num_experts} experts on {self.num_ranks} ranks: 1 to {MOST} can be")
        if len(rank) and (rank.min() < 0 or rank.max() >= self.num_ranks or (np.diff(rank) < 0).any()):
            raise ConfigError(f"placement: slot_rank must be non-decreasing and within 0..{self.num_ranks - 1}")
        if (share < 0).any():
            raise ConfigError(f"placement: layer {np.argwhere(share < 0)[0][0]} has a negative share")
        absent = self._checked_absent()
        for layer in range(expert.shape[0]):
            held = np.zeros(self.num_experts)
            if len(rank) and (expert[layer].min() < 0 or expert[layer].max() >= self.num_experts):
                raise ConfigError(f"placement: layer {layer} names an expert outside 0..{self.num_experts - 1}")
            np.add.at(held, expert[layer], share[layer])
            if absent is not None:
                if absent[layer][expert[layer]].any():
                    both = int(expert[layer][absent[layer][expert[layer]]][0])
                    raise ConfigError(
                        f"placement: layer {layer}, expert {both} is said to be absent, but a slot holds it"
                    )
                held[absent[layer]] = 1.0
            if not np.allclose(held, 1.0, atol=1e-6):
                wrong = int(np.argmax(~np.isclose(held, 1.0, atol=1e-6)))
                raise ConfigError(
                    f"placement: layer {layer}, expert {wrong}: its slots' shares sum to {held[wrong]:g}, not 1"
                    + (" (no rank holds it)" if wrong not in expert[layer] else "")
                )
            same_rank = np.diff(rank) == 0
            if (np.diff(expert[layer])[same_rank] <= 0).any():
                raise ConfigError(
                    f"placement: layer {layer}: the experts of each rank must be distinct and in increasing order"
                )

    def _checked_absent(self) -> np.ndarray | None:
        """`absent`, which is None where it names no expert: then placements that are equal have equal fields."""
        absent = self.absent
        if absent is None:
            return None
        if absent.dtype != np.bool_ or absent.shape != (self.num_layers, self.num_experts):
            raise ConfigError(
                f"placement: absent must be bool [L, E] = {[self.num_layers, self.num_experts]}, "
                f"got {absent.dtype} {list(absent.shape)}"
            )
        if absent.any():
            return absent
        object.__setattr__(self, "absent", None)  # the dataclass is frozen
        return None

    @property
    def num_layers(self) -> int:
        return self.slot_expert.shape[0]

    @property
    def num_slots(self) -> int:
        return self.slot_expert.shape[1]

    def rank_slots(self, rank: int) -> slice:
        """The slots of one rank (they are contiguous)."""
        return slice(int(np.searchsorted(self.slot_rank, rank)), int(np.searchsorted(self.slot_rank, rank, "right")))

    def rank_experts(self, layer: int, rank: int) -> list[int]:
        """The experts a rank holds in a layer, in slot order (increasing)."""
        return self.slot_expert[layer, self.rank_slots(rank)].tolist()

    def has_replicas(self) -> bool:
        fewest = self.num_experts if self.absent is None else self.num_experts - int(self.absent.sum(axis=1).max())
        return self.num_slots > fewest

    def absent_experts(self, layer: int) -> list[int]:
        """The experts of a layer that no rank holds."""
        return [] if self.absent is None else np.flatnonzero(self.absent[layer]).tolist()

    def say_absent(self) -> str:
        """In words, for errors: how many experts nobody holds, and the first of them. "" where there are none."""
        if self.absent is None:
            return ""
        layer, expert = np.argwhere(self.absent)[0].tolist()
        return f"no rank holds {int(self.absent.sum())} experts, such as expert {expert} of layer {layer}"

    def digest(self) -> int:
        """A 63-bit hash of the whole table, for the cross-rank check before the first exchange."""
        h = hashlib.sha256(repr((self.num_experts, self.num_ranks)).encode())
        for array, kind in ((self.slot_expert, "<i4"), (self.slot_rank, "<i4"), (self.slot_share, "<f8")):
            h.update(repr(array.shape).encode())
            h.update(np.ascontiguousarray(array, dtype=kind).tobytes())
        if self.absent is not None:  # a placement that holds every expert has the digest that it always had
            h.update(np.packbits(self.absent).tobytes())
        return int.from_bytes(h.digest()[:8], "little") >> 1

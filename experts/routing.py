"""Replica choice: from the experts a token selected to the slots that will compute it; and what a token's weights
become where no rank holds some of its experts."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch

from ..core.errors import ConfigError
from ..core.placement import Placement


class ReplicaChooser:
    """Maps expert ids to slot ids for one MoE layer.

    Where an expert has one slot the answer is a table look-up. Where it has replicas, tokens are spread over them by
    their static shares: token i takes the replica that the i-th point of a low-discrepancy sequence (multiples of the
    golden ratio, modulo 1) falls on, so any run of tokens splits close to the shares and the choice is deterministic.

    near: sets of ranks, the nearest first. An expert's tokens stay in the first set that holds a replica of it.

    An expert that is absent from the placement becomes -1, as if it had not been selected (`renormalise`).
    """

    def __init__(self, placement: Placement, layer: int, near: Sequence[Collection[int]] = ()) -> None:
        slots_of: list[list[int]] = [[] for _ in range(placement.num_experts)]
        for slot, expert in enumerate(placement.slot_expert[layer].tolist()):
            slots_of[expert].append(slot)
        rank_of = placement.slot_rank.tolist()
        for ranks in reversed(near):  # the last word is the nearest one's
            slots_of = [[s for s in slots if rank_of[s] in ranks] or slots for slots in slots_of]
        most = max(1, *(len(slots) for slots in slots_of))
        # [E, X]: an expert's slots, the last repeated; and the upper ends of their shares of [0, 1).
        padded = [slots + (slots[-1:] or [-1]) * (most - len(slots)) for slots in slots_of]
        self._slots_EX = torch.tensor(padded, dtype=torch.int64)
        # Every expert is in the slot of its own number: nothing to look up.
        self.same = most == 1 and [slots[0] for slots in padded] == list(range(placement.num_experts))
        self._ends_EX = torch.from_numpy(self._ends(placement.slot_share[layer], slots_of, most))

    @staticmethod
    def _ends(share_S: np.ndarray, slots_of: list[list[int]], most: int) -> np.ndarray:
        """Where each replica's part of [0, 1) ends [E, X], the last repeated; equal parts where all shares are 0."""
        is_slot = np.arange(most) < np.array([len(slots) for slots in slots_of])[:, None]
        share_EX = np.zeros(is_slot.shape)
        share_EX[is_slot] = share_S[np.array([slot for slots in slots_of for slot in slots], dtype=np.int64)]
        is_slot[:, 0] = True  # also of an absent expert, so that no sum is 0
        share_EX = np.where(share_EX.sum(axis=1, keepdims=True) > 0, share_EX, is_slot)
        return np.cumsum(share_EX / share_EX.sum(axis=1, keepdims=True), axis=1)

    def choose(self, topk_ids_TK: torch.Tensor) -> torch.Tensor:
        """topk_ids [T, K] integer expert ids (-1 = not selected) to slots [T, K] int64 (-1 stays -1), on the CPU.

        The plan that follows is made on the CPU, and some devices have no float64.
        Raises ConfigError, naming token and k, for what is neither an expert nor -1, unless `same`.
        """
        ids = topk_ids_TK.to("cpu", torch.int64)
        if self.same:
            return ids  # the plan refuses slots that are not there, and so these
        self.check(ids)
        if self._slots_EX.shape[1] == 1:
            slots = self._slots_EX[:, 0].index_select(0, ids.clamp(min=0).view(-1)).view_as(ids)
        else:
            point_T = torch.arange(ids.shape[0], dtype=torch.float64).mul_(0.6180339887498949).frac_()
            ends_TKX = self._ends_EX[ids.clamp(min=0)]
            replica = (point_T[:, None, None] >= ends_TKX).sum(-1).clamp(max=self._slots_EX.shape[1] - 1)
            slots = self._slots_EX[ids.clamp(min=0)].gather(-1, replica.unsqueeze(-1)).squeeze(-1)
        return slots.masked_fill(ids < 0, -1)

    def check(self, topk_ids_TK: torch.Tensor) -> None:
        """Raise ConfigError, naming token and k, for what is neither an expert nor -1."""
        ids_TK = topk_ids_TK.cpu().numpy()
        if not ids_TK.size or (ids_TK.min() >= -1 and ids_TK.max() < len(self._slots_EX)):
            return
        token, k = np.argwhere((ids_TK < -1) | (ids_TK >= len(self._slots_EX)))[0].tolist()
        raise ConfigError(
            f"dispatch: topk_ids[{token}, {k}] = {ids_TK[token, k]} is not an expert "
            f"(0..{len(self._slots_EX) - 1}, or -1)"
        )


def lost_selections(topk_ids_TK: torch.Tensor, slots_TK: torch.Tensor) -> torch.Tensor:
    """[T, K] bool on the CPU: what a token selected and no slot holds."""
    return (slots_TK < 0) & (topk_ids_TK.to(slots_TK.device) >= 0)


def refuse_lost(topk_ids_TK: torch.Tensor, lost_TK: torch.Tensor, where: str, cure: str) -> None:
    """Raise ConfigError, naming token and expert, where a token has lost one."""
    if lost_TK.any():
        token, k = lost_TK.nonzero()[0].tolist()
        expert = int(topk_ids_TK[token, k])
        raise ConfigError(f"{where}: token {token} selects expert {expert}, which no rank holds; {cure}")


def renormalise(topk_weights_TK: torch.Tensor, topk_ids_TK: torch.Tensor, lost_TK: torch.Tensor) -> torch.Tensor:
    """Weights [T, K] for what is left of each token's experts: 0 for the lost ones, the others scaled so that their
    sum is what the sum of all that were selected was. A token that lost all its experts has zeros; one that lost none
    has the very weights it had.

    lost_TK [T, K] bool. Sums are made in float32 (float64 stays). Differentiable.
    """
    lost_TK = lost_TK.to(topk_weights_TK.device)
    wide = topk_weights_TK if topk_weights_TK.dtype == torch.float64 else topk_weights_TK.float()
    selected_TK = wide.masked_fill(topk_ids_TK < 0, 0)
    left_TK = selected_TK.masked_fill(lost_TK, 0)
    before_T, after_T = selected_TK.sum(-1, keepdim=True), left_TK.sum(-1, keepdim=True)
    scaled_TK = left_TK * (before_T / torch.where(after_T != 0, after_T, 1.0))
    return torch.where(lost_TK.any(-1, keepdim=True), scaled_TK.to(topk_weights_TK.dtype), topk_weights_TK)

"""The policy of `rebalance = "auto"`: another placement when it saves more time than moving to it costs."""

from __future__ import annotations

import numpy as np

from .core.placement import Placement
from .experts.placement import Plan, Rank, plan
from .rebalance import Look
from .spares import with_spares


class Pays:
    """horizon: for how many times the time between two looks a placement is expected to stay good.

    dispatch: as in Plan.times, how tokens will be divided over replicas. spares: no expert is to be on one rank alone
    (spares.py).
    """

    def __init__(self, horizon: float = 10.0, dispatch: str = "static", spares: bool = False) -> None:
        self.horizon, self.dispatch, self.spares, self.decision = horizon, dispatch, spares, ""

    def __call__(self, look: Look) -> Placement | None:
        old = look.placement
        if old.absent is not None:
            self.decision = f"after {look.passes} passes: {old.say_absent()}; nothing is planned until all are held"
            return None
        if not look.load.any():
            self.decision = f"after {look.passes} passes: no tokens, nothing to plan for"
            return None
        slots = np.bincount(old.slot_rank, minlength=old.num_ranks).tolist()
        ranks = [Rank(cost, slots=count) for cost, count in zip(look.cost.tolist(), slots, strict=True)]
        seconds_per_move = float(np.mean(look.expert_bytes)) / look.bytes_per_s
        made = plan(look.load, ranks, sum(slots), start=old, move_cost=seconds_per_move / self.horizon)
        if self.spares:
            made = _as_plan(with_spares(made, look.load), made)
        now = _as_plan(old, made).times(dispatch=self.dispatch).max(axis=1).sum()
        then = made.times(dispatch=self.dispatch).max(axis=1).sum()
        gain, moves = (now - then) * self.horizon, made.moves_from(old)
        price = moves * seconds_per_move
        pays = gain > price and not np.array_equal(made.slot_expert, old.slot_expert)
        shares_only = moves == 0 and gain > 0 and self.dispatch == "static"
        verdict = "moving" if pays else "new shares" if shares_only else "stays"
        self.decision = (
            f"after {look.passes} passes: slowest ranks {now * 1e3:.1f} ms, planned {then * 1e3:.1f} ms; "
            f"{moves} moves, {price * 1e3:.1f} ms, to save {gain * 1e3:.1f} ms in {self.horizon:g} times as long: "
            f"{verdict}"
        )
        return made if pays or shares_only else None


def _as_plan(placement: Placement, like: Plan) -> Plan:
    """With the ranks and the load of another plan, to tell times."""
    tables = (placement.slot_expert, placement.slot_rank, placement.slot_share)
    return Plan(*tables, placement.num_experts, placement.num_ranks, like.ranks, like.load)

"""How a model follows into a new view: what its members hold becomes the placement, what nobody holds is read again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from .comm.transport import Transport
from .comm.wire import all_gather_message
from .core.placement import Placement
from .migration import columns_of
from .model import expert_layers
from .refit import refit
from .survival import Survival
from .views import Held, after_loss, placement_of


@dataclass(frozen=True)
class Followed:
    """What all members of the view have come to. passes: forward passes so far, of whoever has made most. forms: what
    each rank holds its experts in, () where nobody has said. num_slots: that the model was loaded with. most_read:
    bytes of experts, that one rank reads. told: for people."""

    placement: Placement
    passes: int
    forms: tuple[str, ...]
    num_slots: int
    most_read: int
    told: str


def follow(
    model: PreTrainedModel,
    survival: Survival,
    transport: Transport,
    old_rank: int,
    room: int | None,
    num_slots: int,
    speeds: Sequence[float],
) -> Followed:
    """Have this rank hold what it has to in the view of `transport`. Every rank of the view calls.

    old_rank: this rank's place in the placement that its layers are in. room: slots that it has memory for beside its
    own, None where nobody knows. speeds [R]: of the view's ranks. Until all has been read nothing is changed. Raises
    ConfigError where --on-loss does not let the job go on, CheckpointError for what cannot be read, and survival.LOST.
    """
    states = [layer.moe_runtime_layer for layer in expert_layers(model)]
    before, source = states[0].placement, getattr(model, "moe_runtime_source", None)
    form = states[0].expert_dtypes[old_rank] if states[0].expert_dtypes else ""
    mine = [Held.of(before, old_rank, room).as_message(), states[0].passes, source is not None, form, num_slots]
    said = all_gather_message(transport, mine, "new view")
    for state in states:
        state.fold_tokens(old_rank)
    load = torch.from_numpy(np.stack([state.earlier_tokens for state in states]))
    transport.all_reduce(load, "new view (load)")
    held = [Held(*one) for one, *_ in said]
    found, reads = placement_of(held, before.num_experts), all(can for _, _, can, _, _ in said)
    on_loss = survival.settings.on_loss
    placement, told = after_loss(found, on_loss, speeds, [one.room for one in held], load.numpy(), reads)
    most_read = 0
    if placement is not found:
        missing = [_missing(one, placement, rank) for rank, one in enumerate(held)]
        mine = missing[transport.rank]
        refit(model, held[transport.rank].experts, placement, transport.rank, source, survival.reading(mine))
        most_read = max(missing) * sum(column.row_bytes for column in columns_of(expert_layers(model)[0], None))
        told += f"; {mine} of them here" if mine else ""
    forms = tuple(form for *_, form, _ in said) if form else ()
    passes, slots = max(passes for _, passes, *_ in said), max(slots for *_, slots in said)
    return Followed(placement, passes, forms, slots, most_read, told)


def _missing(held: Held, new: Placement, rank: int) -> int:
    """How many experts this rank has to read, all layers together."""
    return sum(len(set(new.rank_experts(layer, rank)) - set(experts)) for layer, experts in enumerate(held.experts))

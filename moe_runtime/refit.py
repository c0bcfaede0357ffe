"""What a rank holds of a sharded model changes without any other rank: for worlds that lose and gain ranks.

Rows of experts that the rank holds already are copied to their new places, the others are read from the checkpoint as
loading.py reads them. Which experts a rank is to hold is decided elsewhere (views.py); dispatchers, choosers and the
placement in force are the caller's to set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from .checkpoint import CheckpointReader
from .core.errors import CheckpointError, ConfigError
from .core.placement import Placement
from .core.tensors import empty_weights
from .experts.blocks import FORMATS
from .layer import experts_modules
from .loading import Sources, read_expert
from .migration import columns_of

_FORM_OF = {dtype: form for form, dtype in FORMATS.items()}
_SCALES = "_scale_inv"
_STRAIGHT_FROM = 1 << 21  # bytes of a row: a huge page


class Source:
    """Where lost experts are read from: a checkpoint's open files, and which of their tensors make up each expert.

    Made while all is well, so that at the time of loss nothing is left to do but to read. The files stay open: a
    checkpoint that is replaced under the same name meanwhile is still read as it was. `model` is sharded; its weights
    must be those of the checkpoint (of a model that has been trained since, old experts would come back).

    Raises CheckpointError for files that cannot be read, or that lack a tensor of the model's experts. Close it, or use
    it as a context manager.
    """

    def __init__(self, model: PreTrainedModel, folder: str | Path) -> None:
        self._reader = CheckpointReader(folder)
        self._converted = 0
        try:
            self._sources = Sources(model, self._reader)
            for prefix, module in experts_modules(model).items():
                for name in _weights_of(module):
                    self._prepare(f"{prefix}.{name}", module.moe_runtime_layer.placement.num_experts)
        except BaseException:
            self.close()
            raise

    def _prepare(self, target: str, num_experts: int) -> None:
        keys = self._sources.keys_of.get(target)
        if not keys:
            raise CheckpointError(f"{self._reader.folder}: no tensor of the checkpoint is a part of {target}")
        self._converted += self._sources.parts_as_stored(target, num_experts) is None
        for _, key in keys:
            self._reader.open_raw(key)

    def describe(self) -> str:
        """How experts are read, in one line."""
        how = f"{self._converted} tensors through transformers' conversion" if self._converted else "none converted"
        return f"lost experts are read again from {self._reader.folder}, straight to their place ({how})"

    def read(
        self, target: str, expert: int, num_experts: int, out: torch.Tensor, dtype: torch.dtype, form: str | None
    ) -> torch.Tensor | None:
        """One expert's part of an experts tensor into `out`; see loading.read_expert."""
        return read_expert(self._sources, target, expert, num_experts, out, dtype, form)

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def refit(
    model: PreTrainedModel,
    old_experts: Sequence[Sequence[int]],
    new: Placement,
    rank: int,
    source: Source,
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Make this rank hold what `new` has on `rank`; returns how many experts were read, all layers together.

    old_experts [L]: the experts whose rows the rank holds now, in the order of its slots, as Placement.rank_experts
    gives them under the number that the rank had. progress: called with the number of experts read, before each; what
    it raises ends this with the model as it was. Changes the parameters of the expert layers (new ones where rows
    change, in the same dtype) and their num_experts, and nothing else.

    Until everything has been read nothing is changed; then each tensor is replaced, one after the other. So memory for
    the rows that come, and for one whole tensor, is needed for a while. Raises CheckpointError for what cannot be read,
    ConfigError for a placement that does not fit the model; the model is then as it was.
    """
    modules = experts_modules(model)
    _check(modules, old_experts, new, rank)
    changes, read = [], 0
    with torch.inference_mode(False), torch.no_grad():  # parameters outlive this mode
        for layer, (prefix, module) in enumerate(modules.items()):
            wanted = new.rank_experts(layer, rank)
            if wanted == list(old_experts[layer]):
                continue
            missing = [(slot, e) for slot, e in enumerate(wanted) if e not in old_experts[layer]]
            tensors = [_Change.of(module, name, old_experts[layer], wanted) for name, _ in _parameters(module)]
            by_name = {change.name: change for change in tensors}
            for done, (slot, expert) in enumerate(missing, read):
                progress(done)
                for name in _weights_of(module):
                    change, scales = by_name[name], by_name.get(name + _SCALES)
                    dtype, row = change.before.dtype, change.row(slot)
                    form = None if scales is None else _FORM_OF[dtype]
                    out = row.view(torch.uint8) if form else row
                    scale = source.read(f"{prefix}.{name}", expert, new.num_experts, out, dtype, form)
                    if scales is not None:
                        scales.row(slot).copy_(scale)
            changes += tensors
            read += len(missing)
        for change in changes:
            change.put()
    for layer, module in enumerate(modules.values()):
        module.num_experts = len(new.rank_experts(layer, rank))
    return read


@dataclass
class _Change:
    """One parameter of a layer, from the old slots to the new ones.

    kept [S]: for each new slot the old one, -1 where the row is read. rows: where rows are read to. With large rows on
    a CPU that is the whole new tensor, of which only the pages that are written take memory; else the read rows alone.
    """

    module: Any
    name: str
    before: torch.Tensor
    kept: np.ndarray
    rows: torch.Tensor
    is_whole: bool  # rows are the new tensor

    @classmethod
    def of(cls, module: Any, name: str, old: Sequence[int], wanted: Sequence[int]) -> _Change:
        slots = {expert: slot for slot, expert in enumerate(old)}
        kept = np.array([slots.get(expert, -1) for expert in wanted], dtype=np.int64)
        before = getattr(module, name).data
        is_whole = before.is_cpu and before[:1].nbytes >= _STRAIGHT_FROM
        count = len(wanted) if is_whole else int((kept < 0).sum())
        return cls(module, name, before, kept, _empty(before, count), is_whole)

    def row(self, slot: int) -> torch.Tensor:
        """Where the row of a new slot is read to."""
        return self.rows[slot if self.is_whole else int((self.kept[:slot] < 0).sum())]

    def put(self) -> None:
        """Kept rows beside those that were read; the new parameter takes the old one's place."""
        after = self.rows
        if not self.is_whole:
            after = _empty(self.before, len(self.kept))
            for row, slot in zip(self.rows, np.flatnonzero(self.kept < 0).tolist(), strict=True):
                after[slot].copy_(row)
        for slot, source in enumerate(self.kept.tolist()):
            if source >= 0:
                after[slot].copy_(self.before[source])
        column = next(column for column in columns_of(self.module, None) if column.name == self.name)
        column.put(after)
        self.before = self.rows = after[:0]  # let go of the old rows before the next tensor is made


def _empty(like: torch.Tensor, count: int) -> torch.Tensor:
    return empty_weights((count, *like.shape[1:]), like.dtype, like.device)


def _parameters(module: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return list(module.named_parameters(recurse=False))


def _weights_of(module: Any) -> list[str]:
    """The parameters that a checkpoint has tensors for: scales come with what they scale."""
    return [name for name, _ in _parameters(module) if not name.endswith(_SCALES)]


def _check(modules: dict[str, Any], old_experts: Sequence[Sequence[int]], new: Placement, rank: int) -> None:
    if not len(modules) == len(old_experts) == new.num_layers:
        raise ConfigError(
            f"refit: the placement has {new.num_layers} layers, old_experts has {len(old_experts)}, the model "
            f"{len(modules)}"
        )
    if not 0 <= rank < new.num_ranks:
        raise ConfigError(f"refit: rank {rank} is none of the placement's {new.num_ranks}")
    for (name, module), held in zip(modules.items(), old_experts, strict=True):
        if module.num_experts != len(held):
            raise ConfigError(f"refit: {name} holds {module.num_experts} experts, old_experts names {len(held)}")
        state = module.moe_runtime_layer
        if state.placement.num_experts != new.num_experts:
            raise ConfigError(
                f"refit: a placement of {new.num_experts} experts, {name} has {state.placement.num_experts}"
            )

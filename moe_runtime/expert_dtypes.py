"""What each rank holds its experts in: as asked, as the cluster file has it, or as its vendor or memory needs.

Decides, and says why; loading.py does it. 8-bit forms are those of experts/blocks.py. Ranks of one job may differ: an
expert's result then depends, within the forms' rounding, on the rank that computes it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .checkpoint import CheckpointReader
from .comm.transport import Transport
from .comm.wire import all_gather_message
from .core.cluster import Node
from .core.config import RuntimeConfig
from .core.errors import ConfigError
from .experts.blocks import BLOCK, FORMATS
from .layer import experts_modules

_GIB = 1 << 30
_BLOCK_BYTES = 1 + 4 / BLOCK**2  # of a weight in 8 bits and its share of a scale


@dataclass(frozen=True)
class Sizes:
    """Of one rank: numbers of weights of its experts and of all else, bytes of one that is not in 8 bits."""

    experts: int
    others: int
    item_bytes: int

    def gib(self, name: str) -> float:
        """What the rank holds with its experts in `name`."""
        each = _BLOCK_BYTES if name in FORMATS else self.item_bytes
        return (self.experts * each + self.others * self.item_bytes) / _GIB


@dataclass(frozen=True)
class Choice:
    """name: "fp8", "int8", or the model's dtype. why: for people. automatic: nobody has asked for this form."""

    name: str
    why: str = ""
    automatic: bool = False

    @property
    def form(self) -> str | None:
        """The form of 8 bits, or None."""
        return self.name if self.name in FORMATS else None


def choose(
    asked: str | None,
    keep_fp8: bool,
    node: Node | None,
    stored: str | None,
    dtype: torch.dtype,
    can: Mapping[str, str],
    sizes: Sizes,
) -> Choice:
    """What this rank holds its experts in.

    asked: a name, or "auto" or None. stored: the checkpoint's form of experts, where it is one of 8 bits. can: "yes",
    "no" or "unknown" by dtype name: what the rank's device can store. Raises ConfigError for a name that cannot be.
    """
    wide = str(dtype).removeprefix("torch.")
    choice = _wanted(asked, keep_fp8, node, stored, can) or _fitting(wide, node, stored, can, sizes)
    if choice.name not in (*FORMATS, wide):
        raise ConfigError(
            f"expert_dtype {choice.name!r} ({choice.why}): experts are held in {', '.join(FORMATS)} or in the model's "
            f"own dtype, here {wide}"
        )
    return choice


def _wanted(
    asked: str | None, keep_fp8: bool, node: Node | None, stored: str | None, can: Mapping[str, str]
) -> Choice | None:
    if asked not in (None, "auto"):
        if keep_fp8 and asked != "fp8":
            raise ConfigError(f"keep_fp8 and expert_dtype {asked!r} contradict each other; give one of them")
        return Choice(asked, "as asked")
    if node is not None and node.expert_dtype is not None:
        return Choice(node.expert_dtype, f"expert_dtype of node {node.name}")
    if keep_fp8 and stored == "fp8":
        if can.get("float8_e4m3fn") == "no" and can.get("int8") == "yes":
            return Choice("int8", "by the vendor table its device has int8, and no FP8 of the checkpoint's kind", True)
        return Choice("fp8", "kept as stored")
    return None


def _fitting(wide: str, node: Node | None, stored: str | None, can: Mapping[str, str], sizes: Sizes) -> Choice:
    """The model's dtype where it fits or nothing is known, else 8 bits: as stored, or int8, which rounds less."""
    if node is None or node.memory_gib is None or sizes.gib(wide) <= node.memory_gib:
        return Choice(wide)
    order = dict.fromkeys(([stored] if stored else []) + ["int8", "fp8"])
    able = [name for name in order if can.get(str(FORMATS[name]).removeprefix("torch."), "unknown") != "no"]
    if not able:
        return Choice(wide)
    why = f"in {wide} this rank would hold {sizes.gib(wide):.3g} GiB, memory_gib is {node.memory_gib:g}"
    if sizes.gib(able[0]) > node.memory_gib:
        why += f"; it still holds {sizes.gib(able[0]):.3g} GiB"
    return Choice(able[0], why, True)


def sizes_of(model: torch.nn.Module, dtype: torch.dtype) -> Sizes:
    """Of a sharded model, which may still be on the meta device."""
    mine = {
        id(parameter): parameter.numel()
        for module in experts_modules(model).values()
        for parameter in module.parameters(recurse=False)
        if parameter.dim() == 3
    }
    others = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in mine)
    return Sizes(sum(mine.values()), others, dtype.itemsize)


def stored_form(reader: CheckpointReader) -> str | None:
    """The 8-bit form of a checkpoint's experts, or None."""
    return next((reader.blocks_of(key) for key in reader.keys if ".experts." in key), None)


def settle(model: torch.nn.Module, transport: Transport, choice: Choice, config: RuntimeConfig) -> None:
    """Every rank's choice becomes known to all; every rank calls. Raises ConfigError, on all alike, for settings that
    cannot go with them."""
    names = tuple(all_gather_message(transport, choice.name, "load (expert dtypes)"))
    if config.expert_kernel == "transformers" and not set(names).isdisjoint(FORMATS):
        raise ConfigError(f'expert_kernel = "transformers" cannot compute experts in 8 bits; ranks hold {list(names)}')
    if config.rebalance == "auto" and len(set(names)) > 1:
        raise ConfigError(f'rebalance = "auto" needs ranks that hold experts alike; they hold {list(names)}')
    for module in experts_modules(model).values():
        module.moe_runtime_layer.expert_dtypes = names
    if choice.automatic:
        print(f"moe-runtime: rank {transport.rank} holds experts in {choice.name}: {choice.why}", file=sys.stderr)


def of_ranks(model: torch.nn.Module) -> Sequence[str]:
    """What each rank holds its experts in; empty for models that were not loaded from a checkpoint."""
    return next(iter(experts_modules(model).values())).moe_runtime_layer.expert_dtypes


def refuse_8_bits(model: torch.nn.Module, what: str) -> None:
    """Raises ConfigError, on every rank alike, where any rank's experts are in 8 bits. what: "saved", "trained"."""
    held = sorted({name.upper() for name in of_ranks(model) if name in FORMATS})
    if held:
        forms = " and ".join(held)
        raise ConfigError(
            f"a model whose experts are kept in {forms} cannot be {what}; load it without keeping {forms} "
            "(expert_dtype: the model's dtype)"
        )


def describe(choice: Choice, names: Sequence[str], model: Any) -> list[str]:
    """What this rank holds its experts in, and the others where they differ."""
    held = sum(p.nbytes for module in experts_modules(model).values() for p in module.parameters(recurse=False))
    blocks = f", one float32 scale per {BLOCK}x{BLOCK} block" if choice.name in FORMATS else ""
    why = f" ({choice.why})" if choice.why else ""
    lines = [f"experts: held in {choice.name}{blocks}{why}: {held / 2**20:,.1f} MiB on this rank"]
    if len(set(names)) > 1:
        ranks = {name: [str(rank) for rank, held in enumerate(names) if held == name] for name in dict.fromkeys(names)}
        lines.append(
            "experts of ranks "
            + "; ".join(f"{', '.join(ranks[name])} in {name}" for name in ranks)
            + ": an expert's result depends on the rank that computes it, replicas of one expert differ by the rounding"
        )
    return lines

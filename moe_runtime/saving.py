"""Writing a sharded model as a Hugging Face checkpoint that plain transformers loads.

Rank 0 writes; the other ranks send it their experts one at a time, so that it never holds more than one shard file
(and, for families that store all experts of a layer in one tensor, one such tensor). The folder appears under its
final name only when everything is on disk.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from .checkpoint import INDEX, SINGLE
from .comm.transport import Transport
from .comm.wire import all_gather_message
from .core.errors import CheckpointError
from .core.files import sync_to_disk
from .expert_dtypes import refuse_8_bits
from .layer import experts_modules, refuse_absent


def save_checkpoint(
    model: PreTrainedModel, folder: Path, transport: Transport, tokenizer: Any = None, max_shard_bytes: int = 1 << 30
) -> None:
    """Write config, weights and tokenizer. Every rank calls. Raises CheckpointError on every rank when rank 0 cannot,
    and ConfigError where any rank's experts are in 8 bits, or no rank holds some.

    After a failure nothing is left under the final name, and a checkpoint that stood there before still stands.
    """
    refuse_8_bits(model, "saved")
    refuse_absent(model, "saved")
    folder = folder.resolve()
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    writer = ShardWriter(partial, max_shard_bytes) if transport.rank == 0 else None
    error = why_not_there(folder) if transport.rank == 0 else None
    for name, tensor in _tensors(model, transport):
        # A rank 0 that cannot write goes on receiving: the others are in the middle of sending to it.
        if writer is None or error is not None:
            continue
        try:
            writer.add(name, tensor)
        except (OSError, SafetensorError) as failure:
            error = str(failure)
    if writer is not None and error is None:
        try:
            writer.finish(lambda folder: _write_others(model, tokenizer, folder))
            replace_folder(folder, partial)
        except Exception as failure:  # noqa: BLE001 - a tokenizer may refuse in its own way
            error = " ".join(str(failure).split()) or repr(failure)
    if writer is not None and error is not None:
        shutil.rmtree(partial, ignore_errors=True)
    error = all_gather_message(transport, error, "save (outcome)")[0]
    if error is not None:
        raise CheckpointError(f"{folder}: the checkpoint could not be written ({error}); what stood there still stands")


def _tensors(model: PreTrainedModel, transport: Transport) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the whole model under its checkpoint name, one by one; on ranks other than 0 yields nothing."""
    experts = {f"{name}.": module for name, module in experts_modules(model).items()}
    shared: dict[int, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        owner = next((prefix for prefix in experts if name.startswith(prefix)), None)
        if owner is not None:
            yield from _expert_tensors(model, name, value, experts[owner], transport)
        elif transport.rank == 0 and shared.setdefault(value.data_ptr(), name) == name:  # tied weights once
            yield from revert_weight_conversion(model, {name: value.detach()}).items()


def _expert_tensors(
    model: PreTrainedModel, name: str, value: torch.Tensor, module: Any, transport: Transport
) -> Iterator[tuple[str, torch.Tensor]]:
    layer = module.moe_runtime_layer
    names_of = _per_expert_names(model, name, value)
    fused = None if names_of or transport.rank else value.new_empty((layer.placement.num_experts, *value.shape[1:]))
    for expert in range(layer.placement.num_experts):
        part = _fetch(value.detach(), layer.placement, layer.index, expert, transport)
        if part is None:
            continue
        if fused is not None:
            fused[expert].copy_(part[0])
        else:
            for made, tensor in revert_weight_conversion(model, {name: part}).items():
                yield names_of[made].format(expert), tensor
    if fused is not None:
        yield from revert_weight_conversion(model, {name: fused}).items()


def _fetch(value: torch.Tensor, placement: Any, layer: int, expert: int, transport: Transport) -> torch.Tensor | None:
    """Entry `expert` as [1, ...] on rank 0, None elsewhere."""
    slot = int((placement.slot_expert[layer] == expert).argmax())
    owner = int(placement.slot_rank[slot])
    local = slot - placement.rank_slots(owner).start
    phase = f"save (layer {layer}, expert {expert})"
    if owner == transport.rank:
        part = value[local : local + 1].contiguous()
        if owner != 0:
            transport.send(part, 0, phase)
        return part if transport.rank == 0 else None
    if transport.rank == 0:
        part = value.new_empty((1, *value.shape[1:]))
        transport.recv(part, owner, phase)
        return part
    return None


def _per_expert_names(model: PreTrainedModel, name: str, value: torch.Tensor) -> dict[str, str]:
    """For families that store experts one by one: key of expert 0 -> key with `{}` for the number. Else empty.

    Found by asking transformers' reverse conversion for one and for two experts, on the meta device.
    """
    shape = value.shape[1:]
    one = list(revert_weight_conversion(model, {name: torch.empty((1, *shape), device="meta")}))
    two = list(revert_weight_conversion(model, {name: torch.empty((2, *shape), device="meta")}))
    if len(two) == len(one):
        return {}
    names = {}
    for key in one:
        parts = key.split(".")
        for at in range(len(parts) - 1, -1, -1):
            if parts[at] == "0" and ".".join([*parts[:at], "1", *parts[at + 1 :]]) in two:
                names[key] = ".".join([*parts[:at], "{}", *parts[at + 1 :]])
                break
    return names


def _write_others(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    config = model.config
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


class ShardWriter:
    """Collects tensors and writes a shard whenever the next would pass `max_shard_bytes`."""

    def __init__(self, folder: Path, max_shard_bytes: int) -> None:
        self.folder, self._limit = folder, max_shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._limit:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += size
        self._total_bytes += size

    def finish(self, write_others: Callable[[Path], None]) -> None:
        """Write what is left and the index; `write_others(folder)` adds the other files. All of it is then on disk."""
        self._flush()
        write_others(self.folder)
        if len(self._shards) == 1:
            (self.folder / self._temporary(0)).rename(self.folder / SINGLE)
        else:
            self._write_index()
        for path in self.folder.iterdir():
            sync_to_disk(path)
        sync_to_disk(self.folder)

    def _write_index(self) -> None:
        weight_map = {}
        for number, names in enumerate(self._shards):
            final = f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"
            (self.folder / self._temporary(number)).rename(self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self._pending.items()}
        save_file(tensors, self.folder / self._temporary(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending.clear()
        self._pending_bytes = 0

    @staticmethod
    def _temporary(number: int) -> str:
        return f"shard-{number:05d}.safetensors"


def why_not_there(folder: Path) -> str | None:
    """Why nothing may be written under this name, or None."""
    if folder.exists() and not folder.is_dir():
        return "a file of that name is there"
    if folder.is_dir() and not (folder / "config.json").is_file() and any(folder.iterdir()):
        return "the folder is there and is not a checkpoint; it is not overwritten"
    return None


def replace_folder(folder: Path, partial: Path) -> None:
    """Put `partial` under the final name; an older checkpoint there is set aside first and removed last."""
    if not folder.exists():
        partial.rename(folder)
        return
    aside = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    folder.rename(aside)
    try:
        partial.rename(folder)
    except OSError:
        aside.rename(folder)
        raise
    shutil.rmtree(aside)

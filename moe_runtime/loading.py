"""Filling a sharded model from a checkpoint, or with fresh weights.

Each rank reads the non-expert tensors and only its own experts, one expert at a time, through transformers' own
conversion rules (renames, per-expert to fused, transposes), so every family transformers can read can be read here.
"""

from __future__ import annotations

import copy
import math
import re
import zlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, build_glob_alternation, rename_source_key

from .checkpoint import CheckpointReader
from .core.errors import CheckpointError, ConfigError
from .core.tensors import empty_weights
from .experts.blocks import BLOCK, FORMATS, num_blocks, quantize_blocks
from .layer import experts_modules

Progress = Callable[[int, int], None]
_STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}  # by safetensors


def fill_from_checkpoint(
    model: PreTrainedModel,
    reader: CheckpointReader,
    dtype: torch.dtype,
    device: torch.device,
    rank: int,
    *,
    expert_form: str | None = None,
    progress: Progress = lambda done, total: None,
) -> list[str]:
    """Give every meta tensor of a sharded model its value. Returns the checkpoint's keys that the model has no use for.

    expert_form: "fp8" or "int8" holds this rank's experts so, with their scales: as stored where they are stored so,
    else quantised here. Raises CheckpointError for a missing tensor, a missing expert, a wrong shape or an unreadable
    file.
    """
    source = Sources(model, reader)
    experts = {f"{name}.": module for name, module in experts_modules(model).items()}
    dtype_of = _dtype_rule(model, dtype)
    total = len(source.keys_of)
    for done, target in enumerate(sorted(source.keys_of, key=source.file_order)):
        owner = next((prefix for prefix in experts if target.startswith(prefix)), None)
        if owner is None:
            for name, value in source.convert(target, dtype_of(target)).items():
                _assign(model, name, value.to(device), reader.folder)
        else:
            _fill_experts(model, experts[owner], target, source, dtype_of(target), device, rank, expert_form)
        progress(done + 1, total)
    model._weight_conversions = [rule for rule in source.rules if rule.was_used()]
    finish(model, device, reader.folder)
    return source.unexpected


class Sources:
    """Which checkpoint keys make up each tensor of the model, and how."""

    def __init__(self, model: PreTrainedModel, reader: CheckpointReader) -> None:
        self.model, self.reader = model, reader
        self.rules = get_model_conversion_mapping(model)
        renamings = [rule for rule in self.rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in self.rules if isinstance(rule, WeightConverter)]
        self._converter = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        self.keys_of: dict[str, list[tuple[str | None, str]]] = defaultdict(list)  # target -> (pattern, key)
        self.unexpected: list[str] = []
        self._pattern_tables: dict[str, dict[str | None, dict[int, str]]] = {}
        self._as_stored: dict[str, list[str | None] | None] = {}
        known = model.state_dict()
        ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
        self._order: dict[str, int] = {}
        for position, key in enumerate(reader.keys):
            target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
            if target not in known and key in known:
                target, pattern = key, None
            if target in known:
                self.keys_of[target].append((pattern, key))
                self._order.setdefault(target, position)
            elif not any(rule.search(key) for rule in ignored):
                self.unexpected.append(key)

    def patterns(self, target: str) -> set[str | None]:
        """The kinds of keys that are joined into a tensor, such as an expert's gate_proj and up_proj."""
        return {pattern for pattern, _ in self.keys_of[target]}

    def file_order(self, target: str) -> int:
        return self._order[target]

    def convert(self, target: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The whole tensor (or tensors, where one source makes several)."""
        return self._apply(target, [(p, self.reader.read(key, dtype)) for p, key in self.keys_of[target]])

    def convert_expert(
        self, target: str, expert: int, num_experts: int, read: Callable[[str, int | None], torch.Tensor]
    ) -> torch.Tensor:
        """Entry `expert` of an experts tensor; `read(key, row)` fetches the parts.

        Per-expert keys carry the expert's number; fused keys hold it as row `expert`.
        """
        parts = []
        for pattern, keys in self._by_pattern(target).items():
            if pattern is not None and "*" in pattern:
                key = keys.get(expert)
                if key is None:
                    raise CheckpointError(
                        f"{self.reader.folder}: expert {expert} of {target} has no tensor (of {num_experts} experts, "
                        f"{len(keys)} are there)"
                    )
                parts.append((pattern, read(key, None)))
            else:
                (key,) = keys.values()
                if self.reader.shape(key)[0] != num_experts:
                    raise CheckpointError(
                        f"{self.reader.folder}: tensor {key} has shape {list(self.reader.shape(key))}, "
                        f"but the model needs {num_experts} experts along dimension 0"
                    )
                parts.append((pattern, read(key, expert).unsqueeze(0)))
        return self._apply(target, parts)[target][0]

    def expert_keys(self, target: str, expert: int) -> list[str]:
        """The checkpoint's keys that convert_expert reads."""
        return [keys.get(expert, next(iter(keys.values()))) for keys in self._by_pattern(target).values()]

    def parts_as_stored(self, target: str, num_experts: int) -> list[str | None] | None:
        """The kinds of keys whose tensors, as they are stored and one after the other, are an expert's entry of a
        tensor; None where transformers' conversion does more (transposes, interleaves, computes).

        Found by converting one expert of which every value is its own place, in sizes of a few values.
        """
        if target not in self._as_stored:
            self._as_stored[target] = self._find_as_stored(target, num_experts)
        return self._as_stored[target]

    def _find_as_stored(self, target: str, num_experts: int) -> list[str | None] | None:
        kinds = list(self._by_pattern(target))
        if not kinds:
            return None
        extents = sorted({extent for _, key in self.keys_of[target] for extent in self.reader.shape(key)})
        places: dict[int, tuple[str | None, int]] = {}  # where a part's numbers begin -> its kind, and how many
        next_place = 0

        def numbered(key: str, row: int | None) -> torch.Tensor:
            nonlocal next_place
            shape = self.reader.shape(key) if row is None else self.reader.shape(key)[1:]
            small = [2 * extents.index(extent) + 2 for extent in shape]
            values = torch.arange(next_place, next_place + math.prod(small), dtype=torch.float64).view(small)
            places[next_place] = kinds[len(places)], len(values.view(-1))
            next_place += len(values.view(-1))
            return values

        try:
            made = self.convert_expert(target, 0, num_experts, numbered).reshape(-1).tolist()
        except CheckpointError:  # whoever reads the expert is told
            return None
        found, at = [], 0
        while at < len(made):
            kind, count = places.pop(int(made[at]), (None, 0))
            if not count or made[at : at + count] != list(range(int(made[at]), int(made[at]) + count)):
                return None
            found.append(kind)
            at += count
        return None if places else found

    def key_of(self, target: str, kind: str | None, expert: int) -> tuple[str, int | None]:
        """The key of one kind that holds an expert's part, and the row of it where it holds all experts'."""
        keys = self._by_pattern(target)[kind]
        if kind is not None and "*" in kind:
            return keys.get(expert, ""), None
        return next(iter(keys.values())), expert

    def _by_pattern(self, target: str) -> dict[str | None, dict[int, str]]:
        if target in self._pattern_tables:
            return self._pattern_tables[target]
        table: dict[str | None, dict[int, str]] = defaultdict(dict)
        for pattern, key in self.keys_of[target]:
            numbers = [part for part in key.split(".") if part.isdigit()]
            table[pattern][int(numbers[-1]) if pattern is not None and "*" in pattern else 0] = key
        self._pattern_tables[target] = table
        return table

    def _apply(self, target: str, parts: list[tuple[str | None, torch.Tensor]]) -> dict[str, torch.Tensor]:
        if parts[0][0] is None:
            return {target: parts[0][1]}
        rule = copy.deepcopy(self._converter[parts[0][0]])
        for pattern, tensor in parts:
            rule.add_tensor(target, target, pattern, tensor)
        try:
            made = rule.convert(target, model=self.model, config=self.model.config)
        except (RuntimeError, ValueError, KeyError) as error:
            shapes = [list(tensor.shape) for _, tensor in parts]
            raise CheckpointError(
                f"{self.reader.folder}: {target} cannot be built from tensors of shapes {shapes}: {error}"
            ) from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _fill_experts(
    model: PreTrainedModel,
    module: Any,
    target: str,
    source: Sources,
    dtype: torch.dtype,
    device: torch.device,
    rank: int,
    form: str | None,
) -> None:
    """One experts tensor: allocate this rank's part and write each local expert straight into its slot."""
    placement, layer = module.moe_runtime_layer.placement, module.moe_runtime_layer.index
    name = target.rpartition(".")[2]
    meta = getattr(module, name)
    if meta.dim() != 3:  # biases
        form = None
    stored = FORMATS[form] if form else dtype
    part = empty_weights(meta.shape, torch.uint8 if form else stored, device)
    scales: list[torch.Tensor] = []
    for slot, expert in enumerate(placement.rank_experts(layer, rank)):
        scale = read_expert(source, target, expert, placement.num_experts, part[slot], dtype, form)
        scales += [] if scale is None else [scale]
    if form:
        stacked = torch.stack(scales) if scales else torch.empty(0, *num_blocks(part.shape))
        module.register_parameter(f"{name}_scale_inv", _parameter(stacked.to(device), requires_grad=False))
    setattr(module, name, _parameter(part.view(stored), requires_grad=meta.requires_grad and not form))


def read_expert(
    source: Sources,
    target: str,
    expert: int,
    num_experts: int,
    out: torch.Tensor,
    dtype: torch.dtype,
    form: str | None,
) -> torch.Tensor | None:
    """One expert's matrix of an experts tensor `target` into `out`, in `dtype`; or, with a form, its bytes (`out` is
    uint8), and its scales are returned.

    Where the checkpoint has it as it is wanted, it is read to its place; else through transformers' conversion, which
    gives the same values. Raises CheckpointError where it is missing, unreadable or not of the shape of `out`.
    """
    if not _read_as_stored(source, target, expert, num_experts, out, dtype, form):
        value, scale = _convert_expert(source, target, expert, num_experts, dtype, form)
        if value.shape != out.shape:
            raise CheckpointError(
                f"{source.reader.folder}: expert {expert} of {target} has shape {list(value.shape)}, "
                f"the model needs {list(out.shape)}"
            )
        out.copy_(value)
        return scale
    return None if form is None else _stored_scales(source, target, expert, num_experts, out.shape, form)


def _read_as_stored(
    source: Sources,
    target: str,
    expert: int,
    num_experts: int,
    out: torch.Tensor,
    dtype: torch.dtype,
    form: str | None,
) -> bool:
    """read_expert's short way; False where it cannot be taken, or something is wrong that the long way says better."""
    reader, kinds = source.reader, source.parts_as_stored(target, num_experts)
    if kinds is None or not out.is_cpu or not out.is_contiguous():
        return False
    keys = [source.key_of(target, kind, expert) for kind in kinds]
    if any(key not in reader for key, _ in keys):
        return False
    if form is None:
        fits = all(reader.stored_dtype(key) == _STORED.get(dtype) for key, _ in keys)
    else:
        fits = all(reader.blocks_of(key) == form for key, _ in keys)
    whole = [reader.shape(key) for key, _ in keys]
    if any(row is not None and shape[0] != num_experts for (_, row), shape in zip(keys, whole, strict=True)):
        return False
    shapes = [shape if row is None else shape[1:] for (_, row), shape in zip(keys, whole, strict=True)]
    heights = [shape[0] if shape else 0 for shape in shapes]
    if not fits or sum(heights) != out.shape[0] or any(shape[1:] != tuple(out.shape[1:]) for shape in shapes):
        return False
    for (key, row), rows in zip(keys, out.split(heights), strict=True):
        reader.read_into(key, rows.reshape(-1).view(torch.uint8).numpy(), row)
    return True


def _convert_expert(
    source: Sources, target: str, expert: int, num_experts: int, dtype: torch.dtype, form: str | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One expert's matrix in `dtype`, or, with a form, its bytes (uint8) and scales."""
    reader = source.reader

    def whole(kind: torch.dtype) -> torch.Tensor:
        return source.convert_expert(target, expert, num_experts, lambda key, row: reader.read(key, kind, row))

    if form is None:
        return whole(dtype), None
    if not all(reader.blocks_of(key) == form for key in source.expert_keys(target, expert)):
        value, scale = quantize_blocks(whole(torch.float32), to=FORMATS[form])
        return value.view(torch.uint8), scale
    # The conversion rules move bytes; torch has no concatenation of float8 on CPU.
    value = source.convert_expert(
        target, expert, num_experts, lambda key, row: reader.read_raw(key, row).view(torch.uint8)
    )
    return value, _stored_scales(source, target, expert, num_experts, value.shape, form)


def _stored_scales(
    source: Sources, target: str, expert: int, num_experts: int, shape: torch.Size, form: str
) -> torch.Tensor:
    """The scales of an expert whose matrix of this shape is stored in blocks."""
    scale = source.convert_expert(target, expert, num_experts, source.reader.read_scale)
    # gate and up, joined along dimension 0: each must end where a block ends, or up's scales cover other rows.
    pieces = len(source.patterns(target))
    if (pieces > 1 and shape[0] % (pieces * BLOCK)) or tuple(scale.shape) != num_blocks(shape):
        raise ConfigError(
            f"{target}: expert matrices of {list(shape)} cannot stay in {form.upper()} (their 128x128 blocks do "
            f"not line up once gate and up are joined); load without keeping {form.upper()}"
        )
    return scale


def _assign(model: PreTrainedModel, name: str, value: torch.Tensor, folder: Path) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    current = getattr(module, leaf)
    if tuple(current.shape) != tuple(value.shape):
        raise CheckpointError(
            f"{folder}: tensor {name} has shape {list(value.shape)} in the checkpoint, the model's config needs "
            f"{list(current.shape)}; the two do not belong together"
        )
    if leaf in module._buffers:
        value._is_hf_initialized = True
        module._buffers[leaf] = value
    else:
        setattr(module, leaf, _parameter(value, requires_grad=current.requires_grad))


def _parameter(value: torch.Tensor, requires_grad: bool) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(value, requires_grad=requires_grad and value.is_floating_point())
    parameter._is_hf_initialized = True  # transformers' mark: do not initialise this one again
    return parameter


def _dtype_rule(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    """transformers' own rule for tensors that stay in float32 (`_keep_in_fp32_modules`)."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return lambda name: dtype
    alternation, by_group, _ = build_glob_alternation(list(plan))

    def dtype_of(name: str) -> torch.dtype:
        found = alternation.search(name)
        return plan[by_group[found.lastgroup]] if found and found.lastgroup else dtype

    return dtype_of


def finish(model: PreTrainedModel, device: torch.device, folder: Path) -> None:
    """Tie weights, compute the buffers that checkpoints do not hold, and make sure nothing was left out."""
    model.tie_weights()
    missing = [name for name, value in model.state_dict().items() if value.device.type == "meta"]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise CheckpointError(
            f"{folder}: {len(missing)} tensors of the model are not in the checkpoint: {shown}; "
            "fetch it again, or give the config.json that belongs to it"
        )
    model._move_missing_keys_from_meta_to_device(set(), {"": device}, None, None)
    model._initialize_missing_keys(False)
    model.eval()


def fill_fresh(model: PreTrainedModel, dtype: torch.dtype, device: torch.device, rank: int, seed: int) -> None:
    """Random weights by transformers' own initialisation, drawn on the CPU: no device's generator has a say.

    An expert's weights depend on the seed, its layer and its number only, never on the number of ranks. The caller
    broadcasts the non-expert tensors from rank 0.
    """
    torch.manual_seed(seed)
    dtype_of = _dtype_rule(model, dtype)
    experts = tuple(f"{name}." for name in experts_modules(model))
    for name, value in list(model.state_dict(keep_vars=True).items()):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        kind = dtype_of(name) if value.is_floating_point() else value.dtype
        fresh = torch.zeros(value.shape, dtype=kind)
        if leaf in module._buffers:
            module._buffers[leaf] = fresh
        else:
            parameter = torch.nn.Parameter(fresh, requires_grad=value.requires_grad)
            # Experts are drawn below: transformers drawing them too would shift what it draws for the rest.
            parameter._is_hf_initialized = name.startswith(experts)
            setattr(module, leaf, parameter)
    model.tie_weights()
    model._move_missing_keys_from_meta_to_device(set(), {"": torch.device("cpu")}, None, None)
    model._initialize_missing_keys(False)
    std = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    for module_name, module in experts_modules(model).items():
        mine = module.moe_runtime_layer.placement.rank_experts(module.moe_runtime_layer.index, rank)
        for name, parameter in module.named_parameters(recurse=False):
            for slot, expert in enumerate(mine):
                words = f"{seed}/{module_name}/{name}/{expert}".encode()
                generator = torch.Generator().manual_seed(zlib.crc32(words))
                part = parameter.data[slot]
                if name.endswith("_bias"):
                    part.zero_()
                else:
                    part.copy_(torch.empty(part.shape).normal_(0.0, std, generator=generator))
    model.to(device).eval()

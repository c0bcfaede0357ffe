"""A checkpoint in another weight format: bfloat16, FP8 blocks or INT8 blocks (experts/blocks.py).

Goes tensor by tensor, so that memory holds one shard; knows keys and shapes, no model. Everything that can be refused
is refused before the first byte is written, and the folder appears under its name only when it is whole.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .checkpoint import PICKLES, QUANT_METHODS, CheckpointReader, form_of_quantization
from .core.errors import CheckpointError, ConfigError
from .experts.blocks import BLOCK, FORMATS, dequantize_blocks, num_blocks, quantize_blocks
from .saving import ShardWriter, replace_folder, why_not_there

TARGETS = ("bfloat16", *FORMATS)
# What DeepSeek's own FP8 checkpoints have in FP8: linear weights of attention and MLPs (V3.2: of its indexer, too), not
# embeddings, norms, routers, the head or biases. V2's, V3's and Mixtral's names.
_LINEAR = re.compile(
    r"\.(self_attn|attn|mlp|ffn|block_sparse_moe)\.(\w+\.)*"
    r"([qkvo]_proj|[qk]v?_[ab]_proj|kv_a_proj_with_mqa|indexer\.w(q_b|k)|(gate|up|down)_proj|w[123])\.weight$"
)
_ROUTED = re.compile(r"\.experts\.\d+\.(gate_proj|up_proj|down_proj|w[123])\.weight$")
_ROUTER = re.compile(r"\.(gate|router)\.weight$")  # small, and transformers computes with them in float32
_JOINED = re.compile(r"\.experts\.\d+\.(gate_proj|up_proj|w[13])\.weight$")  # along dimension 0, when they are loaded
_FLOATS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
_BAND = 8 * BLOCK  # rows whose errors are measured at a time
_MOST_BYTES_COPIED = 256 << 20  # of a file that is no weights


@dataclass
class Errors:
    """How far changed weights are from the source's values, in float32. Of a block of 128x128: its largest difference
    over its largest value."""

    blocks: int = 0
    largest: float = 0.0
    largest_in: str = ""
    total: float = 0.0
    _square: float = 0.0
    _square_off: float = 0.0

    def add(self, key: str, source: torch.Tensor, result: torch.Tensor) -> None:
        """Both float32 [rows, cols]."""
        off = source - result
        most, most_off = _largest_of_blocks(source), _largest_of_blocks(off)
        errors = torch.where(most > 0, most_off / most, most_off)
        if self.blocks == 0 or errors.max().item() > self.largest:
            self.largest, self.largest_in = errors.max().item(), key
        self.blocks += errors.numel()
        self.total += errors.sum(dtype=torch.float64).item()
        self._square += source.square().sum(dtype=torch.float64).item()
        self._square_off += off.square().sum(dtype=torch.float64).item()

    @property
    def mean(self) -> float:
        """Of the blocks' errors."""
        return self.total / self.blocks if self.blocks else 0.0

    @property
    def root_mean_square(self) -> float:
        """Of all differences, over that of all values."""
        return math.sqrt(self._square_off / self._square) if self._square else 0.0


@dataclass
class Report:
    """What a conversion did. Bytes are of tensors."""

    bytes_before: int = 0
    bytes_after: int = 0
    tensors: int = 0
    changed: int = 0
    errors: Errors = field(default_factory=Errors)
    left_out: list[str] = field(default_factory=list)  # files of the source that are neither weights nor small


@dataclass(frozen=True)
class Step:
    """What becomes of one tensor: `form` of 8 bits, or `dtype`; neither: it stays as it is."""

    key: str
    form: str | None
    dtype: torch.dtype | None
    is_change: bool
    bytes_before: int
    bytes_after: int


def convert(
    source: Path,
    target: Path,
    to: str,
    experts_only: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    max_shard_bytes: int = 1 << 30,
) -> Report:
    """Write `source` as a checkpoint in `to` ("bfloat16", "fp8" or "int8") at `target`.

    experts_only: 8 bits for routed experts, bfloat16 for what else the source has in 8 bits. Raises ConfigError or
    CheckpointError for what cannot be read, converted or written; then nothing is left at `target`, or what was there.
    """
    source, target = source.resolve(), target.resolve()
    _check_target(source, target)
    config = _read_config(source)
    with CheckpointReader(source) as reader:
        steps = plan(reader, to, experts_only, _dtype_of(config))
        _check_space(target, sum(step.bytes_after for step in steps))
        report = Report(sum(s.bytes_before for s in steps), sum(s.bytes_after for s in steps), len(steps))
        report.changed = sum(step.is_change for step in steps)
        partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
        writer = ShardWriter(partial, max_shard_bytes)
        try:
            for done, step in enumerate(steps, 1):
                for name, tensor in _convert(reader, step, report.errors).items():
                    writer.add(name, tensor)
                progress(done, len(steps))
            config = _target_config(config, to, [s.key for s in steps if not s.form] if experts_only else [])
            writer.finish(lambda folder: _write_others(source, folder, config, report))
            replace_folder(target, partial)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{target}: could not be written ({error}); nothing is left of it, what stood there still stands"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return report


# ---------------------------------------------------------------- deciding


def plan(reader: CheckpointReader, to: str, experts_only: bool, config_dtype: torch.dtype | None) -> list[Step]:
    """A step for every tensor, in the files' order. Raises ConfigError or CheckpointError for what cannot be done."""
    if to not in TARGETS:
        raise ConfigError(f"to {to!r}: choose one of {', '.join(TARGETS)}")
    if experts_only and to == "bfloat16":
        raise ConfigError("experts-only says what to hold in 8 bits; it has no meaning for bfloat16")
    steps = [_step(reader, key, to, experts_only, config_dtype) for key in reader.keys]
    if to != "bfloat16" and not any(_ROUTED.search(step.key) for step in steps):
        raise ConfigError(
            f"{reader.folder}: no expert matrices under keys such as layers.3.mlp.experts.0.up_proj.weight; "
            f"experts of a layer in one tensor, or under other names, cannot be converted to {to}"
        )
    if not any(step.is_change for step in steps):
        raise ConfigError(f"{reader.folder}: is in {to} already; nothing to convert")
    return steps


def _step(reader: CheckpointReader, key: str, to: str, experts_only: bool, config_dtype: torch.dtype | None) -> Step:
    shape, stored, blocks = reader.shape(key), reader.stored_dtype(key), reader.blocks_of(key)
    count = math.prod(shape)
    if blocks is None and (stored.startswith("F8") or (stored == "I8" and key.endswith(".weight"))):
        raise CheckpointError(
            f"{reader.folder}: tensor {key} is {stored} without scales for 128x128 blocks; only bfloat16 and wider, "
            "FP8 blocks (e4m3) and INT8 blocks are converted"
        )
    before = count * _item_bytes(stored) + (4 * math.prod(num_blocks(shape)) if blocks else 0)
    is_wanted = _ROUTED.search(key) if experts_only else _LINEAR.search(key) or blocks
    if to != "bfloat16" and len(shape) == 2 and is_wanted:
        if _JOINED.search(key) and shape[0] % BLOCK:
            raise ConfigError(
                f"{reader.folder}: tensor {key} has {shape[0]} rows, not a multiple of {BLOCK}: its blocks do not line "
                f"up once gate and up are joined, and no rank could keep it in {to}"
            )
        return Step(key, to, None, blocks != to, before, count + 4 * math.prod(num_blocks(shape)))
    dtype = torch.bfloat16 if blocks else None
    is_narrowed = len(shape) >= 2 and not _ROUTER.search(key) and _FLOATS.get(stored) == config_dtype != torch.bfloat16
    if to == "bfloat16" and is_narrowed:
        dtype = torch.bfloat16  # what the model is in; what a checkpoint keeps in another dtype than that stays
    return Step(key, None, dtype, dtype is not None, before, count * dtype.itemsize if dtype else before)


def _item_bytes(stored: str) -> int:
    """Of one value, from safetensors' name of its dtype: BF16, F8_E4M3, I64, BOOL ..."""
    bits = re.match(r"[A-Z]+(\d+)", stored)
    return int(bits[1]) // 8 if bits else 1


def _read_config(source: Path) -> dict[str, Any]:
    path = source / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is no object")
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); give the folder of a Hugging Face checkpoint"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not a model's config ({error})") from None
    form_of_quantization(config.get("quantization_config"), path)
    return config


def _dtype_of(config: dict[str, Any]) -> torch.dtype | None:
    name = config.get("dtype") or config.get("torch_dtype")
    return next((dtype for dtype in _FLOATS.values() if str(dtype) == f"torch.{name}"), None)


def _target_config(config: dict[str, Any], to: str, plain_keys: list[str]) -> dict[str, Any]:
    """The config with the quantization_config of `to`. plain_keys: linear weights are named that `to` leaves out."""
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    if to == "bfloat16":
        return config | {name: to for name in ("dtype", "torch_dtype") if name in config}
    method = next(method for method, form in QUANT_METHODS.items() if form == to)
    quantization: dict[str, Any] = {"quant_method": method, "activation_scheme": "dynamic"}
    quantization |= {"fmt": "e4m3"} if to == "fp8" else {}
    quantization["weight_block_size"] = [BLOCK, BLOCK]
    plain = [key.removesuffix(".weight") for key in plain_keys if _LINEAR.search(key)]
    if plain:
        quantization["modules_to_not_convert"] = plain
    return config | {"quantization_config": quantization}


def _check_target(source: Path, target: Path) -> None:
    if source == target or source.is_relative_to(target):
        raise ConfigError(f"{target}: is the source, or holds it; give another folder")
    why = why_not_there(target)
    if why:
        raise ConfigError(f"{target}: {why}")


def _check_space(target: Path, needed: int) -> None:
    folder = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{target}: {needed / 2**30:.1f} GiB are needed, {free / 2**30:.1f} GiB are free there; make room, or give "
            "a folder on another disk"
        )


# ---------------------------------------------------------------- doing


def _convert(reader: CheckpointReader, step: Step, errors: Errors) -> dict[str, torch.Tensor]:
    """What is written for one tensor: under its key, and its scales beside it."""
    key = step.key
    if not step.is_change:
        tensors = {key: reader.read_raw(key)}
        return tensors | ({f"{key}_scale_inv": reader.read_scale(key)} if step.form else {})
    exact = reader.read(key, torch.float32)
    if step.form is None:
        made, scale = exact.to(step.dtype), None
    else:
        made, scale = quantize_blocks(exact, to=FORMATS[step.form])
        if not scale.isfinite().all():
            raise CheckpointError(f"{reader.folder}: tensor {key} has values that are no finite numbers")
    source, result = exact.flatten(0, -2), made.flatten(0, -2)
    for begin in range(0, len(source), _BAND):
        band = result[begin : begin + _BAND]
        if scale is None:
            values = band.float()
        else:
            values = dequantize_blocks(band, scale[begin // BLOCK : (begin + _BAND) // BLOCK], torch.float32)
        errors.add(key, source[begin : begin + _BAND], values)
    return {key: made} if scale is None else {key: made, f"{key}_scale_inv": scale}


def _largest_of_blocks(matrix: torch.Tensor) -> torch.Tensor:
    rows, columns = matrix.shape
    padded = torch.nn.functional.pad(matrix.abs(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    return padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK).amax(dim=(1, 3))


def _write_others(source: Path, folder: Path, config: dict[str, Any], report: Report) -> None:
    """config.json, and the source's other files: tokenizer, generation config, licence, code."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for path in sorted(source.iterdir()):
        if path.name == "config.json" or path.name.endswith((".safetensors", ".safetensors.index.json")):
            continue
        is_weights = path.name in PICKLES or path.suffix in (".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5")
        if path.name.startswith(".") or not path.is_file() or is_weights or path.stat().st_size > _MOST_BYTES_COPIED:
            report.left_out.append(path.name)
        else:
            shutil.copy(path, folder / path.name)

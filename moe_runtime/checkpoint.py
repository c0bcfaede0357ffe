"""Reading Hugging Face checkpoints tensor by tensor: safetensors shards by index, never pickle.

Knows files, keys, slices and the scales of weights in blocks (FP8, INT8); knows nothing of models. Reads with pread
rather than mmap, so that a rank's memory holds what it asked for and nothing else.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from .core.errors import CheckpointError
from .experts.blocks import dequantize_blocks, num_blocks

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "consolidated.00.pth")
_MOST_HEADER = 100_000_000  # bytes, by safetensors
_SCALE_SUFFIXES = ("_scale_inv", ".scale")  # V3: x.weight_scale_inv; V4: x.scale beside x.weight
# quant_method of config.json -> what experts/blocks.py calls the format.
QUANT_METHODS = {"fp8": "fp8", "blockwise_int8": "int8"}
_STORED_FORMS = {"F8_E4M3": "fp8", "I8": "int8"}


def form_of_quantization(quantization: Any, where: Path) -> str | None:
    """ "fp8", "int8" or None, from a config's quantization_config (a dict, an object of transformers, or None).

    Raises CheckpointError for any that we cannot read.
    """
    if quantization is None:
        return None
    fields = quantization if isinstance(quantization, dict) else vars(quantization)
    method, block = fields.get("quant_method"), fields.get("weight_block_size")
    method = str(getattr(method, "value", method))
    if method not in QUANT_METHODS or (block is not None and list(block) != [128, 128]):
        raise CheckpointError(
            f"{where}: quantization {method} with blocks {block} is not supported; "
            f"{' and '.join(QUANT_METHODS)} with 128x128 blocks are"
        )
    return QUANT_METHODS[method]


class CheckpointReader:
    """A checkpoint folder: its keys, and any tensor or run of rows of it.

    Opening reads every shard's header, so a missing, truncated or foreign file is found before any rank allocates.
    Raises CheckpointError naming the file and what to do. Close it, or use it as a context manager.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "config.json").is_file():
            raise CheckpointError(f"{self.folder}: no config.json here; give the folder of a Hugging Face checkpoint")
        self._file_of = self._read_index()
        self._open: dict[str, Any] = {}
        self._regions: dict[str, tuple[int, dict[str, tuple[int, int]]]] = {}  # file -> descriptor, bytes of each key
        try:
            for name in sorted(set(self._file_of.values())):
                self._open[name] = self._open_shard(name)
            self._check_keys()
        except CheckpointError:
            self.close()
            raise

    @property
    def keys(self) -> list[str]:
        """Every tensor's key, without the scales that belong to another key."""
        return [key for key in self._file_of if self._owner_of_scale(key) is None]

    def __contains__(self, key: str) -> bool:
        return key in self._file_of

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._slice(key).get_shape())

    def stored_dtype(self, key: str) -> str:
        """As safetensors calls it: "BF16", "F32", "F8_E4M3", "I8" ..."""
        return str(self._slice(key).get_dtype()).upper()

    def blocks_of(self, key: str) -> str | None:
        """ "fp8" or "int8" for a weight in blocks as experts/blocks.py has them, else None."""
        return None if self._scale_key(key) is None else _STORED_FORMS.get(self.stored_dtype(key))

    def read(self, key: str, dtype: torch.dtype, row: int | None = None) -> torch.Tensor:
        """A tensor, or entry `row` of its dimension 0, in `dtype`; weights in blocks are dequantised."""
        scale_key = self._scale_key(key)
        if scale_key is None:
            tensor = self.read_raw(key, row)
            return tensor.to(dtype) if tensor.is_floating_point() else tensor
        weight, scale = self.read_raw(key, row), self.read_raw(scale_key, row)
        try:
            return dequantize_blocks(weight, scale, dtype)
        except ValueError as error:
            raise CheckpointError(f"{self.folder / self._file_of[key]}: tensor {key}: {error}") from None

    def read_raw(self, key: str, row: int | None = None) -> torch.Tensor:
        """A tensor, or entry `row` of its dimension 0, as stored."""
        try:
            return self._slice(key)[...] if row is None else self._slice(key)[row]
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.folder / self._file_of[key]}: tensor {key} cannot be read ({error})"
            ) from error

    def read_scale(self, key: str, row: int | None = None) -> torch.Tensor:
        """The scales that belong to `key`, a weight in blocks."""
        scale_key = self._scale_key(key)
        assert scale_key is not None
        scale, needed = self.read_raw(scale_key, row).float(), num_blocks(self.shape(key))
        if tuple(scale.shape) != needed:
            raise CheckpointError(
                f"{self.folder / self._file_of[key]}: tensor {key}: scales of shape {tuple(scale.shape)}, need {needed}"
            )
        return scale

    def read_into(self, key: str, out: np.ndarray, row: int | None = None) -> None:
        """The bytes of a tensor, or of entry `row` of its dimension 0, as stored, straight to `out` (uint8 [bytes]).

        Nothing is allocated and nothing copied on the way: fresh memory costs more than what is read into it.
        """
        name = self._file_of[key]
        descriptor, regions = self._raw(name)
        begin, end = regions[key]
        if row is not None:
            each = (end - begin) // self.shape(key)[0]
            begin, end = begin + row * each, begin + (row + 1) * each
        assert out.nbytes == end - begin
        left = memoryview(out)
        while left:
            try:
                count = os.preadv(descriptor, [left], end - len(left))
            except OSError as error:
                raise CheckpointError(f"{self.folder / name}: tensor {key} cannot be read ({error})") from error
            if not count:
                raise CheckpointError(f"{self.folder / name}: tensor {key} cannot be read (the file is shorter now)")
            left = left[count:]

    def open_raw(self, key: str) -> None:
        """Do beforehand what the first `read_into` from this key's file would do."""
        self._raw(self._file_of[key])

    def _raw(self, name: str) -> tuple[int, dict[str, tuple[int, int]]]:
        """A descriptor of a shard, and where each tensor's bytes begin and end; safetensors has checked the header.

        The format: 8 bytes of the header's length, the header (JSON; `data_offsets` count from its end), the data.
        """
        if name not in self._regions:
            descriptor = os.open(self.folder / name, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            try:
                length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
                table = json.loads(os.pread(descriptor, min(length, _MOST_HEADER), 8))
                places = {key: entry["data_offsets"] for key, entry in table.items() if key != "__metadata__"}
                regions = {key: (8 + length + begin, 8 + length + end) for key, (begin, end) in places.items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError) as error:
                os.close(descriptor)
                raise CheckpointError(f"{self.folder / name}: has changed since it was opened ({error})") from error
            self._regions[name] = descriptor, regions
        return self._regions[name]

    def close(self) -> None:
        for shard in self._open.values():
            shard.__exit__(None, None, None)
        self._open.clear()
        for descriptor, _ in self._regions.values():
            os.close(descriptor)
        self._regions.clear()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_index(self) -> dict[str, str]:
        index = self.folder / INDEX
        if index.is_file():
            try:
                weight_map = dict(json.loads(index.read_text())["weight_map"])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise CheckpointError(f"{index}: not a safetensors index ({error}); fetch it again") from error
            for key, name in weight_map.items():
                if not isinstance(name, str) or Path(name).name != name:
                    raise CheckpointError(
                        f"{index}: tensor {key} is in {name!r}, which is not the name of a file here; fetch it again"
                    )
            return weight_map
        if (self.folder / SINGLE).is_file():
            with self._open_shard(SINGLE) as shard:
                return dict.fromkeys(shard.keys(), SINGLE)
        pickles = [name for name in PICKLES if (self.folder / name).exists()]
        if pickles:
            raise CheckpointError(
                f"{self.folder}: only a pickle checkpoint here ({pickles[0]}), which can run code when it is read; "
                "convert it to safetensors first (load and save_pretrained with transformers, on data you trust)"
            )
        raise CheckpointError(f"{self.folder}: neither {INDEX} nor {SINGLE} here; the weights are missing")

    def _open_shard(self, name: str) -> Any:
        path = self.folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: this shard is named in {INDEX} but is missing; fetch it again")
        try:
            return safe_open(path, framework="pt", device="cpu", backend="pread")
        except TypeError:  # safetensors before 0.7 has no choice of backend and maps the file
            return safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({error}); fetch it again") from error

    def _check_keys(self) -> None:
        held = {name: set(shard.keys()) for name, shard in self._open.items()}
        for key, name in self._file_of.items():
            if key not in held[name]:
                raise CheckpointError(
                    f"{self.folder / name}: tensor {key} is named in {INDEX} but is not in this shard"
                )

    def _slice(self, key: str) -> Any:
        return self._open[self._file_of[key]].get_slice(key)

    def _scale_key(self, key: str) -> str | None:
        candidates = (key + _SCALE_SUFFIXES[0], key.removesuffix(".weight") + _SCALE_SUFFIXES[1])
        return next((c for c in candidates if c != key and c in self._file_of and self._has_scale(key, c)), None)

    def _owner_of_scale(self, key: str) -> str | None:
        owners = (key.removesuffix(_SCALE_SUFFIXES[0]), key.removesuffix(_SCALE_SUFFIXES[1]) + ".weight")
        return next((o for o in owners if o != key and o in self._file_of and self._has_scale(o, key)), None)

    def _has_scale(self, key: str, scale_key: str) -> bool:
        stored = self.stored_dtype(key)
        # Not int8 with `.scale`: so DeepSeek-V4 stores two FP4 values in a byte.
        return stored.startswith("F8") or (stored == "I8" and scale_key.endswith(_SCALE_SUFFIXES[0]))

"""Arrays of token ids that other tools wrote: .npy, and raw .bin as nanoGPT, llm.c and Megatron write them.

Mapped, never loaded, never unpickled.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ...core.errors import ConfigError
from ...core.files import BROKEN_ARRAY

CHUNK = 1 << 22  # tokens looked at together
# llm.c, dev/data/data_common.py: a header of 256 int32, of which the first is one of these and the third counts tokens.
_LLM_C = {20240520: "<u2", 20240801: "<u4"}
_LLM_C_HEADER = 1024
# Megatron-LM, core/datasets/indexed_dataset.py: NAME.idx beside NAME.bin starts so, then version and type of the ids.
_MEGATRON, _MEGATRON_HEADER = b"MMIDIDX\x00\x00", struct.Struct("<9sQB")
_MEGATRON_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def map_tokens(path: Path) -> np.ndarray:
    """The ids of a .npy or .bin file, memory-mapped read-only: [N] of some integer type.

    A .bin file is uint16 without a header (nanoGPT), unless it has llm.c's header or Megatron's .idx file beside it.
    Raises ConfigError for anything else, and for a file that cannot be read or is empty.
    """
    try:
        return _map_npy(path) if path.suffix == ".npy" else _map_bin(path)
    except OSError as error:
        raise ConfigError(f"data: {path}: cannot read the tokens ({error.strerror or error})") from None


def _map_npy(path: Path) -> np.ndarray:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except BROKEN_ARRAY as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise ConfigError(f"data: {path}: no array that numpy can map ({reason}); write it with numpy.save") from None
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not len(tokens):
        is_ = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, np.ndarray) else "an archive of arrays"
        raise ConfigError(f"data: {path} is {is_}; token ids must be a non-empty integer array of one dimension")
    return tokens


def _map_bin(path: Path) -> np.ndarray:
    size = path.stat().st_size
    index = path.with_suffix(".idx")
    if index.is_file():
        dtype, begin = _megatron_type(index), 0
    else:
        dtype, begin = _llm_c_type(path)
    width = np.dtype(dtype).itemsize
    if size <= begin or (size - begin) % width:
        raise ConfigError(
            f"data: {path}: {size - begin} bytes are no whole number of {width}-byte token ids; "
            "a .bin file holds raw uint16 ids, else save an array of another type as .npy"
        )
    return np.memmap(path, dtype=dtype, mode="r", offset=begin)


def _megatron_type(index: Path) -> str:
    with index.open("rb") as file:
        header = file.read(_MEGATRON_HEADER.size)
    if len(header) == _MEGATRON_HEADER.size:
        magic, version, code = _MEGATRON_HEADER.unpack(header)
        if magic == _MEGATRON and version == 1 and code in _MEGATRON_TYPES:
            return _MEGATRON_TYPES[code]
    raise ConfigError(f"data: {index} is no index of token ids that Megatron writes (version 1)")


def _llm_c_type(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        header = np.frombuffer(file.read(_LLM_C_HEADER), np.uint8)
    if len(header) < _LLM_C_HEADER or (dtype := _LLM_C.get(int(header.view("<i4")[0]))) is None:
        return "<u2", 0
    return dtype, _LLM_C_HEADER


def chunks(tokens: np.ndarray, where: Path) -> Iterator[np.ndarray]:
    """All ids in order, at most CHUNK at a time. Raises ConfigError for a negative one."""
    for begin in range(0, len(tokens), CHUNK):
        chunk = tokens[begin : begin + CHUNK]
        if chunk.dtype.kind == "i" and chunk.min() < 0:
            position = int(np.argmax(chunk < 0))
            raise ConfigError(f"data: {where}: token {begin + position} is {chunk[position]}; no id can be negative")
        yield chunk

"""The one importer of msgpack: small messages between ranks as bytes, never pickle.

Messages are maps, lists, strings, numbers and None. What arrives is bounded and has no code in it.
"""

from __future__ import annotations

from typing import Any

import msgpack
import torch

from .transport import Transport

MAX_MESSAGE_BYTES = 1 << 30


def pack(message: Any) -> bytes:
    """A message of msgpack types as bytes."""
    return msgpack.packb(message)


def unpack(data: bytes) -> Any:
    """The message in these bytes. Raises ValueError for anything that is not one, or is too large."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {len(data)} bytes is larger than the limit of {MAX_MESSAGE_BYTES}")
    return msgpack.unpackb(data, strict_map_key=False)  # msgpack bounds every part by the length of the whole


def first_problem(transport: Transport, mine: str, phase: str) -> str:
    """What the first rank with a problem says of it, or "" where none has any; the same on every rank."""
    return next((told for told in all_gather_message(transport, mine, phase) if told), "")


def all_gather_message(transport: Transport, message: Any, phase: str) -> list[Any]:
    """Every rank's message (msgpack types), on every rank, in rank order."""
    payload = torch.frombuffer(bytearray(pack(message)), dtype=torch.uint8)
    sizes = transport.all_gather(torch.tensor([payload.numel()], dtype=torch.int64), f"{phase} (sizes)").view(-1)
    longest = int(sizes.max())
    if longest > MAX_MESSAGE_BYTES:
        raise ValueError(f"{phase}: a message of {longest} bytes is larger than the limit of {MAX_MESSAGE_BYTES}")
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: payload.numel()] = payload
    gathered = transport.all_gather(padded, phase)
    return [unpack(gathered[rank, : int(size)].numpy().tobytes()) for rank, size in enumerate(sizes.tolist())]

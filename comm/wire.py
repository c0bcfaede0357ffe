"""Small messages (messages.py) between all ranks, over any transport."""

from __future__ import annotations

from typing import Any

import torch

from .messages import MAX_MESSAGE_BYTES, pack, unpack
from .transport import Transport


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

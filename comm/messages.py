"""The one importer of msgpack and zmq: small messages as bytes, never pickle, and the sockets that carry them.

Messages are maps, lists, strings, numbers and None. What arrives is bounded and has no code in it. Nothing here needs
torch: a launcher's agents speak with it too.
"""

from __future__ import annotations

from typing import Any

import msgpack
import zmq

MAX_MESSAGE_BYTES = 1 << 30


def pack(message: Any) -> bytes:
    """A message of msgpack types as bytes."""
    return msgpack.packb(message)


def unpack(data: bytes) -> Any:
    """The message in these bytes. Raises ValueError for anything that is not one, or is too large."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {len(data)} bytes is larger than the limit of {MAX_MESSAGE_BYTES}")
    try:
        return msgpack.unpackb(data, strict_map_key=False)  # msgpack bounds every part by the length of the whole
    except TypeError as error:  # a map or a list as a key
        raise ValueError(f"not a message ({error})") from None


def open_socket(context: zmq.Context, kind: int, identity: bytes | None = None) -> zmq.Socket:
    """A socket that drops nothing while it lives, and lets a process end within a second."""
    socket = context.socket(kind)
    socket.linger = 1000
    socket.sndhwm = socket.rcvhwm = 0  # operations bound what is in flight; a silent drop would be worse
    if identity is not None:
        socket.identity = identity
    return socket

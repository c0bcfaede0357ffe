"""The one importer of msgpack and zmq: small messages as bytes, never pickle, and the sockets that carry them.

Messages are maps, lists, strings, numbers and None. What arrives is bounded and has no code in it. Nothing here needs
torch: a launcher's agents speak with it too.
"""

from __future__ import annotations

from typing import Any

import msgpack
import zmq

MAX_MESSAGE_BYTES = 1 << 30
MAX_ITEMS = 1 << 24
MAX_DEPTH = 32


def pack(message: Any) -> bytes:
    """A message of msgpack types as bytes."""
    return msgpack.packb(message)


def unpack(data: bytes, most: int = MAX_MESSAGE_BYTES, items: int = MAX_ITEMS, depth: int = MAX_DEPTH) -> Any:
    """The message in these bytes. Raises ValueError for anything that is not one, or is too large.

    most: bytes. items: of all its maps and lists together. depth: of maps and lists in each other.
    """
    if len(data) > most:
        raise ValueError(f"a message of {len(data)} bytes is larger than the limit of {most}")
    try:
        if len(data) > 1024:  # of short ones the lists that are promised and do not come take little
            _check_whole(data)
        message = msgpack.unpackb(data, strict_map_key=False, max_array_len=items, max_map_len=items)
    except (TypeError, msgpack.UnpackException) as error:  # TypeError: a map or a list as a key
        raise ValueError(f"not a message ({type(error).__name__} {error})") from None
    _check_shape(message, items, depth)
    return message


def _check_whole(data: bytes) -> None:
    """msgpack makes room for a list when it reads its length, for each one inside another: walk through first."""
    walker = msgpack.Unpacker(max_buffer_size=len(data), strict_map_key=False)
    walker.feed(data)
    walker.skip()


def _check_shape(message: Any, items: int, depth: int) -> None:
    count, level, inside = 0, [message], 0
    while level := [part for part in level if isinstance(part, (dict, list))]:
        inside, count = inside + 1, count + sum(map(len, level))
        if inside > depth or count > items:
            what = f"nested more than {depth} deep" if inside > depth else f"of more than {items} items"
            raise ValueError(f"a message {what}")
        level = [part for each in level for part in (each.values() if isinstance(each, dict) else each)]


def open_socket(context: zmq.Context, kind: int, identity: bytes | None = None) -> zmq.Socket:
    """A socket that drops nothing while it lives, and lets a process end within a second."""
    socket = context.socket(kind)
    socket.linger = 1000
    socket.sndhwm = socket.rcvhwm = 0  # operations bound what is in flight; a silent drop would be worse
    if identity is not None:
        socket.identity = identity
    return socket

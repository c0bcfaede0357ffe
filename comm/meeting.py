"""How the ranks of one host find each other: a socket between each two, and every rank's window mapped in all.

The sockets' abstract names are unguessable, and both ends check that the other belongs to the same user.
"""

from __future__ import annotations

import mmap
import os
import secrets
import select
import socket
import struct
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..core.errors import ConfigError, PeerLost, PeerTimeout
from .frames import extension
from .transport import SLICE_S, Interruption
from .window import Layout

_PROTOCOL = 2
_HELLO = struct.Struct("=qqqq")  # protocol, rank, window bytes, whether frames can travel in shared memory
_CREDENTIALS = struct.Struct("=iii")  # pid, uid, gid: Linux's struct ucred


@dataclass
class Peer:
    """What ranks tell each other when they meet."""

    connection: socket.socket
    pid: int
    window: mmap.mmap
    has_rings: bool


def meet(
    store: Any, rank: int, size: int, deadline_s: float, window: int, layout: Layout, interruption: Interruption
) -> dict[int, Peer]:
    """A socket to every other rank, and a mapping of its window; higher ranks call lower ones."""
    until = time.monotonic() + deadline_s
    missing = set(range(size)) - {rank}
    peers: dict[int, Peer] = {}
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            name = f"moe-runtime-{secrets.token_hex(16)}"
            listener.bind(f"\0{name}")
            listener.listen(size)
            store.set(f"shm/{rank}", name)
            for peer in range(rank):
                store.wait([f"shm/{peer}"], timedelta(seconds=max(until - time.monotonic(), 0.001)))
                _greet(_call(store.get(f"shm/{peer}"), peer, until), rank, window, layout, until, peers, interruption)
                missing -= peers.keys()
            while missing:
                _await(listener, rank, until, interruption)
                connection, _ = listener.accept()
                _greet(connection, rank, window, layout, until, peers, interruption)
                missing -= peers.keys()
        return peers
    except BaseException as error:
        for one in peers.values():
            one.connection.close()
        if isinstance(error, (TimeoutError, dist.DistStoreError)):
            raise PeerTimeout(
                f"rank {rank}, phase rendezvous: ranks {sorted(missing)} did not come within {deadline_s:g} s over "
                f"shm ({error})",
                waiting_rank=rank,
                ranks=tuple(sorted(missing)),
                phase="rendezvous",
            ) from error
        if isinstance(error, ConnectionError):
            raise PeerLost(
                f"rank {rank}, phase rendezvous: one of ranks {sorted(missing)} left while meeting ({error})",
                rank=None,
                phase="rendezvous",
            ) from error
        raise


def _await(one: socket.socket, rank: int, until: float, interruption: Interruption) -> None:
    """Until somebody calls, or answers."""
    while not select.select([one], [], [], SLICE_S)[0]:
        interruption.check(rank, "rendezvous")
        if time.monotonic() > until:
            raise TimeoutError("timed out")


def _greet(
    connection: socket.socket,
    rank: int,
    window: int,
    layout: Layout,
    until: float,
    peers: dict[int, Peer],
    interruption: Interruption,
) -> None:
    """Swap ranks and windows over a fresh connection, and add the peer; a stranger's connection is closed."""
    pid, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if uid != os.geteuid():
        connection.close()
        return
    try:
        _set_timeout(connection, until)
        hello = _HELLO.pack(_PROTOCOL, rank, layout.window_bytes, extension() is not None)
        socket.send_fds(connection, [hello], [window])
        _await(connection, rank, until, interruption)
        answer, descriptors, _, _ = socket.recv_fds(connection, _HELLO.size, 1)
        try:
            if len(answer) != _HELLO.size or len(descriptors) != 1:
                raise ConnectionError("it sent no window")
            protocol, peer, window_bytes, has_rings = _HELLO.unpack(answer)
            if protocol != _PROTOCOL:
                raise ConfigError(
                    f"rank {peer} has another version of moe-runtime: protocol {protocol}, not {_PROTOCOL}"
                )
            if window_bytes != layout.window_bytes:
                raise ConfigError(
                    f"rank {peer} has windows of {window_bytes} bytes, rank {rank} of {layout.window_bytes}"
                )
            theirs = mmap.mmap(descriptors[0], window_bytes)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        connection.setblocking(False)
    except BaseException:
        connection.close()
        raise
    peers[peer] = Peer(connection, pid, theirs, bool(has_rings))


def _call(name: bytes | str, peer: int, until: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    _set_timeout(connection, until)
    try:
        connection.connect(f"\0{name.decode() if isinstance(name, bytes) else name}")
    except ConnectionRefusedError as error:
        connection.close()
        raise ConfigError(
            f"rank {peer} cannot be reached through this host: shared memory joins ranks of one host and one network "
            "namespace only; use another transport between hosts"
        ) from error
    return connection


def _set_timeout(connection: socket.socket, until: float) -> None:
    connection.settimeout(max(until - time.monotonic(), 0.001))

"""The default torch.distributed group of this process: a store on a chosen address, gloo where it is told to be.

Used for a whole world and for the ranks of one island alike.
"""

from __future__ import annotations

import socket

import torch.distributed as dist

from ..core import environment
from ..core.errors import ConfigError, PeerTimeout
from .transport import deadline


def join_group(
    address: str, port: int, listener: socket.socket | None, rank: int, size: int, timeout_s: float, name: str
) -> None:
    """Initialise torch.distributed among `size` ranks that meet at address:port, where the one with `listener` serves.

    name: a prefix for the store's keys. Raises PeerTimeout when not all have come within `timeout_s`.
    """
    if environment.is_loopback(address):
        environment.keep_gloo_on_loopback()
    try:
        store = open_store(address, port, listener, size, timeout_s)
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(name, store),
            rank=rank,
            world_size=size,
            timeout=deadline(timeout_s),
        )
    except (dist.DistStoreError, dist.DistNetworkError, TimeoutError) as error:
        raise PeerTimeout(
            f"rank {rank}, phase rendezvous: not all of {size} ranks met at {address}:{port} "
            f"within {timeout_s:g} s ({error})",
            waiting_rank=rank,
            ranks=tuple(other for other in range(size) if other != rank),
            phase="rendezvous",
        ) from error


def open_store(address: str, port: int, listener: socket.socket | None, size: int, timeout_s: float) -> dist.TCPStore:
    """torch's key-value store at address:port, served by the rank that has `listener`."""
    return dist.TCPStore(
        address,
        port,
        size,
        is_master=listener is not None,
        timeout=deadline(timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach() if listener is not None else None,
    )


def listen(address: str, port: int) -> socket.socket:
    """A listening socket on exactly this address. torch's own TCPStore would listen on every interface."""
    try:
        family, _, _, _, sockaddr = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(sockaddr)
        listener.listen(1024)
        return listener
    except OSError as error:
        raise ConfigError(
            f"rank 0 cannot listen at {address}:{port} ({error.strerror or error}); "
            "give another --master-port, or check that --master-addr is an address of this machine"
        ) from error

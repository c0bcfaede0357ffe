"""The one importer of mpi4py. So far MPI only starts ranks and lets them agree on where to meet."""

from __future__ import annotations

import socket

import numpy as np

from ..core.errors import ConfigError, VendorUnavailable


def agree_on_endpoint(rank: int, one_machine: bool) -> tuple[str, int, socket.socket | None]:
    """Rank 0 opens a listening socket and tells every rank of MPI.COMM_WORLD its address and port.

    On one machine the socket is on loopback; across machines on the address this host's name resolves to.
    Returns (address, port, rank 0's listening socket or None).
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise VendorUnavailable(
            f"started by mpirun, but mpi4py cannot load an MPI library ({error}); "
            "install moe-runtime[mpi] or put your MPI's libmpi on the library path"
        ) from error
    message = np.zeros(256, dtype=np.uint8)
    listener = None
    if rank == 0:
        address = "127.0.0.1" if one_machine else socket.gethostbyname(socket.gethostname())
        if not one_machine and address.startswith("127."):
            raise ConfigError(
                f"this host's name resolves to {address}, which other nodes cannot reach; "
                "set MASTER_ADDR and MASTER_PORT for all ranks (mpirun -x MASTER_ADDR=... -x MASTER_PORT=...)"
            )
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.bind((address, 0))
        listener.listen(1024)
        text = f"{address} {listener.getsockname()[1]}".encode()
        message[: len(text)] = np.frombuffer(text, dtype=np.uint8)
    MPI.COMM_WORLD.Bcast(message, root=0)
    address, port = bytes(message).rstrip(b"\0").decode().split()
    return address, int(port), listener

"""How ranks meet: from what the launcher said to a transport that reaches every rank.

Ranks that share one vendor's library and one torch meet in one torch.distributed group; all others meet on the bridge
first and form their islands there. Stores listen on the address the launcher named and on nothing else.
"""

from __future__ import annotations

import hashlib
import hmac
import importlib
import os
import socket
from typing import Any

import torch.distributed as dist

from ..core import environment
from ..core.errors import ConfigError, PeerTimeout, VendorUnavailable
from . import bridge, mpi
from .greeting import disagreement
from .group import join_group, listen, open_store
from .hostbridge import HostBridge
from .islands import join_islands, over_group
from .native import NativeTransport
from .place import ON_CPU, Place
from .shm import SharedMemoryTransport
from .staging import StagedTransport
from .transport import LocalTransport, Transport, deadline
from .wire import all_gather_message


def connect(
    world: environment.WorldEnvironment,
    timeout_s: float,
    kind: str = "auto",
    about: dict[str, Any] | None = None,
    place: Place = ON_CPU,
    bridge_kind: str = "zeromq",
    encrypt: bool = False,
) -> Transport:
    """The transport of this rank's world. Every rank calls it; it returns when all have come.

    kind: "gloo", "shm", "mpi", "zeromq", "islands", or "auto": shared memory where all ranks are CPUs of one machine,
    else one torch.distributed group over the vendor's library (gloo where that is a CPU). about: what must be equal on
    all ranks that meet over ZeroMQ (versions, hashes); torch.distributed has no such check, and the dispatcher's own
    comes later. place: where this rank computes.
    bridge_kind: between islands, "zeromq", or "gloo" or "mpi" where all nodes have the same, or "flagcx".
    encrypt: rows over ZeroMQ. Ranks prove the job's secret where the environment has one.

    If the caller has initialised torch.distributed already, its default group is used and left open on close.
    Raises PeerTimeout when some rank has not come within `timeout_s`, ConfigError when the address cannot be used.
    """
    one_machine = world.local_size == world.size
    if kind == "auto" and one_machine and can_share_memory(place):
        kind = "shm"
    if (kind == "zeromq" or (kind == "islands" and bridge_kind == "zeromq")) and world.size > 1:
        secret, point = environment.job_secret(), _meeting_point(world, timeout_s)
        joined = bridge.meet(
            world.rank, world.size, *point, timeout_s, about or {}, secret=_of_attempt(secret, world), encrypt=encrypt
        )
        return joined if kind == "zeromq" else join_islands(joined, place, timeout_s)
    if encrypt and kind != "shm" and world.size > 1:
        raise ConfigError('bridge_encryption = "on": nothing would encrypt these rows; use transport "zeromq"')
    if kind == "islands" and world.size > 1:
        host = world.master_addr or ("127.0.0.1" if one_machine else socket.gethostbyname(socket.gethostname()))
        over = connect(world, timeout_s, "gloo" if bridge_kind == "flagcx" else bridge_kind)
        _compare(over, about or {})
        direct = _flagcx(over, place, timeout_s) if bridge_kind == "flagcx" else None
        return join_islands(HostBridge(over, host, direct), place, timeout_s)
    if kind == "mpi" and world.size > 1:
        if world.launcher != "mpi":
            raise ConfigError("transport mpi: MPI has not started these ranks; start them with mpirun")
        return _staged(mpi.connect(timeout_s), place)
    if kind == "shm" and world.size > 1:
        if not one_machine:
            raise ConfigError(f"transport shm is for one machine; here are {world.local_size} of {world.size} ranks")
        store = _store(world, timeout_s)
        shared = SharedMemoryTransport(store, world.rank, world.size, timeout_s)
        shared.barrier("rendezvous")  # rank 0 serves the store: it must not let go before all have read from it
        return _staged(shared, place)
    if dist.is_initialized():
        if dist.get_world_size() != world.size:
            raise ConfigError(
                f"torch.distributed is initialised with {dist.get_world_size()} ranks, the launcher said {world.size}"
            )
        group = dist.new_group(backend="gloo", timeout=deadline(timeout_s))
        return _over_group(place, timeout_s, kind, group)
    if world.size == 1:
        return LocalTransport(timeout_s)
    address, port, listener = _endpoint(world)
    join_group(address, port, listener, world.rank, world.size, timeout_s, f"moe_runtime_{world.attempt}")
    return _over_group(place, timeout_s, kind)


def can_share_memory(place: Place) -> bool:
    """Whether CPU ranks of one machine had better use shm; a group that the caller has made already is used."""
    if place.device.type != "cpu" or dist.is_initialized() or not hasattr(os, "memfd_create"):
        return False
    try:
        os.close(os.memfd_create("moe-runtime"))
    except OSError:  # a sandbox that allows no anonymous memory: the same on all ranks of the machine
        return False
    return True


def _over_group(place: Place, timeout_s: float, kind: str, group: Any = None) -> Transport:
    if kind == "gloo":
        return _staged(over_group(ON_CPU, timeout_s, group), place)
    return over_group(place, timeout_s, group)


def _flagcx(host: Any, place: Place, timeout_s: float) -> Transport:
    """All ranks' devices over FlagCX's torch plug-in, which registers the backend "flagcx".

    Source: FlagCX's own examples (plugin/torch): import flagcx, backend "flagcx" for the device type.
    """
    try:
        importlib.import_module("flagcx")
    except ImportError as error:
        raise VendorUnavailable(
            f'bridge = "flagcx": FlagCX\'s torch plug-in is not here ({error}); build it on every node, or use zeromq'
        ) from None
    if place.device.type == "cpu":
        raise VendorUnavailable('bridge = "flagcx" joins devices; this rank computes on its CPU: use zeromq')
    group = dist.new_group(backend="flagcx", timeout=deadline(timeout_s))
    # The same row on every rank: rows are bytes here, and no vendor's own limits apply.
    return NativeTransport(group, host, ON_CPU.vendor, emulated=False, library="FlagCX")


def _compare(transport: Transport, about: dict[str, Any]) -> None:
    """Raise ConfigError, on every rank, when `about` is not the same on all."""
    problem = disagreement(dict(enumerate(all_gather_message(transport, about, "rendezvous (versions)"))))
    if problem:
        raise ConfigError(problem)


def _staged(host: Transport, place: Place) -> Transport:
    return host if place.device.type == "cpu" else StagedTransport(host)


def _store(world: environment.WorldEnvironment, timeout_s: float) -> dist.Store:
    address, port, listener = _endpoint(world)
    try:
        store = open_store(address, port, listener, world.size, timeout_s)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise _no_store(world, address, port, timeout_s) from error
    return dist.PrefixStore(f"moe_runtime_shm_{world.attempt}", store)


def _of_attempt(secret: bytes | None, world: environment.WorldEnvironment) -> bytes | None:
    """Each start of the ranks has keys of its own, also where the secret is the user's and stays the same."""
    return secret and hmac.digest(secret, f"attempt {world.attempt}".encode(), hashlib.sha256)


def _meeting_point(world: environment.WorldEnvironment, timeout_s: float) -> tuple[str, int]:
    """Where rank 0 is to listen for the bridge: the launcher's address, at a port that nobody else serves."""
    if not world.agent_store:
        address, port, listener = _endpoint(world)
        if listener is not None:  # the bridge binds it anew, at once
            listener.close()
        return address, port
    assert world.master_addr is not None and world.master_port is not None  # read_world has seen to it
    # A store of the launcher's listens there: rank 0 takes another port and says in the store which.
    agents = open_store(world.master_addr, world.master_port, None, world.size, timeout_s)
    store = dist.PrefixStore(f"moe_runtime_bridge_{world.attempt}", agents)
    try:
        if world.rank == 0:
            with listen(world.master_addr, 0) as probe:
                store.set("port", str(probe.getsockname()[1]))
        return world.master_addr, int(store.get("port"))
    except dist.DistStoreError as error:
        raise PeerTimeout(
            f"rank {world.rank}, phase rendezvous: rank 0 did not say in the launcher's store at {world.master_addr}:"
            f"{world.master_port} where it listens, within {timeout_s:g} s",
            waiting_rank=world.rank,
            ranks=(0,),
            phase="rendezvous",
        ) from error


def _no_store(world: environment.WorldEnvironment, address: str, port: int, timeout_s: float) -> PeerTimeout:
    return PeerTimeout(
        f"rank {world.rank}, phase rendezvous: rank 0 did not open the store at {address}:{port} within "
        f"{timeout_s:g} s; is it stuck, or not started?",
        waiting_rank=world.rank,
        ranks=(0,),
        phase="rendezvous",
    )


def _endpoint(world: environment.WorldEnvironment) -> tuple[str, int, socket.socket | None]:
    """Where the ranks meet, and rank 0's listening socket where no launcher's agent serves there already."""
    if world.launcher == "mpi" and world.master_addr is None:
        return mpi.agree_on_endpoint(world.rank, world.local_size == world.size)
    if world.master_addr is None or world.master_port is None:
        raise ConfigError("no MASTER_ADDR and MASTER_PORT: start with moe-launch, torchrun or mpirun")
    serves = world.rank == 0 and not world.agent_store
    return world.master_addr, world.master_port, listen(world.master_addr, world.master_port) if serves else None

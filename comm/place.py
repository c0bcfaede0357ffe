"""Where this rank computes: a real device of a vendor, an emulated one, or the CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..core.cluster import Cluster
from ..core.config import RuntimeConfig
from ..core.environment import WorldEnvironment
from ..core.errors import ConfigError, VendorUnavailable
from .detect import Detection, detect
from .vendors import VENDORS, Vendor

EMULATED = " (emulated)"


@dataclass(frozen=True)
class Place:
    """Where a rank computes. kind: what it shares with its island: vendor, whether emulated, where it reaches."""

    kind: str
    device: torch.device
    vendor: Vendor
    backend: str  # name for torch.distributed

    @property
    def emulated(self) -> bool:
        return EMULATED in self.kind


ON_CPU = Place("cpu", torch.device("cpu"), VENDORS["cpu"], "gloo")


def vendor_of(kind: str) -> Vendor:
    """The vendor whose library the ranks of an island speak, or emulate. Kinds begin with it."""
    return VENDORS[kind.split()[0]]


def find_place(
    device: str = "auto",
    vendor: str = "auto",
    emulate: str | None = None,
    index: int = 0,
    island: str | None = None,
    deadline_s: float = 300.0,
) -> tuple[Place, list[str]]:
    """The place of this rank, and what should be said about it.

    device: "auto" (what detection finds), "cpu", or a torch device type that must be there. vendor: a row of the vendor
    table, or "auto". emulate: a row whose device and library are emulated, in host memory. index: of this rank among
    those of its node. island: what further divides ranks of one vendor, where their library does not reach.

    Raises VendorUnavailable for a device or vendor that is not here, ConfigError for a name that is no row.
    """
    within = f" {island}" if island else ""
    if emulate is not None and device in ("auto", "cpu") and emulate != "cpu":
        # Compiles C++ on first use: only where it is asked for.
        from .emulation.collectives import backend_name
        from .emulation.device import emulate as start_emulation

        here = start_emulation(emulate, deadline_s)
        row = VENDORS[emulate]
        return Place(f"{emulate}{EMULATED}{within}", here, row, backend_name(row)), [
            f"{row.title} is emulated: its device is host memory, its {row.collective_library.value} is gloo "
            "under the documented limits"
        ]
    if "cpu" in (device, vendor) or emulate == "cpu":
        return replace(ON_CPU, kind=f"cpu{within}"), []
    found = detect(vendor)
    notes = list(found.notes)
    if device not in ("auto", found.device_type):
        raise VendorUnavailable(
            f"device {device!r} is not here; detection found {found.vendor} ({found.evidence}); "
            f'set device = "auto" or "{found.device_type}"'
        )
    if found.vendor == "cpu" or not found.usable:
        if not found.usable:
            notes.append(
                f"{found.vendor} was found but cannot be used ({found.evidence}): this rank computes on its CPU"
            )
        return replace(ON_CPU, kind=f"cpu{within}"), notes
    if found.vendor != "nvidia":
        notes.append(f"nobody has run moe-runtime on a real chip of {found.vendor} yet; `moe-launch check` tells more")
    return Place(found.vendor + within, _use_device(found, index), VENDORS[found.vendor], _backend(found)), notes


def _use_device(found: Detection, index: int) -> torch.device:
    namespace = getattr(torch, found.device_type)
    device = torch.device(found.device_type, index % max(1, namespace.device_count()))
    namespace.set_device(device)
    return device


def _backend(found: Detection) -> str:
    """The vendor's name for torch.distributed; among several readings, the first that this torch knows."""
    names = VENDORS[found.vendor].backend.values
    known = [name for name in names if torch.distributed.is_backend_available(name)]
    return known[0] if known else names[0]


def place_of_rank(config: RuntimeConfig, cluster: Cluster | None, world: WorldEnvironment) -> tuple[Place, list[str]]:
    """find_place of the rank that this process is, as settings and cluster file have it."""
    if cluster is None:
        return find_place(config.device, index=world.local_rank, deadline_s=config.timeout_s)
    node = cluster.rank_nodes()[world.rank if world.like is None else world.like]
    index = cluster.index_in_node(world.rank) if world.like is None else world.local_rank
    try:
        return find_place(config.device, node.vendor, node.emulate, index, node.island, config.timeout_s)
    except (ConfigError, VendorUnavailable) as error:
        named = not node.emulate and node.vendor != "auto"
        advice = f'; to have CPU ranks emulate one, set emulate = "{node.vendor}"' if named else ""
        raise type(error)(f"node {node.name}: {error}{advice}") from error


def may_differ(cluster: Cluster | None) -> bool:
    """Whether ranks may be of several islands: as the cluster file says, or as hosts may find out for themselves."""
    if cluster is None:
        return False
    labels = {(node.emulate, node.vendor, node.island) for node in cluster.nodes}
    detected_apart = len({node.host for node in cluster.nodes if node.vendor == "auto" and not node.emulate}) > 1
    return len(labels) > 1 or detected_apart

"""What a node says of itself before a job starts, and what in the answers of all would hang or corrupt it.

`look` reads this host and imports neither torch nor a vendor's plug-in; `verdicts` is pure. Devices are counted by a
process of their own (devices.py), and whether nodes reach each other is tried (reach.py).
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import math
import platform
import socket
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..core.cluster import Node
from ..core.errors import CheckpointError
from .machine import free_gib

_SIOCGIFADDR = 0x8915  # linux/sockios.h
_PACKAGES = ("torch", "transformers")
_MAX_HEADER = 100_000_000  # bytes, as the safetensors library has it
_WHOLE_FILE = 16 << 20  # larger files are compared by size


def look(address: str, interface: str | None, vendor: str, devices: int, files: Sequence[str]) -> dict[str, Any]:
    """The facts of this node. address: this host's own on the network of the job; files: what every node must have."""
    return {
        "host": socket.gethostname(),
        "address": address,
        "interface": interface or interface_of(address) or "",
        "vendor": vendor,
        "devices": devices,
        "free_gib": free_gib(),
        "python": platform.python_version(),
        "moe_runtime": __version__,
        **{package: _version(package) for package in _PACKAGES},
        "files": {path: digest(path) for path in files},
    }


# What `look` and the agent say of a node, by type; an agent of another version may not.
_FACTS: dict[str, tuple[type, ...]] = {
    "host": (str,), "address": (str,), "interface": (str,), "vendor": (str,), "devices": (int,), "door": (int,),
    "free_gib": (float, int, type(None)), "python": (str,), "moe_runtime": (str,), "torch": (str,), "command": (str,),
    "files": (dict,), "found": (dict,),
}  # fmt: skip


def malformed(names: Sequence[str], facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Nodes whose facts are not what this version takes, one line each."""
    lines = []
    for name, mine in zip(names, facts, strict=True):
        wrong = next((key for key, kinds in _FACTS.items() if type(mine.get(key)) not in kinds), None)
        if wrong is None and not all(isinstance(value, str) for value in mine["files"].values()):
            wrong = "files"
        if wrong is not None:
            lines.append(f"{name}: said nothing usable of its {wrong}; install the same moe-runtime on all nodes")
    return lines


def introduce(name: str, facts: Mapping[str, Any]) -> str:
    """A node's facts in one line."""
    found = facts["found"]
    line = (
        f"{name}: {facts['address']} ({facts['interface'] or 'no interface found'}), moe-runtime "
        f"{facts['moe_runtime']}, torch {facts['torch']}, {facts['free_gib']} GiB free"
    )
    if found.get("count"):
        driver = f", driver {found['driver']}" if found["driver"] else ""
        line += f", {found['vendor']}: {found['count']} x {found['device']}{driver}"
    return line


def verdicts(names: Sequence[str], facts: Sequence[Mapping[str, Any]], commands: Sequence[str] = ()) -> list[str]:
    """What is wrong, one line each, with the node and the cure; [] where the job can start."""
    first, problems = facts[0], []
    for name, mine in zip(names, facts, strict=True):
        where = f"{name} (host {mine['host']})"
        if not mine["torch"]:
            problems.append(f"{where}: torch is not installed for its python; install it, or set `python` of the node")
        if mine["moe_runtime"] != first["moe_runtime"]:
            problems.append(
                f"{where}: moe-runtime {mine['moe_runtime']}, but {names[0]} has {first['moe_runtime']}; install the "
                "same version on both"
            )
        if mine.get("command") != first.get("command"):
            problems.append(f"{where}: was started with another command than {names[0]}; start the same on all nodes")
        for path, seen in mine["files"].items():
            there = first["files"].get(path)
            if seen.startswith("!"):
                problems.append(f"{where}: {path}: {seen[1:]}; copy it there, or use a shared folder")
            elif there and not there.startswith("!") and seen != there:
                problems.append(f"{where}: {path} differs from that of {names[0]}; copy the same file to both")
    return problems


def tight(
    nodes: Sequence[Node], facts: Sequence[Mapping[str, Any]], speeds: Sequence[float], checkpoint: tuple[int, int, int]
) -> list[str]:
    """Nodes that cannot hold what their ranks would, one line each.

    speeds: of each rank; experts are shared out by them. checkpoint: bytes of experts and of all else as stored, and of
    experts in 8 bits, for nodes whose expert_dtype says so. This is the least that is needed: rows, caches and wider
    dtypes come on top. A CPU node is held to the host's free
    memory, and every node to its memory_gib where the cluster file gives it.
    """
    stored, dense, in_8_bits = checkpoint
    problems, rank = [], 0
    for node, mine in zip(nodes, facts, strict=True):
        share = sum(speeds[rank : rank + node.devices]) / sum(speeds)
        rank += node.devices
        experts = in_8_bits if node.expert_dtype in ("fp8", "int8") else stored
        need = (dense * node.devices + experts * share) / (1 << 30)
        limits = [node.memory_gib * node.devices] if node.memory_gib is not None else []
        if mine["vendor"] == "cpu" and mine["free_gib"] is not None:
            limits.append(mine["free_gib"])
        if limits and need > min(limits):
            problems.append(
                f"{node.name} (host {mine['host']}): its ranks need at least {need:.2g} GiB for their share of the "
                f"model, {min(limits):.2g} GiB are there; give it a lower speed or fewer devices, or the others more, "
                'or hold its experts in 8 bits (expert_dtype = "int8")'
            )
    return problems


def checkpoint_bytes(folder: str) -> tuple[int, int, int] | None:
    """Bytes of routed experts, of all else, and of the experts were they in 8 bits, in a folder's safetensors, from
    their headers; None where it has none. Raises CheckpointError for a header that is none.
    """
    experts = other = values = 0
    files = sorted(Path(folder).glob("*.safetensors")) if Path(folder).is_dir() else []
    for file in files:
        for name, tensor in _header(file).items():
            try:
                first, last = tensor["data_offsets"]
                size, count = int(last) - int(first), math.prod(int(extent) for extent in tensor["shape"])
            except (TypeError, ValueError, KeyError, OverflowError) as error:
                raise CheckpointError(f"{file}: tensor {name!r:.80} has no sizes ({error!r}); fetch it again") from None
            if ".experts." in name:
                experts, values = experts + size, values + count
            else:
                other += size
    return (experts, other, values) if files else None


def _header(file: Path) -> dict[str, Any]:
    """The tensors of a safetensors file by name. Its form: eight bytes of length, then JSON of at most 100 MB."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            found = json.loads(opened.read(length)) if length <= _MAX_HEADER else None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not a safetensors file ({str(error)[:80]}); fetch it again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: not a safetensors file; fetch it again")
    return {name: tensor for name, tensor in found.items() if name != "__metadata__"}


def text_digest(text: str) -> str:
    """What tells whether two nodes mean the same."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest(path: str) -> str:
    """What tells whether two nodes have the same file or folder; "!" and the reason where it cannot be read."""
    found = Path(path)
    seen = hashlib.sha256()
    try:
        for file in sorted(found.iterdir()) if found.is_dir() else [found]:
            if file.is_dir():
                continue
            size = file.stat().st_size
            seen.update(f"{file.name if found.is_dir() else ''} {size} ".encode())
            with file.open("rb") as opened:
                seen.update(opened.read() if size <= _WHOLE_FILE else opened.read(1 << 16))
    except OSError as error:
        return f"!cannot be read ({error.strerror})"
    return seen.hexdigest()[:16]


def interface_of(address: str) -> str | None:
    """The network interface that has this IPv4 address."""
    return next((name for _, name in socket.if_nameindex() if address_of(name) == address), None)


def address_of(interface: str) -> str | None:
    """The IPv4 address of a network interface, None where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])


def is_here(host: str) -> bool:
    """Whether a host name or address stands for this machine."""
    if host in (socket.gethostname(), socket.gethostname().split(".")[0]):
        return True
    try:
        address = socket.gethostbyname(host)
    except OSError:
        return False
    return address.startswith("127.") or interface_of(address) is not None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""

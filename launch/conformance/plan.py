"""Before anything is started: which vendor is to be checked, on its own device or emulated, and with which ranks."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from typing import Any

import torch

import moe_runtime

from ...comm.detect import Detection, detect
from ...comm.emulation import build
from ...comm.quirks import presized_variables
from ...comm.vendors import VENDORS, Vendor
from ...core import environment
from ...core.cluster import load_cluster
from ...core.errors import ConfigError, VendorUnavailable
from .report import EMULATION, UNREPORTED
from .verdicts import FAILED, Row

_RANKS = 2  # so that collectives mean something


@dataclass(frozen=True)
class Plan:
    """vendor: a row's name, or the user's cluster file. cluster: text of the file to write, None for the user's own."""

    vendor: str
    title: str
    emulated: bool
    evidence: str
    num_ranks: int
    cluster: str | None = None
    vendor_named: bool = False
    notes: tuple[str, ...] = ()
    rows: tuple[Row, ...] = field(default=())  # what is known before a rank starts

    def header(self) -> dict[str, Any]:
        return ({"users_cluster": self.vendor} if self.cluster is None else {}) | {
            "vendor": self.vendor,
            "title": self.title,
            "emulated": self.emulated,
            "evidence": self.evidence,
            "num_ranks": self.num_ranks,
            "notes": list(self.notes),
            "launcher": {
                "moe_runtime": moe_runtime.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }


def plan_vendor(name: str, ranks: int | None) -> Plan:
    """A check of one vendor. Raises ConfigError for a name that is no row, or more ranks than devices."""
    try:
        found = detect(name)
    except VendorUnavailable as error:
        why = (
            str(error).partition(" (")[0].partition("; install")[0].replace(f"vendor {name!r} was named, but it", name)
        )
        return _emulated(VENDORS[name], f"{why}; emulated on host memory", ranks or _RANKS)
    return _on_device(found, name != "auto", ranks)


def _emulated(vendor: Vendor, evidence: str, ranks: int) -> Plan:
    notes = [UNREPORTED, EMULATION]
    # What the library's buffer is sized with has to be there before the ranks start.
    sized = (
        {} if environment.presized_all_to_all_bytes() is not None else presized_variables(vendor.quirks, 4096, 4, 4096)
    )
    settings = [("emulate", _quoted(vendor.name)), ("devices", str(ranks))]
    cluster = _cluster_file(settings, sized)
    return Plan(vendor.name, _title(vendor), True, evidence, ranks, cluster, True, tuple(notes))


def _on_device(found: Detection, named: bool, ranks: int | None) -> Plan:
    notes, rows = list(found.notes), []
    vendor = VENDORS[found.vendor]
    if not found.usable:
        notes.append(f"{vendor.title} was found ({found.evidence}); the ranks compute on the CPU")
        rows.append(
            Row(
                "device", "torch reaches the device", found.vendor, found.device_type, "", "", found.evidence, FAILED,
                False,
            )
        )  # fmt: skip
        vendor = VENDORS["cpu"]
    devices = None if vendor.name == "cpu" else getattr(torch, found.device_type).device_count()
    if devices is not None and (ranks or 0) > devices:
        raise ConfigError(
            f"--nproc-per-node {ranks}: there are {devices} {found.device_type} devices here; ask for at most as many"
        )
    if vendor.name != "cpu":
        notes.append(UNREPORTED)
    count = ranks or min(_RANKS, devices or _RANKS)
    if count == 1:
        notes.append("one rank: what takes two is skipped")
    sized = {}
    if environment.presized_all_to_all_bytes() is None:
        sized = presized_variables(vendor.quirks, 4096, count, 4096)
    cluster = _cluster_file([("vendor", _quoted(vendor.name)), ("devices", str(count))], sized)
    return Plan(vendor.name, _title(vendor), False, found.evidence, count, cluster, named, tuple(notes), tuple(rows))


def plan_cluster(file: str) -> Plan:
    """A preflight of the user's own cluster file."""
    cluster = load_cluster(file)
    emulated = list(dict.fromkeys(node.emulate for node in cluster.nodes if node.emulate not in (None, "cpu")))
    notes = [EMULATION] if emulated else []
    names = ", ".join(node.name for node in cluster.nodes)
    return Plan(file, f"cluster {file}", bool(emulated), f"nodes {names}", cluster.num_ranks, notes=tuple(notes))


def prepare(plan: Plan) -> None:
    """Compile the emulated device now, where ranks will need it: no deadline of theirs includes the compiler."""
    if plan.emulated:
        build.device_library()


def _title(vendor: Vendor) -> str:
    return f"{vendor.name}: {vendor.title}"


def _cluster_file(settings: list[tuple[str, str]], env: dict[str, str]) -> str:
    lines = [
        "# Written by moe-launch check.",
        "[[node]]",
        'name = "check"',
        *(f"{key} = {text}" for key, text in settings),
    ]
    if env:
        lines.append("env = { " + ", ".join(f"{key} = {_quoted(text)}" for key, text in env.items()) + " }")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return f'"{text}"'

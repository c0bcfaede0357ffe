"""How many devices a host has, as its ranks will see them: `python -m moe_runtime.launch.devices VENDOR`, in JSON.

That is a process of its own: it imports torch and the vendor's plug-in with the node's interpreter and environment,
which the node's agent does not. `seen` starts it, on hosts where something speaks for a device.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..comm.vendors import VENDORS
from ..core.cluster import Node
from ..core.environment import inherited

_PATIENCE_S = 60.0
_DRIVER_VERSIONS = "/sys/module"  # a loaded driver's version, where it gives one: Documentation/ABI/stable/sysfs-module


def has_evidence(node: Node) -> bool:
    """Whether a look can find anything: a vendor is named, or a vendor's tool is on the search path."""
    if node.emulate or node.vendor == "cpu":
        return False
    tools = (row.command_line_tool.value for row in VENDORS.values())
    return node.vendor != "auto" or any(isinstance(tool, str) and shutil.which(tool) for tool in tools)


def seen(node: Node, variables: Mapping[str, str]) -> dict[str, Any]:
    """{"vendor", "count", "device", "driver"} of this host, {"problem": ...}, or {} where nothing speaks for any."""
    if not has_evidence(node):
        return {}
    command = [node.python or sys.executable, "-m", "moe_runtime.launch.devices", node.vendor]
    settings = {"env": inherited(variables), "capture_output": True, "text": True, "timeout": _PATIENCE_S}
    try:
        ran = subprocess.run(command, **settings)
    except subprocess.TimeoutExpired:
        return {"problem": f"looking for its devices took more than {_PATIENCE_S:g} s; is its driver well?"}
    except OSError as error:
        return {"problem": f"looking for its devices failed ({error})"}
    if ran.returncode:
        return {"problem": f"looking for its devices failed ({(ran.stderr.splitlines() or ['no message'])[-1]})"}
    return json.loads(ran.stdout)


def look(vendor: str) -> dict[str, Any]:
    """What torch and the vendor's plug-in see in this process."""
    import torch

    from ..comm.detect import detect
    from ..core.errors import VendorUnavailable

    try:
        found = detect(vendor)
    except VendorUnavailable as error:
        return {"problem": str(error)}
    if found.device_type == "cpu":
        return {"vendor": "cpu", "count": 0, "device": "", "driver": ""}
    module = getattr(torch, found.device_type)
    count = int(module.device_count())
    name = str(module.get_device_name(0)) if count else ""
    return {"vendor": found.vendor, "count": count, "device": name, "driver": driver_version(found.vendor)}


def driver_version(vendor: str, root: str = _DRIVER_VERSIONS) -> str:
    """Of the vendor's kernel module, where one of that name is loaded and says its version; else ""."""
    modules = {"amd": "amdgpu"}.get(vendor, vendor)
    path = Path(root) / modules / "version"
    return path.read_text().strip() if path.is_file() else ""


def problems(node: Node, host: str, found: Mapping[str, Any]) -> list[str]:
    """Where the cluster file and the host disagree."""
    where = f"{node.name} (host {host})"
    if not found:
        return []
    if "problem" in found:
        return [f"{where}: {found['problem']}"]
    if node.vendor not in ("auto", found["vendor"]):
        return [f"{where}: vendor {node.vendor} was named, {found['vendor']} is there; correct the cluster file"]
    if found["vendor"] != "cpu" and found["count"] < node.devices:
        return [
            f"{where}: {node.devices} devices are asked for, {found['count']} are there ({found['device'] or 'none'}); "
            "correct `devices`, or look at visible_devices and the driver"
        ]
    return []


def main() -> int:
    answer, sys.stdout = os.dup(1), sys.stderr  # plug-ins print on stdout
    os.dup2(2, 1)
    os.write(answer, json.dumps(look(sys.argv[1])).encode() + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How much memory is free, for who may not import torch, too."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def free_host_bytes() -> int | None:
    """MemAvailable of /proc/meminfo, see proc_meminfo(5): what new processes can have; None where there is no such."""
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.is_file() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def free_bytes(device: torch.device) -> int | None:
    """For new tensors: of the host, or what mem_get_info of torch's module for this device says; None: nobody knows."""
    if device.type == "cpu":
        return free_host_bytes()
    import torch

    query = getattr(getattr(torch, device.type, None), "mem_get_info", None)
    return None if query is None else int(query(device)[0])

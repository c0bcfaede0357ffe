"""`torch.<type>` of an emulated vendor: the functions that torch and its users look for in a device's module.

Owns names and answers only; the device itself is in device.cpp. Streams are real objects without any concurrency:
work on the emulated device is done when the call returns.
"""

from __future__ import annotations

import contextlib
import os
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ...core.free_memory import free_host_bytes
from ..vendors import Vendor

_native = torch.ops.moe_emulated


class Properties(NamedTuple):
    """What get_device_properties tells of an emulated device."""

    name: str
    total_memory: int


class Copies(NamedTuple):
    """Copies between host and device that were asked for; those of the emulation itself are not counted."""

    to_device: int
    bytes_to_device: int
    to_host: int
    bytes_to_host: int


def device_name(vendor: Vendor) -> str:
    return f"{vendor.title} emulated on host memory"


def host_memory() -> tuple[int, int]:
    """Available and total bytes of host memory, which is the emulated device's."""
    page = os.sysconf("SC_PAGE_SIZE")
    available = free_host_bytes()  # with what Linux would give up of its cache
    if available is None:
        available = os.sysconf("SC_AVPHYS_PAGES") * page
    return available, os.sysconf("SC_PHYS_PAGES") * page


class DeviceContext:
    """`with torch.<type>.device(0):`, which checks the index and changes nothing: there is one device."""

    def __init__(self, device: Any) -> None:
        check_device(device)

    def __enter__(self) -> DeviceContext:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def check_device(device: Any) -> None:
    """Raise RuntimeError for a device other than the one there is: None, 0, -1, "npu", "npu:0", torch.device."""
    index = device if device is None or isinstance(device, int) else torch.device(device).index
    if index not in (None, 0, -1):
        raise RuntimeError(f"the emulated device has index 0, there is no index {index}")


def build(vendor: Vendor, device_type: str) -> types.ModuleType:
    """The module to register as torch.<device_type>."""
    module = types.ModuleType(f"torch.{device_type}", f"{device_name(vendor)}; see moe_runtime.comm.emulation.")
    module.__dict__.update(_device(vendor, device_type), **_memory(vendor), **_streams(device_type), **_random())
    # The row's own name for the memory query; both of the names in use are there for every vendor.
    query = vendor.memory_query.value
    if vendor.memory_query.is_known and not hasattr(module, query):
        setattr(module, query, module.mem_get_info)
    return module


def _device(vendor: Vendor, device_type: str) -> dict[str, Any]:
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_is_in_bad_fork": lambda: False,
        "device": DeviceContext,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": check_device,
        "synchronize": _synchronize,
        "get_device_name": lambda device=None: device_name(vendor),
        "is_bf16_supported": lambda including_emulation=True: vendor.bf16.value != "no",
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
    }


def _synchronize(device: Any = None) -> None:
    check_device(device)


def _memory(vendor: Vendor) -> dict[str, Any]:
    return {
        "mem_get_info": lambda device=None: host_memory(),
        "get_device_properties": lambda device=None: Properties(device_name(vendor), host_memory()[1]),
        "memory_allocated": lambda device=None: _native.allocated_bytes(),
        "memory_reserved": lambda device=None: _native.allocated_bytes(),
        "max_memory_allocated": lambda device=None: _native.peak_bytes(),
        "max_memory_reserved": lambda device=None: _native.peak_bytes(),
        "reset_peak_memory_stats": lambda device=None: _native.reset_peak_bytes(),
        "empty_cache": lambda: None,
        "copies": lambda: Copies(*_native.copies()),
    }


def _streams(device_type: str) -> dict[str, Any]:
    def stream(device: Any = None, priority: int = 0) -> torch.Stream:
        return torch.Stream(device=_normal(device, device_type), priority=priority)

    def event(enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> torch.Event:
        return torch.Event(device_type, enable_timing=enable_timing, blocking=blocking, interprocess=interprocess)

    @contextlib.contextmanager
    def on_stream(stream: torch.Stream | None) -> Iterator[None]:
        with stream if stream is not None else contextlib.nullcontext():
            yield

    return {
        "Stream": stream,
        "Event": event,
        "stream": on_stream,
        "current_stream": lambda device=None: torch.accelerator.current_stream(),
        "set_stream": torch.accelerator.set_stream,
    }


def _normal(device: Any, device_type: str) -> torch.device:
    check_device(device)
    return torch.device(device_type, 0)


def _random() -> dict[str, Any]:
    # Random numbers come from the CPU's default generator, which torch.manual_seed seeds as well.
    host = torch.default_generator

    def set_state(state: torch.Tensor, device: Any = None) -> None:
        host.set_state(state.cpu())

    def set_states(states: list[torch.Tensor]) -> None:
        host.set_state(states[0].cpu())

    return {
        "manual_seed": host.manual_seed,
        "manual_seed_all": host.manual_seed,
        "seed": host.seed,
        "seed_all": host.seed,
        "initial_seed": host.initial_seed,
        "get_rng_state": lambda device=None: host.get_state(),
        "get_rng_state_all": lambda: [host.get_state()],
        "set_rng_state": set_state,
        "set_rng_state_all": set_states,
    }

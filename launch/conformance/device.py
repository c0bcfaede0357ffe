"""What the device and its plug-in are and can hold, as torch shows them; every cast is compared with the CPU's."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

import moe_runtime

from ...comm import formats, staging
from ...comm.detect import detect
from ...comm.quirks import dtype_name
from ...core import environment
from ...core.errors import VendorUnavailable
from ..machine import processor_name
from .claims import show
from .context import Context, first_difference, mates, same_bits
from .verdicts import MEASURED, REFUSED, SKIPPED, WORKS, WRONG, Outcome

_TYPES_OF_TORCH = ("cuda", "xpu")  # names that an emulated device cannot take
GIB = float(1 << 30)


def detection(context: Context) -> Outcome:
    """Whether detection by itself finds the vendor that this rank runs on."""
    if context.place.emulated:
        return Outcome(SKIPPED, "the vendor is emulated, there is nothing to detect")
    found = detect()
    if found.vendor != context.place.vendor.name and context.vendor_named and not context.on_chip:
        return Outcome(SKIPPED, f"the CPU was named; detection finds {found.vendor} ({found.evidence})")
    return Outcome(found.vendor, f"{found.vendor}: {found.evidence}")


def plugin(context: Context) -> Outcome:
    if context.place.emulated:
        return Outcome(SKIPPED, "the plug-in is emulated")
    stated = context.place.vendor.plugin_modules.value
    for name in stated:
        if name in sys.modules:
            return Outcome(name, f"{name} {getattr(sys.modules[name], '__version__', 'of unknown version')}")
    return Outcome("not loaded", f"{show(stated)}: not loaded") if stated else Outcome("none needed")


def autoload(context: Context) -> Outcome:
    """Whether `import torch` alone loads the plug-in."""
    if context.place.emulated:
        return Outcome(SKIPPED, "the plug-in is emulated")
    modules = context.place.vendor.plugin_modules.value
    if not modules:
        return Outcome("built in")
    return Outcome("yes" if any(name in context.loaded_with_torch for name in modules) else "no")


def device_type(context: Context) -> Outcome:
    if context.place.emulated and context.place.vendor.device_type.value in _TYPES_OF_TORCH:
        return Outcome(SKIPPED, f"torch has such a device itself; emulated as {context.device.type!r}")
    return Outcome(context.device.type)


def namespace(context: Context) -> Outcome:
    name = f"torch.{context.device.type}"
    if context.place.emulated and context.place.vendor.device_type.value in _TYPES_OF_TORCH:
        return Outcome(SKIPPED, f"torch has such a module itself; emulated as {name}")
    missing = [n for n in ("is_available", "device_count", "synchronize") if not hasattr(context.namespace, n)]
    return Outcome("incomplete", f"{name} without {', '.join(missing)}") if missing else Outcome(name)


def name_and_count(context: Context) -> Outcome:
    count = getattr(context.namespace, "device_count", lambda: 1)()
    return Outcome(MEASURED, f"{count} x {device_name(context)}")


def device_name(context: Context) -> str:
    named = getattr(context.namespace, "get_device_name", None)
    return str(named()) if named else processor_name() if context.device.type == "cpu" else "no name"


def memory(context: Context) -> Outcome:
    """The vendor's own function where the table names one, else what torch's plug-ins usually have."""
    if context.device.type == "cpu":
        return Outcome(SKIPPED, "torch.cpu does not report memory")
    name, total, free = total_memory(context)
    said = f"{total / GIB:.1f} GiB" if free is None else f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    return Outcome(name, f"{name}: {said}")


def total_memory(context: Context) -> tuple[str, int, int | None]:
    """(the function that answered, total bytes, free bytes or None) of this rank's device."""
    stated = context.place.vendor.memory_query
    for name in dict.fromkeys([*(stated.values if stated.is_known else ()), "mem_get_info", "get_device_properties"]):
        function = getattr(context.namespace, name, None)
        if function is not None:
            answer = function(context.device)
            if hasattr(answer, "total_memory"):
                return name, answer.total_memory, None
            free, total = answer
            return name, total, free
    raise RuntimeError(f"torch.{context.device.type} has neither mem_get_info nor get_device_properties")


_COUNT_DEVICES = """
import importlib, sys, torch
for module in sys.argv[2:]:
    try:
        importlib.import_module(module)
    except ImportError:
        pass
print("devices", getattr(torch, sys.argv[1]).device_count())
"""


def visible_devices(context: Context) -> Outcome:
    """The first documented variable that hides devices from a fresh process."""
    if not context.on_chip:
        return Outcome(SKIPPED, f"{'an emulated device' if context.place.emulated else 'a CPU'} is not hidden by one")
    if context.runtime.rank != mates(context)[0]:
        return Outcome(SKIPPED, "the first rank of the vendor tries it")
    if context.namespace.device_count() < 2:
        return Outcome(SKIPPED, "with one device there is nothing to hide")
    vendor = context.place.vendor
    stated = vendor.visible_devices
    variables = [name for value in stated.values for name in value] if stated.is_known else []
    for variable in dict.fromkeys(variables):
        if _devices_with({variable: "0"}, context, vendor.plugin_modules.value) == 1:
            return Outcome(variable, f"{variable}=0 leaves one device")
    return Outcome("none", f"none of {show(variables)} hides a device")


def _devices_with(variables: dict[str, str], context: Context, modules: tuple[str, ...]) -> int:
    """How many devices a fresh process counts with these environment variables; -1 where it gives no answer."""
    try:
        said = subprocess.run(
            [sys.executable, "-c", _COUNT_DEVICES, context.device.type, *modules],
            env=environment.inherited(variables),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=context.deadline_s / 4,  # no vendor has more than three such variables
        ).stdout
    except subprocess.TimeoutExpired:
        return -1
    counts = [line.split()[1] for line in said.splitlines() if line.startswith("devices ")]
    return int(counts[0]) if counts else -1


def pinned(context: Context) -> Outcome:
    if context.device.type == "cpu":
        return Outcome(SKIPPED, "a CPU's memory is the host's")
    can = staging.can_pin(context.device.type)
    return Outcome(MEASURED, "yes" if can else "no: copies are from pageable memory")


# ---------------------------------------------------------------- dtypes


def casts(dtype: torch.dtype) -> Callable[[Context], Outcome]:
    """Stores values and casts them there and back; what lies beyond the dtype's range is told and not judged."""

    def run(context: Context) -> Outcome:
        values, beyond = cast_values(dtype)
        for source, given, to in (("", values, dtype), (" and back", values.to(dtype), torch.float32)):
            on_device = given.to(context.device).to(to)
            if not same_bits(on_device.cpu(), given.to(to)):
                said = first_difference(on_device.cpu(), given.to(to))
                return Outcome(WRONG, f"cast{source} unlike the CPU: {said}")
        seen = f"{len(values)} values cast as on the CPU"
        if len(beyond) and not same_bits(beyond.to(context.device).to(dtype).cpu(), beyond.to(dtype)):
            seen += "; inf, nan and values beyond its range are not"
        return Outcome(WORKS, seen)

    return run


def cast_values(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 CPU (values within the dtype's range, ties and subnormal numbers among them; values beyond it)."""
    if not dtype.is_floating_point:
        return torch.arange(-128, 128).float(), torch.empty(0)
    limits = torch.finfo(dtype)
    largest, least = float(limits.max), float(limits.tiny)
    normal = torch.randn(256, generator=torch.Generator().manual_seed(0))
    values = torch.cat([normal, normal * 16, torch.linspace(-4, 4, 129), torch.zeros(1), torch.tensor([largest])])
    if least > 2 * torch.finfo(torch.float32).tiny:  # else its subnormal numbers are float32's own
        values = torch.cat([values, torch.linspace(-least, least, 65)])
    return values.clamp(-largest, largest), torch.tensor([float("inf"), float("-inf"), float("nan"), 2.5e38])


def float64(context: Context) -> Outcome:
    values = 1 + torch.arange(8, dtype=torch.float64) * 2.0**-40
    try:
        doubled = (values.to(context.device) * 2).cpu()
    except (RuntimeError, TypeError) as error:
        return Outcome(REFUSED, f"refused ({first_line(error)})")
    if same_bits(doubled, values * 2):
        return Outcome(WORKS, "stored and multiplied as on the CPU")
    return Outcome(WRONG, f"narrowed: {first_difference(doubled, values * 2)}")


def wire_format(name: str) -> Callable[[Context], Outcome]:
    """Packs and unpacks rows on the device, bit for bit as on the CPU."""

    def run(context: Context) -> Outcome:
        form = formats.FORMATS[name]
        rows = torch.randn(5, 300, generator=torch.Generator().manual_seed(1)) * 3
        packed = formats.encode(rows.to(context.device), form)
        expected = formats.encode(rows, form)
        decoded = formats.decode(*packed, form, torch.float32)
        pairs = [("payload", packed[0], expected[0]), ("rows", decoded, formats.decode(*expected, form, torch.float32))]
        if packed[1] is not None and expected[1] is not None:
            pairs.insert(0, ("scales", packed[1], expected[1]))
        for what, got, wanted in pairs:
            if not same_bits(got.cpu(), wanted):
                return Outcome(WRONG, f"{what} unlike the CPU's: {first_difference(got.cpu(), wanted)}")
        return Outcome(WORKS, f"{rows.shape[0]} rows packed and unpacked as on the CPU")

    return run


WIRE_FORMATS = tuple(name for name, form in formats.FORMATS.items() if form.scaled)
CAST_DTYPES = tuple(
    getattr(torch, name) for name in ("bfloat16", "float16", "float8_e4m3fn", "float8_e4m3fnuz", "int8")
)


def first_line(error: BaseException) -> str:
    """The first line of what a library says, at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 200 else lines[0][:197] + "..."


def about(context: Context) -> dict[str, Any]:
    """This rank in a report's header (msgpack types)."""
    try:
        held = memory(context)
        memory_said = held.seen if held.result != SKIPPED else _host_memory()
    except (RuntimeError, ValueError, TypeError, AttributeError, VendorUnavailable) as error:
        memory_said = f"unknown ({first_line(error)})"
    return {
        "rank": context.runtime.rank,
        "host": socket.gethostname(),
        "place": context.place.kind,
        "emulated": context.place.emulated,
        "device": str(context.device),
        "device_name": device_name(context),
        "memory": memory_said,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "moe_runtime": moe_runtime.__version__,
    }


def _host_memory() -> str:
    page = os.sysconf("SC_PAGE_SIZE")
    free, total = (os.sysconf(name) * page / GIB for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"))
    return f"host: {free:.1f} of {total:.1f} GiB free"


def dtype_label(dtype: torch.dtype) -> str:
    return f"{dtype_name(dtype)} stored and cast"

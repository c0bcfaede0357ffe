"""Which vendor's device this process drives, and which evidence says so.

Five vendors ship a torch whose device type is "cuda", and several plug-ins rewrite torch.cuda when they load, so the
order of the questions decides: what the user names, plug-ins, builds of torch that pass for cuda, command-line tools,
and last the CPU. Pure given its inputs: torch, the importer, the search path and the environment are all arguments.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..core import environment
from ..core.errors import ConfigError, VendorUnavailable
from .vendors import VENDORS


@dataclass(frozen=True)
class Detection:
    """What `detect` found.

    vendor: a row of VENDORS. device_type: its torch.device type. evidence: what decided, in words.
    candidates: every vendor that some evidence speaks for, the chosen one first where one was chosen.
    usable: False where only a command-line tool was found and this torch reaches no such device.
    notes: what looked like a vendor but was passed over, such as a plug-in that is installed but fails to load.
    """

    vendor: str
    evidence: str
    device_type: str
    candidates: tuple[str, ...]
    usable: bool = True
    notes: tuple[str, ...] = ()


# Vendors with a device type of their own, in the order they are asked. Intel's needs no plug-in and comes last.
PLUGIN_ORDER = ("ascend", "moore_threads", "enflame", "cambricon", "biren", "intel")

# The order FlagCX asks the tools in: nvidia-smi last, since others' images carry one too. xpu-smi is Kunlunxin's or
# Intel's, so it is no part of this order: it names candidates and decides nothing.
TOOL_ORDER = ("iluvatar", "cambricon", "metax", "hygon", "moore_threads", "ascend", "enflame", "amd", "nvidia")
AMBIGUOUS_TOOL = "xpu-smi"

# gfx906 is missing on purpose: AMD and Hygon (Z100) share it.
HYGON_ARCHITECTURES = frozenset({"gfx926", "gfx928", "gfx936", "gfx938", "gfx946", "gfx92a"})


@dataclass
class _Machine:
    """The inputs of one detection, and the notes it takes."""

    torch: Any
    which: Callable[[str], str | None]
    import_module: Callable[[str], Any]
    env: Mapping[str, str]
    notes: list[str] = field(default_factory=list)

    def load(self, module: str) -> bool:
        """Whether `module` could be imported. One that is there but fails to load leaves a note."""
        try:
            self.import_module(module)
        except ModuleNotFoundError as error:
            if error.name not in (None, module):
                self.notes.append(f"{module} is installed but needs {error.name}, which is not")
            return False
        except (ImportError, OSError, RuntimeError) as error:
            self.notes.append(f"{module} is installed but does not load: {error}")
            return False
        return True

    def has_device(self, device_type: str) -> bool:
        namespace = getattr(self.torch, device_type, None)
        try:
            return bool(namespace is not None and namespace.is_available())
        except (AttributeError, RuntimeError, OSError) as error:
            self.notes.append(f"torch.{device_type}.is_available() failed: {error}")
            return False

    def cuda_name(self) -> str:
        return str(self.torch.cuda.get_device_name(0))

    def cuda_architecture(self) -> str:
        """gcnArchName without its features, such as "gfx936" of "gfx936:sramecc+:xnack-"; "" where there is none."""
        return str(getattr(self.torch.cuda.get_device_properties(0), "gcnArchName", "")).split(":")[0]

    @property
    def is_hip(self) -> bool:
        return getattr(getattr(self.torch, "version", None), "hip", None) is not None

    @property
    def version(self) -> str:
        return str(getattr(self.torch, "__version__", ""))


def detect(
    override: str | None = None,
    torch_module: Any = None,
    which: Callable[[str], str | None] = shutil.which,
    import_module: Callable[[str], Any] = importlib.import_module,
    env: Mapping[str, str] | None = None,
) -> Detection:
    """The vendor of this machine; `override` (a row's name, or None or "auto") comes before all evidence.

    Raises ConfigError for an override that is no row, VendorUnavailable for one whose device is not here.
    """
    if torch_module is None:
        import torch as torch_module
    machine = _Machine(torch_module, which, import_module, environment.vendor_marks() if env is None else env)
    if override not in (None, "auto"):
        return _named(machine, str(override))
    return _from_plugins(machine) or _from_cuda(machine) or _from_tools(machine) or _cpu(machine)


def _named(machine: _Machine, name: str) -> Detection:
    if name not in VENDORS:
        raise ConfigError(f"vendor {name!r} is no row of the vendor table; rows: auto, {', '.join(VENDORS)}")
    if name == "cpu":
        return _found(machine, name, "named by the user")
    vendor, device_type = VENDORS[name], VENDORS[name].device_type.value
    for module in vendor.plugin_modules.value:
        if machine.load(module) and machine.has_device(device_type):
            return _found(machine, name, f"named by the user; {module} and torch.{device_type} are there")
    # torch itself may bring the device, or have loaded the plug-in through its entry point.
    if machine.has_device(device_type):
        return _found(machine, name, f"named by the user; torch.{device_type} is there")
    modules = " or ".join(vendor.plugin_modules.value) or f"a torch built for {vendor.title}"
    notes = f" ({'; '.join(machine.notes)})" if machine.notes else ""
    raise VendorUnavailable(
        f"vendor {name!r} was named, but it is not here: looked for {modules} and for "
        f"torch.{device_type}.is_available() in torch {machine.version}{notes}; "
        "install the vendor's software in this environment, or leave the vendor at 'auto'"
    )


def _from_plugins(machine: _Machine) -> Detection | None:
    for name in PLUGIN_ORDER:
        device_type = VENDORS[name].device_type.value
        # Biren's torch_br serves where torch_supa is not installed; a vendor without plug-in asks torch itself.
        loaded = next((module for module in VENDORS[name].plugin_modules.value if machine.load(module)), None)
        if machine.has_device(device_type):
            said = f"{loaded} was imported and " if loaded else ""
            return _found(machine, name, f"{said}torch.{device_type}.is_available()")
        if loaded:
            machine.notes.append(f"{loaded} was imported, but torch.{device_type} has no device")
    return None


def _corex(machine: _Machine) -> str:
    if hasattr(machine.torch, "corex"):
        return "torch.corex"
    return "+corex in torch.__version__" if "+corex" in machine.version else ""


def _metax(machine: _Machine) -> str:
    if "+metax" in machine.version:
        return "+metax in torch.__version__"
    if machine.env.get("MACA_PATH"):
        return "MACA_PATH is set"
    name = machine.cuda_name()
    return f"device name {name!r}" if "MetaX" in name or "MXC" in name else ""


def _kunlunxin(machine: _Machine) -> str:
    return "torch_xmlir was imported" if machine.load("torch_xmlir") else ""


def _hygon(machine: _Machine) -> str:
    if hasattr(machine.torch, "__hcu_version__"):
        return "torch.__hcu_version__"
    if not machine.is_hip:
        return ""
    architecture, name = machine.cuda_architecture(), machine.cuda_name()
    if architecture in HYGON_ARCHITECTURES:
        return f"torch.version.hip is set and gcnArchName is {architecture}"
    if name.startswith(("BW", "K100")) or any(mark in name.lower() for mark in ("hygon", "hcu")):
        return f"torch.version.hip is set and the device name is {name!r}"
    return ""


def _amd(machine: _Machine) -> str:
    return "torch.version.hip is set, without a mark of Hygon" if machine.is_hip else ""


def _nvidia(machine: _Machine) -> str:
    name = machine.cuda_name()
    return f"device name {name!r}" if "NVIDIA" in name else ""


CUDA_ORDER: tuple[tuple[str, Callable[[_Machine], str]], ...] = (
    ("iluvatar", _corex),
    ("metax", _metax),
    ("kunlunxin", _kunlunxin),
    ("hygon", _hygon),
    ("amd", _amd),
    ("nvidia", _nvidia),
)


def _from_cuda(machine: _Machine) -> Detection | None:
    """The first of the vendors whose torch passes for cuda; NVIDIA is one of them and comes last."""
    if not machine.has_device("cuda"):
        return None
    for name, mark in CUDA_ORDER:
        evidence = mark(machine)
        if evidence:
            # NVIDIA's device under another vendor's mark (a forgotten MACA_PATH) is a contradiction worth telling.
            contradicted = name != "nvidia" and "NVIDIA" in machine.cuda_name()
            if contradicted:
                machine.notes.append(
                    f"the device calls itself {machine.cuda_name()!r}; name the vendor if this is wrong"
                )
            return _found(machine, name, f"torch.cuda and {evidence}", ("nvidia",) if contradicted else ())
    machine.notes.append(
        f"torch.cuda has a device {machine.cuda_name()!r} that no rule knows; name the vendor to use it"
    )
    return None


def _from_tools(machine: _Machine) -> Detection | None:
    """A tool proves that the vendor's driver is installed, and not that this torch can use the device."""
    found = [name for name in TOOL_ORDER if machine.which(VENDORS[name].command_line_tool.value)]
    ambiguous = ("kunlunxin", "intel") if machine.which(AMBIGUOUS_TOOL) else ()
    if ambiguous:
        machine.notes.append(f"{AMBIGUOUS_TOOL} is Kunlunxin's or Intel's; name the vendor to use it")
    if not found:
        return Detection("cpu", _CPU_EVIDENCE, "cpu", ambiguous, True, tuple(machine.notes)) if ambiguous else None
    name, *others = found
    usable = machine.has_device(VENDORS[name].device_type.value)
    tool = VENDORS[name].command_line_tool.value
    evidence = f"{tool} is on the search path"
    if not usable:
        evidence += f", but torch {machine.version} reaches no {VENDORS[name].device_type.value} device"
    return _found(machine, name, evidence, (*others, *ambiguous), usable)


_CPU_EVIDENCE = "no plug-in, no cuda device of a known vendor, no tool that names one vendor"


def _cpu(machine: _Machine) -> Detection:
    return _found(machine, "cpu", _CPU_EVIDENCE)


def _found(machine: _Machine, name: str, evidence: str, others: tuple[str, ...] = (), usable: bool = True) -> Detection:
    device_type = VENDORS[name].device_type.value
    return Detection(name, evidence, device_type, (name, *others), usable, tuple(machine.notes))

"""Which vendor this process emulates: loads the device, gives it the vendor's device type, names its collectives.

One vendor per process: PyTorch has a single device type for others to fill (PrivateUse1) and renames it once.
"""

from __future__ import annotations

import threading

import torch

from ...core.errors import ConfigError, VendorUnavailable
from ..vendors import VENDORS, Vendor
from . import build

# Vendors whose torch presents itself as one of torch's own devices; PrivateUse1 cannot take those names.
_TORCHS_OWN = frozenset({"cuda", "xpu"})
_OTHER_NAME = "emulated"
_UNNAMED = "privateuseone"

_lock = threading.Lock()
_vendor: Vendor | None = None


def emulate(vendor_name: str, deadline_s: float = 300.0) -> torch.device:
    """Make this process drive an emulated device of the vendor, with its collective library; returns the device.

    The device's type is the vendor's own (npu, musa, gcu, supa, mlu), or "emulated" where that is torch's own (cuda,
    xpu). A second call with the same name returns the same device. The first use on a machine compiles a library.

    Raises ConfigError for "cpu", a name that is no row of the vendor table, a second vendor in one process, or a
    process that has run a backward pass already; VendorUnavailable where the device cannot be built.
    """
    global _vendor
    vendor = _row(vendor_name)
    with _lock:
        if _vendor is None:
            _load(vendor, deadline_s)
            _vendor = vendor
        elif _vendor is not vendor:
            raise ConfigError(
                f"this process emulates {_vendor.name} already, and a process has one vendor; "
                f"start another process for {vendor.name}"
            )
    return torch.device(device_type(vendor), 0)


def emulated_vendor() -> Vendor | None:
    """The vendor that this process emulates, or None."""
    return _vendor


def device_type(vendor: Vendor) -> str:
    """The type of the vendor's emulated device."""
    own = vendor.device_type.value
    return _OTHER_NAME if own in _TORCHS_OWN else own


def _row(name: str) -> Vendor:
    names = [row for row in VENDORS if row != "cpu"]
    if name == "cpu":
        raise ConfigError(f"the CPU needs no emulation; vendors that can be emulated: {', '.join(names)}")
    if name not in names:
        raise ConfigError(f"vendor {name!r} is no row of the vendor table; vendors to emulate: {', '.join(names)}")
    return VENDORS[name]


def _load(vendor: Vendor, deadline_s: float) -> None:
    taken = torch._C._get_privateuse1_backend_name()
    if taken != _UNNAMED:
        raise ConfigError(
            f"torch.{taken} has taken the device type that {vendor.name} would be emulated on; "
            "emulate in an environment without that plug-in"
        )
    library = build.device_library(deadline_s)
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise VendorUnavailable(
            f"the emulated device {library} does not load ({error}); delete it, and it is built again"
        ) from error
    from . import collectives, namespace  # both need the library

    name = device_type(vendor)
    torch.utils.rename_privateuse1_backend(name)
    torch._register_device_module(name, namespace.build(vendor, name))
    torch.utils.generate_methods_for_privateuse1_backend(for_packed_sequence=False, for_storage=True)
    _check_autograd(torch.device(name, 0))
    collectives.register(vendor, name)


def _check_autograd(device: torch.device) -> None:
    """Autograd makes its threads, one per device, at the first backward pass; a device that comes later has none."""
    try:
        torch.ones(1, device=device, requires_grad=True).sum().backward()
    except RuntimeError as error:
        raise ConfigError(
            "this process ran a backward pass before it emulated a device, and torch's autograd does not know devices "
            "that come later; call emulate() first"
        ) from error

"""The emulated device is built before the first test, so that no test's deadline includes the compiler."""

from __future__ import annotations

import warnings

from moe_runtime.comm.emulation import build
from moe_runtime.errors import VendorUnavailable


def pytest_sessionstart() -> None:
    try:
        build.device_library()  # says that it builds; about half a minute, once per machine and version of torch
    except VendorUnavailable as error:  # the tests that need it fail or skip with this reason
        warnings.warn(str(error), stacklevel=1)

"""Before the first test: the emulated device is built, so that no test's deadline includes the compiler, and SIGINT is
what it is in a terminal, since what a background shell starts ignores it, its children too."""

from __future__ import annotations

import signal
import warnings

from moe_runtime.comm.emulation import build
from moe_runtime.errors import VendorUnavailable


def pytest_sessionstart() -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        build.device_library()  # says that it builds; about half a minute, once per machine and version of torch
    except VendorUnavailable as error:  # the tests that need it fail or skip with this reason
        warnings.warn(str(error), stacklevel=1)

"""The shim around every rank: `python -m moe_runtime.launch.worker SCRIPT | -m MODULE | --no-python COMMAND [ARGS]`.

It ties the rank's life to the launcher's, turns crashes into tracebacks and users' mistakes into one line with exit
code 2, and otherwise runs the script as `python SCRIPT` would. It imports nothing heavy.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import runpy
import signal
import sys
from types import TracebackType

from ..core.environment import take_launcher_pid, take_output, take_restarts
from ..core.errors import CheckpointError, ConfigError, NotFinite, VendorUnavailable

USER_ERRORS = (ConfigError, CheckpointError, NotFinite, VendorUnavailable)
USER_ERROR_CODE = 2
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def one_line(error: Exception) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split())


def main() -> int:
    die_with_launcher()
    _write_to(take_output())
    take_restarts()
    faulthandler.enable()
    faulthandler.register(signal.SIGQUIT)  # the launcher asks a rank that hangs where it is (local.py)
    sys.excepthook = _show_without_shim
    try:
        _run(sys.argv[1:])
    except USER_ERRORS as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return USER_ERROR_CODE
    return 0


def _run(argv: list[str]) -> None:
    match argv:
        case ["--no-python", command, *arguments]:
            try:
                os.execvp(command, [command, *arguments])  # keeps the death signal (prctl(2))
            except OSError as error:
                raise ConfigError(f"cannot run {command}: {error.strerror}") from None
        case ["-m", module, *arguments]:
            _set_search_path(os.getcwd())
            sys.argv = [module, *arguments]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case [script, *arguments]:
            _set_search_path(os.path.dirname(os.path.realpath(script)))
            sys.argv = [script, *arguments]
            runpy.run_path(script, run_name="__main__")
        case _:
            raise ConfigError("nothing to run; give SCRIPT, -m MODULE or --no-python COMMAND")


def _set_search_path(folder: str) -> None:
    if not getattr(sys.flags, "safe_path", False):  # under python -P there is no such first entry
        sys.path[0] = folder


def die_with_launcher() -> None:
    """Let the kernel kill this process when the launcher dies, however the launcher dies.

    SIGKILL and not SIGTERM: once the launcher is gone nobody would follow up on a rank that ignores SIGTERM or hangs
    in native code. An orderly stop is the launcher's work, while it lives. Run by hand (no launcher) this does nothing.
    """
    launcher = take_launcher_pid()
    if launcher is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != launcher:  # it died before the call above: no signal will come
        os.kill(os.getpid(), signal.SIGKILL)


def _write_to(pipes: tuple[str, str] | None) -> None:
    """Use a node's agent's pipes as stdout and stderr, where it named some."""
    for descriptor, path in enumerate(pipes or (), start=1):
        pipe = os.open(path, os.O_WRONLY)
        os.dup2(pipe, descriptor)
        os.close(pipe)


def _show_without_shim(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
    """Print an uncaught exception from the script's own first frame on."""
    while trace and trace.tb_frame.f_code.co_filename in (__file__, runpy.__file__, "<frozen runpy>"):
        trace = trace.tb_next
    sys.__excepthook__(kind, value.with_traceback(trace), trace)


if __name__ == "__main__":
    sys.exit(main())

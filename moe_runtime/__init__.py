"""moe-runtime: one mixture-of-experts model of the DeepSeek family over machines that differ.

`import moe_runtime` starts nothing: no MPI_Init, no process group, no device. `moe_runtime.init()` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import errors

if TYPE_CHECKING:
    from .core.placement import Placement
    from .runtime import Runtime, init

__version__ = "0.1.0"
__all__ = ["Placement", "Runtime", "__version__", "errors", "init"]


def __getattr__(name: str) -> Any:
    # torch and transformers are imported when first needed, so that `moe-launch --help` stays quick.
    if name in ("Runtime", "init"):
        from . import runtime

        return getattr(runtime, name)
    if name == "Placement":
        from .core.placement import Placement

        return Placement
    raise AttributeError(f"module 'moe_runtime' has no attribute {name!r}")

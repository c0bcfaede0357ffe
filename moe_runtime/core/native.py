"""The one importer of the C extension. Each fast function has a slow twin in the repository."""

from __future__ import annotations

from types import ModuleType

try:
    from .. import _C as _extension

    extension: ModuleType | None = _extension
    reason = "compiled"
except ImportError as error:  # built without a C compiler: the slow twins run, and describe() says so
    extension = None
    reason = f"not built ({error}); the slow twins run instead"


def describe() -> str:
    """One line for `runtime.describe()`: whether the C hot paths run, and if not, why."""
    if extension is None:
        return f"C extension: {reason}"
    return f"C extension: {reason} ({extension.__name__}, {extension.simd_name()} instructions)"

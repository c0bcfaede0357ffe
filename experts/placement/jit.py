"""The one importer of numba for the planner: its functions compiled, or the same functions as plain Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import numba
except ImportError as error:
    numba = None
    engine = f"plain Python ({error}); some hundred times slower, same results"
else:
    engine = f"numba {numba.__version__}"


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled on its first call, with what was compiled kept on disk between processes.

    No fastmath: the same IEEE operations in the same order give the same bits compiled, uncompiled and on every
    rank. numba's cache looks at the function's own file only, so a kernel calls kernels of its own file only.
    """
    if numba is None:
        return function
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # numba's word for "no folder to keep the cache in"
        return numba.njit(nogil=True)(function)

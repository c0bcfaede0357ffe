"""Figures for people: the one importer of matplotlib."""

from __future__ import annotations

from typing import Any

from ..core.errors import ConfigError
from ..core.files import write_atomically


def new_figure(path: str, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """(figure, its axes side by side). Raises ConfigError for a name of another kind, and without matplotlib."""
    if not path.lower().endswith((".png", ".pdf", ".svg")):
        raise ConfigError(f"{path}: the name of a plot must end in .png, .pdf or .svg")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plots need matplotlib; install it with: pip install 'moe-runtime[plot]'") from None
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    return figure, axes


def write_figure(figure: Any, path: str) -> None:
    """Write it, or nothing."""
    kind = path.rpartition(".")[2].lower()
    write_atomically(path, lambda file: figure.savefig(file, format=kind, dpi=120))

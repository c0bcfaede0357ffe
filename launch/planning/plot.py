"""Figures of plan and simulate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..figures import new_figure, write_figure

if TYPE_CHECKING:
    from .plan import Planned
    from .simulate import Row

BEFORE, AFTER, LINE = "#b8b8b8", "#2a6fbb", "#c0392b"


def plan_figure(planned: Planned, path: str) -> None:
    """The load as a heat map, experts of each layer sorted; each rank's time in the even split and in the plan."""
    figure, (left, right) = new_figure(path, 2, (13, 5))
    load = np.sort(planned.plan.load, axis=1)[:, ::-1]
    mean = load.mean(axis=1, keepdims=True)
    image = left.imshow(load / np.where(mean > 0, mean, 1), aspect="auto", cmap="viridis", vmin=0)
    figure.colorbar(image, ax=left, label="tokens / mean of the layer")
    left.set(title="load", xlabel="experts, most loaded first", ylabel="expert layer")
    unit, scale = ("rows", 1.0) if planned.rates.unit == "rows" else ("ms", 1e3)
    ranks = np.arange(planned.plan.num_ranks)
    right.bar(ranks, planned.even_times * scale, width=1.0, color=BEFORE, label="even split")
    right.bar(ranks, planned.times * scale, width=0.6, color=AFTER, label="plan")
    right.axhline(planned.bound * scale, color=LINE, linewidth=1, label="no placement's slowest rank is below")
    right.set(title="predicted time of a step, all expert layers", xlabel="rank", ylabel=unit)
    right.legend()
    write_figure(figure, path)


def simulate_figure(rows: Sequence[Row], path: str) -> None:
    """Balancedness by number of ranks, a line per question, policy and dispatch (mean over workloads)."""
    figure, (axis,) = new_figure(path, 1, (9, 5))
    for question in dict.fromkeys(row.question for row in rows):
        for policy, dispatch in dict.fromkeys((row.policy, row.dispatch) for row in rows):
            found = [row for row in rows if (row.question, row.policy, row.dispatch) == (question, policy, dispatch)]
            sizes = sorted({row.ranks for row in found})
            if sizes:
                means = [float(np.mean([row.balancedness for row in found if row.ranks == size])) for size in sizes]
                style = {"fresh": "-", "shifted": "--", "next window": ":"}[question]
                axis.plot(sizes, means, style, marker="o", label=f"{question}, {policy}, {dispatch}")
    axis.set(title="predicted balancedness", xlabel="ranks", ylabel="perfectly divided / slowest rank", ylim=(0, 1.02))
    axis.set_xscale("log", base=2)
    axis.legend(fontsize=8)
    write_figure(figure, path)

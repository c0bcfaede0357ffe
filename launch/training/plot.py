"""Runs beside each other: `python -m moe_runtime.launch.training.plot RUN.metrics.jsonl ... --out runs.png`.

Two panels: loss, and the busiest expert's load over the mean (the worst layer), which balancing is to lower.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ...core.errors import ConfigError
from ..figures import new_figure, write_figure
from ..worker import USER_ERROR_CODE, one_line


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics. Raises ConfigError for a file that is none."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not rows or any("layers" not in row for row in rows):
            raise ConfigError(f"{path}: no metrics of moe-launch train in it")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: not the metrics of moe-launch train ({one_line(error)})") from None
    return rows


def draw(runs: dict[str, list[dict[str, Any]]], path: str) -> None:
    """One line a run, by name. Raises ConfigError without matplotlib."""
    figure, (loss, load) = new_figure(path, 2, (10, 4))
    for name, rows in runs.items():
        steps = [row["step"] for row in rows]
        (line,) = loss.plot(steps, [row["loss"] for row in rows], label=name)
        validated = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
        if validated:
            loss.plot(*zip(*validated, strict=True), "o", color=line.get_color())
        load.plot(steps, [max(row["layers"]["max_over_mean"]) for row in rows], label=name)
    loss.set(xlabel="step", ylabel="loss (dots: validation)", title="loss")
    load.set(xlabel="step", ylabel="tokens of the busiest expert / mean", title="load, worst layer")
    load.axhline(1.0, color="0.7", linewidth=0.8)
    for axes in (loss, load):
        axes.legend()
        axes.grid(alpha=0.3)
    write_figure(figure, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m moe_runtime.launch.training.plot", description=__doc__)
    parser.add_argument("metrics", type=Path, nargs="+", metavar="RUN.metrics.jsonl")
    parser.add_argument("--out", required=True, metavar="FILE.png")
    arguments = parser.parse_args(argv)
    try:
        draw(
            {path.name.removesuffix(".metrics.jsonl"): read_metrics(path) for path in arguments.metrics}, arguments.out
        )
    except ConfigError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return USER_ERROR_CODE
    print(f"plot written to {arguments.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

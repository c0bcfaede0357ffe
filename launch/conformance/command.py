"""What `moe-launch check` does around the ranks: decide, start them through the engine, and show what they found."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from os import getpid
from pathlib import Path

from ...core.errors import ConfigError
from ..worker import USER_ERROR_CODE
from . import plan, report

# launch(options, arguments of the job): starts the ranks on options.cluster, or shows what would be started.
Launch = Callable[[argparse.Namespace, list[str]], int]


def check(options: argparse.Namespace, launch: Launch) -> int:
    """0 when nothing failed and nothing differs from its claim, else 1. Raises ConfigError for the user's mistakes."""
    if options.cluster and options.vendor != "auto":
        raise ConfigError("--cluster says each node's vendor, --vendor is for this machine; give one of them")
    if not options.timeout_s:
        raise ConfigError("--timeout-s 0: no library answers in no time; give seconds above 0")
    planned = (
        plan.plan_cluster(options.cluster)
        if options.cluster
        else plan.plan_vendor(options.vendor, options.nproc_per_node)
    )
    print(f"moe-launch check: {planned.title}; {planned.evidence}", file=sys.stderr, flush=True)
    folder = Path(options.log_dir or f"runs/check-{time.strftime('%Y%m%d-%H%M%S')}-{getpid()}")
    options.log_dir = str(folder)
    if options.dry_run:
        with tempfile.TemporaryDirectory(prefix="moe-check-") as scratch:
            _write_cluster(options, planned, Path(scratch))  # the engine reads it; the ranks' would be in `folder`
            return launch(options, _arguments(options, planned))
    plan.prepare(planned)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lines = folder / "check.jsonl"
        lines.unlink(missing_ok=True)
        _write_cluster(options, planned, folder)
    except OSError as error:
        raise ConfigError(f"--log-dir {folder}: cannot be written to ({error.strerror})") from None
    code = launch(options, _arguments(options, planned))
    found = report.read_lines(lines)
    if code == USER_ERROR_CODE and not any("row" in line for line in found):
        return code  # the ranks have said what the user's mistake was
    made = report.complete(planned.header(), found, ending(code), planned.rows)
    report.write(report.with_report_file(made, lines), options.json)
    return code if code in (128 + signal.SIGINT, 128 + signal.SIGTERM) else made.exit_code


def _write_cluster(options: argparse.Namespace, planned: plan.Plan, folder: Path) -> None:
    """The cluster file for the engine, where it is not the user's own."""
    if planned.cluster is not None:
        path = folder / "cluster.toml"
        path.write_text(planned.cluster, encoding="utf-8")
        options.cluster, options.nproc_per_node = str(path), None


def _arguments(options: argparse.Namespace, planned: plan.Plan) -> list[str]:
    """The job's own. Ranks read the cluster file in the log folder, or the user's."""
    folder = Path(options.log_dir)
    cluster = options.cluster if planned.cluster is None else str(folder / "cluster.toml")
    flags = ["--users-cluster"] if planned.cluster is None else ["--vendor-named"] if planned.vendor_named else []
    report_file = str(folder / "check.jsonl")
    return ["--cluster", cluster, "--report", report_file, "--timeout-s", f"{options.timeout_s:g}", *flags]


def ending(code: int) -> str:
    """How the ranks ended, from the engine's exit code."""
    names = {entry.value: entry.name for entry in signal.Signals}
    return f"exit code {code}" + (f" ({names[code - 128]})" if code - 128 in names else "")

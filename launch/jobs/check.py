"""The program that `moe-launch check` starts on every rank: the probes of launch/conformance, in step.

Rank 0 writes what it learns to a file, a line at a time, so that the launcher has a report also where ranks die. Its
stdout goes to stderr: vendors' libraries print there, and the launcher's stdout is the report.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch  # noqa: F401 - first, and alone: which plug-ins come with it is one of the questions

import moe_runtime

from ...core.cluster import load_cluster
from ..conformance import suite
from ..conformance.context import open_context
from ..conformance.probes import probes

DID_NOT_END = 3


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="moe-launch check", description="conformance probes on this rank")
    parser.add_argument("--cluster", required=True)
    parser.add_argument("--report", type=Path, required=True, help="where rank 0 writes, one JSON object a line")
    parser.add_argument("--timeout-s", type=float, required=True)
    parser.add_argument("--users-cluster", action="store_true", help="the cluster file is the user's own")
    parser.add_argument("--vendor-named", action="store_true")
    arguments = parser.parse_args(argv)
    os.dup2(2, 1)
    loaded = frozenset(sys.modules)
    settings = {"cluster": arguments.cluster, "timeout_s": arguments.timeout_s}
    with moe_runtime.init(settings) as runtime, _report(arguments.report, runtime.rank) as file:

        def write(message: dict[str, Any]) -> None:
            if runtime.rank == 0:
                file.write(json.dumps(message, ensure_ascii=False) + "\n")
                file.flush()

        context = open_context(
            runtime, arguments.timeout_s, vendor_named=arguments.vendor_named, loaded_with_torch=loaded
        )
        write({"header": suite.header(context)})
        cluster = load_cluster(arguments.cluster) if arguments.users_cluster else None
        if not suite.run(context, probes(cluster, context.all_on_chips), write):
            # Something still runs in a library, or a rank is gone: nothing can be closed in order. The first rank to
            # end has the others stopped, and that must not be before rank 0 has written.
            if runtime.rank:
                time.sleep(5)
            sys.stderr.flush()
            os._exit(DID_NOT_END)
        write({"end": True})
        context.control.barrier("check (end)")
        context.control.close()
    return 0


def _report(path: Path, rank: int) -> Any:
    return open(path if rank == 0 else os.devnull, "a", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

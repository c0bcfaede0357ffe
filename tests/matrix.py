"""The table of model families by vendors, every vendor emulated: `python tests/matrix.py docs/matrix.md`.

Each cell is one run of three ranks, two of the vendor and one CPU rank, joined over the bridge: logits, loss and every
gradient equal to one process running transformers' own model to 1e-5 (float32), and the same greedy tokens, through the
vendor's emulated device and the documented limits of its collective library. A cell says nothing about a real chip.
"""

from __future__ import annotations

import datetime
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from families import FAMILIES
from ranks import RankFailed, run_ranks
from test_families import SPLITS, check_rank, write_oracle

from moe_runtime.comm.vendors import VENDORS

PASSED = "equal"
# The buffer that Enflame's library needs for an uneven all-to-all is sized before the job starts.
ENVIRONMENT = {"ECCL_ALLTOALLV_MAXSIZE": str(1 << 22)}


def cluster_of(vendor: str) -> str:
    """A cluster file: two devices of the vendor, emulated, and a CPU rank; three CPU ranks for the cpu row."""
    first = 'vendor = "cpu"' if vendor == "cpu" else f'emulate = "{vendor}"'
    return f'[[node]]\nname = "a"\n{first}\ndevices = 2\n[[node]]\nname = "b"\nvendor = "cpu"\n'


def run_cell(oracle: Path, vendor: str) -> str:
    """PASSED, or the last line of what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        cluster = Path(folder, "cluster.toml")
        cluster.write_text(cluster_of(vendor))
        try:
            results = run_ranks(check_rank, 3, oracle, SPLITS[3], {"cluster": str(cluster)}, env=ENVIRONMENT)
        except RankFailed as error:
            return str(error).strip().splitlines()[-1]
    return PASSED if all(result["compared"] > 10 for result in results) else "too few gradients were compared"


def table(cells: dict[tuple[str, str], str], seconds: float) -> str:
    """The page, from the outcome of each (family, vendor)."""
    failures = [f"- {family} on {vendor}: {said}" for (family, vendor), said in cells.items() if said != PASSED]
    head = ["family", *VENDORS]
    rows = [
        [family, *("yes" if cells[family, vendor] == PASSED else "NO" for vendor in VENDORS)] for family in FAMILIES
    ]
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(
        [
            "# Model families by vendors, emulated",
            "",
            "`python tests/matrix.py docs/matrix.md` writes this page. **Every vendor but cpu is emulated**: its",
            "device is host memory behind PyTorch's PrivateUse1, its collective library is gloo under the limits that",
            "the vendor's documents state ([vendors.md](vendors.md)). Nothing here was run on a vendor's chip.",
            "",
            "`yes`: three ranks, two of the vendor and one CPU rank over the bridge, give the logits, the loss and",
            "every gradient of one process running transformers' own model to 1e-5 in float32, and the same greedy",
            "tokens. The models are small ones of each family, with random weights and 16 experts, which three ranks",
            "hold unevenly.",
            "",
            *lines,
            "",
            f"{sum(said == PASSED for said in cells.values())} of {len(cells)} cells agree."
            + (" What does not:" if failures else ""),
            *failures,
            "",
            f"Run on {datetime.date.today()} in {seconds:.0f} s: {platform.machine()}, {os.cpu_count()} cores, Python "
            f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}.",
            "",
        ]
    )


def main(path: str) -> int:
    began, cells = time.monotonic(), {}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            write_oracle(Path(folder), family)
            for vendor in VENDORS:
                cells[family, vendor] = run_cell(Path(folder), vendor)
                print(f"{family} on {vendor}: {cells[family, vendor]}", file=sys.stderr, flush=True)
    page = Path(path)
    partial = page.with_name(page.name + ".partial")
    partial.write_text(table(cells, time.monotonic() - began))
    partial.replace(page)
    return int(any(said != PASSED for said in cells.values()))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""`moe-launch bench`: measurements beside their peers and floors, in one run."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from ...core.errors import ConfigError

# What can be measured, and the module whose `main(argv) -> int` measures it; imported only when asked for.
BENCHES = {
    "model": "moe_runtime.launch.bench.model",
    "generate": "moe_runtime.launch.bench.generate",
    "train": "moe_runtime.launch.bench.train",
    "load": "moe_runtime.launch.bench.load",
    "experts": "moe_runtime.launch.bench.experts",
    "dispatch": "moe_runtime.launch.bench.dispatch",
    "balance": "moe_runtime.launch.bench.balance",
    "plan": "moe_runtime.launch.bench.plan",
    "start": "moe_runtime.launch.bench.start",
    "bridge": "moe_runtime.launch.bench.bridge",
}

USAGE = f"""usage: moe-launch bench WHAT [options]

Measure on this machine, always beside a floor and a peer. WHAT is one of: {", ".join(BENCHES)}.

examples:
  moe-launch bench model
  moe-launch bench train --profile
  moe-launch bench load --json
  moe-launch bench dispatch --ranks 2 4 --profile
  moe-launch bench load --help
"""


def main(argv: Sequence[str]) -> int:
    """Run one bench with its own arguments. Raises ConfigError when there is no such bench."""
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if not argv or argv[0] not in BENCHES:
        said = f"no bench is called {argv[0]!r}" if argv else "say what to measure"
        raise ConfigError(f"bench: {said}; choose one of {', '.join(BENCHES)}")
    return importlib.import_module(BENCHES[argv[0]]).main(list(argv[1:]))

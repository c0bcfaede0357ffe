"""`make demo`: train a small DeepSeek-V3 on two uneven ranks, save it, and let two ranks continue a prompt with it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from . import cli

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ["\nclass Reader:\n    def __init__(self, ", "\n    def close(self):\n        "]


def main() -> int:
    configs, started = ROOT / "configs", time.perf_counter()
    cluster = str(configs / "two-uneven-ranks.toml")
    logs = ROOT / "runs" / "demo"
    code = cli.main(
        [
            "train",
            "--cluster",
            cluster,
            "--log-dir",
            str(logs / "train-logs"),
            str(configs / "demo.toml"),
            *sys.argv[1:],
        ]
    )
    if code:
        return code
    print(f"\ndemo: now two ranks load {logs / 'checkpoint'} and continue two prompts\n", file=sys.stderr, flush=True)
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    code = cli.main(
        [
            "generate",
            "--cluster",
            cluster,
            "--log-dir",
            str(logs / "generate-logs"),
            "--model",
            str(logs / "checkpoint"),
        ]
        + [*prompts, "--max-new-tokens", "260", "--temperature", "0.5"]
    )
    print(f"\ndemo: done in {time.perf_counter() - started:.0f} s; the model is a Hugging Face checkpoint in "
          f"{logs / 'checkpoint'}", file=sys.stderr)  # fmt: skip
    return code


if __name__ == "__main__":
    sys.exit(main())

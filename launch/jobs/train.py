"""The training job that `moe-launch train CONFIG.toml` starts on every rank. Its parts are in launch/training."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import moe_runtime

from ...core.config import RuntimeConfig
from ..toml import apply_overrides, read_toml
from ..training.config import TrainConfig
from ..training.loop import export, train


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="moe-launch train", description="train a mixture-of-experts model")
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--profile", metavar="DIR", help="write traces there; relative to where the command runs")
    parser.add_argument("--export", metavar="DIR", help="train nothing: write the newest checkpoint's model there")
    parser.add_argument("--cluster", help="cluster file; overrides the config's")
    arguments = parser.parse_args(argv)
    table = apply_overrides(read_toml(arguments.config), arguments.overrides)
    if arguments.profile:
        table["profile"] = str(Path(arguments.profile).resolve())
    config = TrainConfig.from_table(table, str(arguments.config))
    base = arguments.config.resolve().parent
    cluster = arguments.cluster or (str(base / config.cluster) if config.cluster else None)
    settings = {"cluster": cluster, "timeout_s": config.timeout_s, **config.runtime}
    with moe_runtime.init(RuntimeConfig.from_any(settings)) as runtime:
        if arguments.export:
            export(config, base, runtime, Path(arguments.export).resolve())
        else:
            train(config, base, runtime)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`profile = "FOLDER"`: a trace of a few steps for Perfetto, one file a rank; dispatch, experts, combine have names."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from .config import TrainConfig


def profiler(config: TrainConfig, base: Path, rank: int) -> AbstractContextManager[Any]:
    """A context whose `step()` is called after every step."""
    if not config.profile:
        return nullcontext(SimpleNamespace(step=lambda: None))
    (folder := base / config.profile).mkdir(parents=True, exist_ok=True)

    def write(profile: Any) -> None:
        path = folder / f"rank_{rank}.json"
        profile.export_chrome_trace(str(path))
        print(f"profile of {config.profile_steps} steps: {path} (open it at ui.perfetto.dev)", flush=True)

    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    wait, warm = max(0, config.profile_from - 1), min(1, config.profile_from)
    when = torch.profiler.schedule(wait=wait, warmup=warm, active=config.profile_steps, repeat=1)
    return torch.profiler.profile(activities=activities, schedule=when, on_trace_ready=write)

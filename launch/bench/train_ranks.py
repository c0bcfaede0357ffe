"""One rank of a subject of `bench train`: it loads, then takes one step of training per line on stdin.

All subjects train the same weights on the same tokens with torch's AdamW; what differs is how the work is spread.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ...core.spans import spans
from ..machine import reset_peak_memory, resident_bytes, trim_memory
from ..training.log import watch_attention
from .subjects import LOADERS, Loaded, random_tokens

MAX_NORM = 1.0
PARTS = ("forward", "backward", "sync", "clip", "optimizer")


class Trainee:
    """A subject's model and optimizer on this rank. profile: moe-runtime's named spans are counted.
    trim: freed memory is given back after each step."""

    def __init__(self, loaded: Loaded, sequences: int, length: int, rate: float, profile: bool, trim: bool) -> None:
        self.loaded, self.model, self.trim = loaded, loaded.model.train(), trim
        whole = random_tokens(self.model, sequences, length + 1)
        self.ids, self.tokens = loaded.share(whole), sequences * length
        # Fused, as transformers' Trainer has it by default; it takes the parameters of one device mesh at a time.
        groups = [{"params": parameters} for parameters in by_mesh(self.model).values()]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, fused=True)
        if profile and loaded.runtime:
            watch_attention(self.model)
            spans.on = True
        reset_peak_memory()

    def step(self) -> dict[str, Any]:
        """One step. `loss`: of this rank's tokens over those of all; `norm`: of all gradients, before clipping."""
        loaded, model, marks = self.loaded, self.model, [time.perf_counter()]
        logits = model(input_ids=self.ids[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), self.ids[:, 1:].flatten(), reduction="sum") / self.tokens
        marks.append(time.perf_counter())
        (loss * gradient_scale(loaded)).backward()
        del logits
        marks.append(time.perf_counter())
        if loaded.runtime:
            loaded.runtime.sync_gradients(model)
        marks.append(time.perf_counter())
        norm = clip(loaded)
        marks.append(time.perf_counter())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        marks.append(time.perf_counter())
        told = float(loss.detach())
        taken = {f"{part}_s": end - begin for part, begin, end in zip(PARTS, marks[:-1], marks[1:], strict=True)}
        del loss
        if self.trim:
            trim_memory()  # for the subject whose turn is next
        return {
            **taken,
            "step_s": marks[-1] - marks[0],
            "loss": told,
            "norm": norm,
            "peak_bytes": resident_bytes(peak=True),
            "spans": spans.take(),
        }


def gradient_scale(loaded: Loaded) -> int:
    """FSDP averages ranks' gradients where sums are meant; moe-runtime adds them up."""
    return 1 if loaded.runtime else loaded.size


def by_mesh(model: Any) -> dict[Any, list[torch.nn.Parameter]]:
    """Parameters by device mesh; None where they are whole."""
    found: dict[Any, list[torch.nn.Parameter]] = {}
    for parameter in model.parameters():
        found.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return found


def clip(loaded: Loaded) -> float:
    """Clip by the norm of the whole model's gradients, each subject in its own way; returns that norm."""
    if loaded.runtime:
        return loaded.runtime.clip_grad_norm(loaded.model, MAX_NORM)
    if loaded.size == 1:
        return float(torch.nn.utils.clip_grad_norm_(loaded.model.parameters(), MAX_NORM))
    return clip_meshes(loaded.model)


def clip_meshes(model: Any) -> float:
    """torch's clipping for gradients on several device meshes, as transformers' Trainer does it: one norm per mesh
    (trainer.py, `_mixed_mesh_grad_norm`)."""
    from torch.nn.utils import clip_grads_with_norm_, get_total_norm

    meshes = by_mesh(model).values()
    norms = [get_total_norm([p.grad for p in parameters]).full_tensor() for parameters in meshes]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    for parameters in meshes:
        clip_grads_with_norm_(parameters, MAX_NORM, norm)
    return float(norm)


def main() -> int:
    name, folder, threads, sequences, length, rate, profile, trim = sys.argv[1:]
    torch.set_num_threads(int(threads))
    loaded = LOADERS[name](Path(folder))
    trainee = Trainee(loaded, int(sequences), int(length), float(rate), profile == "True", trim == "True")
    print(json.dumps({"ready": loaded.describe()}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(trainee.step()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Activation checkpointing that never repeats an exchange: what is computed again in backward is local.

transformers' own (`gradient_checkpointing_enable`) computes whole decoder layers again, dispatch and combine included,
and a rank without tokens would not take part. Here the rows that dispatch brought are kept, and experts, and with
"all" attention and dense MLPs, are computed again from what they were given.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from .balance import find_routers
from .core.errors import ConfigError
from .layer import ExpertParallel
from .overlap import EarlyModule

CHOICES = ("none", "experts", "all")


def recompute(model: Any, what: str) -> int:
    """Have a model in training compute experts ("experts"), or attention and dense MLPs as well ("all"), again in
    backward instead of keeping what they made. Returns how many modules do. Raises ConfigError for other words."""
    if what not in CHOICES:
        raise ConfigError(f"recompute must be one of {', '.join(CHOICES)}, got {what!r}")
    layers = [module for module in model.modules() if isinstance(module, ExpertParallel)]
    for layer in layers:
        layer.moe_runtime_layer.recompute = what != "none"
    others = list(_local_modules(model)) if what == "all" else []
    for module in others:
        if isinstance(module.forward, EarlyModule):
            module.forward.compute = functools.partial(_again, module, module.forward.compute)
        else:
            module.forward = functools.partial(_again, module, module.forward)
    return len(others) + (len(layers) if what != "none" else 0)


def _again(module: torch.nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not (module.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _local_modules(model: Any) -> Iterator[torch.nn.Module]:
    """The decoder layers' parts with weight matrices that no exchange is in: attention, dense MLPs, shared experts."""
    routers = set(find_routers(model).values())
    for decoder_layer in model.get_decoder().layers:
        todo = list(decoder_layer.children())
        while todo:
            module = todo.pop()
            if isinstance(module, ExpertParallel) or module in routers:
                continue
            if any(isinstance(inner, ExpertParallel) for inner in module.modules()):
                todo += module.children()
            elif any(parameter.dim() > 1 for parameter in module.parameters()):
                yield module

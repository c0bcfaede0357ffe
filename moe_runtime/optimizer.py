"""torch's AdamW for parameters in half precision: weights, moments and gradients are kept in float32 beside them.

The float32 copy is an entry of the optimizer's state with the parameter's shape ("master"), so what moves or saves an
expert's state (rebalancing, checkpoints) takes it along. Parameters in float32 are torch's AdamW, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

HALF = (torch.bfloat16, torch.float16)


def accumulate_in_float32(parameters: Iterable[torch.nn.Parameter]) -> bool:
    """Have half-precision parameters collect their gradients in float32. False where this torch cannot (before 2.9)."""
    can = hasattr(torch.Tensor, "grad_dtype")
    for parameter in parameters if can else ():
        if parameter.dtype in HALF and parameter.grad_dtype != torch.float32:
            parameter.grad_dtype = torch.float32
    return can


class MasterAdamW(torch.optim.AdamW):
    """torch.optim.AdamW (same arguments) with float32 masters of parameters in half precision."""

    # Adam collects here what it hands to its functions: the one place where another tensor can stand for a parameter.
    def _init_group(self, group: dict, params_with_grad: list, grads: list, *lists: Any) -> bool:
        halves = [p for p in group["params"] if p.grad is not None and p.dtype in HALF]
        for parameter in halves:
            if not self.state[parameter]:
                wide = parameter.detach().float()
                on_device = group["fused"] or group["capturable"]
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu"),
                    "exp_avg": torch.zeros_like(wide),
                    "exp_avg_sq": torch.zeros_like(wide),
                    "master": wide,
                }
        has_complex = super()._init_group(group, params_with_grad, grads, *lists)
        for at, parameter in enumerate(params_with_grad):
            if parameter.dtype in HALF:
                params_with_grad[at], grads[at] = self.state[parameter]["master"], grads[at].float()
        return has_complex

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the parameters become their masters, rounded."""
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and "master" in self.state[parameter]:
                    parameter.copy_(self.state[parameter]["master"])
        return loss

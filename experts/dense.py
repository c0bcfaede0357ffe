"""Linear layers of the dense part, where a CPU computes a few rows in half precision.

A decode step reads every dense weight for a handful of rows. The expert kernel (compute.product) reads a weight once at
the speed of memory whatever it belongs to; torch's product takes twice as long (docs/performance.md). Everything else
stays torch's own: many rows, gradients, float32, biases, devices, autocast, compiled graphs.
"""

from __future__ import annotations

import numpy as np
import torch

from .compute import FEW_ROWS, c_is_fast, needs_gradient, product

_DTYPES = (torch.bfloat16, torch.float16)


class FewRowsLinear(torch.nn.Linear):
    """torch.nn.Linear, whose forward takes the C kernel where it is the faster one. The class changes, nothing else."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not _takes_c(self, input):
            return super().forward(input)
        rows = input.reshape(-1, self.in_features)
        out = product(rows, None, self.weight.detach()[None], None, np.array([len(rows)]))
        return out.view(*input.shape[:-1], self.out_features)


FewRowsLinear.__name__ = FewRowsLinear.__qualname__ = "Linear"  # as people know it from print(model)


def _takes_c(module: torch.nn.Linear, x: torch.Tensor) -> bool:
    weight = module.weight
    num_rows = x.numel() // max(module.in_features, 1)
    return (
        0 < num_rows <= FEW_ROWS.get(weight.dtype, 0)
        and type(x) is torch.Tensor
        and x.dtype == weight.dtype
        and x.device.type == weight.device.type == "cpu"
        and x.shape[-1] == module.in_features
        and weight.is_contiguous()
        and not needs_gradient(module, x)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def use_few_rows_kernel(model: torch.nn.Module) -> int:
    """Give the model's plain half-precision linear layers FewRowsLinear's forward; how many there are.

    Only layers whose class is exactly torch.nn.Linear, without bias, and only where C is fast on this machine. Layers
    that share their weight with an embedding keep sharing it.
    """
    found = [module for module in model.modules() if _is_plain(module)] if c_is_fast() else []
    for module in found:
        module.__class__ = FewRowsLinear
    return len(found)


def _is_plain(module: torch.nn.Module) -> bool:
    return type(module) is torch.nn.Linear and module.bias is None and module.weight.dtype in _DTYPES


def describe(num_layers: int) -> str:
    """What computes the dense part, in one line; num_layers: what use_few_rows_kernel gave."""
    if not num_layers:
        return "dense layers: torch"
    return f"dense layers: C for up to {FEW_ROWS[_DTYPES[0]]} rows in {num_layers} linear layers, torch for more"

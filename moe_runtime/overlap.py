"""What a rank computes while rows travel: the shared expert, and the other half of its batch.

The shared expert of a layer is computed between sending rows to experts and waiting for those of others. Two halves
are two batches of the rank, each with passes of its own, by turns (turns.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .comm.dispatch import IDLE
from .core.errors import ConfigError
from .layer import ExpertParallel
from .model import expert_layers
from .turns import ByTurns, states_here

_SHARED = ("shared_experts", "shared_expert")  # what families call the sibling of their experts that takes every token


class EarlyModule:
    """Computes a module's output before it is asked for: `early` with the same input, then the module is called.

    It takes the place of the module's forward, which is `compute` now.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.compute = module.forward
        self._input: torch.Tensor | None = None
        self._output: torch.Tensor | None = None
        module.forward = self

    def early(self, x_TH: torch.Tensor) -> None:
        self._input, self._output = x_TH, self.compute(x_TH)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        given, made, self._input, self._output = self._input, self._output, None, None
        if made is not None and given is not None and given.data_ptr() == x.data_ptr() and given.numel() == x.numel():
            return made.view(*x.shape[:-1], made.shape[-1])
        return self.compute(x)


def compute_shared_experts_early(model: Any) -> int:
    """Have each layer's shared expert computed while its dispatch is under way; how many layers have one that can."""
    found = 0
    for name, module in model.named_modules():
        if not isinstance(module, ExpertParallel):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        shared = next((getattr(parent, word) for word in _SHARED if hasattr(parent, word)), None)
        if isinstance(shared, torch.nn.Module):
            module.moe_runtime_layer.meanwhile = EarlyModule(shared).early
            found += 1
    return found


class TwoHalves:
    """Runs the two halves of every rank's batch by turns. Every rank makes one and calls alike; `close` ends it."""

    def __init__(self, model: Any) -> None:
        self._layers, self._turns = expert_layers(model), ByTurns()

    def run(self, first: Callable[[], bool], second: Callable[[], bool]) -> None:
        """Passes of both until no half of any rank has work left; as runtime.join, for two.

        Each function makes one forward pass of the model and returns True, or returns False where nothing is left: the
        half then takes part without tokens. Raises ConfigError where live rebalancing may move experts meanwhile.
        """
        if any(layer.moe_runtime_layer.before_exchange is not None for layer in self._layers):
            raise ConfigError("two halves: experts may not move between the halves of a pass; switch rebalancing off")
        working = True
        while working:
            states = self._turns.run(lambda: self._pass(first), lambda: self._pass(second))
            working = any(state != IDLE for half in states for state in half)

    def _pass(self, work: Callable[[], bool]) -> list[int]:
        """One pass; all ranks' states in it."""
        if not work():
            nothing = self._layers[0].moe_runtime_layer.dispatcher.no_rows()
            with torch.no_grad():
                for layer in self._layers:
                    layer.idle_exchange(nothing)
        return states_here()

    def close(self) -> None:
        self._turns.close()

"""What happens when a loss or a gradient is not finite: nothing is applied, and the batch and the layer are named."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...comm.wire import all_gather_message
from ...core.errors import NotFinite
from ...gradients import split_parameters


def check(trainer: Any, number: int, ids: torch.Tensor, loss: float, norm: float) -> None:
    """Raises NotFinite, on all ranks alike, before the optimizer has seen the gradients. loss, norm: of all ranks."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    runtime = trainer.runtime
    mine = first_layer(trainer, ids) or first_gradient(trainer.model)
    said = all_gather_message(runtime.transport, mine, "where the loss is not finite")
    found = [f"{where} on rank {rank}" for rank, where in enumerate(said) if where]
    what = f"the loss of step {number + 1} is {loss}" if not math.isfinite(loss) else (
        f"the gradients of step {number + 1} have norm {norm} (loss {loss:.4g})"
    )  # fmt: skip
    size = trainer.config.batch_size
    raise NotFinite(
        f"{what}; first not finite: {'; '.join(found) or 'not found again when computed once more'}. The batch is "
        f"sequences {number * size} to {(number + 1) * size - 1} of the order (seed {trainer.config.seed}). Nothing of "
        "this step was applied. Lower learning_rate, or look at the data"
    )


@torch.no_grad()
def first_layer(trainer: Any, ids: torch.Tensor) -> str:
    """The first module of the model whose output is not finite for this rank's sequences; "" for none. Every rank."""
    found: list[str] = []

    def hook(name: str) -> Any:
        def look(module: torch.nn.Module, given: Any, out: Any) -> None:
            value = out[0] if isinstance(out, tuple) else getattr(out, "logits", out)
            if not found and isinstance(value, torch.Tensor) and not value.isfinite().all():
                found.append(name)

        return look

    modules = [(name, module) for name, module in trainer.model.named_modules() if name and name.count(".") <= 3]
    hooks = [module.register_forward_hook(hook(name)) for name, module in modules]
    try:
        trainer.model(input_ids=ids[:, :-1], use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
    return found[0] if found else ""


def first_gradient(model: Any) -> str:
    """The first parameter, in the model's order, whose gradient is not finite on this rank."""
    dense, experts = split_parameters(model)
    trained = {id(p) for p in [*dense, *(p for parameters in experts.values() for p in parameters)]}
    for name, parameter in model.named_parameters():
        if id(parameter) in trained and parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"the gradient of {name}"
    return ""

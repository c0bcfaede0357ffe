"""Balancing experts in training, as DeepSeek-V3 does it: by a bias without a loss, and a small loss per sequence.

Sources: DeepSeek-V3 technical report (arXiv 2412.19437), section 2.1.2: the bias of an overloaded expert falls and that
of an underloaded one rises by a fixed step after every training step; equations 17 to 20 give the loss. The z-loss is
that of ST-MoE (arXiv 2202.08906, equation 5). What is counted, and the bias, are of all ranks together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .comm.transport import Transport
from .core.errors import ConfigError
from .layer import ExpertParallel

BIAS = "e_score_correction_bias"
_ROUTERS = ("gate", "router")  # what families call the sibling of their experts that chooses


@dataclass(frozen=True)
class Balance:
    """Settings. bias_rate: DeepSeek's gamma. sequence_weight: its alpha. z_weight: of the router z-loss. 0: off."""

    bias_rate: float = 0.0
    sequence_weight: float = 0.0
    z_weight: float = 0.0


def sequence_loss(scores_TE: torch.Tensor, ids_TK: torch.Tensor, sequences: int) -> torch.Tensor:
    """The balance loss summed over sequences: sum over experts of f * P (1.0 for each sequence that is balanced).

    scores_TE: a router's scores, above 0. ids_TK: its choices. T is `sequences` runs of equal length.
    """
    num_experts, top_k = scores_TE.shape[1], ids_TK.shape[1]
    shares_BLE = (scores_TE / scores_TE.sum(-1, keepdim=True)).view(sequences, -1, num_experts)
    chosen_BE = torch.zeros(sequences, num_experts, device=scores_TE.device)
    ids_B = ids_TK.reshape(sequences, -1)
    chosen_BE.scatter_add_(1, ids_B, torch.ones_like(ids_B, dtype=chosen_BE.dtype))
    length = shares_BLE.shape[1]
    frequency_BE = chosen_BE * (num_experts / (top_k * length))
    return (frequency_BE * shares_BLE.mean(1)).sum()


def z_loss(logits_TE: torch.Tensor) -> torch.Tensor:
    """The router z-loss summed over tokens: the square of the logarithm of the sum of exponentials."""
    return logits_TE.float().logsumexp(-1).square().sum()


def bias_step(load_E: torch.Tensor, rate: float) -> torch.Tensor:
    """What is added to the bias [E]: `rate` for experts below the mean load, minus `rate` for those above."""
    load = load_E.double()
    return rate * torch.sign(load.mean() - load).float()


class RouterBalance:
    """Watches a model's routers while it trains. Every rank makes one and calls alike; `close` ends it.

    After a forward pass `loss()` gives the terms to add; after the optimizer's step `step()` moves the biases. Raises
    ConfigError for a model whose routers cannot be found, or that has no bias where one is to be moved.
    """

    def __init__(self, model: Any, transport: Transport, settings: Balance) -> None:
        self.settings, self._transport = settings, transport
        self.routers = find_routers(model)
        missing = [name for name, router in self.routers.items() if not hasattr(router, BIAS)]
        if settings.bias_rate and missing:
            raise ConfigError(
                f"bias_update_rate: {missing[0]} of {type(model).__name__} has no {BIAS}; balance this family with "
                "sequence_loss"
            )
        self._score = _score_function(model.config, not missing)
        first = next(module for module in model.modules() if isinstance(module, ExpertParallel))
        self._num_experts = first.moe_runtime_layer.placement.num_experts
        self._seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.load = torch.zeros(len(self.routers), self._num_experts, dtype=torch.int64)  # of this rank, since step()
        self._hooks = [
            router.register_forward_hook(self._watch(layer)) for layer, router in enumerate(self.routers.values())
        ]

    def _watch(self, layer: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any, out: Any) -> None:
            if not (module.training and torch.is_grad_enabled()):
                return  # validation
            logits, ids = out[0], out[-1]
            self.load[layer] += torch.bincount(ids.reshape(-1).cpu(), minlength=self._num_experts)
            self._seen[layer] = (logits, ids)

        return hook

    def loss(self, sequences: int, all_sequences: int, all_tokens: int) -> torch.Tensor | float:
        """The terms of this rank's latest forward pass, such that the sum over ranks is the mean over the joined batch.

        sequences: this rank's, of equal length. all_sequences, all_tokens: of all ranks (and micro-batches) of a step.
        """
        total: torch.Tensor | float = 0.0
        for logits, ids in self._seen.values() if sequences else ():
            if self.settings.sequence_weight:
                scores = self._score(logits.float())
                total = total + self.settings.sequence_weight / all_sequences * sequence_loss(scores, ids, sequences)
            if self.settings.z_weight:
                total = total + self.settings.z_weight / all_tokens * z_loss(logits)
        self._seen.clear()
        return total

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """Move the biases by the load of the step that has ended; returns that load [L, E] of all ranks."""
        load = self.load
        self._transport.all_reduce(load, "load of all ranks")
        self.load = torch.zeros_like(load)
        if self.settings.bias_rate:
            for layer, router in enumerate(self.routers.values()):
                bias = getattr(router, BIAS)
                bias += bias_step(load[layer], self.settings.bias_rate).to(bias)
        return load

    def close(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()


def find_routers(model: Any) -> dict[str, torch.nn.Module]:
    """Name and module of each expert layer's router: the sibling of the experts that chooses."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, ExpertParallel):
            parent_name = name.rpartition(".")[0]
            parent = model.get_submodule(parent_name)
            which = next((n for n in _ROUTERS if isinstance(getattr(parent, n, None), torch.nn.Module)), None)
            if which is None:
                raise ConfigError(f"{type(model).__name__}: no router ({' or '.join(_ROUTERS)}) beside {name}")
            found[f"{parent_name}.{which}"] = getattr(parent, which)
    return found


def _score_function(config: Any, has_bias: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the family's router makes of its logits. V3 and its kin have a bias and take the sigmoid."""
    named = getattr(config.get_text_config(), "scoring_func", "sigmoid" if has_bias else "softmax")
    functions = {
        "sigmoid": torch.sigmoid,
        "softmax": lambda logits: logits.softmax(-1),
        "sqrtsoftplus": lambda logits: torch.nn.functional.softplus(logits).sqrt(),
    }
    if named not in functions:
        raise ConfigError(f"sequence_loss: router scores {named!r} are not known; known: {', '.join(functions)}")
    return functions[named]

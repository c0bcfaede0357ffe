"""Model surgery: transformers' own model, on the meta device, with its experts modules made expert-parallel.

The model stays transformers' own class; a subclass under the same name adds two things that a sharded model needs: a
forward for a rank that has no sequence, and a `generate` that keeps taking part in expert layers until every rank has
finished.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .checkpoint import form_of_quantization
from .comm.dispatch import Dispatcher
from .core.errors import CheckpointError, ConfigError
from .core.placement import Placement
from .experts.compute import expert_parameters
from .experts.routing import ReplicaChooser
from .layer import ExpertParallel, LayerState, expert_parallel_class, experts_modules


class ExpertParallelModel:
    """Mixed into a transformers model class; `moe_runtime_join` is the runtime's join context for this model."""

    moe_runtime_join: Callable[[], Any]

    def run_without_tokens(self) -> torch.Tensor:
        """Take part in one forward pass with no token. Returns an empty tensor whose backward takes part as well."""
        layers = expert_layers(self)
        dispatcher = layers[0].moe_runtime_layer.dispatcher
        chain = dispatcher.no_rows().requires_grad_(torch.is_grad_enabled())
        for layer in layers:
            chain = layer.idle_exchange(chain)
        return chain


def expert_layers(model: Any) -> list[ExpertParallel]:
    """The model's expert-parallel layers in the order it runs them."""
    return [module for module in model.modules() if isinstance(module, ExpertParallel)]


@functools.cache
def expert_parallel_model_class(base: type) -> type:
    """The subclass of a transformers model class that ranks without work can call like the others."""

    @functools.wraps(base.forward)
    def forward(self, *args, **kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None or ids.numel():
            return base.forward(self, *args, **kwargs)
        chain = self.run_without_tokens()
        vocabulary = self.config.get_text_config().vocab_size
        logits = torch.zeros(*ids.shape, vocabulary, dtype=chain.dtype, device=chain.device)
        loss = chain.sum().float() if kwargs.get("labels") is not None else None
        return CausalLMOutputWithPast(loss=loss, logits=logits + chain.sum())

    @functools.wraps(base.generate)
    def generate(self, inputs=None, *args, **kwargs):
        ids = kwargs.get("input_ids") if inputs is None else inputs
        with self.moe_runtime_join():
            if ids is not None and not ids.numel():
                return ids
            return base.generate(self, inputs, *args, **kwargs)

    namespace = {"__module__": base.__module__, "__doc__": base.__doc__, "forward": forward, "generate": generate}
    return type(base.__name__, (ExpertParallelModel, base), namespace)


def read_config(path: Path) -> PretrainedConfig:
    """A checkpoint's config.json, without its quantization_config once we know we can read that format.

    Raises CheckpointError for one that cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        said = " ".join(str(error).split("\n\n")[0].split())  # the first paragraph, in one line
        raise CheckpointError(f"{path / 'config.json'}: transformers cannot read it ({said})") from error
    if form_of_quantization(getattr(config, "quantization_config", None), path / "config.json"):
        del config.quantization_config
    return config


def empty_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' model for this config with every tensor on the meta device: no memory, no initialisation."""
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        except (ValueError, KeyError, ImportError, AssertionError) as error:  # torch asserts on ids of padding
            raise ConfigError(f"transformers cannot build model_type {config.model_type!r}: {error}") from error
    if not experts_modules(model):
        raise ConfigError(
            f"{type(model).__name__} has no experts module of transformers' experts interface; moe-runtime has "
            "nothing to shard (is this a dense model?)"
        )
    return model


def shard_experts(
    model: PreTrainedModel,
    placement: Placement,
    make_dispatcher: Callable[[int, int, torch.dtype], Dispatcher],
    make_chooser: Callable[[int], ReplicaChooser],
    rank: int,
    *,
    slowdown: float,
    per_expert_sums: bool,
    transformers_kernel: bool,
    join: Callable[[PreTrainedModel], Any],
) -> None:
    """Make the model expert-parallel in place: every experts module keeps only this rank's slots (still on meta).

    make_dispatcher(hidden_size, top_k, dtype) is called once per distinct shape, make_chooser(layer) once per layer.
    """
    modules = experts_modules(model)
    if placement.num_layers != len(modules):
        raise ConfigError(f"placement has {placement.num_layers} layers, the model has {len(modules)} expert layers")
    top_k = routing_top_k(model.config)
    for index, (name, module) in enumerate(modules.items()):
        if module.num_experts != placement.num_experts:
            raise ConfigError(f"{name} has {module.num_experts} experts, the placement {placement.num_experts}")
        slots = placement.rank_slots(rank)
        for parameter_name in expert_parameters(module):
            whole = getattr(module, parameter_name)
            part = torch.empty((slots.stop - slots.start, *whole.shape[1:]), dtype=whole.dtype, device="meta")
            setattr(module, parameter_name, torch.nn.Parameter(part, requires_grad=whole.requires_grad))
        module.num_experts = slots.stop - slots.start
        module._is_expert_parallel = True
        module.__class__ = expert_parallel_class(type(module))
        hidden = hidden_size_of(module)
        module.moe_runtime_layer = LayerState(
            index=index,
            placement=placement,
            dispatcher=make_dispatcher(hidden, top_k, module.down_proj.dtype),
            chooser=make_chooser(index),
            per_expert_sums=per_expert_sums,
            transformers_kernel=transformers_kernel,
            tokens_per_slot=np.zeros(slots.stop - slots.start, dtype=np.int64),
            slowdown=slowdown,
        )
    model.__class__ = expert_parallel_model_class(type(model))
    model.moe_runtime_join = functools.partial(join, model)


def routing_top_k(config: PretrainedConfig) -> int:
    """How many experts a token selects, whatever the family calls it."""
    text = config.get_text_config()
    for name in ("num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_top_k", "top_k_experts", "moe_k"):
        value = getattr(text, name, None)
        if isinstance(value, int):
            return value
    raise ConfigError(f"config of model_type {config.model_type!r} does not say how many experts a token selects")


def hidden_size_of(module: torch.nn.Module) -> int:
    """H of an experts module, from the shape of its down projection ([E, H, I], or [E, I, H] when transposed)."""
    return module.down_proj.shape[2] if module.is_transposed else module.down_proj.shape[1]

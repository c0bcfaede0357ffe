"""What a model's config says about sizes: experts, layers, bytes. No weights are read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.cluster import Node
from ...core.errors import CheckpointError, ConfigError

# Bytes of a weight; FP8 and INT8 with one float32 scale for 128 x 128 weights.
_IN_BLOCKS = 1.0 + 4.0 / (128 * 128)
EXPERT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "fp8": _IN_BLOCKS, "int8": _IN_BLOCKS}


@dataclass(frozen=True)
class ModelShape:
    """layers: expert layers' numbers in the model, where their names say so. expert_weights: of one expert of one
    layer. dense_weights: all others, which every rank holds; of them embedding_weights are looked up and not multiplied
    (0 where they are tied to the head), head_weights make logits. stored: the dtype the experts are held in.
    cache: of the KV cache, (values per token, window in tokens or None) for each kind of layer; None: not known.
    expand_weights: multiply-adds of each cached token in each decode step: MLA's latent becomes keys and values anew.
    """

    name: str
    num_layers: int
    num_experts: int
    top_k: int
    hidden: int
    expert_weights: int
    dense_weights: int
    stored: str
    dense_bytes_per_weight: float
    layers: tuple[int, ...] | None = None
    embedding_weights: int = 0
    head_weights: int = 0
    cache: tuple[tuple[int, int | None], ...] | None = None
    expand_weights: int = 0

    def cache_bytes(self, tokens: int) -> float | None:
        """Of one sequence's KV cache, all layers, in the dense part's dtype; None where it is not known."""
        if self.cache is None:
            return None
        kept = sum(values * min(tokens, tokens if window is None else window - 1) for values, window in self.cache)
        return kept * self.dense_bytes_per_weight

    @property
    def expert_bytes(self) -> float:
        """Of one expert of one layer."""
        return self.expert_weights * EXPERT_BYTES[self.stored]

    def held_on(self, node: Node) -> str:
        """What a node's ranks hold experts in: its own word, else the job's."""
        return node.expert_dtype or self.stored

    def expert_bytes_on(self, node: Node) -> float:
        """Of one expert of one layer on a node's ranks."""
        return self.expert_weights * EXPERT_BYTES[self.held_on(node)]

    @property
    def dense_bytes(self) -> float:
        return self.dense_weights * self.dense_bytes_per_weight

    @property
    def products_per_row(self) -> int:
        """Multiply-adds of one token in one of its experts: each weight once."""
        return self.expert_weights


def read_shape(path: str | Path, dtype: str = "auto") -> ModelShape:
    """The shape of a model folder, or of a bare config.json; transformers builds the model without memory.

    dtype: what experts are held in; "auto" takes FP8 or INT8 where the checkpoint has it, else the config's. Raises
    ConfigError or CheckpointError for what cannot be read, or has no experts.
    """
    from transformers import AutoConfig

    from ...checkpoint import QUANT_METHODS

    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        quantized = fields.pop("quantization_config", None)
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot read the model's config ({error.strerror}); check the path") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        said = " ".join(str(error).split("\n\n")[0].split())
        raise CheckpointError(f"{file}: no config that transformers can read ({said})") from None
    stored = dtype
    if dtype == "auto":
        form = QUANT_METHODS.get((quantized or {}).get("quant_method"))
        stored = form or str(config.dtype or "bfloat16").removeprefix("torch.")
    return shape_of(config, str(path), stored)


def shape_of(config: Any, name: str, stored: str) -> ModelShape:
    """The shape of a transformers config whose experts are held in `stored`. `name` is what errors call it."""
    import torch

    from ...layer import experts_modules
    from ...model import empty_model, hidden_size_of, routing_top_k
    from ...recorder import layer_numbers

    if stored not in EXPERT_BYTES:
        raise ConfigError(f"{name}: dtype {stored!r}; choose one of {', '.join(EXPERT_BYTES)} with --dtype")
    held = torch.bfloat16 if EXPERT_BYTES[stored] < 2 else getattr(torch, stored)
    model = empty_model(config, held)
    modules = experts_modules(model)
    first = next(iter(modules.values()))
    counts = {(m.num_experts, sum(p.numel() for p in m.parameters(recurse=False))) for m in modules.values()}
    if len(counts) > 1:
        raise ConfigError(f"{name}: expert layers of different sizes {sorted(counts)}; plan takes layers alike")
    (num_experts, weights), *_ = counts
    dense = sum(p.numel() for p in model.parameters()) - weights * len(modules)
    return ModelShape(
        f"{config.model_type} ({name})",
        len(modules),
        num_experts,
        routing_top_k(config),
        hidden_size_of(first),
        weights // num_experts,
        dense,
        stored,
        held.itemsize,
        layer_numbers(list(modules)),
        *_vocabulary_weights(model),
        cache_of(config),
        sum(p.numel() for name, p in model.named_parameters() if name.endswith("self_attn.kv_b_proj.weight")),
    )


def _vocabulary_weights(model: Any) -> tuple[int, int]:
    """(embedding_weights, head_weights) of a ModelShape."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        return embedding.weight.numel(), 0
    tied = model.config.tie_word_embeddings or head.weight is embedding.weight
    return 0 if tied else embedding.weight.numel(), head.weight.numel()


def cache_of(config: Any) -> tuple[tuple[int, int | None], ...] | None:
    """`cache` of a ModelShape, as transformers keeps it: of MLA the compressed latent and the rotary key, else keys and
    values; layers with a sliding window keep one token less than it. None for models with a cache of their own kind.
    """
    if any(hasattr(config, name) for name in ("compress_rates", "compress_ratios")):  # DeepSeek-V4
        return None
    if getattr(config, "kv_lora_rank", None):
        values = config.kv_lora_rank + config.qk_rope_head_dim + (getattr(config, "index_head_dim", None) or 0)
    else:
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        values = 2 * size * config.num_key_value_heads
    window, layers = getattr(config, "sliding_window", None), config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * layers
    sliding = kinds.count("sliding_attention") if window else 0
    found = ((values * (layers - sliding), None), (values * sliding, window))
    return tuple(kind for kind in found if kind[0])

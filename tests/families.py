"""Small models of every family that tests cover, and checkpoints of them written by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_COMMON = dict(
    vocab_size=128, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256,
    pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
_MLA = dict(
    q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, num_key_value_heads=4
)
_DEEPSEEK = dict(
    moe_intermediate_size=24, intermediate_size=64, n_routed_experts=16, num_experts_per_tok=4, n_shared_experts=1,
    n_group=4, topk_group=2, first_k_dense_replace=1, routed_scaling_factor=1.5,
)  # fmt: skip

# model_type -> config fields. 16 experts, so that 3 ranks do not divide them.
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        **_COMMON, **_MLA, **_DEEPSEEK, "topk_method": "group_limited_greedy", "norm_topk_prob": False,
    },
    "deepseek_v3": {**_COMMON, **_MLA, **_DEEPSEEK, "norm_topk_prob": True},
    "deepseek_v32": {
        **_COMMON, **_MLA, **_DEEPSEEK, "norm_topk_prob": True, "index_topk": 8, "index_n_heads": 4,
        "index_head_dim": 16,
    },
    "deepseek_v4": {
        **_COMMON, "num_key_value_heads": 1, "moe_intermediate_size": 24, "intermediate_size": 24,
        "n_routed_experts": 16, "num_experts_per_tok": 4, "n_shared_experts": 1, "head_dim": 16, "q_lora_rank": 24,
        "o_lora_rank": 16, "o_groups": 2, "index_n_heads": 4, "index_head_dim": 16, "index_topk": 8,
        "num_hidden_layers": 3, "sliding_window": 16, "hc_mult": 2,
    },
    "qwen3_moe": {
        **_COMMON, "num_key_value_heads": 2, "head_dim": 12, "num_experts": 16, "num_experts_per_tok": 4,
        "moe_intermediate_size": 24, "intermediate_size": 64, "norm_topk_prob": True, "decoder_sparse_step": 1,
    },
    "mixtral": {
        **_COMMON, "num_key_value_heads": 2, "num_local_experts": 16, "num_experts_per_tok": 2,
        "intermediate_size": 24, "sliding_window": None,
    },
    "olmoe": {
        **_COMMON, "num_key_value_heads": 2, "num_experts": 16, "num_experts_per_tok": 8, "intermediate_size": 24,
    },
    "glm4_moe": {
        **_COMMON, "num_key_value_heads": 2, "head_dim": 12, "n_routed_experts": 16, "num_experts_per_tok": 4,
        "n_shared_experts": 1, "moe_intermediate_size": 24, "intermediate_size": 64, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "partial_rotary_factor": 0.5,
    },
    "gpt_oss": {
        **_COMMON, "num_key_value_heads": 2, "head_dim": 12, "num_local_experts": 16, "num_experts_per_tok": 4,
        "intermediate_size": 24, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"],
    },
}  # fmt: skip


def family_config(family: str, **changes: Any):
    return AutoConfig.for_model(family, **{**FAMILIES[family], **changes})


def reference_model(family: str, seed: int = 0, **changes: Any):
    """transformers' own model with random weights large enough for routing and experts to matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(family_config(family, **changes), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point() and value.dim() >= 2:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.15)
            elif name.endswith("e_score_correction_bias"):
                value.copy_(torch.randn(value.shape, generator=generator) * 0.05)
            elif name.endswith("tid2eid"):  # V4's hash routing table: distinct experts per token id
                rows = [torch.randperm(model.config.n_routed_experts, generator=generator) for _ in value]
                value.copy_(torch.stack(rows)[:, : value.shape[1]])
    return model


def write_checkpoint(folder: Path, family: str, **changes: Any):
    """Save a reference model with transformers' save_pretrained; returns the model."""
    model = reference_model(family, **changes)
    model.save_pretrained(folder)
    return model

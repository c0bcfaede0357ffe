"""A training loop of your own, to copy and change: `moe-launch run -m moe_runtime.launch.jobs.custom`.

A small DeepSeek-V3 from a config, its experts spread over the ranks, plain torch around it. Every rank works on its
own tokens; started by moe-launch, torchrun, mpirun or srun, or alone.
"""

from __future__ import annotations

import torch
from transformers import AutoConfig

import moe_runtime

STEPS = 30


def main() -> None:
    config = AutoConfig.for_model(
        "deepseek_v3",
        vocab_size=256, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=16, v_head_dim=16, n_routed_experts=16, num_experts_per_tok=4, n_shared_experts=1, n_group=4,
        topk_group=2, first_k_dense_replace=1,
    )  # fmt: skip
    with moe_runtime.init() as runtime:
        model = runtime.create_model(config, seed=0)  # this rank's experts only
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        numbers = torch.Generator().manual_seed(runtime.rank)
        for step in range(STEPS):
            start = torch.randint(256, (4, 1), generator=numbers)
            ids_BT = ((start + torch.arange(17)) % 256).to(runtime.device)  # to learn: count up
            logits = model(input_ids=ids_BT[:, :-1]).logits.flatten(0, 1)
            # A sum, divided by the tokens of all ranks: gradients then add up over ranks.
            loss = torch.nn.functional.cross_entropy(logits, ids_BT[:, 1:].flatten()) / runtime.size
            optimizer.zero_grad()
            loss.backward()
            runtime.sync_gradients(model)
            optimizer.step()
            if runtime.rank == 0 and (step + 1) % 15 == 0:
                print(f"step {step + 1}: loss of rank 0's tokens {loss.item() * runtime.size:.3f}", flush=True)


if __name__ == "__main__":
    main()

"""The jobs as a user starts them: `moe-launch train` and `moe-launch generate` on two ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_runtime.experts import placement, traces

CONFIG = """
cluster = "cluster.toml"
files = ["text/*.py"]
output = "out/checkpoint"
record = "trained.npz"
sequence_length = 32
batch_size = 3
steps = 12
log_every = 4
learning_rate = 1e-2
warmup_steps = 2

[model]
model_type = "deepseek_v3"
vocab_size = 258
eos_token_id = 256
pad_token_id = 257
bos_token_id = 256
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 2
q_lora_rank = 16
kv_lora_rank = 16
qk_nope_head_dim = 16
qk_rope_head_dim = 8
v_head_dim = 16
intermediate_size = 48
first_k_dense_replace = 1
n_routed_experts = 16
num_experts_per_tok = 4
n_group = 4
topk_group = 2
n_shared_experts = 1
moe_intermediate_size = 16
"""
CLUSTER = '[[node]]\nname = "a"\nspeed = 10\n\n[[node]]\nname = "b"\nspeed = 6\n'


def moe_launch(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "moe_runtime.launch.cli", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=180)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a config, a cluster file, and what `moe-launch train` made of them."""
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "text").mkdir()
    (folder / "text" / "a.py").write_text("def f(x):\n    return x + 1\n" * 80)
    (folder / "train.toml").write_text(CONFIG)
    (folder / "cluster.toml").write_text(CLUSTER)
    done = moe_launch("train", "train.toml", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "train.stdout").write_text(done.stdout)
    return folder


def test_training_shows_its_progress_and_writes_a_checkpoint_for_transformers(trained):
    shown = (trained / "train.stdout").read_text()
    assert "slots per rank [10, 6] for 16 experts" in shown
    for step in (4, 8, 12):
        assert f"step {step:>5}/12" in shown
    assert "tokens/s" in shown and "rank0 " in shown and "rank1 " in shown
    checkpoint = trained / "out" / "checkpoint"
    trace = traces.read_load(trained / "trained.npz")
    assert trace.load.shape[0] == 12 and len(set(trace.load.sum(axis=(1, 2)))) == 1  # every step has as many tokens
    losses = [json.loads(line)["loss"] for line in (checkpoint / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] < 6
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = "naïve ✓ def\n"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = torch.tensor([tokenizer.encode("def f(x):\n    return x + 1\ndef f(x):\n")])
    assert model(ids, labels=ids).loss.item() < 4.5  # uniform guessing over 258 tokens is 5.55


def test_generate_keeps_order_reports_bad_lines_and_equals_transformers(trained):
    prompts = ["def f(x):", "def", "    return", "x", "return x + 1\n"]
    lines = [json.dumps({"prompt": p}) for p in prompts]
    lines[1:1] = ["not json", '{"promt": "x"}', ""]
    (trained / "in.jsonl").write_text("\n".join(lines) + "\n")
    done = moe_launch(
        "generate", "--nproc-per-node", "2", "--model", "out/checkpoint", "--input", "in.jsonl", "--output",
        "answers.jsonl", "--max-new-tokens", "8", "--batch-size", "2", cwd=trained,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr  # two lines could not be read; the rest is done
    assert "in.jsonl, line 2: not JSON" in done.stderr and "in.jsonl, line 3: needs" in done.stderr
    assert "5 prompts, 40 new tokens" in done.stderr and "2 bad lines" in done.stderr
    answers = [json.loads(line) for line in (trained / "answers.jsonl").read_text().splitlines()]
    assert [answer["line"] for answer in answers] == [1, 2, 3, 5, 6, 7, 8]
    assert [answer["prompt"] for answer in answers if "prompt" in answer] == prompts
    assert all("error" in answers[at] for at in (1, 2))
    model = AutoModelForCausalLM.from_pretrained(trained / "out" / "checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(trained / "out" / "checkpoint")
    for answer in answers:
        if "prompt" in answer:
            ids = torch.tensor([tokenizer.encode(answer["prompt"])])
            expected = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
            assert answer["text"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_generate_json_is_one_object_on_stdout(trained):
    done = moe_launch(
        "generate", "--nproc-per-node", "2", "--model", "out/checkpoint", "--prompt", "def f", "--max-new-tokens", "4",
        "--json", "--temperature", "0.7", "--seed", "3", cwd=trained,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["prompts"] == 1 and report["tokens"] == 4 and len(report["results"]) == 1


def test_a_recorded_load_becomes_a_plan_that_generates_the_same(trained):
    words = ["generate", "--nproc-per-node", "2", "--model", "out/checkpoint", "--prompt", "def f", "--json"]
    first = moe_launch(*words, "--max-new-tokens", "6", "--record", "load.npz", cwd=trained)
    assert first.returncode == 0, first.stderr
    trace = traces.read_load(trained / "load.npz")
    placement.save_plan(placement.plan(trace.total, 2, 24), trained / "plan.json")
    words += ["--max-new-tokens", "6", "--placement", "plan.json", "--runtime", "replica_choice=balanced"]
    second = moe_launch(*words, cwd=trained)
    assert second.returncode == 0, second.stderr
    assert "slots per rank [12, 12] for 16 experts" in second.stderr and "balanced by every" in second.stderr
    assert "placement: the busiest rank of each layer computed" in second.stderr and "times as many" in second.stderr
    assert json.loads(second.stdout)["results"] == json.loads(first.stdout)["results"]
    moved = moe_launch(*words[:-2], "--max-new-tokens", "6", "--rebalance", cwd=trained)
    assert moved.returncode == 0 and "times as many" in moved.stderr, moved.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "train.toml", "--set", "stepz=3"], "unknown key 'stepz'"),
        (["train", "train.toml", "--set", "model.hidden_sise=3"], "no setting 'hidden_sise'"),
        (["train", "train.toml", "--set", "files=['nothing/*.txt']"], "matches no file"),
        (["train", "--nproc-per-node", "3", "train.toml"], "describes 2 ranks, 3 were started"),
        (["train", "train.toml", "--set", "learning_rate=fast"], "learning_rate must be a number"),
        (["train", "missing.toml"], "missing.toml"),
        (["generate", "--model", "text", "--prompt", "x"], "no config.json"),
        (["generate", "--model", "out/checkpoint"], "give --prompt"),
        (
            ["generate", "--model", "out/checkpoint", "--prompt", "x", "--output", "no/such/x.jsonl"],
            "cannot be written",
        ),
    ],
)
def test_a_users_mistake_is_one_clear_line_and_exit_code_2(trained, words, told):
    done = moe_launch(*words, cwd=trained)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr

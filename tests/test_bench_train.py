"""`moe-launch bench train` in small: all subjects train the same model alike, and the report says what it must."""

from __future__ import annotations

import json

import pytest

from moe_runtime.core.errors import ConfigError, MoeRuntimeError
from moe_runtime.launch.bench import train, train_layer
from moe_runtime.launch.bench.model import SHAPE

SMALL = {
    **SHAPE, "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "n_group": 2, "topk_group": 2, "q_lora_rank": 64, "kv_lora_rank": 32,
}  # fmt: skip


def test_all_subjects_train_alike_and_their_steps_are_told(capsys, monkeypatch):
    monkeypatch.setattr(train_layer.importlib.util, "find_spec", lambda name: None)
    words = ["--rounds", "2", "--sequences", "4", "--length", "32", "--profile", "--json"]
    assert train.main(words, SMALL) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["subjects"]) == ["moe-runtime", "transformers", "transformers-ep"]
    ours = report["subjects"]["moe-runtime"]
    assert "rank 0 of 2" in ours["description"] and ours["losses"][-1] < ours["losses"][0] - 0.05  # it does learn
    for row in report["subjects"].values():
        assert row["losses"] == pytest.approx(ours["losses"], rel=train.LOSS_TOLERANCE)
        assert row["norms"] == pytest.approx(ours["norms"], rel=train.NORM_TOLERANCE)
        assert sum(row["parts_s"].values()) == pytest.approx(row["step_s"]["median"], rel=0.5)
        assert row["tokens_per_s"] > 0 and row["this_over_ours"]["median"] > 0 and row["peak_gib"] > 0
    assert {"dispatch", "experts", "combine", "attention", "experts (backward)", "sync"} <= set(report["profile"])
    assert report["layer"] == {"skipped": train_layer.MISSING}
    assert "pip install" in train.render(report) and "transformers-ep" in train.render(report)


class Told:
    def __init__(self, name: str, loss: float, norm: float) -> None:
        self.name, self.answers = name, [[{"loss": loss / 2, "norm": norm}, {"loss": loss / 2, "norm": norm}]]


@pytest.mark.parametrize(
    ("loss", "norm", "what"), [(6.1, 1.0, "loss"), (6.0, 2.0, "norm"), (float("nan"), 1.0, "loss")]
)
def test_a_subject_that_computes_something_else_ends_the_bench(loss, norm, what):
    with pytest.raises(MoeRuntimeError, match=f"step 1: other has .*{what}"):
        train.check_equal([Told("ours", 6.0, 1.0), Told("other", loss, norm)])


@pytest.mark.parametrize("words", ["--ranks 0", "--sequences 3", "--layers 1", "--ranks 3 --sequences 6", "--rounds 0"])
def test_what_cannot_be_measured_is_refused(words):
    with pytest.raises(ConfigError, match="bench train: "):
        train.main(words.split(), SMALL)

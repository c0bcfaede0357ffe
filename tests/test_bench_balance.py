"""`moe-launch bench balance` in small: it measures what it says it does."""

from __future__ import annotations

import json

import pytest

from moe_runtime.core.errors import ConfigError
from moe_runtime.launch.bench import balance

SMALL = ["--experts", "8", "--hidden", "256", "--intermediate", "256", "--top-k", "2", "--rounds", "3"]


def test_a_slowed_rank_is_slow_and_gets_less_work(capsys):
    assert balance.main([*SMALL, "--tokens", "512", "--speed", "0.25", "--skew", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert "emulated speed 0.25" in report["describe"]
    found = report["skew"]["1.0"]
    full, slowed = found["own_with_the_other_idle"]
    assert 0.15 < slowed / full < 0.35
    for row in found["subjects"].values():
        assert sum(row["rank_rows"]) == 512 * 2 and sum(row["slots"]) in (8, 12) and row["tokens_per_s"] > 0
    even, balanced = (found["subjects"][name] for name in ("even", "planned, balanced"))
    assert balanced["rank_rows"][1] < 0.35 * 1024 and balanced["rank_rows"][1] < even["rank_rows"][1]
    assert set(report["recorder"]) == {"16", "2048"}


@pytest.mark.parametrize("words", [["--speed", "0"], ["--speed", "2"], ["--top-k", "99"], ["--rounds", "0"]])
def test_what_cannot_be_measured_is_refused(words):
    with pytest.raises(ConfigError, match="bench balance: "):
        balance.main(words)

"""A small crowd of agents at the real coordinator; `python tests/agents.py` is the same with a thousand."""

from __future__ import annotations

from pathlib import Path

from agents import SILENCE_S, Crowd

from moe_runtime.control.coordinator import FENCE_S


def test_every_agent_knows_the_view_after_a_death(tmp_path: Path) -> None:
    with Crowd(40, tmp_path) as crowd:
        crowd.everybody_knows(1)
        told = crowd.end(2, told=True)
        assert len(told) == 38 and max(told) < SILENCE_S  # it did not wait for silence
        silent = crowd.end(1, told=False)
        assert len(silent) == 37 and SILENCE_S < min(silent)
        assert max(silent) < 3 * (SILENCE_S + FENCE_S)
        assert {one.agent.newest.members for one in crowd.agents.values()} == {tuple(range(3, 40))}

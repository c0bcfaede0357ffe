"""The training job: as transformers trains, going on after any ending, and clear about what is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import train_faults
from ranks import RankFailed, run_ranks
from test_jobs import CLUSTER, CONFIG, moe_launch
from transformers import AutoConfig, AutoModelForCausalLM

import moe_runtime
from moe_runtime.launch.data import Batches, open_corpus
from moe_runtime.launch.tokenizers import byte_tokenizer
from moe_runtime.launch.toml import apply_overrides, read_toml
from moe_runtime.launch.training.config import TrainConfig, learning_rate
from moe_runtime.launch.training.loop import train

TEXT = "".join(f"def f{n}(x, y):\n    return x + y * {n}\n" for n in range(300))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    (folder / "text").mkdir()
    (folder / "text" / "a.py").write_text(TEXT)
    (folder / "train.toml").write_text(CONFIG)
    (folder / "cluster.toml").write_text(CLUSTER)
    return folder


def settings(folder: Path, **changes) -> TrainConfig:
    table = {**read_toml(folder / "train.toml"), **changes}
    for name in ("cluster", "record"):
        table.pop(name)
    return TrainConfig.from_table(table, "train.toml")


def run(folder: Path, config: TrainConfig) -> list[float]:
    with moe_runtime.init({"timeout_s": 60}) as runtime:
        return train(config, folder, runtime)


def rows(folder: Path, output: str) -> list[dict]:
    return [json.loads(line) for line in (folder / output / "metrics.jsonl").read_text().splitlines()]


# ---- the same as one process of transformers -------------------------------------------------------------------------


def plain_losses(config: TrainConfig, base: Path) -> tuple[list[float], torch.nn.Module]:
    """transformers' own model and torch's AdamW on the same batches, from the weights that the job begins with."""
    run_ranks(save_fresh, 1, config, base)
    model = AutoModelForCausalLM.from_pretrained(base / "fresh").train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=config.weight_decay)
    corpus = open_corpus(config.files, base, byte_tokenizer())
    batches, losses = Batches(corpus.tokens, config.sequence_length, config.batch_size, config.seed), []
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        ids = batches.of_rank(step, 0, 1)
        loss = F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses, model.eval()


def save_fresh(config: TrainConfig, base: Path) -> None:
    with moe_runtime.init() as runtime:
        fields = dict(config.model)
        model = runtime.create_model(AutoConfig.for_model(fields.pop("model_type"), **fields), seed=config.seed)
        runtime.save_model(model, base / "fresh")


def test_training_reaches_the_validation_loss_of_transformers_alone(folder):
    """Forty steps on two ranks, in three parts a step, everything computed again: losses, and validation to 1 %."""
    config = settings(
        folder, steps=40, output="whole", accumulate=3, recompute="all", validation_files=["text/a.py"],
        validate_every=20, validation_sequences=8,
    )  # fmt: skip
    ours = run_ranks(run, 2, folder, config)
    theirs, model = plain_losses(config, folder)
    np.testing.assert_allclose(ours[0], theirs, rtol=2e-3)
    assert theirs[-1] < 0.6 * theirs[0]
    validated = [row for row in rows(folder, "whole") if "validation_loss" in row]
    assert [row["step"] for row in validated] == [20, 40]
    tokens = open_corpus(config.files, folder, byte_tokenizer()).tokens
    windows = len(tokens) // 32
    at = [(2 * n + 1) * windows // 16 * 32 for n in range(8)]
    ids = torch.from_numpy(np.stack([tokens[a : a + 33] for a in at]).astype(np.int64))
    with torch.no_grad():
        expected = F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    assert validated[-1]["validation_loss"] == pytest.approx(expected, rel=0.01)


def test_the_metrics_say_where_time_goes_and_how_every_layer_is_loaded(folder):
    config = settings(folder, output="measured", bias_update_rate=0.001, sequence_loss=0.01, z_loss=0.001,
                      tensorboard="board", profile="traces", profile_from=3)  # fmt: skip
    run_ranks(run, 2, folder, config)
    row = rows(folder, "measured")[-1]
    shares = row["time_share"]
    assert set(shares) == {"attention", "dispatch", "experts", "combine"}
    assert all(0 < share < 1 for share in shares.values()) and sum(shares.values()) < 1
    assert len(row["layers"]["entropy"]) == 1 and 0 < row["layers"]["entropy"][0] <= 1
    assert row["layers"]["max_over_mean"][0] >= 1 and row["layers"]["slowest_rank"][0] in (0, 1)
    assert row["balancing_loss"] > 0 and row["grad_norm"] > 0 and len(row["memory_gib"]) == 2
    assert list((folder / "board").glob("events.out.tfevents*"))
    for rank in (0, 1):
        trace = json.loads((folder / "traces" / f"rank_{rank}.json").read_text())
        names = {event.get("name") for event in trace["traceEvents"]}
        wanted = {f"{part}{way}" for part in ("dispatch", "experts", "combine") for way in ("", " (backward)")}
        assert wanted | {"attention"} <= names


# ---- going on --------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_to_the_bit_on_its_ranks_and_to_rounding_on_others(folder):
    common = dict(checkpoints="state", checkpoint_every=5, bias_update_rate=0.001, batch_size=4)
    straight = run_ranks(run, 2, folder, settings(folder, **common | {"checkpoints": None}, output="straight"))
    run_ranks(run_until, 2, folder, settings(folder, **common, output="parts"), 5)
    assert sorted(path.name for path in (folder / "state").iterdir()) == ["step-000005"]
    copied = folder / "state3"
    subprocess.run(["cp", "-r", folder / "state", copied], check=True)
    again = run_ranks(run, 2, folder, settings(folder, **common, output="parts"))
    assert again[0] == straight[0][5:]
    assert [row["step"] for row in rows(folder, "parts")] == [4, 8, 12]
    other = run_ranks(run, 3, folder, settings(folder, **common | {"checkpoints": "state3"}, output="three"))
    np.testing.assert_allclose(other[0], straight[0][5:], rtol=1e-4)


class _Stopped(Exception):
    pass


def run_until(folder: Path, config: TrainConfig, steps: int) -> None:
    """A run that ends as a crash would, in the middle of the step after `steps`, with its last save on disk."""
    from moe_runtime.launch.training.loop import Trainer

    step, done = Trainer.step, [0]

    def counted(self, number, stop=False):
        if number == steps:
            while not (folder / config.checkpoints / f"step-{steps:06}").is_dir():
                time.sleep(0.05)
            raise _Stopped
        return step(self, number, stop)

    Trainer.step = counted
    try:
        run(folder, config)
    except _Stopped:
        done[0] = 1
    finally:
        Trainer.step = step
    assert done[0]


def test_another_batch_size_than_the_checkpoints_is_refused(folder):
    config = settings(folder, checkpoints="state", batch_size=3, output="other")
    with pytest.raises(RankFailed, match="batch_size is 3, but the checkpoints in .*state are of a run with 4"):
        run_ranks(run, 1, folder, config)
    run_ranks(
        run, 1, folder, settings(folder, checkpoints="state", batch_size=3, output="other", resume=False, steps=2)
    )


@pytest.fixture(scope="module")
def long_run(folder) -> dict:
    """A whole run over the command line, and its settings."""
    words = ["--set", "steps=60", "--set", "checkpoint_every=4", "--set", "log_every=1",
             "--set", "batch_size=8", "--set", "sequence_length=64"]  # fmt: skip
    (folder / "long.toml").write_text(CONFIG.replace('record = "trained.npz"\n', ""))
    done = moe_launch("train", "long.toml", *words, "--set", "output=long", cwd=folder)
    assert done.returncode == 0, done.stderr
    return {"words": words, "losses": [row["loss"] for row in rows(folder, "long")]}


def start(folder: Path, words: list[str], name: str, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "moe_runtime.launch.cli", "train", *options, "long.toml", *words]
    command += ["--set", f"output={name}", "--set", f"checkpoints={name}-state"]
    with (folder / f"{name}.out").open("wb") as out:
        return subprocess.Popen(command, cwd=folder, stdout=out, stderr=out)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    ends = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < ends, path
        time.sleep(0.02)


def pid_of_rank(rank: int, folder: Path) -> int:
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in variables and os.readlink(entry / "cwd") == str(folder):
                return int(entry.name)
        except OSError:
            continue
    raise AssertionError(f"no rank {rank}")


def test_a_killed_rank_comes_back_by_itself_and_the_loss_curve_is_the_same_to_the_bit(folder, long_run):
    process = start(folder, long_run["words"], "killed", "--max-restarts", "1")
    try:
        wait_for(folder / "killed-state" / "step-000008", process)
        os.kill(pid_of_rank(1, folder), signal.SIGKILL)
        assert process.wait(180) == 0, (folder / "killed.out").read_text()
    finally:
        process.kill()
        process.wait()
    said = (folder / "killed.out").read_text()
    assert "killed by SIGKILL" in said and "going on after step" in said
    assert [row["loss"] for row in rows(folder, "killed")] == long_run["losses"]


def test_sigterm_keeps_the_step_and_a_later_start_goes_on(folder, long_run):
    process = start(folder, long_run["words"], "stopped")
    try:
        wait_for(folder / "stopped-state" / "step-000004", process)
        process.terminate()
        assert process.wait(60) == 143, (folder / "stopped.out").read_text()
    finally:
        process.kill()
        process.wait()
    assert "asked to stop after step" in (folder / "stopped.out").read_text()
    assert not (folder / "stopped").exists()
    assert start(folder, long_run["words"], "stopped").wait(180) == 0
    assert [row["loss"] for row in rows(folder, "stopped")] == long_run["losses"]


def test_a_damaged_last_checkpoint_is_said_and_the_one_before_taken(folder, long_run):
    """Of the run that was stopped and went on: its newest is step 60."""
    newest = folder / "stopped-state" / "step-000060"
    file = next(newest.rglob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    assert start(folder, long_run["words"], "stopped").wait(180) == 0
    said = (folder / "stopped.out").read_text()
    assert "step-000060" in said and "going on after step 56" in said
    assert [row["loss"] for row in rows(folder, "stopped")] == long_run["losses"]


def test_a_kept_step_is_exported_for_transformers_without_training(folder, long_run):
    words = ["long.toml", *long_run["words"], "--set", "checkpoints=killed-state"]
    alone = ["--nproc-per-node", "1", "--set", "cluster=''"]  # the run had two ranks
    done = moe_launch("train", *words, *alone, "--export", "out/exported", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "exported step 60" in done.stdout
    whole, exported = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("killed", "out/exported"))
    assert all(torch.equal(value, exported.state_dict()[name]) for name, value in whole.state_dict().items())
    nothing = moe_launch("train", *words[:-1], "checkpoints=none-here", "--export", "x", cwd=folder)
    assert nothing.returncode == 2 and "there is no checkpoint to export" in nothing.stderr


def test_faults_at_several_places_leave_the_losses_as_they_are_and_the_right_rank_is_named(tmp_path, monkeypatch):
    """A short part of `python tests/train_faults.py` (docs/training.md, "Under faults")."""
    monkeypatch.setitem(train_faults.DEADLINE_S, "local", 4)
    drawn = [("kill", "before combine", (0,)), ("stop", "checkpoint", (0, 1)), ("hang", "backward", (1,))]
    faults = [
        train_faults.Fault(what, where, ranks, 4 + train_faults.WINDOW * n, 0.0)
        for n, (what, where, ranks) in enumerate(drawn)
    ]
    faults, right, said = train_faults.Bench(tmp_path / "faults").job(2, faults, "job")
    assert right and not any(fault.wrong for fault in faults), said
    assert [fault.next_step > fault.found > 0 for fault in faults] == [True] * 3, said


# ---- what a user would see -------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_names_the_batch_and_the_layer_and_keeps_what_was_saved(folder):
    done = moe_launch("train", "long.toml", "--max-restarts", "2", "--set", "learning_rate=1e25", "--set", "steps=9",
                      "--set", "checkpoints=nan-state", "--set", "checkpoint_every=1", "--set", "warmup_steps=0",
                      "--set", "weight_decay=0.0", cwd=folder)  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "starting all ranks again" not in done.stderr and "Traceback" not in done.stderr
    assert "first not finite: " in done.stderr and "model." in done.stderr, done.stderr
    assert "The batch is sequences" in done.stderr
    assert list((folder / "nan-state").glob("step-*"))


@pytest.mark.parametrize(("changes", "told"), [
    ({"model": {"vocab_size": 100}}, "Padding_idx must be within"),
    ({"model": {"vocab_size": 100, "pad_token_id": 1}}, "the tokenizer does not match the model"),
    ({"batch_size": 5000}, "fewer than one batch of 5000; add data, or lower"),
    ({"tokenizer": "text"}, "no tokenizer that transformers can read"),
    ({"accumulate": 4}, "accumulate = 4 parts of a batch of 3"),
    ({"recompute": "some"}, "recompute must be one of none, experts, all"),
    ({"validation_files": ["text/a.py"], "validation_fraction": 0.1}, "say the same thing"),
    ({"validation_files": ["none/*.x"]}, "none/\\*.x"),
    ({"resume": 1}, "resume must be true or false"),
    ({"checkpoints": "train.toml"}, "train.toml"),
])  # fmt: skip
def test_a_users_mistake_is_named_before_training(folder, changes, told):
    model = {**read_toml(folder / "train.toml")["model"], **changes.pop("model", {})}
    with pytest.raises((RankFailed, ValueError), match=told):
        run_ranks(run, 1, folder, settings(folder, model=model, output="never", **changes))
    assert not (folder / "never").exists()


def test_every_setting_can_be_given_on_the_command_line(folder):
    table = apply_overrides(read_toml(folder / "train.toml"), ["resume=false", "accumulate=3", "z_loss=1e-3"])
    config = TrainConfig.from_table(table, "train.toml")
    assert (config.resume, config.accumulate, config.z_loss) == (False, 3, 1e-3)

"""A training resumes from its checkpoints: to the bit on the same ranks, to rounding on others, and past damage."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import family_config
from ranks import run_ranks

import moe_runtime
from moe_runtime import state_files
from moe_runtime.errors import CheckpointError, ConfigError, MoeRuntimeError
from moe_runtime.experts.placement import from_owners
from moe_runtime.state_tensors import spread
from moe_runtime.training_state import Checkpoints

BATCH, LENGTH = 6, 16
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def make(runtime, seed: int = 0, placement=None, dtype=torch.float32, **changes):
    config = family_config("deepseek_v3", **changes)
    model = runtime.create_model(config, dtype, seed=seed, placement=placement).train()
    return model, torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)


def train(runtime, model, optimizer, steps, noise: bool = False) -> list[float]:
    """One joined batch per step, dealt out over ranks; the gate's bias changes too. `noise` draws random numbers."""
    losses = []
    for step in steps:
        joined = torch.randint(2, 128, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))
        ids = joined[runtime.rank :: runtime.size]
        logits = model(input_ids=ids[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / (BATCH * LENGTH)
        if noise:
            loss = loss * (1 + torch.rand(()))
        optimizer.zero_grad()
        loss.backward()
        runtime.sync_gradients(model)
        optimizer.step()
        bias = model.model.layers[1].mlp.gate.e_score_correction_bias
        bias += 0.01 * torch.randn(bias.shape, generator=torch.Generator().manual_seed(step))
        total = loss.detach().clone()
        runtime.transport.all_reduce(total, "test loss")
        losses.append(total.item())
    return losses


def everything(model, optimizer) -> dict[str, torch.Tensor]:
    found = {name: value.clone() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        found |= {f"{name} {word}": value.clone() for word, value in optimizer.state[parameter].items()}
    return found


def replicated(size: int):
    """Experts 0 and 3 on the first two ranks, the others dealt out over these; a third rank has none."""
    owners = [[0, 1] if e in (0, 3) else [(e + 1) % 2] for e in range(16)]
    return from_owners([owners], size)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint by their keys, without the ranks' random generators."""
    path = state_files.final_path(folder, state_files.list_steps(folder)[0])
    ranks = state_files.Manifest.read(path / "manifest.json").num_ranks
    entries = {k: e for k, e in state_files.list_tensors(path, range(ranks)).items() if not k.startswith("random")}
    targets = {key: torch.empty(entry.shape, dtype=entry.dtype) for key, entry in entries.items()}
    state_files.read_tensors(path, targets, entries)
    return targets


# ---- resuming --------------------------------------------------------------------------------------------------------


def straight_and_resumed(folder: Path, transport: str) -> None:
    with moe_runtime.init({"timeout_s": 60, "transport": transport}) as runtime:
        model, optimizer = make(runtime, tie_word_embeddings=True)
        checkpoints = Checkpoints(runtime, folder)
        assert checkpoints.load(model, optimizer) is None and checkpoints.saved_placement() is None
        train(runtime, model, optimizer, range(3), noise=True)
        write, trained = state_files.write_part, threading.Event()
        with pytest.MonkeyPatch.context() as patch:  # a disk so slow that three steps are taken before it writes
            patch.setattr(state_files, "write_part", lambda *part: trained.wait(60) and write(*part))
            checkpoints.save(3, model, optimizer, {"tokens": 7, "rate": 0.1})
            losses = train(runtime, model, optimizer, range(3, 6), noise=True)
            trained.set()
            checkpoints.close()
        expected = everything(model, optimizer)

        again = Checkpoints(runtime, folder)
        assert again.saved_placement().digest() == runtime.view.placement.digest()
        model, optimizer = make(runtime, seed=1, placement=again.saved_placement(), tie_word_embeddings=True)
        assert again.load(model, optimizer) == {"tokens": 7, "rate": 0.1, "step": 3}
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert train(runtime, model, optimizer, range(3, 6), noise=True) == losses
        found = everything(model, optimizer)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("transport", ["gloo", "zeromq"])
def test_resuming_on_the_same_ranks_is_the_straight_run_to_the_bit(tmp_path, transport):
    run_ranks(straight_and_resumed, 2, tmp_path, transport)
    (kept,) = tmp_path.iterdir()
    files = [path for path in kept.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}  # no pickle
    assert {path.name for path in kept.iterdir()} == {"manifest.json", "rank_0", "rank_1"}


def first_half(folder: Path, with_replicas: bool) -> list[float]:
    with moe_runtime.init({"timeout_s": 60}) as runtime:
        model, optimizer = make(runtime, placement=replicated(runtime.size) if with_replicas else None)
        train(runtime, model, optimizer, range(3))
        checkpoints = Checkpoints(runtime, folder)
        checkpoints.save(3, model, optimizer, {})
        checkpoints.close()
        return train(runtime, model, optimizer, range(3, 8))


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "replicas"])
def halfway(tmp_path_factory, request) -> tuple[Path, list[float]]:
    """A checkpoint that two ranks wrote, and the losses of the five steps after it."""
    folder = tmp_path_factory.mktemp("halfway") / "state"
    return folder, run_ranks(first_half, 2, folder, request.param)[0]


def second_half(folder: Path, out: Path, with_replicas: bool) -> list[float]:
    with moe_runtime.init({"timeout_s": 60}) as runtime:
        placement = replicated(runtime.size) if with_replicas else None
        model, optimizer = make(runtime, seed=1, placement=placement)
        checkpoints = Checkpoints(runtime, folder)
        assert (checkpoints.saved_placement() is None) == (runtime.size != 2)
        assert checkpoints.load(model, optimizer) == {"step": 3}
        as_loaded = Checkpoints(runtime, out)
        as_loaded.save(3, model, optimizer, {})
        as_loaded.close()
        return train(runtime, model, optimizer, range(3, 8))


@pytest.mark.parametrize(("size", "with_replicas"), [(1, False), (3, True)])
def test_resuming_on_other_ranks_and_placements_gives_the_same_losses(halfway, tmp_path, size, with_replicas):
    folder, expected = halfway
    losses = run_ranks(second_half, size, folder, tmp_path, with_replicas)
    np.testing.assert_allclose(losses[0], expected, rtol=1e-4, atol=1e-4)
    before, after = stored(folder), stored(tmp_path)  # and what was loaded is what was stored, to the bit
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def saved_after_a_move(folder: Path) -> None:
    with moe_runtime.init({"timeout_s": 60}) as runtime:
        model, optimizer = make(runtime)
        train(runtime, model, optimizer, range(2))
        runtime.rebalance(model, replicated(runtime.size), optimizer, wait=True)
        checkpoints = Checkpoints(runtime, folder)
        checkpoints.save(2, model, optimizer, {})
        losses = train(runtime, model, optimizer, range(2, 4))
        expected = everything(model, optimizer)
        placement = checkpoints.saved_placement()
        assert placement.digest() == replicated(runtime.size).digest()
        model, optimizer = make(runtime, seed=1, placement=placement)
        checkpoints.load(model, optimizer)
        assert train(runtime, model, optimizer, range(2, 4)) == losses
        found = everything(model, optimizer)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_a_run_whose_experts_have_moved_resumes_to_the_bit_where_they_are(tmp_path):
    run_ranks(saved_after_a_move, 2, tmp_path)


def masters(folder: Path) -> None:
    with moe_runtime.init({"timeout_s": 60}) as runtime:
        model, optimizer = make(runtime, dtype=torch.bfloat16)
        train(runtime, model, optimizer, range(1))
        for parameter, state in optimizer.state.items():
            state["master"] = parameter.detach().float() + 1e-4
        checkpoints = Checkpoints(runtime, folder)
        checkpoints.save(1, model, optimizer, {})
        expected = everything(model, optimizer)
        model, optimizer = make(runtime, seed=1, dtype=torch.bfloat16)
        checkpoints.load(model, optimizer)
        found = everything(model, optimizer)
        assert found["model.norm.weight master"].dtype == torch.float32
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_state_of_another_dtype_than_its_parameter_stays_as_it_is(tmp_path):
    run_ranks(masters, 1, tmp_path)


# ---- failures --------------------------------------------------------------------------------------------------------


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


TENSORS = "rank_1/model-00001-of-00001.safetensors"
DAMAGES = {
    "truncated": (TENSORS, lambda path: os.truncate(path, 1000), "has 1000 bytes instead of"),
    "flipped": (TENSORS, flip_a_byte, "checksum of rank_1/model-00001-of-00001.safetensors differs"),
    "missing": (TENSORS, Path.unlink, "is missing"),
    "no manifest": ("manifest.json", Path.unlink, "manifest.json cannot be read"),
    "bad manifest": ("manifest.json", lambda path: os.truncate(path, 50), "manifest.json is damaged"),
    "changed manifest": (
        "manifest.json",
        lambda path: path.write_text(path.read_text().replace('"n": 2', '"n": 3')),
        "manifest.json is damaged (its checksum differs)",
    ),
    "added": (TENSORS, lambda path: shutil.copy(path, path.with_name("x.safetensors")), "is not one of its files"),
}


def falls_back(folder: Path) -> None:
    with moe_runtime.init({"timeout_s": 60}) as runtime:
        model, optimizer = make(runtime)
        checkpoints = Checkpoints(runtime, folder / "good")
        for step in (1, 2):
            train(runtime, model, optimizer, [step])
            checkpoints.save(step, model, optimizer, {"n": step})
        checkpoints.close()
        for name, (file, damage, said) in DAMAGES.items():
            if runtime.rank == 0:
                shutil.copytree(folder / "good", folder / name)
                damage(folder / name / "step-000002" / file)
            runtime.transport.barrier("damage")
            with contextlib.redirect_stderr(io.StringIO()) as shown:
                found = Checkpoints(runtime, folder / name).load(model, optimizer)
            assert found == {"n": 1, "step": 1}, name
            if runtime.rank == 0:
                assert "step-000002 is damaged" in shown.getvalue() and said in shown.getvalue(), shown.getvalue()
        # None is good: an error, and the model stays as it is.
        if runtime.rank == 0:
            flip_a_byte(folder / "flipped" / "step-000001" / TENSORS)
        runtime.transport.barrier("damage")
        before = everything(model, optimizer)
        last = Checkpoints(runtime, folder / "flipped")
        with contextlib.redirect_stderr(io.StringIO()), pytest.raises(CheckpointError, match="none of the 2"):
            last.load(model, optimizer)
        after = everything(model, optimizer)
        assert all(torch.equal(before[name], after[name]) for name in before)
        # After a fall back, the damaged one goes when a newer one is complete, not the good ones.
        resumed = Checkpoints(runtime, folder / "truncated", keep=2)
        with contextlib.redirect_stderr(io.StringIO()):
            assert resumed.load(model, optimizer)["step"] == 1
        resumed.save(3, model, optimizer, {})
        resumed.close()
        assert state_files.list_steps(folder / "truncated") == [3, 1]


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path):
    run_ranks(falls_back, 2, tmp_path)


def disk_full_on_one_rank(folder: Path) -> str:
    with moe_runtime.init({"timeout_s": 60}) as runtime:
        model, optimizer = make(runtime)
        checkpoints = Checkpoints(runtime, folder)
        checkpoints.save(1, model, optimizer, {})
        write, full = state_files.write_part, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def no_room(partial, rank, tensors):
            write(partial, rank, tensors)
            (partial / f"rank_{rank}.json").unlink()
            raise full

        shown = io.StringIO()
        with contextlib.redirect_stderr(shown), pytest.MonkeyPatch.context() as patch:
            checkpoints._wait()
            if runtime.rank == 1:
                patch.setattr(state_files, "write_part", no_room)
            checkpoints.save(2, model, optimizer, {})
            train(runtime, model, optimizer, range(1))  # training goes on
            with pytest.raises(CheckpointError, match="rank 1: .*No space left on device"):
                checkpoints.close()
        assert sorted(path.name for path in folder.iterdir()) == ["step-000001"]
        checkpoints.save(3, model, optimizer, {})  # there is room again
        checkpoints.close()
        assert checkpoints.failure == ""
        return shown.getvalue()


def test_a_save_that_fails_on_one_rank_is_reported_by_all_and_older_checkpoints_stay(tmp_path):
    shown = run_ranks(disk_full_on_one_rank, 2, tmp_path)
    assert "rank 1: checkpoint" in shown[1] and "No space left on device" in shown[1]
    assert "older ones stay, training goes on" in shown[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000003"]


def fill_the_disk(folder: Path) -> str:
    with moe_runtime.init({"timeout_s": 60}) as runtime:
        model, optimizer = make(runtime)
        checkpoints = Checkpoints(runtime, folder)
        checkpoints.save(1, model, optimizer, {})
        train(runtime, model, optimizer, range(1))  # now there is optimizer state, three times as much
        with contextlib.redirect_stderr(io.StringIO()) as shown:
            checkpoints.save(2, model, optimizer, {})
            with pytest.raises(CheckpointError, match="No space left on device"):
                checkpoints.close()
        return shown.getvalue()


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        shown = run_ranks(fill_the_disk, 2, tmp_path)
        assert "No space left on device" in "".join(shown)
        assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
        assert stored(tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def killed_while_writing(folder: Path, at: str) -> None:
    with moe_runtime.init({"timeout_s": 60}) as runtime:
        model, optimizer = make(runtime)
        checkpoints = Checkpoints(runtime, folder)
        checkpoints.save(1, model, optimizer, {})
        checkpoints.close()
        setattr(state_files, at, lambda *arguments, **named: os.kill(os.getpid(), signal.SIGKILL))
        checkpoints.save(2, model, optimizer, {})
        checkpoints.close()


def load_and_save(folder: Path) -> int:
    with moe_runtime.init({"timeout_s": 60}) as runtime:
        model, optimizer = make(runtime, seed=1)
        checkpoints = Checkpoints(runtime, folder, keep=2)
        found = checkpoints.load(model, optimizer)
        for step in range(found["step"] + 1, found["step"] + 4):
            checkpoints.save(step, model, optimizer, {})
        checkpoints.close()
        return found["step"]


@pytest.mark.parametrize("at", ["_note", "sync_to_disk"])
def test_kill_9_in_the_middle_of_a_write_leaves_the_checkpoint_before(tmp_path, at):
    with contextlib.suppress(AssertionError):
        run_ranks(killed_while_writing, 2, tmp_path, at, expect_dead=(0, 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step-000002.partial", "step-000001"]
    (tmp_path / "step-000000").mkdir()
    (tmp_path / "step-000000" / "notes.txt").write_text("mine")
    (tmp_path / ".step-000001.partial").mkdir()
    (tmp_path / ".step-000001.partial" / "notes.txt").write_text("mine")
    assert run_ranks(load_and_save, 2, tmp_path) == [1, 1]
    # Two are kept, what the killed run left is gone, what is not ours stays.
    names = [".step-000001.partial", "step-000000", "step-000003", "step-000004"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def other_folder_on_rank_1(folder: Path) -> str:
    with moe_runtime.init({"timeout_s": 3}) as runtime:
        model, optimizer = make(runtime)
        with contextlib.redirect_stderr(io.StringIO()) as shown:
            checkpoints = Checkpoints(runtime, folder / ("shared" if runtime.rank == 0 else "not"))
            checkpoints.save(1, model, optimizer, {})
            with pytest.raises(CheckpointError, match="the parts of ranks \\[1\\]"):
                checkpoints.close()
        assert not list((folder / "shared").iterdir())
        return shown.getvalue()


def test_rank_0_names_the_ranks_whose_part_does_not_come(tmp_path):
    assert "all hosts must share the folder" in run_ranks(other_folder_on_rank_1, 2, tmp_path)[0]


def stuck_disk_on(rank: int, action: str, folder: Path) -> str:
    """One rank's `action` on the disk never ends, as where a network disk has gone."""
    with moe_runtime.init({"timeout_s": 2}) as runtime:
        model, optimizer = make(runtime)
        if runtime.rank == rank:
            setattr(state_files, action, lambda *_: threading.Event().wait())
        checkpoints = Checkpoints(runtime, folder)
        checkpoints.save(1, model, optimizer, {})
        with contextlib.redirect_stderr(io.StringIO()), pytest.raises(MoeRuntimeError) as raised:
            checkpoints.close()
        return f"{raised.type.__name__}: {raised.value}"


@pytest.mark.parametrize(("rank", "action"), [(0, "write_part"), (1, "write_part"), (0, "publish")])
def test_a_disk_that_is_stuck_for_one_rank_ends_the_wait_on_all_and_is_put_down_to_that_rank(tmp_path, rank, action):
    said = run_ranks(stuck_disk_on, 3, rank, action, tmp_path)
    for other, text in enumerate(said):
        assert text.startswith("MoeRuntimeError: " if other == rank else "PeerTimeout: ")
        assert f"rank {other}, phase" in text and f"s for ranks [{rank}], which still write" in text
    assert not list(tmp_path.glob("step-*"))


def refusals(folder: Path) -> None:
    with moe_runtime.init({"timeout_s": 60}) as runtime:
        model, optimizer = make(runtime)
        train(runtime, model, optimizer, range(1))
        checkpoints = Checkpoints(runtime, folder)
        with pytest.raises(ConfigError, match="extra must be what JSON can hold"):
            checkpoints.save(1, model, optimizer, {"x": torch.ones(1)})
        checkpoints.save(1, model, optimizer, {})
        sgd = torch.optim.SGD(model.parameters())
        with pytest.raises(CheckpointError, match="is of optimizer AdamW, this one is SGD"):
            checkpoints.load(model, sgd)
        wider, its_optimizer = make(runtime, intermediate_size=80)
        with pytest.raises(CheckpointError, match="give the settings it was trained with"):
            checkpoints.load(wider, its_optimizer)
        assert not its_optimizer.state
        fewer, its_optimizer = make(runtime, n_routed_experts=8)
        with pytest.raises(CheckpointError, match="num_experts = 16, this one has 8"):
            checkpoints.load(fewer, its_optimizer)
        optimizer.state[model.lm_head.weight]["rows"] = torch.ones(3)
        with pytest.raises(ConfigError, match=r"'rows' for lm_head.weight is of shape \[3\]"):
            checkpoints.save(2, model, optimizer, {})
        with pytest.raises(ConfigError, match="keep must be at least 1"):
            Checkpoints(runtime, folder, keep=0)


def test_what_cannot_be_stored_or_loaded_is_refused_in_words(tmp_path):
    run_ranks(refusals, 1, tmp_path)


# ---- rules -----------------------------------------------------------------------------------------------------------


def test_dense_tensors_are_spread_over_ranks_by_size():
    sizes = {"a": 8, "b": 4, "c": 3, "d": 1}
    assert spread(sizes, 2) == {"a": 0, "b": 1, "c": 1, "d": 1}
    assert spread(dict(reversed(sizes.items())), 2) == spread(sizes, 2)


def test_files_stay_below_their_size_and_every_tensor_has_one():
    tensors = {str(number): torch.zeros(number, dtype=torch.uint8) for number in (4, 5, 20, 1, 2)}
    assert state_files.split_into_files(tensors, most=10) == {"4": 1, "5": 1, "20": 2, "1": 3, "2": 3}


@pytest.mark.parametrize(
    ("steps", "damaged", "written", "keep", "expected"),
    [
        ([1, 2, 3, 4], [], 4, 3, [1]),
        ([1, 2, 3, 4], [3], 4, 3, [3]),  # a damaged one takes no place
        ([1, 2, 9], [9], 2, 1, [1]),  # one beyond the step that was resumed from is not counted
        ([1], [], 1, 3, []),
    ],
)
def test_which_checkpoints_are_removed(steps, damaged, written, keep, expected):
    assert state_files.steps_to_remove(steps, damaged, written, keep) == expected


def test_a_checkpoint_that_was_being_replaced_comes_back(tmp_path):
    (tmp_path / ".step-000001.old").mkdir()
    (tmp_path / ".step-000001.old" / "manifest.json").write_text(json.dumps({}))
    state_files.tidy(tmp_path, restore_only=True)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]

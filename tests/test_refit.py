"""A rank that has lost or gained neighbours holds other experts: what it had, and the rest from the checkpoint.

Compared with transformers on one process, and tensor by tensor with a model that was loaded so from the start.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES as ALL_FAMILIES
from families import write_checkpoint
from held import admit, keep
from ranks import run_ranks
from test_checkpoint import write_fp8
from test_rebalance import shuffled

import moe_runtime
from moe_runtime import loading
from moe_runtime import refit as refit_module
from moe_runtime.checkpoint import SINGLE
from moe_runtime.core.placement import Placement
from moe_runtime.errors import CheckpointError, ConfigError
from moe_runtime.experts.placement import from_owners, proportional
from moe_runtime.layer import experts_modules
from moe_runtime.lost_experts import grow
from moe_runtime.model import expert_layers
from moe_runtime.refit import Source, refit

IDS = torch.randint(2, 128, (3, 12), generator=torch.Generator().manual_seed(7))
FAMILIES = ["deepseek_v3", "qwen3_moe", "gpt_oss"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """family -> a folder with a checkpoint; the logits of one process beside it."""
    made: dict[str, Path] = {}

    def build(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family) / "model"
            with torch.no_grad():
                logits = write_checkpoint(made[family], family)(IDS).logits
            np.save(made[family].with_name("logits.npy"), logits.numpy())
        return made[family]

    return build


def num_layers(folder: Path) -> int:
    return 1 if "deepseek" in str(folder) else 2


def held(placement: Placement, rank: int) -> list[list[int]]:
    return [placement.rank_experts(layer, rank) for layer in range(placement.num_layers)]


def expert_tensors(model) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}.{name}": parameter
        for prefix, module in experts_modules(model).items()
        for name, parameter in module.named_parameters(recurse=False)
    }


def assert_same_experts(model, other) -> None:
    one, two = expert_tensors(model), expert_tensors(other)
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert value.shape == two[name].shape and value.dtype == two[name].dtype, name
        assert value.requires_grad == two[name].requires_grad, name
        assert torch.equal(value.view(torch.uint8), two[name].view(torch.uint8)), name


def switch(runtime, model, old: Placement, new: Placement) -> None:
    """What the caller does after a refit: dispatchers and choosers follow."""
    runtime._switched(expert_layers(model), old, new)


def lose_and_grow(folder: Path, before: Placement, survivors: list[int], options: dict, how: str = "") -> dict:
    """This world is what is left of one of `before`'s ranks; it goes on with what it holds and reads the rest.

    how: "large" treats rows as if they were large; "converted" reads all through transformers' conversion.
    """
    if how == "large":
        refit_module._STRAIGHT_FROM = 0
    if how == "converted":
        loading._read_as_stored = lambda *arguments: False
    expected = np.load(folder.with_name("logits.npy")) if folder.with_name("logits.npy").exists() else None
    with moe_runtime.init({"timeout_s": 60}) as runtime, torch.no_grad():
        kept = keep(before, survivors)
        model = runtime.load_model(folder, dtype=torch.float32, placement=kept, **options)
        others = {name: value for name, value in model.state_dict().items() if name not in expert_tensors(model)}
        grown = grow(kept, [1.0] * runtime.size, [None] * runtime.size)
        with Source(model, folder) as source:
            read = refit(model, held(kept, runtime.rank), grown, runtime.rank, source)
            assert refit(model, held(grown, runtime.rank), grown, runtime.rank, source) == 0
        switch(runtime, model, kept, grown)
        assert all(model.state_dict()[name].data_ptr() == value.data_ptr() for name, value in others.items())
        assert_same_experts(model, runtime.load_model(folder, dtype=torch.float32, placement=grown, **options))
        logits = model(IDS[runtime.rank :]).logits.numpy()
        if expected is not None:
            np.testing.assert_allclose(logits, expected[runtime.rank :], rtol=1e-5, atol=1e-5)
        lost = [len(kept.absent_experts(layer)) for layer in range(kept.num_layers)]
        return {"read": read, "lost": sum(lost), "described": source.describe()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("survivors", [[1], [0, 2], [2, 0]])
def test_what_is_left_of_three_ranks_computes_what_one_process_does(checkpoint, family, survivors):
    folder = checkpoint(family)
    before = proportional(num_layers(folder), 16, [1, 2, 1.5])
    results = run_ranks(lose_and_grow, len(survivors), folder, before, survivors, {})
    assert sum(result["read"] for result in results) == results[0]["lost"] > 0


@pytest.mark.parametrize("how", ["", "large", "converted"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_layers_that_lose_different_experts_find_all_of_them_again(checkpoint, family, how):
    results = run_ranks(lose_and_grow, 2, checkpoint(family), shuffled(3, 1), [2, 0], {}, how)
    assert sum(result["read"] for result in results) >= results[0]["lost"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_replicas_that_survive_are_not_read(checkpoint, family):
    """Every expert on two of three ranks: nothing is lost with one of them."""
    folder = checkpoint(family)
    owners = [sorted({e % 3, (e + 1) % 3}) for e in range(16)]
    before = from_owners([owners] * num_layers(folder), 3)
    assert [result["read"] for result in run_ranks(lose_and_grow, 2, folder, before, [0, 2], {})] == [0, 0]


@pytest.mark.parametrize("how", ["", "large", "converted"])
@pytest.mark.parametrize("options", [{"keep_fp8": True}, {"expert_dtype": "int8"}, {}])
def test_experts_in_8_bits_come_with_their_scales(tmp_path, options, how):
    folder = write_fp8(tmp_path / "model", hidden_size=256, moe_intermediate_size=128)
    results = run_ranks(lose_and_grow, 2, folder, proportional(1, 16, [1, 1, 1]), [0, 2], options, how)
    assert sum(result["read"] for result in results) == 5


def come_and_go(folder: Path) -> list:
    """Ranks that held nothing read their part, others let go of theirs, replicas come; all without an exchange."""
    expected = np.load(folder.with_name("logits.npy"))
    with moe_runtime.init({"timeout_s": 60}) as runtime, torch.inference_mode():
        layers = num_layers(folder)
        stages = [
            admit(proportional(layers, 16, [1.0] * (runtime.size - 1)), runtime.size, [0]),
            proportional(layers, 16, [1.0] * runtime.size),
            from_owners([[sorted({e % runtime.size, 0}) for e in range(16)]] * layers, runtime.size),
            admit(from_owners([[[0]] * 16] * layers, 1), runtime.size),
        ]
        model = runtime.load_model(folder, dtype=torch.float32, placement=stages[0])
        counts = []
        with Source(model, folder) as source:
            for old, new in zip(stages, stages[1:], strict=False):
                counts.append(refit(model, held(old, runtime.rank), new, runtime.rank, source))
                switch(runtime, model, old, new)
                logits = model(IDS[runtime.rank :]).logits.numpy()
                np.testing.assert_allclose(logits, expected[runtime.rank :], rtol=1e-5, atol=1e-5)
                assert not any(parameter.is_inference() for parameter in expert_tensors(model).values())
        return counts


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_that_come_read_their_part_and_others_let_go(checkpoint, family):
    layers, (first, second) = num_layers(checkpoint(family)), run_ranks(come_and_go, 2, checkpoint(family))
    assert first == [8 * layers, 8 * layers, 0]  # nothing before, then a half, then all
    assert second == [0, 4 * layers, 0]  # odd experts instead of the upper half: 4 are in both


# ---------------------------------------------------------------- straight from the file


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_experts_read_straight_are_those_that_transformers_converts(tmp_path, family):
    """Of every family, in its own dtype and in another; only where the stored bytes are wanted are they read so."""
    write_checkpoint(tmp_path / "model", family)
    with moe_runtime.init({"timeout_s": 60}) as runtime, Opened() as opened:
        for dtype in (torch.float32, torch.bfloat16):
            opened.straight, opened.count = True, 0
            model = runtime.load_model(tmp_path / "model", dtype=dtype)
            assert opened.count == (len(expert_tensors(model)) * 16 if dtype == torch.float32 else 0)
            opened.straight = False
            assert_same_experts(model, runtime.load_model(tmp_path / "model", dtype=dtype))


class Opened:
    """Counts experts' tensors that are read straight; or keeps them from it."""

    def __enter__(self):
        self.straight, self.count, self._way = True, 0, loading._read_as_stored
        loading._read_as_stored = self.read
        return self

    def read(self, *arguments) -> bool:
        done = self.straight and self._way(*arguments)
        self.count += done
        return done

    def __exit__(self, *_):
        loading._read_as_stored = self._way


@pytest.mark.parametrize(
    ("convert", "found"),
    [
        (lambda gate, up: torch.cat([gate, up]), ["gate", "up"]),
        (lambda gate, up: torch.cat([up, gate]), ["up", "gate"]),
        (lambda gate, up: torch.cat([gate, up]).t(), None),
        (lambda gate, up: torch.stack([gate, up], 1).flatten(0, 1), None),  # interleaved
        (lambda gate, up: torch.cat([gate, up * 2]), None),
        (lambda gate, up: gate, None),
        (lambda gate, up: torch.cat([gate, gate]), None),
    ],
)
def test_what_is_more_than_joining_is_left_to_the_conversion(convert, found):
    class Reader:
        def shape(self, key: str) -> tuple[int, int]:
            return (24, 48)

    class Converting(loading.Sources):
        def __init__(self) -> None:
            self.reader, self.keys_of, self._as_stored = Reader(), {"experts": [("gate", "g"), ("up", "u")]}, {}

        def _by_pattern(self, target):
            return {"gate": {0: "g"}, "up": {0: "u"}}

        def convert_expert(self, target, expert, num_experts, read):
            return convert(read("g", None), read("u", None))

    assert Converting().parts_as_stored("experts", 1) == found


# ---------------------------------------------------------------- what fails


@pytest.fixture()
def loaded(checkpoint, tmp_path):
    """(a model of one rank that lacks the experts of another, what it holds, the placement it is to have, a folder)."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("qwen3_moe"), folder)
    with moe_runtime.init({"timeout_s": 60}) as runtime:
        kept = keep(proportional(2, 16, [1.0, 1.0]), [1])
        model = runtime.load_model(folder, dtype=torch.float32, placement=kept)
        yield model, held(kept, 0), grow(kept, [1.0], [None]), folder


def test_a_checkpoint_that_cannot_be_read_changes_nothing(loaded):
    model, old, new, folder = loaded
    before = expert_tensors(model)
    with Source(model, folder) as source:
        data = (folder / SINGLE).read_bytes()
        with open(folder / SINGLE, "r+b") as file:  # the same file, not one that took its name
            file.truncate(len(data) // 2)
        with pytest.raises(CheckpointError, match=rf"{SINGLE}: tensor .* cannot be read"):
            refit(model, old, new, 0, source)
        assert all(value is before[name] for name, value in expert_tensors(model).items())
        assert [layer.num_experts for layer in expert_layers(model)] == [8, 8]
        (folder / SINGLE).write_bytes(data)
        assert refit(model, old, new, 0, source) == 16


def test_a_checkpoint_that_is_replaced_is_still_read_as_it_was(loaded):
    model, old, new, folder = loaded
    with Source(model, folder) as source:
        (folder / SINGLE).unlink()
        assert refit(model, old, new, 0, source) == 16


def test_a_checkpoint_of_another_model_is_refused_beforehand(loaded, checkpoint):
    with pytest.raises(CheckpointError, match="no tensor of the checkpoint is a part of model.layers.0.mlp.experts"):
        Source(loaded[0], checkpoint("deepseek_v3"))


def test_what_does_not_fit_the_model_is_refused(loaded):
    model, old, new, folder = loaded
    with Source(model, folder) as source:
        for experts, placement, rank, message in [
            (old[:1], new, 0, "the placement has 2 layers, old_experts has 1, the model 2"),
            ([old[0][:3], old[1]], new, 0, "layers.0.mlp.experts holds 8 experts, old_experts names 3"),
            (old, new, 1, "rank 1 is none of the placement's 1"),
            (old, proportional(2, 8, [1.0]), 0, "a placement of 8 experts, model.layers.0.mlp.experts has 16"),
        ]:
            with pytest.raises(ConfigError, match=message):
                refit(model, experts, placement, rank, source)


def rooms(checkpoint: Path, cluster: Path) -> list[tuple[int, int]]:
    """(slots there is room for, bytes of a slot), without and with a cluster file that says what a rank may have."""
    found = []
    for settings in ({}, {"cluster": str(cluster)}):
        with moe_runtime.init(settings) as runtime:
            model = runtime.load_model(checkpoint, dtype=torch.float32, expert_dtype="float32")
            each = sum(p[:1].nbytes for layer in expert_layers(model) for p in layer.parameters())
            found.append((runtime._room(model), each))
    return found


def test_room_for_lost_experts_is_what_is_free_or_what_the_cluster_file_leaves(tmp_path):
    write_checkpoint(tmp_path / "checkpoint", "deepseek_v3")
    (tmp_path / "cluster.toml").write_text('[[node]]\nname = "a"\nhost = "localhost"\nmemory_gib = 0.01\n')
    [[(free, each), (given, _)]] = run_ranks(rooms, 1, tmp_path / "checkpoint", tmp_path / "cluster.toml")
    assert 0 < given * each < 0.01 * (1 << 30)
    assert given < free < (1 << 45) // each

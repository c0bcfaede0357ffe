"""Loading and saving: each rank takes only what is its own, faults are named in one line, and saving never harms.

What is loaded or saved is compared, tensor by tensor and bit by bit, with what transformers makes of the same files.
"""

from __future__ import annotations

import json
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from families import FAMILIES, family_config, reference_model, write_checkpoint
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

import moe_runtime
from moe_runtime.checkpoint import INDEX, SINGLE, CheckpointReader
from moe_runtime.errors import CheckpointError, ConfigError
from moe_runtime.experts.blocks import dequantize_blocks, quantize_blocks
from moe_runtime.experts.placement import from_owners, proportional
from moe_runtime.layer import experts_modules

STORED_FAMILIES = ["deepseek_v3", "deepseek_v4", "mixtral", "gpt_oss"]  # per-expert, renamed, renamed, fused


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """family -> a checkpoint of it that transformers wrote."""
    made: dict[str, Path] = {}

    def build(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family) / "model"
            write_checkpoint(made[family], family)
        return made[family]

    return build


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A deepseek_v3 checkpoint in several shards with an index; copies of it are damaged."""
    folder = tmp_path_factory.mktemp("sharded") / "model"
    reference_model("deepseek_v3").save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def transformers_state(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Every parameter and buffer, those that checkpoints do not hold included."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return {**model.state_dict(), **dict(model.named_buffers())}


def assert_same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value, other[name]), name


def assert_holds_its_part(model, whole: dict[str, torch.Tensor], rank: int) -> None:
    """The rank's model equals `whole`, of whose experts tensors it holds its own entries only."""
    experts = {f"{name}.": module.moe_runtime_layer for name, module in experts_modules(model).items()}
    expected = {}
    for name, value in whole.items():
        layer = next((layer for prefix, layer in experts.items() if name.startswith(prefix)), None)
        expected[name] = value if layer is None else value[layer.placement.rank_experts(layer.index, rank)]
    assert_same_tensors({**model.state_dict(), **dict(model.named_buffers())}, expected)


# ---------------------------------------------------------------- checkpoints that cannot be used


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def rewrite(folder: Path, change) -> None:
    """Apply `change` to the tensors of the shard that it concerns, and to the index."""
    index = json.loads((folder / INDEX).read_text())
    for shard in shards(folder):
        tensors = load_file(shard)
        change(tensors)
        save_file(tensors, shard, metadata={"format": "pt"})
        held = {key for key, name in index["weight_map"].items() if name == shard.name}
        for key in held - tensors.keys():
            del index["weight_map"][key]
    (folder / INDEX).write_text(json.dumps(index))


def drop(*parts: str):
    """Remove the tensors whose key has one of `parts`, from shard and index."""
    return lambda folder: rewrite(
        folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if any(part in key for part in parts)]
    )


def reshape(key: str, *shape: int):
    def change(tensors):
        if key in tensors:
            tensors[key] = torch.zeros(shape)

    return lambda folder: rewrite(folder, change)


def write_index(text: str):
    return lambda folder: (folder / INDEX).write_text(text)


def edit_json(name: str, **changes):
    def edit(folder: Path) -> None:
        table = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in table.items() if value is not None}))

    return edit


def truncate(number: int, size: int | float):
    """Cut a shard: to so many bytes, or to a part of what it has, or by so many bytes."""

    def cut(folder: Path) -> None:
        data = shards(folder)[number].read_bytes()
        shards(folder)[number].write_bytes(data[: int(len(data) * size) if isinstance(size, float) else size])

    return cut


def only_pickle(folder: Path) -> None:
    for path in [*shards(folder), folder / INDEX]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def no_weights(folder: Path) -> None:
    for path in [*shards(folder), folder / INDEX]:
        path.unlink()


def misplace_key(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = next(
        name for name in index["weight_map"].values() if name != index["weight_map"]["model.norm.weight"]
    )
    (folder / INDEX).write_text(json.dumps(index))


def point_outside(folder: Path) -> None:
    outside = shards(folder)[0].rename(folder.parent / "outside.safetensors")
    index = (folder / INDEX).read_text()
    (folder / INDEX).write_text(re.sub(r"model-00001-of-\d+\.safetensors", f"../{outside.name}", index))


EXPERT = "model.layers.1.mlp.experts.11"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 100\n"

# what is done to the folder -> (the damage, words the message must have)
DAMAGES = {
    "a shard is missing": (lambda f: shards(f)[1].unlink(), ["model-00002-of-", "missing", "fetch it again"]),
    "half a shard": (truncate(1, 0.5), ["model-00002-of-", "fetch it again"]),
    "a shard without its last byte": (truncate(0, -1), ["model-00001-of-", "fetch it again"]),
    "a shard cut in its header": (truncate(0, 20), ["model-00001-of-", "fetch it again"]),
    "an empty shard": (truncate(0, 0), ["model-00001-of-", "fetch it again"]),
    "a pointer instead of a shard": (
        lambda f: shards(f)[0].write_text(POINTER),
        ["model-00001-of-", "not a readable safetensors", "fetch it again"],
    ),
    "a key in another shard": (misplace_key, ["model.norm.weight", "-of-", INDEX]),
    "a tensor is missing": (drop("model.norm.weight"), ["model.norm.weight", "not in the checkpoint"]),
    "all experts of a layer are missing": (drop(".experts."), ["mlp.experts.", "not in the checkpoint"]),
    "an expert is missing": (drop(f"{EXPERT}."), ["expert 11", "of 16 experts, 15"]),
    "a part of an expert is missing": (drop(f"{EXPERT}.up_proj"), ["expert 11", "of 16 experts, 15", "up_proj"]),
    "a tensor of another shape": (
        reshape("model.norm.weight", 47),
        ["model.norm.weight", "[47]", "[48]", "do not belong together"],
    ),
    "an expert of another shape": (
        reshape(f"{EXPERT}.down_proj.weight", 48, 23),
        ["expert 11", "down_proj", "[48, 23]", "[48, 24]"],
    ),
    "a part of an expert of another shape": (
        reshape(f"{EXPERT}.up_proj.weight", 24, 47),
        ["gate_up_proj", "[24, 48]", "[24, 47]"],
    ),
    "an expert of one dimension": (reshape(f"{EXPERT}.down_proj.weight", 24), ["down_proj", "[24]"]),
    "only a pickle": (only_pickle, ["pytorch_model.bin", "pickle", "convert it to safetensors"]),
    "no weights": (no_weights, [INDEX, SINGLE, "missing"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["no config.json", "folder of a Hugging Face checkpoint"]),
    "no folder": (shutil.rmtree, ["no config.json", "folder of a Hugging Face checkpoint"]),
    "half an index": (write_index('{"weight_map": {"a": '), [INDEX, "fetch it again"]),
    "an empty index": (write_index(""), [INDEX, "fetch it again"]),
    "an index that is a list": (write_index("[1, 2]"), [INDEX, "fetch it again"]),
    "an index without weight_map": (write_index('{"metadata": {}}'), [INDEX, "fetch it again"]),
    "a weight_map that is a list": (write_index('{"weight_map": ["a.safetensors"]}'), [INDEX, "fetch it again"]),
    "a weight_map of numbers": (write_index('{"weight_map": {"a": 1}}'), [INDEX, "fetch it again"]),
    "an index that is no text": (lambda f: (f / INDEX).write_bytes(b"\xff\xfe\x00"), [INDEX, "fetch it again"]),
    "a shard outside the folder": (point_outside, [INDEX, "../outside.safetensors"]),
    "a config that is no JSON": (lambda f: (f / "config.json").write_text("{"), ["config.json"]),
    "a config that is a list": (lambda f: (f / "config.json").write_text("[]"), ["config.json"]),
    "a model type nobody knows": (
        edit_json("config.json", model_type="deepsneak"),
        ["config.json", "deepsneak"],
    ),
    "no model type": (edit_json("config.json", model_type=None), ["config.json", "model_type"]),
    "a value of a wrong kind": (edit_json("config.json", hidden_size="wide"), ["config.json", "hidden_size"]),
    "another quantization": (
        edit_json("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        ["config.json", "gptq", "fp8 and blockwise_int8 with 128x128 blocks"],
    ),
    "other blocks": (
        edit_json("config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]}),
        ["config.json", "[64, 64]", "fp8 and blockwise_int8 with 128x128 blocks"],
    ),
    "fewer experts than the config says": (
        edit_json("config.json", n_routed_experts=20),
        ["experts", "20", "16"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_cannot_be_used_is_named_in_one_line(sharded, tmp_path, damage):
    folder = tmp_path / "model"
    shutil.copytree(sharded, folder)
    make, words = DAMAGES[damage]
    make(folder)
    with moe_runtime.init() as runtime, pytest.raises(CheckpointError) as caught:
        runtime.load_model(folder)
    said = str(caught.value)
    assert "\n" not in said and len(said) < 600
    assert all(word in said for word in [str(folder), *words]), said


def test_the_undamaged_checkpoint_loads(sharded):
    with moe_runtime.init() as runtime:
        assert_holds_its_part(runtime.load_model(sharded), transformers_state(sharded), 0)


def test_a_fused_tensor_with_too_few_experts_is_refused(checkpoint, tmp_path):
    shutil.copytree(checkpoint("gpt_oss"), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / SINGLE)
    tensors["model.layers.1.mlp.experts.down_proj"] = tensors["model.layers.1.mlp.experts.down_proj"][:15].clone()
    save_file(tensors, tmp_path / "model" / SINGLE)
    with moe_runtime.init() as runtime, pytest.raises(CheckpointError, match=r"layers\.1.*down_proj.*\[15, .*16 exp"):
        runtime.load_model(tmp_path / "model")


def test_a_dense_model_is_refused(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with moe_runtime.init() as runtime, pytest.raises(ConfigError, match="LlamaForCausalLM.*nothing to shard.*dense"):
        runtime.load_model(tmp_path)


def refuse_placements(folder: Path) -> dict[str, str]:
    size = 3
    placements = {
        "layers": proportional(2, 16, [1.0] * size),
        "experts": proportional(1, 17, [1.0] * size),
        "too few experts": proportional(1, 8, [1.0] * size),
        "ranks": proportional(1, 16, [1.0] * (size - 1)),
        "too many ranks": proportional(1, 16, [1.0] * (size + 1)),
    }
    said = {}
    with moe_runtime.init({"timeout_s": 30}) as runtime:
        for name, placement in placements.items():
            with pytest.raises(ConfigError) as caught:
                runtime.load_model(folder, placement=placement)
            said[name] = str(caught.value)
        # Refusals leave the ranks in step: the same runtime goes on to load.
        model = runtime.load_model(folder, placement=from_owners([[[e % size] for e in range(16)]], size))
        assert experts_modules(model)["model.layers.1.mlp.experts"].num_experts == (6 if runtime.rank == 0 else 5)
    return said


def test_placements_that_do_not_fit_are_refused_on_every_rank(checkpoint):
    for said in run_ranks(refuse_placements, 3, checkpoint("deepseek_v3")):
        assert "2 layers" in said["layers"] and "1 expert" in said["layers"]
        assert "16 experts" in said["experts"] and "17" in said["experts"]
        assert "16 experts" in said["too few experts"] and "8" in said["too few experts"]
        assert "2 ranks" in said["ranks"] and "3" in said["ranks"]
        assert "4 ranks" in said["too many ranks"] and "3" in said["too many ranks"]


def load_refused(folder: Path) -> tuple[str, str]:
    with moe_runtime.init({"timeout_s": 10}) as runtime:
        try:
            runtime.load_model(folder)
        except (CheckpointError, ConfigError) as error:
            return type(error).__name__, str(error)
        return "loaded", ""


def test_more_ranks_than_experts_are_refused_on_every_rank(tmp_path):
    write_checkpoint(tmp_path, "mixtral", num_local_experts=2)
    for kind, said in run_ranks(load_refused, 3, tmp_path):
        assert kind == "ConfigError" and "3 ranks for 2 experts" in said and "at most 2 ranks" in said


def test_what_one_rank_finds_missing_ends_loading_on_every_rank(sharded, tmp_path):
    """Expert 11 belongs to rank 1 alone; rank 0 must not go on with a model that has no partner."""
    shutil.copytree(sharded, tmp_path / "model")
    drop(f"{EXPERT}.")(tmp_path / "model")
    for kind, said in run_ranks(load_refused, 2, tmp_path / "model"):
        assert kind == "CheckpointError" and "expert 11" in said


# ---------------------------------------------------------------- what each rank reads and holds


def read_own_experts_only(folder: Path) -> list[set[int]]:
    """Per expert layer, the experts of which this rank asked the reader for anything."""
    asked: list[tuple[str, int | None]] = []
    read_raw, read_into = CheckpointReader.read_raw, CheckpointReader.read_into

    def recording(self, key, row=None):
        asked.append((key, row))
        return read_raw(self, key, row)

    def recording_too(self, key, out, row=None):
        asked.append((key, row))
        read_into(self, key, out, row)

    CheckpointReader.read_raw, CheckpointReader.read_into = recording, recording_too
    with moe_runtime.init({"timeout_s": 30}) as runtime:
        model = runtime.load_model(folder)
        layers = [module.moe_runtime_layer for module in experts_modules(model).values()]
        seen: list[set[int]] = [set() for _ in layers]
        first_dense = model.config.num_hidden_layers - len(layers)
        for key, row in asked:
            before, mark, after = key.partition(".experts.")
            if mark:
                layer = int(before.split(".layers.")[1].split(".")[0]) - first_dense
                number = after.split(".")[0]
                assert number.isdigit() or row is not None, f"{key} was read whole"
                seen[layer].add(int(number) if number.isdigit() else row)
        for layer, module in zip(layers, experts_modules(model).values(), strict=True):
            mine = layer.placement.rank_experts(layer.index, runtime.rank)
            assert seen[layer.index] == set(mine)
            assert module.num_experts == len(mine)
            assert all(parameter.shape[0] == len(mine) for parameter in module.parameters(recurse=False))
    return seen


@pytest.mark.parametrize("family", STORED_FAMILIES)
def test_each_rank_reads_and_holds_its_own_experts_only(checkpoint, family):
    per_rank = run_ranks(read_own_experts_only, 3, checkpoint(family))
    for layers in zip(*per_rank, strict=True):
        assert [len(experts) for experts in layers] == [6, 5, 5]
        assert set.union(*layers) == set(range(16))


def load_as_transformers_does(folders: list[Path], dtype: torch.dtype) -> int:
    with moe_runtime.init({"timeout_s": 30}) as runtime:
        for folder in folders:
            whole = transformers_state(folder, dtype)
            assert_holds_its_part(runtime.load_model(folder, dtype=dtype), whole, runtime.rank)
    return len(folders)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_tensor_has_the_dtype_and_value_that_transformers_gives_it(checkpoint, dtype):
    """Also those that transformers keeps in float32, such as e_score_correction_bias."""
    folders = [checkpoint(family) for family in FAMILIES]
    assert run_ranks(load_as_transformers_does, 2, folders, dtype) == [len(FAMILIES)] * 2
    whole = transformers_state(checkpoint("deepseek_v3"), dtype)
    kept = {name.rpartition(".")[2] for name, value in whole.items() if value.dtype == torch.float32}
    assert "e_score_correction_bias" in kept  # otherwise the comparison above would say little


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v4", "mixtral", "qwen3_moe"])
def test_fused_experts_load_in_families_that_store_them_one_by_one(checkpoint, tmp_path, family):
    model = reference_model(family)
    keys = [name for name in model.state_dict() if name.endswith("mlp.experts.gate_up_proj")]
    assert keys
    save_file(model.state_dict(), tmp_path / SINGLE)
    model.config.save_pretrained(tmp_path)
    assert run_ranks(load_fused, 2, tmp_path, checkpoint(family)) == [None, None]


def load_fused(fused: Path, one_by_one: Path) -> None:
    with moe_runtime.init({"timeout_s": 30}) as runtime:
        model = runtime.load_model(fused, dtype=torch.float32)
        assert_holds_its_part(model, transformers_state(one_by_one), runtime.rank)


# ---------------------------------------------------------------- FP8

FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def write_fp8(folder: Path, **changes) -> Path:
    """A deepseek_v3 checkpoint as DeepSeek publishes them, and beside it one with the same values in float32."""
    plain = folder.with_name(f"{folder.name}-dequantised")
    model = reference_model("deepseek_v3", **changes)
    model.save_pretrained(plain)
    tensors, values, quantised = {}, {}, 0
    for name, weight in load_file(plain / SINGLE).items():
        if weight.dim() == 2 and not any(part in name for part in ("lm_head", "embed_tokens", "mlp.gate.")):
            weight, scale = quantize_blocks(weight)
            tensors[f"{name}_scale_inv"] = scale
            quantised += 1
        tensors[name] = weight
        is_fp8 = weight.dtype == torch.float8_e4m3fn
        values[name] = dequantize_blocks(weight, scale, torch.float32) if is_fp8 else weight
    assert quantised > 48
    folder.mkdir()
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    save_file(values, plain / SINGLE, metadata={"format": "pt"})
    shutil.copy(plain / "config.json", folder)
    edit_json("config.json", quantization_config=FP8_CONFIG)(folder)
    return folder


IDS = torch.randint(2, 128, (2, 12), generator=torch.Generator().manual_seed(3))


def fp8_logits(folder: Path, keep_fp8: bool) -> dict:
    with moe_runtime.init({"timeout_s": 30}) as runtime, torch.no_grad():
        model = runtime.load_model(folder, dtype=torch.float32, keep_fp8=keep_fp8)
        experts = {
            name: parameter.dtype
            for module in experts_modules(model).values()
            for name, parameter in module.named_parameters(recurse=False)
        }
        others = {p.dtype for n, p in model.named_parameters() if ".experts." not in n}
        return {"logits": model(IDS).logits.tolist(), "experts": experts, "others": others}


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    return write_fp8(tmp_path_factory.mktemp("fp8") / "model", hidden_size=256, moe_intermediate_size=128)


@pytest.mark.parametrize("keep_fp8", [False, True])
def test_fp8_gives_the_logits_that_transformers_gives(fp8, keep_fp8):
    config = FineGrainedFP8Config(dequantize=True)
    oracle = AutoModelForCausalLM.from_pretrained(fp8, dtype=torch.float32, quantization_config=config)
    assert {p.dtype for p in oracle.parameters()} == {torch.float32}
    with torch.no_grad():
        expected = oracle(IDS).logits
    for got in run_ranks(fp8_logits, 2, fp8, keep_fp8):
        torch.testing.assert_close(torch.tensor(got["logits"]), expected, rtol=1e-5, atol=1e-5)
        weight = torch.float8_e4m3fn if keep_fp8 else torch.float32
        assert got["experts"].pop("gate_up_proj") == got["experts"].pop("down_proj") == weight
        assert set(got["experts"].values()) == ({torch.float32} if keep_fp8 else set())
        assert got["others"] == {torch.float32}


@pytest.mark.parametrize("hidden, intermediate", [(192, 96), (160, 200), (136, 128), (48, 24)])
def test_ragged_fp8_blocks_are_dequantised(tmp_path, hidden, intermediate):
    """transformers refuses some of these; the oracle is the same weights, dequantised by hand, in its own model."""
    folder = write_fp8(tmp_path / "model", hidden_size=hidden, moe_intermediate_size=intermediate)
    whole = transformers_state(folder.with_name("model-dequantised"))
    with moe_runtime.init() as runtime:
        assert_holds_its_part(runtime.load_model(folder, dtype=torch.float32), whole, 0)


@pytest.mark.parametrize("hidden, intermediate", [(192, 96), (160, 200), (256, 64), (256, 192)])
def test_experts_whose_blocks_do_not_line_up_cannot_stay_in_fp8(tmp_path, hidden, intermediate):
    folder = write_fp8(tmp_path / "model", hidden_size=hidden, moe_intermediate_size=intermediate)
    with moe_runtime.init() as runtime, pytest.raises(ConfigError) as caught:
        runtime.load_model(folder, keep_fp8=True)
    said = str(caught.value)
    assert "gate_up_proj" in said and "FP8" in said and "load without keeping FP8" in said and "\n" not in said


def test_a_ragged_hidden_size_alone_can_stay_in_fp8(tmp_path):
    folder = write_fp8(tmp_path / "model", hidden_size=136, moe_intermediate_size=128)
    kept, dequantised = (run_ranks(fp8_logits, 2, folder, keep)[0]["logits"] for keep in (True, False))
    assert kept == dequantised


def test_fp8_scales_of_another_shape_are_refused(fp8, tmp_path):
    tensors = load_file(fp8 / SINGLE)
    tensors[f"{EXPERT}.down_proj.weight_scale_inv"] = torch.ones(1, 1)
    shutil.copytree(fp8, tmp_path / "model")
    save_file(tensors, tmp_path / "model" / SINGLE)
    for keep_fp8 in (False, True):
        with moe_runtime.init() as runtime, pytest.raises(CheckpointError, match=f"{EXPERT}.down_proj.*scales of sha"):
            runtime.load_model(tmp_path / "model", keep_fp8=keep_fp8)


# ---------------------------------------------------------------- saving


def save_again(source: Path, folder: Path) -> None:
    with moe_runtime.init({"timeout_s": 30}) as runtime:
        model = runtime.load_model(source, dtype=torch.float32)
        runtime.save_model(model, folder / "whole")
        runtime.save_model(model, folder / "shards", max_shard_bytes=60_000)
        runtime.save_model(model, folder / "shards", max_shard_bytes=90_000)  # over the one before


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("family", STORED_FAMILIES)
def test_what_is_saved_equals_the_original_for_plain_transformers(checkpoint, tmp_path, family, size):
    source = checkpoint(family)
    run_ranks(save_again, size, source, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards", "whole"]  # nothing partial is left beside
    assert_same_tensors(load_file(tmp_path / "whole" / SINGLE), load_file(source / SINGLE))

    names = [path.name for path in shards(tmp_path / "shards")]
    assert len(names) > 3 and names == [f"model-{n + 1:05d}-of-{len(names):05d}.safetensors" for n in range(len(names))]
    index = json.loads((tmp_path / "shards" / INDEX).read_text())
    held = {path.name: load_file(path) for path in shards(tmp_path / "shards")}
    assert index["weight_map"] == {key: name for name, tensors in held.items() for key in tensors}
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in held.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert all(size <= 90_000 or len(tensors) == 1 for size, tensors in zip(sizes, held.values(), strict=True))

    original = transformers_state(source)
    for folder in ("whole", "shards"):
        assert_same_tensors(transformers_state(tmp_path / folder), original)
        written, read = (json.loads((path / "config.json").read_text()) for path in (tmp_path / folder, source))
        assert written["architectures"] == read["architectures"] and written["model_type"] == read["model_type"]
        assert written["dtype"] == "float32"


def save_bfloat16(source: Path, folder: Path) -> None:
    with moe_runtime.init({"timeout_s": 30}) as runtime:
        model = runtime.load_model(source, dtype=torch.bfloat16, placement=replicas(runtime.size))
        runtime.save_model(model, folder)


def replicas(size: int):
    return from_owners([[sorted({e % size, (e // 3) % size}) for e in range(16)]], size)


def test_a_model_in_bfloat16_with_replicas_is_saved_as_transformers_would(checkpoint, tmp_path):
    run_ranks(save_bfloat16, 3, checkpoint("deepseek_v3"), tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(checkpoint("deepseek_v3"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    assert_same_tensors(load_file(tmp_path / "ours" / SINGLE), load_file(tmp_path / "theirs" / SINGLE))
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == "bfloat16"


def save_on_a_full_disk(source: Path, folder: Path, file_bytes: int) -> str:
    """No file of any rank may grow beyond `file_bytes`: writing more fails as on a full disk."""
    with moe_runtime.init({"timeout_s": 20}) as runtime:
        model = runtime.load_model(source, dtype=torch.float32)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, hard))  # Python ignores SIGXFSZ, so writes raise
        try:
            with pytest.raises(CheckpointError) as caught:
                runtime.save_model(model, folder, max_shard_bytes=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        # The ranks are still in step, and with space the same call succeeds.
        runtime.save_model(model, folder.with_name("afterwards"))
        return str(caught.value)


@pytest.fixture(scope="module")
def many_small(tmp_path_factory):
    """A checkpoint whose index, one shard per tensor, is larger than any of its tensors."""
    folder = tmp_path_factory.mktemp("small") / "model"
    write_checkpoint(folder, "deepseek_v3", vocab_size=16, intermediate_size=8, n_routed_experts=64)
    tensors = load_file(folder / SINGLE)
    assert max(tensor.nbytes for tensor in tensors.values()) < 13_000 and 80 * len(tensors) > 15_000
    return folder


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("file_bytes", [1_000, 10_000, 15_000], ids=["first shard", "a later shard", "index"])
def test_a_full_disk_harms_nothing(many_small, tmp_path, file_bytes, older):
    target = tmp_path / "target"
    if older:
        write_checkpoint(target, "deepseek_v3", seed=5)
        before = {path.name: path.read_bytes() for path in target.iterdir()}
    for said in run_ranks(save_on_a_full_disk, 2, many_small, target, file_bytes, timeout=60):
        assert said.startswith(f"{target}: ") and "\n" not in said
        assert "could not be written" in said and "File too large" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["afterwards", *(["target"] if older else [])]
    assert_same_tensors(transformers_state(tmp_path / "afterwards"), transformers_state(many_small))
    if older:
        assert {path.name: path.read_bytes() for path in target.iterdir()} == before
        assert transformers_state(target)


class BrokenTokenizer:
    def save_pretrained(self, folder):
        raise ValueError("this tokenizer cannot be saved")


def save_refused(source: Path, folder: Path, why: str) -> str:
    with moe_runtime.init({"timeout_s": 10}) as runtime:
        model = runtime.load_model(source)
        if why == "generation config":
            model.generation_config.temperature = 0.3  # transformers refuses to save this without do_sample
        with pytest.raises(CheckpointError) as caught:
            runtime.save_model(model, folder, tokenizer=BrokenTokenizer() if why == "tokenizer" else None)
        return str(caught.value)


def test_a_folder_that_is_no_checkpoint_is_not_overwritten(checkpoint, tmp_path):
    target = tmp_path / "thesis"
    target.mkdir()
    (target / "chapter-1.txt").write_text("years of work")
    for said in run_ranks(save_refused, 2, checkpoint("deepseek_v3"), target, "folder"):
        assert str(target) in said and "not a checkpoint" in said and "not overwritten" in said
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]
    assert (target / "chapter-1.txt").read_text() == "years of work"


def test_a_target_that_cannot_be_is_reported_on_every_rank(checkpoint, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for said in run_ranks(save_refused, 2, checkpoint("deepseek_v3"), tmp_path / "file" / "model", "folder"):
        assert "could not be written" in said
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("why", ["generation config", "tokenizer"])
def test_what_transformers_refuses_to_save_is_reported_on_every_rank(checkpoint, tmp_path, why):
    for said in run_ranks(save_refused, 2, checkpoint("deepseek_v3"), tmp_path / "target", why, timeout=60):
        assert "could not be written" in said and ("temperature" if why != "tokenizer" else why) in said
    assert not list(tmp_path.iterdir())


def save_kept_fp8(folder: Path, target: Path) -> str:
    with moe_runtime.init({"timeout_s": 10}) as runtime:
        model = runtime.load_model(folder, keep_fp8=True)
        with pytest.raises(ConfigError, match="FP8 cannot be saved; load it without keeping FP8") as caught:
            runtime.save_model(model, target)
        return str(caught.value)


def test_a_model_kept_in_fp8_is_refused_by_save(fp8, tmp_path):
    assert len(run_ranks(save_kept_fp8, 2, fp8, tmp_path / "target")) == 2
    assert not list(tmp_path.iterdir())


def test_create_save_and_load_is_a_round_trip(tmp_path):
    run_ranks(create_and_save, 2, tmp_path)
    assert_same_tensors(transformers_state(tmp_path / "two"), transformers_state(tmp_path / "one"))


def create_and_save(folder: Path) -> None:
    """The same fresh model saved by two ranks and, from the files of those two, by each rank alone."""
    with moe_runtime.init({"timeout_s": 30}) as runtime:
        model = runtime.create_model(family_config("deepseek_v3"), seed=11)
        runtime.save_model(model, folder / "two")
        runtime.transport.barrier("test")
        again = runtime.load_model(folder / "two", placement=proportional(1, 16, [1.0, 3.0]))
        runtime.save_model(again, folder / "one")

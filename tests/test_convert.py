"""Checkpoints in other weight formats, and experts held in 8 bits: differently on different ranks of one job.

The oracle is transformers' own model with the weights that the 8 bits stand for, dequantised by the torch twin.
"""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from families import reference_model, write_checkpoint
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

import moe_runtime
from moe_runtime import convert as convert_module
from moe_runtime.checkpoint import INDEX, SINGLE, CheckpointReader
from moe_runtime.convert import TARGETS, convert
from moe_runtime.core.cluster import Node, load_cluster
from moe_runtime.errors import CheckpointError, ConfigError
from moe_runtime.expert_dtypes import Sizes, choose
from moe_runtime.experts.blocks import FORMATS, dequantize_blocks_torch, quantize_blocks_torch
from moe_runtime.experts.placement import from_owners, proportional
from moe_runtime.launch import cli
from moe_runtime.launch import convert as command
from moe_runtime.launch.jobs import generate
from moe_runtime.launch.planning import job
from moe_runtime.launch.planning.plan import of_job, rank_rows
from moe_runtime.launch.planning.shape import read_shape

IDS = torch.randint(2, 128, (2, 12), generator=torch.Generator().manual_seed(3))
SIZES = dict(hidden_size=256, moe_intermediate_size=128)
EXPERT = "model.layers.1.mlp.experts.3"


@pytest.fixture(scope="module")
def bf16(tmp_path_factory):
    """deepseek_v3 in bfloat16, in several shards, with a tokenizer's file and some that are not to be copied."""
    folder = tmp_path_factory.mktemp("bf16") / "model"
    reference_model("deepseek_v3", **SIZES).bfloat16().save_pretrained(folder, max_shard_size="500KB")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("a pickle")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture(scope="module")
def converted(bf16, tmp_path_factory):
    """form -> the checkpoint in it."""
    made: dict[str, Path] = {}

    def build(form: str) -> Path:
        if form not in made:
            made[form] = tmp_path_factory.mktemp(form) / "model"
            convert(bf16, made[form], form, max_shard_bytes=600_000)
        return made[form]

    return build


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def dequantised(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The values that a folder's tensors stand for, by the torch twin."""
    tensors = tensors_of(folder)
    scales = {key: tensors.pop(key) for key in list(tensors) if key.endswith("_scale_inv")}
    return {
        key: dequantize_blocks_torch(value, scales[f"{key}_scale_inv"], dtype)
        if f"{key}_scale_inv" in scales
        else value
        for key, value in tensors.items()
    }


def logits_of(folder: Path, dtype: torch.dtype = torch.float32, **settings) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **settings)(IDS).logits


def plain_float32(folder: Path, target: Path) -> Path:
    """A checkpoint for plain transformers with the values that `folder` stands for."""
    target.mkdir()
    save_file({k: v.float() for k, v in dequantised(folder, torch.float32).items()}, target / SINGLE)
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    (target / "config.json").write_text(json.dumps(config))
    return target


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("form", FORMATS)
def test_what_deepseek_has_in_8_bits_is_converted_and_nothing_else(bf16, converted, form):
    before, after = tensors_of(bf16), tensors_of(converted(form))
    in_8_bits = {key for key, value in after.items() if value.dtype == FORMATS[form]}
    assert in_8_bits == {key for key in before if key.endswith("_proj.weight") or key.endswith("_with_mqa.weight")}
    assert {f"{EXPERT}.up_proj.weight", "model.layers.1.mlp.shared_experts.down_proj.weight"} <= in_8_bits
    assert {"model.layers.0.mlp.gate_proj.weight", "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"} <= in_8_bits
    assert after.keys() == before.keys() | {f"{key}_scale_inv" for key in in_8_bits}
    for key, value in before.items():
        if key in in_8_bits:
            code, scale = quantize_blocks_torch(value, to=FORMATS[form])
            assert torch.equal(after[key].view(torch.uint8), code.view(torch.uint8))
            assert torch.equal(after[f"{key}_scale_inv"], scale) and scale.dtype == torch.float32
        else:
            assert after[key].dtype == value.dtype and torch.equal(after[key], value)


def test_the_folder_is_a_whole_checkpoint(bf16, converted):
    folder = converted("int8")
    index = json.loads((folder / INDEX).read_text())
    held = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    assert index["weight_map"] == {key: name for name, tensors in held.items() for key in tensors} and len(held) > 2
    assert all(sum(t.nbytes for t in tensors.values()) <= 600_000 for tensors in held.values())
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "generation_config.json", "tokenizer.json", INDEX, *held,
    }  # fmt: skip
    config, source = (json.loads((path / "config.json").read_text()) for path in (folder, bf16))
    assert config.pop("quantization_config") == {
        "quant_method": "blockwise_int8", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    }  # fmt: skip
    assert config == source
    assert sorted(p.name for p in folder.parent.iterdir()) == ["model"]


@pytest.mark.parametrize("form", FORMATS)
def test_back_in_bfloat16_plain_transformers_computes_with_the_values_of_the_8_bits(converted, tmp_path, form):
    convert(converted(form), tmp_path / "back", "bfloat16")
    written, expected = tensors_of(tmp_path / "back"), dequantised(converted(form), torch.bfloat16)
    assert written.keys() == expected.keys() and all(torch.equal(written[key], expected[key]) for key in expected)
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    by_hand = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(logits_of(tmp_path / "back", torch.bfloat16), by_hand(IDS).logits)
    (tmp_path / "hand").mkdir()
    save_file(expected, tmp_path / "hand" / SINGLE, metadata={"format": "pt"})
    shutil.copy(tmp_path / "back" / "config.json", tmp_path / "hand")
    assert torch.equal(logits_of(tmp_path / "back", torch.bfloat16), logits_of(tmp_path / "hand", torch.bfloat16))


def test_a_model_in_float32_becomes_one_in_bfloat16(tmp_path):
    write_checkpoint(tmp_path / "wide", "deepseek_v3")
    report = convert(tmp_path / "wide", tmp_path / "narrow", "bfloat16")
    wide, narrow = tensors_of(tmp_path / "wide"), tensors_of(tmp_path / "narrow")
    for key, value in wide.items():
        assert torch.equal(narrow[key], value.bfloat16() if value.dim() > 1 and ".gate." not in key else value), key
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["dtype"] == "bfloat16"
    assert report.bytes_before > 1.9 * report.bytes_after and 0 < report.errors.largest < 2**-8
    assert torch.equal(logits_of(tmp_path / "wide", torch.bfloat16), logits_of(tmp_path / "narrow", torch.bfloat16))


def test_plain_transformers_reads_the_fp8_of_all_weights_and_of_experts_alone(bf16, converted, tmp_path):
    convert(bf16, tmp_path / "experts", "fp8", experts_only=True)
    tensors = tensors_of(tmp_path / "experts")
    assert {k for k, v in tensors.items() if v.dtype == torch.float8_e4m3fn} == {
        key for key in tensors if ".experts." in key and key.endswith(".weight")
    }
    for number, folder in enumerate((converted("fp8"), tmp_path / "experts")):
        theirs = logits_of(folder, quantization_config=FineGrainedFP8Config(dequantize=True))
        expected = logits_of(plain_float32(folder, tmp_path / str(number)))
        torch.testing.assert_close(theirs, expected, rtol=1e-5, atol=1e-5)


def test_experts_alone_in_int8_from_fp8_leave_all_else_in_bfloat16(converted, tmp_path):
    report = convert(converted("fp8"), tmp_path / "new", "int8", experts_only=True)
    kinds = {key: value.dtype for key, value in tensors_of(tmp_path / "new").items() if not key.endswith("_scale_inv")}
    assert {kind for key, kind in kinds.items() if ".experts." in key} == {torch.int8}
    assert torch.bfloat16 in kinds.values() and torch.float8_e4m3fn not in kinds.values()
    assert report.changed == sum(v.dtype == torch.float8_e4m3fn for v in tensors_of(converted("fp8")).values())


def squares(tensors: dict[str, torch.Tensor]) -> float:
    return sum(value.double().square().sum().item() for value in tensors.values())


@pytest.mark.parametrize(("form", "most", "all_together"), [("fp8", 16 / 448, 0.03), ("int8", 0.5 / 127, 0.011)])
def test_the_errors_are_measured(bf16, tmp_path, form, most, all_together):
    report = convert(bf16, tmp_path / "new", form)
    before, after = tensors_of(bf16), dequantised(tmp_path / "new", torch.float32)
    off = {key: before[key].float() - value for key, value in after.items() if value.dtype == torch.float32}
    assert report.changed == len(off)
    assert report.errors.blocks == sum(-(-v.shape[0] // 128) * -(-v.shape[1] // 128) for v in off.values())
    assert report.bytes_before == sum(value.nbytes for value in before.values())
    assert report.bytes_after == sum(value.nbytes for value in tensors_of(tmp_path / "new").values())
    assert report.errors.mean <= report.errors.largest <= most * (1 + 1e-5)
    assert report.errors.largest == pytest.approx(
        max((v[:128, :128].abs().max() / before[key][:128, :128].abs().max()).item() for key, v in off.items()), rel=0.1
    )
    rms = (
        sum(v.double().square().sum() for v in off.values()) / sum(before[k].double().square().sum() for k in off)
    ) ** 0.5
    assert report.errors.root_mean_square == pytest.approx(float(rms), rel=1e-4) and rms < all_together


@pytest.mark.parametrize(("form", "most", "most_of_experts"), [("fp8", 0.4, 0.03), ("int8", 0.2, 0.011)])
def test_logits_stay_near_the_originals(bf16, converted, tmp_path, form, most, most_of_experts):
    """Of a model with random weights, where every token's experts depend on small differences."""
    convert(bf16, tmp_path / "experts", form, experts_only=True)
    original = logits_of(bf16)
    for name, folder, limit in (("all", converted(form), most), ("one", tmp_path / "experts", most_of_experts)):
        off = logits_of(plain_float32(folder, tmp_path / name)) - original
        assert (off.square().mean() / original.square().mean()).sqrt() < limit


# ---------------------------------------------------------------- what is refused


def damaged(bf16: Path, folder: Path, change) -> Path:
    shutil.copytree(bf16, folder)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
    return folder


def refusal(source: Path, target: Path, to: str = "int8", **settings) -> str:
    beside = sorted(path.name for path in target.parent.iterdir()) if target.parent.is_dir() else None
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        convert(source, target, to, **settings)
    assert beside == (sorted(path.name for path in target.parent.iterdir()) if target.parent.is_dir() else None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_is_refused_before_anything_is_written(bf16, converted, tmp_path):
    assert "is the source" in refusal(bf16, bf16)
    assert "is the source" in refusal(bf16, bf16.parent / "x" / ".." / "model")
    assert "holds it" in refusal(bf16, bf16.parent)
    assert "config.json" in refusal(tmp_path / "nowhere", tmp_path / "new")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter-1.txt").write_text("years of work")
    assert "not a checkpoint" in refusal(bf16, tmp_path / "thesis")
    assert "a file" in refusal(bf16, tmp_path / "thesis" / "chapter-1.txt")
    assert "already" in refusal(converted("int8"), tmp_path / "new")
    assert "already" in refusal(bf16, tmp_path / "new", "bfloat16")
    assert "no meaning for bfloat16" in refusal(converted("int8"), tmp_path / "new", "bfloat16", experts_only=True)
    assert "choose one of bfloat16, fp8, int8" in refusal(bf16, tmp_path / "new", "int4")


def test_experts_that_no_rank_could_keep_in_8_bits_are_refused(tmp_path):
    write_checkpoint(tmp_path / "model", "deepseek_v3", hidden_size=256, moe_intermediate_size=192)
    said = refusal(tmp_path / "model", tmp_path / "new")
    assert ".gate_proj.weight has 192 rows" in said and "do not line up" in said


def test_a_family_with_all_experts_in_one_tensor_is_refused(tmp_path):
    write_checkpoint(tmp_path / "model", "gpt_oss")
    assert "experts of a layer in one tensor" in refusal(tmp_path / "model", tmp_path / "new")


def test_int8_without_scales_and_other_quantizations_are_refused(bf16, tmp_path):
    def packed(tensors):
        for key in tensors:
            if key.startswith(EXPERT):
                tensors[key] = torch.zeros(tensors[key].shape, dtype=torch.int8)

    said = refusal(damaged(bf16, tmp_path / "fp4", packed), tmp_path / "new", "bfloat16")
    assert EXPERT in said and "without scales for 128x128 blocks" in said
    shutil.copytree(bf16, tmp_path / "gptq")
    edit(tmp_path / "gptq", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "gptq" in refusal(tmp_path / "gptq", tmp_path / "new")


def test_values_that_are_no_numbers_are_refused_and_nothing_is_left(bf16, tmp_path):
    def spoil(tensors):
        for key in tensors:
            if key == f"{EXPERT}.up_proj.weight":
                tensors[key][5, 7] = float("inf")

    said = refusal(damaged(bf16, tmp_path / "model", spoil), tmp_path / "new")
    assert f"{EXPERT}.up_proj.weight" in said and "no finite numbers" in said


@pytest.mark.parametrize("older", [False, True])
def test_a_full_disk_leaves_nothing_half_written(bf16, tmp_path, monkeypatch, older):
    target = tmp_path / "target"
    if older:
        write_checkpoint(target, "deepseek_v3", seed=5)
    before = {path.name: path.read_bytes() for path in target.iterdir()} if older else None
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # Python ignores SIGXFSZ, so writes raise
    try:
        said = refusal(bf16, target, max_shard_bytes=200_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "could not be written" in said and "File too large" in said
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda path: type("", (), {"free": 1 << 20}))
    assert "0.0 GiB are free" in refusal(bf16, target)
    assert not older or {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_an_interrupted_conversion_leaves_nothing(bf16, tmp_path):
    def stop(done, total):
        if done == 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(bf16, tmp_path / "new", "int8", progress=stop, max_shard_bytes=100_000)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the command


def test_the_command_converts_and_says_what_it_measured(bf16, tmp_path, capfd):
    assert cli.main(["convert", str(bf16), str(tmp_path / "new"), "--to", "int8"]) == 0
    said = capfd.readouterr().out
    assert "64 of 77 tensors now in int8; 3.5 MiB before, 1.8 MiB after" in said
    assert "measured against the source's values" in said and "not copied: pytorch_model.bin" in said
    assert cli.main(["convert", str(bf16), str(tmp_path / "new"), "--to", "fp8", "--experts_only", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (
        found["changed"] == 48
        and 0.03 < found["largest_error"] < 0.036
        and found["bytes_after"] < found["bytes_before"]
    )
    assert cli.main(["convert", str(bf16), str(bf16), "--to", "int8"]) == 2
    assert cli.main(["convert", str(bf16), str(tmp_path / "x"), "--to", "int4"]) == 2
    error = capfd.readouterr().err.splitlines()
    assert len(error) == 2 and all(line.startswith("moe-launch: error: ") for line in error)
    assert command._TARGETS == TARGETS


# ---------------------------------------------------------------- experts in 8 bits, in memory


def cluster_file(folder: Path, *nodes: str) -> str:
    path = folder / "cluster.toml"
    path.write_text("".join(f'[[node]]\nname = "{"abc"[n]}"\n{words}\n' for n, words in enumerate(nodes)))
    return str(path)


def run_model(folder: Path, settings: dict, **options) -> dict:
    """What a rank computes with a model, and what it says of it."""
    with moe_runtime.init({"timeout_s": 30, **settings}) as runtime, torch.no_grad():
        model = runtime.load_model(folder, dtype=torch.float32, **options)
        module = next(m for m in model.modules() if hasattr(m, "moe_runtime_layer"))
        return {
            "logits": model(IDS).logits.tolist(),
            "dtype": str(module.down_proj.dtype).removeprefix("torch."),
            "lines": [line for line in runtime.describe().splitlines() if line.startswith(("experts", "note"))],
        }


def assert_logits(results: list[dict], expected: torch.Tensor) -> None:
    for found in results:
        torch.testing.assert_close(torch.tensor(found["logits"]), expected, rtol=1e-5, atol=1e-5)


def run_form(folder: Path, form: str) -> dict:
    return run_model(folder, {}, expert_dtype=form)


@pytest.mark.parametrize("form", FORMATS)
def test_experts_stay_as_they_are_stored(converted, tmp_path, form):
    expected = logits_of(plain_float32(converted(form), tmp_path / "plain"))
    for asked in (form, "float32"):
        results = run_ranks(run_form, 2, converted(form), asked)
        assert_logits(results, expected)
        held = str(FORMATS[form]).removeprefix("torch.") if asked == form else "float32"
        assert [found["dtype"] for found in results] == [held, held]
        assert results[1]["lines"][0].startswith(f"experts: held in {asked}")


def quantised_experts(folder: Path, forms: list[str | None]) -> torch.Tensor:
    """Logits of transformers' own model with expert e's matrices rounded as forms[e] says."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                for expert, form in enumerate(forms):
                    if form:
                        blocks = quantize_blocks_torch(weight[expert], to=FORMATS[form])
                        weight[expert] = dequantize_blocks_torch(*blocks, torch.float32)
        return model(IDS).logits


def run_cluster(folder: Path, cluster: str) -> dict:
    return run_model(folder, {"cluster": cluster})


def test_ranks_of_one_job_hold_experts_differently(bf16, tmp_path):
    cluster = cluster_file(tmp_path, 'expert_dtype = "int8"', "", 'expert_dtype = "fp8"')
    results = run_ranks(run_cluster, 3, bf16, cluster)
    owners = proportional(1, 16, [1.0] * 3)
    forms = [["int8", None, "fp8"][rank] for rank in range(3) for _ in owners.rank_experts(0, rank)]
    assert_logits(results, quantised_experts(bf16, forms))
    assert [found["dtype"] for found in results] == ["int8", "float32", "float8_e4m3fn"]
    assert "(expert_dtype of node a)" in results[0]["lines"][0] and "MiB on this rank" in results[0]["lines"][0]
    assert results[1]["lines"][1].startswith("experts of ranks 0 in int8; 1 in float32; 2 in fp8: ")


@pytest.mark.parametrize("sizes", [(160, 200), (136, 64)])
def test_matrices_of_any_size_are_quantised_while_loading(tmp_path, sizes):
    hidden, intermediate = sizes
    write_checkpoint(tmp_path / "model", "deepseek_v3", hidden_size=hidden, moe_intermediate_size=intermediate)
    results = run_ranks(run_form, 1, tmp_path / "model", "int8")
    assert_logits(results, quantised_experts(tmp_path / "model", ["int8"] * 16))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_other_families_hold_experts_in_int8_too(tmp_path, family):
    """Renamed keys; fused and transposed ones with biases, which stay as they are."""
    write_checkpoint(tmp_path / "model", family, hidden_size=128, intermediate_size=128)
    results = run_ranks(run_form, 2, tmp_path / "model", "int8")
    assert_logits(results, quantised_experts(tmp_path / "model", ["int8"] * 16))
    assert [found["dtype"] for found in results] == ["int8", "int8"]


def test_memory_that_is_short_asks_for_8_bits_and_it_is_said(bf16, tmp_path, capfd):
    cluster = cluster_file(tmp_path, "memory_gib = 0.004")
    found = run_cluster(bf16, cluster)
    assert found["dtype"] == "int8" and "memory_gib is 0.004" in found["lines"][0]
    said = capfd.readouterr().err
    assert "rank 0 holds experts in int8: in float32 this rank would hold 0.00" in said


def refused(folder: Path, cluster: str, target: Path) -> list[str]:
    said = []
    with moe_runtime.init({"timeout_s": 30, "cluster": cluster}) as runtime:
        model = runtime.load_model(folder, dtype=torch.float32)
        for attempt in (
            lambda: runtime.save_model(model, target),
            lambda: runtime.sync_gradients(model),
            lambda: runtime.rebalance(model, from_owners([[[e % 2] for e in range(16)]], 2)),
        ):
            with pytest.raises(ConfigError) as caught:
                attempt()
            said.append(str(caught.value))
    with moe_runtime.init({"timeout_s": 30, "cluster": cluster, "rebalance": "auto"}) as runtime:
        with pytest.raises(ConfigError, match='rebalance = "auto" needs ranks that hold experts alike'):
            runtime.load_model(folder, dtype=torch.float32)
    return said


def test_what_8_bits_cannot_do_is_refused_on_every_rank(bf16, tmp_path):
    cluster = cluster_file(tmp_path, "", 'expert_dtype = "int8"')
    for said in run_ranks(refused, 2, bf16, cluster, tmp_path / "saved"):
        assert "kept in INT8 cannot be saved; load it without keeping INT8" in said[0]
        assert "kept in INT8 cannot be trained" in said[1]
        assert "different dtypes (rank 0 float32, rank 1 int8)" in said[2]
    assert [path.name for path in tmp_path.iterdir()] == ["cluster.toml"]


def move_int8(folder: Path) -> float:
    with moe_runtime.init({"timeout_s": 30}) as runtime, torch.no_grad():
        model = runtime.load_model(folder, dtype=torch.float32, expert_dtype="int8")
        before = model(IDS).logits
        runtime.rebalance(model, from_owners([[[e % 2] for e in range(16)]], 2), wait=True)
        return (model(IDS).logits - before).abs().max().item()


def test_ranks_that_hold_int8_alike_still_rebalance(bf16):
    assert max(run_ranks(move_int8, 2, bf16)) < 1e-5


SMALL, MORE = Sizes(100 << 20, 100 << 20, 2), Node("n", memory_gib=0.35)
EVERYTHING = {"float8_e4m3fn": "yes", "int8": "yes"}


@pytest.mark.parametrize(
    ("asked", "keep_fp8", "node", "stored", "can", "name", "why"),
    [
        (None, False, None, "fp8", {}, "bfloat16", ""),
        ("auto", True, None, "fp8", {}, "fp8", "as stored"),
        (None, True, None, None, {}, "bfloat16", ""),
        (None, True, None, "int8", {}, "bfloat16", ""),
        ("int8", False, Node("n", expert_dtype="fp8"), None, {}, "int8", "as asked"),
        ("bfloat16", False, Node("n", memory_gib=0.1), None, {}, "bfloat16", "as asked"),
        (None, True, Node("n", expert_dtype="int8"), "fp8", {}, "int8", "node n"),
        (None, True, None, "fp8", {"float8_e4m3fn": "no", "int8": "yes"}, "int8", "vendor table"),
        (None, True, None, "fp8", {"float8_e4m3fn": "no", "int8": "unknown"}, "fp8", "as stored"),
        (None, False, MORE, None, EVERYTHING, "int8", "0.391 GiB, memory_gib is 0.35"),
        (None, False, MORE, "fp8", EVERYTHING, "fp8", "memory_gib is 0.35"),
        (None, False, MORE, None, {"int8": "no"}, "fp8", "memory_gib is 0.35"),
        (None, False, MORE, None, {"int8": "no", "float8_e4m3fn": "no"}, "bfloat16", ""),
        (None, False, Node("n", memory_gib=0.1), None, EVERYTHING, "int8", "still holds 0.293 GiB"),
        (None, False, Node("n", memory_gib=0.5), None, EVERYTHING, "bfloat16", ""),
    ],
)
def test_what_a_rank_holds_is_decided_by_one_rule(asked, keep_fp8, node, stored, can, name, why):
    choice = choose(asked, keep_fp8, node, stored, torch.bfloat16, can, SMALL)
    assert choice.name == name and why in choice.why and bool(why) == bool(choice.why)


@pytest.mark.parametrize(("asked", "keep_fp8", "said"), [("float32", False, "bfloat16"), ("int8", True, "contradict")])
def test_expert_dtypes_that_cannot_be_are_one_line(asked, keep_fp8, said):
    with pytest.raises(ConfigError, match=said) as caught:
        choose(asked, keep_fp8, None, "fp8", torch.bfloat16, {}, SMALL)
    assert "\n" not in str(caught.value)


def test_a_cluster_files_expert_dtype_is_checked(tmp_path):
    with pytest.raises(ConfigError, match=r'number 1 \("a"\): expert_dtype = \'int4\' must be one of fp8, int8'):
        load_cluster(cluster_file(tmp_path, 'expert_dtype = "int4"'))


def test_generate_takes_the_form_that_all_ranks_are_to_have(bf16, capfd):
    words = ["--model", str(bf16), "--prompt", "ab", "--max-new-tokens", "2", "--tokenizer", "bytes"]
    assert generate.main([*words, "--expert-dtype", "int8", "--dtype", "bfloat16", "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["tokens"] == 2 and "experts: held in int8, one float32 scale per 128x128 block" in err


def test_a_plan_counts_what_each_node_holds(converted, tmp_path):
    shape = read_shape(converted("int8"))
    assert shape.stored == "int8" and read_shape(converted("int8"), "bfloat16").stored == "bfloat16"
    cluster = load_cluster(cluster_file(tmp_path, "", 'expert_dtype = "bfloat16"'))
    int8, wide = rank_rows(of_job(shape, cluster, None))
    assert (int8["expert_dtype"], wide["expert_dtype"]) == ("int8", "bfloat16")
    assert wide["expert_bytes"] / int8["expert_bytes"] == pytest.approx(2, rel=1e-3)
    words = ["--model", str(converted("int8")), "--expert-dtype"]
    for asked, held in (("fp8", ["fp8", "fp8"]), ("auto", ["bfloat16", "bfloat16"])):  # stored in INT8 is dequantised
        assert [row["expert_dtype"] for row in rank_rows(job.of_generate([*words, asked], cluster).planned)] == held


def test_a_reader_knows_what_is_in_blocks(converted):
    with CheckpointReader(converted("int8")) as reader:
        assert reader.blocks_of(f"{EXPERT}.up_proj.weight") == "int8"
        assert reader.blocks_of("model.embed_tokens.weight") is None
        assert not any(key.endswith("_scale_inv") for key in reader.keys)

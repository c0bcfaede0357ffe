"""Grouped expert compute: the C products against torch in float64, the same bits whatever the set of instructions, the
threads and the other rows, and the C function against hostile arguments. tests/native/test_experts.c holds the same C
against plain loops, under sanitizers; test_experts_interface.py every experts class of transformers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from moe_runtime.core import native
from moe_runtime.experts import compute
from moe_runtime.experts.blocks import FORMATS, dequantize_blocks_torch, quantize_blocks
from moe_runtime.launch import cli

needs_c = pytest.mark.skipif(native.extension is None, reason=f"the C extension is {native.reason}")
SETS = native.extension.simd_names() if native.extension else ()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = ("plain", *FORMATS)
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def random_weights(generator, shape, dtype, form):
    """(weight, scales or None, the same in float64); form: "plain", "fp8" or "int8"."""
    weight = torch.randn(shape, generator=generator)
    if form == "plain":
        weight = weight.to(dtype)
        return weight, None, weight.double()
    slots, blocks = shape[0], [-(-extent // 128) for extent in shape[1:]]
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    if form == "fp8":
        codes[codes & 0x7F == 0x7F] = 3  # subnormal instead of nan
    weight = codes.view(FORMATS[form])
    scales = torch.rand(slots, *blocks, generator=generator) * 1e-2
    exact = [dequantize_blocks_torch(w, s, torch.float64) for w, s in zip(weight, scales, strict=True)]
    return weight, scales, torch.stack(exact)


def random_case(seed, dtype, form, num_inputs=300, num_outputs=200, most=20):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, most, (4,), generator=generator).numpy()
    weight, scales, exact = random_weights(generator, (4, num_outputs, num_inputs), dtype, form)
    x = torch.randn(7, num_inputs, generator=generator).to(dtype)
    row_index = torch.randint(7, (int(counts.sum()),), generator=generator)
    return x, row_index, weight, scales, counts, exact


@needs_c
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1), (16, 8), (33, 5), (127, 129), (128, 128), (300, 200), (512, 64)])
def test_products_are_those_of_float64(dtype, form, sizes):
    x, row_index, weight, scales, counts, exact = random_case(sum(sizes), dtype, form, *sizes)
    out = compute.product(x, row_index, weight, scales, counts)
    slots = torch.from_numpy(np.arange(4).repeat(counts))
    expected = torch.einsum("mk,mnk->mn", x[row_index].double(), exact[slots])
    size = torch.einsum("mk,mnk->mn", x[row_index].double().abs(), exact[slots].abs())
    assert out.dtype == dtype
    assert ((out.double() - expected).abs() <= size * 2**-20 + expected.abs() * ROUNDING[dtype] + 1e-7).all()


@needs_c
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_neither_on_the_set_nor_on_threads_nor_on_other_rows(dtype, form, monkeypatch):
    x, row_index, weight, scales, counts, _ = random_case(5, dtype, form)
    monkeypatch.setattr(compute, "_BYTES_PER_THREAD", 1)
    expected = compute.product(x, row_index, weight, scales, counts)
    for name in SETS:
        assert torch.equal(compute.product(x, row_index, weight, scales, counts, name), expected), name
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(compute.product(x, row_index, weight, scales, counts), expected), threads
    finally:
        torch.set_num_threads(before)
    for pair, slot in enumerate(np.arange(4).repeat(counts)):
        alone = np.zeros(4, dtype=np.int64)
        alone[slot] = 1
        assert torch.equal(compute.product(x, row_index[pair : pair + 1], weight, scales, alone)[0], expected[pair])


@needs_c
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("simd", SETS)
def test_every_code_has_its_value(simd, form):
    codes = torch.arange(256, dtype=torch.uint8).view(FORMATS[form])
    weight = codes.repeat(2, 1).t().contiguous().view(1, 256, 2)  # an output for each code, met by one input
    x = torch.tensor([[1.0, 0.0]])
    got = compute.product(x, None, weight, torch.ones(1, 2, 1), np.array([1]), simd)[0]
    torch.testing.assert_close(got, codes.float(), rtol=0, atol=0, equal_nan=True)
    assert int(got.isnan().sum()) == (2 if form == "fp8" else 0)


@needs_c
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("simd", SETS)
def test_dequantised_weights_are_the_twins(simd, form):
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((1, 1), (5, 31), (130, 300), (128, 256)):
        codes = torch.randint(0, 256, (rows, columns), generator=generator, dtype=torch.uint8)
        scales = torch.rand(-(-rows // 128), -(-columns // 128), generator=generator)
        values = torch.empty(rows, columns, dtype=torch.bfloat16)
        native.extension.dequantize_rows(
            *(codes.numpy(), str(FORMATS[form]).removeprefix("torch."), scales.numpy(), 128, 128),
            *(values.view(torch.uint8).numpy(), "bfloat16", simd),
        )
        twin = dequantize_blocks_torch(codes.view(FORMATS[form]), scales, torch.bfloat16)
        torch.testing.assert_close(values, twin, rtol=0, atol=0, equal_nan=True)


# ---------------------------------------------------------------- hostile arguments


def good_arguments() -> dict:
    return dict(
        x=np.zeros((3, 64), np.uint8), x_dtype="float32", row_index=np.array([0, 2], np.int64),
        weights=np.zeros((2 * 4, 16), np.uint8), dtype="float8_e4m3fn", scales=np.ones((2, 1), np.float32),
        rows_per_slot=np.array([1, 1], np.int64), out=np.zeros((2, 16), np.uint8), out_dtype="float32", part=0, parts=1,
        simd="",
    )  # fmt: skip


SHARED = np.zeros(1024, np.uint8)


@needs_c
@pytest.mark.parametrize(
    "wrong",
    [
        dict(x=np.zeros((3, 60), np.uint8)), dict(x=np.zeros((3, 63), np.uint8)), dict(x=np.zeros((3, 16), np.float32)),
        dict(x=np.zeros(64, np.uint8)), dict(x=None), dict(x="x"), dict(x=np.zeros((3, 128), np.uint8)[:, ::2]),
        dict(x=np.zeros((4, 65), np.uint8)[:, 1:]), dict(x_dtype="float64"), dict(x_dtype="float8_e4m3fn"),
        dict(x_dtype=1), dict(row_index=np.array([0, 3])), dict(row_index=np.array([-1, 0])),
        dict(row_index=np.array([0])), dict(row_index=np.array([0, 1], np.int32)), dict(row_index=None),
        dict(weights=np.zeros((7, 16), np.uint8)), dict(weights=np.zeros((8, 17), np.uint8)),
        dict(weights=np.zeros((8, 32), np.uint8)[:, :16]), dict(weights=None), dict(dtype="float32"),
        dict(dtype="float64"), dict(dtype="float8_e4m3fnuz"), dict(dtype="bfloat16"), dict(scales=None),
        dict(dtype="int8", scales=None),
        dict(scales=np.ones((1, 1), np.float32)), dict(scales=np.ones((2, 1))), dict(scales=np.ones(2, np.float32)),
        dict(rows_per_slot=np.array([1, 2])), dict(rows_per_slot=np.array([3, -1])),
        dict(rows_per_slot=np.array([2**62, 2**62])), dict(rows_per_slot=np.array([2])),
        dict(rows_per_slot=np.array([1, 1], np.int32)), dict(rows_per_slot=np.array([], np.int64)),
        dict(out=np.zeros((3, 16), np.uint8)), dict(out=np.zeros((2, 12), np.uint8)), dict(out=None),
        dict(out=np.frombuffer(bytes(32), np.uint8).reshape(2, 16)), dict(out_dtype="float64"),
        dict(x=SHARED[:192].reshape(3, 64), out=SHARED[160:192].reshape(2, 16)),
        dict(weights=SHARED[:128].reshape(8, 16), out=SHARED[127 + 1 - 32 : 128].reshape(2, 16)),
        dict(part=1), dict(part=-1), dict(part=2**70), dict(parts=0), dict(parts="1"), dict(simd="sse9"),
        dict(simd=None),
    ],
)  # fmt: skip
def test_hostile_arguments_are_value_errors(wrong):
    arguments = good_arguments()
    native.extension.experts_product(*arguments.values())
    with pytest.raises(ValueError):
        native.extension.experts_product(*(arguments | wrong).values())


@needs_c
def test_the_number_of_arguments_is_checked():
    for call in (native.extension.experts_product, native.extension.experts_is_fast, native.extension.use_huge_pages):
        with pytest.raises(TypeError):
            call(1, 2, 3)
    for wrong in ("x", None, np.zeros(3), np.zeros((2, 2), np.float32)):
        with pytest.raises(ValueError):
            native.extension.use_huge_pages(wrong)
    with pytest.raises(ValueError):
        native.extension.experts_is_fast("sse9")


# ---------------------------------------------------------------- layers


def deepseek_experts(dtype=torch.float32, experts=6, hidden=256, width=128) -> DeepseekV3Experts:
    config = AutoConfig.for_model(
        "deepseek_v3", hidden_size=hidden, moe_intermediate_size=width, n_routed_experts=experts
    )
    module = DeepseekV3Experts(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.05).to(dtype)
    return module


def in_blocks(module: DeepseekV3Experts, form: str = "fp8") -> DeepseekV3Experts:
    if form == "plain":
        return module
    for name in ("gate_up_proj", "down_proj"):
        pairs = (quantize_blocks(weight, to=FORMATS[form]) for weight in getattr(module, name).data)
        codes, scales = zip(*pairs, strict=True)
        weight = torch.stack([code.view(torch.uint8) for code in codes]).view(FORMATS[form])
        setattr(module, name, torch.nn.Parameter(weight, requires_grad=False))
        module.register_parameter(f"{name}_scale_inv", torch.nn.Parameter(torch.stack(scales), requires_grad=False))
    return module


def mixed_batch(module, dtype, counts=(0, 3, 40, 1, 0, 17)):
    """Slots without rows, with few and with many."""
    counts = np.array(counts)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(30, module.hidden_dim, generator=generator).to(dtype)
    return x, torch.randint(30, (int(counts.sum()),), generator=generator), counts


def twin(module, x, row_index, counts):
    """The torch path, as autograd takes it."""
    return compute._differentiable(module, x, row_index, counts)


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_and_many_rows_side_by_side(dtype, form):
    module = in_blocks(deepseek_experts(dtype), form)
    x, row_index, counts = mixed_batch(module, dtype)
    got = compute.grouped_experts(module, x, row_index, counts)
    expected = twin(module, x, row_index, counts)
    torch.testing.assert_close(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@needs_c
def test_a_tokens_result_does_not_depend_on_the_batch():
    module = deepseek_experts(torch.bfloat16)
    x, row_index, counts = mixed_batch(module, torch.bfloat16, (2, 3, 14, 1, 0, 8))
    together = compute.grouped_experts(module, x, row_index, counts)
    for pair, slot in enumerate(np.arange(6).repeat(counts)):
        alone = np.zeros(6, dtype=np.int64)
        alone[slot] = 1
        assert torch.equal(compute.grouped_experts(module, x, row_index[pair : pair + 1], alone)[0], together[pair])


def test_what_c_does_not_take_runs_in_torch(monkeypatch):
    called = []
    monkeypatch.setattr(compute, "product", lambda *arguments: called.append(arguments))
    module = deepseek_experts(torch.float64)
    x, row_index, counts = mixed_batch(module, torch.float64)
    compute.grouped_experts(module, x, row_index, counts)
    module = deepseek_experts().requires_grad_(True)
    x, row_index, counts = mixed_batch(module, torch.float32)
    compute.grouped_experts(module, x, row_index, counts).sum().backward()
    assert module.down_proj.grad[1].abs().sum() > 0
    assert module.down_proj.grad[0].abs().sum() == 0
    module = deepseek_experts()
    compute.grouped_experts(module, x.requires_grad_(), row_index, counts).sum().backward()
    assert x.grad is not None
    assert not called


def test_gradients_do_not_meet_c_where_they_are_off():
    module = deepseek_experts().requires_grad_(True)
    x, row_index, counts = mixed_batch(module, torch.float32, (1, 2, 3, 0, 0, 1))
    with torch.no_grad():
        got = compute.grouped_experts(module, x, row_index, counts)
    torch.testing.assert_close(got, twin(module, x, row_index, counts), rtol=1e-5, atol=1e-5)


def test_transposed_weights_and_biases():
    config = AutoConfig.for_model("gpt_oss", hidden_size=64, intermediate_size=48, num_local_experts=6)
    module = GptOssExperts(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    x, row_index, counts = mixed_batch(type("", (), {"hidden_dim": 64}), torch.float32)
    got = compute.grouped_experts(module, x, row_index, counts)
    torch.testing.assert_close(got, twin(module, x, row_index, counts), rtol=1e-5, atol=1e-5)


def test_biases_and_a_norm_behind_each_expert():
    """No class of transformers has both with weights that C takes: the flags are set on one that has neither."""
    module = deepseek_experts()
    generator = torch.Generator().manual_seed(6)
    for name, width in (("gate_up_proj", 256), ("down_proj", 256)):
        bias = torch.nn.Parameter(torch.randn(6, width, generator=generator), requires_grad=False)
        module.register_parameter(f"{name}_bias", bias)
    module.post_expert_norm = torch.nn.LayerNorm(256).requires_grad_(False)
    module.has_bias = module.has_post_expert_norm = True
    x, row_index, counts = mixed_batch(module, torch.float32)
    got = compute.grouped_experts(module, x, row_index, counts)
    torch.testing.assert_close(got, twin(module, x, row_index, counts), rtol=1e-5, atol=1e-5)
    weight = module.gate_up_proj[5]
    hidden = module._apply_gate(F.linear(x[row_index[-1:]], weight) + module.gate_up_proj_bias[5])
    last = module.post_expert_norm(F.linear(hidden, module.down_proj[5]) + module.down_proj_bias[5])
    torch.testing.assert_close(got[-1:], last, rtol=1e-5, atol=1e-5)


def test_without_the_extension_the_twin_runs_and_says_so(monkeypatch):
    module = in_blocks(deepseek_experts())
    x, row_index, counts = mixed_batch(module, torch.float32)
    with_c = compute.grouped_experts(module, x, row_index, counts)
    monkeypatch.setattr(native, "extension", None)
    monkeypatch.setattr(native, "reason", "not built (no compiler)")
    assert compute.describe().startswith("expert compute: torch") and "no compiler" in compute.describe()
    torch.testing.assert_close(compute.grouped_experts(module, x, row_index, counts), with_c, rtol=1e-5, atol=1e-5)


@needs_c
def test_describe_names_what_runs():
    import moe_runtime

    if native.extension.experts_is_fast(""):
        assert compute.describe().startswith(f"expert compute: C ({SETS[0]}, ")
    with moe_runtime.init() as runtime:
        assert compute.describe() in runtime.describe().splitlines()


# ---------------------------------------------------------------- the bench


def test_bench_of_a_small_layer(capfd):
    shape = "--experts 8 --hidden 256 --intermediate 128 --top-k 2 --tokens 1 48 --passes 1"
    assert cli.main(["bench", "experts", "--layer", "--json", *shape.split()]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["shape"] == {"experts": 8, "hidden": 256, "intermediate": 128, "top_k": 2}
    assert set(report["tokens"]) == {"1", "48"} and len(report["peak_bytes"]) == 2
    assert all(row["tokens_per_s"] > 0 and row["read_s"] > 0 for row in report["tokens"].values())
    assert sum(report["tokens"]["1"]["hit"]) == 2


def test_bench_of_products(capfd):
    assert cli.main("bench experts --experts 2 --width 128 --rows 1 3 --passes 1".split()) == 0
    lines = capfd.readouterr().out.splitlines()
    assert "read weights" in lines[2] and len(lines) == 5


@pytest.mark.parametrize(
    "options",
    ["--rows 0", "--layer --top-k 9 --experts 8", "--layer --experts 1", "--layer --memory-gib 2", "--nonsense"],
)
def test_bad_options_are_one_line(options, capfd):
    assert cli.main(["bench", "experts", *options.split()]) == 2
    error = capfd.readouterr().err
    assert error.startswith("moe-launch: error: bench experts: ") and error.count("\n") == 1

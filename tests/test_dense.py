"""Dense layers of a few rows: as near to the truth as torch's product, and torch's own path wherever C must not."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from families import write_checkpoint
from ranks import run_ranks

import moe_runtime
from moe_runtime.core import native
from moe_runtime.core.config import RuntimeConfig
from moe_runtime.core.errors import ConfigError
from moe_runtime.experts import compute, dense

needs_c = pytest.mark.skipif(
    not compute.c_is_fast(), reason=f"dense layers are torch's where C is not fast: {native.describe()}"
)


def layers(dtype, inputs=96, outputs=33):
    """(torch's layer, the same with the few-rows forward)."""
    torch.manual_seed(inputs + outputs)
    theirs = torch.nn.Linear(inputs, outputs, bias=False, dtype=dtype)
    model = torch.nn.Sequential(copy.deepcopy(theirs))
    assert dense.use_few_rows_kernel(model) == 1
    return theirs, model[0]


@needs_c
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(96,), (1, 96), (4, 1, 96), (2, 3, 96), (16, 96), (17, 96), (0, 96)])
def test_rows_of_any_shape_are_as_near_to_float64_as_torch(dtype, shape):
    theirs, ours = layers(dtype)
    x = torch.randn(shape).to(dtype)
    with torch.no_grad():
        expected, got = theirs.double()(x.double()), ours(x)
    assert got.dtype == dtype and got.shape == expected.shape
    torch.testing.assert_close(got.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


@needs_c
def test_strided_rows_are_taken_as_they_are():
    theirs, ours = layers(torch.bfloat16)
    x = torch.randn(4, 7, 2 * 96).bfloat16()[:, -1:, ::2]
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=2**-6, atol=1e-2)


@needs_c
def test_gradients_many_rows_and_autocast_are_torchs_own(monkeypatch):
    theirs, ours = layers(torch.bfloat16)
    monkeypatch.setattr(dense, "product", lambda *_: pytest.fail("C was called"))
    few, many = torch.randn(2, 96).bfloat16(), torch.randn(17, 96).bfloat16()
    assert torch.equal(ours(few), theirs(few))  # the weight needs a gradient
    ours(few).sum().backward()
    assert ours.weight.grad is not None
    with torch.no_grad():
        assert torch.equal(ours(many), theirs(many))
        with torch.autocast("cpu", torch.float16):
            assert ours(few).dtype == torch.float16
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            ours(torch.randn(2, 95).bfloat16())


def test_only_plain_half_precision_layers_change():
    class Special(torch.nn.Linear):
        pass

    model = torch.nn.ModuleDict(
        {
            "float32": torch.nn.Linear(4, 4, bias=False),
            "bias": torch.nn.Linear(4, 4, dtype=torch.bfloat16),
            "special": Special(4, 4, bias=False, dtype=torch.bfloat16),
            "plain": torch.nn.Linear(4, 4, bias=False, dtype=torch.bfloat16),
        }
    )
    shown, state = repr(model), io.BytesIO()
    changed = dense.use_few_rows_kernel(model)
    assert [name for name, m in model.items() if isinstance(m, dense.FewRowsLinear)] == ["plain"] * changed
    assert repr(model) == shown  # print(model) is transformers' own
    torch.save(model.state_dict(), state)
    assert dense.use_few_rows_kernel(model) == 0  # once


def test_the_runtime_says_what_runs_and_takes_a_choice(tmp_path):
    write_checkpoint(tmp_path, "deepseek_v3")
    told = run_ranks(says, 1, tmp_path)[0]
    if compute.c_is_fast():
        assert told[0].startswith("dense layers: C for up to 16 rows in ") and told[0].endswith("torch for more")
    assert told[1] == "dense layers: torch"
    with pytest.raises(ConfigError, match="dense_kernel must be one of auto, torch, got 'fast'"):
        RuntimeConfig(dense_kernel="fast")


def says(folder):
    told, tokens = [], []
    for kernel in ("auto", "torch"):
        with moe_runtime.init({"dense_kernel": kernel}) as runtime:
            model = runtime.load_model(folder, dtype=torch.bfloat16)
            with torch.no_grad():
                tokens.append(model(torch.arange(1, 5)[None]).logits.float())
            told += [line for line in runtime.describe().splitlines() if line.startswith("dense layers")]
    torch.testing.assert_close(*tokens, rtol=0.05, atol=0.05)
    return told

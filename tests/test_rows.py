"""Rows packed, unpacked and summed: C with every set of instructions against the torch twins, bit for bit, and the C
functions against hostile arguments. tests/native/test_rows.c holds the same C against plain loops, under sanitizers."""

from __future__ import annotations

import gc
import itertools
import sys
import threading
import time
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.comm import rows
from moe_runtime.comm.formats import BLOCK, FORMATS, decode, encode
from moe_runtime.core import native
from moe_runtime.core.errors import ConfigError
from moe_runtime.experts import blocks

needs_c = pytest.mark.skipif(native.extension is None, reason=f"the C extension is {native.reason}")
SETS = native.extension.simd_names() if native.extension else ()
SCALED = [name for name, fmt in FORMATS.items() if fmt.scaled]
DTYPES = rows._ROW_DTYPES
HIDDEN = (0, 1, 2, 7, 64, 127, 128, 129, 300, 1030, 2100)
EXAMPLES = settings(max_examples=150, deadline=None)
ODD = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40, -1e38, 448.0, 464.0, 65520.0, 0.5]


@pytest.fixture(params=SETS or [pytest.param("", marks=needs_c)])
def simd(request, monkeypatch):
    """Every test that takes this runs with each set of instructions of this machine."""
    with_set(monkeypatch, request.param)
    return request.param


def with_set(monkeypatch, name: str) -> None:
    def function(called: str):
        return lambda *arguments: getattr(_C, called)(*arguments[:-1], name)

    _C = native.extension
    names = ("pack_rows", "unpack_rows", "sum_rows", "quantize_rows", "dequantize_rows")
    monkeypatch.setattr(native, "extension", SimpleNamespace(**{called: function(called) for called in names}))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, where a nan equals every other: what a nan looks like differs even inside torch."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    nan = a.isnan() & b.isnan() if a.is_floating_point() else torch.zeros_like(a, dtype=torch.bool)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return bool((nan | (a.contiguous().view(integer) == b.contiguous().view(integer))).all())


def all_same(got, expected) -> bool:
    return all(a is b is None or same(a, b) for a, b in zip(got, expected, strict=True))


def random_rows(generator: torch.Generator, count: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
    """Values of many magnitudes, some of them odd."""
    x = torch.randn(count, hidden, generator=generator, dtype=torch.float64)
    x = x * 2.0 ** torch.randint(-14, 14, (count, hidden), generator=generator).double()
    where = torch.rand(x.shape, generator=generator) < 0.01
    x[where] = torch.tensor(ODD, dtype=torch.float64)[torch.randint(len(ODD), (int(where.sum()),), generator=generator)]
    return x.to(dtype)


def placed(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same rows in memory that is whole, whose rows lie apart, or that is transposed."""
    if how == "apart":
        wide = x.new_empty(x.shape[0], x.shape[1] + 3)
        wide[:, 1:-2] = x
        return wide[:, 1:-2]
    if how == "transposed":
        return x.t().contiguous().t()
    return x


@st.composite
def batches(draw):
    """(x, weights, tokens, slots, layout) of any layout, and how x and the packed rows lie in memory."""
    dtype, wire = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(list(FORMATS)))
    hidden, top_k = draw(st.sampled_from(HIDDEN[1:]) | st.integers(1, 400)), draw(st.integers(1, 9))
    num_tokens, count = draw(st.integers(1, 6)), draw(st.integers(0, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = placed(random_rows(generator, num_tokens, hidden, dtype), draw(st.sampled_from(["", "apart", "transposed"])))
    weights = torch.rand(num_tokens, top_k, generator=generator, dtype=draw(st.sampled_from(DTYPES)))
    slots = torch.randint(-2, 5, (count, top_k), generator=generator, dtype=torch.int32).clamp(min=-1)
    tokens = torch.randint(num_tokens, (count,), generator=generator)
    return x, weights, tokens, slots, rows.layout_of(hidden, top_k, dtype, wire)


@st.composite
def sums(draw):
    """(rows, tokens, weights, choices, num_tokens)."""
    dtype, hidden = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(HIDDEN) | st.integers(0, 400))
    num_tokens, count = draw(st.integers(1, 6)), draw(st.integers(0, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = placed(random_rows(generator, count, hidden, dtype), draw(st.sampled_from(["", "apart", "transposed"])))
    tokens, choices = (torch.randint(size, (count,), generator=generator) for size in (num_tokens, 4))
    return x, tokens, torch.randn(count, generator=generator), choices, num_tokens


def parts(packed: torch.Tensor, layout: rows.RowLayout) -> list[torch.Tensor | None]:
    return [part if part is None else part.contiguous() for part in rows._parts(packed, layout)]


# ---------------------------------------------------------------- C against torch


@EXAMPLES
@given(batch=batches(), gap=st.sampled_from([0, 16, 80]))
@needs_c
def test_packed_rows_are_the_twins(batch, gap):
    layout = batch[-1]
    expected = rows.pack_torch(*batch)
    window = torch.full((len(expected) + 2, layout.row_bytes + gap), 0xA5, dtype=torch.uint8)
    for name in SETS:
        with pytest.MonkeyPatch.context() as patch:
            with_set(patch, name)
            assert all_same(parts(rows.pack(*batch), layout), parts(expected, layout)), name
            out = window.fill_(0xA5)[1:-1, : layout.row_bytes]
            assert rows.pack(*batch, out) is out
            assert all_same(parts(out, layout), parts(expected, layout)), name
            around = [window[0], window[-1], window[:, layout.row_bytes :]]
            assert all((part == 0xA5).all() for part in around), name
            for copy in (False, True):
                unpacked, twins = rows.unpack(out, layout, copy=copy), rows.unpack_torch(expected, layout, copy=copy)
                assert all_same(unpacked, twins), name
                is_view = unpacked[0].untyped_storage().data_ptr() == window.untyped_storage().data_ptr()
                if unpacked[0].numel():
                    assert is_view == (layout.wire.dtype == layout.dtype and not copy)
                assert all(part.is_contiguous() for part in (unpacked if copy else unpacked[1:]))


@EXAMPLES
@given(case=sums())
@needs_c
def test_sums_are_the_twins(case):
    x, tokens, weights, choices, num_tokens = case
    for name in SETS:
        with pytest.MonkeyPatch.context() as patch:
            with_set(patch, name)
            assert same(rows.combine_rows(x, tokens, num_tokens), rows.combine_rows_torch(x, tokens, num_tokens)), name
            for order in (None, choices):
                expected = rows.combine_rows_torch(x, tokens, num_tokens, weights, order)
                assert same(rows.combine_rows(x, tokens, num_tokens, weights, order), expected), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_is_index_add_in_float32_rounded_once(simd, dtype):
    x = random_rows(torch.Generator().manual_seed(0), 500, 333, dtype)
    tokens = torch.randint(70, (500,), generator=torch.Generator().manual_seed(1))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = torch.zeros(80, 333, dtype=wide).index_add(0, tokens, x.to(wide)).to(dtype)
    assert same(rows.combine_rows(x, tokens, 80), expected)
    assert not rows.combine_rows(x, tokens, 80)[70:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_choices_decide_the_order_of_a_sum_wherever_rows_come_from(simd, dtype):
    """What makes combine independent of the placement: rows that arrive in any order add up to the same bits."""
    generator = torch.Generator().manual_seed(0)
    x, weights = random_rows(generator, 24, 50, dtype), torch.rand(24, generator=generator)
    tokens, choices = torch.arange(24) % 3, torch.arange(24) // 3
    expected = rows.combine_rows(x, tokens, 3, weights, choices)
    for seed in range(5):
        order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
        moved = (part[order] for part in (x, tokens, weights))
        x_moved, tokens_moved, weights_moved = moved
        assert same(rows.combine_rows(x_moved, tokens_moved, 3, weights_moved, choices[order]), expected)


@pytest.mark.parametrize("wire", SCALED)
def test_every_bfloat16_and_many_float32_values_convert_as_torch_does(simd, wire):
    """Through a block whose scale is 1, so that the payload is the conversion alone."""
    fmt = FORMATS[wire]
    every = torch.arange(65536).to(torch.int32).bitwise_left_shift(16).view(torch.float32)
    some = torch.randint(-(2**31), 2**31, (3_000_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    for values in (every, some.view(torch.float32)):
        values = values[values.abs() <= fmt.largest]  # nan and inf have tests of their own
        values = torch.nn.functional.pad(values, (0, -len(values) % (BLOCK - 1))).view(-1, BLOCK - 1)
        values = torch.nn.functional.pad(values, (0, 1), value=fmt.largest)
        payload, scales = quantized(values, fmt.name)
        assert (scales == 1).all()
        assert same(payload.view(fmt.dtype), values.to(fmt.dtype) if fmt.dtype.is_floating_point else
                    values.round().to(torch.int8))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e4m3fnuz])
def test_values_beyond_a_format_become_what_torch_makes_of_them(simd, dtype):
    """Without clamping: the rule of checkpoints' weights, and casts on the wire."""
    edges = [64.0, 240.0, 247.9, 248.0, 448.0, 463.9, 464.0, 465.0, 480.0, 65504.0, 65519.0, 65520.0, 3.3e38, 3.4e38]
    values = torch.tensor([edges + [-value for value in edges] + [float("inf"), -float("inf"), float("nan")]])
    if dtype.itemsize == 2:
        layout = rows.layout_of(values.shape[1], 1, torch.float32, str(dtype).removeprefix("torch."))
        one = (torch.ones(1, 1), torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int32))
        assert same(parts(rows.pack(values, *one, layout), layout)[0], values.to(dtype))
    elif dtype == torch.float8_e4m3fn:
        scaled = torch.cat([values[:, :-3] / 512, values[:, -3:]], 1)
        assert all_same(blocks.quantize_blocks(scaled), blocks.quantize_blocks_torch(scaled))
        assert blocks.quantize_blocks(scaled)[0].float().isnan().all()  # one nan and the whole block says so


@pytest.mark.parametrize("wire", SCALED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_decodes_as_torch_decodes_it(simd, dtype, wire):
    payload = torch.arange(256, dtype=torch.uint8).view(2, 128)
    scales = torch.tensor([[0.37], [3e38]])
    expected = decode(payload.view(FORMATS[wire].dtype), scales, FORMATS[wire], dtype)
    values = torch.empty(2, 128, dtype=dtype)
    arguments = (payload.numpy(), wire, scales.numpy(), 1, BLOCK, values.view(torch.uint8).numpy())
    native.extension.dequantize_rows(*arguments, str(dtype).removeprefix("torch."), "")
    assert same(values, expected)


def quantized(values: torch.Tensor, wire: str) -> tuple[torch.Tensor, torch.Tensor]:
    count, hidden = values.shape
    payload, scales = torch.empty(count, hidden, dtype=torch.uint8), torch.empty(count, -(-hidden // BLOCK))
    given = (values.contiguous().view(torch.uint8).numpy(), str(values.dtype).removeprefix("torch."))
    native.extension.quantize_rows(*given, payload.numpy(), wire, scales.numpy(), 1, BLOCK, "wire", "")
    return payload, scales


@pytest.mark.parametrize("wire", SCALED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_quantise_as_the_wire_formats_say(simd, dtype, wire):
    for hidden in HIDDEN[1:]:
        x = random_rows(torch.Generator().manual_seed(hidden), 20, hidden, dtype)
        payload, scales = quantized(x, wire)
        expected = encode(x, FORMATS[wire])
        assert same(payload, expected[0].view(torch.uint8)) and same(scales, expected[1])


# ---------------------------------------------------------------- FP8 and INT8 weights


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (130, 257), (1, 1), (5, 700), (0, 128), (128, 0)])
def test_weights_in_blocks_are_the_twins(simd, shape, dtype, stored):
    generator = torch.Generator().manual_seed(sum(shape))
    weight = random_rows(generator, *shape, dtype)
    weight[:, :1].fill_(1e-30)  # blocks of almost nothing
    for how in ("", "apart", "transposed"):
        for block in (128, 7):
            given = placed(weight, how)
            if 0 in shape:
                quantised = (torch.empty(shape, dtype=stored), torch.empty(*(-(-n // block) for n in shape)))
            else:
                quantised = blocks.quantize_blocks(given, block, stored)
                assert all_same(quantised, blocks.quantize_blocks_torch(given, block, stored))
            given = (quantised[0], quantised[1], dtype, (block, block))
            assert same(blocks.dequantize_blocks(*given), blocks.dequantize_blocks_torch(*given))
    if 0 not in shape:
        given = (quantised[0], torch.rand(-(-shape[0] // 3), -(-shape[1] // 50)), dtype, (3, 50))
        assert same(blocks.dequantize_blocks(*given), blocks.dequantize_blocks_torch(*given))


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_block_with_a_value_that_is_no_number_says_so(simd, stored, bad):
    weight = torch.linspace(-1, 1, 130 * 128).view(130, 128)
    weight[3, 5] = bad
    quantised = blocks.quantize_blocks(weight, to=stored)
    assert all_same(quantised, blocks.quantize_blocks_torch(weight, to=stored))
    back = blocks.dequantize_blocks(*quantised, torch.float32)
    assert not back[3, 5].isfinite() and back[128:].isfinite().all()


@pytest.mark.parametrize(("stored", "most"), [(torch.float8_e4m3fn, 16 / 448), (torch.int8, 0.5 / 127)])
def test_a_weight_in_blocks_is_off_by_half_a_step_at_most(stored, most):
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(2))
    weight[:128, :128] *= 1e-4
    weight[128:256, 128:] *= 1e4
    off = (blocks.dequantize_blocks(*blocks.quantize_blocks(weight, to=stored), torch.float32) - weight).abs()
    for part in itertools.product((slice(0, 128), slice(128, 256), slice(256, 300)), (slice(0, 128), slice(128, 200))):
        assert off[part].max() <= weight[part].abs().max() * most * (1 + 1e-6)


@pytest.mark.parametrize("with_c", [pytest.param(True, marks=needs_c), False])
def test_scales_that_do_not_cover_a_weight_are_refused(monkeypatch, with_c):
    if not with_c:
        monkeypatch.setattr(native, "extension", None)
    weight = torch.zeros(256, 128, dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"scales of shape \(1, 1\) for a weight of \(256, 128\): need \(2, 1\)"):
        blocks.dequantize_blocks(weight, torch.ones(1, 1), torch.float32)


# ---------------------------------------------------------------- what callers rely on


def case(hidden=8, top_k=2, dtype=torch.float32, wire="float32", count=3):
    x = torch.arange(4.0 * hidden).view(4, hidden).to(dtype)
    tokens, slots = torch.arange(count) % 4, torch.zeros(count, top_k, dtype=torch.int32)
    return x, torch.ones(4, top_k), tokens, slots, rows.layout_of(hidden, top_k, dtype, wire)


@pytest.mark.parametrize("wire", ["float32", "bfloat16", "int8"])
def test_received_rows_may_begin_at_any_byte(simd, wire):
    packed, layout = rows.pack(*case(wire=wire)), case(wire=wire)[-1]
    frame = torch.frombuffer(bytearray(b"-" + packed.numpy().tobytes()), dtype=torch.uint8, offset=1)
    frame = frame.view(packed.shape)
    assert frame.data_ptr() % 2 == 1
    assert all_same(rows.unpack(frame, layout, copy=True), rows.unpack_torch(packed, layout))
    x, *rest, layout = case(wire=wire)
    x = torch.frombuffer(bytearray(b"-" + x.numpy().tobytes()), dtype=torch.uint8, offset=1).view(x.dtype).view(x.shape)
    assert all_same(parts(rows.pack(x, *rest, layout), layout), parts(packed, layout))
    assert same(rows.combine_rows(x, torch.zeros(4, dtype=torch.int64), 1), x.sum(0, keepdim=True))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("with_c", [pytest.param(True, marks=needs_c), False])
def test_gradients_of_sums_are_those_of_index_add(monkeypatch, with_c, weighted):
    if not with_c:
        monkeypatch.setattr(native, "extension", None)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 5, generator=generator).bfloat16().requires_grad_()
    weights = torch.rand(9, generator=generator).requires_grad_()
    tokens = torch.randint(4, (9,), generator=generator)
    upstream = torch.randn(6, 5, generator=generator).bfloat16()
    given = (x, weights) if weighted else (x,)
    ours = rows.combine_rows(x, tokens, 6, weights) if weighted else rows.combine_rows(x, tokens, 6)
    twin = rows.combine_rows_torch(x, tokens, 6, weights if weighted else None)
    assert all_same(torch.autograd.grad(ours, given, upstream), torch.autograd.grad(twin, given, upstream))
    assert not rows.combine_rows(x.detach(), tokens, 6).requires_grad


def test_without_the_extension_the_twins_run(monkeypatch):
    arguments = case(wire="int8")
    expected = rows.pack(*arguments)
    monkeypatch.setattr(native, "extension", None)
    assert all_same(parts(rows.pack(*arguments), arguments[-1]), parts(expected, arguments[-1]))
    assert all_same(rows.unpack(expected, arguments[-1]), rows.unpack_torch(expected, arguments[-1]))
    ones = torch.ones(3, 2)
    assert rows.combine_rows(ones, torch.tensor([1, 1, 0]), 3).tolist() == [[1, 1], [2, 2], [0, 0]]
    assert rows.combine_rows(ones, torch.tensor([1, 1, 0]), 2, torch.tensor([0.5, 1, 2])).tolist() == [
        [2, 2], [1.5, 1.5],
    ]  # fmt: skip


@needs_c
def test_the_set_in_use_is_named():
    assert native.extension.simd_name() == SETS[0] and SETS[-1] == "portable"
    assert set(SETS) <= {"avx512", "avx2", "portable"}


@pytest.mark.parametrize("with_c", [pytest.param(True, marks=needs_c), False])
def test_both_twins_name_tokens_that_do_not_exist(monkeypatch, with_c):
    if not with_c:
        monkeypatch.setattr(native, "extension", None)
    x, weights, _, slots, layout = case()
    for token in (4, -1, 2**62):
        tokens = torch.tensor([0, token, token])
        with pytest.raises(ConfigError, match=f"^tokens: row 1 is of token {token}, which is not in 0..3$"):
            rows.pack(x, weights, tokens, slots, layout)
    for token in (7, -1, -(2**63)):
        with pytest.raises(ConfigError, match=f"^tokens: row 0 is of token {token}, which is not in 0..6$"):
            rows.combine_rows(x[:1], torch.tensor([token]), 7)


@pytest.mark.parametrize("with_c", [pytest.param(True, marks=needs_c), False])
def test_an_out_that_does_not_fit_is_refused(monkeypatch, with_c):
    if not with_c:
        monkeypatch.setattr(native, "extension", None)
    arguments = case()
    size = arguments[-1].row_bytes
    wide = torch.zeros(4, 2 * size, dtype=torch.uint8)
    wrong = {
        "must be uint8": [
            wide[:3, :size].view(torch.int8), wide[:2, :size], wide[:, :size], wide[:3, : size - 16], wide[:3],
            wide[:3, :size].to("meta"), wide[0],
        ],
        "contiguous, apart": [
            wide[:3, ::2], wide[:1, :size].expand(3, size), wide.view(-1)[: 3 * size].view(size, 3).t(),
            wide[:3, 8 : size + 8], wide.view(-1)[1:].as_strided((3, size), (size, 1)),
            wide.view(-1).as_strided((3, size), (size + 8, 1)), wide.view(-1).as_strided((3, size), (size - 16, 1)),
        ],
    }  # fmt: skip
    for said, outs in wrong.items():
        for out in outs:
            with pytest.raises(ConfigError, match=f"^out: .*{said}"):
                rows.pack(*arguments, out)


# ---------------------------------------------------------------- the C module, called by someone careless or hostile


def pack_arguments() -> dict:
    return {
        "x": np.zeros((4, 16), np.uint8), "dtype": "float32", "weights": np.ones((4, 2), np.float32),
        "tokens": np.array([3, 0, 1]), "slots": np.zeros((3, 2), np.int32), "packed": np.zeros((3, 48), np.uint8),
        "wire": "int8", "scales_at": 4, "weights_at": 16, "slots_at": 32, "simd": "",
    }  # fmt: skip


def unpack_arguments() -> dict:
    return {
        "packed": np.zeros((3, 48), np.uint8), "wire": "int8", "hidden": np.zeros((3, 16), np.uint8),
        "dtype": "float32", "weights": np.ones((3, 2), np.float32), "slots": np.zeros((3, 2), np.int32),
        "scales_at": 4, "weights_at": 16, "slots_at": 32, "simd": "",
    }  # fmt: skip


def sum_arguments() -> dict:
    return {
        "rows": np.zeros((3, 16), np.uint8), "dtype": "float32", "tokens": np.array([3, 0, 1]),
        "weights": np.ones(3, np.float32), "order": np.array([2, 0, 1]), "sums": np.zeros((4, 16), np.uint8),
        "simd": "",
    }  # fmt: skip


def quantize_arguments() -> dict:
    return {
        "values": np.zeros((3, 16), np.uint8), "dtype": "float32", "payload": np.zeros((3, 4), np.uint8),
        "wire": "int8", "scales": np.zeros((2, 1), np.float32), "block_rows": 2, "block_columns": 128,
        "rule": "wire", "simd": "",
    }  # fmt: skip


def dequantize_arguments() -> dict:
    return {
        "payload": np.zeros((3, 4), np.uint8), "wire": "int8", "scales": np.zeros((2, 1), np.float32),
        "block_rows": 2, "block_columns": 128, "values": np.zeros((3, 16), np.uint8), "dtype": "float32", "simd": "",
    }  # fmt: skip


def gather_arguments() -> dict:
    return {
        "rows": np.zeros((3, 16), np.uint8), "order": np.array([2, 0, 1, 2]), "gathered": np.zeros((4, 16), np.uint8),
        "visit": np.array([1, 2, 0, 3]),
    }  # fmt: skip


FUNCTIONS = {
    "gather_rows": (gather_arguments, {"gathered"}),
    "pack_rows": (pack_arguments, {"packed"}),
    "unpack_rows": (unpack_arguments, {"hidden", "weights", "slots"}),
    "sum_rows": (sum_arguments, {"sums"}),
    "quantize_rows": (quantize_arguments, {"payload", "scales"}),
    "dequantize_rows": (dequantize_arguments, {"values"}),
}


def call(function: str, **changes):
    return getattr(native.extension, function)(*{**FUNCTIONS[function][0](), **changes}.values())


def each(kind: type, outputs_only: bool = False) -> list:
    return [
        pytest.param(function, name, id=f"{function}-{name}")
        for function, (make, outputs) in FUNCTIONS.items()
        for name, value in make().items()
        if isinstance(value, kind) and (name in outputs or not outputs_only)
    ]


def misaligned(array: np.ndarray) -> np.ndarray:
    raw = np.zeros(array.nbytes + 1, np.uint8)
    return raw[1:].view(array.dtype).reshape(array.shape)


UNUSABLE = {
    "a list": lambda a: a.tolist(),
    "a number": lambda a: 7,
    "a string": lambda a: "float32",
    "bytes": lambda a: a.tobytes(),
    "int8": lambda a: a.astype(np.int8),
    "uint16": lambda a: a.astype(np.uint16),
    "float16": lambda a: a.astype(np.float16),
    "uint32": lambda a: a.astype(np.uint32),
    "complex64": lambda a: a.astype(np.complex64),
    "objects": lambda a: a.astype(object),
    "bool": lambda a: a.astype(bool),
    "another byte order": lambda a: a.astype(a.dtype.newbyteorder()) if a.itemsize > 1 else None,
    "one dimension more": lambda a: a[None],
    "no dimension": lambda a: a.ravel()[:1].reshape(()),
    "values apart": lambda a: np.zeros((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)[..., ::2] if a.shape[-1] > 1 else 7,
    "reversed": lambda a: a[::-1],
    "one row less": lambda a: a[:-1].copy(),
    "one row more": lambda a: np.zeros((len(a) + 1, *a.shape[1:]), a.dtype),
    "misaligned": lambda a: misaligned(a) if a.itemsize > 1 else None,
}


@needs_c
@pytest.mark.parametrize("function", FUNCTIONS)
def test_valid_arguments_are_taken(function):
    assert call(function) is None
    for name in SETS if "simd" in FUNCTIONS[function][0]() else ():
        assert call(function, simd=name) is None


@needs_c
@pytest.mark.parametrize("how", UNUSABLE)
@pytest.mark.parametrize("function, name", each(np.ndarray))
def test_unusable_arrays_are_refused_by_name(function, name, how):
    unusable = UNUSABLE[how](FUNCTIONS[function][0]()[name])
    of_any_length = {"sum_rows": ("sums", "order"), "gather_rows": ("rows", "visit")}.get(function, ())
    if how.startswith("one row") and name in of_any_length:
        pytest.skip("may have any length")
    if unusable is None and name == "hidden":
        pytest.skip("may be None")
    # Of two lengths that disagree it is for the function to say which one is wrong.
    with pytest.raises(ValueError, match=None if how.startswith("one row") else f"^{name}: "):
        call(function, **{name: unusable})


@needs_c
@pytest.mark.parametrize("function, name", each(np.ndarray))
def test_none_is_taken_only_where_it_means_something(function, name):
    if (function, name) in (
        ("unpack_rows", "hidden"),
        ("sum_rows", "weights"),
        ("sum_rows", "order"),
        ("gather_rows", "visit"),
    ):
        assert call(function, **{name: None}) is None
    else:
        with pytest.raises(ValueError, match=f"^{name}: "):
            call(function, **{name: None})


@needs_c
@pytest.mark.parametrize("function, name", each(np.ndarray, outputs_only=True))
def test_read_only_outputs_are_refused(function, name):
    output = FUNCTIONS[function][0]()[name]
    output.flags.writeable = False
    with pytest.raises(ValueError, match=f"^{name}: must be an array that can be written to"):
        call(function, **{name: output})


@needs_c
@pytest.mark.parametrize("function, name", each(str))
@pytest.mark.parametrize("word", ["", "float33", "int64", "\udcff", "avx9", b"float32", None, 0, ["float32"]])
def test_words_without_meaning_are_refused(function, name, word):
    if name == "simd" and word == "":
        return
    with pytest.raises(ValueError, match=f"^{name}: "):
        call(function, **{name: word})


@needs_c
def test_dtypes_are_refused_where_they_have_no_meaning():
    for function in FUNCTIONS.keys() - {"gather_rows"}:
        for dtype in ("int8", "float8_e4m3fn", "float8_e4m3fnuz"):
            with pytest.raises(ValueError, match="^dtype: "):
                call(function, dtype=dtype)
    for function in ("quantize_rows", "dequantize_rows"):
        with pytest.raises(ValueError, match="^wire: "):
            call(function, wire="bfloat16")
    with pytest.raises(ValueError, match="^weights: must be float64 for float64 rows"):
        call("sum_rows", dtype="float64", sums=np.zeros((4, 16), np.uint8))
    with pytest.raises(ValueError, match="^weights: must be float64 for float64 rows"):
        call("sum_rows", weights=np.ones(3))


@needs_c
@pytest.mark.parametrize("function, name", each(int))
@pytest.mark.parametrize("size", [-1, -(2**63), 2**63, 10**30, 1.0, "4", None])
def test_sizes_that_cannot_be_are_refused(function, name, size):
    with pytest.raises(ValueError, match=f"^{name}: must be a whole number"):
        call(function, **{name: size})


@needs_c
@pytest.mark.parametrize(
    "changes",
    [{"scales_at": 0}, {"scales_at": 5}, {"weights_at": 4}, {"weights_at": 18}, {"slots_at": 20}, {"slots_at": 44},
     {"slots_at": 2**62}, {"scales_at": 2**63 - 4}],
)  # fmt: skip
def test_parts_that_do_not_lie_in_a_row_are_refused(changes):
    for function in ("pack_rows", "unpack_rows"):
        with pytest.raises(ValueError, match="^packed: is too short for its parts, or"):
            call(function, **changes)


@needs_c
def test_rows_that_do_not_hold_whole_or_aligned_values_are_refused():
    odd = np.zeros((3, 15), np.uint8)
    for function, name in (("sum_rows", "rows"), ("quantize_rows", "values"), ("dequantize_rows", "values")):
        with pytest.raises(ValueError, match=f"^{name}: must have rows of whole values"):
            call(function, **{name: odd})
        raw = np.zeros(100, np.uint8)
        with pytest.raises(ValueError, match=f"^{name}: must have rows that are aligned"):
            call(function, **{name: raw[1:49].reshape(3, 16)})
        with pytest.raises(ValueError, match=f"^{name}: must have rows that are aligned"):
            call(function, **{name: np.zeros((3, 18), np.uint8)[:, :16]})
    with pytest.raises(ValueError, match="^packed: must have rows that are aligned"):
        call("pack_rows", packed=np.zeros((3, 50), np.uint8)[:, :48])


@needs_c
def test_indices_outside_are_named():
    for token in (4, -1, 2**62, -(2**63)):
        with pytest.raises(ValueError, match=f"^tokens: row 1 is of token {token}, which is not in 0..3"):
            call("pack_rows", tokens=np.array([0, token, 0]))
        with pytest.raises(ValueError, match=f"^tokens: row 2 is of token {token}, which is not in 0..3"):
            call("sum_rows", tokens=np.array([0, 0, token]))
    for row in (3, -1, 2**62):
        with pytest.raises(ValueError, match=f"^order: entry 0 is row {row}, which is not in 0..2"):
            call("sum_rows", order=np.array([row]))
        with pytest.raises(ValueError, match=f"^order: entry 1 is row {row}, which is not in 0..2"):
            call("gather_rows", order=np.array([0, row, 0, 0]))
    for place in (4, -1, 2**62):
        with pytest.raises(ValueError, match=f"^visit: entry 1 is row {place}, which is not in 0..3"):
            call("gather_rows", visit=np.array([0, place]))


@needs_c
@pytest.mark.parametrize(
    "function, output, other",
    [
        (function, output, other)
        for function, (make, outputs) in FUNCTIONS.items()
        for output in sorted(outputs)
        for other, value in make().items()
        if other != output and isinstance(value, np.ndarray)
    ],
)
def test_an_output_on_top_of_anything_is_refused(function, output, other):
    arguments = FUNCTIONS[function][0]()
    memory = np.zeros(256, np.uint8)
    for name in (output, other):
        array = arguments[name]
        arguments[name] = memory[: array.nbytes].view(array.dtype).reshape(array.shape)
    with pytest.raises(ValueError, match="overlap in memory"):
        call(function, **arguments)


@needs_c
def test_overlap_counts_the_gaps_between_rows():
    memory = np.zeros(256, np.uint8)
    apart = memory[:192].reshape(3, 64)[:, :48]
    assert call("pack_rows", packed=apart) is None
    with pytest.raises(ValueError, match="^slots and packed overlap in memory"):
        call("pack_rows", packed=apart, slots=np.ndarray((3, 2), np.int32, memory, 64 + 48 - 8))
    with pytest.raises(ValueError, match="^tokens and packed overlap in memory"):
        call("pack_rows", packed=apart[:1], slots=np.zeros((1, 2), np.int32), tokens=memory[40:48].view(np.int64))
    free = memory[48:56].view(np.int64)  # behind the only row
    assert call("pack_rows", packed=apart[:1], slots=np.zeros((1, 2), np.int32), tokens=free) is None
    with pytest.raises(ValueError, match="^packed: must have rows in increasing order that do not overlap"):
        call("pack_rows", packed=np.lib.stride_tricks.as_strided(memory, (3, 48), (16, 1)))
    with pytest.raises(ValueError, match="^sums: must have rows in increasing order"):
        call("sum_rows", sums=np.broadcast_to(memory[:16], (4, 16)).copy()[::-1])


@needs_c
def test_inputs_may_share_memory_and_repeat_rows():
    shared = np.arange(16, dtype=np.uint8)
    same_row = np.lib.stride_tricks.as_strided(shared, (3, 16), (0, 1))
    sums = np.zeros((1, 16), np.uint8)
    value = shared.view(np.float32)
    assert call("sum_rows", rows=same_row, tokens=np.zeros(3, np.int64), weights=None, order=None, sums=sums) is None
    assert (sums.view(np.float32) == value + value + value).all()


@needs_c
def test_a_wrong_number_of_arguments_is_a_type_error():
    for function, (make, _) in FUNCTIONS.items():
        values = list(make().values())
        for given_count in (0, len(values) - 1, len(values) + 1):
            with pytest.raises(TypeError, match=f"expected {len(values)} arguments, got {given_count}"):
                getattr(native.extension, function)(*[*values, 0][:given_count])


@needs_c
def test_rows_of_nothing_that_claim_to_be_endless_are_done_at_once():
    endless = np.zeros((2**50, 0), np.uint8)
    nothing = {"packed": endless, "hidden": endless, "weights": np.zeros((2**50, 0), np.float32)}
    layout = {"slots": np.zeros((2**50, 0), np.int32), "scales_at": 0, "weights_at": 0, "slots_at": 0}
    assert call("unpack_rows", **nothing, **layout) is None
    assert call("sum_rows", rows=np.zeros((3, 0), np.uint8), sums=endless) is None
    scales = np.zeros((2**50, 0), np.float32)
    assert call("quantize_rows", values=endless, payload=endless, scales=scales, block_rows=1) is None
    assert call("dequantize_rows", values=endless, payload=endless, scales=scales, block_rows=1) is None


@needs_c
def test_buffers_are_given_back():
    """Neither success nor an error keeps a buffer: bytearrays could not grow then."""
    for tokens in (np.array([3, 0, 1]), np.array([9, 0, 1])):
        raw = bytearray(48)
        packed = np.frombuffer(raw, np.uint8).reshape(3, 16)
        if tokens[0] == 9:
            with pytest.raises(ValueError):
                call("sum_rows", rows=packed, tokens=tokens)
        else:
            call("sum_rows", rows=packed, tokens=tokens)
        del packed
        gc.collect()
        raw.append(0)


@needs_c
def test_indices_that_another_thread_changes_never_lead_outside():
    """Wrong sums or an error; tests/native runs the same functions under sanitizers."""
    tokens, order = np.zeros(3000, np.int64), np.arange(3000)
    arguments = {"rows": np.zeros((3000, 16), np.uint8), "tokens": tokens, "order": order, "weights": None}
    guarded = np.full((6, 16), 0xA5, np.uint8)
    done = threading.Event()

    def disturb():
        while not done.is_set():
            tokens[::7], order[::5] = 2**60, -5
            tokens[:], order[:] = 1, np.arange(3000)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for _ in range(300):
            try:
                call("sum_rows", **arguments, sums=guarded[1:5])
            except ValueError as error:
                assert str(error).startswith(("tokens: ", "order: "))
    finally:
        done.set()
        thread.join()
    assert (guarded[0] == 0xA5).all() and (guarded[5] == 0xA5).all()


@needs_c
def test_the_gil_is_released_while_c_works():
    """The main thread runs inside one call of another, although that one is never asked to make way."""
    values, payload = np.zeros((4000, 40000), np.uint8), np.zeros((4000, 10000), np.uint8)
    scales = np.zeros((4000, 79), np.float32)
    ticks, seen = 0, 0

    def work():
        nonlocal seen
        before = ticks
        call("quantize_rows", values=values, payload=payload, scales=scales, block_rows=1)
        seen = ticks - before

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # otherwise the interpreter itself may switch right after the call
    try:
        thread = threading.Thread(target=work)
        thread.start()
        while thread.is_alive():
            ticks += 1
            time.sleep(0)
    finally:
        sys.setswitchinterval(interval)
    assert seen > 0


# ---------------------------------------------------------------- gathered rows


@given(st.integers(1, 30), st.integers(0, 60), st.sampled_from(DTYPES), st.integers(0, 2**32 - 1))
@EXAMPLES
def test_gathered_rows_are_the_same_in_any_order_of_visits(num_rows, wanted, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(num_rows, 24, generator=generator).to(dtype)
    order = torch.randint(0, num_rows, (wanted,), generator=generator)
    with mock.patch.object(rows, "_CACHED_BYTES", 0):  # as if no cache could hold them
        found = rows.gather(table, order, visit=lambda: order.argsort(stable=True))
    assert torch.equal(found, table[order])

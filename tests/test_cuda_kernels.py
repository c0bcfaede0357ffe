"""The CUDA kernels against their torch twins, bit for bit, without a GPU: cuda_on_host.py runs their text on the host.

What this cannot show is left to test_cuda.py: that a GPU's threads, its memory and cupy itself behave as stood in for.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
import struct
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cuda_on_host import HostCupy, KernelFault, find_compiler

from moe_runtime.comm import cuda, cuda_source, rows
from moe_runtime.comm.formats import FORMATS, num_scales, payload_bytes

SCALED = [name for name, fmt in FORMATS.items() if fmt.scaled]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = [(1, 1), (2, 2), (7, 3), (8, 8), (33, 4), (128, 5), (129, 6), (300, 7), (1030, 1)]  # (H, K)
STREAM = 4711


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> HostCupy:
    folder = tmp_path_factory.mktemp("kernels")
    compiler, why_not = find_compiler(folder)
    if compiler is None:
        pytest.skip(why_not)
    return HostCupy(compiler, folder, STREAM)


@pytest.fixture
def on_host(host, monkeypatch):
    """comm/cuda.py with the stand-in for cupy; its launches take CPU tensors."""
    monkeypatch.setitem(sys.modules, "cupy", host)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=STREAM))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cuda._compiled.cache_clear()
    cuda.available.cache_clear()
    host.launched.clear()
    yield host
    cuda._compiled.cache_clear()
    cuda.available.cache_clear()


def batch(hidden: int, top_k: int, dtype: torch.dtype, tokens: int = 5, count: int = 9):
    """(x [T, H], weights [T, K], tokens [N], slots [N, K]): values of many magnitudes, some of them none at all."""
    generator = torch.Generator().manual_seed(hidden * 100 + top_k)
    x = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64)
    x = x * 2.0 ** torch.randint(-12, 12, (tokens, hidden), generator=generator).double()
    odd = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40, -1e38, 448.0, 0.5]
    where = torch.rand(x.shape, generator=generator) < 0.02
    x[where] = torch.tensor(odd, dtype=torch.float64)[torch.randint(len(odd), (int(where.sum()),), generator=generator)]
    weights = torch.rand(tokens, top_k, generator=generator)
    slots = torch.randint(-3, 4, (count, top_k), generator=generator, dtype=torch.int32).clamp(min=-1)
    return x.to(dtype), weights, torch.randint(tokens, (count,), generator=generator), slots


def placed(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same rows [T, H] in memory that is aligned, that is not, and that is strided in one way or the other."""
    wide = x.new_empty(x.shape[0], x.shape[1] + 3)
    wide[:, 1:-2] = x
    return {"whole": x, "rows apart": wide[:, 1:-2], "transposed": x.t().contiguous().t()}


def set_parts(packed: torch.Tensor, layout: rows.RowLayout) -> list[torch.Tensor]:
    """What a packed row consists of, without the gaps between: [payload bytes, scales, weights, slots]."""
    hidden, scales, weights, slots = rows._parts(packed, layout)
    payload = hidden.contiguous().view(torch.uint8)
    return [part.contiguous() for part in (payload, scales, weights, slots) if part is not None]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, where a nan equals every other: what a nan looks like differs even between CPUs."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    nan = a.isnan() & b.isnan() if a.is_floating_point() else torch.zeros_like(a, dtype=torch.bool)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return bool((nan | (a.view(integer) == b.view(integer))).all())


def all_same(got, expected) -> bool:
    return all(same(a, b) for a, b in zip(got, expected, strict=True))


# ---------------------------------------------------------------- packed rows


def bytes_of_row(x, weights, slots, layout: rows.RowLayout) -> dict[int, bytes]:
    """The slowest twin, plain Python: offset -> bytes of one row that travels as it is."""
    letter = {torch.float32: "f", torch.float64: "d"}
    values = x.view(torch.int16).tolist() if x.dtype.itemsize == 2 else x.tolist()
    kept = [weight if slot >= 0 else 0.0 for weight, slot in zip(weights.tolist(), slots.tolist(), strict=True)]
    return {
        0: struct.pack(f"<{len(values)}{letter.get(x.dtype, 'h')}", *values),
        layout.weights_at: struct.pack(f"<{len(kept)}{letter[layout.weight_dtype]}", *kept),
        layout.slots_at: struct.pack(f"<{len(kept)}i", *slots.tolist()),
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_packed_row_is_byte_for_byte(dtype):
    for hidden, top_k in SHAPES:
        x, weights, tokens, slots = batch(hidden, top_k, dtype)
        layout = rows.layout_of(hidden, top_k, dtype, str(dtype).removeprefix("torch."))
        packed = rows.pack(x, weights, tokens, slots, layout)
        for n, token in enumerate(tokens.tolist()):
            for begin, expected in bytes_of_row(x[token], weights[token], slots[n], layout).items():
                assert bytes(packed[n, begin : begin + len(expected)].tolist()) == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_of_rows_that_travel_as_they_are(on_host, dtype):
    for hidden, top_k in SHAPES:
        x, weights, tokens, slots = batch(hidden, top_k, dtype)
        layout = rows.layout_of(hidden, top_k, dtype, str(dtype).removeprefix("torch."))
        expected = set_parts(rows.pack(x, weights, tokens, slots, layout), layout)
        for where, strided in placed(x).items():
            packed = cuda.pack(strided, weights, tokens, slots, layout)
            assert packed.shape == (len(tokens), layout.row_bytes)
            assert all_same(set_parts(packed, layout), expected), (hidden, top_k, where)
    assert set(on_host.launched) == {"pack_exact"}


@pytest.mark.parametrize("wire", SCALED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_and_unpack_with_scales(on_host, dtype, wire):
    for hidden, top_k in SHAPES:
        x, weights, tokens, slots = batch(hidden, top_k, dtype)
        layout = rows.layout_of(hidden, top_k, dtype, wire)
        expected = rows.pack(x, weights, tokens, slots, layout)
        for where, strided in placed(x).items():
            packed = cuda.pack(strided, weights, tokens, slots, layout)
            assert all_same(set_parts(packed, layout), set_parts(expected, layout)), (hidden, top_k, where)
        assert all_same(cuda.unpack(expected, layout), rows.unpack(expected, layout)), (hidden, top_k)
    assert set(on_host.launched) == {"pack_scaled", "unpack_scaled"}


def test_pack_takes_what_the_twin_takes(on_host):
    """No rows, weights of another dtype or layout, slots of another dtype, x that needs gradients, one row repeated."""
    x, weights, tokens, slots = batch(24, 1, torch.bfloat16)
    layout = rows.layout_of(24, 1, torch.bfloat16, "bfloat16")
    assert cuda.pack(x, weights, tokens[:0], slots[:0], layout).shape == (0, layout.row_bytes)
    assert not on_host.launched
    for changed in (
        (x.requires_grad_(), weights.requires_grad_(), tokens, slots),
        (x, weights.double(), tokens, slots.long()),
        (x, torch.randn(1, 5).t(), tokens, slots),
        (x, torch.randn(5, 3)[:, 1:2], torch.stack([tokens, tokens], 1)[:, 0], slots),
        (x[:1].expand(5, -1), weights, tokens, slots),
    ):
        twin = rows.pack(*changed, layout)
        assert all_same(set_parts(cuda.pack(*changed, layout), layout), set_parts(twin, layout))


def test_unpack_of_no_rows_and_of_rows_that_lie_anywhere(on_host):
    layout = rows.layout_of(130, 2, torch.bfloat16, "int8")
    none, weights, slots = cuda.unpack(torch.empty(0, layout.row_bytes, dtype=torch.uint8), layout)
    assert none.shape == (0, 130) and weights.shape == slots.shape == (0, 2) and slots.dtype == torch.int32
    packed = rows.pack(*batch(130, 2, torch.bfloat16), layout)
    moved = torch.empty(packed.numel() + 1, dtype=torch.uint8)[1:].view(packed.shape).copy_(packed)
    assert all_same(cuda.unpack(moved, layout), rows.unpack(packed, layout))


# ---------------------------------------------------------------- every value of the small formats


@pytest.mark.parametrize("wire", ["float8_e4m3fn", "float8_e4m3fnuz"])
def test_every_8_bit_float_is_read_as_torch_reads_it(on_host, wire):
    layout = rows.layout_of(256, 1, torch.float32, wire)
    packed = rows.pack(torch.ones(1, 256), torch.ones(1, 1), torch.tensor([0]), torch.ones(1, 1).int(), layout)
    packed[0, :256] = torch.arange(256)
    assert all_same(cuda.unpack(packed, layout), rows.unpack(packed, layout))


@pytest.mark.parametrize("wire", SCALED)
def test_every_value_and_every_tie_of_the_small_formats_is_written_as_torch_writes_it(on_host, wire):
    """All values of the format, all halves between neighbours, and what lies right beside: scales are 1."""
    fmt = FORMATS[wire]
    codes = torch.arange(256, dtype=torch.uint8).view(fmt.dtype).float()
    values = codes[codes.isfinite() & (codes.abs() <= fmt.largest)].sort().values
    ties = (values[1:] + values[:-1]) / 2
    beside = [torch.nextafter(ties, torch.full_like(ties, end)) for end in (-1e9, 1e9)]
    x = torch.cat([values, ties, *beside])
    x = torch.nn.functional.pad(x, (0, -len(x) % 127)).view(-1, 127)
    x = torch.nn.functional.pad(x, (1, 0), value=fmt.largest)  # the largest in each block
    layout = rows.layout_of(128, 1, torch.float32, wire)
    rest = (torch.ones(len(x), 1), torch.arange(len(x)), torch.zeros(len(x), 1, dtype=torch.int32))
    assert all_same(set_parts(cuda.pack(x, *rest, layout), layout), set_parts(rows.pack(x, *rest, layout), layout))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_float_is_read_and_written_as_torch_does(on_host, dtype):
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).view(64, 1024)
    order, starts = cuda.order_of_rows(torch.arange(64), None, 64)
    read = cuda.sum_by_kernel(x, order, starts, None, torch.float32)
    assert same(read, torch.zeros(64, 1024) + x.float())
    assert same(cuda.sum_by_kernel(x, order, starts, None, dtype), read.to(dtype))
    # Written from float32: their neighbours, the halves between them, and what lies right beside.
    values = x.flatten()[x.flatten().isfinite()].float().unique()
    ties = ((values[1:].double() + values[:-1].double()) / 2).float()
    wide = torch.cat([values, ties, *(torch.nextafter(ties, torch.full_like(ties, end)) for end in (-3e38, 3e38))])
    wide = torch.nn.functional.pad(wide, (0, -len(wide) % 4096), value=3e38).view(-1, 4096)
    order, starts = cuda.order_of_rows(torch.arange(len(wide)), None, len(wide))
    written = torch.empty_like(wide, dtype=dtype)
    types = {"ROW": torch.float32, "SUM": torch.float32, "OUT": dtype, "WEIGHTED": 0}
    cuda._launch("sum_rows", types, len(wide), wide, np.int64(4096), np.int64(4096), order, starts, wide, written)
    assert same(written, (wide + 0.0).to(dtype))


# ---------------------------------------------------------------- sums


def sum_slowly(values, tokens, choices, num_tokens, weights, dtype) -> torch.Tensor:
    """One row after the other, in the order that combine_rows promises."""
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    sums = torch.zeros(num_tokens, values.shape[1], dtype=wide)
    for n in range(len(tokens)) if choices is None else choices.argsort(stable=True).tolist():
        value = values[n].to(wide) if weights is None else values[n].to(wide) * weights[n].to(wide)
        sums[tokens[n]] = sums[tokens[n]] + value
    return sums.to(dtype)


def sums_to_make(dtype: torch.dtype):
    """(values [N, H], tokens [N], choices [N] or None, num_tokens, weights [N] or None, dtype of the sums)."""
    for number, (hidden, count, num_tokens) in enumerate([(1, 5, 1), (7, 40, 6), (129, 30, 50), (33, 0, 3), (5, 0, 0)]):
        generator = torch.Generator().manual_seed(number)
        values = torch.randn(count, hidden, generator=generator, dtype=torch.float64)
        values = (values * 2.0 ** torch.randint(-10, 10, (count, 1), generator=generator).double()).to(dtype)
        tokens = torch.randint(max(num_tokens, 1), (count,), generator=generator)
        choices = torch.randint(4, (count,), generator=generator)
        weights = torch.rand(count, generator=generator)
        for strided in placed(values).values() if count else [values]:
            yield strided, tokens, None, num_tokens, None, dtype
        yield values, tokens, None, num_tokens, weights, dtype
        yield values, tokens, choices, num_tokens, weights, dtype
        yield values, tokens, choices, num_tokens, None, torch.float32


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_combine_rows_adds_one_row_after_the_other(dtype, threads):
    torch.set_num_threads(threads)
    try:
        for values, tokens, choices, num_tokens, weights, out in sums_to_make(dtype):
            expected = sum_slowly(values, tokens, choices, num_tokens, weights, out)
            got = rows.combine_rows(values, tokens, num_tokens, weights, choices)
            twin = rows.combine_rows_torch(values, tokens, num_tokens, weights, choices)
            rounded = sum_slowly(values, tokens, choices, num_tokens, weights, dtype)
            assert same(got, rounded) and same(twin, rounded)
            order, starts = cuda.order_of_rows(tokens, choices, num_tokens)
            assert same(cuda.sum_in_passes(values, order, starts, weights).to(out), expected)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_kernel_adds_them_in_that_order_too(on_host, dtype):
    for values, tokens, choices, num_tokens, weights, out in sums_to_make(dtype):
        order, starts = cuda.order_of_rows(tokens, choices, num_tokens)
        wide = weights if weights is None or dtype != torch.float64 else weights.double()
        got = cuda.sum_by_kernel(values, order, starts, wide, out).to(out)
        assert same(got, sum_slowly(values, tokens, choices, num_tokens, weights, out))
    assert set(on_host.launched) == {"sum_rows"}


def test_combine_rows_equals_the_sums_that_dispatch_and_the_experts_make():
    """What comm/dispatch.py and experts/compute.py wrote with index_add, forward and backward, to the last bit."""
    generator = torch.Generator().manual_seed(3)
    for dtype in (torch.float32, torch.bfloat16):
        home = torch.randn(40, 12, generator=generator).to(dtype).requires_grad_()
        tokens, y_grad = torch.randint(9, (40,), generator=generator), torch.randn(9, 12, generator=generator).to(dtype)
        plain = torch.zeros(9, 12).index_add(0, tokens, home.float()).to(dtype)
        ours = rows.combine_rows(home, tokens, 9)
        grads = [torch.autograd.grad(y, home, y_grad)[0] for y in (plain, ours)]
        assert same(ours, plain) and same(*grads)

        pairs = torch.randperm(36, generator=generator)[:30]  # distinct (token, choice)
        token, choice = pairs // 4, pairs % 4
        out = torch.randn(30, 12, generator=generator).to(dtype).requires_grad_()
        weights_TK = torch.rand(9, 4, generator=generator).requires_grad_()
        y = torch.zeros(9, 12)
        for k in range(4):
            pair = (choice == k).nonzero().squeeze(1)
            weighted = out[pair].float() * weights_TK[token[pair], k].unsqueeze(1)
            y = y.index_add(0, token[pair], weighted)
        ours = rows.combine_rows(out, token, 9, weights_TK[token, choice], choice)
        expected = torch.autograd.grad(y.to(dtype), (out, weights_TK), y_grad)
        assert same(ours, y.to(dtype))
        assert all_same(torch.autograd.grad(ours, (out, weights_TK), y_grad), expected)


def test_the_gradients_of_combine_rows():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(7, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens, choices = torch.tensor([0, 2, 2, 1, 0, 2, 0]), torch.tensor([1, 0, 2, 0, 0, 1, 2])
    assert torch.autograd.gradcheck(lambda v: rows.combine_rows(v, tokens, 4), (values,))
    assert torch.autograd.gradcheck(lambda v, w: rows.combine_rows(v, tokens, 4, w, choices), (values, weights))
    none = torch.empty(0, 3, requires_grad=True)  # a rank whose rows are all elsewhere stays part of the graph
    rows.combine_rows(none, tokens[:0], 4).sum().backward()
    assert none.grad.shape == (0, 3)


# ---------------------------------------------------------------- the harness sees what a device would punish


FAULTS = {
    "reads before all have written": ("pack_scaled", "__syncthreads();\n        for", "for", "order in which"),
    "writes before all have read": ("pack_scaled", "__syncthreads();  // before", "// before", "order in which"),
    "wide loads of what is not aligned": ("pack_exact", "address % 16 == 0", "true", "misaligned"),
    "threads that leave early": ("pack_scaled", "Byte* row = p", "if (threadIdx.x > 99) return; Byte* row = p", "wait"),
    "writes past the end": ("pack_exact", "((int*)(row + slots_at))[k]", "((int*)(row + slots_at))[k + 4]", "outside"),
    "a parameter of another size": ("sum_rows", "long long hidden", "int hidden", "parameters of"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_kernel_is_seen(on_host, monkeypatch, fault):
    kernel, right, wrong, said = FAULTS[fault]
    text = cuda_source._COMMON + cuda_source._KERNELS[kernel]
    assert text.count(right) == 1
    monkeypatch.setattr(cuda, "source", lambda name, macros: cuda_source.source(name, macros).replace(right, wrong))
    with pytest.raises(KernelFault, match=said):
        if kernel == "sum_rows":
            cuda.sum_by_kernel(
                torch.ones(2, 3), *cuda.order_of_rows(torch.tensor([0, 1]), None, 2), None, torch.float32
            )
        wire = "int8" if kernel == "pack_scaled" else "bfloat16"
        x, *rest = batch(2050, 4, torch.bfloat16)
        cuda.pack(placed(x)["rows apart"], *rest, rows.layout_of(2050, 4, torch.bfloat16, wire))


def test_available_compares_the_kernels_with_their_twins(on_host, monkeypatch):
    assert cuda.available() == (True, "cupy on the host")
    assert set(on_host.launched) == {"pack_exact", "pack_scaled", "unpack_scaled", "sum_rows"}
    cuda._compiled.cache_clear()
    cuda.available.cache_clear()
    monkeypatch.setattr(cuda, "source", lambda *a: cuda_source.source(*a).replace("sum = add", "sum = 2 * add"))
    assert cuda.available() == (False, "other bits than torch with cupy on the host: sum_rows")
    assert cuda.describe() == (
        "rows on cuda: torch only, our kernels are off: other bits than torch with cupy on the host: sum_rows"
    )


# ---------------------------------------------------------------- NVIDIA's own compiler, where it is


def test_nvcc_takes_the_kernels_and_fuses_nothing(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    types = {"ROW": "Bfloat16", "WIRE": "E4m3fn", "WEIGHT": "float", "SUM": "float", "OUT": "Bfloat16", "WEIGHTED": "1"}
    for kernel in cuda_source._KERNELS:
        (tmp_path / "kernel.cu").write_text(cuda_source.source(kernel, tuple(types.items())))
        for output in ("ptx", "cubin"):
            command = [nvcc, f"-{output}", "-std=c++14", tmp_path / "kernel.cu", "-o", tmp_path / f"kernel.{output}"]
            built = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            if "unsupported GNU version" in built.stderr or "host compiler" in built.stderr:
                pytest.skip(f"nvcc has no host compiler that it takes: {built.stderr.strip()[-200:]}")
            assert built.returncode == 0 and "warning" not in built.stderr, built.stderr
        text = (tmp_path / "kernel.ptx").read_text()
        assert not re.findall(r"\bfma\.|\bmad\.rn\.f|\.ftz|div\.full|div\.approx", text)
        assert ("div.rn.f32" in text) == (kernel == "pack_scaled")


# ---------------------------------------------------------------- who decides


def tensor_on(device: str, dtype: torch.dtype) -> SimpleNamespace:
    return SimpleNamespace(device=torch.device(device), dtype=dtype)


def test_kernels_run_on_cuda_only_and_casts_stay_with_torch(monkeypatch):
    monkeypatch.setattr(cuda, "available", lambda: (True, ""))
    layout = {wire: rows.layout_of(8, 2, torch.float32, wire) for wire in FORMATS}
    rows_of = {device: tensor_on(device, torch.float32) for device in ("cuda:1", "cpu", "xpu")}
    packs = {wire for wire in FORMATS if cuda.takes("pack", rows_of["cuda:1"], layout[wire])}
    unpacks = {wire for wire in FORMATS if cuda.takes("unpack", tensor_on("cuda", torch.uint8), layout[wire])}
    assert packs == {"float32", *SCALED} and unpacks == set(SCALED)
    assert [cuda.takes("sum", value) for value in rows_of.values()] == [True, False, False]
    assert not any(cuda.takes("pack", rows_of[device], layout["int8"]) for device in ("cpu", "xpu"))
    assert not cuda.takes("sum", tensor_on("cuda", torch.float8_e4m3fn))
    monkeypatch.setattr(cuda, "available", lambda: (False, "why"))
    assert not cuda.takes("sum", rows_of["cuda:1"])


def test_why_the_kernels_are_off_is_said(monkeypatch):
    look = cuda.available.__wrapped__
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert look() == (False, "no CUDA device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert look() == (False, "cupy is not installed (install the cupy that is built for CUDA 12.6)")
    raised = SimpleNamespace(CompileException=type("CompileException", (Exception,), {}))
    fake = SimpleNamespace(__version__="13.9", cuda=SimpleNamespace(compiler=raised))
    monkeypatch.setitem(sys.modules, "cupy", fake)
    for kind in (raised.CompileException, RuntimeError, BufferError):

        def fails(kind=kind):
            raise kind("libnvrtc\n is missing")

        monkeypatch.setattr(cuda, "_kernels_that_differ", fails)
        assert look() == (False, "cupy 13.9 does not run the kernels: libnvrtc is missing")


def test_layouts_are_the_ones_that_the_kernels_count_on():
    """Parts start at multiples of 16, one scale per 128 values, and blocks of 128 threads: 8 groups of 16."""
    assert cuda_source.THREADS == 128 and rows.ALIGN == 16
    for wire, hidden, top_k in itertools.product(SCALED, (1, 128, 129), (1, 8)):
        layout = rows.layout_of(hidden, top_k, torch.bfloat16, wire)
        assert not any(part % 16 for part in (layout.scales_at, layout.weights_at, layout.slots_at, layout.row_bytes))
        assert payload_bytes(layout.wire, hidden) == hidden and num_scales(layout.wire, hidden) == -(-hidden // 128)

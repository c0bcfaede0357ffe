"""What needs a CUDA device: kernels and their twins, formats, staging, NCCL, models. Skipped elsewhere, with a reason.

Nobody has run these yet. Where there is no device, test_cuda_kernels.py runs the kernels' text on the host, and the
tests at the end of this file run what the tests of worlds call on CPUs.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_cuda_kernels import DTYPES, SCALED, SHAPES, all_same, batch, placed, same, set_parts, sums_to_make
from test_dispatch import CASES, FORMS, apply_experts
from test_families import SPLITS, check_rank, write_oracle

import moe_runtime
from moe_runtime.comm import cuda, rows, staging
from moe_runtime.comm.formats import FORMATS, decode, encode

HOW = "python -m pytest tests/test_cuda.py"
DEVICES = torch.cuda.device_count() if torch.cuda.is_available() else 0
CUDA_TESTS: list[str] = []
ON_CUDA = {"device": "cuda", "timeout_s": 120}


def on_cuda(test):
    """A test that needs a CUDA device."""
    CUDA_TESTS.append(test.__name__)
    reason = f"no CUDA device: torch {torch.__version__} finds none; on a machine with one, run {HOW}"
    return pytest.mark.skipif(not DEVICES, reason=reason)(test)


def on_two_devices(test):
    reason = f"needs two CUDA devices, here are {DEVICES}; on a machine with two, run {HOW}"
    return pytest.mark.skipif(DEVICES < 2, reason=reason)(on_cuda(test))


@pytest.fixture
def kernels() -> None:
    """The kernels, or a skip where cupy is not installed. Kernels that do not work are a failure."""
    used, why = cuda.available()
    if not used and "is not installed" in why:
        pytest.skip(f"{why}, then run {HOW}")
    assert used, why


def to_cuda(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.cuda() for tensor in tensors]


# ---------------------------------------------------------------- kernels


@on_cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_of_rows_that_travel_as_they_are(kernels, dtype):
    for hidden, top_k in SHAPES:
        x, *rest = batch(hidden, top_k, dtype)
        layout = rows.layout_of(hidden, top_k, dtype, str(dtype).removeprefix("torch."))
        expected = set_parts(rows.pack(x, *rest, layout), layout)
        for strided in placed(x.cuda()).values():
            assert cuda.takes("pack", strided, layout)
            packed = cuda.pack(strided, *to_cuda(*rest), layout)
            assert all_same(set_parts(packed.cpu(), layout), expected), (hidden, top_k)
        none = [part[:0] for part in rest[1:]]
        assert cuda.pack(x.cuda(), *to_cuda(rest[0], *none), layout).shape == (0, layout.row_bytes)


@on_cuda
@pytest.mark.parametrize("wire", SCALED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_and_unpack_with_scales(kernels, dtype, wire):
    for hidden, top_k in SHAPES:
        x, *rest = batch(hidden, top_k, dtype)
        layout = rows.layout_of(hidden, top_k, dtype, wire)
        expected = rows.pack(x, *rest, layout)
        for strided in placed(x.cuda()).values():
            packed = cuda.pack(strided, *to_cuda(*rest), layout)
            assert all_same(set_parts(packed.cpu(), layout), set_parts(expected, layout)), (hidden, top_k)
        assert cuda.takes("unpack", packed, layout)
        unpacked = cuda.unpack(expected.cuda(), layout)
        assert all_same([part.cpu() for part in unpacked], rows.unpack(expected, layout)), (hidden, top_k)


@on_cuda
@pytest.mark.parametrize("by", ["kernel", "passes"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_have_the_bits_of_the_cpu(request, monkeypatch, dtype, by):
    if by == "kernel":
        request.getfixturevalue("kernels")
    else:
        monkeypatch.setattr(cuda, "takes", lambda *arguments: False)
    for values, tokens, choices, num_tokens, weights, _ in sums_to_make(dtype):
        expected = rows.combine_rows(values, tokens, num_tokens, weights, choices)
        moved = [None if tensor is None else tensor.cuda() for tensor in (weights, choices)]
        got = rows.combine_rows(values.cuda(), tokens.cuda(), num_tokens, *moved)
        assert got.is_cuda and same(got.cpu(), expected)


@on_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_repeat_bit_for_bit_where_many_rows_meet(kernels, dtype):
    """The case in which torch's index_add on CUDA gives other bits each time."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(20_000, 1000, generator=generator).to(dtype)
    tokens = torch.randint(3, (20_000,), generator=generator)
    expected = rows.combine_rows(values, tokens, 3)
    on_device = to_cuda(values, tokens)
    for _ in range(10):
        assert same(rows.combine_rows(*on_device, 3).cpu(), expected)


@on_cuda
def test_gradients_of_sums(kernels):
    generator = torch.Generator().manual_seed(0)
    values, weights = torch.randn(50, 33, generator=generator), torch.rand(50, generator=generator)
    tokens, y_grad = torch.randint(9, (50,), generator=generator), torch.randn(9, 33, generator=generator)
    grads = []
    for device in ("cpu", "cuda"):
        v, w = values.to(device).requires_grad_(), weights.to(device).requires_grad_()
        plain = rows.combine_rows(v, tokens.to(device), 9)
        weighted = rows.combine_rows(v, tokens.to(device), 9, w)
        grads.append(torch.autograd.grad(plain, v, y_grad.to(device)))
        grads[-1] += torch.autograd.grad(weighted, (v, w), y_grad.to(device))
    assert all_same([grad.cpu() for grad in grads[1][:2]], grads[0][:2])
    torch.testing.assert_close(grads[1][2].cpu(), grads[0][2])


@on_cuda
def test_kernels_read_and_write_torchs_own_memory(kernels):
    import cupy

    x, weights, tokens, slots = to_cuda(*batch(4096, 8, torch.bfloat16, tokens=500, count=1000))
    for tensor in cuda.as_arguments((x, weights, tokens, slots)):
        assert cupy.from_dlpack(tensor).data.ptr == tensor.data_ptr()
    assert cuda.as_arguments((x, weights))[0].data_ptr() == x.data_ptr()
    layout = rows.layout_of(4096, 8, torch.bfloat16, "float8_e4m3fn")
    cuda.pack(x, weights, tokens, slots, layout)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    packed = cuda.pack(x, weights, tokens, slots, layout)
    assert torch.cuda.max_memory_allocated() - before <= packed.nbytes + 512  # torch gives multiples of 512


@on_cuda
def test_kernels_run_on_torchs_current_stream(kernels):
    layout = rows.layout_of(256, 1, torch.float32, "float32")
    rest = to_cuda(torch.ones(64, 1), torch.arange(64), torch.zeros(64, 1, dtype=torch.int32))
    x, side = torch.zeros(64, 256, device="cuda"), torch.cuda.Stream()
    cuda.pack(x, *rest, layout)  # compiles
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # on any other stream the kernel would read what was there before
        x.fill_(3)
        packed = cuda.pack(x, *rest, layout)
    side.synchronize()
    assert (rows.unpack(packed, layout)[0] == 3).all()


@on_two_devices
def test_kernels_run_where_their_tensors_are(kernels):
    x, *rest = batch(129, 3, torch.bfloat16)
    layout = rows.layout_of(129, 3, torch.bfloat16, "int8")
    packed = cuda.pack(x.to("cuda:1"), *(tensor.to("cuda:1") for tensor in rest), layout)
    assert packed.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    assert all_same(set_parts(packed.cpu(), layout), set_parts(rows.pack(x, *rest, layout), layout))


# ---------------------------------------------------------------- formats and staging, in torch


@on_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_formats_have_the_bits_of_the_cpu(name, dtype):
    fmt = FORMATS[name]
    for hidden, top_k in SHAPES:
        x = batch(hidden, top_k, dtype)[0]
        expected, encoded = encode(x, fmt), encode(x.cuda(), fmt)
        for got, wanted in zip(encoded, expected, strict=True):
            assert (got is wanted is None) or same(got.cpu(), wanted)
        assert same(decode(*encoded, fmt, dtype).cpu(), decode(*expected, fmt, dtype))


@on_cuda
@pytest.mark.parametrize("size", [0, 1, 1000, 4096, 4097, 12_345_678])
def test_staging_round_trips_through_pinned_chunks(size):
    assert staging.can_pin("cuda") and "pinned host memory" in staging.describe(torch.device("cuda"))
    payload = torch.randint(256, (size,), dtype=torch.uint8, device="cuda")
    back, at = torch.empty_like(payload), 0
    for chunk in staging.host_chunks(payload, 4096 if size < 10_000 else 1 << 20):
        assert chunk.is_pinned() or not len(chunk)
        staging.copy_in(chunk, back[at : at + len(chunk)])
        at += len(chunk)
    assert at == size and torch.equal(back, payload)


# ---------------------------------------------------------------- worlds: what every rank does, on any device


def exchanges(settings: dict, in_torchs_group: bool = False) -> str:
    """Every call of the contract with tensors on this rank's device; returns the transport's name.

    in_torchs_group: torch.distributed is there already, so that even a world of one goes through its collectives.
    """
    if in_torchs_group:
        dist.init_process_group("gloo")
    with moe_runtime.init(settings) as runtime:
        transport, rank, size, device = runtime.transport, runtime.rank, runtime.size, runtime.device
        assert settings["device"] in (device.type, "auto")
        counts = [1 + (rank + peer) % 3 for peer in range(size)]
        whose = [float(peer) for peer in range(size) for _ in range(counts[peer])]
        started = []
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8):
            mine = torch.full((sum(counts), 5), float(rank), device=device).to(dtype)
            got = transport.all_to_all_v(mine, counts, counts, "test")
            assert got.device == device and got.dtype == dtype and got.float()[:, 0].tolist() == whose
            started.append(transport.start_all_to_all_v(mine, counts, counts, "test"))
        assert all(finish().float()[:, 4].tolist() == whose for finish in started)
        assert transport.all_to_all_v(mine[:0], [0] * size, [0] * size, "test").shape == (0, 5)
        large = torch.arange(3_000_000, dtype=torch.float32, device=device) + rank  # 12 MB: many chunks
        everyone = transport.all_gather(large, "test")
        assert all(torch.equal(everyone[peer], large - rank + peer) for peer in range(size))
        for op, expected in (("sum", sum(range(size))), ("max", size - 1)):
            value = torch.tensor([float(rank)], device=device)
            transport.all_reduce(value, "test", op)
            assert value.tolist() == [expected]
        word = torch.tensor([7 if rank == size - 1 else 0], device=device)
        transport.broadcast(word, size - 1, "test")
        assert word.tolist() == [7]
        if size > 1 and rank == 0:
            transport.send(large, 1, "test")
        elif rank == 1:
            transport.recv(large, 0, "test")
            assert large[0] == 0
        for _ in range(20):
            transport.barrier("test")
        name = transport.name
    if in_torchs_group:
        dist.destroy_process_group()
    return name


def combined(settings: dict) -> list[bytes]:
    """What dispatch and combine make of every case and form, as bytes; the experts are computed on the CPU."""
    results = []
    with moe_runtime.init(settings) as runtime:
        for case in CASES.values():
            placement, (x, ids, weights) = case.placement(runtime.size), case.tokens_of(runtime.rank)
            dispatcher = runtime.dispatcher(case.hidden, case.experts, case.top_k, case.dtype, placement)
            for expand in FORMS:
                received, handle = dispatcher.dispatch(
                    x.to(runtime.device), ids, weights.to(runtime.device), expand=expand
                )
                host = SimpleNamespace(
                    expand=expand,
                    rows_per_slot=handle.rows_per_slot,
                    topk_slots=handle.topk_slots.cpu(),
                    topk_weights=handle.topk_weights.cpu(),
                )
                out = apply_experts(case, placement, runtime.rank, received.cpu(), host)
                y = dispatcher.combine(out.to(runtime.device), handle)
                assert y.device == runtime.device
                results.append(y.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if y.numel() else b"")
    return results


def check_model(folder: Path, split: list[int], settings: dict, in_torchs_group: bool = False) -> dict:
    """test_families' check, in float32 without TF32, within 1e-4 of the CPU; greedy tokens are equal."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    compare = torch.testing.assert_close
    torch.testing.assert_close = lambda *pair, **how: compare(*pair, **{**how, "rtol": 1e-4, "atol": 1e-4})
    if in_torchs_group:
        dist.init_process_group("gloo")
    result = check_rank(folder, split, settings)
    if in_torchs_group:
        dist.destroy_process_group()
    return result


@on_cuda
def test_a_world_of_one_over_nccl():
    name = run_ranks(exchanges, 1, {**ON_CUDA, "device": "auto"}, True, timeout=300)[0]
    assert name == "torch.distributed:nccl"


@on_two_devices
def test_two_ranks_over_nccl():
    names = run_ranks(exchanges, 2, {**ON_CUDA, "device": "auto"}, timeout=300)
    assert names == ["torch.distributed:nccl"] * 2


# NCCL refuses two ranks on one device.
@on_cuda
@pytest.mark.parametrize("transport", ["gloo", "shm", "zeromq"])
def test_two_ranks_that_may_share_one_device(transport):
    names = run_ranks(exchanges, 2, {**ON_CUDA, "transport": transport}, timeout=300)
    assert all(transport in name and ("staged" in name) == (transport != "zeromq") for name in names)


@on_cuda
def test_combine_has_the_bits_of_the_cpu():
    """Three ranks, so that a token's sum has three parts: order matters."""
    on_device = run_ranks(combined, 3, {**ON_CUDA, "transport": "zeromq"}, timeout=500)
    assert on_device == run_ranks(combined, 3, {"device": "cpu", "timeout_s": 60})


@on_cuda
@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v4"])
@pytest.mark.parametrize(("size", "transport"), [(1, "auto"), (1, "nccl"), (2, "gloo"), (2, "zeromq")])
def test_a_model_equals_the_cpu(tmp_path, family, size, transport):
    write_oracle(tmp_path, family)
    settings = {**ON_CUDA, "transport": "auto" if transport == "nccl" else transport}
    run_ranks(check_model, size, tmp_path, SPLITS[size], settings, transport == "nccl", timeout=500)


@on_two_devices
@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v4"])
def test_a_model_over_nccl_equals_the_cpu(tmp_path, family):
    write_oracle(tmp_path, family)
    run_ranks(check_model, 2, tmp_path, SPLITS[2], ON_CUDA, timeout=500)


@on_cuda
def test_a_model_over_a_cuda_and_a_cpu_island_equals_the_cpu(tmp_path):
    write_oracle(tmp_path, "deepseek_v3")
    nodes = '[[node]]\nname = "a"\nvendor = "nvidia"\nspeed = 2\n[[node]]\nname = "b"\nvendor = "cpu"\n'
    (tmp_path / "cluster.toml").write_text(nodes)
    settings = {"cluster": str(tmp_path / "cluster.toml"), "timeout_s": 120}
    run_ranks(check_model, 2, tmp_path, SPLITS[2], settings, timeout=500)


@on_cuda
def test_the_runtime_computes_on_the_device_it_finds():
    told = run_ranks(describes, 1, {**ON_CUDA, "device": "auto"}, timeout=300)[0]
    assert "device cuda:0" in told and "pinned host memory" in told


def describes(settings: dict) -> str:
    with moe_runtime.init(settings) as runtime:
        return runtime.describe()


# ---------------------------------------------------------------- without a device


def test_there_are_cuda_tests_and_how_to_run_them(capsys):
    assert len(CUDA_TESTS) == len(set(CUDA_TESTS)) >= 15
    with capsys.disabled():
        state = "ran here" if DEVICES else "skipped here, no CUDA device"
        print(f"\n{len(CUDA_TESTS)} CUDA tests ({state}); on a machine with one: {HOW}")


ON_CPU = {"device": "cpu", "timeout_s": 60}


@pytest.mark.parametrize(
    ("size", "settings", "in_torchs_group"), [(1, ON_CPU, True), (2, ON_CPU | {"transport": "gloo"}, False)]
)
def test_what_the_worlds_call_runs_on_cpus(size, settings, in_torchs_group):
    assert run_ranks(exchanges, size, settings, in_torchs_group) == ["torch.distributed:gloo"] * size


def test_what_the_models_and_the_sums_call_runs_on_cpus(tmp_path):
    write_oracle(tmp_path, "deepseek_v3")
    assert run_ranks(check_model, 1, tmp_path, SPLITS[1], ON_CPU, True)[0]["compared"] > 10
    alone = run_ranks(combined, 1, ON_CPU)[0]
    assert len(alone) == 2 * len(CASES) and any(alone)


def test_ranks_fork_from_a_process_that_has_not_touched_cuda():
    """A process that asked CUDA for anything leaves its forks without it, so nothing may ask on import."""
    code = (
        "import sys, torch\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "def refuse(*_): raise AssertionError('asked CUDA on import')\n"
        "for name in ('is_available', 'device_count', 'init', '_lazy_init', 'get_device_capability'):\n"
        "    setattr(torch.cuda, name, refuse)\n"
        "import transformers, moe_runtime.runtime, moe_runtime.comm.cuda, preload\n"
        "assert 'cupy' not in sys.modules\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr

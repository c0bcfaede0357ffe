"""The emulated device and collective library: what the device path can rely on where there is no device."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import re
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from families import reference_model, write_checkpoint
from ranks import RankFailed, run_ranks
from transformers import AutoModelForCausalLM

from moe_runtime.comm.detect import detect
from moe_runtime.comm.emulation import build
from moe_runtime.comm.emulation.collectives import backend_name
from moe_runtime.comm.emulation.device import device_type, emulate, emulated_vendor
from moe_runtime.comm.vendors import VENDORS, Quirk
from moe_runtime.core import environment
from moe_runtime.errors import ConfigError, VendorUnavailable

# One vendor of each device type: five of their own, and one whose torch presents itself as cuda.
TYPES = {
    "ascend": "npu", "moore_threads": "musa", "enflame": "gcu", "biren": "supa", "cambricon": "mlu",
    "metax": "emulated",
}  # fmt: skip
LIBRARY: list[Path] = []


@pytest.fixture(scope="module", autouse=True)
def library():
    """Built here, so that no test's deadline includes the compiler."""
    try:
        LIBRARY[:] = [build.device_library()]
    except VendorUnavailable as error:
        if "with a C++ compiler" in str(error):
            pytest.skip(str(error))
        raise


# ---------------------------------------------------------------- the device


def computes(vendor: str) -> tuple:
    device = emulate(vendor)
    assert emulate(vendor) == device and emulated_vendor() is VENDORS[vendor]
    values = torch.arange(6.0).view(2, 3)
    on_device = values.to(device)
    assert on_device.device == device and getattr(on_device, f"is_{device.type}")
    assert torch.equal((on_device @ on_device.t() + 1).cpu(), values @ values.t() + 1)
    with pytest.raises(TypeError, match="device type tensor to numpy"):
        on_device.numpy()
    with pytest.raises(RuntimeError, match="same device|Expected all tensors"):
        on_device.index_add_(0, torch.tensor([0]), torch.ones(1, 3))  # a forgotten .to(device) must not pass
    namespace = getattr(torch, device.type)
    assert namespace.is_available() and namespace.device_count() == 1 and namespace.current_device() == 0
    namespace.set_device(0)
    namespace.synchronize()
    with pytest.raises(RuntimeError, match="index 0"):
        namespace.set_device(1)
    free, total = namespace.mem_get_info()
    assert 0 < free <= total
    query = VENDORS[vendor].memory_query
    assert not query.is_known or callable(getattr(namespace, query.value))
    assert namespace.get_device_properties(0).total_memory == total
    return str(device), namespace.get_device_name(), namespace.is_bf16_supported()


@pytest.mark.parametrize("vendor", TYPES)
def test_a_vendors_device_loads_computes_and_answers_for_itself(vendor):
    (said,) = run_ranks(computes, 1, vendor)
    assert said == (f"{TYPES[vendor]}:0", f"{VENDORS[vendor].title} emulated on host memory", True)


def test_every_vendor_has_a_device_type_and_a_backend_that_torch_does_not_have_itself():
    for vendor in VENDORS.values():
        if vendor.name != "cpu":
            assert device_type(vendor) not in ("cuda", "xpu", "cpu")
            assert backend_name(vendor) not in ("nccl", "gloo", "xccl", "mpi", "ucc")
    assert backend_name("ascend") == "hccl" and backend_name(VENDORS["nvidia"]) == "emulated_nccl"


def views() -> None:
    device = emulate("ascend")
    values = torch.arange(24.0)
    base = values.to(device)
    assert base.view(4, 6).data_ptr() == base.data_ptr()
    base.view(4, 6)[1:3].t().mul_(2)
    assert torch.equal(base.cpu(), torch.cat([values[:6], values[6:18] * 2, values[18:]]))
    base.copy_(values)
    for view in (
        lambda t: t.as_strided((3, 4), (8, 2), 1),
        lambda t: t.view(2, 3, 4).transpose(0, 2).reshape(4, 6),
        lambda t: t.unfold(0, 5, 3),
        lambda t: t.view(2, 12)[:, ::3],
        lambda t: t.view(torch.uint8)[4:12],
        lambda t: t.view(4, 6).expand(2, 4, 6).flatten(0, 1),
        lambda t: torch.view_as_complex(t.view(12, 2)),
    ):
        assert torch.equal(view(base).cpu(), view(values))
    grown = torch.empty(0, device=device).resize_(5, 5).fill_(3)
    assert grown.sum().item() == 75 and grown.resize_(7, 7).flatten()[:25].sum().item() == 75
    strided = torch.empty_strided((3, 4), (1, 3), device=device).copy_(values[:12].view(3, 4))
    assert torch.equal(strided.cpu(), values[:12].view(3, 4)) and strided.stride() == (1, 3)
    other = torch.empty(0, device=device).set_(base.untyped_storage(), 2, (2, 2), (2, 1))
    assert torch.equal(other.cpu(), values[2:6].view(2, 2)) and other.is_set_to(base[2:6].view(2, 2))


def test_views_share_memory_and_resizing_keeps_what_was_there():
    run_ranks(views, 1)


def operations() -> None:
    device = emulate("moore_threads")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 8, generator=generator)
    index = torch.tensor([3, 0, 3, 5])
    for operation in (
        lambda t, i: torch.zeros_like(t).index_add_(0, i, t[:4]),
        lambda t, i: torch.index_select(t, 0, i, out=torch.empty(4, 8, device=t.device)),
        lambda t, i: torch.index_select(t, 0, i, out=torch.empty(0, device=t.device)),
        lambda t, i: t.topk(3, dim=-1).values,
        lambda t, i: t.topk(3, dim=-1).indices,
        lambda t, i: torch.cat([t, t[i]]),
        lambda t, i: (t > 0).nonzero(),
        lambda t, i: t.masked_fill(t > 0, 7.0),
        lambda t, i: torch.zeros_like(t).masked_scatter_(t > 0, t),
        lambda t, i: torch.bincount(i, minlength=8).cumsum(0),
        lambda t, i: torch.sort(t, dim=1, stable=True).indices,
        lambda t, i: torch.einsum("ab,cb->ac", t, t),
        lambda t, i: torch.where(t > 0, t, torch.zeros((), device=t.device)),
        lambda t, i: torch.arange(5, device=t.device) + i[:1],
        lambda t, i: torch.nn.functional.one_hot(i, 7),
        lambda t, i: t.clone().index_put_((i,), t[:4], accumulate=True),
        lambda t, i: torch.repeat_interleave(t, torch.arange(6, device=t.device), dim=0),
        lambda t, i: t.to(torch.bfloat16).float(),
        lambda t, i: torch._foreach_add([t, t], 1.0)[1],
    ):
        assert torch.allclose(operation(rows.to(device), index.to(device)).cpu(), operation(rows, index))
    assert torch.equal(rows.to(device), rows.to(device)) and not torch.equal(rows.to(device), -rows.to(device))
    attention = torch.nn.functional.scaled_dot_product_attention
    heads = torch.randn(2, 4, 5, 8, generator=generator)
    there = heads.to(device)
    for causal in (False, True):
        got, expected = (attention(h, h, h, is_causal=causal) for h in (there, heads))
        assert torch.allclose(got.cpu(), expected, atol=1e-6)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert (rows.to(device) @ rows.to(device).t()).dtype == torch.bfloat16
    with torch.autocast(device.type, enabled=False):
        assert (rows.to(device) @ rows.to(device).t()).dtype == torch.float32


def test_the_operations_of_dispatch_and_attention_equal_the_cpus():
    run_ranks(operations, 1)


def narrow_types() -> None:
    device = emulate("biren")
    values = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)) * 4
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.int8, torch.float16):
        narrow = values.to(dtype)
        there = narrow.to(device)
        assert torch.equal(there.cpu().view(torch.uint8), narrow.view(torch.uint8))
        assert torch.equal(values.to(device).to(dtype).view(torch.uint8).cpu(), narrow.view(torch.uint8))
        assert torch.equal(there.float().cpu(), narrow.float())
        assert torch.equal(there[3:5].contiguous().view(torch.uint8).cpu(), narrow[3:5].view(torch.uint8))


def test_fp8_and_int8_are_stored_and_cast():
    run_ranks(narrow_types, 1)


def trains() -> None:
    device = emulate("cambricon")
    torch.manual_seed(0)
    host = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.SiLU(), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4))
    there = torch.nn.Sequential(*(type(layer)(*_shape(layer)) if _shape(layer) else torch.nn.SiLU() for layer in host))
    there = there.to(device)
    there.load_state_dict(host.state_dict())
    batch = torch.randn(5, 8)
    for model, data in ((host, batch), (there, batch.to(device))):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(data).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    for name, value in there.state_dict().items():
        assert value.device == device and torch.allclose(value.cpu(), host.state_dict()[name], atol=1e-5)


def _shape(layer: torch.nn.Module) -> tuple[int, ...]:
    if isinstance(layer, torch.nn.Linear):
        return layer.in_features, layer.out_features
    return tuple(layer.normalized_shape) if isinstance(layer, torch.nn.LayerNorm) else ()


def test_autograd_and_an_optimizer_follow_the_cpu():
    run_ranks(trains, 1)


def memory() -> None:
    device = emulate("enflame")
    namespace = getattr(torch, device.type)
    before, copies = namespace.memory_allocated(), namespace.copies()
    kept = torch.zeros(1000).to(device)
    assert namespace.memory_allocated() - before == 4000 == torch.accelerator.memory_allocated() - before
    kept.add_(1).sum().item()  # the emulation's own work is no transfer
    after = namespace.copies()
    assert (after.to_device - copies.to_device, after.bytes_to_device - copies.bytes_to_device) == (1, 4000)
    assert after.to_host == copies.to_host and kept.cpu()[0] == 1
    assert namespace.copies().bytes_to_host == copies.bytes_to_host + 4000
    del kept
    assert namespace.memory_allocated() == before and namespace.max_memory_allocated() >= before + 4000
    pinned = torch.ones(3, pin_memory=True)
    assert pinned.is_pinned() and not torch.ones(3).is_pinned() and torch.ones(3).pin_memory().is_pinned()
    assert torch.equal(pinned.to(device, non_blocking=True).cpu(), pinned)
    start, end = (namespace.Event(enable_timing=True) for _ in range(2))
    with namespace.stream(namespace.Stream()) as _:
        start.record()
        end.record()
    end.synchronize()
    assert end.query() and start.elapsed_time(end) >= 0
    with pytest.raises(NotImplementedError, match="a generator on the CPU"):
        torch.Generator(device=device)
    torch.manual_seed(3)
    first = torch.rand(4, device=device)
    namespace.manual_seed_all(3)
    assert torch.equal(first, torch.rand(4, device=device))


def test_memory_copies_pinned_memory_streams_and_seeds():
    run_ranks(memory, 1)


def runs_model(family: str) -> None:
    vendor = {"deepseek_v2": "biren", "deepseek_v3": "ascend", "deepseek_v4": "metax"}[family]
    device = emulate(vendor)
    host = reference_model(family)
    tokens = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(7))
    expected = host(input_ids=tokens, labels=tokens)
    expected.loss.backward()
    gradients = {name: value.grad for name, value in host.named_parameters() if value.grad is not None}
    greedy = host.generate(tokens, max_new_tokens=8, do_sample=False)

    there = reference_model(family).to(device)
    tokens = tokens.to(there.device)
    got = there(input_ids=tokens, labels=tokens)
    got.loss.backward()
    assert there.device.type == TYPES[vendor] and got.logits.device == there.device
    assert torch.allclose(got.logits.cpu(), expected.logits, atol=1e-5)
    found = {name: value.grad.cpu() for name, value in there.named_parameters() if value.grad is not None}
    assert found.keys() == gradients.keys() and len(found) > 10
    for name, gradient in found.items():
        assert torch.allclose(gradient, gradients[name], atol=1e-5), name
    assert torch.equal(there.generate(tokens, max_new_tokens=8, do_sample=False).cpu(), greedy)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "deepseek_v4"])
def test_transformers_own_model_gives_the_cpus_logits_gradients_and_tokens(family):
    run_ranks(runs_model, 1, family)


def loads(folder: str) -> None:
    device = emulate("enflame")
    there = AutoModelForCausalLM.from_pretrained(folder, device_map={"": device})
    assert {value.device for value in there.state_dict().values()} == {device}
    there.save_pretrained(f"{folder}/again")
    host = AutoModelForCausalLM.from_pretrained(f"{folder}/again")
    saved = io.BytesIO()
    torch.save(copy.deepcopy(there).state_dict(), saved)
    saved.seek(0)
    read = torch.load(saved, weights_only=True)
    for name, value in host.state_dict().items():
        assert torch.equal(there.state_dict()[name].cpu(), value)
        assert read[name].device == device and torch.equal(read[name].cpu(), value)


def test_checkpoints_load_onto_the_device_and_are_saved_from_it(tmp_path):
    write_checkpoint(tmp_path, "deepseek_v3")
    run_ranks(loads, 1, str(tmp_path))


def detected(vendor: str) -> tuple[str, str, bool, str]:
    emulate(vendor)
    found = detect(which=lambda tool: None)
    assert detect(vendor, which=lambda tool: None).vendor == vendor
    return found.vendor, found.device_type, found.usable, found.evidence


@pytest.mark.parametrize("vendor", [name for name, own in TYPES.items() if own != "emulated"])
def test_detection_finds_the_emulated_vendor_by_its_own_order(vendor):
    own = TYPES[vendor]
    assert run_ranks(detected, 1, vendor) == [(vendor, own, True, f"torch.{own}.is_available()")]


def refusals() -> None:
    with pytest.raises(ConfigError, match="the CPU needs no emulation"):
        emulate("cpu")
    with pytest.raises(ConfigError, match="'graphcore' is no row.*nvidia, amd, ascend"):
        emulate("graphcore")
    assert emulated_vendor() is None
    emulate("hygon")
    with pytest.raises(ConfigError, match="emulates hygon already"):
        emulate("ascend")


def test_what_cannot_be_emulated_is_refused_by_name():
    run_ranks(refusals, 1)


def comes_late() -> None:
    torch.ones(1, requires_grad=True).sum().backward()
    with pytest.raises(ConfigError, match=r"backward pass before.*call emulate\(\) first"):
        emulate("ascend")


def test_a_device_that_comes_after_the_first_backward_pass_is_refused():
    run_ranks(comes_late, 1)


# ---------------------------------------------------------------- the collective library


def join(vendor: str, timeout_s: float = 30.0) -> torch.device:
    device = emulate(vendor)
    environment.keep_gloo_on_loopback()
    dist.init_process_group(backend_name(vendor), timeout=timedelta(seconds=timeout_s))
    return device


def exchanges(vendor: str) -> dict[str, int]:
    device = join(vendor)
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    even = 128 * size  # 512 bytes to each rank
    mine = torch.full((even,), float(rank), device=device)
    got = torch.empty_like(mine)
    dist.all_to_all_single(got, mine)
    assert got.view(size, 128)[:, 0].tolist() == list(range(size))
    if Quirk.UNEVEN_SPLITS_UNSTATED not in VENDORS[vendor].quirks:
        # rank r sends r + d rows to rank d, of 3 columns of (r, d, row)
        given = [torch.tensor([[rank, to, row] for row in range(rank + to)]).view(-1, 3) for to in range(size)]
        counts = [source + rank for source in range(size)]
        rows = torch.empty(sum(counts), 3, dtype=torch.int32, device=device)
        sent = torch.cat(given).int().to(device)
        work = dist.all_to_all_single(rows, sent, counts, [rank + to for to in range(size)], async_op=True)
        work.wait()
        assert rows.tolist() == [[source, rank, row] for source in range(size) for row in range(source + rank)]
    total = torch.full((256,), rank + 1.0, device=device)
    dist.all_reduce(total)
    assert total.eq(sum(range(1, size + 1))).all()
    for operation, expected in ((dist.ReduceOp.MAX, size), (dist.ReduceOp.MIN, 1)):
        value = torch.full((256,), rank + 1, dtype=torch.int32, device=device)
        dist.all_reduce(value, operation)
        assert value.eq(expected).all()
    parts = [torch.empty(256, device=device) for _ in range(size)]
    dist.all_gather(parts, torch.full((256,), float(rank), device=device))
    assert [part[9].item() for part in parts] == list(range(size))
    root = torch.full((256,), float(rank), device=device)
    dist.broadcast(root, size - 1)
    assert root.eq(size - 1).all()
    if rank == 0:
        dist.send(torch.arange(512, device=device, dtype=torch.int32), 1)
    elif rank == 1:
        received = torch.empty(512, device=device, dtype=torch.int32)
        dist.recv(received, 0)
        assert received.tolist() == list(range(512))
    dist.barrier()
    subgroup = dist.new_group(list(range(size)))
    dist.all_reduce(total, group=subgroup)
    assert subgroup.calls == {"all_reduce": 1} and group.bytes["all_reduce"] == 3 * 1024
    assert "emulated" in group.name()
    calls = dict(group.calls)
    dist.destroy_process_group()
    return calls


@pytest.mark.parametrize("vendor, size", [("ascend", 2), ("moore_threads", 3), ("biren", 2), ("metax", 3)])
def test_collectives_give_what_every_rank_knows_they_must(vendor, size):
    uneven = vendor != "biren"
    for rank, calls in enumerate(run_ranks(exchanges, size, vendor)):
        assert calls == {
            "all_to_all_single": 1 + uneven, "all_reduce": 3, "all_gather": 1, "broadcast": 1, "barrier": 1,
            **({0: {"send": 1}, 1: {"recv": 1}}.get(rank, {})),
        }  # fmt: skip


def wide_and_strided() -> None:
    device = join("metax")
    rank = dist.get_rank()
    strided = torch.full((4, 6), float(rank + 1), device=device).t()
    dist.all_reduce(strided, dist.ReduceOp.AVG)
    assert strided.eq(1.5).all() and strided.stride() == (1, 6)
    into = torch.zeros(4, 6, device=device).t()
    dist.broadcast(into if rank else strided, 0)
    assert (into if rank else strided).eq(1.5).all()
    for dtype in (torch.int16, torch.bool, torch.uint16):
        value = torch.tensor([rank, 1], device=device).to(dtype)
        dist.all_reduce(value)
        assert value.cpu().tolist() == ([True, True] if dtype == torch.bool else [1, 2])
    for dtype in (torch.float8_e4m3fn, torch.int16, torch.uint64):  # types that gloo itself lacks
        value = torch.tensor([rank + 3, 1], device=device).to(dtype)
        dist.broadcast(value, 0)
        assert value.cpu().view(torch.uint8).equal(torch.tensor([3, 1]).to(dtype).view(torch.uint8))
    empty = torch.empty(0, 3, device=device)
    dist.all_to_all_single(torch.empty(0, 3, device=device), empty, [0, 0], [0, 0])
    scalar = torch.tensor(float(rank), device=device)
    dist.all_reduce(scalar)
    assert scalar.item() == 1


def test_what_no_document_forbids_is_allowed():
    run_ranks(wide_and_strided, 2)


def _limits(vendor: str, device: torch.device) -> dict[str, object]:
    """Calls that the vendor's documents rule out, by the words its refusal must hold."""

    def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.ones(shape, device=device, dtype=dtype)

    def exchange(tensor: torch.Tensor, splits: list[int]) -> None:
        dist.all_to_all_single(torch.empty_like(tensor), tensor, splits, splits)

    def batch() -> None:
        dist.batch_isend_irecv([dist.P2POp(dist.isend, ones(128), 1), dist.P2POp(dist.irecv, ones(128), 1)])

    gathered = [ones(128), ones(128)] if dist.get_rank() == 0 else None
    fp8 = torch.float8_e4m3fn
    every = {
        "must be on": lambda: dist.all_reduce(torch.ones(128)),
        "float8_e4m3fn cannot be reduced": lambda: dist.all_reduce(ones(512).to(fp8)),
        "add up": lambda: exchange(ones(256), [1, 2]),
    }
    own = {
        "ascend": {
            "no average": lambda: dist.all_reduce(ones(4), dist.ReduceOp.AVG),
            "uint8 cannot be reduced": lambda: dist.all_reduce(ones(4, dtype=torch.uint8)),
            "without dimensions": lambda: dist.broadcast(ones(), 0),
            "not contiguous": lambda: dist.broadcast(ones(4, 4).t(), 0),
            "recv_any_source": lambda: dist.recv(ones(4)),
            "gather": lambda: dist.gather(ones(128), gathered),
            "scatter": lambda: dist.scatter(ones(128), gathered),
            "float8_e4m3fnuz is not among": lambda: dist.broadcast(ones(4).to(torch.float8_e4m3fnuz), 0),
        },
        "biren": {
            "no multiple of 512": lambda: dist.broadcast(ones(4), 0),
            "uneven splits": lambda: exchange(ones(384), [128, 256]),
            "a message of 400 bytes": lambda: exchange(ones(256), [100, 156]),
            "float16 is not among": lambda: dist.broadcast(ones(256, dtype=torch.float16), 0),
            "int64 is not among": lambda: dist.all_reduce(ones(64, dtype=torch.int64)),
            "float8_e4m3fn is not among": lambda: dist.broadcast(ones(512).to(fp8), 0),
            "batch_isend_irecv": batch,
        },
        "enflame": {
            "the buffer for uneven splits holds 1000": lambda: exchange(ones(3, 100), [1, 2]),
            "not contiguous": lambda: dist.all_reduce(ones(4, 4).t()),
            "float64 cannot be reduced": lambda: dist.all_reduce(ones(4, dtype=torch.float64)),
        },
        "cambricon": {
            "float64 is not among": lambda: dist.broadcast(ones(4, dtype=torch.float64), 0),
            "batch_isend_irecv": batch,
        },
        "moore_threads": {"recv_any_source": lambda: dist.recv(ones(4))},
        "kunlunxin": {
            "int8 cannot be reduced": lambda: dist.all_reduce(ones(4, dtype=torch.int8)),
            "gather": lambda: dist.gather(ones(128), gathered),
        },
        "nvidia": {"float8_e5m2 is not among": lambda: dist.broadcast(ones(4).to(torch.float8_e5m2), 0)},
        "hygon": {},
    }[vendor]
    if vendor in ("biren", "nvidia", "moore_threads", "enflame", "cambricon"):  # already refused as a payload
        every.pop("float8_e4m3fn cannot be reduced")
    return {**every, **own}


def reaches_the_limits(vendor: str) -> None:
    device = join(vendor)
    for words, call in _limits(vendor, device).items():
        with pytest.raises((RuntimeError, VendorUnavailable)) as caught:
            call()
        assert words in str(caught.value) and VENDORS[vendor].title in str(caught.value), str(caught.value)
    assert not dist.group.WORLD.calls  # nothing was sent: both ranks were refused alike
    dist.barrier()


@pytest.mark.parametrize(
    "vendor", ["ascend", "biren", "enflame", "cambricon", "moore_threads", "kunlunxin", "nvidia", "hygon"]
)
def test_each_documented_limit_is_refused_in_the_vendors_name(vendor):
    run_ranks(reaches_the_limits, 2, vendor, env={"ECCL_ALLTOALLV_MAXSIZE": "1000"})


def meets_strangers(vendors: list[str]) -> str:
    with pytest.raises(VendorUnavailable) as caught:
        join(vendors[environment.read_world().rank])
    return str(caught.value)


@pytest.mark.parametrize("vendors", [["ascend", "ascend", "moore_threads"], ["nvidia", "hygon", "nvidia"]])
def test_members_of_another_vendor_are_refused_by_rank_and_name(vendors):
    for rank, said in enumerate(run_ranks(meets_strangers, 3, vendors)):
        other = next(n for n in range(3) if vendors[n] != vendors[rank])
        assert f"rank {rank} is {vendors[rank]}, rank {other} is {vendors[other]}" in said


def waits_for(absent: str) -> tuple[str, float]:
    device = join("cambricon", timeout_s=1.5)
    if dist.get_rank() == 1:
        if absent == "died":
            os._exit(1)
        time.sleep(3)
        return "", 0.0
    started = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        dist.all_reduce(torch.ones(4, device=device))
    return str(caught.value), time.monotonic() - started


@pytest.mark.parametrize("absent, words", [("late", "imed out|imeout"), ("died", "onnection closed|onnection reset")])
def test_a_wait_ends_with_gloos_text_for_a_late_or_dead_rank(absent, words):
    said, seconds = run_ranks(waits_for, 2, absent, expect_dead=(1,) if absent == "died" else ())[0]
    assert re.search(words, said) and seconds < 2.9


def joins_alone() -> str:
    emulate("ascend")
    store = dist.TCPStore("127.0.0.1", environment.read_world().master_port, 2, True, wait_for_workers=False)
    with pytest.raises(dist.DistStoreError) as caught:
        dist.init_process_group("hccl", store=store, rank=0, world_size=2, timeout=timedelta(seconds=1))
    return str(caught.value)


def test_a_rank_that_does_not_join_is_named():
    assert "emulated HCCL: rank 1 did not join the group of rank 0 within 1 s" in run_ranks(joins_alone, 1)[0]


def averages_gradients() -> None:
    device = join("moore_threads")
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 4).to(device))
    data = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    share = data.chunk(2)[dist.get_rank()].to(device)
    model(share).square().mean().backward()
    alone = torch.nn.Linear(8, 4)
    alone.load_state_dict(model.module.state_dict())
    alone(data).square().mean().backward()
    assert torch.allclose(model.module.weight.grad.cpu(), alone.weight.grad, atol=1e-5)


def test_torchs_own_data_parallel_runs_over_it():
    run_ranks(averages_gradients, 2)


# ---------------------------------------------------------------- building


def compiler(folder: Path, script: str) -> str:
    """A stand-in for the compiler, which leaves a line in `log` for each time it was called."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\necho called >> {folder}/log\n{script}\n")
    path.chmod(0o755)
    return str(path)


def builds(deadline_s: float, delay_s: float = 0.0) -> tuple[str, float]:
    time.sleep(delay_s * environment.read_world().rank)
    started = time.monotonic()
    try:
        return str(build.device_library(deadline_s)), time.monotonic() - started
    except VendorUnavailable as error:
        return str(error), time.monotonic() - started


def calls(folder: Path) -> int:
    return (folder / "log").read_text().count("called")


# The script's way to its -o, now $2.
COPY = 'while [ "$1" != -o ]; do shift; done; '


def test_two_processes_at_once_build_once(tmp_path):
    command = compiler(tmp_path, f"sleep 0.5; {COPY} cp {LIBRARY[0]} $2")
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "CXX": command}
    (first, _), (second, _) = run_ranks(builds, 2, 30.0, env=env)
    assert first == second and Path(first).read_bytes() == LIBRARY[0].read_bytes() and calls(tmp_path) == 1
    assert [path.suffix for path in sorted(Path(first).parent.iterdir())] == [".lock", ".so"]
    assert run_ranks(builds, 1, 30.0, env=env)[0][0] == first and calls(tmp_path) == 1


def test_a_build_that_was_killed_keeps_nobody_waiting(tmp_path):
    once = f"[ $(wc -l < {tmp_path}/log) = 1 ] && kill -9 $PPID && exit 1"
    command = compiler(tmp_path, f"sleep 0.5; {once}; {COPY} cp {LIBRARY[0]} $2")
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "CXX": command}
    dead, (built, seconds) = run_ranks(builds, 2, 30.0, 0.2, env=env, expect_dead=(0,))
    assert dead is None and built.endswith(".so") and seconds < 10 and calls(tmp_path) == 2


def test_a_build_ends_with_its_deadline_and_so_does_waiting_for_one(tmp_path):
    command = compiler(tmp_path, f"echo $$ > {tmp_path}/pid; sleep 60")
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "CXX": command}
    (first, early), (second, late) = run_ranks(builds, 2, 1.0, 0.2, env=env)
    assert early < 5 and late < 5
    assert "when the deadline passed" in first and ("another process" in second or "when the deadline" in second)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize(
    "env, script, words",
    [
        ({"CXX": "no-such-compiler"}, "", "CXX names 'no-such-compiler', which is not there; install a C++17 compiler"),
        ({"CXX": "", "PATH": "/nowhere"}, "", "neither c++ nor g++ is on the search path; install a C++17 compiler"),
        ({}, "echo in file x; echo 'a.cpp:1: fatal error: mutex: No such file'; exit 1", "fatal error: mutex: No such"),
        ({}, "exit 1", "it said nothing"),
    ],
)
def test_a_build_that_fails_says_in_one_line_what_to_install(tmp_path, env, script, words):
    env = {"CXX": compiler(tmp_path, script), **env, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    ((said, _),) = run_ranks(builds, 1, 10.0, env=env)
    assert words in said and "install" in said and "\n" not in said
    assert not list((tmp_path / "cache").rglob("*.so")) and not list((tmp_path / "cache").rglob("*.tmp"))


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    ((said, _),) = run_ranks(builds, 1, 10.0, env={"XDG_CACHE_HOME": str(tmp_path / "file")})
    assert "set XDG_CACHE_HOME" in said and "\n" not in said


def says_that_it_builds() -> str:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        build.device_library(30.0)
    return said.getvalue()


def test_building_is_never_silent(tmp_path):
    env = {"XDG_CACHE_HOME": str(tmp_path), "CXX": compiler(tmp_path, f"{COPY} cp {LIBRARY[0]} $2")}
    first, second = run_ranks(says_that_it_builds, 1, env=env)[0], run_ranks(says_that_it_builds, 1, env=env)[0]
    assert first == "building the emulated device with compiler, about 30 s, once\n" and second == ""


def test_the_rank_runner_shows_a_rank_that_cannot_emulate(tmp_path):
    with pytest.raises(RankFailed, match="VendorUnavailable.*no-such-compiler"):
        run_ranks(computes, 1, "ascend", env={"XDG_CACHE_HOME": str(tmp_path), "CXX": "no-such-compiler"})


@pytest.mark.slow
def test_the_sources_compile_without_a_warning(tmp_path):
    for source in build.SOURCES:
        code, said = build._run(
            [*build._compiler(), "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-isystem",
             str(Path(torch.__path__[0]) / "include"), str(source)],
            time.monotonic() + 200,
        )  # fmt: skip
        assert code == 0, said

"""The vendor table is complete and says what was read; detection survives the masquerades; quirks keep the data."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.comm import quirks, vendors
from moe_runtime.comm.detect import CUDA_ORDER, PLUGIN_ORDER, TOOL_ORDER, detect
from moe_runtime.comm.vendors import UNKNOWN, VENDORS, Quirk
from moe_runtime.core.environment import vendor_marks
from moe_runtime.core.errors import ConfigError, VendorUnavailable

ROOT = Path(__file__).resolve().parents[1]
ROWS = (
    "nvidia amd ascend hygon moore_threads metax biren enflame iluvatar cambricon kunlunxin intel cpu".split()
)  # fmt: skip
EXAMPLES = settings(max_examples=40, deadline=None)


# ---------------------------------------------------------------- the table


def test_the_table_has_the_rows_of_the_design():
    assert list(VENDORS) == ROWS
    assert all(name == row.name for name, row in VENDORS.items())


@pytest.mark.parametrize(
    "broken",
    [
        {"backend": vendors.fact(None, "a source")},
        {"backend": vendors.fact("", "a source")},
        {"backend": vendors.fact("nccl", " ")},
        {"backend": vendors.fact("nccl", "a source", "certain")},
        {"backend": vendors.Fact(())},
        {"backend": "nccl"},
        {"title": ""},
        {"name": "cpu"},
    ],
)
def test_an_incomplete_row_is_refused(broken):
    row = dataclasses.replace(VENDORS["nvidia"], **broken)
    others = [other for name, other in VENDORS.items() if name != "nvidia"]
    with pytest.raises(AssertionError, match="vendor row"):
        vendors.complete([row, *others])


def test_a_quirk_of_a_vendor_without_row_is_refused():
    with pytest.raises(AssertionError, match="unknown vendors"):
        vendors.complete([VENDORS["nvidia"]])


@pytest.mark.parametrize("row", VENDORS.values(), ids=lambda row: row.name)
def test_values_are_of_the_kinds_that_code_relies_on(row):
    """Detection and the transports index these; a sentence in their place would be taken for a name."""
    for name in ("plugin_modules", "visible_devices", "identification", "network_variables"):
        assert all(isinstance(value, tuple) or value == UNKNOWN for value in getattr(row, name).values), name
    for name in ("collective_dtypes", "reduce_dtypes"):
        for value in getattr(row, name).values:
            assert value == UNKNOWN or all(isinstance(getattr(torch, dtype), torch.dtype) for dtype in value)
    assert set(row.fp8.values) <= {"e4m3fn", "e4m3fnuz", "none", UNKNOWN}
    assert {*row.bf16.values, *row.int8.values} <= {"yes", "no", UNKNOWN}
    for name in ("device_type", "backend", "command_line_tool", "memory_query"):
        assert all(" " not in value for value in getattr(row, name).values), name
    if row.device_namespace.value != UNKNOWN:
        assert row.device_namespace.value == f"torch.{row.device_type.value}"
    for reading in (reading for entry in row.facts().values() for reading in entry.readings):
        assert (reading.confidence == "none") <= (reading.value == UNKNOWN)


@pytest.mark.parametrize(
    ("vendor", "name", "values"),
    [
        ("ascend", "backend", ("hccl", "lccl")),
        ("ascend", "visible_devices", (("ASCEND_RT_VISIBLE_DEVICES",), ("ASCEND_VISIBLE_DEVICES",))),
        ("biren", "backend", ("bccl", "sccl")),
        ("biren", "uneven_all_to_all", (UNKNOWN,)),
        ("cambricon", "backend", ("cncl",)),
        ("enflame", "backend", ("eccl", "nccl")),
        ("enflame", "fp8", ("none", UNKNOWN, "e4m3fn")),
        ("hygon", "device_type", ("cuda",)),
        ("hygon", "fp8", ("none", "e4m3fnuz")),
        ("iluvatar", "fp8", (UNKNOWN,)),
        ("intel", "device_type", ("xpu",)),
        ("kunlunxin", "backend", ("nccl", "bkcl")),
        ("metax", "backend", ("nccl", "mccl")),
        ("moore_threads", "device_namespace", ("torch.musa",)),
        ("nvidia", "visible_devices", (("CUDA_VISIBLE_DEVICES",),)),
    ],
)
def test_rows_say_what_the_facts_say(vendor, name, values):
    assert VENDORS[vendor].facts()[name].values == values


@pytest.mark.parametrize(
    ("quirk", "names"),
    [
        (Quirk.SIZES_PAD_512, {"biren"}),
        (Quirk.PRESIZED_ALLTOALLV, {"enflame"}),
        (Quirk.AVG_BY_SUM, {"ascend"}),
        (Quirk.NO_UINT8_REDUCE, {"ascend"}),
        (Quirk.SIGN_NOT_KEPT, {"kunlunxin"}),
        (Quirk.NO_RECV_ANY_SOURCE, {"biren", "moore_threads", "ascend"}),
        (Quirk.NO_FLOAT64, {"biren", "cambricon", "iluvatar", "enflame"}),
    ],
)
def test_quirks_belong_to_the_vendors_that_document_them(quirk, names):
    assert {name for name, row in VENDORS.items() if quirk in row.quirks} == names


def test_every_quirk_is_applied_in_quirks_py_or_only_informs():
    informs = {Quirk.NO_NATIVE_ALLTOALL, Quirk.ALLTOALLV_COUNTS_ON_DEVICE, Quirk.ONE_DEVICE_PER_PROCESS}
    source = Path(quirks.__file__).read_text()
    assert {quirk for quirk in Quirk if f"Quirk.{quirk.name}" not in source} == informs


def test_the_document_is_the_table():
    text = (ROOT / "docs" / "vendors.md").read_text(encoding="utf-8")
    assert text == vendors.render_table(), "run: python -m moe_runtime.comm.vendors > docs/vendors.md"
    assert "None of these rows but `cpu` has been run on a real chip" in text


def test_the_table_and_detection_need_no_torch(tmp_path):
    code = "import sys, moe_runtime.comm.vendors, moe_runtime.comm.detect; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ran.stdout.strip() == "False", ran.stderr


# ---------------------------------------------------------------- detection


def device(name="", arch="", available=True):
    return SimpleNamespace(
        is_available=lambda: available,
        get_device_name=lambda index: name,
        get_device_properties=lambda index: SimpleNamespace(gcnArchName=arch) if arch else SimpleNamespace(),
    )


def fake_torch(version="2.7.1", hip=None, **attributes):
    return SimpleNamespace(__version__=version, version=SimpleNamespace(hip=hip, cuda="12.4"), **attributes)


class FakeMachine:
    """`plugins`: module name to what its import does to torch (a function), or the error it raises."""

    def __init__(self, torch_module, plugins=(), tools=(), env=None):
        self.torch, self.plugins, self.tools, self.env = torch_module, dict(plugins), set(tools), env or {}
        self.imported: list[str] = []

    def import_module(self, name):
        self.imported.append(name)
        if name not in self.plugins:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if isinstance(self.plugins[name], Exception):
            raise self.plugins[name]
        self.plugins[name](self.torch)

    def detect(self, override=None):
        which = lambda tool: f"/usr/bin/{tool}" if tool in self.tools else None  # noqa: E731
        return detect(override, self.torch, which, self.import_module, self.env)


def adds(**attributes):
    return lambda torch_module: torch_module.__dict__.update(attributes)


def supa_takes_over(torch_module):
    """What torch_supa's autoload does: torch.cuda is torch.supa, and torch says that it is a CUDA build."""
    torch_module.supa = device("Biren166M")
    torch_module.cuda = torch_module.supa
    torch_module.version.cuda = "12.1"


PLUGINS = {
    "ascend": ("torch_npu", adds(npu=device("Ascend910B2"))),
    "moore_threads": ("torch_musa", adds(musa=device("MTT S4000"), cuda=device("MTT S4000"))),
    "enflame": ("torch_gcu", adds(gcu=device("Enflame S60"), cuda=device("Enflame S60"))),
    "cambricon": ("torch_mlu", adds(mlu=device("MLU590"))),
    "biren": ("torch_supa", supa_takes_over),
}


@pytest.mark.parametrize("vendor", PLUGINS)
def test_a_plugin_comes_before_any_cuda_device(vendor):
    """Also where the machine has an NVIDIA card, or the plug-in has put itself in place of torch.cuda."""
    module, effect = PLUGINS[vendor]
    torch_module = fake_torch(cuda=device("NVIDIA H100 80GB HBM3"))
    machine = FakeMachine(torch_module, {module: effect}, ["nvidia-smi", "xpu-smi"])
    found = machine.detect()
    assert (found.vendor, found.device_type) == (vendor, VENDORS[vendor].device_type.value)
    assert module in found.evidence and found.usable and found.candidates == (vendor,)


@pytest.mark.parametrize("vendor", PLUGINS)
def test_a_plugin_that_loaded_itself_is_found_without_importing(vendor):
    """An entry point of torch.backends may have run at `import torch`; the module may then refuse a second name."""
    machine = FakeMachine(fake_torch())
    PLUGINS[vendor][1](machine.torch)
    assert machine.detect().vendor == vendor


def test_of_two_plugins_the_first_in_the_order_wins():
    machine = FakeMachine(fake_torch(), [PLUGINS["biren"], PLUGINS["ascend"]])
    assert PLUGIN_ORDER == ("ascend", "moore_threads", "enflame", "cambricon", "biren", "intel")
    assert machine.detect().vendor == "ascend"
    assert machine.imported == ["torch_npu"]


def test_birens_older_plugin_serves_where_the_newer_one_is_not():
    machine = FakeMachine(fake_torch(), {"torch_br": adds(supa=device("Biren106M"))})
    found = machine.detect()
    assert found.vendor == "biren" and "torch_br" in found.evidence
    assert machine.imported[-2:] == ["torch_supa", "torch_br"]


def test_a_plugin_without_device_or_that_fails_to_load_is_told_and_passed_over():
    plugins = {
        "torch_npu": OSError("libascendcl.so: cannot open shared object file"),
        "torch_musa": adds(musa=device(available=False)),
        "torch_mlu": ModuleNotFoundError("No module named 'cnrt'", name="cnrt"),
        "torch_gcu": ImportError("undefined symbol"),
    }
    found = FakeMachine(fake_torch(), plugins).detect()
    assert found.vendor == "cpu"
    notes = " | ".join(found.notes)
    for words in (
        "libascendcl.so",
        "torch.musa has no device",
        "torch_mlu is installed but needs cnrt",
        "undefined symb",
    ):
        assert words in notes


def test_intel_needs_no_plugin_and_comes_before_cuda():
    found = FakeMachine(fake_torch(xpu=device("Max 1550"), cuda=device("NVIDIA A100"))).detect()
    assert (found.vendor, found.device_type) == ("intel", "xpu")


CUDA = {
    "corex attribute": ("iluvatar", fake_torch(corex=True, cuda=device("Iluvatar BI-V150")), {}, {}),
    "corex version": ("iluvatar", fake_torch("2.1.1+corex.4.1.2", cuda=device("BI-V150")), {}, {}),
    "metax version": ("metax", fake_torch("2.10.0+metax3.8.0.7", cuda=device("Device 4000")), {}, {}),
    "metax MACA_PATH": ("metax", fake_torch(cuda=device("Device 4000")), {}, {"MACA_PATH": "/opt/maca"}),
    "metax name": ("metax", fake_torch(cuda=device("MetaX C550")), {}, {}),
    "metax older name": ("metax", fake_torch(cuda=device("MXC500")), {}, {}),
    "kunlunxin": ("kunlunxin", fake_torch(cuda=device("P800")), {"torch_xmlir": adds()}, {}),
    "hygon attribute": ("hygon", fake_torch(__hcu_version__="1", cuda=device("anything")), {}, {}),
    "hygon arch": ("hygon", fake_torch(hip="6.1", cuda=device("?", "gfx936:sramecc+:xnack-")), {}, {}),
    "hygon BW name": ("hygon", fake_torch(hip="6.1", cuda=device("BW1101", "gfx999")), {}, {}),
    "hygon K100 name": ("hygon", fake_torch(hip="6.1", cuda=device("K100_AI")), {}, {}),
    "hygon name": ("hygon", fake_torch(hip="6.1", cuda=device("Some HCU")), {}, {}),
    "amd": ("amd", fake_torch(hip="6.2", cuda=device("AMD Instinct MI300X", "gfx942:sramecc+")), {}, {}),
    "amd shares gfx906": ("amd", fake_torch(hip="6.2", cuda=device("AMD Radeon VII", "gfx906")), {}, {}),
    "nvidia": ("nvidia", fake_torch(cuda=device("NVIDIA H100 80GB HBM3")), {}, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CUDA)
def test_a_torch_that_passes_for_cuda_is_told_by_its_marks(case):
    vendor, torch_module, plugins, env = CUDA[case]
    # Other vendors' images carry nvidia-smi too; a mark of the build comes first.
    found = FakeMachine(torch_module, plugins, ["nvidia-smi"], env).detect()
    assert (found.vendor, found.device_type, found.usable) == (vendor, "cuda", True)


@pytest.mark.parametrize("case", [case for case in CUDA if CUDA[case][0] != "nvidia"])
def test_marks_need_a_device(case):
    """A login node with a vendor's build and no card is a CPU."""
    _, torch_module, plugins, env = CUDA[case]
    without = SimpleNamespace(**{**vars(torch_module), "cuda": device(available=False)})
    assert FakeMachine(without, plugins, env=env).detect().vendor == "cpu"


def test_nvidia_is_the_last_of_the_cuda_builds():
    """Its only mark is the device's name, which another build may also report (HIP over NVIDIA, for one)."""
    assert [name for name, _ in CUDA_ORDER] == ["iluvatar", "metax", "kunlunxin", "hygon", "amd", "nvidia"]
    assert FakeMachine(fake_torch(hip="6.2", cuda=device("NVIDIA A100"))).detect().vendor == "amd"


def test_nvidias_device_under_another_mark_is_told():
    torch_module = fake_torch(cuda=device("NVIDIA L40S"))
    found = FakeMachine(torch_module, env={"MACA_PATH": "/opt/maca"}).detect()
    assert found.vendor == "metax" and found.candidates == ("metax", "nvidia")
    assert "NVIDIA L40S" in found.notes[0]


def test_a_cuda_device_nobody_knows_is_not_silently_the_cpu():
    torch_module = fake_torch(cuda=device("Tesla V100-SXM2-16GB"))
    unknown = FakeMachine(torch_module).detect()
    assert unknown.vendor == "cpu" and "Tesla V100-SXM2-16GB" in unknown.notes[0]
    by_tool = FakeMachine(torch_module, tools=["nvidia-smi"]).detect()
    assert by_tool.vendor == "nvidia" and by_tool.usable
    assert FakeMachine(torch_module).detect("nvidia").vendor == "nvidia"


def test_tools_are_asked_in_flagcx_order_and_nvidias_last():
    tools = ["ixsmi", "cnmon", "mx-smi", "hy-smi", "mthreads-gmi", "npu-smi", "efsmi", "rocm-smi", "nvidia-smi"]
    assert [VENDORS[name].command_line_tool.value for name in TOOL_ORDER] == tools
    for position, tool in enumerate(tools):
        found = FakeMachine(fake_torch(), tools=tools[position:]).detect()
        assert found.vendor == TOOL_ORDER[position] and found.candidates == TOOL_ORDER[position:]
        assert tool in found.evidence and not found.usable and "reaches no" in found.evidence


def test_xpu_smi_names_two_vendors_and_decides_nothing():
    alone = FakeMachine(fake_torch(), tools=["xpu-smi"]).detect()
    assert (alone.vendor, alone.candidates) == ("cpu", ("kunlunxin", "intel"))
    assert "Kunlunxin's or Intel's" in alone.notes[0]
    beside = FakeMachine(fake_torch(), tools=["xpu-smi", "nvidia-smi"]).detect()
    assert (beside.vendor, beside.candidates) == ("nvidia", ("nvidia", "kunlunxin", "intel"))


def test_nothing_found_is_the_cpu():
    found = FakeMachine(fake_torch()).detect()
    assert (found.vendor, found.device_type, found.candidates, found.notes) == ("cpu", "cpu", ("cpu",), ())


def test_the_users_word_comes_before_all_evidence():
    module, effect = PLUGINS["ascend"]
    torch_module = fake_torch("2.1+corex", cuda=device("Iluvatar BI-V150"))
    machine = FakeMachine(torch_module, {module: effect}, ["cnmon"])
    assert machine.detect("nvidia").vendor == "nvidia"
    assert machine.detect("cpu").vendor == "cpu"
    assert machine.imported == []
    assert machine.detect("ascend").evidence.startswith("named by the user; torch_npu")
    assert machine.detect("auto").vendor == "ascend"


def test_an_unknown_name_lists_the_rows():
    with pytest.raises(ConfigError, match="'huawei'.*nvidia, amd, ascend"):
        FakeMachine(fake_torch()).detect("huawei")


@pytest.mark.parametrize("name", [name for name in ROWS if name != "cpu"])
def test_a_named_vendor_that_is_absent_says_what_was_looked_for(name):
    with pytest.raises(VendorUnavailable) as raised:
        FakeMachine(fake_torch(), tools=["nvidia-smi", "npu-smi"]).detect(name)
    text = str(raised.value)
    assert f"torch.{VENDORS[name].device_type.value}.is_available()" in text
    assert all(module in text for module in VENDORS[name].plugin_modules.value)


def test_the_reason_of_a_broken_plugin_reaches_the_user():
    with pytest.raises(VendorUnavailable, match="libmusa.so"):
        FakeMachine(fake_torch(), {"torch_musa": OSError("libmusa.so: not found")}).detect("moore_threads")


def test_this_machine_is_detected_with_the_real_torch():
    found = detect(env={})
    assert found.vendor in VENDORS and found.evidence


def test_only_known_marks_leave_the_environment():
    assert vendor_marks({"MACA_PATH": "/opt/maca", "HOME": "/root"}) == {"MACA_PATH": "/opt/maca"}
    assert vendor_marks({"MACA_PATH": ""}) == {}


# ---------------------------------------------------------------- quirks: payloads and sizes

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2,
]  # fmt: skip
vendor_rows = st.sampled_from(list(VENDORS.values()))


def random_rows(shape, dtype, seed):
    """Any bytes (0 and 1 for bool), so that NaN and denormal patterns must survive too."""
    width = 1
    for extent in shape:
        width *= extent
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (width * dtype.itemsize,), dtype=torch.uint8,
                        generator=torch.Generator().manual_seed(seed))  # fmt: skip
    return raw.view(dtype).view(shape) if width else torch.empty(shape, dtype=dtype)


def same_bits(left, right):
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(
        quirks.as_bytes(left), quirks.as_bytes(right)
    )  # fmt: skip


@EXAMPLES
@given(st.lists(st.integers(0, 5), min_size=1, max_size=3), st.sampled_from(DTYPES), st.integers(0, 99))
def test_bytes_and_back_are_the_same_rows(shape, dtype, seed):
    rows = random_rows(shape, dtype, seed)
    payload = quirks.as_bytes(rows)
    assert payload.dtype == torch.uint8 and payload.shape[0] == shape[0]
    assert same_bits(quirks.from_bytes(payload, dtype, shape[1:]), rows)


def test_bytes_from_the_middle_of_a_buffer_come_back():
    rows = random_rows([3, 4], torch.float32, 1)
    buffer = torch.cat([torch.zeros(3, dtype=torch.uint8), quirks.as_bytes(rows).view(-1)])
    assert same_bits(quirks.from_bytes(buffer[3:].view(3, 16), torch.float32, [4]), rows)


@EXAMPLES
@given(vendor_rows, st.sampled_from(DTYPES))
def test_what_a_library_does_not_document_travels_as_bytes(vendor, dtype):
    native = not quirks.travels_as_bytes(vendor, dtype)
    if native:
        assert all(quirks.dtype_name(dtype) in value for value in vendor.collective_dtypes.values)
    assert not (native and quirks.is_fp8(dtype))
    rows = random_rows([4, 6], dtype, 0)
    payload = quirks.payload_view(rows, vendor)
    assert payload.dtype == (dtype if native else torch.uint8)
    assert payload.data_ptr() == rows.data_ptr(), "a contiguous payload is not copied"


def test_strided_and_scalar_tensors_are_made_ready_only_where_asked():
    strided = torch.arange(12.0).view(3, 4).t()
    assert quirks.collective_ready(strided, frozenset()) is strided
    assert quirks.collective_ready(strided, VENDORS["enflame"].quirks).is_contiguous()
    assert quirks.collective_ready(torch.tensor(1.0), VENDORS["ascend"].quirks).shape == (1,)


sizes_lists = st.lists(st.integers(0, 1300), max_size=5)


@EXAMPLES
@given(sizes_lists, vendor_rows, st.integers(0, 600))
def test_padding_is_cut_again(sizes, vendor, more):
    payload = torch.randint(0, 256, (sum(sizes),), dtype=torch.uint8)
    padded = quirks.padded_sizes(sizes, vendor.quirks, max(sizes, default=0) + more)
    if Quirk.SIZES_PAD_512 in vendor.quirks:
        assert all(size % 512 == 0 for size in padded)
    if Quirk.UNEVEN_SPLITS_UNSTATED in vendor.quirks:
        assert len(set(padded)) <= 1
    sent = quirks.pad_chunks(payload, sizes, padded)
    assert len(sent) == sum(padded)
    assert torch.equal(quirks.cut_chunks(sent, sizes, padded), payload)


def test_padding_of_512_bytes():
    assert quirks.padded_sizes([0, 1, 512, 513], frozenset({Quirk.SIZES_PAD_512})) == [0, 512, 512, 1024]
    assert quirks.padded_sizes([0, 1, 7], frozenset()) == [0, 1, 7]


@pytest.mark.parametrize("largest", [None, 9])
def test_even_splits_need_the_largest_message(largest):
    with pytest.raises(ConfigError, match="largest message"):
        quirks.padded_sizes([10, 3], VENDORS["biren"].quirks, largest)


class Exchanges:
    """An all_to_all_single between threads that refuses what the vendor's documents do not allow."""

    def __init__(self, vendor, size):
        self.vendor, self.size, self.sent = vendor, size, {}
        self.barrier = threading.Barrier(size, timeout=20)

    def call(self, rank, received, sent, receive_splits, send_splits):
        rules = self.vendor.quirks
        for tensor, splits in ((received, receive_splits), (sent, send_splits)):
            assert tensor.is_contiguous() and tensor.shape[0] == sum(splits)
            assert tensor.dtype == torch.uint8 or not quirks.travels_as_bytes(self.vendor, tensor.dtype)
            if Quirk.SIZES_PAD_512 in rules:
                assert all(split * tensor.element_size() % 512 == 0 for split in splits)
            if Quirk.UNEVEN_SPLITS_UNSTATED in rules:
                assert len(set(splits)) == 1
        self.sent[rank] = sent.split(send_splits)
        self.barrier.wait()
        received.copy_(torch.cat([self.sent[source][rank] for source in range(self.size)]))
        self.barrier.wait()


@settings(max_examples=30, deadline=None)
@given(vendor_rows, st.sampled_from(DTYPES), st.sampled_from([1, 2, 3]), st.integers(0, 7), st.data())
def test_an_exchange_keeps_every_row_under_every_vendors_limits(vendor, dtype, size, width, data):
    counts = [[data.draw(st.integers(0, 4)) for _ in range(size)] for _ in range(size)]
    rows = [random_rows([sum(counts[rank]), width], dtype, rank) for rank in range(size)]
    library, results = Exchanges(vendor, size), {}
    largest = max(map(max, counts)) * width * dtype.itemsize

    def run(rank):
        recv_counts = [counts[source][rank] for source in range(size)]
        finish = quirks.start_exchange(
            vendor, rows[rank], counts[rank], recv_counts, lambda *a: lambda: library.call(rank, *a), largest, 1 << 20
        )
        results[rank] = finish()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    [thread.start() for thread in threads]
    [thread.join(30) for thread in threads]
    for rank in range(size):
        expected = [rows[source].split(counts[source])[rank] for source in range(size)]
        assert same_bits(results[rank], torch.cat(expected))


def test_the_size_of_enflames_buffer():
    rules = VENDORS["enflame"].quirks
    assert quirks.presized_variables(rules, 128, 8, 7168) == {"ECCL_ALLTOALLV_MAXSIZE": str(128 * 8 * (7168 + 32) * 2)}
    assert quirks.presized_variables(VENDORS["ascend"].quirks, 128, 8, 7168) == {}
    quirks.check_presized(rules, 100, 100)
    quirks.check_presized(VENDORS["nvidia"].quirks, 100, None)
    for limit in (None, 99):
        with pytest.raises(ConfigError, match="ECCL_ALLTOALLV_MAXSIZE to at least 100"):
            quirks.check_presized(rules, 100, limit)


# ---------------------------------------------------------------- quirks: reductions and operations


def reduced(vendor, op, parts):
    """What rank 0 gets when `parts` (one tensor per rank) are reduced the vendor's way."""
    mine = parts[0].clone()
    plan = quirks.plan_reduction(vendor, mine.dtype, op, len(parts))

    def library(work, library_op):
        assert work.is_contiguous() and quirks.can_reduce(vendor, quirks.dtype_name(work.dtype))
        stack = torch.stack([work, *(part.to(work.dtype).reshape(work.shape) for part in parts[1:])])
        ways = {"sum": stack.sum(0), "max": stack.amax(0), "min": stack.amin(0)}
        work.copy_(stack.mean(0) if library_op == "avg" else ways[library_op])

    quirks.reduce_in_place(mine, plan, library)
    return mine


@EXAMPLES
@given(
    vendor_rows,
    st.sampled_from([torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32]),
    st.sampled_from(["sum", "max", "min"]),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_small_integers_reduce_alike_on_every_vendor(vendor, dtype, op, size, seed):
    """Sums wrap as in torch; sum and max of bool are "or", min is "and"."""
    parts = [random_rows([7], dtype, seed + rank) for rank in range(size)]
    stack = torch.stack(parts).to(torch.int64)
    ways = {"sum": stack.sum(0), "max": stack.amax(0), "min": stack.amin(0)}
    assert torch.equal(reduced(vendor, op, parts), ways[op].to(dtype))


@pytest.mark.parametrize("vendor", VENDORS.values(), ids=lambda row: row.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("op", ["sum", "avg", "max"])
def test_floats_reduce_on_every_vendor_in_place_and_strided(vendor, dtype, op):
    parts = [torch.full((2, 3), value, dtype=dtype).t() for value in (1.0, 2.0, 6.0)]
    expected = {"sum": 9.0, "avg": 3.0, "max": 6.0}[op]
    assert torch.equal(reduced(vendor, op, parts), torch.full((3, 2), expected, dtype=dtype))


def test_an_average_on_ascend_is_a_sum_divided_and_does_not_leave_float16():
    plan = quirks.plan_reduction(VENDORS["ascend"], torch.float32, "avg", 4)
    assert (plan.op, plan.divisor, plan.dtype) == ("sum", 4, torch.float32)
    large = [torch.full((3,), 60000.0, dtype=torch.float16) for _ in range(3)]
    assert torch.equal(reduced(VENDORS["ascend"], "avg", large), large[0])
    assert quirks.plan_reduction(VENDORS["nvidia"], torch.float32, "avg", 4).op == "avg"


@pytest.mark.parametrize(
    ("vendor", "dtype", "chosen"),
    [
        ("ascend", torch.uint8, torch.int32),
        ("ascend", torch.bool, torch.int32),
        ("ascend", torch.int8, torch.int8),
        ("kunlunxin", torch.int8, torch.int32),
        ("biren", torch.float16, torch.float32),
        ("moore_threads", torch.int16, torch.int32),
        ("cpu", torch.int16, torch.int32),
        ("nvidia", torch.float64, torch.float64),
    ],
)
def test_the_dtype_a_reduction_runs_in(vendor, dtype, chosen):
    assert quirks.plan_reduction(VENDORS[vendor], dtype, "sum", 2).dtype == chosen


@pytest.mark.parametrize("vendor", VENDORS.values(), ids=lambda row: row.name)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2])
def test_fp8_is_reduced_nowhere(vendor, dtype):
    with pytest.raises(VendorUnavailable, match="cannot reduce float8.*Convert to one of float32"):
        quirks.plan_reduction(vendor, dtype, "sum", 2)


@pytest.mark.parametrize(
    ("vendor", "dtype"),
    [("biren", torch.float64), ("cambricon", torch.float64), ("iluvatar", torch.float64), ("biren", torch.int64)],
)
def test_what_would_be_quietly_narrowed_is_refused_with_its_source(vendor, dtype):
    with pytest.raises(VendorUnavailable, match=r"cannot reduce .*\(.*\)"):
        quirks.plan_reduction(VENDORS[vendor], dtype, "sum", 2)


def test_reductions_that_have_no_meaning_are_the_callers_mistake():
    with pytest.raises(ConfigError, match="'product'"):
        quirks.plan_reduction(VENDORS["cpu"], torch.float32, "product", 2)
    with pytest.raises(ConfigError, match="average of int32"):
        quirks.plan_reduction(VENDORS["cpu"], torch.int32, "avg", 2)


@pytest.mark.parametrize(
    ("vendor", "operation", "there"),
    [
        ("biren", "recv_any_source", False),
        ("kunlunxin", "gather", False),
        ("cambricon", "batch_isend_irecv", False),
        ("nvidia", "recv_any_source", True),
        ("ascend", "all_to_all_v", True),
    ],
)
def test_operations_a_library_lacks_are_refused(vendor, operation, there):
    if there:
        quirks.require_operation(VENDORS[vendor], operation)
    else:
        with pytest.raises(VendorUnavailable, match=f"{operation} is not to be used"):
            quirks.require_operation(VENDORS[vendor], operation)

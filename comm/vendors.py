"""The vendor table: what is documented about each vendor's device, plug-in, collective library and their limits.

Owns the facts and nothing else: `detect.py` finds the vendor of this machine, `quirks.py` applies the limits. No fact
is guessed; where no source was found the value is UNKNOWN, where sources disagree or chip generations differ the fact
keeps every reading. Nothing here was run on a vendor's chip by this project; only the CPU row was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

UNKNOWN = "unknown"

# How far a source carries. primary: the vendor's or a framework's own text; secondary: compiled pages and third-party
# reports; weak: one indirect hint; conflict: sources disagree; general: common knowledge, not looked up;
# seen: run by this project; none: no source.
CONFIDENCES = ("primary", "secondary", "weak", "conflict", "general", "seen", "none")


@dataclass(frozen=True)
class Reading:
    """One documented value of a fact, who says so, and (in `when`) for which chips or programs it holds."""

    value: Any
    source: str
    confidence: str = "primary"
    when: str = ""


@dataclass(frozen=True)
class Fact:
    """One or more readings; the first is the one to use when nothing tells the chips apart."""

    readings: tuple[Reading, ...]

    @property
    def value(self) -> Any:
        return self.readings[0].value

    @property
    def values(self) -> tuple[Any, ...]:
        return tuple(reading.value for reading in self.readings)

    @property
    def is_known(self) -> bool:
        return UNKNOWN not in self.values


def fact(value: Any, source: str, confidence: str = "primary", when: str = "") -> Fact:
    return Fact((Reading(value, source, confidence, when),))


def either(*facts: Fact) -> Fact:
    """One fact with all the readings of `facts`, in order."""
    return Fact(tuple(reading for one in facts for reading in one.readings))


def unknown(looked_for: str = "no source found", when: str = "") -> Fact:
    return fact(UNKNOWN, looked_for, "none", when)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Snapshots read, by repository and commit; each row says which file.
FLAGCX = "flagos-ai/FlagCX@0c721293"
FLAGGEMS = "flagos-ai/FlagGems@ed2508bc"
TORCH_SUPA = "BIRENSUPA/torch-supa@68fb624a"
DIPU = "DeepLink-org/deeplink.framework dipu/torch_dipu/csrc_dipu/vendor/supa"
TORCH_NPU = "Ascend/pytorch@9e73e708"
TORCH_MUSA = "MooreThreads/torch_musa@8b583b3f"
TORCH_MLU = "Cambricon/torch_mlu@d578002c"
VLLM_GCU = "EnflameTechnology/vllm-gcu@7b5aaca9"
VLLM_METAX = "MetaX-MACA/vLLM-metax@3aadf084"
MCPYTORCH = "MetaX-MACA/mcPytorch@b3db5eed"
VLLM_KUNLUN = "baidu/vLLM-Kunlun@09869ee7"
SGL_NPU = "sgl-project/sgl-kernel-npu@f425bdf1"
HYGON_COOKBOOK = "HYGON-AI/inference-cookbook-das"
GENERAL = "general knowledge, not looked up"
NCCL_TYPES = "NVIDIA NCCL user guide, Types"
SEEN_ON_CPU = "run by this project on CPU, torch 2.13.0, gloo"


class Quirk(Enum):
    """What a collective library does not do the way the others do. `sources` names the vendors that document it.

    The value of a member is (what it is, ((vendor, source), ...)). Each is applied by one function of quirks.py.
    """

    SIZES_PAD_512 = (
        "Every message is a multiple of 512 bytes.",
        (("biren", "suCCL (BR1xx): the alignment its test tool demands, third-party test script"),),
    )
    UNEVEN_SPLITS_UNSTATED = (
        "all_to_all_single is documented, uneven splits are not: pad every chunk to the largest and split evenly.",
        (
            (
                "biren",
                f"{TORCH_SUPA} docs/user_guide/source/native_api/torch_distributed.rst; alltoall_base was not read",
            ),
        ),
    )
    PRESIZED_ALLTOALLV = (
        "The library's buffer for uneven all-to-all has a size in bytes that is set before start.",
        (("enflame", f"{VLLM_GCU} docs/source/tutorials/multi_node.md, ECCL_ALLTOALLV_MAXSIZE"),),
    )
    NO_NATIVE_ALLTOALL = (
        "all-to-all is a group of sends and receives, so its cost grows with the number of peers.",
        (
            ("moore_threads", f"{TORCH_MUSA} ProcessGroupMCCL.cpp: MCCL has no all-to-all"),
            ("metax", f"{FLAGCX} flagcx/adaptor/ccl/mccl_adaptor.cc"),
            ("hygon", f"{FLAGCX} flagcx/adaptor/ccl/dunccl_adaptor.cc"),
            ("iluvatar", f"{FLAGCX} flagcx/adaptor/ccl/ixnccl_adaptor.cc"),
            ("amd", f"{FLAGCX} flagcx/adaptor/ccl/rccl_adaptor.cc"),
        ),
    )
    ALLTOALLV_COUNTS_ON_DEVICE = (
        "The counts of an uneven all-to-all live on the device, and FlagCX's adaptor waits for its stream.",
        (("kunlunxin", f"{FLAGCX} flagcx/adaptor/ccl/xccl_adaptor.cc"),),
    )
    PAYLOAD_AS_UINT8 = (
        "FP8 rows travel as uint8 bytes, their scales beside them.",
        (
            ("biren", f"{TORCH_SUPA} torch_supa/csrc/distributed/BCCLUtils.hpp: native from BCCL 2.24 only"),
            ("enflame", f"{VLLM_GCU} vllm_gcu/distributed/pyeccl_wrapper.py: ECCL has no fp8"),
            ("cambricon", f"{TORCH_MLU} process_group_cncl.cpp:139-147: CNCL has no fp8"),
            ("moore_threads", f"{TORCH_MUSA} ProcessGroupMCCL.h:38-46: S5000 builds only"),
            ("nvidia", f"{FLAGCX} plugin/torch backend_flagcx.cpp: fp8 as uint8 in older torch"),
            *(
                (name, f"{FLAGCX} plugin/torch backend_flagcx.cpp: e4m3fn and e5m2 are sent as uint8")
                for name in ("ascend", "hygon", "metax", "iluvatar", "kunlunxin", "amd")
            ),
            ("cpu", f"{SEEN_ON_CPU}: float8 is refused as an invalid scalar type"),
        ),
    )
    NO_FP8_REDUCE = (
        "FP8 cannot be reduced, or would be reduced as the integers its bytes spell.",
        (
            ("ascend", f"{TORCH_NPU} ProcessGroupHCCL.cpp: raises"),
            ("biren", f"{TORCH_SUPA} torch_supa/csrc/distributed/BCCLUtils.hpp: uint8 before BCCL 2.24"),
            ("enflame", f"{VLLM_GCU} vllm_gcu/distributed/pyeccl_wrapper.py: no fp8 type"),
            ("cambricon", f"{TORCH_MLU} process_group_cncl.cpp:139-147: no fp8 type"),
            ("moore_threads", f"{TORCH_MUSA} ProcessGroupMCCL.h:38-46: no fp8 below S5000"),
            ("cpu", f"{SEEN_ON_CPU}: float8 is refused as an invalid scalar type"),
        ),
    )
    NO_UINT8_REDUCE = (
        "uint8 and bool can be moved but not reduced.",
        (("ascend", f"{TORCH_NPU} ProcessGroupHCCL.cpp, HCCLUtils.cpp:50-64: raises"),),
    )
    SIGN_NOT_KEPT = (
        "int8 is reduced as uint8, uint32 as int32, uint64 as int64: wrong for sums of int8 and for any max or min.",
        (("kunlunxin", f"{FLAGCX} flagcx/adaptor/ccl/xccl_adaptor.cc:17-27"),),
    )
    NO_FLOAT64 = (
        "float64 is refused, or quietly narrowed to float32.",
        (
            ("biren", f"{TORCH_SUPA} docs, chapter 8 FAQ: not supported; transfer_to_supa maps it to float"),
            ("cambricon", f"{TORCH_MLU} process_group_cncl.cpp:139-147 and {FLAGCX} cncl_adaptor.cc:19: sent as float"),
            ("iluvatar", f"{FLAGGEMS} _iluvatar/__init__.py: disabled"),
            ("enflame", f"{FLAGGEMS} _enflame/__init__.py: disabled on gcu300"),
        ),
    )
    NO_INT64_REDUCE = (
        "int64 is quietly narrowed to int32.",
        (("biren", f"suCCL (BR1xx) in an older adaptor, {DIPU}; what torch_br does was not found"),),
    )
    NO_FLOAT16_REDUCE = (
        "float16 is not a type of the library.",
        (("biren", f"suCCL (BR1xx) in an older adaptor, {DIPU}; what torch_br does was not found"),),
    )
    AVG_BY_SUM = ("An average is a sum that is then divided.", (("ascend", f"{TORCH_NPU} ProcessGroupHCCL.cpp"),))
    CONTIGUOUS_ONLY = (
        "Tensors are contiguous and start where their storage says.",
        (
            ("moore_threads", f"{TORCH_MUSA} ProcessGroupMCCL.cpp:4016-4110"),
            ("enflame", f"{VLLM_GCU} parallel_state.py, all_to_all_vd"),
            ("ascend", f"{TORCH_NPU} ProcessGroupHCCL.cpp: internal formats need storage offset 0"),
        ),
    )
    DIM_AT_LEAST_1 = (
        "A scalar tensor is no payload.",
        (("ascend", f"{TORCH_NPU} ProcessGroupHCCL.cpp: all_to_all_single needs dim >= 1"),),
    )
    NO_RECV_ANY_SOURCE = (
        "A receive names its sender.",
        (
            ("biren", f"{TORCH_SUPA} ProcessGroupBCCL.cpp: NotImplementedError"),
            ("moore_threads", f"{TORCH_MUSA} ProcessGroupMCCL.cpp:3660,4675"),
            ("ascend", f"{TORCH_NPU} ProcessGroupHCCL.cpp"),
        ),
    )
    NO_GATHER = (
        "gather or scatter is missing, unverified, or raises on one path.",
        (
            ("biren", f"{TORCH_SUPA} docs/user_guide/source/native_api/torch_distributed.rst: not fully verified"),
            ("kunlunxin", f"{FLAGCX} flagcx/adaptor/ccl/xccl_adaptor.cc, README.md"),
            ("ascend", f"{TORCH_NPU} ProcessGroupHCCL.cpp"),
        ),
    )
    NO_P2P_BATCH = (
        "batch_isend_irecv is unverified, or a loop.",
        (
            ("biren", f"{TORCH_SUPA} docs/user_guide/source/native_api/torch_distributed.rst: left blank"),
            ("cambricon", f"{TORCH_MLU}: replaced by a loop"),
        ),
    )
    ONE_DEVICE_PER_PROCESS = ("A process drives one device.", (("ascend", f"{TORCH_NPU} ProcessGroupHCCL.cpp"),))

    def __init__(self, what: str, sources: tuple[tuple[str, str], ...]) -> None:
        self.what = what
        self.sources: Mapping[str, str] = dict(sources)
        self.__doc__ = what


@dataclass(frozen=True)
class Vendor:
    """One row of the table. Every field after `title` is a Fact whose value is what the comment says, or UNKNOWN."""

    name: str
    title: str
    plugin_modules: Fact  # tuple of modules to import, in order; empty where torch itself brings the device
    autoload: Fact  # "yes" where `import torch` loads the plug-in, "no", or "built in"
    device_type: Fact  # torch.device type
    backend: Fact  # name for torch.distributed.init_process_group
    collective_library: Fact  # its name
    uneven_all_to_all: Fact  # "native" or "grouped send and receive"
    visible_devices: Fact  # tuple of environment variables, the one that wins first
    device_namespace: Fact  # dotted name of the device and memory API, such as "torch.npu"
    memory_query: Fact  # function of device_namespace that says how much memory there is
    identification: Fact  # tuple of marks that tell this vendor
    command_line_tool: Fact  # the program that lists this vendor's devices
    bf16: Fact  # "yes" or "no"
    fp8: Fact  # the variant computed with: "e4m3fn", "e4m3fnuz" or "none"
    int8: Fact  # "yes" where int8 rows can be stored and moved
    collective_dtypes: Fact  # frozenset of torch dtype names that the library moves as they are
    reduce_dtypes: Fact  # frozenset of torch dtype names that it reduces, where stated apart
    network_variables: Fact  # tuple of environment variables that steer it across nodes

    @property
    def quirks(self) -> frozenset[Quirk]:
        return frozenset(quirk for quirk in Quirk if self.name in quirk.sources)

    def facts(self) -> dict[str, Fact]:
        return {field.name: getattr(self, field.name) for field in fields(self)[2:]}


_NVIDIA = Vendor(
    name="nvidia",
    title="NVIDIA",
    plugin_modules=fact((), GENERAL, "general"),
    autoload=fact("built in", GENERAL, "general"),
    device_type=fact("cuda", GENERAL, "general"),
    backend=fact("nccl", GENERAL, "general"),
    collective_library=fact("NCCL", GENERAL, "general"),
    uneven_all_to_all=fact("native", f"{FLAGCX} plugin/torch backend_flagcx.cpp"),
    visible_devices=fact(("CUDA_VISIBLE_DEVICES",), GENERAL, "general"),
    device_namespace=fact("torch.cuda", GENERAL, "general"),
    memory_query=fact("mem_get_info", GENERAL, "general"),
    identification=fact(
        ("device name contains NVIDIA, tested last of the cuda builds",), f"{FLAGGEMS} backend/device_finder.py"
    ),
    command_line_tool=fact("nvidia-smi", f"{FLAGCX} plugin/torch/_build_config.py"),
    bf16=fact("yes", "deepseek-ai/DeepEP README.md", when="SM80 and later"),
    fp8=fact("e4m3fn", "deepseek-ai/DeepEP README.md", when="SM89 and later"),
    int8=fact("yes", NCCL_TYPES),
    collective_dtypes=either(
        fact(_names("int8 uint8 int32 uint32 int64 uint64 float16 float32 float64 bfloat16"), NCCL_TYPES),
        fact(
            _names("int8 uint8 int32 uint32 int64 uint64 float16 float32 float64 bfloat16 float8_e4m3fn float8_e5m2"),
            NCCL_TYPES,
            when="CUDA 11.8 and SM90 or later",
        ),
    ),
    reduce_dtypes=unknown("not stated apart from the types of the library"),
    network_variables=fact(
        _words("NCCL_SOCKET_IFNAME NCCL_IB_HCA NCCL_IB_GID_INDEX GLOO_SOCKET_IFNAME"),
        "NVIDIA NCCL user guide, Environment variables",
    ),
)

_AMD = Vendor(
    name="amd",
    title="AMD ROCm",
    plugin_modules=fact((), GENERAL, "general"),
    autoload=fact("built in", GENERAL, "general"),
    device_type=fact("cuda", f"{FLAGGEMS} _amd"),
    backend=fact("nccl", "RLinf/RLinf amd_gpu.py; ModelTC/LightX2V amd_rocm.py"),
    collective_library=fact("RCCL", f"{FLAGCX} rccl_adaptor.cc"),
    uneven_all_to_all=fact("grouped send and receive", f"{FLAGCX} rccl_adaptor.cc", when="in FlagCX"),
    visible_devices=fact(("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"), "RLinf/RLinf amd_gpu.py"),
    device_namespace=fact("torch.cuda", GENERAL, "general"),
    memory_query=unknown(),
    identification=fact(
        (
            "torch.version.hip is set, and no mark of Hygon",
            "device name contains AMD or Instinct",
            "gcnArchName gfx90a, gfx942, gfx950",
        ),
        f"ModelTC/LightX2V amd_rocm.py; {FLAGGEMS} _amd; ByteDance-Seed/Triton-distributed amd/perf_model.py",
    ),
    command_line_tool=fact("rocm-smi", f"{FLAGCX} plugin/torch/_build_config.py"),
    bf16=unknown(),
    fp8=either(
        fact("e4m3fnuz", GENERAL, "general", when="MI300X"), fact("e4m3fn", GENERAL, "general", when="gfx950 (OCP)")
    ),
    int8=unknown(),
    collective_dtypes=unknown(),
    reduce_dtypes=unknown(),
    network_variables=fact(_words("NCCL_SOCKET_IFNAME NCCL_IB_HCA"), "rocm.docs.amd.com, RCCL environment variables"),
)

_ASCEND = Vendor(
    name="ascend",
    title="Huawei Ascend 昇腾",
    plugin_modules=fact(("torch_npu",), TORCH_NPU),
    autoload=fact("yes", f"{TORCH_NPU} setup.py:791, entry point torch.backends"),
    device_type=fact("npu", "vllm-project/vllm-ascend@182b75ea vllm_ascend/platform.py"),
    backend=either(
        fact("hccl", f"{TORCH_NPU} torch_npu/_init/registry/distributed.py"),
        fact("lccl", f"{TORCH_NPU} torch_npu/_init/registry/distributed.py", when="also registered"),
    ),
    collective_library=fact("HCCL", f"{TORCH_NPU} ProcessGroupHCCL.cpp; {FLAGCX} hccl_adaptor.cc"),
    uneven_all_to_all=fact("native", f"{TORCH_NPU} ProcessGroupHCCL.cpp, HcclAlltoAllV"),
    visible_devices=either(
        fact(("ASCEND_RT_VISIBLE_DEVICES",), "vllm-project/vllm-ascend@182b75ea vllm_ascend/platform.py"),
        fact(("ASCEND_VISIBLE_DEVICES",), "HAMi and gpustack documents", "secondary", when="container runtime"),
    ),
    device_namespace=fact("torch.npu", f"{TORCH_NPU} torch_npu/npu/__init__.py"),
    memory_query=fact("mem_get_info", f"{TORCH_NPU} torch_npu/npu/__init__.py"),
    identification=fact(
        (
            "torch.npu after import torch_npu",
            "SoC name ascend910b (A2), ascend910_93 (A3), ascend950 (A5), 310p",
            "PCI 19e5:d802, 19e5:d803",
        ),
        "vllm-project/vllm-ascend@182b75ea vllm_ascend/device/hardware.py; PCI numbers: third-party note",
    ),
    command_line_tool=fact("npu-smi", f"{FLAGCX} plugin/torch/_build_config.py"),
    bf16=fact("yes", f"{SGL_NPU} python/deep_ep/README.md", when="A2 and later"),
    fp8=either(
        fact("none", f"{SGL_NPU} python/deep_ep/README.md", when="A2 and A3, which use INT8 W8A8"),
        fact("e4m3fn", f"{SGL_NPU} python/deep_ep/README.md", when="A5, Ascend950"),
    ),
    int8=fact("yes", f"{SGL_NPU} python/deep_ep/README.md"),
    collective_dtypes=fact(
        _names(
            "uint8 int8 int16 int32 int64 float16 float32 uint16 uint32 uint64 float64 bool bfloat16 "
            "float8_e4m3fn float8_e5m2"
        ),
        f"{TORCH_NPU} ProcessGroupHCCL.cpp, HCCLUtils.cpp:50-64",
    ),
    reduce_dtypes=either(
        fact(
            _names("int8 int16 int32 int64 float16 float32 bfloat16"),
            f"{TORCH_NPU} ProcessGroupHCCL.cpp, HCCLUtils.cpp:50-64",
        ),
        fact(
            _names("int8 int16 int32 int64 float16 float32 bfloat16 uint64 float64"),
            f"{TORCH_NPU} ProcessGroupHCCL.cpp, HCCLUtils.cpp:50-64",
            when="Ascend950",
        ),
    ),
    network_variables=fact(
        _words(
            "HCCL_IF_IP HCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME TP_SOCKET_IFNAME HCCL_BUFFSIZE "
            "HCCL_CONNECT_TIMEOUT HCCL_EXEC_TIMEOUT HCCL_OP_EXPANSION_MODE HCCL_INTRA_PCIE_ENABLE "
            "HCCL_INTRA_ROCE_ENABLE HCCL_DETERMINISTIC"
        ),
        "vllm-project/vllm-ascend docs/source/tutorials/features; sgl-project/sgl-kernel-npu README.md",
    ),
)

_HYGON = Vendor(
    name="hygon",
    title="Hygon DCU 海光",
    plugin_modules=fact((), f"{FLAGCX} plugin/torch/_build_config.py; ModelTC/LightX2V hygon_dcu.py"),
    autoload=fact("built in", f"{FLAGCX} plugin/torch/_build_config.py", when="the vendor's build of torch (DTK)"),
    device_type=fact("cuda", f"{FLAGGEMS} _hygon/__init__.py; {FLAGCX} backend_flagcx.hpp"),
    backend=fact("nccl", "ModelTC/LightX2V lightx2v_platform/base/hygon_dcu.py"),
    collective_library=either(
        fact("DUCCL", f"{FLAGCX} README.md, dunccl_adaptor.cc"),
        fact("RCCL", "ModelTC/LightX2V lightx2v_platform/base/hygon_dcu.py", when="LightX2V's name for it"),
    ),
    uneven_all_to_all=fact("grouped send and receive", f"{FLAGCX} dunccl_adaptor.cc", when="in FlagCX"),
    visible_devices=either(
        fact(("HIP_VISIBLE_DEVICES",), f"{HYGON_COOKBOOK} docs/frameworks/mooncake.md"),
        fact(("HCU_VISIBLE_DEVICES",), "Hygon's HCU detection code", "weak", when="also read by vendor code"),
        fact(("HYGON_VISIBLE_DEVICES",), "HAMi documents", "secondary", when="container runtime"),
    ),
    device_namespace=fact("torch.cuda", "ModelTC/LightX2V lightx2v_platform/base/hygon_dcu.py"),
    memory_query=unknown(),
    identification=either(
        fact(("torch.__hcu_version__",), f"{FLAGGEMS} src/flag_gems/runtime/common.py"),
        fact(
            (
                "torch.version.hip is set, and gcnArchName gfx926, gfx928, gfx936, gfx938, gfx946 or gfx92a",
                "device name begins with BW or K100, or contains hygon or hcu",
            ),
            "PaddlePaddle CMake comments; HYGON-AI triton tests; Hygon's HCU detection code",
            "secondary",
        ),
    ),
    command_line_tool=fact("hy-smi", f"{FLAGCX} plugin/torch/_build_config.py"),
    bf16=fact("yes", f"{HYGON_COOKBOOK} docs/model-deployment/sglang/deepseek-r1.md"),
    fp8=either(
        fact(
            "none",
            f"charlesqing/mirrorfrog hygon-bw1000.md; {HYGON_COOKBOOK} recipes use INT8 and INT4 there",
            "secondary",
            when="BW1000 and K100_AI; whether they store fp8 dtypes was not found",
        ),
        fact(
            "e4m3fnuz",
            f"{HYGON_COOKBOOK} sglang/deepseek-r1.md; HYGON-AI/DeepEP-das@0ac30310 deep_ep/buffer.py",
            when="BW1100 (gfx938)",
        ),
    ),
    int8=fact("yes", f"{HYGON_COOKBOOK} docs/model-deployment/sglang/deepseek-r1.md"),
    collective_dtypes=unknown(f"as NCCL's: {FLAGCX} dunccl_adaptor.cc casts the type one to one; no list found"),
    reduce_dtypes=unknown(),
    network_variables=fact(
        _words(
            "NCCL_SOCKET_IFNAME NCCL_IB_HCA NCCL_NET_GDR_LEVEL NCCL_SDMA_COPY_ENABLE "
            "ALLREDUCE_STREAM_WITH_COMPUTE GLOO_SOCKET_IFNAME"
        ),
        f"{HYGON_COOKBOOK} docs/frameworks/mooncake.md, sglang/deepseek-r1.md",
    ),
)

_MOORE_THREADS = Vendor(
    name="moore_threads",
    title="Moore Threads 摩尔线程",
    plugin_modules=fact(("torch_musa",), f"{TORCH_MUSA} torch_musa/__init__.py"),
    autoload=fact("yes", f"{TORCH_MUSA} setup.py:241, entry point torch.backends"),
    device_type=fact("musa", f"{TORCH_MUSA} torch_musa/__init__.py"),
    backend=fact("mccl", f"{TORCH_MUSA} torch_musa/csrc/distributed/Register.cpp"),
    collective_library=either(
        fact("MCCL", f"{FLAGCX} README.md", when="not MetaX's library of the same name"),
        fact("not provided", "MooreThreads/torch_musa README.md, USE_MCCL=0", when="S80 and S3000"),
    ),
    uneven_all_to_all=fact(
        "grouped send and receive", f"{TORCH_MUSA} torch_musa/csrc/distributed/ProcessGroupMCCL.cpp:4016-4110"
    ),
    visible_devices=fact(
        ("MUSA_VISIBLE_DEVICES",), "MooreThreads/torch_musa docs/markdown/source/04_quick_start.md; vllm_musa/musa.py"
    ),
    device_namespace=fact("torch.musa", f"{TORCH_MUSA} torch_musa/__init__.py, core/device.py"),
    memory_query=fact("mem_get_info", f"{TORCH_MUSA} core/memory.py"),
    identification=fact(
        (
            "torch.musa, tested before cuda because torch_musa overwrites torch.cuda._lazy_init",
            "torch.version.musa",
            "capability (2, 2) is S4000, (3, 1) is S5000",
        ),
        f"{TORCH_MUSA} torch_musa/__init__.py overwrite_cuda_api; MooreThreads/MT-DeepEP README.md",
    ),
    command_line_tool=fact("mthreads-gmi", f"{FLAGCX} plugin/torch/_build_config.py"),
    bf16=fact("yes", f"{TORCH_MUSA} core/device.py is_bf16_supported", when="S4000 and later"),
    fp8=either(
        fact("none", f"{TORCH_MUSA} csrc/distributed/ProcessGroupMCCL.h:38-46", when="S4000"),
        fact(
            "e4m3fn",
            f"{TORCH_MUSA} csrc/distributed/ProcessGroupMCCL.h:38-46, csrc/aten/ops/Matmul.cpp",
            when="S5000, built with MARCH_TYPE 310 or more",
        ),
    ),
    int8=fact("yes", f"{TORCH_MUSA} csrc/distributed/ProcessGroupMCCL.cpp:25-40"),
    collective_dtypes=either(
        fact(
            _names("float32 int32 int8 uint8 int64 float16 float64 bool bfloat16"),
            f"{TORCH_MUSA} csrc/distributed/ProcessGroupMCCL.cpp:25-40",
            when="bfloat16 from S4000 on",
        ),
        fact(
            _names("float32 int32 int8 uint8 int64 float16 float64 bool bfloat16 float8_e4m3fn float8_e5m2"),
            f"{TORCH_MUSA} csrc/distributed/ProcessGroupMCCL.cpp:25-40",
            when="S5000",
        ),
    ),
    reduce_dtypes=unknown("not stated apart from the types of the library"),
    network_variables=fact(
        _words(
            "MCCL_SOCKET_IFNAME MCCL_IB_GID_INDEX MCCL_IB_HCA MCCL_IB_TIMEOUT MCCL_PROTOS MCCL_ALGOS "
            "MCCL_BUFFSIZE MCCL_TOPO_ENHANCE_PLUGIN MUSA_DEVICE_MAX_CONNECTIONS GLOO_SOCKET_IFNAME"
        ),
        "RLinf/RLinf musa_gpu.py; FlagOpen/FlagPerf@1b5a0303 interconnect-MPI_interserver/mthreads/S5000/main.sh",
    ),
)

_METAX = Vendor(
    name="metax",
    title="MetaX 沐曦",
    plugin_modules=fact((), f"{MCPYTORCH} README.md; {VLLM_METAX}"),
    autoload=fact("built in", f"{MCPYTORCH} README.md", when="the vendor's build of torch"),
    device_type=fact("cuda", f"{VLLM_METAX} vllm_metax/platform.py"),
    backend=either(
        fact("nccl", f"{VLLM_METAX} vllm_metax/platform.py; mcPytorch maca_tests/test_ddp_with_mccl"),
        fact("mccl", "RLinf/RLinf MetaX manager", "conflict", when="one third-party source; try nccl first"),
    ),
    collective_library=fact(
        "MCCL",
        f"{VLLM_METAX} vllm_metax/utils/mccl.py; {FLAGCX} mccl_adaptor.cc",
        when="not Moore Threads' library of the same name",
    ),
    uneven_all_to_all=fact("grouped send and receive", f"{FLAGCX} mccl_adaptor.cc", when="in FlagCX"),
    visible_devices=fact(
        ("MACA_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
        f"{MCPYTORCH} torch/cuda/__init__.py:587; {VLLM_METAX} platform.py",
    ),
    device_namespace=fact("torch.cuda", f"{VLLM_METAX} vllm_metax/platform.py"),
    memory_query=unknown(),
    identification=fact(
        ("+metax in torch.__version__", "MACA_PATH in the environment", "device name contains MetaX or MXC"),
        f"{MCPYTORCH} tools/generate_torch_version.py, torch/_utils_internal.py:225",
    ),
    command_line_tool=fact("mx-smi", f"{FLAGCX} plugin/torch/_build_config.py"),
    bf16=fact("yes", f"{VLLM_METAX} vllm_metax/envs.py"),
    fp8=either(
        fact(
            "none",
            f"{VLLM_METAX} vllm_metax/envs.py, VLLM_METAX_SUPPORTS_FP8=0",
            when="C500 and C550, off in the vendor's plug-in; storage and collectives were not confirmed",
        ),
        fact(
            UNKNOWN,
            "charlesqing/mirrorfrog metax-c600.md",
            "secondary",
            when="C600, advertised with FP8, variant not said",
        ),
    ),
    int8=fact("yes", f"{VLLM_METAX} vllm_metax/envs.py", when="C500 and C550"),
    collective_dtypes=unknown(f"as NCCL's: {FLAGCX} mccl_adaptor.cc casts the type one to one; no list found"),
    reduce_dtypes=unknown(),
    network_variables=fact(
        _words("MCCL_SOCKET_IFNAME MCCL_P2P_DISABLE GLOO_SOCKET_IFNAME"),
        "RLinf/RLinf MetaX manager; MetaX-MACA/mcPytorch maca_tools/env/env_run_fast.sh; whether NCCL_* also count: "
        "not found",
    ),
)

_BIREN = Vendor(
    name="biren",
    title="Biren 壁仞",
    plugin_modules=fact(
        ("torch_supa", "torch_br"),
        f"{TORCH_SUPA} README.md; for BR1xx the LMCache supa backend document (torch_br, secondary)",
        when="BR2xx and BR1xx",
    ),
    autoload=either(
        fact("yes", f"{TORCH_SUPA} setup.py, entry point torch.backends", when="torch_supa"),
        fact("no", "LMCache supa backend document", "secondary", when="torch_br"),
    ),
    device_type=fact("supa", f"{TORCH_SUPA} torch_supa/__init__.py; LMCache supa backend document for torch_br"),
    backend=either(
        fact("bccl", f"{TORCH_SUPA} torch_supa/distributed/distributed_c10d.py", when="BR2xx"),
        fact("sccl", "ModelTC/LightX2V@d137693c lightx2v_platform/base/biren_supa.py", when="BR1xx"),
    ),
    collective_library=either(
        fact("BCCL", f"{TORCH_SUPA} torch_supa/csrc/distributed/BCCLUtils.hpp", when="BR2xx"),
        fact("suCCL", DIPU, when="BR1xx"),
    ),
    uneven_all_to_all=unknown("ProcessGroupBCCL is a port of ProcessGroupNCCL; its alltoall_base was not read"),
    visible_devices=fact(("SUPA_VISIBLE_DEVICES",), "BIRENSUPA/vllm-supa@4029d283 vllm_supa/platform.py"),
    device_namespace=fact("torch.supa", f"{TORCH_SUPA} torch_supa/supa/__init__.py"),
    memory_query=fact("mem_get_info", f"{TORCH_SUPA} torch_supa/supa/__init__.py"),
    identification=fact(
        (
            "torch.supa, tested before cuda because torch_supa puts it in place of torch.cuda",
            "/dev/biren/card_*",
            "device name begins with Biren",
        ),
        f"{TORCH_SUPA} torch_supa/contrib/transfer_to_supa.py, README.md",
    ),
    command_line_tool=unknown("none in FlagCX's list of tools"),
    bf16=fact("yes", f"{TORCH_SUPA} torch_supa/supa/__init__.py is_bf16_supported"),
    fp8=either(
        fact(
            "none",
            "a compiled report: native FP8 first arrives in BR20X; no claim for BR1xx was found",
            "secondary",
            when="BR1xx",
        ),
        fact(
            "e4m3fn",
            f"BIRENSUPA/vllm-supa@4029d283 csrc/supa/fp8_gemm_kernel; {TORCH_SUPA} BCCLUtils.hpp",
            when="BR2xx",
        ),
    ),
    int8=fact("yes", f"{TORCH_SUPA} torch_supa/csrc/distributed/BCCLUtils.hpp"),
    collective_dtypes=either(
        fact(
            _names("int8 uint8 int32 int64 float16 float32 float64 bfloat16 bool"),
            f"{TORCH_SUPA} torch_supa/csrc/distributed/BCCLUtils.hpp",
            when="BCCL, BR2xx; float8_e4m3fn and float8_e5m2 from BCCL 2.24",
        ),
        fact(
            _names("int8 uint8 float32 int32 bool bfloat16"),
            DIPU,
            "secondary",
            when="suCCL, BR1xx, in an older adaptor",
        ),
    ),
    reduce_dtypes=unknown("not stated apart from the types of the library"),
    network_variables=fact(
        _words("BCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME SUCCL_BUFFSIZE BR_UMD_DEBUG_P2P_ACCESS_CHECK"),
        "RLinf/RLinf Biren manager; third-party suCCL test script",
        "secondary",
    ),
)

_ENFLAME = Vendor(
    name="enflame",
    title="Enflame 燧原",
    plugin_modules=fact(("torch_gcu",), f"{VLLM_GCU} vllm_gcu/__init__.py"),
    autoload=fact("yes", "a setup.py with the entry point torch_gcu:_autoload, repository not identified", "weak"),
    device_type=fact("gcu", f"{VLLM_GCU} vllm_gcu/gcu.py; {FLAGCX} backend_flagcx.hpp"),
    backend=either(
        fact("eccl", f"{VLLM_GCU} vllm_gcu/worker/worker.py:238"),
        fact("nccl", "ModelTC/LightX2V enflame_gcu.py:83", "conflict", when="after torch_gcu.transfer_to_gcu"),
    ),
    collective_library=fact("ECCL", f"{VLLM_GCU} pyeccl_wrapper.py:241; {FLAGCX} eccl_adaptor.cc"),
    uneven_all_to_all=fact("native", f"{VLLM_GCU} parallel_state.py; {FLAGCX} eccl_adaptor.cc"),
    visible_devices=either(
        fact(("TOPS_VISIBLE_DEVICES",), f"{VLLM_GCU} vllm_gcu/gcu.py"),
        fact(("ENFLAME_VISIBLE_DEVICES",), "third-party note", "secondary", when="container runtime"),
    ),
    device_namespace=fact("torch.gcu", f"{VLLM_GCU} vllm_gcu/gcu.py"),
    memory_query=fact(
        "get_device_properties", f"{VLLM_GCU} vllm_gcu/gcu.py", when="total_memory; mem_get_info was not seen"
    ),
    identification=fact(
        (
            "torch.gcu after import torch_gcu, tested before cuda because transfer_to_gcu probably rewrites torch.cuda",
            "device name Enflame S60",
        ),
        f"{FLAGGEMS} _enflame/__init__.py; EnflameTechnology/vllm-gcu docs/source/installation.md",
    ),
    command_line_tool=fact("efsmi", f"{FLAGCX} plugin/torch/_build_config.py"),
    bf16=fact("yes", "EnflameTechnology/vllm-gcu quantization.md; charlesqing/mirrorfrog enflame-s60.md"),
    fp8=either(
        fact(
            "none",
            "EnflameTechnology/vllm-gcu quantization.md; charlesqing/mirrorfrog enflame-s60.md, citing the manual",
            when="S60",
        ),
        fact(
            UNKNOWN,
            "EnflameTechnology/vllm-gcu platform list",
            "conflict",
            when="the list names fp8, the quantization document says not yet",
        ),
        fact("e4m3fn", "EnflameTechnology/DeepEP@907c1f36 README.md", when="the newer chips its DeepEP port is for"),
    ),
    int8=fact("yes", f"{VLLM_GCU} vllm_gcu/distributed/pyeccl_wrapper.py:32-66"),
    collective_dtypes=fact(
        _names("int8 uint8 int32 uint32 int64 uint64 float16 float32 float64 bfloat16"),
        f"{VLLM_GCU} vllm_gcu/distributed/pyeccl_wrapper.py:32-66",
    ),
    reduce_dtypes=unknown("not stated apart from the types of the library"),
    network_variables=fact(
        _words(
            "ECCL_SOCKET_IFNAME ECCL_IB_HCA ECCL_IB_GID_INDEX ECCL_ALLTOALLV_MAXSIZE "
            "TORCH_ECCL_AVOID_RECORD_STREAMS GLOO_SOCKET_IFNAME TP_SOCKET_IFNAME ECCL_MAX_NCHANNELS "
            "ECCL_BUFFSIZE ECCL_PROTO ECCL_ALGO"
        ),
        "EnflameTechnology/vllm-gcu docs/source/tutorials/multi_node.md, p2p_eccl_engine.py",
    ),
)

_ILUVATAR = Vendor(
    name="iluvatar",
    title="Iluvatar CoreX 天数智芯",
    plugin_modules=fact((), f"{FLAGCX} plugin/torch/_build_config.py"),
    autoload=fact("built in", f"{FLAGCX} plugin/torch/_build_config.py", when="the vendor's build of torch (CoreX)"),
    device_type=fact("cuda", f"{FLAGGEMS} _iluvatar/__init__.py"),
    backend=fact("nccl", "ModelTC/LightX2V lightx2v_platform/base/iluvatar_cuda.py"),
    collective_library=fact("IXCCL", f"{FLAGCX} README.md, ixnccl_adaptor.cc"),
    uneven_all_to_all=fact("grouped send and receive", f"{FLAGCX} ixnccl_adaptor.cc", when="in FlagCX"),
    visible_devices=either(
        fact(("CUDA_VISIBLE_DEVICES",), f"{FLAGCX} plugin/torch/example/run_hetero.sh; gpustack's map", "weak"),
        fact(
            ("ILUVATAR_VISIBLE_DEVICES", "IX_VISIBLE_DEVICES"),
            "gpustack's map; third-party script",
            "weak",
            when="container runtime",
        ),
    ),
    device_namespace=fact("torch.cuda", f"{FLAGGEMS} _iluvatar/__init__.py"),
    memory_query=unknown(),
    identification=fact(
        ("torch.corex", "+corex in torch.__version__", "device name contains Iluvatar or BI-V", "PCI vendor 1e3e"),
        f"{FLAGGEMS} src/flag_gems/runtime/common.py; Deep-Spark toolbox",
    ),
    command_line_tool=fact("ixsmi", f"{FLAGCX} plugin/torch/_build_config.py"),
    bf16=fact("yes", "FlagOpen/FlagPerf base/benchmarks/computation-BF16/iluvatar/BI150/README.md"),
    fp8=unknown("no evidence: Deep-Spark/DeepSparkInference serves DeepSeek V3.1 in W4A8 and INT8"),
    int8=fact("yes", "Deep-Spark/DeepSparkInference models/nlp/llm/deepseek-v3.1/vllm/README.md"),
    collective_dtypes=unknown(),
    reduce_dtypes=unknown(),
    network_variables=fact(
        _words("NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME"), "inferred from the library's nccl names", "weak"
    ),
)

_CAMBRICON = Vendor(
    name="cambricon",
    title="Cambricon 寒武纪",
    plugin_modules=fact(("torch_mlu",), TORCH_MLU),
    autoload=fact("no", f"{TORCH_MLU} setup.py", when="snapshot of 2024-09"),
    device_type=fact("mlu", f"{TORCH_MLU} torch_mlu/__init__.py:48"),
    backend=fact("cncl", f"{TORCH_MLU} torch_mlu/mlu/cncl.py:96"),
    collective_library=fact("CNCL", f"{TORCH_MLU} torch_mlu/mlu/cncl.py:96"),
    uneven_all_to_all=fact(
        "grouped send and receive",
        f"{TORCH_MLU} process_group_cncl.cpp, cncl_utils.cpp",
        when="even splits are native (cnclAlltoAll)",
    ),
    visible_devices=fact(("MLU_VISIBLE_DEVICES",), "gpustack's map; third-party script", "secondary"),
    device_namespace=fact("torch.mlu", "ModelTC/LightX2V cambricon_mlu.py"),
    memory_query=unknown(),
    identification=fact(("torch.mlu after import torch_mlu",), f"{FLAGGEMS} src/flag_gems/runtime/common.py"),
    command_line_tool=fact("cnmon", f"{FLAGCX} plugin/torch/_build_config.py"),
    bf16=fact("yes", f"{TORCH_MLU} process_group_cncl.cpp:139-147", when="in collectives"),
    fp8=unknown(),
    int8=fact("yes", f"{TORCH_MLU} process_group_cncl.cpp:139-147", when="in collectives"),
    collective_dtypes=fact(
        _names("int8 uint8 float32 int32 int64 float16 bool bfloat16"),
        f"{TORCH_MLU} process_group_cncl.cpp:139-147; {FLAGCX} cncl_adaptor.cc:19",
    ),
    reduce_dtypes=unknown("not stated apart from the types of the library"),
    network_variables=fact(
        _words("CNCL_MLULINK_CROSS_HOSTS_ENABLE CNCL_MLU_DIRECT_LEVEL CNCL_MLULINK_OVER_ROCE_DISABLE"),
        "FlagOpen/FlagPerf",
        "weak",
    ),
)

_KUNLUNXIN = Vendor(
    name="kunlunxin",
    title="Kunlunxin 昆仑芯",
    plugin_modules=fact(("torch_xmlir",), f"{VLLM_KUNLUN}; RLinf/RLinf kunlun_xpu.py"),
    autoload=unknown(),
    device_type=fact("cuda", f"{VLLM_KUNLUN} vllm_kunlun/platforms/kunlun.py"),
    backend=either(
        fact("nccl", f"{VLLM_KUNLUN} vllm_kunlun/platforms/kunlun.py:26", "conflict"),
        fact("bkcl", "RLinf/RLinf kunlun_xpu.py:118", "conflict"),
    ),
    collective_library=fact("BKCL", f"{FLAGCX} xccl_adaptor.cc, where it is called XCCL"),
    uneven_all_to_all=fact("native", f"{FLAGCX} xccl_adaptor.cc", when="inside one vendor only"),
    visible_devices=fact(
        ("XPU_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
        "baidu/vLLM-Kunlun docs/source/tutorials/multi_xpu_DeepSeek-V3.2-Exp-w8a8.md:104",
        when="the vendor's recipe sets both",
    ),
    device_namespace=fact("torch.cuda", f"{VLLM_KUNLUN} vllm_kunlun/platforms/kunlun.py"),
    memory_query=unknown(),
    identification=fact(("import torch_xmlir succeeds", "/opt/kunlun"), f"{FLAGCX} plugin/torch/_build_config.py"),
    command_line_tool=fact(
        "xpu-smi",
        f"{FLAGCX} plugin/torch/_build_config.py",
        when="Intel's tool has the same name, so it decides nothing",
    ),
    bf16=unknown(),
    fp8=unknown(),
    int8=fact("yes", f"{FLAGCX} xccl_adaptor.cc:17-27", when="moved as uint8, never summed"),
    collective_dtypes=unknown(f"{FLAGCX} xccl_adaptor.cc:17-27 was read for its substitutions only"),
    reduce_dtypes=unknown(),
    network_variables=fact(
        _words("BKCL_SOCKET_IFNAME BKCL_RDMA_NICS BKCL_TIMEOUT BKCL_ENABLE_XDR BKCL_TREE_THRESHOLD"),
        "RLinf/RLinf kunlun_xpu.py; FlagOpen/FlagPerf",
    ),
)

_INTEL = Vendor(
    name="intel",
    title="Intel XPU",
    plugin_modules=fact((), "ModelTC/LightX2V intel_xpu.py", when="recent torch"),
    autoload=fact("built in", GENERAL, "general"),
    device_type=fact("xpu", "ModelTC/LightX2V intel_xpu.py"),
    backend=either(
        fact("xccl", "ModelTC/LightX2V intel_xpu.py:64"),
        fact("ccl", "RLinf/RLinf intel_gpu.py:94", when="with the oneCCL bindings"),
    ),
    collective_library=fact("oneCCL", "ModelTC/LightX2V intel_xpu.py:64; RLinf/RLinf intel_gpu.py:94"),
    uneven_all_to_all=unknown(),
    visible_devices=either(
        fact(("ONEAPI_DEVICE_SELECTOR",), "RLinf/RLinf intel_gpu.py"),
        fact(("ZE_AFFINITY_MASK",), "not confirmed", "weak"),
    ),
    device_namespace=fact("torch.xpu", "ModelTC/LightX2V intel_xpu.py"),
    memory_query=unknown(),
    identification=fact(("torch.xpu.is_available()",), "ModelTC/LightX2V intel_xpu.py"),
    command_line_tool=fact(
        "xpu-smi", GENERAL, "general", when="Kunlunxin's tool has the same name, so it decides nothing"
    ),
    bf16=unknown(),
    fp8=unknown(),
    int8=unknown(),
    collective_dtypes=unknown(),
    reduce_dtypes=unknown(),
    network_variables=fact(_words("CCL_MNIC_NAME"), "RLinf/RLinf intel_gpu.py:103"),
)

_GLOO_DTYPES = _names("bool uint8 int8 int32 int64 float16 bfloat16 float32 float64")

_CPU = Vendor(
    name="cpu",
    title="CPU",
    plugin_modules=fact((), SEEN_ON_CPU, "seen"),
    autoload=fact("built in", SEEN_ON_CPU, "seen"),
    device_type=fact("cpu", SEEN_ON_CPU, "seen"),
    backend=fact("gloo", SEEN_ON_CPU, "seen"),
    collective_library=fact("Gloo", f"{FLAGCX} gloo_adaptor.cc:320-326"),
    uneven_all_to_all=fact("native", f"{FLAGCX} gloo_adaptor.cc:320-326"),
    visible_devices=unknown("a CPU has none that we know of"),
    device_namespace=fact("torch.cpu", GENERAL, "general"),
    memory_query=unknown("torch.cpu does not report memory"),
    identification=fact(("none of the others",), SEEN_ON_CPU, "seen"),
    command_line_tool=unknown("none needed"),
    bf16=fact("yes", SEEN_ON_CPU, "seen", when="storage and, slowly, compute"),
    fp8=fact("none", SEEN_ON_CPU, "seen", when="float8 rows are stored and converted, never computed with"),
    int8=fact("yes", SEEN_ON_CPU, "seen"),
    collective_dtypes=fact(_GLOO_DTYPES, SEEN_ON_CPU, "seen"),
    reduce_dtypes=fact(_GLOO_DTYPES, SEEN_ON_CPU, "seen"),
    network_variables=fact(_words("GLOO_SOCKET_IFNAME"), GENERAL, "general"),
)


def complete(rows: Iterable[Vendor]) -> dict[str, Vendor]:
    """`rows` by name. Raises AssertionError (also under -O) for a fact without value, source or known confidence."""
    table: dict[str, Vendor] = {}
    for row in rows:
        if not row.name or not row.title or row.name in table:
            raise AssertionError(f"vendor row {row.name!r}: no name, no title, or a second row of that name")
        for name, entry in row.facts().items():
            _check_fact(f"vendor row {row.name}, {name}", entry)
        table[row.name] = row
    for quirk in Quirk:
        strangers = set(quirk.sources) - set(table)
        if not quirk.what or not quirk.sources or strangers or not all(quirk.sources.values()):
            raise AssertionError(f"{quirk.name}: no text, no source, or unknown vendors {sorted(strangers)}")
    return table


def _check_fact(where: str, entry: Any) -> None:
    if not isinstance(entry, Fact) or not entry.readings:
        raise AssertionError(f"{where}: not a Fact with a reading; use unknown() where no source says")
    for reading in entry.readings:
        if reading.value is None or reading.value == "" or not reading.source.strip():
            raise AssertionError(f"{where}: a reading without value or source")
        if reading.confidence not in CONFIDENCES:
            raise AssertionError(f"{where}: confidence {reading.confidence!r} is not one of {CONFIDENCES}")


VENDORS: dict[str, Vendor] = complete(
    (
        _NVIDIA,
        _AMD,
        _ASCEND,
        _HYGON,
        _MOORE_THREADS,
        _METAX,
        _BIREN,
        _ENFLAME,
        _ILUVATAR,
        _CAMBRICON,
        _KUNLUNXIN,
        _INTEL,
        _CPU,
    )
)


# ---------------------------------------------------------------- docs/vendors.md

_OVERVIEW = ("plugin_modules", "device_type", "backend", "collective_library", "bf16", "fp8", "command_line_tool")


def render_table() -> str:
    """The whole text of docs/vendors.md."""
    parts = [_HEADER, _overview(), "\n## Quirks\n", _QUIRKS_HEADER, _quirk_table()]
    parts += [_section(vendor) for vendor in VENDORS.values()]
    return "\n".join(parts) + "\n"


_HEADER = """\
# Vendors

Written by `python -m moe_runtime.comm.vendors > docs/vendors.md` from the table in `comm/vendors.py`; edit that file.

**None of these rows but `cpu` has been run on a real chip by this project.** They were collected from public
repositories and documents, each named beside its fact. "unknown" means that no source was found; where sources
disagree, or generations of a chip differ, every reading is kept. Confidence: primary (the vendor's or a framework's
own text), secondary (compiled pages, third-party reports), weak (one indirect hint), conflict (sources disagree),
general (common knowledge, not looked up), seen (run by this project), none (no source).

The order of detection is in `comm/detect.py`: what the user names, then plug-ins, then the builds of torch that present
themselves as `cuda`, then command-line tools, then the CPU.

## Overview
"""

_QUIRKS_HEADER = """\
Applied by the transport (`comm/quirks.py`), never by its callers. A quirk of one generation is applied to all of a
vendor's chips.
"""


def _show(value: Any) -> str:
    if isinstance(value, frozenset):
        value = tuple(sorted(value))
    if isinstance(value, tuple):
        return ", ".join(value) or "none needed"
    return str(value)


def _show_reading(reading: Reading) -> str:
    return _show(reading.value) + (f" ({reading.when})" if reading.when else "")


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = list(header)
    return "\n".join([_row(columns), "|" + "---|" * len(columns), *map(_row, rows)])


def _overview() -> str:
    rows = (
        (vendor.name, *("; ".join(map(_show_reading, vendor.facts()[name].readings)) for name in _OVERVIEW))
        for vendor in VENDORS.values()
    )
    return _table(("vendor", *(name.replace("_", " ") for name in _OVERVIEW)), rows)


def _quirk_table() -> str:
    rows = (
        (f"`{quirk.name}`", quirk.what, "; ".join(f"{name}: {source}" for name, source in quirk.sources.items()))
        for quirk in Quirk
    )
    return _table(("quirk", "what it is", "who documents it"), rows)


def _section(vendor: Vendor) -> str:
    quirks = ", ".join(f"`{quirk.name}`" for quirk in Quirk if quirk in vendor.quirks) or "none documented"
    rows = (
        (name.replace("_", " "), _show_reading(reading), reading.source, reading.confidence)
        for name, entry in vendor.facts().items()
        for reading in entry.readings
    )
    table = _table(("fact", "value", "source", "confidence"), rows)
    return f"\n## {vendor.name}: {vendor.title}\n\nQuirks: {quirks}.\n\n{table}"


if __name__ == "__main__":
    print(render_table(), end="")

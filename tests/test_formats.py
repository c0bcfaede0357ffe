"""Wire formats: what a row loses on each of them, what stays visible, and which one two ranks agree on."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_runtime.comm.formats import (
    BLOCK,
    FORMATS,
    agree,
    claimed,
    decode,
    describe,
    encode,
    encode_into,
    is_exact,
    num_scales,
    payload_bytes,
)
from moe_runtime.comm.vendors import UNKNOWN, VENDORS
from moe_runtime.errors import ConfigError

SCALED = [name for name, fmt in FORMATS.items() if fmt.scaled]
UNSCALED = [name for name, fmt in FORMATS.items() if not fmt.scaled]
# Half the distance between the two largest neighbours of the format: the most that rounding moves a scaled value.
HALF_STEP = {"float8_e4m3fn": 16.0, "float8_e4m3fnuz": 8.0, "int8": 0.5}
TINY = torch.finfo(torch.float32).tiny
ROUNDING = 2**-22  # relative, of the two divisions and the product in float32
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HIDDEN = (1, 2, 7, 127, 128, 129, 255, 256, 300)
EXAMPLES = settings(max_examples=60, deadline=None)


@st.composite
def rows(draw, dtypes=DTYPES, min_rows=0):
    """[N, H] of any dtype, each block of its own magnitude, some blocks all zero."""
    count, hidden = draw(st.integers(min_rows, 4)), draw(st.sampled_from(HIDDEN))
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    limit = 12 if dtype == torch.float16 else 100
    x = torch.randn(count, hidden, generator=generator, dtype=torch.float64)
    power = torch.randint(-limit, limit + 1, (count, -(-hidden // BLOCK)), generator=generator)
    zero = torch.rand(power.shape, generator=generator) < 0.1
    factors = (2.0 ** power.double()).masked_fill(zero, 0).repeat_interleave(BLOCK, 1)[:, :hidden]
    return (x * factors).to(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)


def same_bits(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def block_of(hidden: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, hidden)) for start in range(0, hidden, BLOCK)]


# ---------------------------------------------------------------- the formats


def test_the_formats_and_their_sizes():
    assert {name: fmt.dtype for name, fmt in FORMATS.items()} == {
        name: getattr(torch, name)
        for name in ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "int8", "float64")
    }
    assert {name: fmt.largest for name, fmt in FORMATS.items() if fmt.scaled} == {
        "float8_e4m3fn": 448, "float8_e4m3fnuz": 240, "int8": 127,
    }  # fmt: skip
    assert [payload_bytes(FORMATS[name], 7168) for name in ("float64", "float32", "float16", "int8")] == [
        57344, 28672, 14336, 7168,
    ]  # fmt: skip
    assert [num_scales(FORMATS["int8"], hidden) for hidden in (0, 1, 128, 129, 7168)] == [0, 1, 1, 2, 56]
    assert [num_scales(FORMATS[name], 7168) for name in UNSCALED] == [0] * len(UNSCALED)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e4m3fnuz"])
def test_every_byte_of_an_8_bit_float_means_what_its_definition_says(name):
    """Bias 7 with nan at s1111111, or bias 8 with nan in the place of minus zero: the same byte, half the value."""
    bias, nans = (7, (0x7F, 0xFF)) if name == "float8_e4m3fn" else (8, (0x80,))

    def value(byte: int) -> float:
        sign, exponent, mantissa = -1 if byte & 0x80 else 1, byte >> 3 & 0xF, byte & 7
        if byte in nans:
            return math.nan
        return sign * (2.0 ** (exponent - bias) * (1 + mantissa / 8) if exponent else 2.0 ** (1 - bias) * mantissa / 8)

    expected = torch.tensor([value(byte) for byte in range(256)])
    payload = torch.arange(256, dtype=torch.uint8).view(1, 256).view(FORMATS[name].dtype)
    decoded = decode(payload, torch.ones(1, 2), FORMATS[name], torch.float32)
    assert torch.equal(decoded[0].nan_to_num(nan=1e9), expected.nan_to_num(nan=1e9))
    assert torch.equal(decoded.nan_to_num(nan=1e9), payload.float().nan_to_num(nan=1e9))  # torch's own cast
    assert expected.nan_to_num(nan=0).max() == FORMATS[name].largest


# ---------------------------------------------------------------- what a round trip loses


@pytest.mark.parametrize("name", SCALED)
@EXAMPLES
@given(x=rows())
def test_a_scaled_format_is_off_by_at_most_half_a_step_of_its_block(name, x):
    fmt, exact = FORMATS[name], x.double()
    payload, scales = encode(x, fmt)
    assert payload.dtype == fmt.dtype and payload.shape == x.shape
    assert scales.dtype == torch.float32 and scales.shape == (len(x), num_scales(fmt, x.shape[1]))
    error = (decode(payload, scales, fmt, torch.float64) - exact).abs()
    for column, part in enumerate(block_of(x.shape[1])):
        scale = (exact[:, part].abs().amax(1) / fmt.largest).clamp(min=TINY)
        assert torch.allclose(scales[:, column].double(), scale, rtol=2**-22, atol=0)
        bound = scale * (HALF_STEP[name] + fmt.largest * ROUNDING)
        assert (error[:, part] <= bound[:, None]).all()


@pytest.mark.parametrize("name, least", [("float8_e4m3fn", 2.0**-10), ("float8_e4m3fnuz", 2.0**-11)])
@EXAMPLES
@given(x=rows())
def test_an_8_bit_float_keeps_small_values_beside_large_ones_to_a_sixteenth(name, least, x):
    payload, scales = encode(x, FORMATS[name])
    error = (decode(payload, scales, FORMATS[name], torch.float64) - x.double()).abs()
    floor = scales.double().repeat_interleave(BLOCK, 1)[:, : x.shape[1]] * least
    assert (error <= torch.maximum(x.double().abs() / 16, floor) * (1 + 32 * ROUNDING)).all()


@pytest.mark.parametrize("name", SCALED)
@EXAMPLES
@given(values=st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=1, max_size=300))
@example(values=[0.0, -0.0])
@example(values=[1e-45, -1e-45])  # the smallest float32 of all
@example(values=[2.0**126, 1e-45])
@example(values=[TINY * 448, TINY])
def test_finite_values_never_come_back_as_nan_or_inf(name, values):
    payload, scales = encode(torch.tensor([values]), FORMATS[name])
    assert payload.float().isfinite().all() and scales.isfinite().all() and (scales >= TINY).all()
    assert decode(payload, scales, FORMATS[name], torch.float32).isfinite().all()


@pytest.mark.parametrize("name", SCALED)
@EXAMPLES
@given(x=rows())
def test_encoding_what_was_decoded_changes_nothing(name, x):
    payload, scales = encode(x, FORMATS[name])
    again, scales_again = encode(decode(payload, scales, FORMATS[name], torch.float32), FORMATS[name])
    zero_has_no_sign = payload.float() + 0, again.float() + 0
    assert torch.equal(*zero_has_no_sign)
    assert torch.allclose(scales_again, scales, rtol=2**-22, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_zeros_stay_zeros_and_no_rows_stay_no_rows(name, hidden, dtype):
    for count in (0, 3):
        payload, scales = encode(torch.zeros(count, hidden, dtype=dtype), FORMATS[name])
        back = decode(payload, scales, FORMATS[name], dtype)
        assert back.shape == (count, hidden) and back.dtype == dtype and not back.any()
        assert payload.shape == (count, hidden) and not bits(payload).any()
        assert scales is None or scales.shape == (count, num_scales(FORMATS[name], hidden))


@pytest.mark.parametrize("name", UNSCALED)
@EXAMPLES
@given(x=rows())
def test_an_unscaled_format_is_a_cast_and_exact_where_it_says_so(name, x):
    payload, scales = encode(x, FORMATS[name])
    assert scales is None and same_bits(payload, x.to(FORMATS[name].dtype))
    back = decode(payload, None, FORMATS[name], x.dtype)
    assert same_bits(back, payload.to(x.dtype))
    if is_exact(name, x.dtype):
        assert same_bits(back, x)


def test_exact_means_the_same_dtype_or_a_wider_float():
    exact = {name: [str(dtype).removeprefix("torch.") for dtype in DTYPES if is_exact(name, dtype)] for name in FORMATS}
    assert exact == {
        "float64": ["float32", "bfloat16", "float16", "float64"],
        "float32": ["float32", "bfloat16", "float16"],
        "bfloat16": ["bfloat16"],
        "float16": ["float16"],
        "float8_e4m3fn": [], "float8_e4m3fnuz": [], "int8": [],
    }  # fmt: skip


# ---------------------------------------------------------------- the edges


def test_int8_rounds_half_to_even_and_uses_both_ends():
    x = torch.tensor([[127.0, -127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5]])
    payload, scales = encode(x, FORMATS["int8"])
    assert scales.tolist() == [[1.0]]
    assert payload.tolist() == [[127, -127, 0, 2, 2, 0, -2, 126]]


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_stay_visible_in_their_block_and_only_there(name, bad):
    x = torch.randn(2, 300, generator=torch.Generator().manual_seed(0))
    good = decode(*encode(x, FORMATS[name]), FORMATS[name], torch.float32)
    x[1, 140] = bad
    payload, scales = encode(x, FORMATS[name])
    back = decode(payload, scales, FORMATS[name], torch.bfloat16)
    assert back[1, 128:256].isnan().all()
    assert not payload[1, 128:256].float().any()  # the same bytes on every device
    back, good = back.clone(), good.bfloat16()
    back[1, 128:256] = good[1, 128:256] = 0
    assert torch.equal(back, good)


@pytest.mark.parametrize("name", SCALED)
def test_what_float32_cannot_hold_is_no_number_either(name):
    back = decode(
        *encode(torch.tensor([[1e300, 1.0]], dtype=torch.float64), FORMATS[name]), FORMATS[name], torch.float64
    )
    assert back.isnan().all()


def test_float16_beyond_its_range_becomes_inf_and_is_not_clamped():
    x = torch.tensor([[65504.0, 65536.0, -1e30, 1e-30]])
    back = decode(*encode(x, FORMATS["float16"]), FORMATS["float16"], torch.float32)
    assert back.tolist() == [[65504.0, math.inf, -math.inf, 0.0]]


@pytest.mark.parametrize("name", SCALED)
@EXAMPLES
@given(x=rows(min_rows=1), data=st.data())
def test_a_block_does_not_feel_its_neighbours(name, x, data):
    parts = block_of(x.shape[1])
    row, column = data.draw(st.integers(0, len(x) - 1)), data.draw(st.integers(0, len(parts) - 1))
    payload, scales = encode(x, FORMATS[name])
    changed = x.clone()
    changed[row, parts[column]] = data.draw(st.sampled_from([0.0, 3.0, 1e4, math.nan, math.inf]))
    new_payload, new_scales = encode(changed, FORMATS[name])
    for tensor in (payload.view(torch.uint8), new_payload.view(torch.uint8)):
        tensor[row, parts[column]] = 0
    scales[row, column] = new_scales[row, column] = 0
    assert same_bits(payload, new_payload) and same_bits(scales, new_scales)


@pytest.mark.parametrize("name", FORMATS)
@EXAMPLES
@given(x=rows(), transposed=st.booleans())
def test_writing_into_packed_rows_gives_the_same_bits_and_touches_nothing_else(name, x, transposed):
    fmt, (count, hidden) = FORMATS[name], x.shape
    scales_at = -(-payload_bytes(fmt, hidden) // 16) * 16 + 16
    end = scales_at + 4 * num_scales(fmt, hidden)
    packed = torch.full((count, end + 16 - end % 16), 0xA5, dtype=torch.uint8)
    payload = packed[:, 16 : 16 + payload_bytes(fmt, hidden)].view(fmt.dtype)
    scales = packed[:, scales_at:end].view(torch.float32) if fmt.scaled else None
    source = x.t().contiguous().t() if transposed else x
    encode_into(source, fmt, payload, scales)
    whole_payload, whole_scales = encode(x, fmt)
    assert same_bits(payload, whole_payload) and same_bits(scales, whole_scales)
    assert same_bits(decode(payload, scales, fmt, x.dtype), decode(whole_payload, whole_scales, fmt, x.dtype))
    assert decode(payload, scales, fmt, x.dtype).is_contiguous()
    untouched = torch.ones(packed.shape[1], dtype=torch.bool)
    untouched[16 : 16 + payload_bytes(fmt, hidden)] = False
    untouched[scales_at:end] = False
    assert (packed[:, untouched] == 0xA5).all()


def test_rows_that_need_gradients_are_encoded_without_them_and_left_as_they_were():
    for name, dtype in itertools.product(FORMATS, DTYPES):
        x = torch.randn(3, 200, dtype=dtype, requires_grad=True)
        before = x.detach().clone()
        payload, scales = encode(x, FORMATS[name])
        assert not payload.requires_grad and same_bits(x.detach(), before)
        kept = payload.clone()
        decode(payload, scales, FORMATS[name], dtype)
        assert same_bits(payload, kept)


@pytest.mark.parametrize("name", FORMATS)
def test_no_value_is_ever_looked_at_on_the_host(name):
    """The meta device has shapes and no values: what runs there needs no copy to the host on any device."""
    payload, scales = encode(torch.empty(3, 200, dtype=torch.bfloat16, device="meta"), FORMATS[name])
    assert decode(payload, scales, FORMATS[name], torch.bfloat16).device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a cuda device")
@pytest.mark.parametrize("name", FORMATS)
def test_a_cuda_device_writes_and_reads_the_same_bits_as_the_cpu(name):
    x = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    payload, scales = encode(x, FORMATS[name])
    on_device = encode(x.cuda(), FORMATS[name])
    assert same_bits(on_device[0].cpu(), payload) and same_bits(None if scales is None else on_device[1].cpu(), scales)
    back = decode(*on_device, FORMATS[name], torch.bfloat16).cpu()
    assert same_bits(back, decode(payload, scales, FORMATS[name], torch.bfloat16))


def test_outputs_that_do_not_fit_are_refused():
    x, fmt = torch.ones(2, 130), FORMATS["int8"]
    payload, scales = encode(x, fmt)
    for wrong in (
        (payload[:1], scales), (payload, scales[:, :1]), (payload, None), (payload, scales.double()),
        (payload.view(torch.uint8), scales), (payload[:, :128], scales),
    ):  # fmt: skip
        with pytest.raises(
            ConfigError, match=r"rows of \[2, 130\] as int8 are \[2, 130\] int8 and \[2, 2\] float32; got"
        ):
            encode_into(x, fmt, *wrong)
    with pytest.raises(ConfigError, match="as float32 are .*float32; got .*int8 and"):
        decode(payload, scales, FORMATS["float32"], torch.float32)
    with pytest.raises(ConfigError, match="as int8"):
        decode(payload, scales[:, :1], fmt, torch.float32)


# ---------------------------------------------------------------- what the vendor table claims

CLAIMS = """
              float32 float16 bfloat16 float8_e4m3fn float8_e4m3fnuz int8    float64
nvidia        yes     yes     yes      yes           no              yes     yes
amd           yes     unknown unknown  unknown       unknown         unknown unknown
ascend        yes     yes     yes      unknown       no              yes     yes
hygon         yes     unknown yes      no            unknown         yes     unknown
moore_threads yes     yes     yes      unknown       no              yes     yes
metax         yes     unknown yes      unknown       unknown         yes     unknown
biren         yes     unknown yes      unknown       no              yes     no
enflame       yes     yes     yes      unknown       unknown         yes     no
iluvatar      yes     unknown yes      unknown       unknown         yes     no
cambricon     yes     yes     yes      unknown       unknown         yes     no
kunlunxin     yes     unknown unknown  unknown       unknown         yes     unknown
intel         yes     unknown unknown  unknown       unknown         unknown unknown
cpu           yes     yes     yes      yes           yes             yes     yes
"""
HEADER, *CLAIM_ROWS = (line.split() for line in CLAIMS.strip().splitlines())


def test_every_vendor_and_every_format_has_a_claim():
    assert HEADER == list(FORMATS) and [row[0] for row in CLAIM_ROWS] == list(VENDORS)
    assert all(set(claimed(vendor)) == set(FORMATS) for vendor in VENDORS.values())


@pytest.mark.parametrize("name, expected", [(row[0], dict(zip(HEADER, row[1:], strict=True))) for row in CLAIM_ROWS])
def test_a_vendor_claims_what_its_row_says_and_no_more(name, expected):
    assert claimed(VENDORS[name]) == expected


@pytest.mark.parametrize("name", [name for name in VENDORS if name != "cpu"])
def test_what_the_table_does_not_know_is_never_claimed(name):
    vendor, claims = VENDORS[name], claimed(VENDORS[name])
    if not vendor.bf16.is_known:
        assert claims["bfloat16"] == UNKNOWN
    if not vendor.int8.is_known:
        assert claims["int8"] == UNKNOWN
    if not vendor.collective_dtypes.is_known:
        assert claims["float16"] == UNKNOWN and claims["float64"] != "yes"
    for variant in ("e4m3fn", "e4m3fnuz"):
        assert (claims[f"float8_{variant}"] == "yes") == (set(vendor.fp8.values) == {variant})
        assert (claims[f"float8_{variant}"] == "no") == (vendor.fp8.is_known and variant not in vendor.fp8.values)


# ---------------------------------------------------------------- the agreement


def world(*vendors: str):
    return [claimed(VENDORS[name]) for name in vendors], [f"rank {r} ({name})" for r, name in enumerate(vendors)]


def test_exact_gives_every_pair_the_rows_own_dtype():
    able, names = world("nvidia", "ascend", "cpu")
    matrix = agree(("exact",), able, torch.bfloat16, names)
    assert matrix == [["bfloat16"] * 3] * 3
    assert describe(matrix, able, torch.bfloat16) == ["rows travel as bfloat16: ranks 0-2 with each other; exact"]


def test_each_pair_takes_its_own_first_format():
    able, names = world("nvidia", "nvidia", "ascend", "ascend", "hygon", "cpu")
    matrix = agree(("fp8", "int8", "exact"), able, torch.bfloat16, names)
    assert [matrix[r][r] for r in range(6)] == ["bfloat16"] * 6
    assert matrix[0][1] == matrix[0][5] == "float8_e4m3fn"  # NVIDIA documents e4m3fn, torch on a CPU casts to it
    assert matrix[0][2] == matrix[2][3] == matrix[4][5] == "int8"  # which Ascend, which Hygon chip is not known
    assert describe(matrix, able, torch.bfloat16) == [
        "rows travel as float8_e4m3fn: ranks 0-1 and 5 with each other; one float32 scale per 128 values, approximated",
        "rows travel as int8: ranks 0-1 and 5 with 2-4, 2-4 with each other; one float32 scale per 128 values, "
        "approximated",
    ]


def test_fp8_is_e4m3fn_first_and_fnuz_where_that_is_what_both_have():
    fnuz = {**claimed(VENDORS["cpu"]), "float8_e4m3fn": "no"}
    able, names = [fnuz, fnuz, claimed(VENDORS["cpu"]), claimed(VENDORS["cpu"])], list("abcd")
    matrix = agree(("fp8",), able, torch.float32, names)
    assert (matrix[0][1], matrix[0][2], matrix[2][3]) == ("float8_e4m3fnuz", "float8_e4m3fnuz", "float8_e4m3fn")


def test_an_exact_format_that_is_not_documented_is_tried_and_said():
    able, names = world("cpu", "kunlunxin", "cpu", "intel")
    matrix = agree(("exact",), able, torch.bfloat16, names)
    assert describe(matrix, able, torch.bfloat16) == [
        "rows travel as bfloat16: ranks 0-3 with each other; exact; not documented for ranks 1 and 3, tried"
    ]
    able, names = able[:2], names[:2]
    assert describe(agree(("exact",), able, torch.float16, names), able, torch.float16) == [
        "rows travel as float16: ranks 0-1 with each other; exact; not documented for rank 1, tried"
    ]


def test_a_wider_documented_format_comes_before_a_trial():
    able, names = world("cpu", "cpu", "cpu", "kunlunxin")
    matrix = agree(("exact", "float32"), able, torch.bfloat16, names)
    assert describe(matrix, able, torch.bfloat16) == [
        "rows travel as bfloat16: ranks 0-2 with each other; exact",
        "rows travel as float32: ranks 0-2 with 3; exact",
    ]


def test_an_approximation_is_never_tried():
    able, names = world("cpu", "intel")  # nothing is documented for int8 there
    assert agree(("int8", "exact"), able, torch.float32, names)[0][1] == "float32"
    with pytest.raises(ConfigError):
        agree(("int8",), able, torch.float32, names)


def test_a_narrower_format_is_called_an_approximation():
    able, names = world("cpu", "cpu")
    assert describe(agree(("bfloat16",), able, torch.float32, names), able, torch.float32) == [
        "rows travel as bfloat16: ranks 0-1 with each other; narrower than float32, approximated"
    ]


def test_a_pair_without_a_format_is_named_with_what_each_can_and_what_to_set():
    able, _ = world("nvidia", "nvidia", "ascend")
    names = ["rank 0 (nvidia)", "rank 1 (nvidia)", "rank 2 (ascend, emulated)"]
    with pytest.raises(ConfigError) as refused:
        agree(("fp8",), able, torch.bfloat16, names)
    assert str(refused.value) == (
        "no wire format for rows of bfloat16 between two ranks, wanted fp8: rank 0 (nvidia) can float32, float16, "
        "bfloat16, float8_e4m3fn, int8, float64, unknown none; rank 2 (ascend, emulated) can float32, float16, "
        "bfloat16, int8, float64, unknown float8_e4m3fn; add one that both can to the wanted formats: float32 (exact), "
        "float16 (approximated), bfloat16 (exact), int8 (approximated), float64 (exact)"
    )


def test_float64_rows_do_not_go_to_a_vendor_that_narrows_them():
    able, names = world("cpu", "cambricon")
    with pytest.raises(ConfigError, match=r"rank 0 \(cpu\).*rank 1 \(cambricon\).*float32 \(approximated\)"):
        agree(("exact",), able, torch.float64, names)


@pytest.mark.parametrize(
    "wanted, dtype",
    [(("fp4",), torch.float32), ((), torch.float32), ("fp8", torch.float32), (("exact",), torch.int64),
     (("exact",), torch.float8_e4m3fn)],
)  # fmt: skip
def test_unknown_words_and_dtypes_are_refused_with_the_known_ones(wanted, dtype):
    with pytest.raises(ConfigError, match="exact, fp8, float32, float16, bfloat16, float8_e4m3fn, .*int8") as refused:
        agree(wanted, [claimed(VENDORS["cpu"])], dtype, ["rank 0"])
    assert "\n" not in str(refused.value)


def test_one_rank_and_no_rank_have_nothing_to_agree_on():
    assert agree(("int8",), [{}], torch.bfloat16, ["rank 0"]) == [["bfloat16"]]
    assert agree(("int8",), [], torch.bfloat16, []) == []
    assert describe([["bfloat16"]], [{}], torch.bfloat16) == describe([], [], torch.bfloat16) == []


WORDS = ["exact", "fp8", *FORMATS]
ANSWERS = st.dictionaries(st.sampled_from(list(FORMATS)), st.sampled_from(["yes", "no", UNKNOWN]))


def matrix_or_names(wanted, able, dtype, names):
    try:
        return agree(wanted, able, dtype, names)
    except ConfigError as error:
        return [name for name in names if name in str(error)]


@EXAMPLES
@given(
    able=st.lists(ANSWERS, max_size=5),
    wanted=st.lists(st.sampled_from(WORDS), min_size=1, max_size=3, unique=True),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_the_agreement_is_symmetric_fair_and_independent_of_the_order_of_ranks(able, wanted, dtype, data):
    names = [f"<rank {rank}>" for rank in range(len(able))]
    pairs = list(itertools.combinations(range(len(able)), 2))
    alone = {pair: matrix_or_names(wanted, [able[r] for r in pair], dtype, [names[r] for r in pair]) for pair in pairs}
    refused = [pair for pair in pairs if len(alone[pair]) != 2 or not isinstance(alone[pair][0], list)]
    assert all(alone[pair] == [names[r] for r in pair] for pair in refused)  # both are named
    whole = matrix_or_names(wanted, able, dtype, names)
    if refused:
        assert whole in [[names[r] for r in pair] for pair in refused]
        return
    for a, b in pairs:  # what two ranks agree on is their own affair
        assert whole[a][b] == whole[b][a] == alone[a, b][0][1]
        answers = {able[r].get(whole[a][b], UNKNOWN) for r in (a, b)}
        assert answers == {"yes"} or ("no" not in answers and is_exact(whole[a][b], dtype))
    order = data.draw(st.permutations(range(len(able))))
    shuffled = agree(wanted, [able[r] for r in order], dtype, [names[r] for r in order])
    assert shuffled == [[whole[a][b] for b in order] for a in order]


@EXAMPLES
@given(able=st.lists(ANSWERS, max_size=6), dtype=st.sampled_from(DTYPES))
def test_the_description_names_every_pair_once_and_every_trial(able, dtype):
    able = [{**answers, "float32": "yes"} for answers in able]
    matrix = agree(("fp8", "int8", "exact", "float32"), able, dtype, [""] * len(able))

    def ranks(spans: str) -> list[int]:
        ends = [[int(end) for end in span.split("-")] for span in spans.split(" and ")]
        return [rank for span in ends for rank in range(span[0], span[-1] + 1)]

    told = []
    for line in describe(matrix, able, dtype):
        what, loss, *trial = line.split("; ")
        name, groups = what.removeprefix("rows travel as ").split(": ranks ")
        pairs = []
        for one, other in (group.split(" with ") for group in groups.split(", ")):
            inside = itertools.combinations(ranks(one), 2)
            pairs += inside if other == "each other" else itertools.product(ranks(one), ranks(other))
        told += [(frozenset(pair), name) for pair in pairs]
        assert ("approximated" in loss) == (not is_exact(name, dtype))
        unsure = sorted({rank for pair in pairs for rank in pair if able[rank].get(name) != "yes"})
        assert [ranks(text.split(" ", 4)[4].removesuffix(", tried")) for text in trial] == ([unsure] if unsure else [])
    every = {(frozenset(pair), matrix[pair[0]][pair[1]]) for pair in itertools.combinations(range(len(able)), 2)}
    assert len(told) == len(every) and set(told) == every

"""What a row's hidden values travel as: the wire formats, who can handle which, and what each pair of ranks uses.

Owns the formats' arithmetic (torch only, any device) and the agreement, made once at start from what every rank said.
It sends nothing, quantises no weights, guesses no vendor's abilities, and approximates only where it was asked to.

Scaled formats carry one float32 scale per 128 consecutive values of a row. Sources: the 1x128 tiles of DeepSeek-V3's
FP8 activations (its technical report, section 3.3) and DeepEP's FP8 dispatch (tests/utils.py, per_token_cast_to_fp8).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..core.errors import ConfigError
from .quirks import dtype_name
from .vendors import UNKNOWN, Fact, Quirk, Vendor

BLOCK = 128  # consecutive values of a row that share one scale


@dataclass(frozen=True)
class WireFormat:
    """name, dtype: what a value travels as. largest: what a scaled block's largest absolute value becomes, or None."""

    name: str
    dtype: torch.dtype
    largest: float | None = None

    @property
    def scaled(self) -> bool:
        return self.largest is not None


# e4m3fn is the OCP format (bias 7); e4m3fnuz, of AMD's MI300X and Hygon's BW1100, has bias 8, one zero and one nan
# (arXiv 2206.02915), so that the same byte means half the value.
FORMATS: dict[str, WireFormat] = {
    dtype_name(dtype): WireFormat(dtype_name(dtype), dtype, largest)
    for dtype, largest in (
        (torch.float32, None),
        (torch.float16, None),
        (torch.bfloat16, None),
        (torch.float8_e4m3fn, 448.0),
        (torch.float8_e4m3fnuz, 240.0),
        (torch.int8, 127.0),
        (torch.float64, None),
    )
}
_UNSCALED = [name for name, fmt in FORMATS.items() if not fmt.scaled]


def payload_bytes(fmt: WireFormat, hidden: int) -> int:
    """Bytes of one row's `hidden` values; its scales, 4 bytes each, come on top."""
    return hidden * fmt.dtype.itemsize


def num_scales(fmt: WireFormat, hidden: int) -> int:
    """Scales of one row: one per BLOCK values, of which the last may be shorter; 0 for an unscaled format."""
    return -(-hidden // BLOCK) if fmt.scaled else 0


def is_exact(fmt_name: str, dtype: torch.dtype) -> bool:
    """Whether rows of `dtype` come back from the format `fmt_name` bit for bit (a wider float is exact too)."""
    fmt = FORMATS[fmt_name]
    return not fmt.scaled and torch.promote_types(dtype, fmt.dtype) == fmt.dtype


# ---------------------------------------------------------------- the arithmetic


def encode(x_NH: torch.Tensor, fmt: WireFormat) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x [N, H] of any float dtype to (payload [N, H] in fmt.dtype, scales [N, ceil(H/128)] float32, or None).

    Not differentiable. encode_into says what becomes of the values.
    """
    rows, hidden = x_NH.shape
    payload = x_NH.new_empty((rows, hidden), dtype=fmt.dtype)
    scales = x_NH.new_empty((rows, num_scales(fmt, hidden)), dtype=torch.float32) if fmt.scaled else None
    encode_into(x_NH, fmt, payload, scales)
    return payload, scales


@torch.no_grad()
def encode_into(
    x_NH: torch.Tensor, fmt: WireFormat, payload_out: torch.Tensor, scales_out: torch.Tensor | None
) -> None:
    """encode into given tensors, which may be strided views of packed rows; bit for bit the same as encode.

    Unscaled: a cast; what the format cannot hold becomes inf (float16 beyond 65504), never a clamped number.
    Scaled: scale = largest absolute value of the block / fmt.largest, at least float32's smallest normal number;
    value / scale is rounded half to even. A nan or inf, or what float32 cannot hold, makes the scale nan or inf and the
    payload 0, so that this block, all of it and no other, decodes to nan. ConfigError for outputs that do not fit.
    """
    _check(x_NH.shape, fmt, payload_out, scales_out)
    if fmt.largest is None or scales_out is None:
        payload_out.copy_(x_NH)
        return
    blocks = _in_blocks(x_NH)
    absmax = blocks.abs().amax(2)
    # A tensor, because a device may divide by a number as a product with its reciprocal, which gives other bits.
    # Smaller scales would be subnormal, which some devices flush to zero.
    scales = (absmax / absmax.new_full((), fmt.largest)).clamp_(min=torch.finfo(torch.float32).tiny)
    # The clamp is for devices that divide less exactly; nan becomes 0 because what int8 makes of it is undefined.
    blocks.div_(scales.unsqueeze(2)).clamp_(-fmt.largest, fmt.largest).nan_to_num_(nan=0.0)
    if not fmt.dtype.is_floating_point:
        blocks.round_()
    payload_out.copy_(blocks.flatten(1)[:, : x_NH.shape[1]])
    scales_out.copy_(scales)


def decode(payload: torch.Tensor, scales: torch.Tensor | None, fmt: WireFormat, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of encode: payload [N, H] and scales, both perhaps strided views, to contiguous [N, H] in `dtype`.

    Scaled formats multiply in float32, then cast. A payload that already is the answer is returned itself.
    ConfigError for tensors that are not of this format.
    """
    _check(payload.shape, fmt, payload, scales)
    if scales is None:
        return payload.to(dtype).contiguous()
    return _in_blocks(payload).mul_(scales.unsqueeze(2)).flatten(1)[:, : payload.shape[1]].to(dtype).contiguous()


def _in_blocks(x_NH: torch.Tensor) -> torch.Tensor:
    """[N, H] to new float32 [N, ceil(H/128), 128], the last block filled up with zeros."""
    missing = -x_NH.shape[1] % BLOCK
    values = x_NH.to(torch.float32, copy=not missing)
    if missing:
        values = torch.nn.functional.pad(values, (0, missing))
    return values.unflatten(1, (values.shape[1] // BLOCK, BLOCK))


def _check(shape: torch.Size, fmt: WireFormat, payload: torch.Tensor, scales: torch.Tensor | None) -> None:
    """copy_ and mul_ would cast and broadcast what does not fit."""
    needed = [(shape, fmt.dtype), ((shape[0], num_scales(fmt, shape[1])), torch.float32)][: 1 + fmt.scaled]
    given = [(tensor.shape, tensor.dtype) for tensor in (payload, scales) if tensor is not None]
    if given != needed:
        shown = (" and ".join(f"{list(size)} {dtype_name(dtype)}" for size, dtype in part) for part in (needed, given))
        raise ConfigError("rows of {} as {} are {}; got {}".format(list(shape), fmt.name, *shown))


# ---------------------------------------------------------------- who can handle what


def claimed(vendor: Vendor) -> dict[str, str]:
    """Format name -> "yes", "no" or "unknown": whether a rank of this vendor can write and read rows in that format.

    By the table alone: "yes" or "no" where every reading says so; which chip it is is not known here, so readings that
    differ are "unknown". An 8-bit float is a "no" where every documented chip computes with another variant or none.
    """
    # The CPU row's fp8 is about computing with it; torch's own casts, which the tests run, cover every format.
    if vendor.name == "cpu":
        return dict.fromkeys(FORMATS, "yes")
    moved = vendor.collective_dtypes
    return {
        # Needs no source: routing weights and scales travel as float32 and every sum of rows is made in it, so a rank
        # without float32 could not run this package at all.
        "float32": "yes",
        "float16": _stated(moved, lambda names: "float16" in names),
        "bfloat16": _stated(vendor.bf16, lambda value: value == "yes"),
        "float8_e4m3fn": _stated(vendor.fp8, lambda variant: variant == "e4m3fn"),
        "float8_e4m3fnuz": _stated(vendor.fp8, lambda variant: variant == "e4m3fnuz"),
        "int8": _stated(vendor.int8, lambda value: value == "yes"),
        "float64": "no" if Quirk.NO_FLOAT64 in vendor.quirks else _stated(moved, lambda names: "float64" in names),
    }


def seen(claims: Mapping[str, str], device: torch.device) -> dict[str, str]:
    """`claims` where a format that is unknown has been tried on this device: "yes" where casts there give the CPU's.

    For real devices: an emulated one can do whatever the CPU can.
    """
    values = torch.tensor([0.0, 1.0, -1.5, 0.0625, 127.0])

    def works(fmt: WireFormat) -> bool:
        try:
            return torch.equal(values.to(device).to(fmt.dtype).float().cpu(), values.to(fmt.dtype).float())
        except (RuntimeError, NotImplementedError, TypeError):
            return False

    return {name: "yes" if said == UNKNOWN and works(FORMATS[name]) else said for name, said in claims.items()}


def _stated(stated: Fact, holds: Callable[[Any], bool]) -> str:
    answers = {UNKNOWN if value == UNKNOWN else "yes" if holds(value) else "no" for value in stated.values}
    return answers.pop() if len(answers) == 1 else UNKNOWN


# ---------------------------------------------------------------- the agreement

Able = Sequence[Mapping[str, str]]  # for each rank, what `claimed` says there; a format that is missing is unknown


def agree(wanted: Sequence[str], able: Able, dtype: torch.dtype, names: Sequence[str]) -> list[list[str]]:
    """Format names [R][R] for rows of `dtype`: symmetric; the diagonal is the rows' own dtype, as nothing is sent.

    wanted, best first: names of FORMATS, "fp8" (either 8-bit float, e4m3fn first) or "exact" (the rows' own dtype).
    names[r]: how errors call rank r, such as "rank 2 (ascend, emulated)". A pair takes the first format that both can;
    if there is none, the first exact one that neither cannot: that is tried, and `describe` says so.

    Raises ConfigError for an unknown word, and for a pair without a format, naming both ranks and what to set.
    """
    own = dtype_name(dtype)
    words = {"exact": (own,), "fp8": ("float8_e4m3fn", "float8_e4m3fnuz"), **{name: (name,) for name in FORMATS}}
    if own not in _UNSCALED or not wanted or not set(wanted) <= set(words):
        raise ConfigError(
            f"wire formats {list(wanted)} for rows of {own}: rows are one of {', '.join(_UNSCALED)}, and the formats "
            f"one or more of {', '.join(words)}"
        )
    candidates = [name for word in wanted for name in words[word]]
    exact = [name for name in candidates if is_exact(name, dtype)]
    matrix = [[own] * len(able) for _ in able]
    for a, b in itertools.combinations(range(len(able)), 2):
        answers = {name: {able[a].get(name, UNKNOWN), able[b].get(name, UNKNOWN)} for name in FORMATS}
        both = [name for name in candidates if answers[name] == {"yes"}]
        tried = [name for name in exact if "no" not in answers[name]]
        if not both + tried:
            can = (f"{names[rank]} can {_said(able[rank], 'yes')}, unknown {_said(able[rank])}" for rank in (a, b))
            common = [name for name in FORMATS if answers[name] == {"yes"}]
            shown = (f"{name} ({'exact' if is_exact(name, dtype) else 'approximated'})" for name in common)
            raise ConfigError(
                f"no wire format for rows of {own} between two ranks, wanted {', '.join(wanted)}: {'; '.join(can)}; "
                f"add one that both can to the wanted formats: {', '.join(shown) or 'none'}"
            )
        matrix[a][b] = matrix[b][a] = (both + tried)[0]
    return matrix


def _said(answers: Mapping[str, str], answer: str = UNKNOWN) -> str:
    return ", ".join(name for name in FORMATS if answers.get(name, UNKNOWN) == answer) or "none"


def describe(matrix: Sequence[Sequence[str]], able: Able, dtype: torch.dtype) -> list[str]:
    """One line for people per format in use: between whom, whether it approximates, for whom it is not documented."""
    used: dict[str, list[tuple[list[int], list[int]]]] = {}
    for one, other in itertools.combinations_with_replacement(_twins(matrix), 2):
        if one is not other or len(one) > 1:
            used.setdefault(matrix[one[0]][other[-1]], []).append((one, other))
    lines = []
    for name, pairs in used.items():
        between = (f"{_spans(a)} with {'each other' if a is b else _spans(b)}" for a, b in pairs)
        loss = "exact" if is_exact(name, dtype) else f"narrower than {dtype_name(dtype)}, approximated"
        if FORMATS[name].scaled:
            loss = f"one float32 scale per {BLOCK} values, approximated"
        tried = {rank for pair in pairs for rank in itertools.chain(*pair) if able[rank].get(name) != "yes"}
        trial = f"; not documented for rank{'s' * (len(tried) > 1)} {_spans(sorted(tried))}, tried" if tried else ""
        lines.append(f"rows travel as {name}: ranks {', '.join(between)}; {loss}{trial}")
    return lines


def _twins(matrix: Sequence[Sequence[str]]) -> list[list[int]]:
    """Ranks in classes that use the same format with every other rank; all pairs between two classes are then alike."""
    classes: list[list[int]] = []
    for rank, row in enumerate(matrix):
        for ranks in classes:
            if all(row[r] == matrix[ranks[0]][r] for r in range(len(matrix)) if r not in (rank, ranks[0])):
                ranks.append(rank)
                break
        else:
            classes.append([rank])
    return classes


def _spans(ranks: Sequence[int]) -> str:
    """Sorted [0, 1, 2, 5] as "0-2 and 5"."""
    starts = [rank for rank in ranks if rank - 1 not in ranks]
    ends = [rank for rank in ranks if rank + 1 not in ranks]
    return " and ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))

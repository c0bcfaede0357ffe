"""Pure: what the vendor table claims, for each probe. No claim is made here that the table does not make.

A quirk is a claim of its own beside the readings of a fact, since it may hold for some chips and versions only. No
claims at all means that the table has no such fact; a claim without results, that it says "unknown".
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from ...comm.formats import claimed as formats_claimed
from ...comm.quirks import NOT_REDUCED
from ...comm.vendors import UNKNOWN, Fact, Quirk, Vendor
from .verdicts import HUNG, REFUSED, WORKS, WRONG, Claim

Claims = tuple[Claim, ...]
NOT_AS_IT_IS = frozenset({REFUSED, WRONG})  # refused, or narrowed without a word


def show(value: Any) -> str:
    """A value of the table as the report spells it."""
    if isinstance(value, frozenset):
        value = sorted(value)
    return (", ".join(value) or "none needed") if isinstance(value, (tuple, list)) else str(value)


def value_of(fact: Fact, accepts: Callable[[Any], Collection[str]] | None = None) -> Claims:
    """Claims of a fact whose value itself is seen; `accepts` says which results agree with a reading."""
    return _claims(fact, accepts or (lambda value: (show(value),)), show)


def moves(vendor: Vendor, dtype: str) -> Claims:
    """Whether all-to-all takes this dtype as it is."""
    return _listed(vendor.collective_dtypes, dtype) + _quirks(vendor, {Quirk.NO_FLOAT64: ("float64",)}, dtype)


def reduces(vendor: Vendor, dtype: str) -> Claims:
    """Whether all-reduce takes this dtype; where nothing is stated apart, the types of the library are the claim."""
    stated = vendor.reduce_dtypes if vendor.reduce_dtypes.is_known else vendor.collective_dtypes
    return _listed(stated, dtype) + _quirks(vendor, NOT_REDUCED, dtype)


def uneven(vendor: Vendor, presized: bool) -> Claims:
    """Uneven all-to-all. presized: whether the variable that sizes the library's buffer is set."""
    if Quirk.UNEVEN_SPLITS_UNSTATED in vendor.quirks:
        return _quirk(vendor, Quirk.UNEVEN_SPLITS_UNSTATED, UNKNOWN, None)
    if Quirk.PRESIZED_ALLTOALLV in vendor.quirks and not presized:
        return _quirk(vendor, Quirk.PRESIZED_ALLTOALLV, "no: its buffer has no size", {REFUSED, WRONG, HUNG})
    return _claims(vendor.uneven_all_to_all, lambda _: (WORKS,), show)


def strided(vendor: Vendor) -> Claims:
    """Tensors that are not contiguous."""
    return _quirk(vendor, Quirk.CONTIGUOUS_ONLY, "contiguous tensors only", NOT_AS_IT_IS) or _unstated()


def odd_sizes(vendor: Vendor) -> Claims:
    """Messages whose size is no multiple of 512 bytes; nothing is claimed of vendors without the quirk."""
    return _quirk(vendor, Quirk.SIZES_PAD_512, "multiples of 512 bytes only", NOT_AS_IT_IS)


def average(vendor: Vendor) -> Claims:
    """The plug-in may divide by itself or leave that to the caller; the table does not tell these apart."""
    return _quirk(vendor, Quirk.AVG_BY_SUM, "by a sum, then divided", {WORKS, REFUSED}) or _unstated()


def any_source(vendor: Vendor) -> Claims:
    return _quirk(vendor, Quirk.NO_RECV_ANY_SOURCE, "not there", {REFUSED}) or _unstated()


def gather(vendor: Vendor) -> Claims:
    return _quirk(vendor, Quirk.NO_GATHER, "missing or unverified", None) or _unstated()


def batch(vendor: Vendor) -> Claims:
    return _quirk(vendor, Quirk.NO_P2P_BATCH, "unverified", None) or _unstated()


def stores(vendor: Vendor, dtype: str) -> Claims:
    """Whether the device stores this dtype and casts to it.

    What a chip computes with it stores; that it computes with another 8-bit float, or none, says nothing of storing.
    """
    if dtype == "bfloat16":
        return value_of(vendor.bf16, lambda value: (WORKS,) if value == "yes" else NOT_AS_IT_IS)
    if dtype == "int8":
        return value_of(vendor.int8, lambda value: (WORKS,) if value == "yes" else NOT_AS_IT_IS)
    if dtype.startswith("float8_"):
        variant = dtype.removeprefix("float8_")
        return _claims(vendor.fp8, lambda value: (WORKS,) if value == variant else None, show)
    if dtype == "float64":
        return _quirk(vendor, Quirk.NO_FLOAT64, "refused or narrowed", NOT_AS_IT_IS) or _unstated()
    return ()


def wire_format(vendor: Vendor, name: str) -> Claims:
    """Whether rows are packed and unpacked in a wire format; a "no" is formats.py's choice, not a fact about a chip."""
    facts = {"int8": vendor.int8, "bfloat16": vendor.bf16}
    source = facts.get(name, vendor.fp8 if name.startswith("float8_") else vendor.collective_dtypes).readings[0]
    yes = formats_claimed(vendor)[name] == "yes"
    said = "yes" if yes else UNKNOWN
    return (Claim(said, frozenset({WORKS}) if yes else None, source.source, source.confidence),)


def _listed(fact: Fact, dtype: str) -> Claims:
    """A list of dtypes is taken as exact: what is not on it is claimed to be refused."""
    return _claims(
        fact,
        lambda names: (WORKS,) if dtype in names else (REFUSED,),
        lambda names: WORKS if dtype in names else REFUSED,
    )


def _claims(fact: Fact, accepts: Callable[[Any], Collection[str] | None], say: Callable[[Any], str]) -> Claims:
    made = []
    for reading in fact.readings:
        is_known = reading.value != UNKNOWN
        results = accepts(reading.value) if is_known else None
        said = say(reading.value) if is_known else UNKNOWN
        made.append(
            Claim(
                said,
                None if results is None else frozenset(results),
                reading.source,
                reading.confidence,
                reading.when,
            )
        )
    return tuple(made)


def _quirks(vendor: Vendor, quirks: Mapping[Quirk, Collection[str]], dtype: str) -> Claims:
    return tuple(
        claim
        for quirk, dtypes in quirks.items()
        if dtype in dtypes
        for claim in _quirk(vendor, quirk, "refused or altered", NOT_AS_IT_IS)
    )


def _quirk(vendor: Vendor, quirk: Quirk, said: str, results: Collection[str] | None) -> Claims:
    if quirk not in vendor.quirks:
        return ()
    # The table gives quirks a source, and no confidence apart from it.
    agreed = None if results is None else frozenset(results)
    return (Claim(said, agreed, quirk.sources[vendor.name], "not graded", f"quirk {quirk.name}"),)


def _unstated() -> Claims:
    return (Claim(UNKNOWN, None, "no source found", "none"),)

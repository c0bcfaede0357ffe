"""Pure: from what is claimed and what was seen to a verdict and a row of the report. Nothing here runs anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

GROUPS = ("cluster", "device", "collectives", "transport", "dispatch", "measured")

# Results of a probe. Facts have others: the value that was seen, such as "npu".
WORKS, WRONG, REFUSED, MIXED = "works", "wrong", "refused", "mixed"
HUNG, LOST = "hung", "lost"  # the probe did not end: nothing that comes after it can be trusted
MEASURED, SKIPPED = "measured", "skipped"
ENDLESS = frozenset({HUNG, LOST})

AS_CLAIMED, DIFFERS, NEW, PASSED, FAILED = "as claimed", "differs", "new", "passed", "failed"
_NO_EVIDENCE = "skipped: nothing is claimed, and an emulation is no evidence"
_NOT_NEEDED = "skipped: nothing is claimed, and nothing needs it"
_HOSTS = "skipped: an emulated device computes as its host does"


@dataclass(frozen=True)
class Claim:
    """One reading of the vendor table for one probe. results: those that agree with it; None: it says nothing."""

    said: str
    results: frozenset[str] | None
    source: str
    confidence: str
    when: str = ""

    def __str__(self) -> str:
        return self.said + (f" ({self.when})" if self.when else "")


@dataclass(frozen=True)
class Outcome:
    """What a probe found on one rank. seen: for people. figures: (value, unit), where something was measured."""

    result: str
    seen: str = ""
    figures: tuple[tuple[float, str], ...] = ()


@dataclass(frozen=True)
class Subject:
    """What a verdict depends on beside claim and result.

    required: the runtime itself needs the probe to work. emulated: no chip was there. chip: a vendor's own, so that
    what nobody has claimed yet is news. numerics: only a chip's own arithmetic can answer.
    """

    required: bool = False
    emulated: bool = False
    chip: bool = True
    numerics: bool = False


def judge(claims: Sequence[Claim], result: str, subject: Subject, why_skipped: str = "") -> tuple[str, str]:
    """(verdict, which reading it matches, or "")."""
    if result == SKIPPED:
        return f"skipped: {why_skipped}", ""
    if result in ENDLESS:
        return FAILED, ""
    if result == MEASURED:
        return MEASURED, ""
    known = [claim for claim in claims if claim.results is not None]
    matching = [claim for claim in known if result in (claim.results or ())]
    if matching:
        told = "; ".join(dict.fromkeys(claim.when or claim.source for claim in matching))
        return AS_CLAIMED, told if len(matching) < len(claims) else ""
    if known and subject.emulated and subject.numerics:
        return _HOSTS, ""
    if len(known) == len(claims) > 0:
        return DIFFERS, ""
    if subject.required:
        return (PASSED if result == WORKS else FAILED), ""
    if subject.chip:
        return NEW, ""
    return (_NO_EVIDENCE if subject.emulated else _NOT_NEEDED), ""


def merge(outcomes: Iterable[Outcome]) -> str:
    """One result for several ranks: theirs where they agree. A rank that skipped counts only where all did."""
    results = [outcome.result for outcome in outcomes]
    for endless in (LOST, HUNG):
        if endless in results:
            return endless
    ran = {result for result in results if result != SKIPPED}
    return SKIPPED if not ran else ran.pop() if len(ran) == 1 else MIXED


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    group: str
    what: str
    vendor: str
    claimed: str
    confidence: str
    source: str
    seen: str
    verdict: str
    emulated: bool
    rank_details: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_row(
    group: str,
    what: str,
    vendor: str,
    claims: Sequence[Claim],
    outcomes: Mapping[int, Outcome],
    subject: Subject,
) -> Row:
    """The row of one probe from what each rank found. vendor: the kind of the ranks it ran on."""
    result = merge(outcomes.values())
    skipped = next((outcome.seen for outcome in outcomes.values() if outcome.result == SKIPPED), "")
    verdict, reading = judge(claims, result, subject, skipped)
    seen = "" if result == SKIPPED else _seen(outcomes)
    if subject.emulated and any(outcome.figures for outcome in outcomes.values()):
        seen += " (emulated: host memory of this machine)"
    if reading:
        seen += f" [matches the reading: {reading}]"
    return Row(
        group=group,
        what=what,
        vendor=vendor,
        claimed="; ".join(map(str, claims)) or "-",
        confidence="; ".join(dict.fromkeys(claim.confidence for claim in claims)),
        source="; ".join(dict.fromkeys(claim.source for claim in claims)),
        seen=seen,
        verdict=verdict,
        emulated=subject.emulated,
        rank_details=[
            {
                "rank": rank,
                "result": outcome.result,
                "seen": outcome.seen,
                "figures": [list(f) for f in outcome.figures],
            }
            for rank, outcome in outcomes.items()
        ],
    )


def _seen(outcomes: Mapping[int, Outcome]) -> str:
    figures = [outcome.figures for outcome in outcomes.values() if outcome.figures]
    if figures:
        return ", ".join(_range([value for value, _ in column], column[0][1]) for column in zip(*figures, strict=True))
    texts = {rank: outcome.seen or outcome.result for rank, outcome in outcomes.items() if outcome.result != SKIPPED}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"rank {rank}: {text}" for rank, text in texts.items())


_SMALLER = {"GB/s": ("MB/s", 1e3), "TFLOP/s": ("GFLOP/s", 1e3)}


def _range(values: Sequence[float], unit: str) -> str:
    if max(values) < 0.1 and unit in _SMALLER:
        unit, factor = _SMALLER[unit]
        values = [value * factor for value in values]
    low, high = (f"{value:.3g}" if value < 100 else f"{value:,.0f}" for value in (min(values), max(values)))
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"


def exit_code(verdicts: Iterable[str]) -> int:
    """0 when nothing failed and nothing differs from its claim."""
    return int(any(verdict in (FAILED, DIFFERS) for verdict in verdicts))


def summary(verdicts: Iterable[str]) -> str:
    """Such as "41 as claimed, 2 differs, 9 measured, 3 skipped"."""
    counts = Counter(verdict.split(":")[0] for verdict in verdicts)
    order = (AS_CLAIMED, PASSED, MEASURED, NEW, DIFFERS, FAILED, SKIPPED)
    return ", ".join(f"{counts[name]} {name}" for name in order if counts[name]) or "nothing was run"

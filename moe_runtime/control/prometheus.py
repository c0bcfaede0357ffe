"""A job in Prometheus' text format 0.0.4, from what Coordinator.status() says. Pure.

The format: https://prometheus.io/docs/instrumenting/exposition_formats/. docs/metrics.md has the same table for people;
names follow https://prometheus.io/docs/practices/naming/ (base units, `_total` for counters).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Sample = tuple[dict[str, Any], Any]  # labels, value
Status = Mapping[str, Any]


@dataclass(frozen=True)
class Metric:
    """name: without `moe_runtime_`. read: its samples, from a status."""

    name: str
    kind: str
    help: str
    read: Callable[[Status], Iterable[Sample]]


def render(status: Status) -> str:
    """The whole answer of /metrics."""
    lines = []
    for metric in METRICS:
        samples = [(labels, value) for labels, value in metric.read(status) if isinstance(value, (int, float))]
        if samples:
            name = f"moe_runtime_{metric.name}"
            lines += [f"# HELP {name} {metric.help}", f"# TYPE {name} {metric.kind}"]
            lines += [f"{name}{_labels(labels)} {_number(value)}" for labels, value in samples]
    return "".join(f"{line}\n" for line in lines)


def _labels(labels: Mapping[str, Any]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(str(value))}"' for name, value in labels.items()) + "}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    """Python's NaN and infinities are spelled as the format wants them by Go: NaN, +Inf, -Inf."""
    text = repr(float(value)) if isinstance(value, float) else str(int(value))
    return {"nan": "NaN", "inf": "+Inf", "-inf": "-Inf"}.get(text, text)


def _of_job(read: Callable[[Status], Any]) -> Callable[[Status], Iterable[Sample]]:
    return lambda status: [({}, read(status))]


def _of_ranks(read: Callable[[Mapping[str, Any]], Any]) -> Callable[[Status], Iterable[Sample]]:
    return lambda status: [(_names(rank), read(rank)) for rank in status["ranks"]]


def _counted(name: str) -> Callable[[Status], Iterable[Sample]]:
    """What each rank counts under this name (metrics.py)."""
    return _of_ranks(lambda rank: rank["metrics"].get(name))


def _waits(status: Status) -> Iterable[Sample]:
    for rank in status["ranks"]:
        waits = rank["metrics"].get("wait_s")
        for peer, seconds in waits.items() if isinstance(waits, dict) else ():
            yield {**_names(rank), "peer": peer}, seconds


def _slow(status: Status) -> Iterable[Sample]:
    hosts = {rank["rank"]: rank["host"] for rank in status["ranks"]}
    for one in status["slow"]:
        yield {"rank": one["rank"], "host": hosts.get(one["rank"], ""), "kind": one["kind"]}, one["ratio"]


def _names(rank: Mapping[str, Any]) -> dict[str, Any]:
    return {"rank": rank["rank"], "host": rank["host"]}


METRICS = [
    Metric("up", "gauge", "1 while the job runs", _of_job(lambda status: int(status["state"] == "running"))),
    Metric("view_number", "gauge", "Number of the view in force", _of_job(lambda status: status["view"])),
    Metric("view_members", "gauge", "Ranks in the view", _of_job(lambda status: len(status["members"]))),
    Metric("view_settled", "gauge", "1 when all ranks of the view work in it", _of_job(lambda s: int(s["settled"]))),
    Metric("outages_total", "counter", "Losses that are over", _of_job(lambda status: len(status["outages"]))),
    Metric(
        "outage_seconds_total",
        "counter",
        "Seconds from a loss until all ranks left work again",
        _of_job(lambda status: sum(map(float, status["outages"]))),
    ),
    Metric(
        "refused_messages_total",
        "counter",
        "Messages to the coordinator that it could not take",
        _of_job(lambda status: sum(status["refused"].values())),
    ),
    Metric(
        "rank_member",
        "gauge",
        "1 for ranks of the view",
        lambda status: [(_names(rank), int(rank["rank"] in status["members"])) for rank in status["ranks"]],
    ),
    Metric("rank_heard_seconds", "gauge", "Seconds since the rank was heard of", _of_ranks(lambda r: r["heard_s"])),
    Metric("rank_slow_ratio", "gauge", "How much a rank holds the others up, to their median, by kind", _slow),
    Metric("forward_passes_total", "counter", "Forward passes, those without own tokens too", _counted("passes")),
    Metric("generated_tokens_total", "counter", "Tokens generated", _counted("tokens")),
    Metric("requests_total", "counter", "Requests that have ended", _counted("requests")),
    Metric("expert_rows_total", "counter", "Rows (token, expert) computed", _counted("rows")),
    Metric("expert_seconds_total", "counter", "Seconds of computing experts", _counted("experts_s")),
    Metric("dispatch_seconds_total", "counter", "Seconds in dispatch, waits included", _counted("dispatch_s")),
    Metric("combine_seconds_total", "counter", "Seconds in combine, waits included", _counted("combine_s")),
    Metric("peer_wait_seconds_total", "counter", "Seconds of waiting for a peer's rows", _waits),
    Metric("sent_rows_total", "counter", "Rows dispatched to other ranks", _counted("rows_sent")),
    Metric("received_rows_total", "counter", "Rows dispatched here by other ranks", _counted("rows_received")),
    Metric("dropped_selections_total", "counter", "Selections of experts that no rank held", _counted("dropped")),
    Metric(
        "renormalised_tokens_total",
        "counter",
        "Tokens, in each layer, that went on with the weights of the experts left",
        _counted("renormalised"),
    ),
    Metric("resident_memory_bytes", "gauge", "Resident memory of the rank's process", _counted("memory_bytes")),
    Metric("threads", "gauge", "Threads of the rank's process", _counted("threads")),
    Metric("open_files", "gauge", "Open file descriptors of the rank's process", _counted("open_files")),
]

"""/metrics: what Prometheus' own parser reads there, the documents' tables, and what the endpoint answers to whom."""

from __future__ import annotations

import ast
import inspect
import math
import re
import socket
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from moe_runtime.control import coordinator, prometheus
from moe_runtime.control.coordinator import Coordinator
from moe_runtime.control.endpoint import Endpoint, answer
from moe_runtime.control.slow import Slow
from moe_runtime.control.words import PROTOCOL
from moe_runtime.core.errors import ConfigError
from moe_runtime.launch.machine import free_port

DOCS = Path(__file__).resolve().parent.parent / "docs"
ODD = 'a "host"\\ of\ntwo lines'


def counters(rank: int) -> dict:
    return {
        "passes": 10, "tokens": 7 + rank, "requests": 2, "rows": 640, "rows_sent": 300, "rows_received": 310,
        "experts_s": 1.5, "dispatch_s": 0.25, "combine_s": 0.125, "dropped": 0, "renormalised": 0,
        "wait_s": {1 - rank: 0.75}, "waits_exact": True, "speed": 1.0, "memory_bytes": 1 << 30, "threads": 9,
        "open_files": 20,
    }  # fmt: skip


def status(*metrics: dict) -> dict:
    """What a coordinator says whose ranks have said hello and beaten."""
    job = Coordinator(len(metrics), 3.0, 0.0)
    for number, told in enumerate(metrics):
        about = {"protocol": PROTOCOL, "rank": number, "mark": "m"}
        hello = {"kind": "hello", "host": ODD, "pid": 1, "view": 0, "members": [], "pids": [], "settled": False}
        job.receive(b"%d" % number, {**about, **hello}, 1.0)
        job.receive(b"%d" % number, {**about, "kind": "beat", "view": 0, "knows": 0, "time": 1.0, "metrics": told}, 1.5)
    job.tick(1.6)
    job.outages += [0.5, 0.25]
    job.watch.slow[1, "link"] = Slow(1, "link", 4.5, "why")
    return job.status(2.0)


def test_prometheus_own_parser_reads_every_metric_with_its_labels():
    text = prometheus.render(status(counters(0), counters(1)))
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert set(families) == {f"moe_runtime_{m.name.removesuffix('_total')}" for m in prometheus.METRICS}
    for metric in prometheus.METRICS:
        family = families[f"moe_runtime_{metric.name.removesuffix('_total')}"]
        assert (family.type, family.documentation) == (metric.kind, metric.help)
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert all(sample.name == f"moe_runtime_{metric.name}" for sample in family.samples)

    def values(name: str) -> dict:
        return {tuple(sample.labels.items()): sample.value for sample in families[f"moe_runtime_{name}"].samples}

    one, other = ({"rank": str(n), "host": ODD} for n in (0, 1))
    assert values("generated_tokens") == {tuple(one.items()): 7, tuple(other.items()): 8}
    assert values("peer_wait_seconds")[tuple({**one, "peer": "1"}.items())] == 0.75
    assert values("rank_slow_ratio") == {tuple({**other, "kind": "link"}.items()): 4.5}
    assert values("outage_seconds") == {(): 0.75} and values("outages") == {(): 2} and values("up") == {(): 1}
    assert values("resident_memory_bytes")[tuple(one.items())] == 1 << 30


def test_ranks_that_say_nothing_or_nonsense_leave_the_rest_readable():
    odd = {"tokens": "many", "wait_s": 3, "experts_s": math.nan, "dispatch_s": math.inf, "rows": None}
    families = list(text_string_to_metric_families(prometheus.render(status({}, odd))))
    found = {sample.name: sample.value for family in families for sample in family.samples}
    assert math.isnan(found["moe_runtime_expert_seconds_total"])
    assert found["moe_runtime_dispatch_seconds_total"] == math.inf
    assert "moe_runtime_generated_tokens_total" not in found and found["moe_runtime_view_members"] == 2


def rows(document: str, heading: str) -> list[list[str]]:
    """A table's rows of a document, by its first column's heading."""
    table = (DOCS / document).read_text().partition(f"| {heading} |")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]


def test_the_table_of_metrics_is_what_is_rendered():
    table = [(name.strip("`| "), kind, told.rstrip("| ")) for name, kind, _, told in rows("metrics.md", "metric")]
    assert table == [(f"moe_runtime_{metric.name}", metric.kind, metric.help) for metric in prometheus.METRICS]
    for name, kind, unit, _ in rows("metrics.md", "metric"):
        base = name.strip("`| ").removesuffix("_total")
        assert kind in ("counter", "gauge") and (unit in base or unit in ("0 or 1", "number", "ranks")), name


def test_the_table_of_events_is_what_the_coordinator_can_say():
    said: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(inspect.getsource(coordinator))):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "_event":
            fields = {word.arg for word in node.keywords if word.arg}
            said.setdefault(node.args[0].value, set()).update(fields)
    said["slow"] |= {"rank", "slow", "ratio", "why", "over"}  # given as a map; test_slow.py has it
    table = {kind.strip("`| "): set(re.findall(r"`(\w+)`", fields)) for kind, fields, _ in rows("metrics.md", "event")}
    assert table == said


def test_the_table_of_a_hang_report_is_what_is_in_one():
    job = Coordinator(1, 3.0, 0.0)
    job._report_hang([], None, "why", 1.0)
    [report] = job.reports
    documented = [row[0].strip("`| ") for row in rows("hangs.md", "field")]
    assert documented[0] == "at" and set(documented[1:]) == set(report)  # `at` is the log's


def ask(port: int, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(request)
        got = b""
        while more := connection.recv(1 << 16):
            got += more
    return got


@pytest.fixture
def endpoint():
    made = Endpoint("127.0.0.1", 0)
    made.status = status(counters(0), counters(1))
    yield made
    made.close()


@pytest.mark.parametrize(("request_line", "code"), [
    (b"GET /metrics HTTP/1.1", 200), (b"HEAD /metrics HTTP/1.1", 200), (b"GET /metrics?x=1 HTTP/1.0", 200),
    (b"GET / HTTP/1.1", 404), (b"GET /metrics/ HTTP/1.1", 404), (b"GET /../etc/passwd HTTP/1.1", 404),
    (b"POST /metrics HTTP/1.1", 405), (b"DELETE /metrics HTTP/1.1", 405), (b"nonsense", 400), (b"\xff\xfe\x00", 400),
    (b"GET /" + b"a" * 10000 + b" HTTP/1.1", 431),
])  # fmt: skip
def test_metrics_and_nothing_else(endpoint, request_line, code):
    got = ask(endpoint.port, request_line + b"\r\nHost: x\r\n\r\n")
    head, _, body = got.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % code) and b"Connection: close" in head
    length = int(re.search(rb"Content-Length: (\d+)", head)[1])
    assert length == len(body) or (request_line.startswith(b"HEAD") and not body and length > 1000)
    assert (b"Allow: GET, HEAD" in head) == (code == 405)
    if code == 200:
        assert prometheus.CONTENT_TYPE.encode() in head


def test_who_sends_nothing_or_hangs_up_holds_nobody_up_for_long(endpoint):
    silent = [socket.create_connection(("127.0.0.1", endpoint.port)) for _ in range(2)]
    socket.create_connection(("127.0.0.1", endpoint.port)).close()
    silent[1].sendall(b"GET /met")
    began = time.monotonic()
    assert ask(endpoint.port, b"GET /metrics HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 200")
    assert time.monotonic() - began < 4.0
    for connection in silent:
        connection.close()


def test_before_the_first_snapshot_it_says_so():
    assert answer(b"GET /metrics HTTP/1.1\r\n\r\n", None).startswith(b"HTTP/1.1 503")


def test_it_listens_on_no_more_than_it_is_told(endpoint):
    with pytest.raises(ConfigError, match="is all interfaces"):
        Endpoint("0.0.0.0", free_port())
    with pytest.raises(ConfigError, match=f"cannot listen at 127.0.0.1:{endpoint.port}"):
        Endpoint("127.0.0.1", endpoint.port)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", endpoint.port), timeout=2)

"""The controller of a job over several hosts, as a pure state machine and over real sockets."""

from __future__ import annotations

import dataclasses
import time

import pytest

from moe_runtime.core.cluster import Node
from moe_runtime.core.errors import ConfigError
from moe_runtime.launch import devices, reach
from moe_runtime.launch.control import SILENCE_S, TRYING_S, Controller, Link, from_frames, serve, to_bytes
from moe_runtime.launch.machine import free_port
from moe_runtime.launch.preflight import checkpoint_bytes, look, malformed, tight, verdicts

SECRET = b"a secret"


def controller(*names, wait_s=10.0, check=lambda facts: [], targets=lambda facts: []):
    start = {"store_port": 1}
    return Controller(list(names), check, lambda: start, wait_s, shutdown_s=1.0, now=0.0, targets=targets)


def trying(*names):
    """A job whose nodes have all come and are told to try the ways to each other."""
    job = controller(*names, targets=lambda facts: reach.targets(names, facts))
    for n in range(len(names)):
        out = job.receive(b"%d" % n, hello(n), 1.0)
    assert kinds(out) == ["try"] * len(names)
    return job, [message["targets"] for _, message in out]


def hello(node, mark="m", host="h"):
    facts = {"host": host, "address": f"10.0.0.{node}", "door": 40000 + node}
    return {"kind": "hello", "node": node, "mark": f"{mark}{node}", "host": host, "facts": facts}


def tried(node, *unreachable):
    return {"kind": "tried", "node": node, "mark": f"m{node}", "unreachable": list(unreachable)}


def beat(node, **more):
    return {"kind": "beat", "node": node, "mark": f"m{node}", **more}


def kinds(out):
    return [message["kind"] for _, message in out]


def running(*names):
    job = controller(*names)
    for n in range(len(names)):
        out = job.receive(b"%d" % n, hello(n), 1.0)
    assert kinds(out) == ["go"] * len(names)
    return job


def test_a_job_starts_when_all_are_here_and_ends_when_all_have_ended_well():
    job = controller("a", "b")
    assert job.receive(b"0", hello(0), 1.0) == [(b"0", {"kind": "wait", "missing": ["b"]})]
    assert kinds(job.receive(b"1", hello(1), 2.0)) == ["go", "go"]
    assert kinds(job.receive(b"0", beat(0, code=0), 3.0)) == ["go"]
    assert not job.tick(3.5)
    job.receive(b"1", beat(1, code=0), 4.0)
    assert [m["code"] for _, m in job.tick(4.0)] == [0, 0]
    assert not job.is_over(4.0)
    for n in (0, 1):
        job.receive(b"%d" % n, {"kind": "gone", "node": n, "mark": f"m{n}"}, 5.0)
    assert job.is_over(5.0)


@pytest.mark.parametrize(("may", "code", "again"), [(True, 137, True), (False, 137, False), (True, 2, False)])
def test_a_failed_rank_starts_all_again_where_that_may_help(may, code, again):
    job = Controller(["a", "b"], lambda facts: [], lambda: {}, 10.0, 1.0, 0.0, may)
    for n in (0, 1):
        job.receive(b"%d" % n, hello(n), 1.0)
    job.receive(b"1", beat(1, code=code, why="rank 1 failed", blames_peer=False), 2.0)
    assert [(m["kind"], m["code"], m["restart"]) for _, m in job.tick(2.0)] == [("stop", code, again)] * 2


def test_a_lost_host_starts_nothing_again():
    job = Controller(["a", "b"], lambda facts: [], lambda: {}, 10.0, 1.0, 0.0, True)
    for n in (0, 1):
        job.receive(b"%d" % n, hello(n), 1.0)
    job.receive(b"0", beat(0), 1.0 + SILENCE_S)
    assert [m["restart"] for _, m in job.tick(2.0 + SILENCE_S)] == [False] * 2


def test_missing_nodes_are_named_at_the_deadline_and_nothing_starts():
    job = controller("a", "b", "c")
    job.receive(b"1", hello(1), 1.0)
    assert not job.tick(9.0)
    [(to, message)] = job.tick(10.5)
    assert to == b"1" and message["code"] == 2 and "for a, c; here: b" in message["why"]


def test_two_nodes_of_one_number_are_named_and_end_the_job():
    job = controller("a", "b")
    job.receive(b"0", hello(0, host="first"), 1.0)
    out = job.receive(b"x", hello(0, mark="other", host="second"), 2.0)
    assert {to for to, _ in out} == {b"0", b"x"}
    assert all("first and second" in m["why"] and m["code"] == 2 for _, m in out)
    assert "0..1" in controller("a", "b").receive(b"2", hello(2), 1.0)[0][1]["why"]


def test_what_does_not_fit_together_is_told_to_all():
    job = controller("a", "b", check=lambda facts: ["b: wrong version", "b: no checkpoint"])
    job.receive(b"0", hello(0), 1.0)
    out = job.receive(b"1", hello(1), 1.0)
    assert kinds(out) == ["stop", "stop"] and out[0][1]["why"] == "b: wrong version\nb: no checkpoint"


def test_every_node_tries_node_0_and_the_next_before_anything_starts():
    job, targets = trying("a", "b", "c")
    assert [[name for name, _, _ in row] for row in targets] == [["b"], ["a", "c"], ["a"]]
    assert targets[0] == [("b", "10.0.0.1", 40001)]
    assert kinds(job.receive(b"0", tried(0), 2.0)) == ["try"] and kinds(job.receive(b"1", tried(1), 2.0)) == ["try"]
    assert kinds(job.receive(b"2", tried(2), 2.0)) == ["go"] * 3
    assert kinds(job.receive(b"2", tried(2), 2.1)) == ["go"]  # said again before the order came


def test_a_way_that_is_blocked_ends_the_job_before_anything_starts():
    job, _ = trying("a", "b")
    job.receive(b"1", tried(1, "b cannot reach a"), 2.0)
    out = job.receive(b"0", tried(0, "a cannot reach b"), 2.0)
    assert [(m["kind"], m["code"], m["why"]) for _, m in out] == [("stop", 2, "a cannot reach b\nb cannot reach a")] * 2


def test_a_node_that_never_says_what_it_reached_is_named():
    job, _ = trying("a", "b")
    job.receive(b"0", tried(0), 2.0)
    assert not job.tick(TRYING_S)
    assert "for b to try" in job.tick(TRYING_S + 2.0)[0][1]["why"]


def test_doors_open_and_a_closed_one_is_told_with_its_cure():
    open_door, closed = reach.Door("127.0.0.1"), reach.Door("127.0.0.1")
    closed.close()
    try:
        tries = [("a", "127.0.0.1", open_door.port), ("b", "127.0.0.1", closed.port)]
        [line] = reach.unreachable("c (host h)", tries)
    finally:
        open_door.close()
    assert line.startswith(f"c (host h) cannot reach b at 127.0.0.1:{closed.port}") and "firewall" in line


def test_devices_that_are_not_there_are_named_before_anything_starts(tmp_path):
    node = Node("a", devices=8, vendor="ascend")
    four = {"vendor": "ascend", "count": 4, "device": "Ascend910B", "driver": ""}
    [line] = devices.problems(node, "h", four)
    assert line.startswith("a (host h): 8 devices are asked for, 4 are there (Ascend910B)")
    assert devices.problems(node, "h", {**four, "count": 8}) == [] == devices.problems(node, "h", {})
    assert "ascend was named, nvidia is there" in devices.problems(node, "h", {**four, "vendor": "nvidia"})[0]
    here = devices.seen(node, {})  # a real look: this machine has no Ascend
    assert "vendor 'ascend' was named, but it is not here" in here["problem"]
    assert devices.seen(Node("b", vendor="cpu"), {}) == {} == devices.seen(Node("c", emulate="ascend"), {})
    (tmp_path / "amdgpu").mkdir()
    (tmp_path / "amdgpu" / "version").write_text("6.8.5\n")
    assert devices.driver_version("amd", str(tmp_path)) == "6.8.5" and not devices.driver_version("x", str(tmp_path))


def test_the_first_failure_is_the_one_that_blames_nobody():
    job = running("a", "b")
    out = job.receive(b"0", beat(0, code=1, why="PeerLost: rank 1", blames_peer=True), 2.0)
    assert kinds(out) == ["go"]
    assert not job.tick(2.4)
    job.receive(b"1", beat(1, code=137, why="rank 1 was killed"), 2.5)
    job.tick(2.5)
    assert (job.code, job.why) == (137, "rank 1 was killed")


def test_a_failure_that_blames_a_peer_stands_alone_after_a_second():
    job = running("a", "b")
    job.receive(b"0", beat(0, code=1, why="PeerTimeout", blames_peer=True), 2.0)
    assert job.state == "running"
    job.tick(3.5)
    assert (job.state, job.code, job.why) == ("stopping", 1, "PeerTimeout")


def test_a_silent_node_ends_the_job_and_is_named():
    job = running("a", "b")
    job.receive(b"0", beat(0), 1.0 + SILENCE_S)
    job.tick(1.5 + SILENCE_S)
    assert job.code == 1 and job.why.startswith("b has not been heard of")


def test_stop_from_a_client_reaches_every_node_and_status_says_who_runs_what():
    job = running("a", "b")
    job.receive(b"1", beat(1, ranks={"3": "running"}), 2.0)
    [(_, status)] = job.receive(b"client", {"kind": "status"}, 2.5)
    assert status["state"] == "running" and status["nodes"][1]["ranks"] == {"3": "running"}
    out = job.receive(b"client", {"kind": "stop", "code": 143, "why": "asked"}, 3.0)
    assert kinds(out) == ["stopping", "stop", "stop"]


@pytest.mark.parametrize(("message", "told"), [
    ({"kind": "hello", "node": 0, "mark": "m"}, "a hello without host"),
    ({"kind": "beat", "node": "0", "mark": "m"}, "a beat whose node is str, not int"),
    ({"kind": "beat", "node": True, "mark": "m"}, "whose node is bool"),
    ({"kind": "stop", "code": "x"}, "a stop whose code is str"),
    ({"kind": ["hello"]}, "not understood"),
    ({"kind": "status", "protocol": 99}, "it speaks protocol 99, node 0 speaks 1; install the same moe-runtime"),
])  # fmt: skip
def test_a_message_of_another_form_or_version_is_refused_and_changes_nothing(message, told):
    job = controller("a", "b")
    [(to, answer)] = job.receive(b"x", message, 1.0)
    assert to == b"x" and answer["kind"] == "refuse" and told in answer["why"]
    assert job.state == "gathering" and not job.status(1.0)["nodes"][0]["host"]
    assert sum(job.status(1.0)["refused"].values()) == 1


def test_an_agent_that_says_nothing_usable_of_its_node_is_named():
    good = look("127.0.0.1", None, "cpu", 1, []) | {"command": "c", "found": {}, "door": 4}
    assert malformed(["a", "b"], [good, good]) == []
    [line] = malformed(["a", "b"], [good, {**good, "devices": "8"}])
    assert line.startswith("b: said nothing usable of its devices")
    assert "its files" in malformed(["a"], [{**good, "files": {"m": 3}}])[0]


def test_what_is_no_message_is_told_apart_from_what_is_too_large():
    whole = to_bytes({"kind": "stop"})
    assert from_frames([whole], 1000) == {"protocol": 1, "kind": "stop"}
    for frames in ([], [whole, whole], [whole[:-1]], [whole + b"x"], [b""], [b"\x93\x01\x02\x03"], [b"\x91" * 500]):
        with pytest.raises(ValueError, match="messages that were none"):
            from_frames(frames, 1000)
    with pytest.raises(ValueError, match="messages that were too large"):
        from_frames([whole], len(whole) - 1)


def test_an_address_that_is_taken_or_not_ours_is_an_error_that_says_so():
    port = free_port()
    serve(job := controller("a", wait_s=0.5), "127.0.0.1", port, SECRET)
    with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*another --master-port"):
        serve(controller("a"), "127.0.0.1", port, SECRET)
    with pytest.raises(ConfigError, match="192.0.2.1"):
        serve(controller("a"), "192.0.2.1", port, SECRET)
    job._stop(0, "", 0.0)


@pytest.mark.parametrize("count", [10, 100, 1000])
def test_control_traffic_of_a_start_grows_with_the_number_of_agents(count):
    """Simulated agents, the real controller: messages and bytes of a start and an end, for each agent, do not grow."""
    names = [f"node {n:04}" for n in range(count)]
    job = controller(*names, wait_s=60.0, targets=lambda facts: reach.targets(names, facts))
    messages = bytes_ = 0

    def count_all(out):
        nonlocal messages, bytes_
        messages += len(out)
        bytes_ += sum(len(to_bytes(message)) for _, message in out)

    for again in range(5):  # all but the last say hello again twice a second until it comes
        for n in range(count - 1):
            count_all(job.receive(b"%d" % n, hello(n), 0.5 * again))
    count_all(job.receive(b"last", hello(count - 1), 3.0))
    assert job.state == "trying"
    for n in range(count):
        count_all(job.receive(b"%d" % n, tried(n), 4.0))
    assert job.state == "running"
    for n in range(count):
        count_all(job.receive(b"%d" % n, beat(n, code=0), 12.0))
    count_all(job.tick(12.0))
    for n in range(count):
        count_all(job.receive(b"%d" % n, {"kind": "gone", "node": n, "mark": f"m{n}"}, 13.0))
    assert job.is_over(13.0) and job.code == 0
    assert messages <= 11 * count and bytes_ <= 1900 * count


def test_a_thousand_agents_start_over_real_sockets_within_seconds():
    """One process plays the agents, each with a socket of its own; what is measured is the controller."""
    port, count = free_port(), 1000
    job = Controller([f"node {n}" for n in range(count)], lambda facts: [], lambda: {}, 60.0, 1.0, time.monotonic())
    thread = serve(job, "127.0.0.1", port, SECRET)
    links = [Link("127.0.0.1", port, SECRET) for _ in range(64)]  # DEALERs; agents share them in turn
    began = time.monotonic()
    for n in range(count):
        links[n % 64].send(hello(n))
    orders = [0] * 64
    while sum(orders) < count and time.monotonic() < began + 30:
        for n, link in enumerate(links):
            while (answer := link.receive(0.0)) is not None:
                orders[n] += answer["kind"] == "go"
    took = time.monotonic() - began
    assert sum(orders) == count
    print(f"{count} agents: {took:.2f} s from the first hello to the last order")
    assert took < 20.0
    links[0].send({"kind": "stop"})
    for n in range(count):
        links[n % 64].send({"kind": "gone", "node": n, "mark": f"m{n}"})
    thread.join(10)
    assert not thread.is_alive()
    for link in links:
        link.close()


def test_preflight_names_host_and_cure():
    good = {"host": "h0", "torch": "2.13", "moe_runtime": "0.1.0", "command": "c", "files": {"m": "1"}}
    assert verdicts(["a", "b"], [good, {**good, "host": "h1"}]) == []
    bad = {"host": "h1", "torch": "", "moe_runtime": "0.2", "command": "d", "files": {"m": "!cannot be read (gone)"}}
    lines = verdicts(["a", "b"], [good, bad])
    assert all(line.startswith("b (host h1): ") for line in lines)
    for words in ("torch is not installed", "0.2, but a has 0.1.0", "another command", "cannot be read (gone); copy"):
        assert any(words in line for line in lines), words
    assert "differs" in verdicts(["a", "b"], [good, {**good, "files": {"m": "2"}}])[0]


def test_a_node_that_cannot_hold_its_share_is_named():
    gib = 1 << 30
    nodes = [Node("a", devices=1, vendor="cpu"), Node("b", devices=2, vendor="ascend", memory_gib=8.0)]
    facts = [{"host": "h0", "vendor": "cpu", "free_gib": 7.0}, {"host": "h1", "vendor": "ascend", "free_gib": 1.0}]
    # 2 GiB dense on every rank; of 18 GiB of experts a takes 2/6 and b 4/6: 8 and 16 GiB.
    lines = tight(nodes, facts, [2.0, 2.0, 2.0], (18 * gib, 2 * gib, 9 * gib))
    assert [line.split(" (")[0] for line in lines] == ["a"] and "8 GiB" in lines[0] and "7 GiB are there" in lines[0]
    lines = tight(nodes, facts, [1, 4, 4], (18 * gib, 2 * gib, 9 * gib))
    assert [line.split(" (")[0] for line in lines] == ["b"] and "8 bits" in lines[0]
    assert tight(nodes, facts, [1, 2, 2], (15 * gib, gib, 8 * gib)) == []
    nodes[1] = dataclasses.replace(nodes[1], expert_dtype="int8")
    assert tight(nodes, facts, [1, 4, 4], (18 * gib, 2 * gib, 9 * gib)) == []


def test_bytes_of_a_checkpoint_come_from_its_headers(tmp_path):
    from safetensors.torch import save_file
    from torch import zeros

    assert checkpoint_bytes(str(tmp_path)) is None and checkpoint_bytes(str(tmp_path / "file")) is None
    save_file({"model.layers.1.mlp.experts.0.up_proj.weight": zeros(4, 8)}, tmp_path / "1.safetensors")
    shared = {"model.layers.1.mlp.shared_experts.up_proj.weight": zeros(2), "model.norm.weight": zeros(3)}
    save_file(shared, tmp_path / "2.safetensors")
    assert checkpoint_bytes(str(tmp_path)) == (128, 20, 32)

"""The cluster file: what it says, and what it refuses."""

import pytest

from moe_runtime.core.cluster import Cluster, Link, Node, load_cluster
from moe_runtime.core.errors import ConfigError

GOOD = """
[[node]]
name = "a"
vendor = "ascend"
devices = 2
memory_gib = 64
speed = 1.5
python = "/opt/python"
env = { NAME = "value" }

[[node]]
name = "b"
host = "10.0.0.2"
speed = 1
emulate = "hygon"

[[link]]
between = ["a", "b"]
gbit_s = 100
latency_us = 5.5
"""


def write(folder, text):
    path = folder / "cluster.toml"
    path.write_text(text)
    return path


def test_a_file_says_nodes_links_and_ranks(tmp_path):
    cluster = load_cluster(write(tmp_path, GOOD))
    first, second = cluster.nodes
    assert first == Node("a", "localhost", "ascend", 2, 64.0, 1.5, "/opt/python", {"NAME": "value"})
    assert (second.host, second.vendor, second.devices, second.memory_gib) == ("10.0.0.2", "auto", 1, None)
    assert second.emulate == "hygon"
    assert cluster.links == (Link(("a", "b"), 100.0, 5.5),)
    assert cluster.num_ranks == 3
    assert cluster.rank_nodes() == (first, first, second)
    assert cluster.rank_speeds() == [1.5, 1.5, 1.0]
    assert isinstance(hash(cluster), int)


def test_speeds_are_all_given_or_none():
    assert Cluster((Node("a", devices=2), Node("b"))).rank_speeds() == [1.0, 1.0, 1.0]
    with pytest.raises(ConfigError, match="b none"):
        Cluster((Node("a", speed=2.0), Node("b"))).rank_speeds()


def test_the_digest_is_the_same_for_the_same_cluster_only(tmp_path):
    digest = load_cluster(write(tmp_path, GOOD)).digest()
    assert digest == load_cluster(write(tmp_path, "# a comment\n" + GOOD)).digest()
    assert digest != load_cluster(write(tmp_path, GOOD.replace("5.5", "6"))).digest()
    assert digest != load_cluster(write(tmp_path, GOOD.replace("value", "other"))).digest()
    assert 0 <= digest < 2**63


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        ("", "", "no nodes"),
        ("[[node]\n", "", "line 1"),
        ("nodes = 1\n", "", "did you mean node?"),
        ("[node]\nname = 'a'\n", "", "[[node]]"),
        ("[[node]]\nhost = 'a'\n", "[[node]] number 1", "name missing"),
        ("[[node]]\nname = 'a'\nmemory = 3\n", '[[node]] number 1 ("a")', "did you mean memory_gib?"),
        ("[[node]]\nname = 3\n", "[[node]] number 1", "name = 3"),
        ("[[node]]\nname = ' '\n", "[[node]] number 1", "non-empty"),
        ("[[node]]\nname = 'a'\ndevices = 0\n", '("a")', "at least 1"),
        ("[[node]]\nname = 'a'\ndevices = true\n", '("a")', "whole number"),
        ("[[node]]\nname = 'a'\ndevices = 1.5\n", '("a")', "whole number"),
        ("[[node]]\nname = 'a'\nspeed = 0\n", '("a")', "above 0"),
        ("[[node]]\nname = 'a'\ntflops = 5\n", '("a")', "tflops and memory_gb_s go together"),
        ("[[node]]\nname = 'a'\nspeed = nan\n", '("a")', "above 0"),
        ("[[node]]\nname = 'a'\nmemory_gib = '8'\n", '("a")', "above 0"),
        ("[[node]]\nname = 'a'\nenv = { A = 1 }\n", '("a")', "table of strings"),
        ("[[node]]\nname = 'a'\n[[node]]\nname = 'a'\n", "", 'two nodes are named "a"'),
        ("[[node]]\nname = 'a'\n[[link]]\nbetween = ['a', 'b']\ngbit_s = 1\nlatency_us = 1\n", "", 'names "b"'),
        ("[[node]]\nname = 'a'\n[[link]]\nbetween = ['a', 'a']\ngbit_s = 1\nlatency_us = 1\n", "[[link]]", "different"),
        (
            "[[node]]\nname = 'a'\n[[link]]\nbetween = ['a', 'b']\n",
            "[[link]] number 1",
            "gbit_s and latency_us missing",
        ),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, text, place, what):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_cluster(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and place in message and what in message
    assert "\n" not in message


def test_two_links_between_the_same_nodes_are_refused():
    nodes = (Node("a"), Node("b"))
    with pytest.raises(ConfigError, match="two links join b and a"):
        Cluster(nodes, (Link(("a", "b"), 1.0, 1.0), Link(("b", "a"), 2.0, 1.0)))


def test_a_file_that_cannot_be_read_is_refused_in_one_line(tmp_path):
    for path in (tmp_path / "missing.toml", tmp_path):
        with pytest.raises(ConfigError, match="cannot read the cluster file"):
            load_cluster(path)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_cluster(binary)


def test_a_hostfile_is_a_cluster_with_hosts_of_one_type_side_by_side(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# a comment\nh1 slots=2 type=ascend\nh2 slots=4 type=hygon  # another\n\nh3 slots=1 type=ascend\n")
    nodes = load_cluster(path).nodes
    assert [(node.host, node.vendor, node.devices) for node in nodes] == [
        ("h1", "ascend", 2), ("h3", "ascend", 1), ("h2", "hygon", 4),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("h1 slots=2\nh2 slots=x\n", "line 2"),
        ("h1 slots=2 colour=red\n", "slots=N type=vendor"),
        ("h1 slots=0\n", "line 1: devices = 0"),
        ("h1 slots=2\nh1 slots=3\n", "list a host once"),
    ],
)
def test_bad_lines_of_a_hostfile_are_named(tmp_path, lines, said):
    (tmp_path / "hosts").write_text(lines)
    with pytest.raises(ConfigError, match=said):
        load_cluster(tmp_path / "hosts")


def test_ranks_follow_the_order_of_a_cluster_file(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("".join(f'[[node]]\nname = "{n}"\nemulate = "{v}"\n' for n, v in ("ax", "by", "cx")).replace(
        '"x"', '"ascend"').replace('"y"', '"biren"'))  # fmt: skip
    assert [node.name for node in load_cluster(path).nodes] == ["a", "b", "c"]

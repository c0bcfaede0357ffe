"""Jobs over several hosts (network namespaces, real TCP, real sshd) and under a real Slurm: as one process, or named.

Both vendors are emulated. A host's ranks are 1 and 3, so that nothing divides evenly.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from families import write_checkpoint
from hosts import MOE_LAUNCH, Hosts, Slurm
from test_jobs import CONFIG

from moe_runtime.launch.bench.world import find_mpirun
from moe_runtime.launch.engines import k8s
from moe_runtime.launch.sweep import marked

DEADLINE = 120.0
MOE_JOB = Path(__file__).with_name("engine_job.py")
GENERATE = ["--tokenizer", "bytes", "--prompt", "hello", "--prompt", "good day", "--max-new-tokens", "6", "--json"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    with Hosts(tmp_path_factory.mktemp("two"), 2) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with Slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "deepseek_v3"
    write_checkpoint(folder, "deepseek_v3", vocab_size=258, pad_token_id=257)
    return folder


@pytest.fixture(scope="module")
def alone(checkpoint):
    """What one process generates."""
    ran = run([*MOE_LAUNCH, "generate", "--model", str(checkpoint), *GENERATE])
    assert ran.returncode == 0, ran.stderr
    return texts(ran)


def texts(ran):
    return [result["text"] for result in json.loads(ran.stdout)["results"]]


def run(command, cwd=None, timeout=DEADLINE, env=None):
    words, variables = list(map(str, command)), {**os.environ, **(env or {})}
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=variables)


def cluster_file(folder, addresses, devices=(1, 3), emulate=("ascend", "biren", "hygon"), **extra):
    path = folder / "cluster.toml"
    lines = []
    for n, (address, count) in enumerate(zip(addresses, devices, strict=True)):
        lines += ["[[node]]", f'name = "node-{"abc"[n]}"', f'host = "{address}"', f'vendor = "cpu"\ndevices = {count}']
        lines += [f'emulate = "{emulate[n]}"'] if emulate else []
        lines += [f'{key} = "{value[n]}"' for key, value in extra.items() if value[n]]
    path.write_text("\n".join(lines) + "\n")
    return path


def job_script(folder, text):
    (folder / "job.py").write_text("import os, signal, sys, time\nrank = int(os.environ['RANK'])\n" + text)
    return folder / "job.py"


def processes(folder):
    """Processes whose command line names this test's folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(folder).encode() in words:
                found.append(words.replace(b"\0", b" ").decode())
    return found


def assert_nothing_left(folder, seconds=5.0):
    ends = time.monotonic() + seconds
    while (left := processes(folder)) and time.monotonic() < ends:
        time.sleep(0.1)
    assert not left


def over_ssh(hosts, cluster, *words, options=()):
    """A moe-launch command over ssh, from this machine, which is no node of the job."""
    launch = ["--engine", "ssh", hosts.ssh_args, "--cluster", cluster, "--threads-per-rank", "1", *options]
    return [*MOE_LAUNCH, words[0], *launch, *words[1:]]


@contextmanager
def by_hand(hosts, cluster, folder, script, options=((), ())):
    """`moe-launch run --engine torchrun` on each host; yields the processes."""
    started = []
    for n in range(len(options)):
        words = [*MOE_LAUNCH, "run", "--engine", "torchrun", "--cluster", cluster, *options[n], script]
        with (folder / f"out{n}").open("wb") as out:
            started.append(subprocess.Popen(hosts.on(n, *words), cwd=folder, stdout=out, stderr=out))
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


# ---- same results as one process ------------------------------------------------------------------------------------


def test_generate_over_ssh_equals_one_process(two, checkpoint, alone, tmp_path):
    cluster = cluster_file(tmp_path, two.addresses)
    ran = run(over_ssh(two, cluster, "generate", "--model", checkpoint, *GENERATE), cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert texts(ran) == alone
    assert "islands: ascend (emulated) [0]; biren (emulated) [1, 2, 3]" in ran.stderr
    logs = sorted(path.name for path in tmp_path.glob("runs/*/rank_*.log"))
    assert logs == [f"rank_{n}.log" for n in range(4)]
    assert_nothing_left(tmp_path)


def test_train_over_shaped_links_of_three_hosts_equals_one_process(checkpoint, tmp_path):
    """tbf limits every host to 200 Mbit/s; ranks 1, 1 and 2."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.py").write_text(Path(__file__).read_text())
    settings = CONFIG.replace('cluster = "cluster.toml"\n', "").replace("batch_size = 3", "batch_size = 4")
    (tmp_path / "train.toml").write_text(settings.replace('output = "out/checkpoint"', 'output = "@"'))
    losses = []
    with Hosts(tmp_path, 3, mbit=200) as hosts:
        cluster = cluster_file(tmp_path, hosts.addresses, (1, 1, 2), ("ascend", "biren", "biren"))
        train = ["train", tmp_path / "train.toml", "--set", "steps=4", "--set", "record=''"]
        commands = [
            [*MOE_LAUNCH, *train, "--set", "output=one"],
            over_ssh(hosts, cluster, *train, "--set", "output=three"),
        ]
        for command, output in zip(commands, ("one", "three"), strict=True):
            ran = run(command, cwd=tmp_path)
            assert ran.returncode == 0, ran.stderr
            rows = (tmp_path / output / "metrics.jsonl").read_text().splitlines()
            losses.append([json.loads(row)["loss"] for row in rows])
    assert len(losses[0]) >= 1
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_hosts_that_share_no_folder(checkpoint, alone, tmp_path):
    """Checkpoint and cluster file are copied to the same path of each host; logs stay where the ranks are."""
    (own := tmp_path / "own").mkdir()
    with Hosts(tmp_path, 2, own=own) as hosts:
        cluster = cluster_file(own, hosts.addresses)
        packed = subprocess.run(
            ["tar", "-c", "-C", own, cluster.name, "-C", checkpoint.parent, checkpoint.name],
            capture_output=True, check=True,
        ).stdout  # fmt: skip
        words = ["generate", "--model", own / checkpoint.name, *GENERATE]
        for n in (0, 1):
            hosts.ssh(n, f"tar -x -C {own}", packed)
        shutil.copytree(checkpoint, own / checkpoint.name)
        ran = run(over_ssh(hosts, cluster, *words), cwd=own)
        assert ran.returncode == 0, ran.stderr
        assert texts(ran) == alone
        logs = [sorted(hosts.ssh(n, f"cd {own}/runs/* && ls rank_*").split()) for n in (0, 1)]
        assert logs == [["rank_0.log"], ["rank_1.log", "rank_2.log", "rank_3.log"]]
        assert not list(own.glob("runs/*/rank_*"))
        hosts.ssh(1, f"rm {own}/{checkpoint.name}/model.safetensors")
        ran = run(over_ssh(hosts, cluster, *words), cwd=own, timeout=60)
        assert ran.returncode == 2, ran.stderr
        assert re.search(r"error: node-b \(host .*differs from that of node-a; copy the same", ran.stderr), ran.stderr


def test_torchrun_on_each_host_finds_its_node_in_the_cluster_file(two, tmp_path):
    cluster = cluster_file(tmp_path, two.addresses)
    script = job_script(tmp_path, "print('I am', rank, os.environ['LOCAL_RANK'], os.environ['GLOO_SOCKET_IFNAME'])\n")
    with by_hand(two, cluster, tmp_path, script) as started:
        assert [process.wait(DEADLINE) for process in started] == [0, 0]
    first, second = ((tmp_path / f"out{n}").read_text() for n in (0, 1))
    assert "[rank 0] I am 0 0 eth0" in first and "rank 1]" not in first
    assert all(f"[rank {n}] I am {n} {n - 1} eth0" in second for n in (1, 2, 3))
    assert f"node-b: {two.addresses[1]} (eth0)" in second
    assert "the job's keys follow from its name only" in first


def test_a_hostfile(two, tmp_path):
    hostfile = tmp_path / "hosts"
    lines = [f"{address} slots={n + 1} type=cpu\n" for n, address in enumerate(two.addresses)]
    hostfile.write_text("# DeepSpeed's form\n" + "".join(lines))
    script = job_script(tmp_path, "print('of', os.environ['WORLD_SIZE'])\n")
    for tee, shown in (("3", [0, 1, 2]), ("0:3,2:1", [0, 2])):
        command = [*MOE_LAUNCH, "run", "--engine", "ssh", two.ssh_args, "--hostfile", hostfile, "--tee", tee, script]
        ran = run(command, cwd=tmp_path)
        assert ran.returncode == 0, ran.stderr
        assert sorted(ran.stdout.splitlines()) == [f"[rank {n}] of 3" for n in shown]


# ---- faults at start: each ends within its deadline and names node and cure -----------------------------------------


def test_host_down(two, tmp_path):
    cluster = cluster_file(tmp_path, [two.addresses[0], two.addresses[0].rsplit(".", 1)[0] + ".77"])
    ran = run(over_ssh(two, cluster, "run", job_script(tmp_path, "")), cwd=tmp_path, timeout=40)
    assert ran.returncode != 0
    assert "node-b (host" in ran.stderr and "must work without a password" in ran.stderr
    assert_nothing_left(tmp_path)


def test_a_node_where_nobody_started_the_job(two, tmp_path):
    cluster = cluster_file(tmp_path, two.addresses)
    options = [["--start-timeout", "4"]]
    with by_hand(two, cluster, tmp_path, job_script(tmp_path, ""), options) as (process,):
        assert process.wait(20) == 2
    assert "waited 4 s for node-b; here: node-a" in (tmp_path / "out0").read_text()


def test_port_blocked(two, tmp_path):
    cluster = cluster_file(tmp_path, two.addresses)
    rule = ["ipproto", "tcp", "dport", "29500", "blackhole"]
    two.check(1, "ip", "rule", "add", *rule)
    try:
        options = [["--start-timeout", "4"]] * 2
        with by_hand(two, cluster, tmp_path, job_script(tmp_path, ""), options) as started:
            assert [process.wait(20) for process in started] == [2, 2]
    finally:
        two.check(1, "ip", "rule", "del", *rule)
    assert "waited 4 s for node-b" in (tmp_path / "out0").read_text()
    said = (tmp_path / "out1").read_text()
    assert f"node-b: no answer from node-a at {two.addresses[0]}:29500 within 4 s" in said and "firewall" in said


def test_a_firewall_that_lets_only_the_controllers_port_through(two, tmp_path):
    """Rows travel over ports that the system gives out: found before any rank starts, and not as a hang."""
    cluster = cluster_file(tmp_path, two.addresses)
    rule = ["ipproto", "tcp", "dport", "30000-65534", "blackhole"]
    two.check(1, "ip", "rule", "add", *rule)
    try:
        with by_hand(two, cluster, tmp_path, job_script(tmp_path, "print('ran')\n"), [[], []]) as started:
            assert [process.wait(40) for process in started] == [2, 2]
    finally:
        two.check(1, "ip", "rule", "del", *rule)
    said = (tmp_path / "out0").read_text()
    assert re.search(rf"error: node-b \(host .*\) cannot reach node-a at {two.addresses[0]}:\d+ .*firewall", said), said
    assert "] ran" not in said
    assert_nothing_left(tmp_path)


def test_a_vendor_whose_device_is_not_there(two, tmp_path):
    cluster = cluster_file(tmp_path, two.addresses, emulate=())
    cluster.write_text(cluster.read_text().replace('vendor = "cpu"\ndevices = 3', 'vendor = "ascend"\ndevices = 3'))
    ran = run(over_ssh(two, cluster, "run", job_script(tmp_path, "print('ran')")), cwd=tmp_path, timeout=60)
    assert ran.returncode == 2 and "ran" not in ran.stdout
    assert re.search(r"error: node-b \(host .*\): vendor 'ascend' was named, but it is not here", ran.stderr)


def test_wrong_version_on_one_node(two, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "sitecustomize.py").write_text("import moe_runtime\nmoe_runtime.__version__ = '0.0.9'\n")
    wrapper = tmp_path / "python-of-b"
    wrapper.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path}/old exec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    cluster = cluster_file(tmp_path, two.addresses, python=("", wrapper))
    ran = run(over_ssh(two, cluster, "run", job_script(tmp_path, "print('ran')")), cwd=tmp_path, timeout=40)
    assert ran.returncode == 2 and "ran" not in ran.stdout
    assert re.search(r"error: node-b \(host .*\): moe-runtime 0.0.9, but node-a has .*; install the same", ran.stderr)
    assert_nothing_left(tmp_path)


def test_checkpoint_missing_on_one_node(two, checkpoint, tmp_path):
    """Node b sees an empty folder where the checkpoint should be: a mount of its own."""
    copy = tmp_path / "model"
    shutil.copytree(checkpoint, copy)
    cluster = cluster_file(tmp_path, two.addresses)
    hide = tmp_path / "hide.sh"
    hide.write_text(f'mount -t tmpfs none "{copy}" && rmdir "{copy}" 2>/dev/null; exec "$@"\n')
    words = ["generate", "--engine", "torchrun", "--cluster", cluster, "--model", copy / "config.json", *GENERATE]
    started = []
    for n, prefix in enumerate(([], ["unshare", "-m", "sh", hide])):
        with (tmp_path / f"out{n}").open("wb") as out:
            command = two.on(n, *prefix, *MOE_LAUNCH, *words)
            started.append(subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=out))
    assert [process.wait(40) for process in started] == [2, 2]
    for n in (0, 1):
        said = (tmp_path / f"out{n}").read_text()
        assert re.search(r"error: node-b \(host .*config.json: cannot be read .*; copy it there", said), said


def test_too_little_memory_for_its_share(two, checkpoint, tmp_path):
    cluster = cluster_file(tmp_path, two.addresses)
    cluster.write_text(cluster.read_text() + "memory_gib = 0.00001\n")
    ran = run(over_ssh(two, cluster, "generate", "--model", checkpoint, *GENERATE), cwd=tmp_path, timeout=40)
    assert ran.returncode == 2
    assert re.search(r"error: node-b \(host .*\): its ranks need at least .* GiB.*lower speed", ran.stderr)


def test_a_mistake_that_only_one_node_can_see_ends_all(two, tmp_path):
    cluster = cluster_file(tmp_path, two.addresses, interface=("", "wlan9"))
    began = time.monotonic()
    ran = run(over_ssh(two, cluster, "run", job_script(tmp_path, "")), cwd=tmp_path, timeout=60)
    assert ran.returncode == 2 and "node-b: this host has no interface wlan9" in ran.stderr
    assert time.monotonic() - began < 30
    assert_nothing_left(tmp_path)


def test_two_nodes_with_the_same_rank(tmp_path):
    with Hosts(tmp_path, 3) as hosts:
        cluster = cluster_file(tmp_path, hosts.addresses, (1, 1, 1), ())
        options = [["--node-rank", n, "--start-timeout", "20"] for n in ("0", "1", "1")]
        with by_hand(hosts, cluster, tmp_path, job_script(tmp_path, ""), options) as started:
            assert [process.wait(40) for process in started] == [2, 2, 2]
        for n in range(3):
            said = (tmp_path / f"out{n}").read_text()
            assert "two nodes have node rank 1 (node-b)" in said and "own --node-rank" in said


def test_node_0_started_on_a_host_that_has_not_its_address(two, tmp_path):
    cluster = cluster_file(tmp_path, two.addresses)
    words = [*MOE_LAUNCH, "run", "--engine", "torchrun", "--cluster", cluster, "--node-rank", "0"]
    ran = run(two.on(1, *words, job_script(tmp_path, "")), cwd=tmp_path, timeout=20)
    assert ran.returncode == 2
    assert f"node 0 cannot listen at {two.addresses[0]}:29500" in ran.stderr


@pytest.mark.parametrize("ending, code, told", [
    ("os.kill(os.getpid(), signal.SIGKILL)", 137, "killed by SIGKILL; was the machine out of memory?"),
    ("raise RuntimeError('broken plug-in')", 1, "RuntimeError: broken plug-in"),
    ("sys.exit(3)", 3, "exit code 3"),
])  # fmt: skip
def test_a_rank_that_dies_during_start(two, tmp_path, ending, code, told):
    cluster = cluster_file(tmp_path, two.addresses)
    script = job_script(tmp_path, f"if rank == 2: {ending}\ntime.sleep(100)\n")
    ran = run(over_ssh(two, cluster, "run", script), cwd=tmp_path, timeout=40)
    assert ran.returncode == code, ran.stderr
    assert f"rank 2 (node-b, {two.addresses[1]}) failed first" in ran.stderr and told in ran.stderr
    assert_nothing_left(tmp_path)


def test_a_users_mistake_in_a_rank_is_one_line_and_code_2(two, tmp_path, checkpoint):
    cluster = cluster_file(tmp_path, two.addresses)
    words = ["generate", "--model", checkpoint, "--prompt", "x", "--runtime", "transport=carrier-pigeon"]
    ran = run(over_ssh(two, cluster, *words), cwd=tmp_path, timeout=60)
    assert ran.returncode == 2, ran.stderr
    assert "carrier-pigeon" in ran.stderr and "Traceback" not in ran.stderr


# ---- life ------------------------------------------------------------------------------------------------------------


SLEEPER = "print('up', flush=True)\nimport subprocess\nsubprocess.Popen(['sleep', '317'], start_new_session=True)\n"


@contextmanager
def sleeping(hosts, folder, text=SLEEPER + "time.sleep(300)\n", options=()):
    """A job over ssh whose ranks are all up, each with a child in a session of its own."""
    cluster = cluster_file(folder, hosts.addresses)
    command = over_ssh(hosts, cluster, "run", job_script(folder, text), options=options)
    env = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    with (folder / "out").open("wb") as out:
        process = subprocess.Popen(list(map(str, command)), cwd=folder, stdout=out, stderr=out, env=env)
    try:
        ends = time.monotonic() + 40
        while (folder / "out").read_text().count("] up") < 4:
            assert time.monotonic() < ends and process.poll() is None, (folder / "out").read_text()
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


def sleepers():
    return [p for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists() and b"317" in _read(p).split(b"\0")]


def _read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("victim", ["launcher", "agent", "torchrun", "SIGTERM"])
def test_no_process_is_left_whoever_is_killed(two, tmp_path, victim):
    with sleeping(two, tmp_path) as process:
        if victim == "launcher":
            process.kill()
        elif victim == "SIGTERM":
            process.terminate()
        else:
            what = {"agent": b"moe_runtime.launch.agent\x001", "torchrun": b"moe_runtime.launch.elastic"}[victim]
            found = [p for p in Path("/proc").glob("[0-9]*/cmdline") if what in _read(p)]
            os.kill(int(found[-1].parent.name), signal.SIGKILL)
        code = process.wait(40)
        assert code == {"launcher": -9, "SIGTERM": 143}.get(victim, code) and code != 0
        assert_nothing_left(tmp_path, 20)
        ends = time.monotonic() + 10
        while sleepers() and time.monotonic() < ends:
            time.sleep(0.1)
        assert not sleepers()


def test_all_ranks_of_all_hosts_start_again_after_a_failure(two, tmp_path):
    """The first time rank 2 dies after all have met, the second time all end well; both times they truly meet."""
    text = """
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
import torch.distributed as dist
import moe_runtime
with moe_runtime.init({"timeout_s": 30}) as runtime:
    met = [None] * runtime.size
    dist.all_gather_object(met, attempt)
    print("met", *met, flush=True)
    if attempt == "0":
        if rank == 2: os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(100)
"""
    cluster = cluster_file(tmp_path, two.addresses, emulate=())
    script = job_script(tmp_path, text)
    ran = run(over_ssh(two, cluster, "run", script, options=["--max-restarts", "2"]), cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("rank 2 (node-b") == 1 and "killed by SIGKILL" in ran.stderr
    assert ran.stderr.count("starting all ranks again (1 of at most 2 restarts)") == 1
    assert sorted(re.findall(r"\[rank (\d)\] met 1 1 1 1", ran.stdout)) == ["0", "1", "2", "3"]
    assert_nothing_left(tmp_path)


def test_a_host_that_vanishes_while_running_is_named_and_leaves_nothing(two, tmp_path):
    with sleeping(two, tmp_path) as process, two.unplugged(1):
        began = time.monotonic()
        assert process.wait(60) == 1
        took = time.monotonic() - began
        assert_nothing_left(tmp_path, 20)  # the lost host cleans up by itself
    assert "node-b has not been heard of for 15 s: host or network is down" in (tmp_path / "out").read_text()
    assert 14 < took < 45, took
    assert not sleepers()


def test_status_and_stop_from_a_node(two, tmp_path):
    """Agents write their records where the job's user keeps such; hosts here share the file system."""
    with sleeping(two, tmp_path) as process:
        listed = json.loads(run(two.on(1, *MOE_LAUNCH, "status", "--json")).stdout)["jobs"]
        job = listed[0]["job"]
        assert job.startswith("job-") and "secret" not in listed[0]
        shown = run(two.on(1, *MOE_LAUNCH, "status", job))
        assert shown.returncode == 0 and f"{job}: running" in shown.stdout
        assert "node-b" in shown.stdout and "rank 3 running" in shown.stdout
        stopped = run(two.on(1, *MOE_LAUNCH, "stop", job))
        assert stopped.returncode == 0, stopped.stderr
        assert process.wait(20) == 143
    assert "asked to stop by moe-launch stop" in (tmp_path / "out").read_text()
    over = run([*MOE_LAUNCH, "status", job])
    assert over.returncode == 3 and "over, code 143" in over.stdout
    assert run([*MOE_LAUNCH, "status", "no-such-job"]).returncode == 2


def test_sigterm_gives_ranks_time_to_save(two, tmp_path):
    text = f"""
def save(*_):
    time.sleep(1)
    open(f"{tmp_path}/saved{{rank}}", "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print("up", flush=True)
time.sleep(300)
"""
    with sleeping(two, tmp_path, text, ["--shutdown-timeout", "20"]) as process:
        process.terminate()
        assert process.wait(40) == 143
    assert sorted(path.name for path in tmp_path.glob("saved*")) == [f"saved{n}" for n in range(4)]


# ---- Slurm -----------------------------------------------------------------------------------------------------------


def under_slurm(cluster, *words):
    where = ["--engine", "slurm", "--master-addr", "127.0.0.1", "--threads-per-rank", "1", "--cluster", cluster]
    return [*MOE_LAUNCH, words[0], *where, *words[1:]]


def test_slurm_runs_generate_over_both_nodes(slurm, checkpoint, alone, tmp_path):
    cluster = cluster_file(tmp_path, ["n1", "n2"])
    ran = slurm.run(*under_slurm(cluster, "generate", "--model", checkpoint, *GENERATE), cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert texts(ran) == alone


def test_scancel_ends_all_ranks(slurm, tmp_path):
    cluster = cluster_file(tmp_path, ["n1", "n2"])
    script = job_script(tmp_path, SLEEPER + "time.sleep(300)\n")
    with (tmp_path / "out").open("wb") as out:
        command = list(map(str, under_slurm(cluster, "run", "--engine-args=--job-name=to-cancel", script)))
        process = subprocess.Popen(command, cwd=tmp_path, env=slurm.env, stdout=out, stderr=out)
    try:
        ends = time.monotonic() + 40
        while (tmp_path / "out").read_text().count("] up") < 4:
            assert time.monotonic() < ends and process.poll() is None, (tmp_path / "out").read_text()
            time.sleep(0.1)
        slurm.run("scancel", "--name", "to-cancel")
        assert process.wait(40) != 0
    finally:
        process.kill()
        process.wait()
    assert_nothing_left(tmp_path, 20)
    assert not sleepers()


def batch_file(folder, cluster, *words):
    path = folder / "job.sbatch"
    command = shlex.join(map(str, under_slurm(cluster, *words)))
    path.write_text(
        f"#!/bin/bash\n#SBATCH --nodes=2 --requeue --open-mode=append --output={folder}/out\nexec {command}\n"
    )
    return path


def test_sbatch_runs_generate_over_its_nodes(slurm, checkpoint, alone, tmp_path):
    answers = tmp_path / "answers.jsonl"
    words = ["generate", "--model", checkpoint, "--output", answers, *GENERATE[:-1]]
    batch = batch_file(tmp_path, cluster_file(tmp_path, ["n1", "n2"]), *words)
    ran = slurm.run("sbatch", "--wait", batch, cwd=tmp_path)
    assert ran.returncode == 0, (tmp_path / "out").read_text()
    assert [json.loads(line)["text"] for line in answers.read_text().splitlines()] == alone


def test_a_heterogeneous_job_of_slurm(slurm, checkpoint, alone, tmp_path):
    """Two components of one node each: what sbatch's manual calls hetjob."""
    answers = tmp_path / "answers.jsonl"
    words = ["generate", "--engine-args=--het-group=0,1", "--model", checkpoint, "--output", answers, *GENERATE[:-1]]
    batch = batch_file(tmp_path, cluster_file(tmp_path, ["n1", "n2"]), *words)
    lines = batch.read_text().replace("--nodes=2", "--nodes=1").splitlines()
    batch.write_text("\n".join([*lines[:2], "#SBATCH hetjob", "#SBATCH --nodes=1", *lines[2:]]) + "\n")
    ran = slurm.run("sbatch", "--wait", batch, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr + (tmp_path / "out").read_text()
    assert [json.loads(line)["text"] for line in answers.read_text().splitlines()] == alone


def test_a_requeued_training_goes_on_from_its_checkpoint(slurm, tmp_path):
    """The losses are those of a run that nobody interrupted: on as many ranks, to the bit."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.py").write_text(Path(__file__).read_text())
    lines = [
        line
        for line in CONFIG.splitlines()
        if not line.startswith(("cluster", "record", "steps", "output", "log_every"))
    ]
    (tmp_path / "train.toml").write_text('output = "@"\nsteps = 150\nlog_every = 1\n' + "\n".join(lines))
    cluster = cluster_file(tmp_path, ["n1", "n2"])
    words = ["train", tmp_path / "train.toml", "--set", "checkpoint_every=5"]
    whole = slurm.run(*under_slurm(cluster, *words, "--set", "output=whole"), cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    batch = batch_file(tmp_path, cluster, *words, "--set", "output=parts", "--set", "checkpoints=state")
    job = slurm.run("sbatch", "--parsable", batch, cwd=tmp_path).stdout.strip()
    ends = time.monotonic() + 90
    while not (tmp_path / "state" / "step-000010").exists():
        assert time.monotonic() < ends, (tmp_path / "out").read_text()
        time.sleep(0.05)
    asked = slurm.run("scontrol", "requeue", job)
    assert asked.returncode == 0, asked.stderr
    ends = time.monotonic() + 150
    while slurm.run("squeue", "-h", "-j", job).stdout.strip():
        assert time.monotonic() < ends, (tmp_path / "out").read_text() + slurm.run("squeue").stdout
        time.sleep(0.3)
    said = (tmp_path / "out").read_text()
    assert int(re.search(r"going on after step (\d+)", said)[1]) >= 10
    losses = [
        [json.loads(row)["loss"] for row in (tmp_path / output / "metrics.jsonl").read_text().splitlines()]
        for output in ("whole", "parts")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 150
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("transport", ["auto", "zeromq", "islands"])
def test_plain_srun_with_init(slurm, transport):
    ran = slurm.run("srun", "-N2", "-n2", "env", "OMP_NUM_THREADS=1", "MASTER_ADDR=127.0.0.1", "GLOO_SOCKET_IFNAME=lo",
                    sys.executable, MOE_JOB, transport)  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert sorted(ran.stdout.split()) == ["slurm:0/2:True", "slurm:1/2:True"]


@pytest.mark.parametrize("transport", ["auto", "zeromq", "islands"])
@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_plain_torchrun_and_mpirun_with_init(launcher, transport):
    if launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", MOE_JOB]
    else:
        mpirun, missing = find_mpirun()
        if mpirun is None:
            pytest.skip(missing)
        command = [*mpirun, "-n", "2", sys.executable, MOE_JOB]
    ran = run([*command, transport], env={"OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    name = "mpi" if launcher == "mpirun" else launcher
    assert sorted(re.findall(r"\w+:\d/2:True", ran.stdout)) == [f"{name}:0/2:True", f"{name}:1/2:True"]


def test_mpirun_in_its_mpmd_form(checkpoint, alone, tmp_path):
    """Two nodes on this machine, each with an interpreter and an environment of its own."""
    if find_mpirun()[0] is None:
        pytest.skip(find_mpirun()[1])
    wrapper = tmp_path / "python-of-b"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    cluster = cluster_file(tmp_path, ["localhost", "localhost"], (1, 2), ("ascend", "biren"), python=("", wrapper))
    cluster.write_text(cluster.read_text() + 'env = { OF_NODE = "b" }\n')
    engine = ["--engine", "mpi", "--engine-args=--allow-run-as-root", "--threads-per-rank", "1", "--cluster", cluster]
    script = job_script(tmp_path, "pass\n")
    script.write_text(
        "import os, sys\n"
        "print(f\"{os.environ['OMPI_COMM_WORLD_RANK']}:{os.environ.get('OF_NODE')}:{sys.argv[1]}\\n\", end='')\n"
    )
    ran = run([*MOE_LAUNCH, "run", *engine, script, "x y"], cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert sorted(ran.stdout.splitlines()) == ["0:None:x y", "1:b:x y", "2:b:x y"]
    words = [*MOE_LAUNCH, "generate", *engine, "--model", checkpoint, *GENERATE, "--runtime", "bridge=mpi"]
    ran = run(words, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert texts(ran) == alone
    script.write_text("import os, sys, time\nrank = os.environ['OMPI_COMM_WORLD_RANK']\nif rank == '1': sys.exit(3)\n")
    script.write_text(script.read_text() + "time.sleep(60)\n")
    assert run([*MOE_LAUNCH, "run", *engine, script], cwd=tmp_path, timeout=40).returncode == 3
    assert_nothing_left(tmp_path)


# ---- Kubernetes: its manifest, and pods played by hosts (emulated: no kubelet here) --------------------------------


def manifest(cluster, *words, options=("--image any",)):
    engine = ["--engine", "k8s", "--cluster", cluster, *(f"--engine-args={option}" for option in options)]
    return run([*MOE_LAUNCH, words[0], *engine, *words[1:]])


def test_the_pods_of_a_manifest_generate_as_one_process(two, checkpoint, alone, tmp_path):
    python = (sys.executable, sys.executable)
    cluster = cluster_file(tmp_path, two.addresses, python=python)
    cluster.write_text(cluster.read_text() + 'env = { OF_POOL = "b" }\n')
    where = ["--master-addr", two.addresses[0], "--threads-per-rank", "1", "--log-dir", tmp_path / "logs"]
    made = manifest(cluster, "generate", *where, "--model", checkpoint, *GENERATE)
    assert made.returncode == 0, made.stderr
    secret, *pools = yaml.safe_load_all(made.stdout)
    assert [document["kind"] for document in (secret, *pools)] == ["Secret", "TrainJob", "TrainJob"]
    pods = []
    for n, pool in enumerate(pools):
        trainer = pool["spec"]["trainer"]
        assert trainer["numNodes"] == 1 and "resourcesPerNode" not in trainer
        given = {item["name"]: item.get("value", secret["stringData"]["job"]) for item in trainer["env"]}
        assert given["MOE_RUNTIME_FIRST_NODE"] == str(n) and given.get("OF_POOL") == (None, "b")[n]
        of_trainer = {"JOB_COMPLETION_INDEX": "0", "PET_NNODES": "7", "PET_NODE_RANK": "3", "PET_STANDALONE": "1"}
        pods.append(
            subprocess.Popen(
                two.on(n, *trainer["command"]),
                env={**os.environ, **of_trainer, **given},
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    ended = [pod.communicate(timeout=DEADLINE) for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], ended
    assert [result["text"] for result in json.loads(ended[0][0])["results"]] == alone
    assert_nothing_left(tmp_path)


def test_a_manifest_asks_for_each_vendors_devices(tmp_path):
    cluster = Path(__file__).parents[1] / "configs" / "kubernetes.toml"
    words = ("run", "-m", "moe_runtime.launch.jobs.custom")
    options = ["--image ascend=a:1 --image c:2", "--resource ascend=huawei.com/Ascend910 --namespace mine"]
    refused = manifest(cluster, *words, options=options)
    assert refused.returncode == 2 and "what does this cluster call a device of nvidia?" in refused.stderr
    made = manifest(cluster, *words, options=[*options, "--resource nvidia=nvidia.com/gpu --runtime nvidia=of-nvidia"])
    secret, ascend, nvidia = yaml.safe_load_all(made.stdout)
    assert {document["metadata"]["namespace"] for document in (secret, ascend, nvidia)} == {"mine"}
    job, name = json.loads(secret["stringData"]["job"]), ascend["metadata"]["name"]
    assert job["address"] == f"{name}-node-0-0.{name}" and len(job["secret"]) == 64
    for pool, nodes, image, runtime, devices in (
        (ascend, 2, "a:1", "torch-distributed", {"huawei.com/Ascend910": 8}),
        (nvidia, 1, "c:2", "of-nvidia", {"nvidia.com/gpu": 4}),
    ):
        trainer = pool["spec"]["trainer"]
        assert (trainer["numNodes"], trainer["image"]) == (nodes, image)
        assert pool["spec"]["runtimeRef"]["name"] == runtime
        assert trainer["resourcesPerNode"] == {"requests": devices, "limits": devices}
    shown = run([*MOE_LAUNCH, "run", "--engine", "k8s", "--cluster", cluster, "--dry-run",
                 "--engine-args=--image x --resource y", *words[1:]])  # fmt: skip
    assert shown.returncode == 0 and "(secret)" in shown.stdout


@pytest.mark.parametrize("change, told", [
    (lambda job: job["metadata"].clear(), "metadata.name is required"),
    (lambda job: job["metadata"].update(name="Big"), "must be a DNS label"),
    (lambda job: job["metadata"].update(name="a" * 60), "too long for its pods' host names"),
    (lambda job: job["spec"].pop("runtimeRef"), "spec.runtimeRef.name is required"),
    (lambda job: job["spec"]["trainer"].update(image="i" * 501), "more than 500"),
    (lambda job: job["spec"]["trainer"].update(command=["x"] * 129), "more than 128 words"),
    (lambda job: job["spec"]["trainer"]["env"].append({"name": "A"}), "a name of its own"),
    (lambda job: job["spec"]["trainer"]["env"].append({"name": "PET_NNODES"}), "PET_ is the trainer's own"),
])  # fmt: skip
def test_rules_of_the_manifest(change, told):
    trainer = {"image": "i", "command": ["c"], "env": [{"name": "A", "value": "1"}]}
    job = {"kind": "TrainJob", "metadata": {"name": "a"}, "spec": {"runtimeRef": {"name": "r"}, "trainer": trainer}}
    assert k8s.broken_rules(job) == []
    change(job)
    assert told in k8s.broken_rules(job)[0]


def test_the_loop_to_copy_learns_on_any_number_of_ranks():
    for command in ([sys.executable], [*MOE_LAUNCH, "run", "--nproc-per-node", "2"]):
        ran = run([*command, "-m", "moe_runtime.launch.jobs.custom"])
        assert ran.returncode == 0, ran.stderr
        first, last = (float(value) for value in re.findall(r"tokens (\d+\.\d+)", ran.stdout))
        assert last < first < 5.6


def test_marked_finds_what_carries_the_mark():
    mark = f"MOE_RUNTIME_JOB_MARK=test{os.getpid()}"
    name, value = mark.split("=")
    child = subprocess.Popen(["sleep", "60"], env={**os.environ, name: value}, start_new_session=True)
    try:
        ends = time.monotonic() + 5
        while marked(mark) != [child.pid] and time.monotonic() < ends:
            time.sleep(0.01)
        assert marked(mark) == [child.pid]
    finally:
        child.kill()
        child.wait()
    assert marked(mark) == []

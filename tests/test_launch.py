"""moe-launch: what ranks get, what users see, and that no ending leaves a process behind."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from moe_runtime.launch.output import LineCutter, last_traceback

MOE_LAUNCH = [sys.executable, "-m", "moe_runtime.launch.cli"]
DEADLINE = 60.0  # for a whole launch: generous, machines of test farms are slow

# Ranks write their process ids here, then do what the test is about.
READY = """
    import os, pathlib, signal, subprocess, sys, time
    rank = os.environ["RANK"]
    def ready():
        pathlib.Path("rank_" + rank + ".tmp").write_text(str(os.getpid()))
        os.rename("rank_" + rank + ".tmp", "rank_" + rank + ".pid")
    def wait_for_others():
        deadline = time.monotonic() + 30
        while not all(pathlib.Path(f"rank_{n}.pid").exists() for n in range(int(os.environ["WORLD_SIZE"]))):
            assert time.monotonic() < deadline
            time.sleep(0.01)
"""


def script(folder, text, name="job.py"):
    (folder / name).write_text(textwrap.dedent(READY) + textwrap.dedent(text))
    return name


def launch(folder, *arguments, **settings):
    """Run moe-launch to its end."""
    return subprocess.run(
        [*MOE_LAUNCH, *arguments], cwd=folder, capture_output=True, text=True, timeout=DEADLINE, **settings
    )


def start(folder, *arguments):
    """Start moe-launch, in a process group of its own, and do not wait for it."""
    with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
        # Under nohup these tests inherit an ignored SIGHUP, which moe-launch would rightly go on ignoring.
        before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
        try:
            return subprocess.Popen(
                [*MOE_LAUNCH, *arguments], cwd=folder, stdout=out, stderr=err, start_new_session=True
            )
        finally:
            signal.signal(signal.SIGHUP, before)


def wait_until(condition, what, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.02)


def living_processes():
    """{process id: parent's id} of all processes but zombies."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            parents[int(stat.parent.name)] = int(parent)
    return parents


def descendants(process):
    parents = living_processes()
    found = {process}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def all_ranks_ready(folder, size):
    wait_until(lambda: all((folder / f"rank_{n}.pid").exists() for n in range(size)), "the ranks to start")


def assert_all_gone(processes, seconds=5.0):
    wait_until(lambda: not processes & living_processes().keys(), f"{processes} to be gone", seconds)


def one_line_of_error(result):
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("moe-launch: error: ")
    return line


# What ranks get ------------------------------------------------------------------------------------------------------


def test_every_rank_gets_torchruns_environment_and_its_own_arguments(tmp_path):
    job = script(tmp_path, "import json; print(json.dumps([dict(os.environ), sys.argv, sys.path[0], __name__]))")
    result = launch(tmp_path, "run", "--nproc-per-node=2", "--threads-per-rank=3", job, "--nnodes", "--", "x y")
    assert result.returncode == 0, result.stderr
    seen = {line[:9]: json.loads(line[9:]) for line in result.stdout.splitlines()}
    assert sorted(seen) == ["[rank 0] ", "[rank 1] "]
    ports = set()
    for number in ("0", "1"):
        env, argv, search_path, name = seen[f"[rank {number}] "]
        assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"]) == (
            number,
            number,
            "2",
            "2",
        )
        assert (env["MASTER_ADDR"], env["OMP_NUM_THREADS"]) == ("127.0.0.1", "3")
        assert "MOE_RUNTIME_LAUNCHER_PID" not in env  # or a nested launch would tie itself to the wrong process
        assert argv == [job, "--nnodes", "--", "x y"]
        assert (search_path, name) == (str(tmp_path.resolve()), "__main__")
        ports.add(int(env["MASTER_PORT"]))
    assert len(ports) == 1


def test_modules_and_programs_run_too(tmp_path):
    script(tmp_path, "print(__name__, sys.argv[1:], sys.path[0] == os.getcwd())", "my_job.py")
    result = launch(tmp_path, "run", "-m", "my_job", "-x")
    assert result.stdout == "[rank 0] __main__ ['-x'] True\n", result.stderr
    result = launch(tmp_path, "run", "--no_python", "sh", "-c", "echo $RANK; exit 5")
    assert (result.returncode, result.stdout) == (5, "[rank 0] 0\n")


def test_a_cluster_file_says_how_many_ranks_and_gives_them_its_environment(tmp_path):
    (tmp_path / "c.toml").write_text(
        "[[node]]\nname = 'a'\ndevices = 2\nenv = { COLOUR = 'red' }\n[[node]]\nname = 'b'\nhost = '127.0.0.1'\n"
    )
    job = script(tmp_path, "print(os.environ['WORLD_SIZE'], os.environ.get('COLOUR'))")
    result = launch(tmp_path, "run", "--cluster", "c.toml", job)
    assert sorted(result.stdout.splitlines()) == ["[rank 0] 3 red", "[rank 1] 3 red", "[rank 2] 3 None"]
    assert "has 3 devices" in one_line_of_error(launch(tmp_path, "run", "--cluster=c.toml", "--nproc-per-node=2", job))
    (tmp_path / "far.toml").write_text("[[node]]\nname = 'a'\nhost = 'far.example'\n")
    assert "far.example" in one_line_of_error(launch(tmp_path, "run", "--cluster", "far.toml", job))
    (tmp_path / "own.toml").write_text("[[node]]\nname = 'a'\nenv = { RANK = '3' }\n")
    assert "env sets RANK" in one_line_of_error(launch(tmp_path, "run", "--cluster", "own.toml", job))


def test_the_jobs_get_their_arguments_in_the_order_given(tmp_path):
    (tmp_path / "c.toml").write_text("[[node]]\nname = 'a'\n")
    (tmp_path / "train.toml").write_text("")
    train = launch(
        tmp_path, "train", "--set", "a=1", "train.toml", "--dry_run", "--cluster", "c.toml", "--set", "b=x y"
    ).stdout
    assert train.endswith("-m moe_runtime.launch.jobs.train train.toml --set a=1 --set 'b=x y' --cluster c.toml\n")
    generate = launch(
        tmp_path,
        "generate",
        "--dry-run",
        "--prompt=-hi",
        "--model",
        "m",
        "--max_new_tokens",
        "3",
        "--keep_fp8",
        "--json",
    ).stdout
    assert generate.endswith(
        "-m moe_runtime.launch.jobs.generate --prompt=-hi --model m --max-new-tokens 3 --keep-fp8 --json\n"
    )


# What users see ------------------------------------------------------------------------------------------------------


def test_lines_are_prefixed_whole_and_logged(tmp_path):
    job = script(
        tmp_path,
        r"""
        for n in range(300):
            os.write(1, b"x" * 50); os.write(1, b"%d\n" % n)
        os.write(2, b"caf\xe9 \xc3\xa9 no line feed")
        """,
    )
    result = launch(tmp_path, "run", "--nproc-per-node", "3", "--log-dir", "logs", job)
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    for number in range(3):
        mine = [line for line in lines if line.startswith(f"[rank {number}] ")]
        assert mine == [f"[rank {number}] {'x' * 50}{n}" for n in range(300)]
        assert f"[rank {number}] caf� é no line feed" in result.stderr.splitlines()
        log = (tmp_path / "logs" / f"rank_{number}.log").read_text()
        assert f"\n{'x' * 50}299\n" in log and "caf� é no line feed\n" in log
    assert len(lines) == 900


def test_a_progress_bar_becomes_few_whole_lines():
    cutter = LineCutter(seconds_between_states=3600)
    chunks = [b"\r 10%", b"\r 20%\r 30", b"%\r", b"\r\x1b[A\x1b[32m100%\x1b[0m\n", b"next\r", b"\nlast\r"]
    lines = [line for chunk in chunks for line in cutter.feed(chunk)] + list(cutter.end())
    assert lines == [" 10%", "\x1b[32m100%\x1b[0m", "next", "last"]


def test_the_first_failing_rank_ends_the_others_at_once_and_its_traceback_is_last(tmp_path):
    job = script(
        tmp_path,
        """
        ready(); wait_for_others()
        if rank == "1":
            try:
                {}["first"]
            except KeyError:
                raise RuntimeError("rank one broke")
        time.sleep(100)
        """,
    )
    began = time.monotonic()
    result = launch(tmp_path, "run", "--nproc-per-node", "3", "--log-dir", "logs", job)
    assert time.monotonic() - began < 20
    assert result.returncode == 1
    summary = result.stderr[result.stderr.index("moe-launch: rank 1 failed first: exit code 1") :]
    assert os.path.join("logs", "rank_1.log") in summary
    assert summary.endswith("RuntimeError: rank one broke\n")
    assert "KeyError: 'first'" in summary  # the exception it came from
    assert "runpy" not in summary and "worker.py" not in summary
    assert "rank one broke" in (tmp_path / "logs" / "rank_1.log").read_text()


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        ("sys.exit(7)", 7, "exit code 7"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "killed by SIGKILL"),
        ("import ctypes; ctypes.string_at(0)", 139, "Fatal Python error: Segmentation fault"),
    ],
)
def test_exit_codes_and_signals_are_passed_on(tmp_path, ending, code, said):
    job = script(tmp_path, f"ready()\nif rank == '1': wait_for_others(); {ending}\ntime.sleep(100)")
    result = launch(tmp_path, "run", "--nproc-per-node", "2", job)
    assert result.returncode == code
    assert said in result.stderr[result.stderr.index("moe-launch: rank 1 failed first") :]


def test_all_ranks_start_again_after_a_failure_until_it_works(tmp_path):
    job = script(
        tmp_path,
        """
        attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        print("attempt", attempt, "of", os.environ["TORCHELASTIC_MAX_RESTARTS"], flush=True)
        if attempt < 2:
            if rank == "1": os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(100)
        """,
    )
    result = launch(tmp_path, "run", "--nproc-per-node", "2", "--max-restarts", "3", "--log-dir", "logs", job)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("rank 1 failed first: killed by SIGKILL") == 2
    assert "moe-launch: starting all ranks again (2 of at most 3 restarts)\n" in result.stderr
    assert "[rank 0] attempt 2 of 3\n" in result.stdout
    for attempt, folder in enumerate(("logs", "logs/restart_1", "logs/restart_2")):
        assert (tmp_path / folder / "rank_1.log").read_text() == f"attempt {attempt} of 3\n"


@pytest.mark.parametrize(("ending", "code", "starts"), [("sys.exit(7)", 7, 2), ("sys.exit(2)", 2, 1), ("pass", 0, 1)])
def test_restarts_end_and_a_users_mistake_is_made_once(tmp_path, ending, code, starts):
    job = script(tmp_path, f"print('begun', flush=True)\n{ending}")
    result = launch(tmp_path, "run", "--max-restarts", "1", job)
    assert (result.returncode, result.stdout.count("begun")) == (code, starts)


def test_a_users_mistake_in_a_rank_is_one_line_and_exit_code_2(tmp_path):
    job = script(
        tmp_path,
        """
        import atexit
        from moe_runtime.core.errors import ConfigError
        atexit.register(print, "noise of a library that closes down", file=sys.stderr)
        raise ConfigError("num_experts = 0:\\n give at least 1")
        """,
    )
    result = launch(tmp_path, "run", job)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "[rank 0] error: num_experts = 0: give at least 1\n" in result.stderr
    assert result.stderr.splitlines()[-1].startswith(
        "moe-launch: rank 0 ended with exit code 2: error: num_experts = 0"
    )


def test_with_json_stdout_is_rank_0s_alone(tmp_path):
    job = script(tmp_path, "print('noise', file=sys.stderr)\nprint('{\"rank\":\\n' + rank + '}')")
    result = launch(tmp_path, "run", "--nproc-per-node", "2", "--json", job)
    assert result.returncode == 0
    assert json.loads(result.stdout) == {"rank": 0}
    assert "[rank 1] 1}" in result.stderr and "[rank 0] noise" in result.stderr


def test_a_dry_run_shows_each_command_and_starts_nothing(tmp_path):
    job = script(tmp_path, "ready()")
    result = launch(
        tmp_path, "run", "--nproc_per_node", "2", "--rdzv-endpoint", "localhost:29511", "--dry-run", job, "a b"
    )
    assert (result.returncode, result.stderr) == (0, "")
    heads, commands = result.stdout.splitlines()[::2], result.stdout.splitlines()[1::2]
    assert heads == [f"rank {n}  node local  host localhost  device auto:{n}" for n in range(2)]
    for number, command in enumerate(commands):
        assert f" RANK={number} " in command and " MASTER_PORT=29511 " in command
        assert command.endswith(f"{sys.executable} -m moe_runtime.launch.worker {job} 'a b'")
    assert os.listdir(tmp_path) == [job]
    subprocess.run(commands[1], shell=True, cwd=tmp_path, check=True, timeout=DEADLINE)  # what is shown can be run
    assert (tmp_path / "rank_1.pid").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "COMMAND"),
        ("fly", "invalid choice"),
        ("run", "SCRIPT"),
        ("run missing.py", "missing.py: no such script"),
        ("run --no-python missing-program", "no such program"),
        ("run --no-python -m x", "contradict"),
        ("run --unknown-option job.py", "--unknown-option"),
        ("run --nproc 2 job.py", "--nproc"),  # abbreviations are unknown options too
        ("run --nproc-per-node 0 job.py", "whole number of at least 1"),
        ("run --nproc_per_node gpu job.py", "whole number of at least 1"),
        ("run --nnodes 2 job.py", "give --rdzv-endpoint HOST:PORT, where node 0 listens"),
        ("run --nnodes 1:4 --engine torchrun job.py", "jobs do not grow or shrink"),
        ("run --nnodes 2 --rdzv-endpoint 127.0.0.1:29500 job.py", "--node-rank"),
        ("run --nnodes 2 --rdzv-endpoint 127.0.0.1:29500 --node-rank 2 job.py", "there are 2 nodes"),
        ("run --nnodes 2 --engine local job.py", "one machine"),
        ("run --engine ssh job.py", "--hostfile"),
        ("run --engine pbs job.py", "not one of local, torchrun, ssh, slurm, mpi, k8s"),
        ("run --engine k8s job.py", "--hostfile"),
        ("run --engine-args=-v job.py", "takes none"),
        ("stop nothing-of-this-name", "this host has no part in it"),
        ("run --node_rank 1 job.py", "one machine"),
        ("run --max_restarts 3 --engine mpi job.py", "mpirun does not start ranks again"),
        ("run --engine slurm job.py", "nothing falls back to localhost"),
        ("run --master-port 70000 job.py", "1 to 65535"),
        ("run --rdzv-endpoint h:x job.py", "'x'"),
        ("run --rdzv-endpoint h:1 --master-addr h job.py", "same thing"),
        ("run --shutdown-timeout -1 job.py", "--shutdown-timeout"),
        ("run --tee 9 job.py", "'9'"),
        ("run --cluster missing.toml job.py", "missing.toml"),
        ("run --log-dir job.py/logs job.py", "--log-dir"),
        ("train missing.toml", "missing.toml: no such training configuration"),
        ("train job.py --epochs 3", "--epochs"),
        ("train job.py --json", "--json"),  # the training job has no such option
        ("generate --prompt hi", "--model"),
        ("generate --model m --propmt hi", "--propmt"),
        ("bench", "say what to measure"),
        ("bench everything", "'everything'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, arguments, said):
    script(tmp_path, "ready()")
    assert said in one_line_of_error(launch(tmp_path, *arguments.split()))
    assert os.listdir(tmp_path) == ["job.py"]


def test_torchruns_options_work_in_both_spellings(tmp_path):
    job = script(
        tmp_path, "print(os.environ['MASTER_ADDR'], os.environ['MASTER_PORT'], os.environ['TORCHELASTIC_RUN_ID'])"
    )
    options = "--nproc-per-node=1 --nnodes=1 --node-rank=0 --master-addr=localhost --master-port=29512 --rdzv-id=j1"
    options += (
        " --log-dir=logs --max-restarts=0 --tee=3 -t 0:1 --threads-per-rank=1 --shutdown-timeout=2.5 --engine=local"
    )
    underscored = re.sub(r"(?<=\w)-(?=\w)", "_", options)
    assert "--nproc_per_node" in underscored
    for spelling in (options, underscored):
        result = launch(tmp_path, "run", *spelling.split(), job)
        assert result.stdout == "[rank 0] localhost 29512 j1\n", result.stderr


def test_help_shows_examples_and_needs_no_torch(tmp_path):
    for command in ("", "run", "train", "generate", "bench"):
        result = launch(tmp_path, *command.split(), "--help")
        assert result.returncode == 0 and f"examples:\n  moe-launch {command}" in result.stdout
    check = "import sys, moe_runtime.launch.cli, moe_runtime.launch.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=tmp_path, timeout=DEADLINE).returncode == 0


def test_the_last_traceback_is_found_among_other_lines():
    text = """\
        Traceback (most recent call last):
          File "a.py", line 1, in <module>
        ValueError: an earlier one
        noise
        Traceback (most recent call last):
          File "a.py", line 2, in f
        KeyError: 1

        The above exception was the direct cause of the following exception:

        Traceback (most recent call last):
          File "a.py", line 3, in <module>
            load(
        RuntimeError: Error(s) in loading:
        \tMissing key
        noise
        """
    lines = textwrap.dedent(text).splitlines()
    assert last_traceback(lines) == lines[4:-1]
    assert last_traceback(["noise"]) == []


# No ending leaves a process behind -----------------------------------------------------------------------------------

WITH_GRANDCHILD = """
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(100)"
    grandchild = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
    grandchild.stdout.readline()
    ready()
    time.sleep(100)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_to_the_launcher_ends_ranks_and_their_children(tmp_path, number):
    job = script(tmp_path, WITH_GRANDCHILD)
    launcher = start(tmp_path, "run", "--nproc-per-node", "2", "--shutdown-timeout", "0.5", job)
    all_ranks_ready(tmp_path, 2)
    family = descendants(launcher.pid)
    assert len(family) >= 5  # the launcher, two ranks, two grandchildren
    launcher.send_signal(number)
    code = launcher.wait(15)
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    assert_all_gone(family)


def test_ranks_die_with_a_launcher_even_when_its_guard_died_first(tmp_path):
    launcher = start(tmp_path, "run", "--nproc-per-node", "2", script(tmp_path, "ready()\ntime.sleep(100)"))
    all_ranks_ready(tmp_path, 2)
    family = descendants(launcher.pid)
    (guard,) = (pid for pid in family if b"moe-launch-guard" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(guard, signal.SIGKILL)
    launcher.kill()
    launcher.wait(15)
    assert_all_gone(family)


def test_a_rank_whose_launcher_is_gone_already_does_not_start(tmp_path):
    job = script(tmp_path, "ready()")
    gone = subprocess.Popen(["true"])
    gone.wait(15)
    shim = ["env", f"MOE_RUNTIME_LAUNCHER_PID={gone.pid}", sys.executable, "-m", "moe_runtime.launch.worker", job]
    assert subprocess.run(shim, cwd=tmp_path, timeout=DEADLINE).returncode == -signal.SIGKILL
    assert not (tmp_path / "rank_0.pid").exists()


def test_a_rank_gets_sigterm_first_and_sigkill_when_it_ignores_it(tmp_path):
    job = script(
        tmp_path,
        """
        def tidy_up(number, frame):
            print("tidied up", flush=True)
            sys.exit(0)
        signal.signal(signal.SIGTERM, tidy_up if rank == "0" else signal.SIG_IGN)
        ready(); wait_for_others()
        if rank == "2":
            sys.exit(3)
        while True:
            time.sleep(1)
        """,
    )
    began = time.monotonic()
    result = launch(tmp_path, "run", "--nproc-per-node", "3", "--shutdown_timeout", "1", job)
    assert time.monotonic() - began < 20
    assert result.returncode == 3
    assert "[rank 0] tidied up" in result.stdout
    assert "moe-launch: rank 1 did not stop and got SIGKILL" in result.stderr
    assert_all_gone({int((tmp_path / f"rank_{n}.pid").read_text()) for n in range(3)})


def test_children_that_outlive_a_good_rank_are_ended(tmp_path):
    job = script(
        tmp_path,
        """
        child = subprocess.Popen(["sleep", "100"])
        print(child.pid)
        """,
    )
    result = launch(tmp_path, "run", job)
    assert result.returncode == 0
    assert_all_gone({int(result.stdout.removeprefix("[rank 0] "))})


def test_a_reader_that_goes_away_ends_the_job(tmp_path):
    job = script(tmp_path, "ready()\nwhile True: print('line', flush=True)")
    reader, writer = os.pipe()
    launcher = subprocess.Popen([*MOE_LAUNCH, "run", job], cwd=tmp_path, stdout=writer, stderr=subprocess.DEVNULL)
    os.close(writer)
    all_ranks_ready(tmp_path, 1)
    family = descendants(launcher.pid)
    os.close(reader)
    assert launcher.wait(15) == 128 + signal.SIGPIPE
    assert_all_gone(family)


def test_a_rank_that_cannot_start_ends_the_others(tmp_path):
    (tmp_path / "c.toml").write_text("[[node]]\nname = 'a'\n[[node]]\nname = 'b'\npython = './no-python-here'\n")
    job = script(tmp_path, "time.sleep(100)")
    result = launch(tmp_path, "run", "--cluster", "c.toml", job)
    assert result.returncode == 2
    assert "moe-launch: error: cannot start rank 1" in result.stderr.splitlines()[-1]


def test_tee_chooses_what_is_shown_and_logs_keep_everything(tmp_path):
    job = script(tmp_path, 'print("out", rank); print("err", rank, file=sys.stderr)')
    seen = {}
    for tee in ("0", "1", "2", "3", "1:3", "0:1,1:2"):
        ran = launch(tmp_path, "run", "--nproc-per-node", "2", "--tee", tee, "--log-dir", "logs" + tee, job)
        assert ran.returncode == 0, ran.stderr
        lines = [line for line in (ran.stdout + ran.stderr).splitlines() if line.startswith("[rank")]
        seen[tee] = sorted(re.sub(r"\[rank .\] ", "", line) for line in lines)
        for rank in "01":
            log = (tmp_path / ("logs" + tee) / f"rank_{rank}.log").read_text()
            assert sorted(log.splitlines()) == [f"err {rank}", f"out {rank}"]
    assert seen["0"] == [] and seen["1"] == ["out 0", "out 1"] and seen["2"] == ["err 0", "err 1"]
    assert seen["3"] == ["err 0", "err 1", "out 0", "out 1"]
    assert seen["1:3"] == ["err 1", "out 1"] and seen["0:1,1:2"] == ["err 1", "out 0"]

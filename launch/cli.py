"""The command line, `moe-launch`: reads options, decides what each rank is to run, and hands that to an engine.

Heavy modules are imported inside the commands that need them. A user's mistake is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import secrets
import shlex
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.cluster import Cluster, Node, load_cluster
from ..core.environment import is_loopback, rank_environment
from ..core.errors import ConfigError
from . import records
from .generation import options as generation
from .job import secret_file
from .local import Ended, Rank, run_ranks
from .machine import available_cores, free_port
from .options import BothSpellings, Parser, PassOn, add, add_launch_options, seconds, whole_number
from .toml import read_toml
from .worker import USER_ERROR_CODE, USER_ERRORS, one_line

_EXAMPLES = {
    None: """examples:
  moe-launch run --nproc-per-node 2 my_script.py --my-option 3
  moe-launch train --nproc-per-node 2 configs/train.toml --set steps=100
  moe-launch generate --nproc-per-node 2 --model path/to/checkpoint --prompt "Hello"
  moe-launch check --vendor ascend
  moe-launch bench load
`moe-launch COMMAND --help` lists a command's options.""",
    "run": """examples:
  moe-launch run --nproc-per-node 2 my_script.py --my-option 3
  moe-launch run --cluster configs/cluster.toml -m my_package.my_job
  moe-launch run --nproc-per-node 2 --no-python ./my_program
  moe-launch run --nproc-per-node 2 --dry-run my_script.py
Options of moe-launch stand before SCRIPT; everything after it is the script's. Every rank gets torchrun's environment
(RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT ...).""",
    "train": """examples:
  moe-launch train --nproc-per-node 2 configs/train.toml
  moe-launch train --cluster configs/cluster.toml configs/train.toml --set steps=100 --set optimizer.lr=1e-4""",
    "generate": """examples:
  moe-launch generate --model path/to/checkpoint --prompt "Hello" --prompt "Good morning" --max-new-tokens 32
  moe-launch generate --nproc-per-node 2 --model path/to/checkpoint --input prompts.jsonl --output answers.jsonl
  moe-launch generate --model path/to/checkpoint --prompt "Hello" --temperature 0.7 --seed 1 --json > answer.json""",
    "plan": """examples:
  moe-launch plan --model configs/deepseek-v3/config.json --cluster configs/mixed-24.toml
  moe-launch plan --model path/to/checkpoint --cluster cluster.toml --load load.npz --out plan.json --plot plan.png
  moe-launch plan --model configs/deepseek-v3/config.json --cluster configs/mixed-24.toml --tflops 400 --memory-gb-s 1e3
No device and no weights are needed: what a rank holds, what limits it, and how far from optimal it can be at most.""",
    "simulate": """examples:
  moe-launch simulate --trace load.npz --ranks 32 72 144 --slots 288 --policy even eplb fast --dispatch static split
  moe-launch simulate --trace monday.npz tuesday.npz --cluster configs/mixed-24.toml --policy fast smooth robust
  moe-launch simulate --trace load.npz --ranks 1024 --policy fast warm --windows 20 --json > report.json
Traces come from runtime.record, generate --record, or SGLang's expert recorder. Everything it says is predicted.""",
    "convert": """examples:
  moe-launch convert path/to/bf16-checkpoint path/to/int8-checkpoint --to int8
  moe-launch convert path/to/fp8-checkpoint path/to/bf16-checkpoint --to bfloat16
  moe-launch convert path/to/bf16-checkpoint path/to/new --to fp8 --experts-only --json > report.json
Goes tensor by tensor, in a few GiB of memory whatever the size; DEST appears when it is whole.""",
    "status": """examples:
  moe-launch status
  moe-launch status generate-20261124-120000-1f2e --json
The exit code is 3 where the job is not running.""",
    "top": """examples:
  moe-launch top generate-20261124-120000-1f2e
  moe-launch top generate-20261124-120000-1f2e --every 5 --json >> job.jsonl
Ctrl-C ends it, the job goes on. The exit code is 3 where the job is not running or has no coordinator.""",
    "stop": """examples:
  moe-launch stop generate-20261124-120000-1f2e
Works on every host that has a part in the job; ranks get SIGTERM, and SIGKILL after the job's --shutdown-timeout.""",
    "drain": """examples:
  moe-launch drain generate-20261124-120000-4711 2
For jobs that were started with --on-loss.""",
    "grow": """examples:
  moe-launch grow generate-20261124-120000-4711
  moe-launch grow generate-20261124-120000-4711 --ranks 2 --like 0
For jobs that were started with --on-loss. The new ranks load the model's dense part and join between two rounds;
experts move to them while the job runs.""",
    "check": """examples:
  moe-launch check
  moe-launch check --vendor ascend --json > report.json
  moe-launch check --cluster configs/cluster.toml
Starts two ranks, or the cluster file's. Where the vendor's device is not on this machine it is emulated, and every row
of the report says so. The exit code is 1 where something failed or differs from what the vendor table claims.""",
}

# The training job's options, passed on to launch/jobs: (name, what argparse needs to know).
_TRAIN_OPTIONS: dict[str, dict[str, Any]] = {
    "--set": {"metavar": "KEY=VALUE", "help": "replace one value of CONFIG (repeatable)"},
    "--profile": {"metavar": "DIR", "help": "write a trace of a few steps there, a file a rank, for ui.perfetto.dev"},
    "--export": {"metavar": "DIR", "help": "train nothing: write the newest checkpoint there as a Hugging Face model"},
}


# Stands for "--" while argparse reads the command line: it would drop a script's own. No argument can hold a NUL.
_DASHES = "\0--"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["bench"]:  # its options are the bench's own, --help included
            from . import bench

            return bench.main(arguments[1:])
        options = _parser().parse_args([_DASHES if word == "--" else word for word in arguments])
        return options.command(options)
    except USER_ERRORS as error:
        print(f"moe-launch: error: {one_line(error)}", file=sys.stderr)
        return USER_ERROR_CODE


def _run(options: argparse.Namespace) -> int:
    if options.script == _DASHES and options.arguments:  # moe-launch run [options] -- SCRIPT
        options.script = options.arguments.pop(0)
    if options.no_python:
        if options.module:
            raise ConfigError("-m and --no-python contradict each other; give one of them")
        if not shutil.which(options.script):
            raise ConfigError(f"{options.script}: no such program on PATH")
    elif not options.module and not os.path.exists(options.script):
        raise ConfigError(f"{options.script}: no such script (for a module: -m MODULE, for a program: --no-python)")
    kind = ["-m"] if options.module else ["--no-python"] if options.no_python else []
    arguments = ["--" if word == _DASHES else word for word in options.arguments]
    target = [*kind, options.script, *arguments]
    return _launch(options, Path(options.script).stem, target, options.json, [] if kind else [options.script])


def _train(options: argparse.Namespace) -> int:
    if not os.path.isfile(options.config):
        raise ConfigError(f"{options.config}: no such training configuration; give a TOML file")
    if not options.cluster and not options.nproc_per_node:  # the config may name its cluster file
        named = read_toml(Path(options.config)).get("cluster")
        options.cluster = str(Path(options.config).parent / named) if isinstance(named, str) else None
    target = ["-m", "moe_runtime.launch.jobs.train", options.config, *_job_arguments(options)]

    def predict(cluster: Cluster) -> Any:
        return _planning_job().of_train(options.config, options.job_arguments, cluster, options.threads_per_rank)

    return _launch(options, "train", target, clean_stdout=False, files=[options.config], predict=predict)


def _generate(options: argparse.Namespace) -> int:
    generation.check(generation.parse(options.job_arguments))
    # Its stdout is the text (or the JSON object) and nothing else.
    target = ["-m", "moe_runtime.launch.jobs.generate", *_job_arguments(options)]

    def predict(cluster: Cluster) -> Any:
        return _planning_job().of_generate(options.job_arguments, cluster, options.threads_per_rank)

    words = options.job_arguments
    needed = [words[n + 1] for n, word in enumerate(words[:-1]) if word in ("--model", "--placement", "--input")]
    return _launch(options, "generate", target, clean_stdout=True, files=needed, predict=predict)


def _planning_job() -> Any:
    from .planning import job  # builds the model's shape with transformers

    return job


def _check(options: argparse.Namespace) -> int:
    from .conformance import command  # imports torch: the vendor is found before the ranks start

    def launch(options: argparse.Namespace, arguments: list[str]) -> int:
        return _launch(options, "check", ["-m", "moe_runtime.launch.jobs.check", *arguments], clean_stdout=True)

    return command.check(options, launch)


def _jobs_here(options: argparse.Namespace) -> int:
    from . import status

    return getattr(status, options.name)(options)


def _job_arguments(options: argparse.Namespace) -> list[str]:
    return [*options.job_arguments, *(["--cluster", options.cluster] if options.cluster else [])]


def _launch(
    options: argparse.Namespace,
    job: str,
    target: list[str],
    clean_stdout: bool,
    files: Sequence[str] = (),
    predict: Callable[[Cluster], Any] | None = None,
) -> int:
    """Start `target` (the worker's arguments) on every rank, or show what would be started.

    files: what every node must have. predict: for jobs whose model is known, what the ranks would hold and take
    (planning.job.Job), for --dry-run.
    """
    job = re.sub(r"[^\w.-]", "_", options.rdzv_id or job)
    options.engine = options.engine or ("local" if options.nnodes in (None, "1", "1:1") else "torchrun")
    if options.max_restarts and options.engine == "mpi":
        raise ConfigError("--max-restarts: mpirun does not start ranks again; leave it out, or use another engine")
    if options.rdzv_endpoint:
        if options.master_addr or options.master_port:
            raise ConfigError("--rdzv-endpoint and --master-addr/--master-port say the same thing; give one of them")
        options.master_addr, options.master_port = options.rdzv_endpoint
    if options.engine != "local":
        return _launch_nodes(options, job, target, clean_stdout, files, predict)
    cluster = _local_cluster(options)
    ranks = _plan_ranks(options, cluster, job, target)
    if options.dry_run:
        _show_ranks(
            cluster,
            predict,
            [shlex.join(["env", *(f"{key}={value}" for key, value in rank.env.items()), *rank.argv]) for rank in ranks],
        )
        return 0
    log_dir = Path(options.log_dir or f"runs/{job}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--log-dir {log_dir}: cannot make this folder ({error.strerror})") from None
    print(f"moe-launch: {len(ranks)} rank{'s'[: len(ranks) != 1]}, logs in {log_dir}", file=sys.stderr)
    record = records.write(log_dir.name, engine="local", log_dir=str(log_dir.absolute()))
    settings = {"shutdown_timeout": options.shutdown_timeout, "clean_stdout": clean_stdout, "tee": options.tee}

    def start(attempt: int, logs: Path) -> Ended:
        with tempfile.TemporaryDirectory(prefix="moe-launch-") as folder:  # of this user alone (tempfile.mkdtemp)
            secret = secret_file(Path(folder), secrets.token_hex(32))
            ranks = _plan_ranks(options, cluster, job, target, attempt, secret)
            if options.on_loss != "fail":
                return run_ranks(ranks, logs, **settings, keep=_keeper(options, len(ranks), logs, record))
            # Without restarts a stopped rank may be meant to go on later.
            stopped_s = options.silence if options.max_restarts else None
            return run_ranks(ranks, logs, **settings, stopped_s=stopped_s)

    ended = start(0, log_dir)
    if options.on_loss != "fail":  # restarts were those of single ranks
        records.end(record, ended.code)
        return ended.code
    for attempt in range(1, options.max_restarts + 1):
        if not ended.may_restart:
            break
        again = f"starting all ranks again ({attempt} of at most {options.max_restarts} restarts)"
        print(f"moe-launch: {again}", file=sys.stderr)
        (logs := log_dir / f"restart_{attempt}").mkdir(exist_ok=True)
        ended = start(attempt, logs)
    records.end(record, ended.code)
    return ended.code


def _keeper(options: argparse.Namespace, size: int, log_dir: Path, record: Path) -> Callable[..., Any]:
    """What makes the keeper of a job that survives losses (keeper.py: zmq and msgpack, which others do not need)."""
    from .keeper import Keeper, Survival

    def make(events: Any) -> Keeper:
        limits = options.metrics_port, options.drain_slower_than
        survival = Survival(options.on_loss, options.silence, options.max_restarts, *limits)
        secret, host = secrets.token_hex(32), socket.gethostname()
        keeper = Keeper(survival, size, "127.0.0.1", free_port(), log_dir, events, secret, host)
        records.add(record, **records.coordinator(keeper.address, keeper.port, keeper.secret))
        return keeper

    return make


def _launch_nodes(
    options: argparse.Namespace,
    job: str,
    target: list[str],
    clean_stdout: bool,
    files: Sequence[str],
    predict: Callable[[Cluster], Any] | None,
) -> int:
    """Start a job over several hosts, or this host's part of it."""
    from . import multinode  # zmq and msgpack, which one machine does not need

    if options.engine not in multinode.ENGINES:
        engines = ", ".join(("local", *multinode.ENGINES))
        raise ConfigError(f"--engine {options.engine}: not one of {engines}")
    needed = [*files, *([options.cluster] if options.cluster else [])]
    made = multinode.make_job(options, job, target, needed, clean_stdout)
    if not options.dry_run:
        return multinode.launch(options, made)
    _show_ranks(multinode.cluster_of(options), predict)
    for line in multinode.commands(options, made):
        print(line)
    return 0


def _show_ranks(cluster: Cluster, predict: Callable[[Cluster], Any] | None, commands: Sequence[str] = ()) -> None:
    """--dry-run: where each rank would be, what it would hold and take where the model is known, and its command."""
    held: list[list[str]]
    held, said = [[]] * cluster.num_ranks, ""
    try:
        if predict:
            job = predict(cluster)
            held, said = _planning_job().rank_lines(job), _planning_job().summary(job)
    except USER_ERRORS as error:  # the model may lie on other machines only; the commands are shown all the same
        said = f"what ranks would hold is not known: {one_line(error)}"
    if said:
        print(said)
    for rank, ((node, device), holds) in enumerate(zip(_devices(cluster), held, strict=True)):
        island = (node.emulate or node.vendor) + (f" {node.island}" if node.island else "")
        emulated = " (emulated)" if node.emulate else ""
        where = f"node {node.name}  host {node.host}  device {node.vendor}:{device}"
        print(f"rank {rank}  {where}" + (f"  island {island}{emulated}" if island != "auto" else ""))
        for line in (*holds, *commands[rank : rank + 1]):
            print(f"  {line}")


def _local_cluster(options: argparse.Namespace) -> Cluster:
    """The cluster to run on, refused where it is more than the local engine can do."""
    if options.nnodes not in (None, "1", "1:1"):
        raise ConfigError(f"--nnodes {options.nnodes}: the local engine runs one machine; use --engine torchrun")
    if options.node_rank:
        raise ConfigError(f"--node-rank {options.node_rank}: the local engine runs one machine, whose node rank is 0")
    if options.engine_args:
        raise ConfigError("--engine-args: the local engine takes none")
    wanted = options.nproc_per_node
    if not options.cluster:
        return Cluster((Node("local", devices=wanted or 1),))
    cluster = load_cluster(options.cluster)
    here = ("localhost", socket.gethostname(), socket.gethostname().split(".")[0])
    for node in cluster.nodes:
        if node.host not in here and not is_loopback(node.host):
            raise ConfigError(
                f"{options.cluster}: node {node.name} is on host {node.host}; the local engine runs one machine: "
                "give --engine ssh (or torchrun or slurm), or a cluster file whose hosts are all localhost"
            )
    if wanted not in (None, cluster.num_ranks):
        raise ConfigError(
            f"--nproc-per-node {wanted}: {options.cluster} has {cluster.num_ranks} devices; "
            "leave the option out, or change the file"
        )
    return cluster


def _devices(cluster: Cluster) -> list[tuple[Node, int]]:
    """Each rank's node, and the number of its device there."""
    return [(node, device) for node in cluster.nodes for device in range(node.devices)]


def _plan_ranks(
    options: argparse.Namespace,
    cluster: Cluster,
    job: str,
    target: list[str],
    attempt: int = 0,
    secret: Mapping[str, str] | None = None,
) -> list[Rank]:
    size = cluster.num_ranks
    address, port = options.master_addr or "127.0.0.1", options.master_port or free_port()
    cores = available_cores()
    ranks = []
    for number, node in enumerate(cluster.rank_nodes()):
        env = rank_environment(number, size, number, size, address, port, max(1, cores // size))
        env |= secret or {}
        env |= {"TORCHELASTIC_RUN_ID": job, "TORCHELASTIC_USE_AGENT_STORE": "False"}
        env |= {"TORCHELASTIC_RESTART_COUNT": str(attempt), "TORCHELASTIC_MAX_RESTARTS": str(options.max_restarts)}
        if options.threads_per_rank:
            env["OMP_NUM_THREADS"] = str(options.threads_per_rank)
        taken = sorted(node.env.keys() & env.keys() - {"OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "PYTHONUNBUFFERED"})
        if taken:
            raise ConfigError(
                f"{options.cluster}: node {node.name}: env sets {taken[0]}, which is the launcher's to set"
            )
        command = (node.python or sys.executable, "-m", "moe_runtime.launch.worker", *target)
        ranks.append(Rank(command, {**env, **node.env}, f"rank {number}"))
    return ranks


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="moe-launch", description="Start jobs of moe-runtime.", epilog=_EXAMPLES[None])
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command_name")

    def add_command(name: str, what: str, command: Any) -> tuple[Parser, Any]:
        added = commands.add_parser(name, help=what, description=what, epilog=_EXAMPLES.get(name))
        added.set_defaults(command=command, job_arguments=[], json=False)
        add_launch_options(added.add_argument_group("launch options (torchrun's; underscores work as well)"))
        return added, added.add_argument_group("job options")

    run, _ = add_command("run", "Run any job script on every rank.", _run)
    run.add_argument("-m", "--module", action="store_true", help="SCRIPT is a module, as in python -m")
    add(run, "--no-python", action="store_true", help="SCRIPT is a program, not Python")
    run.add_argument("--json", action="store_true", help="keep stdout for rank 0's output alone, unprefixed")
    run.add_argument("script", metavar="SCRIPT", help="the job script")
    run.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="its arguments, passed on as they are")

    train, job = add_command("train", "Train on every rank.", _train)
    train.add_argument("config", metavar="CONFIG.toml", help="the training configuration")
    _add_job_options(job, _TRAIN_OPTIONS)

    _, job = add_command("generate", "Generate text with the model's experts spread over the ranks.", _generate)
    _add_job_options(job, generation.to_pass_on())

    _, job = add_command("check", "Preflight, and conformance of a vendor's device and library.", _check)
    named = "a row of the vendor table (default: auto, the one that is here)"
    job.add_argument("--vendor", default="auto", metavar="NAME", help=named)
    add(job, "--timeout-s", type=seconds, default=60.0, metavar="SECONDS", help="deadline of a probe (default: 60)")
    job.add_argument("--json", action="store_true", help="one JSON object on stdout, everything else on stderr")

    for name, where, what in (
        ("plan", ".planning", "Plan where experts live: memory, experts and predicted time per rank; needs no device."),
        ("simulate", ".planning", "Replay load traces against placements, policies and cluster sizes."),
        ("convert", "", "Write a checkpoint in bfloat16, FP8 blocks or INT8 blocks."),
        ("top", "", "Watch a job: its view, ranks, tokens/s, outages, and who holds the others up."),
    ):
        module = importlib.import_module(f"{where}.{name}", __package__)
        added = commands.add_parser(name, help=what, description=what, epilog=_EXAMPLES[name])
        added.set_defaults(command=module.run)
        module.add_options(BothSpellings(added))

    for name, what in (("status", "Show a job, or the jobs of this host."), ("stop", "End a job on all its nodes.")):
        added = commands.add_parser(name, help=what, description=what, epilog=_EXAMPLES[name])
        added.set_defaults(command=_jobs_here, name=name)
        nargs = "?" if name == "status" else None
        added.add_argument("job", metavar="JOB", nargs=nargs, help="as the launcher printed it")
        added.add_argument("--json", action="store_true", help="one JSON object on stdout")
        added.add_argument("--timeout", type=seconds, default=60.0, metavar="SECONDS", help="of the wait for its end")

    what = "Have a rank leave a running job; its experts and its work go to the others."
    drained = commands.add_parser("drain", help=what, description=what, epilog=_EXAMPLES["drain"])
    drained.set_defaults(command=_jobs_here, name="drain")
    drained.add_argument("job", metavar="JOB", help="as the launcher printed it")
    drained.add_argument("rank", metavar="RANK", type=whole_number(0), help="the rank's number")
    drained.add_argument(
        "--timeout", type=seconds, default=300.0, metavar="SECONDS", help="of the wait for its leaving"
    )

    what = "Have a running job start more ranks; experts and work move to them."
    grown = commands.add_parser("grow", help=what, description=what, epilog=_EXAMPLES["grow"])
    grown.set_defaults(command=_jobs_here, name="grow")
    grown.add_argument("job", metavar="JOB", help="as the launcher printed it")
    grown.add_argument("--ranks", type=whole_number(1), default=1, metavar="N", help="how many (default: 1)")
    beside = "on the host and node of this rank of the job (default: the last one)"
    grown.add_argument("--like", type=whole_number(0), metavar="RANK", help=beside)
    wait = "of the wait for their joining (default: 300)"
    grown.add_argument("--timeout", type=seconds, default=300.0, metavar="SECONDS", help=wait)

    commands.add_parser("bench", help="Measure on this machine; see moe-launch bench --help.")
    return parser


def _add_job_options(group: Any, job_options: dict[str, dict[str, Any]]) -> None:
    for name, settings in job_options.items():
        add(group, name, action=PassOn, **settings)


if __name__ == "__main__":
    sys.exit(main())

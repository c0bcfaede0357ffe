"""Write the Kubernetes manifest of a job: one TrainJob of Kubeflow Trainer for each pool of like nodes, one pod a node.

Kubernetes starts and keeps the pods; in each an agent takes its job from a Secret and its number from the pod's place.
What a pod looks like beyond the job (volumes, node selectors, tolerations) is the cluster's TrainingRuntime's to say.
Source of names, limits and required fields: kubeflow/trainer, pkg/apis/trainer/v1alpha1/trainjob_types.go; of the
first pod's address, <trainjob>-node-0-0.<trainjob>: the torch plugin there. Nobody has applied one of these to a real
cluster yet.
"""

from __future__ import annotations

import argparse
import itertools
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import yaml

from ...core import environment
from ...core.cluster import Node
from ...core.errors import ConfigError
from ..job import Job

_API = "trainer.kubeflow.org/v1alpha1"
_AGENT = ("python", "-m", "moe_runtime.launch.agent", "--from-environment")


def job_name(text: str) -> str:
    """A name for a job that leaves room in the 63 characters of a pod's host name."""
    letters = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:20].strip("-")
    return f"{letters if letters[:1].isalpha() else f'job-{letters}'}-{secrets.token_hex(3)}"


def first_address(job_name: str) -> str:
    """Where node 0's controller can be reached: the first pod of the first pool."""
    return f"{_pool_name(job_name, 0)}-node-0-0.{_pool_name(job_name, 0)}"


def manifest(job: Job, words: Sequence[str]) -> str:
    """The YAML documents of a job: a Secret with what its agents are told, and a TrainJob for each pool.

    words: options of this engine (`_Options`). Raises ConfigError where an image or a device's resource name is missing
    or where what comes out breaks a rule of TrainJob's schema.
    """
    options = _options(words)
    metadata = {"namespace": options.namespace} if options.namespace else {}
    told = {"stringData": {"job": job.to_json()}}
    documents: list[dict[str, Any]] = [
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": job.name, **metadata}, **told}
    ]
    first = 0
    for number, (_, nodes) in enumerate(itertools.groupby(job.nodes, _likeness)):
        pool = list(nodes)
        name = {"name": _pool_name(job.name, number), **metadata}
        trainer = _trainer(pool, first, job.name, options)
        spec = {"runtimeRef": {"name": _of(options.runtime, pool[0].vendor) or "torch-distributed"}, "trainer": trainer}
        documents.append({"apiVersion": _API, "kind": "TrainJob", "metadata": name, "spec": spec})
        first += len(pool)
    if problems := [problem for document in documents for problem in broken_rules(document)]:
        raise ConfigError(f"--engine k8s: {problems[0]}")
    return yaml.safe_dump_all(documents, sort_keys=False, width=120)


def broken_rules(document: Mapping[str, Any]) -> list[str]:
    """What a Secret or TrainJob lacks of its schema's required fields, or has too much of; one line each."""
    name = document.get("metadata", {}).get("name", "")
    rules = [(bool(name), "metadata.name is required")]
    if document.get("kind") == "TrainJob":
        trainer = document.get("spec", {}).get("trainer", {})
        names = [variable.get("name") for variable in trainer.get("env", [])]
        command = [*trainer.get("command", []), *trainer.get("args", [])]
        runtime = document.get("spec", {}).get("runtimeRef", {}).get("name", "")
        rules += [
            (bool(re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)), "metadata.name must be a DNS label (RFC 1035)"),
            (len(f"{name}-node-0-0") <= 63, "metadata.name is too long for its pods' host names of 63 characters"),
            (0 < len(runtime) <= 253, "spec.runtimeRef.name is required, of at most 253 characters"),
            (len(trainer.get("image", "")) <= 500, "spec.trainer.image has more than 500 characters"),
            (len(command) <= 128, "spec.trainer.command has more than 128 words"),
            (len(names) <= 128, "spec.trainer.env has more than 128 variables"),
            (all(names) and len(set(names)) == len(names), "spec.trainer.env: each variable needs a name of its own"),
            (not any(str(word).startswith("PET_") for word in names), "spec.trainer.env: PET_ is the trainer's own"),
        ]
    return [f"{document.get('kind')} {name}: {told}" for holds, told in rules if not holds]


def _trainer(pool: Sequence[Node], first: int, secret: str, options: argparse.Namespace) -> dict[str, Any]:
    node = pool[0]
    image = _of(options.image, node.vendor)
    if not image:
        raise ConfigError(
            f"--engine k8s: no image for {node.vendor} nodes; give --engine-args='--image {node.vendor}=IMAGE'"
        )
    resources = {}
    if node.vendor != "cpu":
        name = _of(options.resource, node.vendor)
        if not name:
            raise ConfigError(
                f"--engine k8s: what does this cluster call a device of {node.vendor}? Give "
                f"--engine-args='--resource {node.vendor}=NAME' (kubectl describe node shows it, nvidia.com/gpu say)"
            )
        resources = {"resourcesPerNode": {kind: {name: node.devices} for kind in ("requests", "limits")}}
    job = {"name": environment.ENGINE_JOB, "valueFrom": {"secretKeyRef": {"name": secret, "key": "job"}}}
    env = {environment.FIRST_NODE: str(first), **node.env}
    command = [node.python or _AGENT[0], *_AGENT[1:]]
    variables = [job, *({"name": key, "value": value} for key, value in env.items())]
    return {"image": image, "command": command, "env": variables, "numNodes": len(pool), **resources}


def _pool_name(job_name: str, number: int) -> str:
    return f"{job_name}-p{number}"


def _likeness(node: Node) -> tuple:
    return node.vendor, node.devices, node.python, sorted(node.env.items()), node.interface, node.visible_devices


def _of(given: Sequence[str], vendor: str) -> str | None:
    """The value for a vendor, else the one that names none."""
    named = dict(text.split("=", 1) if "=" in text else ("", text) for text in given)
    return named.get(vendor, named.get(""))


def _options(words: Sequence[str]) -> argparse.Namespace:
    parser = _Options(prog="--engine k8s", add_help=False, allow_abbrev=False)
    for name in ("--image", "--resource", "--runtime"):
        parser.add_argument(name, action="append", default=[], metavar="[VENDOR=]NAME")
    parser.add_argument("--namespace")
    return parser.parse_args(words)


class _Options(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"--engine-args: {message}; k8s takes --image, --resource, --runtime and --namespace")

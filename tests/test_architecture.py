"""DESIGN.md section 4, read from the sources: layers, single importers, one reader of the environment, no pickle.

Every rule is a function from a module (name and syntax tree) to what it finds wrong; each is first shown a source
that breaks it, so that a rule which sees nothing does not pass for a clean tree.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = {"moe_runtime": "moe_runtime"} | SETUPTOOLS["package-dir"]  # package -> folder
LAYERS = {"moe_runtime.core": 0, "moe_runtime.comm": 1, "moe_runtime.experts": 1, "moe_runtime.launch": 3}
ONE_IMPORTER = ["mpi4py", "cupy", "zmq", "msgpack", "moe_runtime._C"]
PICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "multiprocessing"}
OBJECT_COLLECTIVES = {
    "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list",
    "recv_object_list",
}  # fmt: skip
MPI4PY_PICKLES = {
    "allgather", "allreduce", "alltoall", "bcast", "exscan", "gather", "iprobe", "irecv", "isend", "issend", "reduce",
    "scan", "scatter", "sendrecv", "ssend",
}  # fmt: skip


@dataclass(frozen=True)
class Module:
    name: str
    source: str
    is_package: bool = False

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @property
    def layer(self) -> int:
        return layer_of(self.name)

    @cached_property
    def imports(self) -> set[str]:
        """Every name imported anywhere in the file, absolute: `from a import b` gives a and a.b."""
        found: set[str] = set()
        package = self.name.split(".") if self.is_package else self.name.split(".")[:-1]
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                start = ".".join([*base, *(node.module.split(".") if node.module else [])])
                found |= {start} | {f"{start}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__") and node.args:
                if isinstance(node.args[0], ast.Constant):
                    found.add(str(node.args[0].value))
        return found

    def imports_any(self, name: str) -> bool:
        return any(imported == name or imported.startswith(f"{name}.") for imported in self.imports)

    def dotted(self) -> Iterator[str]:
        """Every dotted expression of the file, such as "os.environ", with import aliases resolved."""
        aliases = {
            alias.asname or alias.name: alias.name
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute):
                parts = [node.attr]
                while isinstance(node.value, ast.Attribute):
                    node = node.value
                    parts.insert(0, node.attr)
                if isinstance(node.value, ast.Name):
                    yield ".".join([aliases.get(node.value.id, node.value.id), *parts])


def called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def layer_of(name: str) -> int:
    return next((layer for prefix, layer in LAYERS.items() if f"{name}.".startswith(f"{prefix}.")), 2)


def read_modules() -> dict[str, Module]:
    modules = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = list(path.relative_to(ROOT / folder).with_suffix("").parts)
            is_package = parts[-1] == "__init__"
            name = ".".join([package, *(parts[:-1] if is_package else parts)])
            modules[name] = Module(name, path.read_text(), is_package)
    return modules


MODULES = read_modules()


# ---------------------------------------------------------------- the rules


def upward_imports(module: Module) -> list[str]:
    """Imports of a higher layer, of a sibling in comm|experts, or of our folders under their bare names."""
    wrong = [n for n in module.imports if n.split(".")[0] in ("comm", "experts", "launch", "core")]
    for name in module.imports:
        if name.split(".")[0] == "moe_runtime" and name not in ("moe_runtime", "moe_runtime._C"):
            siblings = layer_of(name) == module.layer == 1 and name.split(".")[1] != module.name.split(".")[1]
            # `from .. import errors` also names the package itself; what counts is what is taken from it.
            if layer_of(name) > module.layer or siblings:
                wrong.append(name)
    return sorted(wrong)


def torch_distributed_in_core(module: Module) -> list[str]:
    if module.layer:
        return []
    used = {name for name in [*module.imports, *module.dotted()] if f"{name}.".startswith("torch.distributed.")}
    return sorted(used)


def numba_outside_experts(module: Module) -> list[str]:
    return ["numba"] * (module.imports_any("numba") and not module.name.startswith("moe_runtime.experts"))


def environment_readers(module: Module) -> list[str]:
    if module.name == "moe_runtime.core.environment":
        return []
    names = ("environ", "environb", "getenv", "getenvb", "putenv", "unsetenv")
    wanted = {f"{owner}.{name}" for owner in ("os", "posix") for name in names}
    return sorted(
        {n for n in module.imports if n in wanted}
        | {n for n in module.dotted() if ".".join(n.split(".")[:2]) in wanted}
    )


def code_from_data(module: Module) -> list[str]:
    """Ways to run code that came as data: pickle in all its forms, eval, exec, object collectives."""
    wrong = [name for name in module.imports if name.split(".")[0] in PICKLERS]
    wrong += [name for name in module.imports if name.split(".")[-1] in OBJECT_COLLECTIVES]
    wrong += [n for n in [*module.imports, *module.dotted()] if n in ("torch.load", "torch.save", "torch.hub.load")]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
                wrong.append(node.func.id)
            if isinstance(node.func, ast.Attribute) and node.func.attr in OBJECT_COLLECTIVES:
                wrong.append(node.func.attr)
            if module.imports_any("mpi4py") and isinstance(node.func, ast.Attribute):
                wrong += [f"mpi4py {node.func.attr}"] * (node.func.attr in MPI4PY_PICKLES)
            for keyword in node.keywords:
                if keyword.arg == "allow_pickle" and not is_constant(keyword.value, False):
                    wrong.append("allow_pickle")
                if keyword.arg == "weights_only" and not is_constant(keyword.value, True):
                    wrong.append("weights_only")
                if keyword.arg == "trust_remote_code" and is_constant(keyword.value, True):
                    wrong.append("trust_remote_code")
    return wrong


def is_constant(node: ast.expr, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def swallowed_errors(module: Module) -> list[str]:
    """Bare except; everything caught and nothing done about it."""
    wrong = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler):
            names = [getattr(n, "id", getattr(n, "attr", "")) for n in ast.walk(node.type)] if node.type else []
            idle = all(isinstance(line, (ast.Pass, ast.Continue)) or is_ellipsis(line) for line in node.body)
            if node.type is None or (idle and {"Exception", "BaseException"} & set(names)):
                wrong.append(f"line {node.lineno}")
        elif isinstance(node, ast.Call) and called(node) == "suppress":
            if {getattr(argument, "id", "") for argument in node.args} & {"Exception", "BaseException"}:
                wrong.append(f"line {node.lineno}")
    return wrong


def is_ellipsis(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and is_constant(line.value, ...)


def missing_docstring(module: Module) -> list[str]:
    return [] if ast.get_docstring(module.tree) else ["no docstring"]


RULES = [
    upward_imports, torch_distributed_in_core, numba_outside_experts, environment_readers, code_from_data,
    swallowed_errors, missing_docstring,
]  # fmt: skip

# rule -> sources that break it, as (module, source)
VIOLATIONS = {
    upward_imports: [
        ("core.a", "from ..comm import wire"),
        ("core.a", "from .. import comm"),
        ("core.a", "from .. import runtime"),
        ("core.a", "import moe_runtime.layer"),
        ("comm.a", "def f():\n    from ..experts.blocks import BLOCK"),
        ("experts.a", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..comm import plan"),
        ("comm.a", "from moe_runtime.errors import PeerLost"),
        ("runtime2", "from .launch import cli"),
        ("runtime2", "import importlib\nimportlib.import_module('moe_runtime.launch.cli')"),
        ("launch.a", "from comm import plan"),
        ("launch.a", "import experts.blocks"),
    ],
    torch_distributed_in_core: [
        ("core.a", "import torch.distributed as dist"),
        ("core.a", "from torch import distributed"),
        ("core.a", "from torch.distributed import all_reduce"),
        ("core.a", "import torch\ntorch.distributed.is_initialized()"),
    ],
    numba_outside_experts: [
        ("comm.a", "import numba"),
        ("runtime2", "from numba import njit"),
        ("core.a", "def f():\n    import numba.core"),
    ],
    environment_readers: [
        ("comm.a", "import os\nos.environ['RANK']"),
        ("comm.a", "import os as system\nsystem.environ.get('RANK')"),
        ("launch.a", "import os\nos.getenv('RANK')"),
        ("launch.a", "from os import environ"),
        ("core.a", "from os import getenv as g"),
    ],
    code_from_data: [
        ("comm.a", "import pickle"),
        ("comm.a", "from multiprocessing import Pipe"),
        ("comm.a", "import torch\ntorch.load('x')"),
        ("comm.a", "from torch import load"),
        ("comm.a", "import numpy as np\nnp.load('x', allow_pickle=True)"),
        ("comm.a", "eval('1')"),
        ("comm.a", "exec('1')"),
        ("comm.a", "import torch.distributed as dist\ndist.all_gather_object([], 1)"),
        ("comm.a", "from torch.distributed import broadcast_object_list"),
        ("comm.a", "from mpi4py import MPI\nMPI.COMM_WORLD.bcast(1)"),
        ("runtime2", "from transformers import AutoConfig\nAutoConfig.from_pretrained('x', trust_remote_code=True)"),
    ],
    swallowed_errors: [
        ("comm.a", "try:\n    f()\nexcept:\n    raise"),
        ("comm.a", "try:\n    f()\nexcept Exception:\n    pass"),
        ("comm.a", "for x in y:\n    try:\n        f()\n    except (ValueError, Exception):\n        continue"),
        ("comm.a", "try:\n    f()\nexcept BaseException as error:\n    ..."),
        ("comm.a", "from contextlib import suppress\nwith suppress(Exception):\n    f()"),
    ],
    missing_docstring: [("comm.a", ""), ("comm.a", "import os"), ("comm.a", "# a comment\nx = 'text'")],
}  # fmt: skip

# What the same rules must let pass.
FINE = [
    ("core.a", '"""Doc."""\nfrom .errors import ConfigError\nfrom . import native\nimport numpy\nimport os.path'),
    ("core.native", '"""Doc."""\nfrom .. import _C'),
    ("comm.a", '"""Doc."""\nfrom ..core.errors import PeerLost\nfrom . import plan\nimport torch.distributed as dist'),
    ("experts.a", '"""Doc."""\nimport numba\nfrom ..core import placement\nre.compile("x")\nmodel.eval()'),
    ("runtime2", '"""Doc."""\nfrom .comm import plan\nfrom .experts import fp8\nimport os\nos.path.join("a")'),
    ("launch.a", '"""Doc."""\nimport moe_runtime\nfrom moe_runtime.comm import plan\nfrom ..core import config'),
    ("launch.a", '"""Doc."""\ntry:\n    f()\nexcept OSError:\n    pass\nnp.load("x", allow_pickle=False)'),
]


@pytest.mark.parametrize(
    "rule, name, source",
    [pytest.param(rule, *case, id=f"{rule.__name__}-{n}") for rule in RULES for n, case in enumerate(VIOLATIONS[rule])],
)
def test_the_rule_sees_a_violation(rule, name, source):
    assert rule(Module(f"moe_runtime.{name}", source))


@pytest.mark.parametrize("name, source", FINE)
def test_the_rules_let_good_sources_pass(name, source):
    assert [rule(Module(f"moe_runtime.{name}", source)) for rule in RULES] == [[]] * len(RULES)


@pytest.mark.parametrize("rule", RULES)
def test_no_module_breaks_the_rule(rule):
    assert {name: found for name, module in MODULES.items() if (found := rule(module))} == {}


def test_the_rules_have_seen_the_tree():
    assert {module.layer for module in MODULES.values()} == {0, 1, 2, 3}
    assert {"moe_runtime.comm.dispatch", "moe_runtime.core.errors", "moe_runtime.launch.cli"} <= MODULES.keys()
    assert "moe_runtime.core.errors" in MODULES["moe_runtime.comm.dispatch"].imports
    assert MODULES["moe_runtime.core.environment"].imports_any("os")


@pytest.mark.parametrize("library", ONE_IMPORTER)
def test_at_most_one_module_imports(library):
    importers = [name for name, module in MODULES.items() if module.imports_any(library)]
    assert len(importers) <= 1, importers
    if library in ("mpi4py", "msgpack", "moe_runtime._C"):  # in use from the start
        assert len(importers) == 1


def test_only_the_layer_module_and_the_runtime_above_it_join_comm_and_experts():
    """DESIGN.md: L2 is the only place where comm and experts meet."""
    meeting = [
        n for n, m in MODULES.items() if m.imports_any("moe_runtime.comm") and m.imports_any("moe_runtime.experts")
    ]
    assert "moe_runtime.layer" in meeting
    assert all(MODULES[name].layer >= 2 for name in meeting)


# ---------------------------------------------------------------- the tree


def test_setup_py_follows_the_rules_too():
    module = Module("setup", (ROOT / "setup.py").read_text())
    assert [rule(module) for rule in (environment_readers, code_from_data, swallowed_errors, missing_docstring)] == [
        []
    ] * 4


def test_every_package_in_the_tree_is_declared_and_every_declared_one_is_there():
    in_tree = set()
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.parent.relative_to(ROOT / folder).parts
            in_tree.add(".".join([package, *inside]))
            assert (path.parent / "__init__.py").is_file(), f"{path.parent} has modules but no __init__.py"
    assert in_tree == set(SETUPTOOLS["packages"])


def test_the_source_folders_are_the_ones_of_the_design():
    assert FOLDERS == {
        "moe_runtime": "moe_runtime", "moe_runtime.comm": "comm", "moe_runtime.experts": "experts",
        "moe_runtime.launch": "launch",
    }  # fmt: skip


def test_tests_are_no_package():
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_python_is_in_one_c_file_only_and_torch_in_none():
    sources = {path.name: path.read_text() for path in (ROOT / "csrc").rglob("*") if path.suffix in (".c", ".h")}
    includes = defaultdict(set)
    for name, text in sources.items():
        for header in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, re.M):
            includes[header].add(name)
    assert includes["Python.h"] == {"binding.c"}
    foreign = [h for h in includes if h.split("/")[0] in ("torch", "ATen", "c10", "numpy", "cuda_runtime.h", "mpi.h")]
    assert not foreign
    for path in (ROOT / "csrc").rglob("*"):
        assert path.is_dir() or path.suffix in (".c", ".h"), f"{path.name}: csrc/ is C11"


# ---------------------------------------------------------------- what importing does


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


def test_importing_the_package_starts_nothing(tmp_path):
    ran = run_python(
        "import moe_runtime\n"
        "import os, sys, threading\n"
        "def listed(folder): return os.listdir(folder) if os.path.isdir(folder) else []\n"
        "heavy = {'torch', 'transformers', 'numpy', 'numba', 'mpi4py', 'zmq', 'msgpack', 'cupy'} & set(sys.modules)\n"
        "files = [f'/proc/self/fd/{n}' for n in listed('/proc/self/fd')]\n"
        "sockets = [f for f in files if os.path.lexists(f) and os.readlink(f).startswith('socket:')]\n"
        "print(sorted(heavy), threading.active_count(), len(listed('/proc/self/task') or [0]), sockets)",
        tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "[] 1 1 []" and not ran.stderr


def test_every_public_name_is_there():
    import moe_runtime

    assert all(hasattr(moe_runtime, name) for name in moe_runtime.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        moe_runtime.nonsense


@pytest.mark.parametrize("folder", ["comm", "experts", "launch"])
def test_a_source_folder_does_not_pass_for_a_package_of_its_bare_name(folder):
    """Run from the repository, `import comm` would otherwise shadow the PyPI package that ipykernel needs."""
    ran = run_python(f"import {folder}", ROOT)
    assert ran.returncode != 0
    last = ran.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError") and f"moe_runtime.{folder}" in last and "install" in last
    inside = run_python(f"import moe_runtime.{folder}", ROOT)
    assert inside.returncode == 0, inside.stderr

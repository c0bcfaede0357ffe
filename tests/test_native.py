"""Compiles the C plan with its own test program under the address and undefined-behaviour sanitizers, and runs it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parent / "csrc"
FLAGS = ["-std=c11", "-g", "-O1", "-Wall", "-Wextra", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def run(*command: str | Path, seconds: int = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=seconds, check=False)


@pytest.fixture(scope="module")
def compiler(tmp_path_factory) -> str:
    """A C compiler whose sanitizers work here; some are installed without the sanitizers' runtime."""
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if found is None:
        pytest.skip("no C compiler (cc, gcc or clang) is on PATH")
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.c").write_text("int main(void) { return 0; }\n")
    built = run(found, *FLAGS, folder / "probe.c", "-o", folder / "probe")
    if built.returncode != 0:
        pytest.skip(f"{found} cannot link -fsanitize=address,undefined: {built.stderr.strip()[-300:]}")
    started = run(folder / "probe")
    if started.returncode != 0:
        pytest.skip(f"a program with sanitizers does not start here: {started.stderr.strip()[-300:]}")
    return found


def test_plan_under_sanitizers(compiler, tmp_path):
    program = tmp_path / "test_plan"
    built = run(compiler, *FLAGS, "-I", CSRC, TESTS / "native" / "test_plan.c", CSRC / "plan.c", "-o", program)
    assert built.returncode == 0, built.stderr
    assert "warning:" not in built.stderr, built.stderr
    result = run(program)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    assert result.stdout.strip().endswith("passed"), result.stdout

"""Compiles the C sources with their own test programs under sanitizers, and runs those."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parent / "csrc"
FLAGS = ["-std=c11", "-g", "-Wall", "-Wextra", "-fno-sanitize-recover=all", "-pthread"]
MEMORY, THREADS = "address,undefined", "thread"
# As setup.py builds them: other flags would test other loops.
ROWS = ["-O3", "-ffp-contract=off", "-fno-trapping-math"]


def run(*command: str | Path, seconds: int = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=seconds, check=False)


@pytest.fixture(scope="module")
def find_compiler(tmp_path_factory):
    """A function from a sanitizer to a C compiler with which it works here; some lack the sanitizer's runtime."""

    def find(sanitizer: str) -> str:
        found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
        if found is None:
            pytest.skip("no C compiler (cc, gcc or clang) is on PATH")
        folder = tmp_path_factory.mktemp("probe")
        (folder / "probe.c").write_text("int main(void) { return 0; }\n")
        built = run(found, *FLAGS, f"-fsanitize={sanitizer}", folder / "probe.c", "-o", folder / "probe")
        if built.returncode != 0:
            pytest.skip(f"{found} cannot link -fsanitize={sanitizer}: {built.stderr.strip()[-300:]}")
        started = run(folder / "probe")
        if started.returncode != 0:
            pytest.skip(f"a program with -fsanitize={sanitizer} does not start here: {started.stderr.strip()[-300:]}")
        return found

    return find


@pytest.mark.parametrize(
    "program, sources, flags, sanitizer, arguments",
    [
        pytest.param("test_plan", ["plan.c"], ["-O1"], MEMORY, [], id="plan"),
        pytest.param("test_rows", ["rows.c", "simd.c"], ROWS, MEMORY, [], id="rows"),
        pytest.param("test_rows", ["rows.c", "simd.c"], ROWS, THREADS, ["threads"], id="rows-threads"),
    ],
)
def test_under_sanitizers(find_compiler, tmp_path, program, sources, flags, sanitizer, arguments):
    built = run(
        find_compiler(sanitizer),
        *(*FLAGS, *flags, f"-fsanitize={sanitizer}", "-I", CSRC),
        *(TESTS / "native" / f"{program}.c", *(CSRC / source for source in sources), "-lm", "-o", tmp_path / program),
    )
    assert built.returncode == 0, built.stderr
    assert "warning:" not in built.stderr, built.stderr
    result = run(tmp_path / program, *arguments)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    assert result.stdout.strip().endswith("passed"), result.stdout

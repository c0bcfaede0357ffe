"""Compiles the C sources with their own test programs under sanitizers, and runs those; and for ARM, emulated."""

from __future__ import annotations

import platform
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
EXPERTS = ["experts.c", "rows.c", "simd.c"]


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
        pytest.param("test_experts", EXPERTS, ROWS, MEMORY, [], id="experts"),
        pytest.param("test_experts", EXPERTS, ROWS, THREADS, ["threads"], id="experts-threads"),
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


# ---------------------------------------------------------------- ARM: the hosts of many accelerators

EMULATOR = ("qemu-aarch64", "qemu-aarch64-static")
ARM_NEEDS = "on Debian: apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"


@pytest.fixture(scope="module")
def arm() -> tuple[str, list[str]]:
    """(a C compiler for AArch64, the command before its programs); on such a machine its own, and none."""
    if platform.machine() == "aarch64" and shutil.which("cc"):
        return "cc", []
    compiler, emulator = shutil.which("aarch64-linux-gnu-gcc"), next(filter(None, map(shutil.which, EMULATOR)), None)
    if compiler is None or emulator is None:
        pytest.skip(f"no C compiler for AArch64, or no emulator of it, is on PATH; {ARM_NEEDS}")
    return compiler, [emulator]


@pytest.mark.parametrize(
    "program, sources, flags, arguments",
    [
        pytest.param("test_plan", ["plan.c"], ["-O2"], [], id="plan"),
        pytest.param("test_rows", ["rows.c", "simd.c"], ROWS, ["20000"], id="rows"),
        pytest.param("test_exchange", ["exchange.c"], ["-O2"], [], id="exchange"),
        pytest.param("test_experts", EXPERTS, ROWS, [], id="experts"),
    ],
)
def test_on_arm(arm, tmp_path, program, sources, flags, arguments):
    """NEON is part of AArch64, so the plain loops are vectorised; results are compared with the same definitions."""
    compiler, before = arm
    own = [flag for flag in FLAGS if "sanitize" not in flag]
    built = run(
        compiler, *own, *flags, "-static", "-I", CSRC, TESTS / "native" / f"{program}.c",
        *(CSRC / source for source in sources), "-lm", "-o", tmp_path / program,
    )  # fmt: skip
    assert built.returncode == 0 and "warning:" not in built.stderr, built.stderr
    result = run(*before, tmp_path / program, *arguments)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    assert result.stdout.strip().endswith("passed"), result.stdout


def test_every_source_compiles_for_arm(arm, tmp_path):
    """All of csrc/ but the binding, which needs that machine's Python."""
    own = [flag for flag in FLAGS if "sanitize" not in flag]
    for source in sorted(CSRC.glob("*.c")):
        if source.name != "binding.c":
            built = run(arm[0], *own, *ROWS, "-c", source, "-o", tmp_path / "object.o")
            assert built.returncode == 0 and "warning:" not in built.stderr, f"{source.name}: {built.stderr}"

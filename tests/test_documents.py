"""The documents are true: their commands parse, their scripts run, their links and tables match the repository."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from families import FAMILIES, write_checkpoint
from ranks import run_ranks

from moe_runtime.launch import cli

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands() -> list[tuple[str, str]]:
    found = []
    for document in DOCUMENTS:
        for block in fenced(document.read_text(), "console"):
            found += [(document.name, line[2:]) for line in block.splitlines() if line.startswith("$ ")]
    return found


@pytest.mark.parametrize(("document", "command"), commands())
def test_commands_are_real(document, command):
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        return
    assert words[0] == "moe-launch", f"{document}: {command}"
    if words[1] == "bench":
        from moe_runtime.launch import bench

        assert words[2] in bench.BENCHES
        return
    cli._parser().parse_args(words[1:])
    for word in words:
        if word.startswith("configs/"):
            assert (ROOT / word).exists(), f"{document}: {word}"


def scripts() -> list[str]:
    return fenced((ROOT / "README.md").read_text(), "python")


def run_script(source: str, folder: Path) -> None:
    import os

    os.chdir(folder)
    exec(compile(source, "README.md", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("number", range(len(scripts())))
def test_the_readmes_scripts_run_on_two_ranks(tmp_path, number):
    write_checkpoint(tmp_path / "path" / "to" / "checkpoint", "deepseek_v3")
    run_ranks(run_script, 2, scripts()[number], tmp_path)


def test_links_point_at_files():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_table_of_families_is_the_list_of_tested_families():
    table = (ROOT / "docs" / "models.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE) == list(FAMILIES)

"""Some thousand hostile inputs to each reader, the same every time; `python tests/fuzz.py` makes more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).with_name("fuzz.py")


def test_hostile_files_and_messages_are_answered_or_refused_in_the_documented_way():
    """In a process of its own: it limits its memory, and imports take more of it than the readers do."""
    ran = subprocess.run([sys.executable, FUZZ, "--inputs", "48000"], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = ran.stdout.splitlines()
    assert len(rows) == 17 and all("3,000" in row for row in rows[1:])


def test_a_finding_is_printed_with_the_input_that_shows_it():
    program = """
import fuzz, random
def run(data):
    if data[0] > 9: raise KeyError("a mistake")
target = fuzz.Target("broken", [bytes([1])], run, (ValueError,), lambda pick, data: bytes([pick.randrange(256)]))
findings, row = fuzz.fuzz(target, 100, 0)
assert len(findings) == 5 and "KeyError" in findings[0] and "broken: b" in findings[0], findings
"""
    subprocess.run([sys.executable, "-c", program], cwd=FUZZ.parent, check=True, timeout=120)

"""docs/matrix.md: complete, and each vendor's column agrees here too, with a family of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import FAMILIES
from matrix import PASSED, run_cell, table
from test_families import write_oracle

from moe_runtime.comm.vendors import VENDORS

PAGE = Path(__file__).parent.parent / "docs" / "matrix.md"
SAMPLE = {vendor: list(FAMILIES)[number % len(FAMILIES)] for number, vendor in enumerate(VENDORS)}


@pytest.mark.parametrize(("vendor", "family"), SAMPLE.items())
def test_a_family_on_an_emulated_vendor_equals_one_process(tmp_path, vendor, family):
    write_oracle(tmp_path, family)
    assert run_cell(tmp_path, vendor) == PASSED


def test_the_page_has_every_family_and_every_vendor():
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert rows[0] == ["family", *VENDORS]
    assert [row[0] for row in rows[2:]] == list(FAMILIES)
    assert all(set(row[1:]) <= {"yes", "NO"} and len(row) == len(rows[0]) for row in rows[2:])


def test_a_cell_that_fails_is_shown_with_its_reason():
    cells = {(family, vendor): PASSED for family in FAMILIES for vendor in VENDORS}
    cells["mixtral", "hygon"] = "AssertionError: logits differ"
    page = table(cells, 1.0)
    assert "- mixtral on hygon: AssertionError: logits differ" in page
    assert f"{len(cells) - 1} of {len(cells)} cells agree" in page

"""The index of decisions is generated, and a malformed record is told to its author."""

from pathlib import Path

import pytest

from tests.architecture.sources import ROOT
from tools import adr_index

TABLE = "| Date | Status | Tags | Updates |\n|---|---|---|---|\n| 2026-01-01 | accepted | a | none |\n"


def test_the_index_is_current() -> None:
    current = (ROOT / "docs/adr/README.md").read_text(encoding="utf-8")

    assert adr_index.index_of(ROOT / "docs/adr") == current, "run make docs and commit docs/adr/README.md"


@pytest.mark.parametrize("part", ["## Context", "## Decision", "## Consequences", "## What would change our mind"])
def test_every_record_has_every_part(part: str) -> None:
    lacking = [path.name for path in (ROOT / "docs/adr").glob("[0-9]*.md") if f"{part}\n" not in path.read_text()]

    assert not lacking, f"add the part {part!r}, as in docs/adr/0000-template.md: {lacking}"


@pytest.mark.parametrize(
    ("names_and_texts", "complaint"),
    [
        ({"0001-Bad Name.md": f"# Title\n\n{TABLE}"}, "call it NNNN-words-of-the-title.md"),
        ({"0001-no-title.md": TABLE}, "the first line is the title"),
        ({"0001-no-table.md": "# Title\n"}, "is missing"),
        ({"0001-short.md": f"# Title\n\n{TABLE}".replace("| a | none |", "|")}, "one row with four cells"),
        ({"0001-a.md": f"# A\n\n{TABLE}", "0001-b.md": f"# B\n\n{TABLE}"}, "have one number"),
    ],
)
def test_a_malformed_record_is_refused(tmp_path: Path, names_and_texts: dict[str, str], complaint: str) -> None:
    for name, text in names_and_texts.items():
        (tmp_path / name).write_text(text)

    with pytest.raises(adr_index.RecordError, match=complaint):
        adr_index.index_of(tmp_path)

"""docs/bus.md names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_every_test_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/bus.md").read_text(encoding="utf-8")))
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    sources += (ROOT / "tests/conformance/bus/bus_suite.py").read_text(encoding="utf-8")

    assert len(named) > 20
    assert [name for name in sorted(named) if f"def {name}(" not in sources] == []

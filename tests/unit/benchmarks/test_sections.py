"""Sections run one after the other, and one that fails is reported with all its bars unmet."""

import io
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import sections
from benchmarks.progress import Progress
from benchmarks.sections import Measured, Setting, Wanted

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def measured(setting: Setting) -> Measured:
    assert setting.folder.is_dir()
    return Measured(figures={"first_count": setting.count(100, 3)}, notes=["one"])


async def failing(_: Setting) -> Measured:
    raise ExceptionGroup("group", [ValueError("no disk\nand more")])


@pytest.fixture(autouse=True)
def _modules(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, measure in {"first": measured, "second": failing}.items():
        module = ModuleType(f"benchmarks.toy_{name}")
        module.__dict__.update(measure=measure, BARS=(Wanted(figure=f"{name}_count", op=">", bar=1),))
        monkeypatch.setitem(sys.modules, module.__name__, module)


async def test_a_section_that_fails_leaves_its_bars_unmet_and_the_others_alone(tmp_path: Path) -> None:
    progress = Progress(io.StringIO())
    collected = await sections.run("toy", ["second", "first"], folder=tmp_path, is_quick=True, progress=progress)

    assert {"second_count": None, "first_count": 3} == collected.figures
    assert [("second_count", False), ("first_count", True)] == [(bar.name, bar.is_met) for bar in collected.bars]
    assert ["Section second failed: ValueError: no disk", "one"] == collected.notes

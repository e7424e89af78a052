"""A benchmark of several sections: each is a module, runs by itself, and is in the report also when it fails.

A section's module has two names:

- ``BARS``: a tuple of `Wanted`, what its figures must reach;
- ``async def measure(setting: Setting) -> Measured``: the figures by name, and sentences that their reader must know.

It starts and stops whatever it needs, in `Setting.folder`. A figure that could not be measured is None, or is left out.
A section that raises, or is not done within `SECTION_TIMEOUT_S`, leaves all its bars unmet, with the reason as a note.
"""

import importlib
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Final

import anyio

from benchmarks.progress import Progress
from benchmarks.report import Bar, Value

SECTION_TIMEOUT_S: Final = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What one figure of a section must reach."""

    figure: str
    op: str
    bar: int | float


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a section gets."""

    folder: Path
    """Empty, its own, removed after the run."""
    is_quick: bool
    """For trying and for tests: a few seconds, figures that mean little."""
    progress: Progress

    def count(self, full: int, quick: int) -> int:
        """The one that this run is to use."""
        return quick if self.is_quick else full


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a section gives."""

    figures: Mapping[str, Value]
    notes: Sequence[str] = ()


@dataclass(slots=True)
class Collected:
    """Of all sections together."""

    figures: dict[str, Value] = field(default_factory=dict)
    bars: list[Bar] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, module: ModuleType, measured: Measured) -> None:
        wanted: Sequence[Wanted] = module.BARS
        figures = {**measured.figures}
        for bar in wanted:
            figures.setdefault(bar.figure, None)
        assert not figures.keys() & self.figures.keys(), sorted(figures.keys() & self.figures.keys())
        self.figures |= figures
        self.bars += [Bar(name=bar.figure, value=figures[bar.figure], op=bar.op, bar=bar.bar) for bar in wanted]
        self.notes += measured.notes


async def run(benchmark: str, names: Sequence[str], *, folder: Path, is_quick: bool, progress: Progress) -> Collected:
    """One section after the other: ``benchmarks.<benchmark>_<name>``."""
    collected = Collected()
    for name in names:
        module = importlib.import_module(f"benchmarks.{benchmark}_{name}")
        own_folder = folder / name
        own_folder.mkdir(parents=True)
        progress.say(f"section {name}")
        setting = Setting(folder=own_folder, is_quick=is_quick, progress=progress)
        collected.add(module, await _measured(name, module, setting))
    return collected


async def _measured(name: str, module: ModuleType, setting: Setting) -> Measured:
    try:
        with anyio.fail_after(SECTION_TIMEOUT_S):
            measured: Measured = await module.measure(setting)
    except Exception as error:  # noqa: BLE001  (whatever it is, the other sections run and this one is reported)
        setting.progress.say(f"section {name} failed\n{traceback.format_exc().rstrip()}")
        return Measured(figures={}, notes=[f"Section {name} failed: {reason(error)}"])
    return measured


def reason(error: BaseException) -> str:
    """One line: of a group, its first exception."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}".partition("\n")[0]

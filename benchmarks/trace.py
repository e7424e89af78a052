"""Request traces: CSV files, plain or gzipped, and the part of one that a run sends."""

import csv
import gzip
import io
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, TextIO

COLUMNS: Final = ("t_s", "model", "input_tokens", "output_tokens")


class TraceError(Exception):
    """The trace cannot be used; one sentence says why, with file and line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One request as the trace has it."""

    t_s: float
    model: str
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One request as a run sends it."""

    due_s: float
    """From the start of the clock."""
    model: str
    input_tokens: int
    output_tokens: int


def read(path: Path) -> list[Row]:
    """All rows, in the order of the file. Other columns than `COLUMNS` are ignored. Raises `TraceError`."""
    try:
        with path.open("rb") as file:
            is_gzip = file.read(2) == b"\x1f\x8b"
        opened: IO[bytes] = gzip.open(path) if is_gzip else path.open("rb")  # type: ignore[assignment]  # noqa: SIM115
        with io.TextIOWrapper(opened, encoding="utf-8", newline="") as text:
            return list(_rows(path, text))
    except OSError as error:
        raise TraceError(f"the trace {path} cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, EOFError, zlib.error, csv.Error) as error:
        raise TraceError(f"the trace {path} is no CSV file, plain or gzipped: {error}") from error


def _rows(path: Path, text: TextIO) -> Iterator[Row]:
    reader = csv.DictReader(text)
    present = reader.fieldnames or []
    if missing := [name for name in COLUMNS if name not in present]:
        there = ", ".join(present) or "nothing"
        raise TraceError(f"the trace {path} has no column '{missing[0]}'; it has {there}; needed: {', '.join(COLUMNS)}")
    for values in reader:
        place = f"{path}, line {reader.line_num}"
        row = Row(
            t_s=_number(place, "t_s", values["t_s"]),
            model=values["model"] or "",
            input_tokens=int(_number(place, "input_tokens", values["input_tokens"])),
            output_tokens=int(_number(place, "output_tokens", values["output_tokens"])),
        )
        if not row.model:
            raise TraceError(f"{place}: model is empty")
        yield row


def _number(place: str, name: str, text: str | None) -> float:
    try:
        value = float(text or "")
    except ValueError:
        raise TraceError(f"{place}: {name} is '{text or ''}', not a number") from None
    if not 0 <= value < 1e12:
        raise TraceError(f"{place}: {name} is {text}, not a number from 0 on")
    return value


def busiest(rows: Sequence[Row], count: int) -> list[str]:
    """So many models with most requests in the whole trace, ties by name; sorted by name. Raises `TraceError`."""
    requests = Counter(row.model for row in rows)
    if count > len(requests):
        raise TraceError(
            f"the trace has {len(requests)} models, and {count} were asked for; give --models a number up to that"
        )
    return sorted(sorted(requests, key=lambda model: (-requests[model], model))[:count])


def plan(
    rows: Sequence[Row],
    *,
    models: Sequence[str],
    start_s: float,
    speed: float,
    every: int,
    output_tokens_max: int,
    length_s: float,
) -> list[Planned]:
    """Every so-manieth request from `start_s` on, its time divided by `speed`, until `length_s` of real time.

    Requests of other models are left out after the counting, so that the same ones are sent whatever `models` is.
    """
    known = set(models)
    later = sorted((row for row in rows if row.t_s >= start_s), key=lambda row: row.t_s)
    planned = []
    for row in later[::every]:
        due_s = (row.t_s - start_s) / speed
        if due_s < length_s and row.model in known:
            output_tokens = max(1, min(row.output_tokens, output_tokens_max))
            planned.append(
                Planned(
                    due_s=due_s,
                    model=row.model,
                    input_tokens=max(1, row.input_tokens),
                    output_tokens=output_tokens,
                )
            )
    return planned

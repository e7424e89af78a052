"""How results look: aligned tables, words to stderr, one JSON object, errors with their cause and fix."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

import click

from sublet.errors import SubletError

GAP: Final = "  "
COLORS: Final = {"good": "green", "busy": "yellow", "bad": "red"}


def wants_color(choice: str, environ: Mapping[str, str]) -> bool:
    """Colour on a terminal, unless NO_COLOR or a dumb terminal says otherwise; the option goes before both."""
    if choice != "auto":
        return choice == "always"
    return sys.stdout.isatty() and "NO_COLOR" not in environ and environ.get("TERM") != "dumb"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, tones: Mapping[str, str] | None = None) -> str:
    """Left-aligned columns without borders. `tones` colours a cell by its first character: {sign: tone}."""
    if not rows:
        return ""
    everything = [tuple(headers), *(tuple(row) for row in rows)] if any(headers) else [tuple(row) for row in rows]
    widths = [max(len(row[column]) for row in everything) for column in range(len(everything[0]))]
    lines = []
    for row in everything:
        cells = [_toned(cell, tones, cell.ljust(width)) for cell, width in zip(row, widths, strict=True)]
        lines.append(GAP.join(cells).rstrip())
    return "\n".join(lines)


def _toned(cell: str, tones: Mapping[str, str] | None, padded: str) -> str:
    tone = tones.get(cell[:1]) if tones else None
    return click.style(padded, fg=COLORS[tone]) if tone in COLORS else padded


def as_json(schema: str, body: Mapping[str, Any], *, is_line: bool = False) -> str:
    """One object with its schema first; in one line for streams."""
    return json.dumps({"schema": schema, **body}, indent=None if is_line else 2, ensure_ascii=False)


def render_error(error: SubletError, *, as_json: bool) -> str:
    """An error for a person (what, facts, cause, fix) or, in one line of JSON, for a program."""
    if as_json:
        return json.dumps(error.as_json(), ensure_ascii=False)
    lines = [*error.details(), f"error[{error.code}]: {error.message}"]
    lines += [f"  {fact}" for fact in error.facts]
    if error.cause:
        lines.append(f"  cause   {error.cause}")
    if error.fix:
        lines.append(f"  fix     {error.fix}")
    return "\n".join(lines)


def clear_screen() -> str:
    """Home and clear, for a view that is drawn again in place."""
    return "\x1b[H\x1b[J" if os.environ.get("TERM") != "dumb" else ""

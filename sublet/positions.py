"""YAML 1.2 with positions: every key and value knows its line and column, and a repeated key is told, not swallowed."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

# A models file of a thousand models has about ten thousand nodes; aliases of aliases could make billions.
NODES_MAX: Final = 50_000
LINE_BREAKS: Final = re.compile("\r\n|[\r\n\x85\u2028\u2029]")
SHOWN_COLUMNS_MAX: Final = 160


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Where something stands; both counted from 0. `width` is 0 when it does not end on its first line."""

    line: int = 0
    column: int = 0
    width: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One mistake in a file, one sentence. `hint` says what was probably meant."""

    file: str
    mark: Mark
    message: str
    hint: str = ""
    source: str = ""
    """The line that it stands on."""

    def render(self) -> str:
        """`file:line:col: sentence`, the source line, and a caret below it."""
        lines = [f"{self.file}:{self.mark.line + 1}:{self.mark.column + 1}: {self.message}"]
        if self.source and self.mark.column < SHOWN_COLUMNS_MAX:
            width = min(self.mark.width or 1, max(1, len(self.source) - self.mark.column))
            lines.append(f"{self.mark.line + 1:>5} | {self.source}")
            hint = f"  {self.hint}" if self.hint else ""
            lines.append(f"      | {' ' * self.mark.column}{'^' * width}{hint}")
        elif self.hint:
            lines.append(f"      {self.hint}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "line": self.mark.line + 1,
            "column": self.mark.column + 1,
            "message": self.message,
            "hint": self.hint,
        }


@dataclass(slots=True, kw_only=True)
class Located:
    """A YAML value. `value` is a scalar, ``{key: Located}`` or ``[Located]``; `key_marks` says where its keys stand."""

    value: Any
    mark: Mark
    key_marks: dict[str, Mark] = field(default_factory=dict)

    def plain(self) -> Any:
        """The value without positions."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def at(self, path: Iterable[str | int]) -> Located:
        """The value at a path, or the nearest one above it that exists."""
        here = self
        for step in path:
            try:
                here = here.value[step]
            except (KeyError, IndexError, TypeError):
                return here
        return here

    def mark_of(self, path: Iterable[str | int], *, key: str = "") -> Mark:
        """Where the value at `path` stands, or its key `key`."""
        found = self.at(path)
        return found.key_marks.get(key, found.mark)


@dataclass(slots=True, kw_only=True)
class Document:
    """A file as read: its tree (None when it cannot be read at all), and what is wrong with it already."""

    file: str
    lines: list[str]
    root: Located | None = None
    problems: list[Problem] = field(default_factory=list)

    def problem(self, mark: Mark, message: str, hint: str = "") -> Problem:
        """A problem at this place, with its source line."""
        source = self.lines[mark.line] if mark.line < len(self.lines) else ""
        shown = "".join(char if char.isprintable() else " " for char in source[:SHOWN_COLUMNS_MAX]).rstrip()
        return Problem(file=self.file, mark=mark, message=message, hint=hint, source=shown)


def read_yaml(text: str, file: str) -> Document:
    """The document in `text`. Never raises for what a file may hold: its problems are in the result."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    document = Document(file=file, lines=LINE_BREAKS.split(text))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # An anchor that is used again is no mistake.
            node = YAML(typ="rt", pure=True).compose(text)
        if node is not None:
            document.root = _Reader(document).read(node, ())
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = Mark(line=mark.line, column=mark.column) if mark else Mark()
        hint = "indent with spaces, not with tabs" if "'\\t'" in str(error.problem) else ""
        document.problems.append(document.problem(where, f"not YAML: {_sentence(error)}", hint))
    except _TooManyNodes:
        document.problems.append(document.problem(Mark(), f"more than {NODES_MAX} values (aliases count each time)"))
    except (
        YAMLError,
        RecursionError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        AssertionError,
        NotImplementedError,
    ) as error:
        # The library lets such errors through for some byte sequences that are no YAML; which ones is not promised.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        document.problems.append(document.problem(Mark(), f"not YAML: {reason}"))
    return document


def suggestion(word: str, known: Iterable[str]) -> str:
    """``did you mean 'limit'?``, or an empty string when nothing is near."""
    import difflib

    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else ""


def _sentence(error: Any) -> str:
    parts = [part for part in (error.context, error.problem) if part]
    return " ".join(" ".join(str(part).split()) for part in parts) or "it cannot be parsed"


class _TooManyNodes(Exception):
    pass


class _Reader:
    """Turns composed nodes into `Located` values and notes repeated keys."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._count = 0

    def read(self, node: Any, above: tuple[int, ...]) -> Located:
        from ruamel.yaml.nodes import MappingNode, SequenceNode

        self._count += 1
        if self._count > NODES_MAX:
            raise _TooManyNodes
        mark = _mark(node)
        if id(node) in above:
            self._note(mark, "this alias contains itself")
            return Located(value=None, mark=mark)
        above = (*above, id(node))
        if isinstance(node, MappingNode):
            return self._mapping(node, mark, above)
        if isinstance(node, SequenceNode):
            return Located(value=[self.read(child, above) for child in node.value], mark=mark)
        return Located(value=_scalar(node), mark=mark)

    def _mapping(self, node: Any, mark: Mark, above: tuple[int, ...]) -> Located:
        located = Located(value={}, mark=mark)
        for key_node, value_node in node.value:
            key_mark = _mark(key_node)
            value = self.read(value_node, above)
            if not isinstance(key_node.value, str):
                self._note(key_mark, "a key must be a plain word")
                continue
            key = key_node.value
            if value.value is None:
                value.mark = (
                    key_mark  # Nothing has no place of its own: the parser puts it where the next thing starts.
                )
            if key in located.value:
                first = located.key_marks[key]
                self._note(key_mark, f"'{key}' is given twice", f"first in line {first.line + 1}")
                continue
            located.value[key] = value
            located.key_marks[key] = key_mark
        return located

    def _note(self, mark: Mark, message: str, hint: str = "") -> None:
        self._document.problems.append(self._document.problem(mark, message, hint))


def _mark(node: Any) -> Mark:
    start, end = node.start_mark, node.end_mark
    width = end.column - start.column if end.line == start.line else 0
    return Mark(line=start.line, column=start.column, width=max(0, width))


def _scalar(node: Any) -> Any:
    """The scalar by YAML 1.2's core schema; what does not read as its type stays text."""
    text: str = node.value
    match str(node.tag).rpartition(":")[2]:
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int" | "float" as kind:
            return _number(text, kind)
        case _:
            return text


def _number(text: str, kind: str) -> int | float | str:
    """The number; one that no float can hold stays text."""
    base = 0 if text[:2] in ("0x", "0o", "0b") else 10
    try:
        number = int(text.replace("_", ""), base) if kind == "int" else float(text)
        return number if math.isfinite(number) else text
    except (ValueError, OverflowError):
        return text

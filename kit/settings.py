"""Settings: one msgspec Struct per service, filled from the environment, then a file, then its defaults.

A field ``drain_s`` of the service ``nodeagent`` is the variable ``SUBLET_NODEAGENT_DRAIN_S``; ``SUBLET_DRAIN_S`` sets
it for every service that has one. ``SUBLET_CONFIG`` names a JSON file of the form ``{"nodeagent": {"drain_s": 5}}``;
what all services share (`kit.serving.ConnectionSettings`) has the section ``connection``.
"""

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import msgspec

T = TypeVar("T", bound=msgspec.Struct)


class SettingsError(Exception):
    """Something that was set cannot be used; every problem is named, each with where it was set."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """One setting, its value, and where that came from."""

    name: str
    value: Any
    origin: str


def load(kind: type[T], *, service: str, section: str = "", environment: Mapping[str, str] | None = None) -> T:
    """The service's settings. Raises `SettingsError` with all problems at once.

    `section` of the file, when it is not the service's own: every name in a section must belong to one Struct.
    """
    values, _ = _collect(kind, service, section or service, os.environ if environment is None else environment)
    return msgspec.convert(values, kind, strict=False)


def explain(kind: type[T], *, service: str, environment: Mapping[str, str] | None = None) -> list[Explained]:
    """Every setting with its value and its origin, in the order in which the Struct declares them."""
    values, origins = _collect(kind, service, service, os.environ if environment is None else environment)
    settings = msgspec.convert(values, kind, strict=False)
    names = kind.__struct_fields__
    return [Explained(name=n, value=getattr(settings, n), origin=origins.get(n, "default")) for n in names]


def _collect(
    kind: type[T], service: str, section: str, environment: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    problems: list[str] = []
    names = kind.__struct_fields__
    for name, value in _from_file(section, environment, problems).items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            problems.append(f"{environment['SUBLET_CONFIG']}: unknown setting '{section}.{name}'{hint}")
            continue
        values[name], origins[name] = value, environment["SUBLET_CONFIG"]
    for name in names:
        for variable in (f"SUBLET_{name.upper()}", f"SUBLET_{service.upper()}_{name.upper()}"):
            if variable in environment:
                values[name], origins[name] = _parsed(environment[variable]), variable
    hints = get_type_hints(kind, include_extras=True)
    for name, value in values.items():
        try:
            msgspec.convert(value, hints[name], strict=False)
        except msgspec.ValidationError as error:
            problems.append(f"{origins[name]}: {service}.{name} = {value!r} cannot be used: {error}")
    if problems:
        raise SettingsError(problems)
    return values, origins


def _parsed(text: str) -> Any:
    """Lists and objects are written as JSON; everything else is taken as it is."""
    if text[:1] in "[{":
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


def _from_file(section: str, environment: Mapping[str, str], problems: list[str]) -> dict[str, Any]:
    path = environment.get("SUBLET_CONFIG")
    if not path:
        return {}
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        problems.append(f"SUBLET_CONFIG: {path} cannot be read as JSON: {error}")
        return {}
    found = content.get(section, {}) if isinstance(content, dict) else None
    if not isinstance(found, dict):
        problems.append(f"{path}: '{section}' must be an object of settings")
        return {}
    return found

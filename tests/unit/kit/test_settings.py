"""Where a setting comes from, and what a person is told when it cannot be used."""

import json
from pathlib import Path

import msgspec
import pytest

from kit.settings import SettingsError, explain, load


class Knobs(msgspec.Struct, frozen=True, kw_only=True):
    drain_s: float = 10.0
    nodes: list[str] = []
    name: str = "a"


def test_the_environment_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"agent": {"drain_s": 5, "name": "file"}}))
    environment = {"SUBLET_CONFIG": str(path), "SUBLET_AGENT_NAME": "env"}

    found = {item.name: (item.value, item.origin) for item in explain(Knobs, service="agent", environment=environment)}

    assert {
        "drain_s": (5.0, str(path)),
        "nodes": ([], "default"),
        "name": ("env", "SUBLET_AGENT_NAME"),
    } == found


def test_the_service_s_own_variable_wins_over_the_common_one() -> None:
    environment = {"SUBLET_DRAIN_S": "1", "SUBLET_AGENT_DRAIN_S": "2"}

    assert 2.0 == load(Knobs, service="agent", environment=environment).drain_s


def test_every_problem_is_named_at_once_with_where_it_was_set(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"agent": {"drian_s": 5}}))
    environment = {"SUBLET_CONFIG": str(path), "SUBLET_AGENT_DRAIN_S": "soon"}

    with pytest.raises(SettingsError) as caught:
        load(Knobs, service="agent", environment=environment)

    typo, bad = caught.value.problems
    assert "did you mean 'drain_s'?" in typo
    assert "SUBLET_AGENT_DRAIN_S" in bad


def test_lists_are_written_as_json() -> None:
    assert ["x", "y"] == load(Knobs, service="agent", environment={"SUBLET_NODES": '["x","y"]'}).nodes


def test_what_services_share_has_a_section_of_its_own(tmp_path: Path) -> None:
    """Else no service could have a section: its names and the connection's are of two Structs, both checked."""
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"gateway": {"port": 1}, "connection": {"name": "file"}}))
    environment = {"SUBLET_CONFIG": str(path), "SUBLET_GATEWAY_DRAIN_S": "3"}

    shared = load(Knobs, service="gateway", section="connection", environment=environment)

    assert Knobs(name="file", drain_s=3.0) == shared

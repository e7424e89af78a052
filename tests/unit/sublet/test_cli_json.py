"""Every verb answers a program: one object with its schema on stdout, nothing else, errors as an object on stderr."""

import json
from pathlib import Path

import pytest

from sublet import _contract as contract
from sublet.errors import Unreachable
from tests.unit.sublet.fakes import FakeControlPlane, event, run, view

DEPLOY = ("deploy", "chat", "--weights", "1GB", "--share", "0.3")
VERBS = {
    ("ps",): "sublet.ps.v1",
    ("nodes",): "sublet.nodes.v1",
    DEPLOY: "sublet.deploy.v1",
    ("apply", "-f", "models.yaml"): "sublet.apply.v1",
    ("check", "-f", "models.yaml"): "sublet.check.v1",
    ("park", "chat", "--detach"): "sublet.park.v1",
    ("wake", "chat"): "sublet.wake.v1",
    ("retire", "chat", "--detach"): "sublet.retire.v1",
    ("logs", "chat"): "sublet.log_line.v1",
    ("explain", "chat"): "sublet.explain.v1",
    ("events",): "sublet.events.v1",
    ("keys", "new"): "sublet.key.v1",
    ("keys", "ls"): "sublet.keys.v1",
    ("keys", "revoke", "key-1"): "sublet.key_revoked.v1",
    ("plan", "-f", "models.yaml"): "sublet.plan.v1",
    ("repack",): "sublet.repack.v1",
    ("repack", "--dry-run"): "sublet.repack_plan.v1",
    ("quota", "set", "acme", "--gpus", "4"): "sublet.quota_set.v1",
    ("quota", "ls"): "sublet.quotas.v1",
    ("env",): "sublet.env.v1",
}
OFFLINE = {"check", "env"}


@pytest.fixture
def plane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeControlPlane:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.yaml").write_text("models:\n  chat: {weights: 1GB, share: 0.3}\n")
    plane = FakeControlPlane()
    plane.steps = [(view("resident"),)]
    plane.explanation = contract.Explanation(is_known=True, model="chat", summary="fits")
    plane.events = [event(1)]
    plane.log = {"r1": ["ready"]}
    return plane


@pytest.mark.parametrize(("words", "schema"), VERBS.items(), ids=lambda value: " ".join(value) if value else None)
def test_a_verb_answers_with_one_object(plane: FakeControlPlane, words: tuple[str, ...], schema: str) -> None:
    result = run(plane, *words, "--json", environ={"SUBLET_GATEWAY_URL": "http://localhost", "SUBLET_API_KEY": "sk"})

    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout)["schema"] == schema


@pytest.mark.parametrize("words", [words for words in VERBS if words[0] not in OFFLINE], ids=" ".join)
def test_a_verb_without_a_control_plane_is_unreachable(plane: FakeControlPlane, words: tuple[str, ...]) -> None:
    plane.error = Unreachable("down")

    result = run(plane, *words, "--json")

    assert (result.exit_code, result.stdout) == (7, "")
    assert json.loads(result.stderr)["code"] == "unreachable"


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_wrong_use_of_a_verb_is_told_as_an_object(plane: FakeControlPlane, words: tuple[str, ...]) -> None:
    result = run(plane, *words, "--no-such-option", "--json")

    assert result.exit_code == 2
    assert json.loads(result.stderr)["schema"] == "sublet.error.v1"

"""Verbs about the past, keys and the environment."""

import hashlib
import json
from pathlib import Path

import pytest
from inline_snapshot import snapshot

from sublet import _contract as contract
from tests.unit.sublet.fakes import NOW_S, FakeControlPlane, event, run, view


@pytest.fixture
def plane() -> FakeControlPlane:
    return FakeControlPlane()


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


def test_events_shows_the_newest_with_their_causes(plane: FakeControlPlane) -> None:
    plane.events = [event(seq) for seq in range(1, 2500)]

    result = run(plane, "events", "-n", "2")

    assert result.exit_code == 0
    assert result.stdout == snapshot("""\
09:46:40  ReplicaParked  chat  parked in 0.64 s  2498 <- 2497
09:46:40  ReplicaParked  chat  parked in 0.64 s  2499 <- 2498
""")


def test_events_after_a_sequence(plane: FakeControlPlane) -> None:
    plane.events = [event(1), event(2), event(3)]

    body = json.loads(run(plane, "events", "--after", "1", "--json").stdout)

    assert body["schema"] == "sublet.events.v1"
    assert [one["seq"] for one in body["events"]] == [2, 3]
    assert body["last_seq"] == 3


def test_watched_events_are_lines_of_json(plane: FakeControlPlane) -> None:
    plane.events = [event(1), event(2)]

    result = run(plane, "events", "-w", "--json")

    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["schema"], line["seq"]) for line in lines] == [("sublet.event.v1", 1), ("sublet.event.v1", 2)]


def test_watching_goes_on_when_there_is_nothing_to_tell(plane: FakeControlPlane) -> None:
    plane.refusal = "nothing to tell"

    result = run(plane, "events", "-w")

    assert plane.clock_s > 600, "it watched until the test had enough"
    assert "nothing to tell" not in result.stderr


def test_explain_says_why_why_not_elsewhere_and_what_would_help(plane: FakeControlPlane) -> None:
    plane.explanation = contract.Explanation(
        is_known=True, model="chat", summary="not placed: no GPU has room", remedy="ask for 0.2",
        decisions=(event(48102, text="no GPU has room", type="PlacementFailed"),),
        alternatives=(
            contract.Alternative(node="a", gpu_uuid="GPU-1", reason="full", short_by_bytes=11 * 1024**3),
            contract.Alternative(node="b", gpu_uuid="GPU-2", reason="grade watched is too weak"),
        ),
        deployment=view(problem="no GPU has room"),
    )  # fmt: skip

    result = run(plane, "explain", "chat")

    assert result.exit_code == 0
    assert result.stdout == snapshot("""\
chat  ✗ not placed
  not placed: no GPU has room

Decisions
  09:46:40  PlacementFailed  chat  no GPU has room  48102 <- 48101

Other GPUs
  a GPU-1  full                       11.0 GiB missing
  b GPU-2  grade watched is too weak

What would help: ask for 0.2
""")


def test_explain_of_an_unknown_model_suggests_the_nearest(plane: FakeControlPlane) -> None:
    plane.steps = [(view("resident"),)]

    result = run(plane, "explain", "chaat")

    assert result.exit_code == 4
    assert "did you mean 'chat'?" in result.stderr


def test_logs_shows_the_replicas_lines(plane: FakeControlPlane) -> None:
    plane.steps = [(view("resident"),)]
    plane.log = {"r1": ["loading", "ready"]}

    result = run(plane, "logs", "chat")

    assert (result.exit_code, result.stdout) == (0, "loading\nready\n")
    assert plane.asked[-1][0] == "sublet.query.default.nodeagent.a.queries_read_logs_v1"


def test_followed_logs_go_on_with_the_new_replica(plane: FakeControlPlane) -> None:
    plane.steps = [(view("resident"),), (view("resident"),), (view("resident", replica_id="r2"),), ()]
    plane.log = {"r1": ["one"], "r2": ["two"]}

    result = run(plane, "logs", "chat", "-f")

    assert result.stdout == "one\ntwo\n"
    assert result.exit_code == 4


@pytest.mark.parametrize("steps", [[()], [(view(problem="no room"),)]])
def test_logs_without_a_replica_is_not_found(
    plane: FakeControlPlane, steps: list[tuple[contract.DeploymentView, ...]]
) -> None:
    plane.steps = steps

    assert run(plane, "logs", "chat").exit_code == 4


def test_a_refused_query_is_refused(plane: FakeControlPlane) -> None:
    plane.refusal = "still reading history"

    result = run(plane, "nodes")

    assert (result.exit_code, result.stderr) == (5, "error[query_refused]: still reading history\n")


def test_a_new_key_stands_alone_on_stdout_and_only_its_hash_travels(plane: FakeControlPlane) -> None:
    result = run(plane, "keys", "new", "--name", "laptop")

    key = result.stdout.strip()
    (body,) = plane.bodies()
    assert key.startswith("sk-sublet-")
    assert body["key_hash"] == hashlib.sha256(key.encode()).hexdigest()
    assert key not in result.stderr
    assert key.encode() not in plane.sent[0].body


def test_keys_ls_shows_nothing_that_could_be_used_as_one(plane: FakeControlPlane) -> None:
    plane.keys = (contract.KeyView(key_id="key-1", name="laptop", created_at_s=NOW_S - 90),)

    assert run(plane, "keys", "ls").stdout == snapshot("""\
KEY    NAME    AGE
key-1  laptop  2 min
""")


@pytest.mark.parametrize(("verdict", "code", "exit_code"), [("admitted", "", 0), ("rejected", "SUB-KEY-003", 4)])
def test_revoking_a_key(plane: FakeControlPlane, verdict: str, code: str, exit_code: int) -> None:
    plane.verdicts = {"key-1": (verdict, code)}

    assert run(plane, "keys", "revoke", "key-1").exit_code == exit_code


def test_env_prints_exports_for_a_shell(plane: FakeControlPlane, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "inside"
    folder.mkdir(parents=True)
    (tmp_path / ".sublet").mkdir()
    context = {"nats_url": "nats://x", "tenant": "t", "gateway_url": "http://localhost:8080", "api_key": "sk-'quoted'"}
    (tmp_path / ".sublet" / "context.json").write_text(json.dumps(context))

    result = run(plane, "env", folder=folder)

    assert result.exit_code == 0
    assert result.stdout == snapshot("""\
export OPENAI_BASE_URL=http://localhost:8080/v1
export OPENAI_API_KEY='sk-'"'"'quoted'"'"''
export SUBLET_URL=http://localhost:8080
""")


def test_env_without_a_gateway_is_told_how_to_get_one(plane: FakeControlPlane) -> None:
    result = run(plane, "env")

    assert result.exit_code == 2
    assert "make up" in result.stderr


def test_the_environment_goes_before_the_file(plane: FakeControlPlane, tmp_path: Path) -> None:
    path = tmp_path / "context.json"
    path.write_text(json.dumps({"gateway_url": "http://file", "api_key": "sk-file"}))
    environ = {"SUBLET_CONTEXT": str(path), "SUBLET_GATEWAY_URL": "http://environment/v1/"}

    variables = json.loads(run(plane, "env", "--json", environ=environ).stdout)["variables"]

    assert variables["OPENAI_BASE_URL"] == "http://environment/v1"
    assert variables["OPENAI_API_KEY"] == "sk-file"


@pytest.mark.parametrize("content", ["{", "[]", '{"tenant": 3}', None])
def test_a_context_file_that_is_none_is_wrong_use(plane: FakeControlPlane, tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "context.json"
    if content is not None:
        path.write_text(content)

    result = run(plane, "--context", str(path), "env")

    assert result.exit_code == 2
    assert "the context file" in result.stderr


def test_an_explanation_fits_100_columns_and_says_nothing_twice(plane: FakeControlPlane) -> None:
    why = "chat fits no GPU; nearest is local/gpu3: no room by 12.3 GiB"
    plane.explanation = contract.Explanation(
        is_known=True, model="chat", summary="; ".join([f"not placed: {why}"] * 4), one_more=why,
        ways=("with a share of 0.74 instead of 0.90 it would go to local/gpu3",),
    )  # fmt: skip

    lines = run(plane, "explain", "chat").stdout.splitlines()

    assert max(map(len, lines)) <= 100
    assert not [line for line in lines if "one more  " in line]
    assert lines[-2:] == [
        "What would help one more",
        "  with a share of 0.74 instead of 0.90 it would go to local/gpu3",
    ]

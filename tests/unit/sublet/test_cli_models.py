"""Verbs that look at models and change them: their text, their JSON, their exit codes."""

import json
from pathlib import Path

import pytest
from inline_snapshot import snapshot

from sublet import _contract as contract
from sublet.errors import Unreachable
from tests.unit.sublet.fakes import GIB, FakeControlPlane, run, spec, view

DEPLOY = ("deploy", "chat", "--weights", "14.5GB", "--share", "0.3", "--limit", "0.4")


@pytest.fixture
def plane() -> FakeControlPlane:
    return FakeControlPlane()


def test_ps_shows_state_share_place_and_what_is_next(plane: FakeControlPlane) -> None:
    plane.steps = [
        (
            view("resident", granted_bytes=30 * GIB),
            view("parked", name="whisper", last_wake_s=0.9),
            view("waking", name="code", last_wake_s=1.2),
            view(name="batch-405b", problem="no GPU has room"),
            view("granted", name="rare", last_start_s=10.0),
            view("resident", name="bytes", deployment=spec("bytes", share=contract.ShareSpec(request_bytes=20 * GIB))),
        )
    ]

    result = run(plane, "ps")

    assert result.exit_code == 0
    assert result.stdout == snapshot("""\
MODEL       STATE            SHARE       WHERE   NEXT
chat        ● ready          0.30 +0.07  a/gpu0  parks when idle 5 min
whisper     ○ parked 12 min  0.30        a       wakes in ~0.9 s
code        ◐ waking         0.30        a/gpu0  ready in ~1.2 s
batch-405b  ✗ not placed     0.30        -       explain says why
rare        · cold           0.30        a/gpu0  starts in ~10.0 s
bytes       ● ready          20.0 GiB    a/gpu0  parks when idle 5 min
(software GPU)
""")


def test_ps_without_models_says_how_to_deploy_one(plane: FakeControlPlane) -> None:
    assert "sublet deploy chat" in run(plane, "ps").stdout


def test_ps_wide_adds_columns(plane: FakeControlPlane) -> None:
    plane.steps = [(view("resident"),)]

    header = run(plane, "ps", "--wide").stdout.splitlines()[0].split("  ")

    assert {"LIMIT", "PRIORITY", "KIND"} <= {word.strip() for word in header}


def test_ps_wide_shows_what_serves_it_and_how_it_is_parked(plane: FakeControlPlane) -> None:
    engine = contract.EngineSpec(kind="vllm", weights_bytes=GIB, image="vllm/vllm-openai:v1", swap_driver="http-sleep")
    plane.steps = [(view("resident", deployment=spec(engine=engine)), view("resident", name="plain"))]

    first, second = run(plane, "ps", "--wide").stdout.splitlines()[1:3]

    assert {"vllm (docker)", "http-sleep"} <= {word.strip() for word in first.split("  ")}
    assert {"simulated", "quickest"} <= {word.strip() for word in second.split("  ")}


def test_a_real_engine_can_be_deployed_from_the_command_line(plane: FakeControlPlane) -> None:
    words = ("--engine", "vllm", "--image", "vllm/vllm-openai:v1", "--model", "org/model", "--swap", "checkpoint")
    result = run(plane, *DEPLOY, *words, "--secret", "HF_TOKEN", "--secret", "WANDB_API_KEY", "--dry-run", "--json")

    engine = json.loads(result.stdout)["deployments"][0]["engine"]
    assert (engine["kind"], engine["image"], engine["model"]) == ("vllm", "vllm/vllm-openai:v1", "org/model")
    assert (engine["secrets"], engine["swap_driver"]) == (["HF_TOKEN", "WANDB_API_KEY"], "checkpoint")
    assert run(plane, *DEPLOY, "--engine", "nim").exit_code == 2


def test_a_state_of_a_newer_control_plane_is_shown_as_it_is(plane: FakeControlPlane) -> None:
    plane.steps = [(view("hibernating"),)]

    assert "◐ hibernating" in run(plane, "ps").stdout


def test_ps_in_a_narrow_terminal_fits_80_columns(plane: FakeControlPlane) -> None:
    plane.steps = [(view("resident", name="nemotron-30b", granted_bytes=30 * GIB),)]

    assert max(len(line) for line in run(plane, "ps").stdout.splitlines()) <= 80


def test_nodes_shows_what_is_free_to_promise(plane: FakeControlPlane) -> None:
    plane.nodes = (
        contract.NodeView(
            node="a", label="software GPU", host_budget_bytes=64 * GIB, host_parked_bytes=3 * GIB, joined_at_s=0.0,
            gpus=tuple(
                contract.GpuView(
                    gpu_uuid=f"GPU-{index}", index=index, name="NVIDIA H100 80GB HBM3", capacity_bytes=80 * GIB,
                    reserve_bytes=3 * GIB, allocatable_bytes=77 * GIB, promised_bytes=promised * GIB,
                    held_bytes=16 * GIB, grade="driver", grade_reason="", resident_count=1, parked_count=2,
                )
                for index, promised in enumerate((48, 90))
            ),
        ),
    )  # fmt: skip

    assert run(plane, "nodes").stdout == snapshot("""\
GPU     TYPE            PROMISED GiB    HELD GiB  FREE TO PROMISE  GRADE
a/gpu0  H100 80GB HBM3  ██████░░░ 48.0  16.0      29.0             driver
a/gpu1  H100 80GB HBM3  █████████ 90.0  16.0      0.0              driver
(reserve 3.0 GiB per GPU; parked in host memory: a 3.0 of 64.0 GiB)
(software GPU)
""")


def test_deploy_follows_until_the_model_is_ready(plane: FakeControlPlane) -> None:
    states = ("proposed", "granted", "starting", "resident")
    plane.steps = [(), *((view(state),) for state in states)]

    result = run(plane, *DEPLOY)

    assert result.exit_code == 0
    assert result.stderr == snapshot("""\
  chat  admitted
  chat  place proposed on a/gpu0  0.30 s
  chat  share granted on a/gpu0  0.60 s
  chat  engine starting on a/gpu0  0.90 s
  chat  ready on a/gpu0  1.20 s
next:  sublet ps    eval "$(sublet env)"
""")
    assert result.stdout == snapshot("chat  ● ready  0.30 on a/gpu0  1.20 s\n")


def test_deploy_sends_the_wish_as_it_was_written(plane: FakeControlPlane) -> None:
    plane.steps = [(view("resident"),)]

    run(plane, *DEPLOY, "--kind", "training", "--warm", "90s", "--not-parkable")

    wish = plane.bodies()[0]["deployment"]
    assert (wish["kind"], wish["engine"]["kind"]) == ("training", "training")
    assert (wish["share"]["request_portion"], wish["share"]["limit_portion"]) == (0.3, 0.4)
    assert (wish["swap"]["warm_window_s"], wish["swap"]["is_parkable"]) == (90.0, False)


def test_deploy_of_what_is_so_already_says_unchanged(plane: FakeControlPlane) -> None:
    plane.verdicts = {"chat": ("duplicate", "")}
    plane.steps = [(view("granted"),)]

    result = run(plane, *DEPLOY)

    assert result.exit_code == 0
    assert "unchanged" in result.stdout


def test_deploy_that_fits_nowhere_says_why_and_what_would_help(plane: FakeControlPlane) -> None:
    plane.steps = [(view(problem="no GPU has room (short by 10.0 GiB)", remedy="retire whisper, or ask for 0.2"),)]

    result = run(plane, *DEPLOY)

    assert result.exit_code == 3
    assert result.stderr.splitlines()[-2:] == [
        "error[not_placed]: chat is not placed: no GPU has room (short by 10.0 GiB)",
        "  fix     retire whisper, or ask for 0.2",
    ]


def test_deploy_of_an_engine_that_dies_fails_with_its_reason(plane: FakeControlPlane) -> None:
    plane.steps = [(view("starting"),), (view("failed", problem="exit code 1: out of memory"),)]

    result = run(plane, *DEPLOY)

    assert result.exit_code == 1
    assert "cause   exit code 1: out of memory" in result.stderr
    assert "fix     sublet logs chat" in result.stderr


def test_deploy_that_takes_too_long_says_that_the_work_goes_on(plane: FakeControlPlane) -> None:
    plane.steps = [(view("starting"),)]

    result = run(plane, *DEPLOY, "--timeout", "5s")

    assert result.exit_code == 6
    assert "the work goes on" in result.stderr


def test_a_deployment_that_has_its_share_but_no_room_to_start_is_done(plane: FakeControlPlane) -> None:
    """A training job beside busy models starts when they leave; whoever deployed it need not wait for that."""
    plane.steps = [(view("proposed"),), (view("granted"),)]

    result = run(plane, *DEPLOY)

    assert result.exit_code == 0
    assert result.stdout.startswith("chat  · cold  0.30 on a/gpu0")
    assert plane.clock_s < 10


def test_deploy_detached_does_not_ask_again(plane: FakeControlPlane) -> None:
    result = run(plane, *DEPLOY, "--detach")

    assert (result.exit_code, plane.asked) == (0, [])
    assert "admitted" in result.stdout


@pytest.mark.parametrize(("code", "exit_code"), [("SUB-ADM-001", 5), ("SUB-MDL-001", 4)])
def test_a_rejection_has_placements_code(plane: FakeControlPlane, code: str, exit_code: int) -> None:
    plane.verdicts = {"chat": ("rejected", code)}

    result = run(plane, *DEPLOY)

    assert result.exit_code == exit_code
    assert f"error[{code}]: chat is rejected" in result.stderr


def test_an_unanswered_command_is_stored_and_told_so(plane: FakeControlPlane) -> None:
    plane.is_silent = True

    result = run(plane, *DEPLOY)

    assert result.exit_code == 6
    assert "the command is stored and will be handled" in result.stderr


def test_an_unreachable_control_plane_says_how_to_start_it(plane: FakeControlPlane) -> None:
    plane.error = Unreachable("the event server cannot be reached", fix="start it with `make up`")

    result = run(plane, "ps")

    assert result.exit_code == 7
    assert (
        result.stderr == "error[unreachable]: the event server cannot be reached\n  fix     start it with `make up`\n"
    )


def test_errors_are_json_beside_json(plane: FakeControlPlane) -> None:
    plane.error = Unreachable("down")

    result = run(plane, "ps", "--json")

    assert json.loads(result.stderr) == snapshot(
        {
            "schema": "sublet.error.v1",
            "code": "unreachable",
            "message": "down",
            "facts": [],
            "cause": "",
            "fix": "",
            "exit_code": 7,
        }
    )
    assert result.stdout == ""


def test_a_wrong_setting_on_the_command_line_is_wrong_use(plane: FakeControlPlane) -> None:
    result = run(plane, "deploy", "chat", "--weights", "14.5", "--share", "0.3")

    assert result.exit_code == 2
    assert "weights must be a size with its unit" in result.stderr
    assert plane.sent == []


def test_deploying_a_file_is_pointed_to_apply(plane: FakeControlPlane) -> None:
    result = run(plane, "deploy", "models.yaml", "--weights", "1GB", "--share", "0.1")

    assert result.exit_code == 2
    assert "sublet apply -f models.yaml" in result.stderr


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    path = tmp_path / "models.yaml"
    path.write_text("models:\n  chat: {weights: 1GB, share: 0.3}\n  code: {weights: 2GB, share: 0.4}\n")
    return path


def test_apply_deploys_all_and_shows_what_was_unchanged(plane: FakeControlPlane, fleet: Path) -> None:
    plane.verdicts = {"chat": ("duplicate", "")}
    plane.steps = [(view("resident"), view("starting", name="code")), (view("resident"), view("resident", name="code"))]

    result = run(plane, "apply", "-f", str(fleet))

    assert result.exit_code == 0
    assert result.stdout == snapshot("""\
chat  ● ready  0.30 on a/gpu0  unchanged
code  ● ready  0.30 on a/gpu0  0.30 s
""")


@pytest.mark.parametrize(
    ("verdict", "code_view", "exit_code"),
    [
        ("admitted", view(name="code", problem="no room"), 3),
        ("admitted", view("failed", name="code"), 1),
        ("admitted", view("starting", name="code"), 6),
        ("rejected", view(name="code"), 5),
    ],
)
def test_apply_ends_with_what_went_worst(
    plane: FakeControlPlane, fleet: Path, verdict: str, code_view: contract.DeploymentView, exit_code: int
) -> None:
    plane.verdicts = {"code": (verdict, "SUB-ADM-001")}
    plane.steps = [(view("resident"), code_view)]

    result = run(plane, "apply", "-f", str(fleet), "--timeout", "3")

    assert result.exit_code == exit_code
    assert "chat" in result.stdout
    assert "error[" in result.stderr


def test_apply_json_has_each_models_error(plane: FakeControlPlane, fleet: Path) -> None:
    plane.steps = [(view("resident"), view(name="code", problem="no room"))]

    result = run(plane, "apply", "-f", str(fleet), "--json")

    models = json.loads(result.stdout)["models"]
    assert [model["error"] and model["error"]["code"] for model in models] == [None, "not_placed"]
    assert result.stderr == ""


def test_apply_of_a_bad_file_sends_nothing(plane: FakeControlPlane, tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text("models:\n  chat:\n    weights: 1GB\n    share: 0.3\n    limt: 0.4\n")

    result = run(plane, "apply", "-f", str(path), "--json")

    assert (result.exit_code, plane.sent) == (2, [])
    assert json.loads(result.stderr)["problems"][0]["hint"] == "did you mean 'limit'?"


def test_dry_run_prints_the_wire_form_and_sends_nothing(plane: FakeControlPlane, fleet: Path) -> None:
    result = run(plane, "apply", "-f", str(fleet), "--dry-run")

    assert [wish["name"] for wish in json.loads(result.stdout)["deployments"]] == ["chat", "code"]
    assert plane.sent == []


def test_check_needs_no_server(plane: FakeControlPlane, fleet: Path) -> None:
    plane.error = Unreachable("down")

    result = run(plane, "check", "-f", str(fleet))

    assert (result.exit_code, result.stdout) == (0, "2 models, no problems\n")


@pytest.mark.parametrize(
    ("verb", "before", "after"),
    [("park", "draining", "parked"), ("wake", "waking", "resident"), ("retire", "draining", "")],
)
def test_a_change_is_followed_to_its_end(plane: FakeControlPlane, verb: str, before: str, after: str) -> None:
    plane.steps = [(view(before),), (view(after),) if after else ()]

    result = run(plane, verb, "chat")

    assert result.exit_code == 0
    assert plane.bodies()[0]["model"] == "chat"
    assert result.stdout.startswith("chat  ")


@pytest.mark.parametrize("verb", ["park", "wake", "retire"])
def test_a_change_of_an_unknown_model_is_not_found(plane: FakeControlPlane, verb: str) -> None:
    plane.verdicts = {"chat": ("rejected", "SUB-MDL-001")}

    assert run(plane, verb, "chat").exit_code == 4


@pytest.mark.parametrize(("verb", "stuck"), [("park", "draining"), ("wake", "parked"), ("retire", "resident")])
def test_a_change_that_takes_too_long_times_out(plane: FakeControlPlane, verb: str, stuck: str) -> None:
    plane.steps = [(view(stuck),)]

    assert run(plane, verb, "chat", "--timeout", "2").exit_code == 6


def test_a_change_in_json_names_the_command(plane: FakeControlPlane) -> None:
    plane.steps = [(view("parked"),)]

    body = json.loads(run(plane, "park", "chat", "--json").stdout)

    assert (body["schema"], body["verdict"], body["state"]) == ("sublet.park.v1", "admitted", "○ parked")
    assert body["command_id"] == plane.sent[0].id


def test_debug_prints_the_trace_that_the_command_carries(plane: FakeControlPlane) -> None:
    plane.steps = [(view("resident"),)]

    result = run(plane, "wake", "chat", "--debug")

    assert f"traceparent {plane.sent[0].traceparent}" in result.stderr
    assert plane.sent[0].traceparent.startswith("00-")
    assert plane.sent[0].traceparent.endswith("-01")

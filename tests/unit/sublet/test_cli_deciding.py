"""``plan``, ``quota`` and ``repack``: their text, their JSON, their exit codes."""

import json
from pathlib import Path

import pytest
from inline_snapshot import snapshot

from sublet import _contract as contract
from tests.unit.sublet.fakes import GIB, FakeControlPlane, run


@pytest.fixture
def plane() -> FakeControlPlane:
    return FakeControlPlane()


@pytest.fixture
def models_file(tmp_path: Path) -> str:
    path = tmp_path / "models.yaml"
    path.write_text("models:\n  chat: {weights: 1GB, share: 0.5}\n")
    return str(path)


def replica(node: str, *gpus: int, codes: tuple[str, ...] = ("room_beside_all",)) -> contract.PlannedReplica:
    return contract.PlannedReplica(
        node=node,
        gpu_uuids=tuple(f"GPU-{index}" for index in gpus),
        gpu_indices=gpus,
        request_bytes=(40 * GIB,) * len(gpus),
        codes=codes,
        reason="",
        victims=(VICTIM,) if "room_by_preemption" in codes else (),
    )


VICTIM = contract.Victim(
    replica_id="tune-1", deployment_id="d1", model="tune", tenant="lab", priority=40, freed_bytes=GIB, reason="low"
)
PLAN = contract.Plan(
    deployments=(
        contract.PlannedDeployment(
            model="giant", verdict="new", wanted_count=3,
            replicas=(replica("a", 0, 1), replica("a", 0, 1)), problem="2 of 3 replicas fit: no room",
            remedy="use a share smaller by 10.0 GiB", codes=("no_gpu_room",),
            ways=("with a share of 0.37 instead of 0.50 it would go to a/gpu1",),
            constraints=(contract.Constraint(code="no_gpu_room", gpu_count=3, node_count=1, short_by_bytes=10 * GIB),),
        ),
        contract.PlannedDeployment(
            model="chat", verdict="unchanged", wanted_count=1,
            replicas=(replica("b", 0, codes=("room_by_preemption",)),) * 2,
        ),
        contract.PlannedDeployment(
            model="odd", verdict="rejected", wanted_count=1, problem="share: give exactly one of both.", remedy="",
        ),
    ),
    has_room_for_all=False,
)  # fmt: skip


def test_a_plan_shows_places_victims_and_what_is_missing(plane: FakeControlPlane, models_file: str) -> None:
    plane.plan = PLAN

    result = run(plane, "plan", "-f", models_file)

    assert result.exit_code == 3
    assert result.stdout == snapshot("""\
             MODEL  WHERE            GiB   WHY
+ new        giant  a/gpu0+1  x2     80.0  room beside all others
✗ no place   giant  1 of 3 replicas  -     see below
= unchanged  chat   b/gpu0  x2       40.0  others give way
✗ rejected   odd    -                -     rejected

giant: 2 of 3 replicas fit: no room
  3 GPUs  on 1 node  no room  at least 10.0 GiB missing
  what would help: use a share smaller by 10.0 GiB
    with a share of 0.37 instead of 0.50 it would go to a/gpu1

chat takes the place of: tune (lab) x2

odd: share: give exactly one of both.
""")


def test_a_plan_with_room_for_all_ends_well_and_is_one_json_object(plane: FakeControlPlane, models_file: str) -> None:
    plane.plan = contract.Plan(deployments=PLAN.deployments[1:2], has_room_for_all=True)

    result = run(plane, "plan", "-f", models_file, "--json")

    assert result.exit_code == 0
    assert json.loads(result.stdout)["schema"] == "sublet.plan.v1"
    assert json.loads(result.stdout)["deployments"][0]["replicas"][0]["victims"][0]["model"] == "tune"


def test_a_plan_of_an_invalid_file_is_told_before_anything_is_asked(plane: FakeControlPlane, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("models:\n  chat: {weights: 1GB}\n")

    result = run(plane, "plan", "-f", str(tmp_path / "m.yaml"))

    assert (result.exit_code, plane.asked) == (2, [])


def test_a_quota_is_set_in_gpus_or_taken_away(plane: FakeControlPlane) -> None:
    first, second = (
        run(plane, "quota", "set", "acme", "--gpus", "2.5"),
        run(plane, "quota", "set", "acme", "--gpus", "none"),
    )

    assert (first.exit_code, second.exit_code) == (0, 0)
    assert [body["gpu_quota"] for body in plane.bodies()] == [2.5, None]


@pytest.mark.parametrize("text", ["many", "-1", "nan", "1e9"])
def test_a_quota_that_is_no_number_is_wrong_use(plane: FakeControlPlane, text: str) -> None:
    result = run(plane, "quota", "set", "acme", f"--gpus={text}")

    assert (result.exit_code, plane.sent) == (2, [])
    assert "is no number of GPUs" in result.stderr


def test_quotas_are_listed_with_what_is_used(plane: FakeControlPlane) -> None:
    plane.quotas = (
        contract.QuotaView(
            tenant="acme", gpu_quota=4, over_quota_weight=2, used_gpus=3.5, never_preempted_gpus=2, waiting_count=0
        ),
        contract.QuotaView(
            tenant="lab", gpu_quota=None, over_quota_weight=1, used_gpus=0.4, never_preempted_gpus=0, waiting_count=1
        ),
    )

    assert run(plane, "quota", "ls").stdout == snapshot("""\
TENANT  QUOTA     WEIGHT  GPUS USED  NEVER PREEMPTED  WAITING
acme    4         2       3.50       2.00             0
lab     no limit  1       0.40       0.00             1
""")


def test_repack_sends_its_budget_and_shows_the_answer(plane: FakeControlPlane) -> None:
    result = run(plane, "repack", "--moves", "4")

    assert (result.exit_code, plane.bodies()[0]["move_count_max"]) == (0, 4)
    assert run(plane, "repack", "--moves", "0").exit_code == 2


def test_repack_shows_moves_and_what_they_free_without_sending_anything(plane: FakeControlPlane) -> None:
    plane.repack_plan = contract.RepackPlan(
        moves=(
            contract.PlannedMove(
                replica_id="chat-d1-1", model="chat", tenant="acme", from_node="a", from_gpu_indices=(1,),
                to_node="b", to_gpu_indices=(0,), moved_bytes=14 * GIB, is_serving=True,
            ),
            contract.PlannedMove(
                replica_id="giant-d2-1", model="giant", tenant="lab", from_node="a", from_gpu_indices=(1, 2),
                to_node="b", to_gpu_indices=(2, 3), moved_bytes=0, is_serving=False,
            ),
        ),
        freed=(contract.FreedGpu(node="a", gpu_uuid="GPU-1", gpu_index=1),),
    )  # fmt: skip

    result = run(plane, "repack", "--dry-run")

    assert (result.exit_code, plane.sent) == (0, [])
    assert result.stdout == snapshot("""\
MODEL  TENANT  FROM      TO        GiB LOADED  HOW
chat   acme    a/gpu1    b/gpu0    14.0        behind a ready replacement
giant  lab     a/gpu1+2  b/gpu2+3  0.0         idle or parked

1 GPU freed by 2 moves: a/gpu1
""")


def test_repack_says_when_nothing_can_be_freed_or_who_may_ask(plane: FakeControlPlane) -> None:
    assert run(plane, "repack", "--dry-run").stdout == "no GPU can be freed by moves that are allowed\n"
    plane.repack_plan = contract.RepackPlan(problem="only the operator's tenant ('default') may ask for moves")

    result = run(plane, "repack", "--dry-run")

    assert (result.exit_code, result.stdout) == (5, "")
    assert "only the operator's tenant" in result.stderr

"""When moves begin, which ones, and how many."""

from collections.abc import Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from kit.outcomes import Context, Outcome, Timer
from kit.service import digest
from schemas.deployments import DeploymentSpec, EngineKind, EngineSpec, Strategy, WorkloadKind
from schemas.gateways import LoadSampled, ModelLoad
from schemas.inbox import GpuCloseRequested, RepackRequested, RetireRequested
from schemas.nodes import GpuQuarantined, GpuReinstated, Ready, ReplicaReady, ReplicaStarting
from schemas.placement import (
    DeploymentAdmitted,
    MoveDecided,
    PlacementProposed,
    ReasonCode,
    ReleaseProposed,
    RepackAsked,
    ReplicaProposal,
    ShareProposal,
)
from schemas.queries import PlanRepack, RepackPlan
from services.placement.core import SERVICE
from services.placement.presence import LookAround
from services.placement.repacking import MoveOn, TidyUp, is_fragmented
from tests.unit.placement.builders import Placement, gpu, kinds, message, proposal, spec, verdict

CANNOT_MOVE = {"is_movable": False}


class Repacking(Placement):
    """GPUs of 80 GiB on one node: `still` (50 GiB, may not be moved) on gpu-0, `small` (20 GiB) alone on gpu-1."""

    def __init__(self, *, small: DeploymentSpec | None = None, gpu_count: int = 2) -> None:
        super().__init__()
        self.join(*(gpu(f"gpu-{number}") for number in range(gpu_count)))
        self.still = self.put(spec("still", 50, is_parkable=False, placing=CANNOT_MOVE), "gpu-0")
        self.small = self.put(small or spec("small", 20), "gpu-1")
        self.now_s += 1000.0

    def put(self, wish: DeploymentSpec, gpu_uuid: str) -> str:
        """A ready replica on this GPU."""
        self.seq += 1
        admitted = DeploymentAdmitted(
            at_s=self.now_s,
            inbox_seq=self.seq,
            command_id=f"put-{self.seq}",
            tenant=self.tenant,
            deployment_id=f"d{self.seq}",
            revision_count=1,
            deployment=wish,
        )
        SERVICE.evolve(self.state, admitted)
        replica_id, size = f"{wish.name}-{admitted.deployment_id}-1", wish.share.request_bytes or 0
        share = ShareProposal(
            replica_id=replica_id, shard_index=0, gpu_uuid=gpu_uuid, request_bytes=size, limit_bytes=size
        )
        replica = ReplicaProposal(
            replica_id=replica_id,
            deployment_id=admitted.deployment_id,
            tenant=self.tenant,
            deployment=wish,
            shares=(share,),
        )
        proposed = PlacementProposed(
            at_s=self.now_s,
            proposal_id=f"{replica_id}-0",
            node="node-0",
            replicas=(replica,),
            reason="as the test says",
        )
        SERVICE.evolve(self.state, proposed)
        self.grant(proposed)
        self.ready(replica_id)
        return replica_id

    def ready(self, replica_id: str, *, behind_s: float = 0.0) -> list[Outcome]:
        """`behind_s`: so far is its node's clock behind placement's."""
        its = self.state.replicas[replica_id]
        ready = Ready(
            replica_id=replica_id,
            deployment_id=its.deployment_id,
            model="m",
            endpoint="http://there",
            wake_epoch=1,
            start_s=1.0,
            enforced_bytes=0,
        )
        return self.handle(ReplicaReady(node=its.node, at_s=self.now_s - behind_s, replicas=(ready,)))

    def hear(self, *busy: str, gateway: str = "gw") -> None:
        """A gateway says that these models are busy and all others idle."""
        loads = tuple(
            ModelLoad(
                deployment_id=d.deployment_id,
                in_flight_count=d.spec.name in busy,
                waiting_count=0,
                arrived_count=0,
                last_arrival_s=0,
            )
            for d in self.state.deployments.values()
        )
        self.handle(LoadSampled(gateway=gateway, models=loads))

    def tidy(self) -> list[Outcome]:
        return self.handle(TidyUp())

    def query(self, query: PlanRepack) -> RepackPlan:
        answer: RepackPlan = super().ask(query)
        return answer

    def ask(self, **values: Any) -> list[Outcome]:  # type: ignore[override]
        return self.handle(RepackRequested(command_id=f"repack-{self.seq}", **values))


def moved(outcomes: Sequence[Outcome]) -> list[tuple[str, tuple[str, ...]]]:
    return [(o.replica_id, o.to_gpu_uuids) for o in outcomes if isinstance(o, MoveDecided)]


def test_an_idle_replica_moves_in_with_another_so_that_its_gpu_is_whole_again() -> None:
    placement = Repacking()
    placement.hear()

    outcomes = placement.tidy()

    assert [(placement.small, ("gpu-0",))] == moved(outcomes)
    proposed = proposal(outcomes)
    assert ((ReasonCode.ROOM_BY_MOVING,), ("gpu-0",)) == (
        proposed.codes,
        tuple(share.gpu_uuid for share in proposed.replicas[0].shares),
    )
    assert [] == moved(placement.tidy()), "it is under way"
    placement.grant(proposed)
    assert [] == [o for o in placement.handle(LookAround()) if isinstance(o, ReleaseProposed)]
    done = placement.ready(proposed.replicas[0].replica_id)
    assert ["ReleaseProposed", "MoveEnded", "Timer"] == kinds(done)
    placement.release(placement.small)
    assert [] == placement.state.on_gpu("gpu-1")


def test_nobody_is_moved_to_tidy_up_while_it_serves_or_nobody_says_that_it_does_not() -> None:
    placement = Repacking()
    assert [] == moved(placement.tidy()), "no gateway has spoken"
    placement.hear("small")
    assert [] == moved(placement.tidy())
    placement.hear(gateway="other")
    assert [] == moved(placement.tidy()), "one of two gateways has requests for it"
    placement.hear()
    placement.now_s += 5.0
    placement.hear(gateway="other")
    assert [] == moved(placement.tidy()), "what one of them said is old"


def test_what_was_placed_a_moment_ago_is_not_moved_to_tidy_up() -> None:
    placement = Repacking()
    placement.now_s -= 900.0
    placement.hear()

    assert [] == moved(placement.tidy())


def test_who_is_about_to_change_or_must_not_be_moved_stays() -> None:
    for wish in (
        spec("small", 20, placing=CANNOT_MOVE),
        spec("small", 20, placing={"gpu_strategy": Strategy.SPREAD}),
        replace(
            spec("small", 20, kind=WorkloadKind.TRAINING),
            engine=EngineSpec(kind=EngineKind.TRAINING, weights_bytes=1),
        ),
    ):
        placement = Repacking(small=wish)
        placement.hear()
        assert [] == moved(placement.tidy()), wish
        assert 0 == gpus_freed(placement.ask())
    placement = Repacking()
    names: dict[str, Any] = {"replica_id": placement.small, "deployment_id": placement.id_of("small"), "model": "small"}
    placement.handle(ReplicaStarting(node="node-0", at_s=placement.now_s, **names, wake_epoch=1))
    placement.hear()
    assert [] == moved(placement.tidy())


def gpus_freed(outcomes: Sequence[Outcome]) -> int:
    (asked,) = [o for o in outcomes if isinstance(o, RepackAsked)]
    return asked.gpus_freed


def test_tidying_is_not_worth_it_where_whole_gpus_are_idle_anyway() -> None:
    placement = Repacking(gpu_count=8)
    placement.hear()

    assert not is_fragmented(placement.state)
    assert [] == moved(placement.tidy())
    assert 1 == gpus_freed(placement.ask())


def test_a_deployment_that_waits_for_a_whole_gpu_is_let_in_by_a_move_of_one_that_serves() -> None:
    placement = Repacking()
    placement.hear("small")
    assert "PlacementFailed" in kinds(placement.deploy(spec("whole", 80, is_parkable=False)))

    outcomes = placement.tidy()
    (decided,) = [o for o in outcomes if isinstance(o, MoveDecided)]
    assert (placement.small, "makes room for whole: 10.0 GiB are loaded on node-0") == (
        decided.replica_id,
        decided.reason,
    )
    proposed = proposal(outcomes)
    placement.grant(proposed)
    placement.ready(proposed.replicas[0].replica_id)

    let_in = placement.release(placement.small)

    assert ["gpu-1"] == [share.gpu_uuid for share in proposal(let_in).replicas[0].shares]


def test_an_operator_is_told_how_many_gpus_moves_can_free_and_they_begin() -> None:
    placement = Repacking()

    outcomes = placement.ask(move_count_max=8)

    assert ("RepackAsked", "admitted", "") == verdict(outcomes)
    assert ("1 GPU can be freed by 1 move", 1) == (message(outcomes), gpus_freed(outcomes))
    assert [(placement.small, ("gpu-0",))] == moved(outcomes)


def test_asking_for_no_moves_only_tells() -> None:
    placement = Repacking()

    outcomes = placement.ask(move_count_max=0)

    assert ([], "no GPU can be freed by moves that are allowed") == (moved(outcomes), message(outcomes))


def test_a_plan_of_moves_is_what_the_command_then_begins_and_changes_nothing() -> None:
    placement = Repacking()
    before = digest(placement.state)

    plan = placement.query(PlanRepack(move_count_max=8))

    assert digest(placement.state) == before
    assert [("node-0", "gpu-1", 1)] == [(gpu.node, gpu.gpu_uuid, gpu.gpu_index) for gpu in plan.freed]
    assert [("small", (1,), (0,), True)] == [
        (move.model, move.from_gpu_indices, move.to_gpu_indices, move.is_serving) for move in plan.moves
    ]
    assert [(move.replica_id, ("gpu-0",)) for move in plan.moves] == moved(placement.ask(move_count_max=8))


def test_a_plan_of_moves_names_nothing_to_others() -> None:
    placement = Repacking()
    placement.tenant = "somebody"

    plan = placement.query(PlanRepack(move_count_max=8))

    assert ((), ()) == (plan.moves, plan.freed)
    assert "only the operator's tenant" in plan.problem


def test_only_the_operators_tenant_may_ask_for_moves() -> None:
    placement = Repacking()
    placement.tenant = "somebody"

    assert ("CommandRejected", "rejected", "SUB-OPR-001") == verdict(placement.ask())


def test_the_budget_of_the_hour_bounds_what_nobody_asked_for() -> None:
    placement = Repacking()
    placement.hear()
    most = placement.state.settings.moves_per_hour_max
    placement.state.move_times_s = tuple(placement.now_s for _ in range(most))

    assert [] == moved(placement.tidy())
    assert 1 == len(moved(placement.ask())), "an operator's wish has its own"


def test_so_many_moves_run_at_once_and_the_next_begins_when_one_ends() -> None:
    placement = Repacking(gpu_count=4)
    placement.put(spec("next", 8), "gpu-2")
    placement.state.settings = replace(placement.state.settings, moves_at_once_max=1)

    first = placement.ask(move_count_max=8)

    assert (2, 1) == (gpus_freed(first), len(moved(first)))
    assert [] == placement.handle(MoveOn())
    proposed = proposal(first)
    placement.grant(proposed)
    placement.ready(proposed.replicas[0].replica_id)
    assert 1 == len(moved(placement.handle(MoveOn())))


def test_a_new_instance_goes_on_with_what_an_operator_asked_for() -> None:
    placement = Repacking(gpu_count=4)
    placement.put(spec("next", 8), "gpu-2")
    placement.state.settings = replace(placement.state.settings, moves_at_once_max=1)
    first = proposal(placement.ask(move_count_max=8))
    placement.grant(first)
    placement.ready(first.replicas[0].replica_id)

    started = SERVICE.on_start(placement.state, Context(now_s=placement.now_s, writer_epoch=2))

    assert TidyUp() in [o.input for o in started if isinstance(o, Timer)]
    assert 1 == len(moved(placement.tidy()))


def test_a_move_that_was_refused_is_not_tried_again_soon() -> None:
    placement = Repacking()
    placement.hear()
    placement.refuse(proposal(placement.tidy()))
    placement.join(gpu("gpu-0"), gpu("gpu-1"))  # So that its refusal is a thing of the past.
    placement.hear()
    assert [] == moved(placement.tidy())

    placement.now_s += placement.state.settings.move_rest_s
    placement.hear()

    assert 1 == len(moved(placement.tidy()))


@pytest.mark.parametrize("behind_s", [0.0, 3000.0])
def test_what_was_moved_a_moment_ago_stays_whatever_its_nodes_clock_says_and_an_operator_asks(behind_s: float) -> None:
    placement = Repacking()
    proposed = proposal(placement.ask())
    placement.grant(proposed)
    placement.ready(proposed.replicas[0].replica_id, behind_s=behind_s)
    placement.release(placement.small)
    placement.put(spec("other", 50, placing=CANNOT_MOVE), "gpu-1")
    placement.handle(RetireRequested(command_id="r", model="still"))
    placement.release(placement.still)

    assert [] == moved(placement.ask())

    placement.now_s += placement.state.settings.move_rest_s

    assert [(proposed.replicas[0].replica_id, ("gpu-1",))] == moved(placement.ask())


def test_a_gpu_whose_last_replica_is_about_to_end_is_no_target() -> None:
    placement = Repacking(gpu_count=3)
    placement.put(spec("next", 8), "gpu-2")
    placement.handle(RetireRequested(command_id="r", model="small"))

    assert [("gpu-0",)] == [targets for _, targets in moved(placement.ask())]


# --- A GPU that an operator wants empty -------------------------------------------------------------------------------


def closed(placement: Repacking, gpu_uuid: str, *, is_draining: bool = True) -> tuple[str, list[Outcome]]:
    """The answer, and what follows when the node has closed it and the due timers have come."""
    command = GpuCloseRequested(
        command_id=f"close-{gpu_uuid}", node="node-0", gpu_uuid=gpu_uuid, is_draining=is_draining
    )
    outcomes = placement.handle(command)
    quarantined = GpuQuarantined(
        node="node-0", at_s=placement.now_s, gpu_uuid=gpu_uuid, reason="an operator closed it",
        fault_count=0, quarantine_s=0.0,
    )  # fmt: skip
    placement.handle(quarantined)
    due = [o.input for o in outcomes if isinstance(o, Timer) and isinstance(o.input, MoveOn)]
    return message(outcomes), [outcome for each in due for outcome in placement.handle(each)]


def test_what_is_on_a_gpu_that_is_to_be_empty_moves_though_it_serves_and_breaks_a_whole_gpu() -> None:
    placement = Repacking(gpu_count=3)
    busy = placement.put(spec("busy", 40), "gpu-1")
    placement.now_s += 1000.0
    placement.hear("busy", "small")

    told, outcomes = closed(placement, "gpu-1")

    assert "; 2 of 2 replicas there are moved where there is room" in told
    assert {busy: ("gpu-2",), placement.small: ("gpu-0",)} == dict(moved(outcomes))
    assert () == placement.state.move_times_s, "the budget of the hour is for what nobody asked for"


def test_who_may_not_be_moved_stays_and_is_named_and_the_others_leave() -> None:
    placement = Repacking(gpu_count=3)
    beside = placement.put(spec("beside", 20), "gpu-0")
    placement.now_s += 1000.0

    told, outcomes = closed(placement, "gpu-0")

    assert f"1 of 2 replicas there are moved where there is room; until they end, these stay: {placement.still}" in told
    assert [beside] == [replica_id for replica_id, _ in moved(outcomes)]


def test_a_gpu_that_is_only_closed_keeps_what_it_has_until_somebody_wants_it_empty() -> None:
    placement = Repacking(gpu_count=3)

    _, only_closed = closed(placement, "gpu-1", is_draining=False)
    idle = placement.tidy()
    placement.seq += 1
    again = GpuCloseRequested(command_id="again", node="node-0", gpu_uuid="gpu-1", is_draining=True)
    asked_again = [o.input for o in placement.handle(again) if isinstance(o, Timer) and isinstance(o.input, MoveOn)]

    assert [] == moved([*only_closed, *idle])
    assert [MoveOn()] == asked_again
    assert [placement.small] == [replica_id for replica_id, _ in moved(placement.handle(asked_again[0]))]


def test_when_there_is_no_room_it_waits_and_goes_on_when_there_is() -> None:
    placement = Repacking()
    filler = placement.put(spec("filler", 25), "gpu-0")
    placement.now_s += 1000.0

    _, outcomes = closed(placement, "gpu-1")
    placement.handle(RetireRequested(command_id="retire", model="filler"))
    placement.release(filler)

    assert [] == moved(outcomes)
    assert [(placement.small, ("gpu-0",))] == moved(placement.tidy())


def test_an_operator_who_opens_it_again_ends_the_emptying() -> None:
    placement = Repacking(gpu_count=3)
    closed(placement, "gpu-0")

    placement.handle(GpuReinstated(node="node-0", at_s=placement.now_s, gpu_uuid="gpu-0", away_s=1.0))

    assert {} == placement.state.draining

"""A move: a replacement first, then the old replica ends; whatever goes wrong, the old one stays."""

from collections.abc import Sequence

import pytest

from kit.outcomes import Outcome
from schemas.inbox import RetireRequested
from schemas.nodes import Ready, ReplicaFailed, ReplicaParked, ReplicaReady, ReplicaStarting
from schemas.placement import (
    MoveDecided,
    MoveEnded,
    NodeLost,
    NodeReturned,
    PlacementProposed,
    ReleaseProposed,
    ReplicaProposal,
    ShareProposal,
)
from services.placement.presence import LookAround, SettleReturned
from tests.unit.placement.builders import Placement, gpu, spec

GIB = 1024**3


class Moving(Placement):
    """`m` is ready on node-0 and moves to node-1; nothing has answered its replacement's proposal yet."""

    def __init__(self, *, is_started: bool = True) -> None:
        super().__init__()
        for number in range(3):
            self.join(gpu(f"gpu-{number}"), node=f"node-{number}")
        self.old = self.placed(spec("m", 30)).replicas[0]
        if is_started:
            self.ready(self.old.replica_id, node="node-0")
        self.new = f"m-{self.old.deployment_id}-2"
        self.handle(
            MoveDecided(
                at_s=self.now_s,
                move_id="move-1",
                replica_id=self.old.replica_id,
                replacement_id=self.new,
                deployment_id=self.old.deployment_id,
                model="m",
                from_node="node-0",
                from_gpu_uuids=("gpu-0",),
                to_node="node-1",
                to_gpu_uuids=("gpu-1",),
                reason="frees gpu-0",
            )
        )
        share = ShareProposal(
            replica_id=self.new, shard_index=0, gpu_uuid="gpu-1", request_bytes=30 * GIB, limit_bytes=30 * GIB
        )
        replica = ReplicaProposal(
            replica_id=self.new,
            deployment_id=self.old.deployment_id,
            tenant="default",
            deployment=self.old.deployment,
            shares=(share,),
        )
        self.proposed = PlacementProposed(
            at_s=self.now_s, proposal_id=f"{self.new}-0", node="node-1", replicas=(replica,), reason="moved"
        )
        self.handle(self.proposed)

    def _names(self, replica_id: str, node: str) -> dict[str, object]:
        its = {"replica_id": replica_id, "deployment_id": self.old.deployment_id, "model": "m"}
        return {"node": node, "at_s": self.now_s, **its}

    def ready(self, replica_id: str, *, node: str) -> list[Outcome]:
        its = Ready(
            replica_id=replica_id,
            deployment_id=self.old.deployment_id,
            model="m",
            endpoint="http://there",
            wake_epoch=1,
            start_s=1.0,
            enforced_bytes=0,
        )
        return self.handle(ReplicaReady(node=node, at_s=self.now_s, replicas=(its,)))

    def starting(self) -> None:
        self.handle(ReplicaStarting(**self._names(self.new, "node-1"), wake_epoch=1))  # type: ignore[arg-type]

    def fails(self, *, is_final: bool) -> None:
        self.handle(
            ReplicaFailed(
                **self._names(self.new, "node-1"),  # type: ignore[arg-type]
                reason="no such file",
                attempt_count=1,
                is_final=is_final,
                wake_epoch=2,
            )
        )

    def park(self, replica_id: str, *, node: str) -> None:
        self.handle(
            ReplicaParked(
                **self._names(replica_id, node),  # type: ignore[arg-type]
                wake_epoch=2,
                residue_bytes=GIB,
                host_bytes=0,
                copied_bytes=0,
                park_s=0.1,
                drain_s=0.1,
                reason="idle",
            )
        )

    def look(self) -> list[Outcome]:
        return self.handle(LookAround())


def released(outcomes: Sequence[Outcome]) -> list[str]:
    return [o.replica_id for o in outcomes if isinstance(o, ReleaseProposed)]


def ended(outcomes: Sequence[Outcome]) -> list[tuple[bool, str]]:
    return [(o.is_done, o.reason) for o in outcomes if isinstance(o, MoveEnded)]


def test_the_old_one_goes_when_its_replacement_is_ready_and_not_before() -> None:
    moving = Moving()
    moving.grant(moving.proposed)
    moving.starting()
    assert ([], []) == (released(moving.look()), ended(moving.look()))

    outcomes = moving.ready(moving.new, node="node-1")

    assert [moving.old.replica_id] == released(outcomes)
    assert [(True, f"{moving.new} stands in")] == ended(outcomes)
    assert {} == moving.state.moves
    assert [] == moving.look()[:-1], "it is over"


def test_a_parked_one_too_waits_for_a_ready_replacement_because_its_return_is_guaranteed() -> None:
    moving = Moving()
    moving.park(moving.old.replica_id, node="node-0")
    moving.grant(moving.proposed)
    assert [] == released(moving.look())

    assert [moving.old.replica_id] == released(moving.ready(moving.new, node="node-1"))


def test_one_that_never_started_goes_as_soon_as_the_other_has_its_lease() -> None:
    moving = Moving(is_started=False)
    assert [] == released(moving.look())

    moving.grant(moving.proposed)

    assert [moving.old.replica_id] == released(moving.look())


def test_a_replacement_that_its_node_refuses_leaves_everything_as_it_was() -> None:
    moving = Moving()

    outcomes = moving.refuse(moving.proposed)

    assert ([], [(False, "the replacement was refused or has ended")]) == (released(outcomes), ended(outcomes))
    assert [moving.old.replica_id] == list(moving.state.replicas)
    assert [] == [o for o in outcomes if isinstance(o, PlacementProposed)]
    assert "" == moving.state.deployments[moving.old.deployment_id].problem


@pytest.mark.parametrize("is_granted", [True, False])
def test_a_replacement_that_fails_for_good_or_takes_too_long_is_released(is_granted: bool) -> None:
    moving = Moving()
    if is_granted:
        moving.grant(moving.proposed)
        moving.fails(is_final=False)
        assert [] == ended(moving.look()), "its node tries again"
        moving.fails(is_final=True)
    else:
        moving.now_s += moving.state.settings.move_timeout_s

    outcomes = moving.look()

    assert ([moving.new], [False]) == (released(outcomes), [is_done for is_done, _ in ended(outcomes)])
    assert not moving.state.replicas[moving.old.replica_id].is_releasing


def test_a_replacement_on_a_lost_node_is_released_and_the_old_one_stays() -> None:
    moving = Moving()
    moving.grant(moving.proposed)
    moving.handle(NodeLost(at_s=moving.now_s, node="node-1", silent_s=30.0, replica_ids=(moving.new,)))

    outcomes = moving.look()

    assert ([moving.new], [(False, "node-1 is lost")]) == (released(outcomes), ended(outcomes))


def test_when_the_old_ones_node_is_lost_the_replacement_takes_its_place() -> None:
    moving = Moving()
    moving.grant(moving.proposed)
    moving.handle(NodeLost(at_s=moving.now_s, node="node-0", silent_s=30.0, replica_ids=(moving.old.replica_id,)))

    outcomes = moving.look()

    assert ([], [False]) == (released(outcomes), [is_done for is_done, _ in ended(outcomes)])
    assert (1, False) == (moving.state.placed_count(moving.old.deployment_id), bool(moving.state.waiting))


def test_a_deployment_that_is_retired_in_the_middle_loses_both() -> None:
    moving = Moving()
    moving.grant(moving.proposed)

    retired = moving.handle(RetireRequested(command_id="r", model="m"))

    assert {moving.old.replica_id, moving.new} == set(released(retired))
    assert [(False, "its deployment was retired")] == ended(moving.look())


def test_scaling_to_zero_in_the_middle_ends_the_move() -> None:
    moving = Moving()
    moving.grant(moving.proposed)
    assert {moving.old.replica_id, moving.new} == set(released(moving.scale(moving.old.deployment_id, 0)))

    outcomes = moving.look()

    assert ([], [False]) == (released(outcomes), [is_done for is_done, _ in ended(outcomes)])


def test_both_copies_are_counted_and_neither_is_surplus_while_the_move_runs() -> None:
    moving = Moving()
    moving.grant(moving.proposed)
    moving.handle(NodeLost(at_s=moving.now_s, node="node-2", silent_s=30.0, replica_ids=()))
    moving.handle(NodeReturned(at_s=moving.now_s, node="node-2", away_s=30.0))
    moving.state.nodes["node-0"].returned_at_s = moving.now_s
    moving.now_s += 100

    assert [] == released(moving.handle(SettleReturned(node="node-0")))
    assert [moving.old.replica_id] == [r.replica_id for r in moving.state.on_gpu("gpu-0")]
    assert [moving.new] == [r.replica_id for r in moving.state.on_gpu("gpu-1")]

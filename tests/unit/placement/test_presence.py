"""Nodes that fall silent, come back, and come and go."""

from collections.abc import Sequence
from typing import Any

from kit.outcomes import Outcome, Timer
from schemas.nodes import NodeAlive, Ready, ReplicaReady
from schemas.placement import NodeLost, NodeReturned, PlacementProposed, ReleaseProposed
from services.placement.observed import Observed
from services.placement.presence import LookAround, QuarantineOver, SettleReturned
from tests.unit.placement.builders import Placement, gpu, kinds, proposal, spec

LOST_S = 30


def of(kind: type, outcomes: Sequence[Outcome]) -> Any:
    (found,) = [outcome for outcome in outcomes if isinstance(outcome, kind)]
    return found


class Fleet(Placement):
    """Two nodes of one GPU each. Time moves only by `listen`."""

    def __init__(self) -> None:
        super().__init__()
        for number in range(2):
            self.join(gpu(f"gpu-{number}"), node=f"node-{number}")

    def alive(self, node: str) -> list[Outcome]:
        self.now_s -= 1.0  # `handle` lets a second pass.
        return self.handle(NodeAlive(node=node, machine_id="m", writer_epoch=1))

    def listen(self, *nodes: str, lasts_s: int) -> list[Outcome]:
        """Only these speak, every two seconds; placement looks around as often. All outcomes but its next ticks."""
        outcomes: list[Outcome] = []
        for _ in range(lasts_s // 2):
            self.now_s += 1.0
            for node in nodes:
                outcomes += self.alive(node)
            outcomes += self.handle(LookAround())
        return [o for o in outcomes if not (isinstance(o, Timer) and isinstance(o.input, LookAround))]

    def lose(self, node: str) -> NodeLost:
        found = of(NodeLost, self.listen(*sorted({"node-0", "node-1"} - {node}), lasts_s=LOST_S + 2))
        assert isinstance(found, NodeLost)
        return found

    def next(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """These, and what the timers among them lead to that are due already."""
        due = [o for o in outcomes if isinstance(o, Timer) and o.due_s <= self.now_s]
        return [*outcomes, *(outcome for timer in due for outcome in self.handle(timer.input))]

    def ready(self, replica_id: str, *, node: str) -> None:
        its = Ready(
            replica_id=replica_id,
            deployment_id=self.state.replicas[replica_id].deployment_id,
            model="m",
            endpoint="http://there",
            wake_epoch=1,
            start_s=1.0,
            enforced_bytes=0,
        )
        self.handle(ReplicaReady(node=node, at_s=self.now_s, replicas=(its,)))

    def settle(self, node: str) -> list[Outcome]:
        self.now_s += self.state.settings.return_settle_s
        return self.handle(SettleReturned(node=node))

    def served_on_0(self) -> str:
        """One ready replica on node-0."""
        its = self.placed(spec("m", 40)).replicas[0].replica_id
        self.ready(its, node="node-0")
        return its


def test_a_silent_node_is_lost_after_its_time_and_says_whom_it_had() -> None:
    fleet = Fleet()
    its = fleet.placed(spec("m", 40)).replicas[0].replica_id

    assert [] == fleet.listen("node-0", "node-1", lasts_s=100)
    assert [] == fleet.listen("node-1", lasts_s=LOST_S - 2)
    outcomes = fleet.listen("node-1", lasts_s=2)

    lost = of(NodeLost, outcomes)
    assert ("node-0", (its,)) == (lost.node, lost.replica_ids)
    assert LOST_S <= lost.silent_s < LOST_S + 2
    assert [] == [o for o in fleet.listen("node-1", lasts_s=100) if isinstance(o, NodeLost)]


def test_the_replicas_of_a_lost_node_get_another_place_at_once() -> None:
    fleet = Fleet()
    fleet.served_on_0()
    fleet.listen("node-0", "node-1", lasts_s=2)

    outcomes = fleet.next(fleet.listen("node-1", lasts_s=LOST_S + 2))

    assert "node-1" == proposal(outcomes).node


def test_what_a_lost_node_holds_stays_in_its_own_account() -> None:
    """So that nothing is promised twice on it when it comes back."""
    fleet = Fleet()
    its = fleet.served_on_0()
    fleet.listen("node-0", "node-1", lasts_s=2)
    fleet.lose("node-0")

    assert [its] == [r.replica_id for r in fleet.state.on_gpu("gpu-0")]


def test_nothing_new_goes_to_a_lost_node() -> None:
    fleet = Fleet()
    fleet.listen("node-0", "node-1", lasts_s=2)
    fleet.lose("node-0")

    on_other = proposal(fleet.deploy(spec("a", 50))).node
    refused = fleet.deploy(spec("b", 50, is_parkable=False))

    assert ("node-1", "PlacementFailed") == (on_other, kinds(refused)[-1])
    assert "the node is lost" in {a.reason for a in refused[-1].alternatives}  # type: ignore[union-attr]


def test_nobody_is_lost_when_nobody_is_heard() -> None:
    """NATS is away, or placement cannot hear: the missing measurement says nothing about nodes."""
    fleet = Fleet()
    fleet.listen("node-0", "node-1", lasts_s=10)

    assert [] == fleet.listen(lasts_s=1000)


def test_after_a_time_in_which_nobody_was_heard_every_node_has_its_whole_time_again() -> None:
    fleet = Fleet()
    fleet.listen("node-0", "node-1", lasts_s=10)
    fleet.listen(lasts_s=100)

    assert [] == fleet.listen("node-1", lasts_s=LOST_S)
    assert "node-0" == of(NodeLost, fleet.listen("node-1", lasts_s=2)).node


def test_after_a_restart_nobody_is_lost_before_a_whole_time_of_listening() -> None:
    fleet = Fleet()
    fleet.listen("node-0", "node-1", lasts_s=10)
    fleet.listen("node-1", lasts_s=LOST_S - 4)
    fleet.state.observed = Observed()

    assert [] == fleet.listen(lasts_s=100)
    assert [] == fleet.listen("node-1", lasts_s=LOST_S)
    assert "node-0" == of(NodeLost, fleet.listen("node-1", lasts_s=2)).node


def test_a_node_that_is_heard_again_is_back_with_the_time_it_was_away() -> None:
    fleet = Fleet()
    fleet.listen("node-0", "node-1", lasts_s=2)
    heard_at_s = fleet.state.observed.alive_at_s["node-0"]
    fleet.lose("node-0")
    fleet.listen("node-1", lasts_s=60)
    fleet.now_s = heard_at_s + 200

    back = of(NodeReturned, fleet.alive("node-0"))

    assert (200.0, 0.0, 1) == (back.away_s, back.quarantine_s, back.loss_count)
    assert [] == fleet.listen("node-0", "node-1", lasts_s=100)


def test_a_node_that_joins_again_is_back_and_is_not_lost_again_by_its_old_silence() -> None:
    fleet = Fleet()
    fleet.listen("node-0", "node-1", lasts_s=2)
    fleet.lose("node-0")

    outcomes = fleet.join(gpu("gpu-0"), node="node-0")

    assert 1 == of(NodeReturned, outcomes).loss_count
    assert [] == [o for o in fleet.listen("node-1", lasts_s=LOST_S - 4) if isinstance(o, NodeLost)]


def test_a_deployment_that_fits_nowhere_else_says_why_and_is_placed_again_by_the_return() -> None:
    fleet = Fleet()
    fleet.placed(spec("big", 70, is_parkable=False))
    fleet.placed(spec("other", 70, is_parkable=False))
    fleet.listen("node-0", "node-1", lasts_s=2)
    fleet.next(fleet.listen("node-1", lasts_s=LOST_S + 2))
    big = fleet.state.deployments[fleet.id_of("big")]
    assert "no room" in big.problem

    fleet.next(fleet.alive("node-0"))

    assert ("", 2) == (big.problem, len(fleet.state.replicas))
    assert [] == fleet.settle("node-0")


def returned_with(fleet: Fleet, *, is_ready: bool) -> tuple[str, str]:
    """(what node-0 brought back, its replacement on node-1)."""
    old = fleet.served_on_0()
    fleet.listen("node-0", "node-1", lasts_s=2)
    proposed = proposal(fleet.next(fleet.listen("node-1", lasts_s=LOST_S + 2)))
    fleet.grant(proposed)
    new = proposed.replicas[0].replica_id
    if is_ready:
        fleet.ready(new, node="node-1")
    fleet.alive("node-0")
    return old, new


def test_of_two_that_serve_the_one_on_the_steady_node_is_kept() -> None:
    fleet = Fleet()
    old, _ = returned_with(fleet, is_ready=True)

    assert [old] == [o.replica_id for o in fleet.settle("node-0") if isinstance(o, ReleaseProposed)]
    assert [] == fleet.settle("node-0")


def test_the_one_that_serves_is_kept_before_one_that_still_starts() -> None:
    fleet = Fleet()
    _, new = returned_with(fleet, is_ready=False)

    assert [new] == [o.replica_id for o in fleet.settle("node-0") if isinstance(o, ReleaseProposed)]


def test_nothing_is_weighed_before_the_node_has_told_what_still_runs() -> None:
    fleet = Fleet()
    returned_with(fleet, is_ready=True)

    assert [] == fleet.handle(SettleReturned(node="node-0"))


def test_a_second_loss_is_followed_by_a_quarantine_and_each_further_one_doubles_it_up_to_a_cap() -> None:
    fleet = Fleet()
    fleet.listen("node-0", "node-1", lasts_s=2)
    told = []
    for _ in range(9):
        fleet.lose("node-0")
        fleet.now_s += 1
        back = of(NodeReturned, fleet.alive("node-0"))
        told.append((back.loss_count, back.quarantine_s))

    assert [(1, 0), (2, 60), (3, 120), (4, 240), (5, 480), (6, 960), (7, 1800), (8, 1800), (9, 1800)] == told


def test_in_quarantine_nothing_new_comes_and_what_runs_goes_on_until_it_ends() -> None:
    fleet = Fleet()
    its = fleet.served_on_0()
    fleet.placed(spec("other", 70, is_parkable=False))
    fleet.listen("node-0", "node-1", lasts_s=2)
    fleet.lose("node-0")
    fleet.alive("node-0")
    fleet.lose("node-0")
    back = fleet.alive("node-0")
    assert "PlacementFailed" == kinds(fleet.deploy(spec("new", 30, is_parkable=False)))[-1]
    assert not fleet.state.replicas[its].is_releasing

    (timer,) = [o for o in back if isinstance(o, Timer) and isinstance(o.input, QuarantineOver)]
    fleet.now_s = timer.due_s - 1.0

    assert "node-0" == proposal(fleet.handle(timer.input)).node


def test_losses_long_ago_are_forgotten() -> None:
    fleet = Fleet()
    fleet.listen("node-0", "node-1", lasts_s=2)
    fleet.lose("node-0")
    fleet.alive("node-0")
    fleet.now_s += fleet.state.settings.flap_window_s
    fleet.listen("node-0", "node-1", lasts_s=2)
    fleet.lose("node-0")
    fleet.now_s += 1

    back = of(NodeReturned, fleet.alive("node-0"))

    assert (1, 0.0) == (back.loss_count, back.quarantine_s)


def test_a_node_that_refuses_is_asked_again_a_bounded_number_of_times_and_then_the_others() -> None:
    fleet = Fleet()
    proposed = proposal(fleet.deploy(spec("m", 40)))
    asked = []
    for _ in range(fleet.state.settings.refusal_count + 1):
        asked.append(proposed.node)
        outcomes = fleet.refuse(proposed)
        found = [o for o in outcomes if isinstance(o, PlacementProposed)]
        if not found:
            break
        proposed = found[0]

    assert {"node-0"} == set(asked[: fleet.state.settings.refusal_count])
    assert "node-1" == asked[-1]

"""What placement promises, whatever happens: joins, grants, refusals, releases, failures, losses, in any order.

The account is made here from facts alone: nothing of it comes from placement's own numbers.
"""

from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kit.outcomes import Outcome, Timer
from kit.service import digest
from kit.snapshots import encode_state, restore_state
from schemas.deployments import AntiAffinity, DeploymentSpec, HostSpec
from schemas.inbox import RetireRequested
from schemas.nodes import GpuOffer, LeaseReleased, ReplicaParked
from schemas.placement import (
    GangCommitted,
    NodeLost,
    NodeReturned,
    PlacementFailed,
    PlacementProposed,
)
from schemas.units import GiB
from services.placement.core import SERVICE
from services.placement.gangs import PlaceNext
from services.placement.index import Index
from services.placement.state import ClusterState
from tests.unit.placement import builders

NODES = ("node-0", "node-1", "node-2")
NAMES = ("a", "b", "c", "d", "e")

many = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])

gpus = st.builds(
    lambda gib, model, foreign: (gib, model, foreign),
    st.sampled_from([20, 40, 80]),
    st.sampled_from(["H100", "A100"]),
    st.sampled_from([0, 0, 7]),
)
wishes = st.builds(
    lambda name, size, gpu_count, parkable, count, is_gang, apart, model, cpu, priority: builders.spec(
        name,
        size if isinstance(size, int) else None,
        portion=size if isinstance(size, float) else None,
        gpu_count=gpu_count,
        is_parkable=parkable,
        replica_count=count,
        weights_gib=20,
        priority=priority,
        host=HostSpec(cpu_millicores=cpu),
        placing={"is_gang": is_gang, "anti_affinity": apart, "gpu_models": model},
    ),
    st.sampled_from(NAMES),
    st.sampled_from([5, 19, 40, 80, 0.3, 0.5, 1.0]),
    st.sampled_from([1, 1, 1, 2]),
    st.booleans(),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([False, False, True]),
    st.sampled_from([AntiAffinity.NONE, *AntiAffinity]),
    st.sampled_from([(), (), ("h100",)]),
    st.sampled_from([0, 700]),
    st.sampled_from(["low", "high"]),
)
deploys = st.tuples(st.just("deploy"), wishes)
grants = st.tuples(st.just("answer"), st.integers(0, 9), st.just("grant"))
ends = st.tuples(st.just("end"), st.integers(0, 9))
joins = st.tuples(st.just("join"), st.sampled_from(NODES), st.lists(gpus, min_size=1, max_size=3))
steps = st.one_of(
    *(deploys, deploys, deploys, grants, grants, grants, grants, ends, ends, joins),
    st.tuples(st.just("answer"), st.integers(0, 9), st.just("refuse")),
    st.tuples(st.just("retire"), st.sampled_from(NAMES)),
    st.tuples(st.just("fail"), st.integers(0, 9)),
    st.tuples(st.just("park"), st.integers(0, 9), st.integers(0, 3)),
    st.tuples(st.just("lose"), st.sampled_from(NODES)),
    st.tuples(st.just("scale"), st.sampled_from(NAMES), st.integers(0, 4)),
    st.tuples(st.just("wait"), st.sampled_from([1.0, 40.0, 400.0])),
)
START = [("join", "node-0", [(80, "H100", 0), (80, "H100", 7)]), ("join", "node-1", [(40, "A100", 0), (80, "H100", 0)])]
scripts = st.lists(steps, min_size=12, max_size=30).map(lambda drawn: [*START, *drawn])
"""Shorter ones place little; every test but those of a script that goes on begins with two nodes."""


@dataclass
class History:
    """One history and an account of it."""

    placement: builders.Placement = field(default_factory=builders.Placement)
    open: list[PlacementProposed] = field(default_factory=list)
    """Proposals that no node has answered."""
    leased: dict[str, PlacementProposed] = field(default_factory=dict)
    """{replica_id: its proposal}, granted and not ended"""
    held: dict[str, set[str]] = field(default_factory=dict)
    """{gang_id: replicas whose leases are held}"""
    committed: set[str] = field(default_factory=set)
    facts: list[Outcome] = field(default_factory=list)
    due: list[Timer] = field(default_factory=list)

    @property
    def state(self) -> ClusterState:
        return self.placement.state

    def play(self, step: tuple[Any, ...]) -> None:
        match step:
            case ("join", node, offered):
                has = [
                    builders.gpu(f"{node}-{n}-{model}-{gib}", allocatable_gib=gib, name=model, foreign_gib=foreign)
                    for n, (gib, model, foreign) in enumerate(offered)
                ]
                self.note(self.placement.join(*has, node=node, host_gib=50, cpu_millicores=2000))
            case ("deploy", wish):
                self.note(self.placement.deploy(wish))
            case ("answer", number, answer) if self.open:
                self.answer(self.open.pop(number % len(self.open)), answer)
            case ("retire", name):
                self.note(self.placement.handle(RetireRequested(command_id=f"r{self.placement.seq}", model=name)))
            case ("end", number) if self.leased:
                self.end(sorted(self.leased)[number % len(self.leased)])
            case ("fail", number) if self.leased:
                replica_id = sorted(self.leased)[number % len(self.leased)]
                self.note(self.placement.fail(replica_id, node=self.leased[replica_id].node))
            case ("park", number, gib) if self.leased:
                self.park(sorted(self.leased)[number % len(self.leased)], gib)
            case ("lose", node) if node in self.state.nodes:
                self.lose_or_return(node)
            case ("scale", name, count) if self.state.named("default", name) is not None:
                self.note(self.placement.scale(self.placement.id_of(name), count))
            case ("wait", time_s):
                self.placement.now_s += time_s
                self.run_due()

    def note(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            if isinstance(outcome, PlacementProposed):
                self.check_proposal(outcome)
                self.open.append(outcome)
            elif isinstance(outcome, GangCommitted):
                self.committed.add(outcome.gang_id)
            elif isinstance(outcome, Timer):
                self.due.append(outcome)
        self.facts += [outcome for outcome in outcomes if not isinstance(outcome, Timer)]

    def run_due(self) -> None:
        now = [timer for timer in self.due if timer.due_s <= self.placement.now_s]
        self.due = [timer for timer in self.due if timer.due_s > self.placement.now_s]
        for timer in [*now, Timer(due_s=self.placement.now_s, input=PlaceNext())]:
            self.note(self.placement.handle(timer.input))

    def answer(self, proposed: PlacementProposed, answer: str) -> None:
        if answer == "refuse":
            self.note(self.placement.refuse(proposed))
            return
        self.leased.update({replica.replica_id: proposed for replica in proposed.replicas})
        if proposed.gang_id:
            self.held.setdefault(proposed.gang_id, set()).update(r.replica_id for r in proposed.replicas)
        self.note(self.placement.grant(proposed))

    def end(self, replica_id: str) -> None:
        node = self.leased.pop(replica_id).node
        self.note(
            self.placement.handle(LeaseReleased(node=node, at_s=self.placement.now_s, replica_id=replica_id, reason=""))
        )

    def park(self, replica_id: str, residue_gib: int) -> None:
        replica = self.state.replicas.get(replica_id)
        if replica is None or not replica.is_parkable or replica.state != "granted":
            return
        parked = ReplicaParked(
            node=replica.node,
            at_s=self.placement.now_s,
            replica_id=replica_id,
            deployment_id=replica.deployment_id,
            model="m",
            wake_epoch=2,
            residue_bytes=residue_gib * GiB,
            host_bytes=0,
            copied_bytes=0,
            park_s=0.0,
            drain_s=0.0,
            reason="",
        )
        self.note(self.placement.handle(parked))

    def lose_or_return(self, node: str) -> None:
        now_s = self.placement.now_s
        fact: NodeLost | NodeReturned
        if self.state.nodes[node].lost_at_s is None:
            fact = NodeLost(at_s=now_s, node=node, silent_s=30.0, replica_ids=())
        else:
            fact = NodeReturned(at_s=now_s, node=node, away_s=10.0, quarantine_s=30.0)
        SERVICE.evolve(self.state, fact)
        self.run_due()

    def check_proposal(self, proposed: PlacementProposed) -> None:
        """It goes to an open node that has the GPUs; shares are exact; replicas that keep apart do."""
        node = self.state.nodes[proposed.node]
        assert node.is_open(self.placement.now_s)
        for replica in proposed.replicas:
            spec = replica.deployment
            uuids = [share.gpu_uuid for share in replica.shares]
            assert spec.share.gpu_count == len(uuids) == len(set(uuids))
            for share in replica.shares:
                gpu = node.gpus[share.gpu_uuid]
                assert share.request_bytes == exact_request(spec, gpu)
                assert share.request_bytes <= share.limit_bytes
                assert not spec.placement.gpu_models or "H100" == gpu.name


def exact_request(spec: DeploymentSpec, gpu: GpuOffer) -> int:
    if spec.share.request_bytes is not None:
        return spec.share.request_bytes
    tenths = round((spec.share.request_portion or 0.0) * 10)
    return (gpu.capacity_bytes - gpu.reserve_bytes) * tenths // 10


def numbers_of(index: Index) -> dict[str, Any]:
    rooms = index.rooms
    return {
        "named": {key: d.deployment_id for key, d in index.named.items()},
        "waiting": sorted(index.waiting),
        "alike": {demand: sorted(ids) for demand, ids in index.waiting_alike.items()},
        "untold": sorted(index.untold),
        "placed": dict(index.placed_counts),
        "on_gpu": {uuid: sorted(ids) for uuid, ids in index.on_gpu.items()},
        "on_node": {node: sorted(ids) for node, ids in index.on_node.items()},
        "free": {name: rooms.fleet.free_units(name) for name in rooms.fleet.names},
        "cpu": {name: rooms.fleet.cpu_milli_left(name) for name in rooms.fleet.names},
        "shapes": {name: rooms.fleet.nodes[name].shape for name in rooms.fleet.names},
        "park": dict(rooms.park_left),
        "accounts": {name: [a.saved() for a in rooms.accounts[name]] for name in rooms.accounts},
        "claimed": {name: [a.claimed_bytes for a in rooms.accounts[name]] for name in rooms.accounts},
    }


def played(script: list[tuple[Any, ...]]) -> History:
    history = History()
    for step in script:
        history.play(step)
    return history


@many
@given(script=scripts)
def test_the_numbers_that_folds_keep_are_those_that_are_made_anew(script: list[tuple[Any, ...]]) -> None:
    """After every step, in any history; and a restored state has the same ones."""
    history = History()
    for step in script:
        history.play(step)
        assert numbers_of(Index(history.state)) == numbers_of(history.state.index)

    restored = SERVICE.new_state(history.state.settings)
    restore_state(restored, encode_state(history.state))
    assert digest(history.state) == digest(restored)
    assert numbers_of(restored.index) == numbers_of(history.state.index)


@many
@given(script=scripts)
def test_no_gpu_is_promised_beyond_what_its_replicas_can_live_with(script: list[tuple[Any, ...]]) -> None:
    """When it is proposed, each share fits beside what is there: all that never parks, residues, the largest share."""
    history = History()
    for step in script:
        before = {uuid: sorted(ids) for uuid, ids in history.state.index.on_gpu.items()}
        history.play(step)
        for node in history.state.nodes.values():
            for uuid, gpu in node.gpus.items():
                here = history.state.on_gpu(uuid)
                if not {r.replica_id for r in here} - set(before.get(uuid, [])):
                    continue  # Nothing was promised; what a node offers may have shrunk.
                fixed = sum(r.request_on(uuid) for r in here if not r.is_parkable)
                turns = [(r.request_on(uuid), r.residue_on(uuid)) for r in here if r.is_parkable]
                resting = sum(residue for _, residue in turns)
                largest = max((request - residue for request, residue in turns), default=0)
                assert fixed + resting + largest <= gpu.allocatable_bytes, (step, uuid)
                asked = sum(r.cpu_millicores for r in history.state.on_node(node.name) if r.holds_place)
                assert asked <= (node.cpu_millicores or 0)
                parked = sum(r.weights_bytes for r in history.state.on_node(node.name) if r.is_parkable)
                assert parked <= node.host_budget_bytes or not any(r.is_parkable for r in here)


@many
@given(script=scripts)
def test_every_deployment_ends_placed_or_explained(script: list[tuple[Any, ...]]) -> None:
    history = played(script)
    history.run_due()

    for deployment_id, deployment in history.state.deployments.items():
        lacks = history.state.index.lacking_count(deployment) > 0
        assert not lacks or deployment.problem, deployment_id
    assert not history.state.index.untold


@many
@given(script=scripts)
def test_of_a_gang_all_start_or_none(script: list[tuple[Any, ...]]) -> None:
    """Committed is only a gang whose every replica has its lease, on all nodes at once."""
    history = History()
    proposed: dict[str, set[str]] = {}
    for step in script:
        known = len(history.facts)
        leased_before = {gang_id: set(ids) for gang_id, ids in history.held.items()}
        history.play(step)
        for gang in history.state.gangs.values():
            ids = {replica_id for ids in gang.replica_ids.values() for replica_id in ids}
            proposed.setdefault(gang.gang_id, ids)
        for gang_id in history.committed:
            if gang_id in proposed:
                assert proposed[gang_id] == history.held.get(gang_id, set()), (known, leased_before)


@many
@given(script=scripts)
def test_equal_histories_lead_to_equal_decisions(script: list[tuple[Any, ...]]) -> None:
    assert played(script).facts == played(script).facts


@many
@given(script=scripts, more=st.lists(steps, min_size=4, max_size=12))
def test_a_restart_changes_no_decision(script: list[tuple[Any, ...]], more: list[tuple[Any, ...]]) -> None:
    """What is only remembered to be quick is lost at a restart, and nothing else: reasons may be told anew."""
    steady, restarted = played(script), played(script)
    steady.run_due()
    restarted.run_due()
    restarted.state.derived = None
    for step in more:
        steady.play(step)
        restarted.play(step)

    assert decisions(steady) == decisions(restarted)
    assert digest(without_reasons(steady.state)) == digest(without_reasons(restarted.state))


def decisions(history: History) -> list[Outcome]:
    return [fact for fact in history.facts if not isinstance(fact, PlacementFailed)]


def without_reasons(state: ClusterState) -> ClusterState:
    for deployment in state.deployments.values():
        deployment.problem = deployment.remedy = ""
        deployment.alternatives, deployment.constraints, deployment.codes = (), (), ()
    return state

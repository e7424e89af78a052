"""The invariants of the whole system, each as a sentence, over generated fleets, faults and histories.

A trial runs a plan in virtual time, then heals everything and lets it settle. `test_invariants_planted.py` shows that
these checks can fail.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from dataclasses import replace as changed
from functools import partial
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from kit.bus import Stored
from kit.service import Service
from kit.simulation import Faults
from schemas.catalogue import decode
from schemas.deployments import DeploymentSpec, PlacementSpec, SwapSpec, WorkloadKind
from schemas.inbox import ParkRequested, RetireRequested, WakeRequested
from schemas.messages import Fact
from schemas.nodes import (
    LeaseGranted,
    ParkAbandoned,
    ReplicaReady,
    ReplicaResident,
)
from schemas.placement import CommandFact, DeploymentAdmitted, DeploymentRetired
from schemas.swapper import ParkDecided, WakeDecided
from services.nodeagent.simulated_resizing import HostFaults
from services.nodeagent.state import NodeState
from services.nodeagent.transitions import Residency
from services.placement.state import ClusterState
from services.simulated import SimulatedSystem
from services.swapper.state import FleetState
from services.swarm.checks import Books
from services.swarm.gangs import Gangs
from services.swarm.plan import inference, training

RUN_S = 30.0
SETTLE_S = 90.0
quick = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[
        Phase.explicit,
        Phase.generate,
    ],  # A plan that fails is short enough to read; making it smaller takes minutes.
    suppress_health_check=[HealthCheck.too_slow],
)


@dataclass(frozen=True, slots=True)
class Step:
    at_s: float
    kind: str
    which: int
    lasts_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What a trial does; hypothesis makes it and makes it smaller."""

    seed: int
    node_count: int
    gpu_count: int
    models: tuple[DeploymentSpec, ...]
    steps: tuple[Step, ...]
    faults: Faults
    host_faults: HostFaults


def specs() -> st.SearchStrategy[DeploymentSpec]:
    """Shares that must take turns, with short windows; all of one priority but training, so that all get their turn."""
    swaps = st.fixed_dictionaries(
        {
            "warm_window_s": st.sampled_from([1.0, 5.0, 300.0]),
            "minimum_residency_s": st.sampled_from([0.0, 0.5, 3.0]),
            "cold_after_s": st.sampled_from([None, None, 5.0]),
            "is_parkable": st.sampled_from([True, True, True, False]),
        }
    )
    portion = st.sampled_from([0.05, 0.3, 0.5, 0.65, 0.9])
    is_training = st.sampled_from([False, False, False, True])
    spread = st.sampled_from([(1, 1, False), (1, 1, False), (1, 2, False), (1, 2, True), (2, 1, False), (2, 2, True)])
    return st.builds(_spec, portion, swaps, is_training, st.sampled_from([0.1, 3.0]), spread)


def _spec(
    portion: float, swap: dict[str, Any], is_training: bool, start_s: float, spread: tuple[int, int, bool]
) -> DeploymentSpec:
    """`spread`: GPUs of a replica, replicas, whether they are a gang."""
    gpu_count, replica_count, is_gang = spread
    made = (
        training("x", weights_gb=20, portion=portion) if is_training else inference("x", weights_gb=20, portion=portion)
    )
    engine = replace(made.engine, cold_start_s=start_s)
    return replace(
        made,
        engine=engine,
        swap=made.swap if is_training else SwapSpec(**swap),
        share=replace(made.share, gpu_count=gpu_count),
        replica_count=replica_count,
        placement=PlacementSpec(is_gang=is_gang),
    )


KINDS = (
    *(["request"] * 6),
    *(["storm"] * 3),
    *(["crash"] * 4),
    "all down",
    "silence",
    "kill engine",
    "park",
    "wake",
    "retire",
    "redeploy",
)


def plans() -> st.SearchStrategy[Plan]:
    steps = st.builds(
        Step, st.floats(0, RUN_S), st.sampled_from(KINDS), st.integers(0, 99), st.sampled_from([0.01, 0.5, 8.0])
    )
    chances = st.sampled_from([0.0, 0.1, 0.4])
    return st.builds(
        Plan,
        seed=st.integers(0, 10_000),
        node_count=st.sampled_from([1, 1, 2]),
        gpu_count=st.sampled_from([1, 2]),
        models=st.lists(specs(), min_size=2, max_size=6).map(tuple),
        steps=st.lists(steps, min_size=8, max_size=40).map(tuple),
        faults=st.builds(
            Faults,
            latency_s=st.sampled_from([0.0004, 0.05]),
            fleeting_lost_fraction=chances,
            fleeting_twice_fraction=chances,
            ack_lost_fraction=chances,
        ),
        host_faults=st.builds(
            HostFaults,
            start_fails_fraction=st.sampled_from([0.0, 0.1]),
            park_stays_fraction=chances,
            wake_fails_fraction=chances,
        ),
    )


@dataclass(slots=True)
class Conduct:
    """Rules about decisions, from facts alone: a decision is judged by what its writer had read."""

    node_facts: list[tuple[int, Fact]] = field(default_factory=list)
    specs: dict[str, DeploymentSpec] = field(default_factory=dict)
    heard_load_at_s: float = 0.0
    load_fresh_s: float = 3.0

    def hear(self, stored: Stored, fact: Fact) -> None:
        match fact:
            case LeaseGranted():
                self.specs.update({r.replica_id: r.deployment for r in fact.replicas})
            case ReplicaReady() | ReplicaResident() | ParkAbandoned():
                self.node_facts.append((stored.seq, fact))
            case WakeDecided():
                for victim_id in fact.victim_ids:
                    self._may_give_way(victim_id, fact, cursor_seq=stored.cursor_seq)
            case ParkDecided() if fact.reason.startswith("idle"):
                silent_s = fact.at_s - self.heard_load_at_s
                assert silent_s <= self.load_fresh_s, (
                    f"parked as idle after {silent_s:.1f} s without any sample: {fact}"
                )

    def _may_give_way(self, victim_id: str, wake: WakeDecided, *, cursor_seq: int) -> None:
        victim, comer = self.specs[victim_id], self.specs[wake.replica_id]
        assert victim.swap.is_parkable, f"{victim_id} may not be parked: {wake}"
        assert comer.kind is not WorkloadKind.TRAINING or wake.reason.startswith("asked"), f"training preempts: {wake}"
        if victim.kind is WorkloadKind.TRAINING and victim.priority_number < comer.priority_number:
            return
        stays_s = wake.at_s - self._resident_since_s(victim_id, cursor_seq)
        shortest_s = victim.swap.minimum_residency_s
        assert stays_s >= shortest_s, f"{victim_id} gave way after {stays_s:.2f} s of {shortest_s} s: {wake}"

    def _resident_since_s(self, replica_id: str, cursor_seq: int) -> float:
        found = 0.0
        for seq, fact in self.node_facts:
            names = [r.replica_id for r in fact.replicas] if isinstance(fact, ReplicaReady) else []
            if seq <= cursor_seq and replica_id in (getattr(fact, "replica_id", ""), *names):
                found = fact.at_s  # type: ignore[attr-defined]  # All three kinds have it.
        return found


class Trial:
    """A plan in progress; whatever breaks an invariant raises at that instant."""

    def __init__(self, plan: Plan, services: Mapping[str, Service[Any]] | None = None) -> None:
        self.plan = plan
        self.system = SimulatedSystem(
            seed=plan.seed,
            node_count=plan.node_count,
            gpu_count=plan.gpu_count,
            faults=plan.faults,
            host_faults=plan.host_faults,
            services=services,
        )
        self.books, self.conduct, self.gangs = Books(), Conduct(), Gangs()
        simulation = self.system.simulation
        for stored in simulation.stream:
            self._hear(stored, _fact_of(stored))
        simulation.on_stored.append(self._hear)
        simulation.on_signal.append(self._hear_signal)
        self._begun_at_s = self.conduct.heard_load_at_s = simulation.now_s
        self._silent_until_s = 0.0
        self._is_healed = False
        self._command_count = 0
        self.names = [f"m{number}" for number in range(len(plan.models))]
        for name, spec in zip(self.names, plan.models, strict=True):
            self._deploy(name, spec)

    def begin(self) -> None:
        """Put the plan's steps on the clock."""
        for step in self.plan.steps:
            self.system.simulation.at(self._begun_at_s + step.at_s, partial(self._do, step))

    def run(self) -> "Trial":
        simulation = self.system.simulation
        self.begin()
        self.system.run_for(RUN_S)
        simulation.faults, self._is_healed, self._silent_until_s = Faults(), True, 0.0
        for host in self.system.hosts.values():
            host.faults = HostFaults()
        self.system.run_for(SETTLE_S)
        self.gangs.check_ended(simulation.now_s)
        return self

    def _hear(self, stored: Stored, fact: Fact) -> None:
        self.books.hear(fact)
        self.gangs.hear(fact, stored)
        self.conduct.hear(stored, fact)
        for host in self.system.hosts.values():
            host.check()

    def _hear_signal(self, signal: Any) -> None:
        if type(signal).__name__ == "LoadSampled" and self.system.simulation.now_s >= self._silent_until_s:
            # On its way; whether it arrives is the network's affair. Late ones are at most half a second late.
            self.conduct.heard_load_at_s = self.system.simulation.now_s + 0.5

    def _deploy(self, name: str, spec: DeploymentSpec) -> None:

        self.system.deploy([replace(spec, name=name)])

    def _do(self, step: Step) -> None:
        system, name = self.system, self.names[step.which % len(self.names)]
        writers = list(system.simulation.members)
        match step.kind:
            case "request":
                self._request(name)
            case "storm":
                for each in self.names:
                    self._request(each)
            case "crash":
                system.simulation.crash(writers[step.which % len(writers)], down_s=step.lasts_s)
            case "all down":
                for writer in writers:
                    system.simulation.crash(writer, down_s=step.lasts_s)
            case "silence":
                self._be_silent(step.lasts_s)
            case "kill engine":
                for node, host in system.hosts.items():
                    for replica_id in sorted(host.engines)[step.which % 3 : step.which % 3 + 1]:
                        system.kill_engine(node, replica_id)
            case "redeploy":
                self._deploy(name, self._another(name, step.which))
            case _:
                kind = {"park": ParkRequested, "wake": WakeRequested, "retire": RetireRequested}[step.kind]
                self._command_count += 1
                system.command(kind(command_id=f"x{self._command_count}", model=name))

    def _another(self, name: str, which: int) -> DeploymentSpec:
        """Another wish of the same kind for this name; training gets no requests in its later life either."""
        kind = self.plan.models[self.names.index(name)].kind
        alike = [spec for spec in self.plan.models if spec.kind is kind]
        return alike[which % len(alike)]

    def _request(self, name: str) -> None:
        if self.plan.models[self.names.index(name)].kind is WorkloadKind.INFERENCE:
            self.system.clients.request(name)

    def _be_silent(self, lasts_s: float) -> None:
        """No signal and no order arrives for a while."""
        simulation = self.system.simulation
        simulation.faults = changed(self.plan.faults, fleeting_lost_fraction=1.0)
        self._silent_until_s = max(self._silent_until_s, simulation.now_s + lasts_s)
        simulation.at(self._silent_until_s, self._speak)

    def _speak(self) -> None:
        if self.system.simulation.now_s >= self._silent_until_s and not self._is_healed:
            self.system.simulation.faults = self.plan.faults

    # --- States at the end --------------------------------------------------------------------------------------------

    @property
    def placement(self) -> ClusterState:
        state = self.system.state("placement")
        assert isinstance(state, ClusterState), state
        return state

    @property
    def swapper(self) -> FleetState:
        state = self.system.state("swapper")
        assert isinstance(state, FleetState), state
        return state

    def node(self, node: str) -> NodeState:
        state = self.system.state(f"node.{node}")
        assert isinstance(state, NodeState), state
        return state

    def facts(self) -> list[Fact]:
        return [_fact_of(stored) for stored in self.system.simulation.stream]


def _fact_of(stored: Stored) -> Fact:
    fact = decode(stored.body)
    assert isinstance(fact, Fact), fact
    return fact


# --- Sentences --------------------------------------------------------------------------------------------------------


def assert_placed_explained_or_retired(trial: Trial) -> None:
    placement = trial.placement
    retired = {fact.deployment_id for fact in trial.facts() if isinstance(fact, DeploymentRetired)}
    for fact in trial.facts():
        if isinstance(fact, DeploymentAdmitted) and fact.deployment_id not in retired:
            deployment = placement.deployments[fact.deployment_id]
            is_placed = len(placement.replicas_of(fact.deployment_id)) == deployment.replica_count
            assert is_placed or deployment.problem, f"{deployment.spec.name} ended in silence"


def assert_all_requests_answered(trial: Trial) -> None:
    """Those to inference that is placed, not failed for good, and does not wait behind what never parks."""
    for request in trial.system.clients.requests:
        deployment = trial.placement.named("default", request.model)
        if request.served_at_s is not None or deployment is None or deployment.problem:
            continue
        replicas = trial.placement.replicas_of(deployment.deployment_id)
        if deployment.spec.kind is WorkloadKind.INFERENCE and all(r.state != "failed" for r in replicas):
            raise AssertionError(f"{request} was never answered; its replicas: {replicas}")


def assert_services_agree(trial: Trial) -> None:
    """After settling, placement, swapper, node agents and engines tell the same story."""
    truth = {name: (node, r) for node in trial.system.hosts for name, r in trial.node(node).replicas.items()}
    assert set(truth) == set(trial.placement.replicas)
    assert set(truth) == set(trial.swapper.replicas)
    for name, (node, replica) in truth.items():
        residency = replica.residency
        assert residency in {Residency.GRANTED, Residency.RESIDENT, Residency.PARKED, Residency.FAILED}, (
            name,
            residency,
        )
        told = (trial.placement.replicas[name].state, trial.swapper.replicas[name].tier.value)
        assert (residency.value, residency.value) == told, name
        known = (trial.placement.replicas[name].wake_epoch, trial.swapper.replicas[name].wake_epoch)
        assert (replica.wake_epoch, replica.wake_epoch) == known, name
        assert replica.residue_bytes == trial.swapper.replicas[name].residue_bytes, name
        assert replica.is_started == (name in trial.system.hosts[node].engines), name


def assert_one_fact_per_command(trial: Trial) -> None:
    named = {fact.inbox_seq for fact in trial.facts() if isinstance(fact, CommandFact)}
    answered = [reply.answer.inbox_seq for reply in trial.system.simulation.replies]
    everyone = {stored.seq for stored in trial.system.simulation.inbox}
    assert everyone == named
    assert len(answered) == len(set(answered)), "a command was answered twice"


@quick
@given(plan=plans())
def test_on_every_gpu_leases_and_reserve_never_exceed_its_capacity_and_engines_never_use_more(plan: Plan) -> None:
    """By an account from facts alone and by the hosts' own bytes, after every fact; so also: a restore starts only
    after its victims' bytes are free, a training start pushes nobody aside, everybody stays for the minimum residency.
    """
    Trial(plan).run()


@quick
@given(plan=plans())
def test_every_admitted_deployment_ends_placed_explained_or_retired(plan: Plan) -> None:
    assert_placed_explained_or_retired(Trial(plan).run())


@quick
@given(plan=plans())
def test_every_request_is_answered_after_healing(plan: Plan) -> None:
    assert_all_requests_answered(Trial(plan).run())


@quick
@given(plan=plans())
def test_after_healing_all_services_tell_the_same_story(plan: Plan) -> None:
    assert_services_agree(Trial(plan).run())


@quick
@given(plan=plans())
def test_every_command_leads_to_exactly_one_fact_and_at_most_one_answer(plan: Plan) -> None:
    assert_one_fact_per_command(Trial(plan).run())


@quick
@given(plan=plans())
def test_replay_equals_what_happened_live_whoever_died_in_between(plan: Plan) -> None:
    Trial(plan).run().system.check()


@settings(quick, max_examples=5)
@given(plan=plans())
def test_the_same_seed_gives_the_same_trace(plan: Plan) -> None:
    hashes = {Trial(plan).run().system.simulation.trace_hash() for _ in range(2)}

    assert 1 == len(hashes)


def test_models_of_a_gpu_that_vanished_are_placed_elsewhere_and_its_agent_goes_on() -> None:
    system = SimulatedSystem(seed=1, gpu_count=2)
    system.deploy([replace(inference("x", weights_gb=10, portion=0.6), name=name) for name in ("a", "b")])
    system.run_for(10.0)
    host = system.hosts["node-0"]
    host.gpus = host.gpus[1:]
    system.simulation.crash("node.node-0", down_s=1.0)

    system.run_for(20.0)

    placement = system.state("placement")
    assert isinstance(placement, ClusterState), placement
    assert {"GPU-node-0-1"} == {uuid for replica in placement.replicas.values() for uuid in replica.gpu_uuids}
    assert {"a", "b"} == {placement.deployments[r.deployment_id].spec.name for r in placement.replicas.values()}
    system.check()

"""Whatever happens, in whatever order: no request is lost, none is answered twice, none goes where it may not."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.gateways import LoadSampled, ModelWanted
from schemas.holders import RouteLease
from schemas.messages import Fact
from services.gateway.actions import Action, Bounce, Dispatch, Publish, Refuse
from services.gateway.core import Gateway
from services.gateway.settings import GatewaySettings
from tests.unit.gateway import fleet

MODELS = ("a", "b")
REPLICAS = {"a": ("a1", "a2"), "b": ("b1",)}
OWNER = {replica: model for model, replicas in REPLICAS.items() for replica in replicas}
NODE_OF = {"a1": "n", "a2": "m", "b1": "n"}
EVENTS = ("starting", "ready", "draining", "parked", "waking", "resident", "failed", "failed_finally", "released")

models = st.sampled_from(MODELS)
replicas = st.sampled_from(sorted(OWNER))
steps = st.one_of(
    st.tuples(st.just("arrive"), models, st.sampled_from((None, 0.5, 100.0)), st.integers(1, 40)),
    st.tuples(st.just("fact"), replicas, st.sampled_from(EVENTS)),
    st.tuples(st.just("lease"), st.sampled_from(("n", "m")), st.sets(replicas), st.sampled_from((0.2, 1.0, 50.0))),
    st.tuples(st.just("pass"), st.sampled_from((0.01, 0.1, 0.3, 2.0, 20.0))),
    st.tuples(st.just("first_byte"), st.integers(0, 50)),
    st.tuples(st.just("finish"), st.integers(0, 50)),
    st.tuples(st.just("bounce"), st.integers(0, 50), st.sampled_from(Bounce)),
    st.tuples(st.just("leave"), st.integers(0, 50)),
    st.tuples(st.just("retire"), models),
    st.tuples(st.just("admit"), models),
    st.tuples(st.just("reconnected")),
    st.tuples(st.just("reread")),
)


@dataclass
class World:
    """A stand-in for shell, clients, engines and holders; it knows what must hold and nothing of how."""

    core: Gateway = field(
        default_factory=lambda: Gateway(
            GatewaySettings(
                hold_count_per_model_max=3, hold_count_max=4, hold_bytes_per_model_max=60, hold_bytes_max=80,
                ramp_first_count=1, sample_every_s=1.0,
            ),
            gateway_id="g",
            now_s=fleet.T0,
        )
    )  # fmt: skip
    now_s: float = fleet.T0
    arrived: list[str] = field(default_factory=list)
    running: dict[str, str] = field(default_factory=dict)
    over: dict[str, str] = field(default_factory=dict)
    open_until: dict[str, tuple[set[str], float]] = field(default_factory=dict)
    version: int = 0
    wanted_s: dict[tuple[str, str, int], float] = field(default_factory=dict)
    told_arrivals: int = 0
    model_of: dict[str, str] = field(default_factory=dict)

    def apply(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Dispatch():
                    assert action.request_id not in self.over, "an answered request was sent again"
                    assert action.request_id not in self.running, "a running request was sent again"
                    open_ids, until_s = self.open_until[NODE_OF[action.replica_id]]
                    assert action.replica_id in open_ids, "sent to a replica that its holder does not list as open"
                    assert self.now_s < until_s, "sent under a lease that has ended"
                    assert action.endpoint
                    assert OWNER[action.replica_id] == self.model_of[action.request_id]
                    self.running[action.request_id] = action.replica_id
                case Refuse():
                    assert action.request_id not in self.over, "a request got two answers"
                    assert action.request_id not in self.running, "a running request was refused"
                    assert action.refusal.code
                    self.over[action.request_id] = action.refusal.code
                case Publish(signal=ModelWanted() as wanted):
                    self.note_wanted(wanted)
                case Publish(signal=LoadSampled() as sample):
                    self.told_arrivals += sum(load.arrived_count for load in sample.models)

    def note_wanted(self, wanted: ModelWanted) -> None:
        key = (wanted.deployment_id, wanted.replica_id, wanted.wake_epoch)
        assert wanted.waiting_count >= 1
        self.wanted_s[key] = self.now_s

    def tell(self, fact: Fact) -> None:
        self.apply(self.core.fact(fact, now_s=self.now_s))

    def pass_time(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        while (due_s := self.core.next_due_s()) is not None and due_s <= end_s:
            self.now_s = max(self.now_s, due_s)
            self.apply(self.core.tick(now_s=self.now_s))
        self.now_s = end_s

    def arrive(self, model: str, patience_s: float | None, size: int) -> None:
        request_id = f"q{len(self.arrived)}"
        self.arrived.append(request_id)
        self.model_of[request_id] = model
        self.apply(
            self.core.arrive(
                request_id, tenant="acme", model=model, body_bytes=size, patience_s=patience_s, now_s=self.now_s
            )
        )

    def lease(self, node: str, open_ids: set[str], term_s: float) -> None:
        self.version += 1
        mine = {replica for replica in open_ids if NODE_OF[replica] == node}
        self.open_until[node] = (mine, self.now_s + term_s)
        lease = RouteLease(version=self.version, open_ids=tuple(sorted(mine)), closed_ids=(), term_s=term_s)
        self.apply(self.core.lease(node, lease, sent_s=self.now_s, now_s=self.now_s))

    def finish(self, request_id: str) -> None:
        if self.running.pop(request_id, None) is not None:
            self.over[request_id] = "answered"
        self.apply(self.core.finished(request_id, now_s=self.now_s))

    def step(self, step: tuple[object, ...]) -> None:
        match step:
            case ("arrive", str(model), None | float() as patience_s, int(size)):
                self.arrive(model, patience_s, size)
            case ("fact", str(replica), str(event)):
                self.tell(fact_of(event, replica))
            case ("lease", str(node), set() as open_ids, float(term_s)):
                self.lease(node, open_ids, term_s)
            case ("pass", float(seconds)):
                self.pass_time(seconds)
            case ("first_byte", int(index)) if self.running:
                self.apply(self.core.first_byte(self.pick(index), now_s=self.now_s))
            case ("finish", int(index)) if self.running:
                self.finish(self.pick(index))
            case ("bounce", int(index), Bounce() as why) if self.running:
                request_id = self.pick(index)
                replica = self.running.pop(request_id)
                self.apply(self.core.bounced(request_id, replica, why, now_s=self.now_s))
            case ("leave", int(index)) if self.core.requests:
                request_id = sorted(self.core.requests)[index % len(self.core.requests)]
                self.running.pop(request_id, None)
                self.over[request_id] = "left"
                self.apply(self.core.finished(request_id, now_s=self.now_s))
            case ("retire", str(model)):
                self.tell(fleet.retired(model))
            case ("admit", str(model)):
                self.admit(model)
            case ("reconnected",):
                self.apply(self.core.reconnected(now_s=self.now_s))
            case ("reread",):
                self.apply(self.core.replace_routes(self.core.routes, now_s=self.now_s))

    def pick(self, index: int) -> str:
        return sorted(self.running)[index % len(self.running)]

    def admit(self, model: str) -> None:
        self.tell(fleet.admitted(model))
        for replica in REPLICAS[model]:
            self.tell(fleet.proposed(model, replica, node=NODE_OF[replica]))

    def check(self) -> None:
        """What must hold after every step."""
        core = self.core
        assert set(core.requests) == set(self.arrived) - set(self.over), "accepted requests are neither here nor over"
        held = [hold.waiting for hold in core.holds.holds.values()]
        assert core.holds.count == sum(map(len, held))
        assert core.holds.byte_count == sum(request.body_bytes for hold in held for request in hold.values())
        assert {key for key, request in core.requests.items() if not request.replica_id} == {k for h in held for k in h}
        by_replica: dict[str, int] = {}
        for replica in self.running.values():
            by_replica[replica] = by_replica.get(replica, 0) + 1
        assert core.loads.by_replica == by_replica
        assert sum(load.in_flight_count for load in core.loads.models.values()) == len(self.running)
        for hold in core.holds.busy():
            self.check_hold(hold.deployment_id)

    def check_hold(self, deployment_id: str) -> None:
        """A held request's model is asked for, or being released, or its request would have been refused."""
        deployment = self.core.routes.deployments[deployment_id]
        hold = self.core.holds.holds[deployment_id]
        routable = any(self.core.routes.is_routable(r, self.now_s) for r in deployment.replicas.values())
        replica_id, epoch = self.core.routes.wanted(deployment, self.now_s)
        asked_s = self.wanted_s.get((deployment_id, replica_id, epoch))
        is_asked = asked_s is not None and self.now_s - asked_s <= 0.25 + 1e-9
        assert routable or hold.unanswered_ids or is_asked, "nobody was told that requests wait"


def fact_of(event: str, replica: str) -> Fact:
    model, node = OWNER[replica], NODE_OF[replica]
    match event:
        case "ready":
            return fleet.ready(model, replica, node=node)
        case "failed_finally":
            return fleet.failed(model, replica, node=node, is_final=True)
        case "released":
            return fleet.released(replica, node=node)
    make = {
        "starting": fleet.starting, "draining": fleet.draining, "parked": fleet.parked, "waking": fleet.waking,
        "resident": fleet.resident, "failed": fleet.failed,
    }[event]  # fmt: skip
    return make(model, replica, node=node)


@settings(max_examples=300)
@given(st.lists(steps, max_size=60))
def test_every_accepted_request_ends_answered_or_with_one_typed_error(story: list[tuple[object, ...]]) -> None:
    world = World()
    for model in MODELS:
        world.admit(model)

    for step in story:
        world.step(step)
        world.check()
    # Faults end; engines answer what they have; deadlines pass.
    for request_id in sorted(world.running):
        world.finish(request_id)
    world.pass_time(40.0)
    for request_id in sorted(world.running):
        world.finish(request_id)
    world.pass_time(40.0)

    assert set(world.arrived) == set(world.over)
    assert {} == world.core.requests
    assert (0, 0) == (world.core.holds.count, world.core.holds.byte_count)
    assert {} == world.core.loads.by_replica


@settings(max_examples=100)
@given(st.lists(steps, max_size=40))
def test_equal_stories_give_equal_decisions(story: list[tuple[object, ...]]) -> None:
    worlds = World(), World()
    for world in worlds:
        for step in story:
            world.step(step)

    assert worlds[0].over == worlds[1].over
    assert worlds[0].running == worlds[1].running
    assert worlds[0].wanted_s == worlds[1].wanted_s


@settings(max_examples=100)
@given(st.lists(steps, max_size=40))
def test_every_arrival_at_a_known_model_is_told_exactly_once(story: list[tuple[object, ...]]) -> None:
    kept = [step for step in story if step[0] != "retire"]
    world = World()
    for model in MODELS:
        world.admit(model)
    for step in kept:
        world.step(step)
    world.pass_time(1.0)

    assert len(world.arrived) == world.told_arrivals

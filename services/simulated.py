"""The whole system in virtual time: every service, simulated hosts, and clients that want models. One seed, one run."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from kit.bus import Stored
from kit.service import Service
from kit.simulation import Faults, Simulation
from kit.simulation_members import Member
from schemas.deployments import DeploymentSpec
from schemas.gateways import LoadSampled, ModelLoad, ModelWanted
from schemas.inbox import DeployRequested
from schemas.messages import Command, Fact
from schemas.nodes import (
    GpuOffer,
    LeaseGranted,
    LeaseReleased,
    ParkAbandoned,
    ReplicaDraining,
    ReplicaFailed,
    ReplicaParked,
    ReplicaReady,
    ReplicaResident,
    ReplicaSuspect,
)
from schemas.placement import DeploymentAdmitted, DeploymentRetired
from schemas.units import GiB
from services.autoscaler.core import SERVICE as AUTOSCALER
from services.autoscaler.settings import AutoscalerSettings
from services.gateway.settings import GatewaySettings
from services.gateway.simulated import Ask, SimulatedGateway, gateway
from services.holder.simulated import SimulatedRoutes
from services.nodeagent import health as _health  # noqa: F401  # Registers its handlers.
from services.nodeagent import leases as _leases  # noqa: F401
from services.nodeagent import residency as _residency  # noqa: F401
from services.nodeagent import shares as _shares  # noqa: F401
from services.nodeagent import suspicion as _suspicion  # noqa: F401
from services.nodeagent.core import SERVICE as NODEAGENT
from services.nodeagent.settings import NodeAgentSettings
from services.nodeagent.simulated import SimulatedHost
from services.nodeagent.simulated_engine import Caller, Engine
from services.nodeagent.simulated_gpus import h100
from services.nodeagent.simulated_resizing import HostFaults
from services.nodeagent.state import NodeState
from services.placement import commands as _commands  # noqa: F401
from services.placement.core import SERVICE as PLACEMENT
from services.placement.settings import PlacementSettings
from services.swapper.core import SERVICE as SWAPPER
from services.swapper.settings import SwapperSettings

REPEAT_S: Final = 0.25
SAMPLE_S: Final = 1.0
TENANT: Final = "default"


@dataclass(slots=True)
class _Replica:
    wake_epoch: int = 0
    is_resident: bool = False


@dataclass(slots=True)
class _Known:
    deployment_id: str
    replicas: dict[str, _Replica] = field(default_factory=dict)
    """{replica_id: what is known of it}, the one last heard of comes last: it is the one that is asked for."""

    @property
    def is_resident(self) -> bool:
        return any(replica.is_resident for replica in self.replicas.values())


@dataclass(slots=True)
class Request:
    """One request of a simulated client."""

    model: str
    arrived_s: float
    served_at_s: float | None = None


@dataclass(slots=True)
class SimulatedClients:
    """Stands where gateways stand: holds requests, wants models, tells the load. A stand-in, not the gateway's core."""

    simulation: Simulation
    service_s: float = 0.5
    known: dict[str, _Known] = field(default_factory=dict)
    waiting: dict[str, list[Request]] = field(default_factory=dict)
    in_flight: dict[str, int] = field(default_factory=dict)
    last_arrival_s: dict[str, float] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)

    def start(self) -> None:
        self.simulation.on_stored.append(self.follow)
        self._sample()

    def request(self, model: str) -> None:
        request = Request(model=model, arrived_s=self.simulation.now_s)
        self.requests.append(request)
        self.last_arrival_s[model] = request.arrived_s
        self.waiting.setdefault(model, []).append(request)
        self._serve(model)
        if self.waiting[model]:
            self._want(model)

    def follow(self, stored: Stored, fact: Fact) -> None:
        match fact:
            case DeploymentAdmitted():
                self.known[fact.deployment.name] = _Known(deployment_id=fact.deployment_id)
            case DeploymentRetired():
                if self.known.get(fact.model, _Known("")).deployment_id == fact.deployment_id:
                    del self.known[fact.model]
            case LeaseReleased():
                for known in self.known.values():
                    known.replicas.pop(fact.replica_id, None)
            case _:
                self._follow_replica(fact)

    def _follow_replica(self, fact: Fact) -> None:
        match fact:
            case LeaseGranted():
                for replica in fact.replicas:
                    self._update(replica.deployment_id, replica.replica_id, wake_epoch=1)
            case ReplicaReady():
                for ready in fact.replicas:
                    self._update(ready.deployment_id, ready.replica_id, wake_epoch=ready.wake_epoch, is_resident=True)
            case ReplicaResident() | ParkAbandoned():
                self._update(fact.deployment_id, fact.replica_id, wake_epoch=fact.wake_epoch, is_resident=True)
            case ReplicaDraining() | ReplicaSuspect():
                self._update(fact.deployment_id, fact.replica_id)
            case ReplicaParked() | ReplicaFailed():
                self._update(fact.deployment_id, fact.replica_id, wake_epoch=fact.wake_epoch)

    def _update(
        self, deployment_id: str, replica_id: str, *, wake_epoch: int | None = None, is_resident: bool = False
    ) -> None:
        for model, known in self.known.items():
            if known.deployment_id == deployment_id:
                replica = known.replicas.pop(replica_id, _Replica())
                replica.wake_epoch = replica.wake_epoch if wake_epoch is None else wake_epoch
                replica.is_resident = is_resident
                known.replicas[replica_id] = replica
                self._serve(model)

    def _serve(self, model: str) -> None:
        known = self.known.get(model)
        if known is None or not known.is_resident:
            return
        for request in self.waiting.pop(model, []):
            request.served_at_s = self.simulation.now_s
            self.in_flight[model] = self.in_flight.get(model, 0) + 1
            self.simulation.after(self.service_s, lambda: self._end(model))
        self.waiting.setdefault(model, [])

    def _end(self, model: str) -> None:
        self.in_flight[model] -= 1

    def _want(self, model: str) -> None:
        waiting = self.waiting.get(model)
        if not waiting:
            return
        known = self.known.get(model)
        if known is not None and not known.is_resident:
            replica_id = next(reversed(known.replicas), "")
            wanted = ModelWanted(
                gateway="clients",
                deployment_id=known.deployment_id,
                model=model,
                replica_id=replica_id,
                wake_epoch=known.replicas[replica_id].wake_epoch if replica_id else 0,
                waiting_count=len(waiting),
                oldest_wait_s=self.simulation.now_s - waiting[0].arrived_s,
            )
            self.simulation.fleeting(wanted)
        self.simulation.after(REPEAT_S, lambda: self._want(model))

    def _sample(self) -> None:
        models = tuple(
            ModelLoad(
                deployment_id=known.deployment_id,
                in_flight_count=self.in_flight.get(model, 0),
                waiting_count=len(self.waiting.get(model, [])),
                arrived_count=0,
                last_arrival_s=self.last_arrival_s.get(model, 0.0),
            )
            for model, known in self.known.items()
        )
        self.simulation.fleeting(LoadSampled(gateway="clients", models=models))
        self.simulation.after(SAMPLE_S, self._sample)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What runs beside the hosts, and how often it looks."""

    gateway_count: int = 0
    """0: the stand-in clients want models, without a gateway's core."""
    has_standbys: bool = False
    """A second instance of placement, swapper and autoscaler each."""
    route_term_s: float = 1.0
    alive_s: float = 0.0
    """How often node agents say that they are there. 0: never, so that no node is lost by its silence; each time is a
    delivery more for each placement."""
    burst_tick_s: float = 0.0
    """How often node agents share out what no lease claims. 0: never, so that every grant is its request."""
    has_checkpoint: bool = False
    """Whether the nodes' drivers can take a process as it is."""
    placement: PlacementSettings = field(default_factory=PlacementSettings)
    gateway: GatewaySettings = field(default_factory=GatewaySettings)
    swapper: SwapperSettings = field(default_factory=SwapperSettings)
    autoscaler: AutoscalerSettings = field(default_factory=AutoscalerSettings)


@dataclass(slots=True)
class _Node:
    """A host and its holder, as gateways reach them."""

    host: SimulatedHost
    holder: SimulatedRoutes

    @property
    def is_up(self) -> bool:
        return self.host.is_up

    def serve(self, replica_id: str, caller: Caller, *, takes_s: float) -> None:
        self.host.serve(replica_id, caller, takes_s=takes_s)

    def leave(self, replica_id: str, caller: Caller) -> None:
        self.host.leave(replica_id, caller)


class SimulatedSystem:
    """Placement, swapper, autoscaler, node agents with their hosts, and gateways or clients that stand for them."""

    def __init__(
        self,
        *,
        seed: int,
        node_count: int = 1,
        gpu_count: int = 2,
        faults: Faults | None = None,
        host_faults: HostFaults | None = None,
        host_budget_bytes: int = 4096 * GiB,
        swapper: SwapperSettings | None = None,
        services: Mapping[str, Service[Any]] | None = None,
        shape: Shape | None = None,
        listen: Callable[[Stored, Fact], None] | None = None,
    ) -> None:
        """`services`: others to run in place of the real ones, by name; tests plant faults that checks must find.

        `listen` hears every fact from the first one on.
        """
        run: dict[str, Service[Any]] = {s.name: s for s in (PLACEMENT, SWAPPER, AUTOSCALER, NODEAGENT)}
        run.update(services or {})
        self.simulation = Simulation(seed=seed, faults=faults)
        if listen is not None:
            self.simulation.on_stored.append(listen)
        self.shape = shape or Shape()
        self.hosts: dict[str, SimulatedHost] = {}
        self.nodes: dict[str, _Node] = {}
        self.gateways: list[SimulatedGateway] = []
        self.asks: list[Ask] = []
        self.clients = SimulatedClients(self.simulation)
        self.random = random.Random(f"{seed}/system")  # Reproducible by design.
        self._command_count = 0
        settings = {
            "placement": self.shape.placement,
            "swapper": swapper or self.shape.swapper,
            "autoscaler": self.shape.autoscaler,
        }
        for is_standby in (False, True) if self.shape.has_standbys else (False,):
            for writer, its in settings.items():
                self.simulation.add(run[writer], its, writer=writer, is_standby=is_standby)
        for number in range(node_count):
            self._add_node(
                f"node-{number}",
                run["nodeagent"],
                gpu_count=gpu_count,
                budget_bytes=host_budget_bytes,
                faults=host_faults,
            )
        if self.shape.gateway_count:
            for number in range(self.shape.gateway_count):
                self.gateways.append(gateway(self.simulation, f"gw{number}", self.nodes, self.shape.gateway))
        else:
            self.clients.start()
        self.simulation.run_for(1.0)

    def _add_node(
        self, node: str, agent: Service[Any], *, gpu_count: int, budget_bytes: int, faults: HostFaults | None
    ) -> None:
        simulation = self.simulation
        routes = SimulatedRoutes(simulation, term_s=self.shape.route_term_s)
        host = SimulatedHost(
            simulation,
            node=node,
            gpus=tuple(h100(index, node=node, has_checkpoint=self.shape.has_checkpoint) for index in range(gpu_count)),
            host_budget_bytes=budget_bytes,
            seed=simulation.seed,
            faults=faults,
            routes=routes if self.shape.gateway_count else None,
        )
        self.hosts[node] = host
        self.nodes[node] = _Node(host, routes)
        writer = f"node.{node}"
        settings = NodeAgentSettings(
            node=node, alive_s=self.shape.alive_s, burst_tick_s=self.shape.burst_tick_s, demand_s=0.0
        )
        member = simulation.add(agent, settings, writer=writer, world=host, is_journaled=True)
        host.agent_life = lambda: member.life
        host.eyes.report = lambda seen: simulation.tell(writer, seen)
        host.eyes.offered = lambda: _offered_by(member)

        def held_by(engine: Engine) -> Mapping[str, int] | None:
            state = member.processor.state if member.is_active and member.processor is not None else None
            replica = state.replicas.get(engine.replica.replica_id) if isinstance(state, NodeState) else None
            is_same = replica is not None and replica.lease_epoch == engine.lease_epoch
            return replica.held_bytes if replica is not None and is_same else None

        host.held_by = held_by

    def command(self, command: Command, *, tenant: str = TENANT) -> None:
        self.simulation.command(tenant, command)

    def deploy(self, specs: Sequence[DeploymentSpec], *, tenant: str = TENANT) -> None:
        for spec in specs:
            self._command_count += 1
            self.command(DeployRequested(command_id=f"c{self._command_count}", deployment=spec), tenant=tenant)

    def run_for(self, duration_s: float) -> None:
        self.simulation.run_for(duration_s)

    def state(self, writer: str) -> object:
        """A service's live state."""
        processor = self.simulation.active(writer).processor
        assert processor is not None, writer
        return processor.state

    def kill_engine(self, node: str, replica_id: str) -> None:
        """An engine dies; a living agent hears of it, a dead one finds out on its return."""
        lost = self.hosts[node].kill_engine(replica_id)
        if lost is not None:
            self.simulation.tell(f"node.{node}", lost)

    def ask(self, model: str, *, gateway: int, takes_s: float, patience_s: float | None = None) -> Ask:
        """A client's request to one of the gateways."""
        chosen = self.gateways[gateway % len(self.gateways)]
        ask = Ask(model=model, gateway=chosen.name, arrived_s=self.simulation.now_s, takes_s=takes_s)
        self.asks.append(ask)
        chosen.ask(ask, tenant=TENANT, patience_s=patience_s)
        return ask

    def lose_power(self, node: str, *, lasts_s: float) -> None:
        """A host goes down with its agent, its holder and its engines, and comes back."""
        host, member = self.hosts[node], self.simulation.members[f"node.{node}"]
        if not host.is_up:
            return
        host.lose_power()
        member.has_power = member.is_waiting_for_bus = False
        if member.is_alive:
            self.simulation.end_life(member)

        def back() -> None:
            host.is_up = member.has_power = True
            self.simulation.come_back(member)

        self.simulation.after(lasts_s, back)

    def strike_gpu(self, node: str, index: int, *, code: int, which: int = 0) -> None:
        """An XID, with what it does to engines."""
        for replica_id in self.hosts[node].eyes.strike(index, code, which):
            self.kill_engine(node, replica_id)

    def lose_gpu(self, node: str, index: int) -> None:
        for lost in self.hosts[node].lose_gpu(index):
            self.simulation.tell(f"node.{node}", lost)

    def check(self) -> None:
        """What must hold at any instant, and that history explains every state."""
        for member in self.simulation.members.values():
            if member.processor is not None:
                member.service.check_invariants(member.processor.state)
        for host in self.hosts.values():
            host.check()
        self.simulation.check_replay()


def _offered_by(member: Member) -> Mapping[str, GpuOffer] | None:
    """The GPUs that an agent offers; None while it is not there, or was not told of its node."""
    state = member.processor.state if member.is_active and member.processor is not None else None
    return dict(state.gpus) if state is not None and state.joined is not None else None

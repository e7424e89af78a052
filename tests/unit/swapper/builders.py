"""A swapper's core with its state, for tests: facts of nodes and signals go in, orders and decisions come out."""

from typing import Any

from kit.outcomes import Context, Outcome, Timer, Under
from schemas.catalogue import decode, encode
from schemas.deployments import (
    DeploymentSpec,
    EngineKind,
    EngineSpec,
    IsolationGrade,
    ShareSpec,
    SwapSpec,
    WorkloadKind,
)
from schemas.gateways import LoadSampled, ModelLoad, ModelWanted
from schemas.messages import Fact
from schemas.nodes import (
    GpuOffer,
    Lease,
    LeaseGranted,
    LeaseReleased,
    NodeJoined,
    ParkAbandoned,
    Ready,
    ReplicaDraining,
    ReplicaFailed,
    ReplicaParked,
    ReplicaReady,
    ReplicaResident,
    ReplicaStarting,
    ReplicaWaking,
    WakeRefused,
)
from schemas.orders import ParkOrdered, WakeOrdered
from schemas.placement import ReplicaProposal, ShareProposal
from schemas.swapper import DecisionClosed, ParkDecided, WakeDecided
from schemas.units import GiB
from services.swapper.core import SERVICE, Tick
from services.swapper.settings import SwapperSettings
from services.swapper.state import FleetState

NODE = "node-0"
GPU = "gpu-0"
WRITER_EPOCH = 7


class Swapper:
    """GPUs of 80 GiB to give, one by default; parked replicas leave 1 GiB. Time stands still unless a test moves it."""

    def __init__(self, settings: SwapperSettings | None = None, *, gpu_count: int = 1) -> None:
        self.state: FleetState = SERVICE.new_state(settings or SwapperSettings())
        self.now_s = 1000.0
        offers = tuple(
            GpuOffer(
                gpu_uuid=f"gpu-{index}",
                index=index,
                name="H100",
                capacity_bytes=82 * GiB,
                reserve_bytes=2 * GiB,
                grade=IsolationGrade.DRIVER,
                grade_reason="as the test says",
                link_bytes_per_s=50e9,
                is_software=True,
            )
            for index in range(gpu_count)
        )
        self.handle(
            NodeJoined(
                node=NODE,
                at_s=self.now_s,
                machine_id="m",
                gpus=offers,
                host_budget_bytes=1000 * GiB,
                holder_url="",
                label="software GPU",
            )
        )

    def handle(self, item: Any, *, traceparent: str = "") -> list[Outcome]:
        """What the core decides about a fact, a signal or a tick; its own facts are folded as the shell folds them."""
        if isinstance(item, Fact):
            SERVICE.evolve(self.state, item)
        observe = SERVICE.observers.get(type(item))
        if observe is not None:
            observe(self.state, item, self.now_s)
        handler = SERVICE.handlers.get(type(item))
        outcomes = [] if handler is None else list(handler(self.state, item, self.context(traceparent)))
        self.fold(outcomes)
        SERVICE.check_invariants(self.state)
        return outcomes

    def fold(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            plain = outcome.outcome if isinstance(outcome, Under) else outcome
            if isinstance(plain, Fact):
                fact = decode(encode(plain))
                assert isinstance(fact, Fact)
                SERVICE.evolve(self.state, fact)

    def context(self, traceparent: str = "") -> Context:
        return Context(now_s=self.now_s, writer_epoch=WRITER_EPOCH, traceparent=traceparent)

    def tick(self, after_s: float = 0.0) -> list[Outcome]:
        """What a tick decides, without the next tick's timer."""
        self.now_s += after_s
        return [outcome for outcome in self.handle(Tick()) if not isinstance(outcome, Timer)]

    # --- Ways to come to a tier ---------------------------------------------------------------------------------------

    def granted(
        self,
        name: str,
        gib: int,
        *,
        priority: str | None = None,
        is_training: bool = False,
        is_parkable: bool = True,
        warm_window_s: float = 300.0,
        minimum_residency_s: float = 0.5,
        gpu_uuids: tuple[str, ...] = (GPU,),
        gang_id: str = "",
    ) -> None:
        """`gib` is of each of its GPUs."""
        spec = DeploymentSpec(
            name=name,
            kind=WorkloadKind.TRAINING if is_training else WorkloadKind.INFERENCE,
            engine=EngineSpec(
                kind=EngineKind.TRAINING if is_training else EngineKind.SIMULATED, weights_bytes=10 * GiB
            ),
            share=ShareSpec(request_bytes=gib * GiB),
            priority=priority,
            swap=SwapSpec(
                is_parkable=is_parkable, warm_window_s=warm_window_s, minimum_residency_s=minimum_residency_s
            ),
        )
        shares = tuple(
            ShareProposal(
                replica_id=name, shard_index=index, gpu_uuid=uuid, request_bytes=gib * GiB, limit_bytes=gib * GiB
            )
            for index, uuid in enumerate(gpu_uuids)
        )
        leases = tuple(
            Lease(
                replica_id=name,
                shard_index=share.shard_index,
                gpu_uuid=share.gpu_uuid,
                request_bytes=gib * GiB,
                granted_bytes=gib * GiB,
                limit_bytes=gib * GiB,
                residue_bytes=GiB,
                lease_epoch=1,
            )
            for share in shares
        )
        proposal = ReplicaProposal(
            replica_id=name, deployment_id=f"d-{name}", tenant="default", deployment=spec, shares=shares
        )
        granted = LeaseGranted(
            node=NODE,
            at_s=self.now_s,
            proposal_id=f"p-{name}",
            leases=leases,
            replicas=(proposal,),
            gang_id=gang_id,
        )
        self.handle(granted)

    def resident(self, name: str, gib: int, **values: Any) -> None:
        self.granted(name, gib, **values)
        self.handle(self.ready(name))

    def parked(self, name: str, gib: int, **values: Any) -> None:
        self.resident(name, gib, **values)
        self.fact_only(self.has_parked(name))

    def fact_only(self, fact: Fact) -> None:
        """Fold it without asking what to do about it."""
        SERVICE.evolve(self.state, fact)

    # --- Facts of the node --------------------------------------------------------------------------------------------

    def _names(self, name: str) -> dict[str, Any]:
        return {"node": NODE, "at_s": self.now_s, "replica_id": name, "deployment_id": f"d-{name}", "model": name}

    def epoch(self, name: str) -> int:
        return self.state.replicas[name].wake_epoch

    def starting(self, name: str) -> ReplicaStarting:
        return ReplicaStarting(**self._names(name), wake_epoch=self.epoch(name))

    def ready(self, name: str) -> ReplicaReady:
        ready = Ready(
            replica_id=name,
            deployment_id=f"d-{name}",
            model=name,
            endpoint=f"http://{name}",
            wake_epoch=self.epoch(name),
            start_s=1.0,
            enforced_bytes=GiB,
        )
        return ReplicaReady(node=NODE, at_s=self.now_s, replicas=(ready,))

    def draining(self, name: str) -> ReplicaDraining:
        return ReplicaDraining(**self._names(name), reason="room")

    def has_parked(self, name: str) -> ReplicaParked:
        return ReplicaParked(
            **self._names(name),
            wake_epoch=self.epoch(name) + 1,
            residue_bytes=GiB * len(self.state.replicas[name].share_bytes),
            host_bytes=10 * GiB,
            copied_bytes=0,
            park_s=0.1,
            drain_s=0.1,
            reason="room",
        )

    def stayed(self, name: str) -> ParkAbandoned:
        return ParkAbandoned(**self._names(name), wake_epoch=self.epoch(name), reason="busy")

    def waking(self, name: str, *, is_reserved: bool = False) -> ReplicaWaking:
        return ReplicaWaking(**self._names(name), wake_epoch=self.epoch(name), is_reserved=is_reserved)

    def woken(self, name: str) -> ReplicaResident:
        return ReplicaResident(
            **self._names(name),
            wake_epoch=self.epoch(name),
            endpoint=f"http://{name}",
            copied_bytes=0,
            reserve_s=0.1,
            restore_s=0.1,
            verify_s=0.1,
            wake_s=0.3,
        )

    def released(self, name: str) -> LeaseReleased:
        return LeaseReleased(node=NODE, at_s=self.now_s, replica_id=name, reason="retired")

    def refused(self, name: str) -> WakeRefused:
        return WakeRefused(**self._names(name), wake_epoch=self.epoch(name), reason="no room", short_by_bytes=GiB)

    def failed(self, name: str, *, is_final: bool = False) -> ReplicaFailed:
        return ReplicaFailed(
            **self._names(name), reason="died", attempt_count=1, is_final=is_final, wake_epoch=self.epoch(name) + 1
        )

    # --- Signals ------------------------------------------------------------------------------------------------------

    def wanted(self, name: str, *, wait_s: float = 0.0, count: int = 1) -> ModelWanted:
        return ModelWanted(
            gateway="g",
            deployment_id=f"d-{name}",
            model=name,
            replica_id=name,
            wake_epoch=self.epoch(name),
            waiting_count=count,
            oldest_wait_s=wait_s,
        )

    def load(self, *busy: str, gateway: str = "g") -> LoadSampled:
        """A gateway's sample: one request in flight for each model that is named, none for the others."""
        models = tuple(
            ModelLoad(
                deployment_id=f"d-{name}",
                in_flight_count=int(name in busy),
                waiting_count=0,
                arrived_count=0,
                last_arrival_s=0.0,
            )
            for name in self.state.replicas
        )
        return LoadSampled(gateway=gateway, models=models)


def outline(outcomes: list[Outcome]) -> list[str]:
    """What was decided, in order: ``wake a <- b c`` (its victims), ``park a``, ``order wake a``, ``close a``."""
    lines = []
    for outcome in outcomes:
        match outcome.outcome if isinstance(outcome, Under) else outcome:
            case WakeDecided(replica_id=name, victim_ids=victims):
                lines.append(f"wake {name}" + (f" <- {' '.join(victims)}" if victims else ""))
            case ParkDecided(replica_id=name):
                lines.append(f"park {name}")
            case DecisionClosed(replica_id=name):
                lines.append(f"close {name}")
            case WakeOrdered(replica_id=name):
                lines.append(f"order wake {name}")
            case ParkOrdered(replica_id=name):
                lines.append(f"order park {name}")
            case Timer():
                lines.append("timer")
            case other:
                lines.append(type(other).__name__)
    return lines

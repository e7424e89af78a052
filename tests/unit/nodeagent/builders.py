"""A node agent's core with its state, for tests: inputs go in, outcomes come out, its own facts are folded."""

from typing import Any

from kit.outcomes import Context, Effect, Outcome, Timer
from kit.service import Service
from schemas.catalogue import decode, encode
from schemas.deployments import DeploymentSpec, EngineKind, EngineSpec, IsolationGrade, ShareSpec, SwapDriver, SwapSpec
from schemas.messages import Fact
from schemas.nodes import GpuOffer, LeaseGranted, LeaseRefused, ParkTier, ReplicaReady
from schemas.orders import ParkOrdered, WakeOrdered
from schemas.placement import PlacementProposed, ReleaseProposed, ReplicaProposal, ShareProposal
from schemas.units import GiB
from services.nodeagent import health as _health  # noqa: F401  # Registers its handlers.
from services.nodeagent import leases as _leases  # noqa: F401
from services.nodeagent import residency as _residency  # noqa: F401
from services.nodeagent import shares as _shares  # noqa: F401
from services.nodeagent import suspicion as _suspicion  # noqa: F401
from services.nodeagent.core import SERVICE
from services.nodeagent.inputs import (
    BurstDue,
    EngineEffect,
    EngineFound,
    EngineInput,
    EngineLost,
    EngineNotResized,
    EngineNotWoken,
    EngineParked,
    EngineResized,
    EngineStarted,
    EngineStayed,
    EngineStopped,
    EngineUnexplained,
    EngineWoken,
    LoadMeasured,
    NodeProbed,
    ResizeEngine,
    StartEngine,
    StepOverdue,
)
from services.nodeagent.settings import NodeAgentSettings
from services.nodeagent.state import NodeState, Replica

NODE = "node-0"
RESIDUE_GIB = 1


def gpu(
    index: int = 0,
    *,
    allocatable_gib: int = 80,
    grade: IsolationGrade = IsolationGrade.DRIVER,
    swap_drivers: tuple[SwapDriver, ...] = (),
) -> GpuOffer:
    return GpuOffer(
        gpu_uuid=f"gpu-{index}",
        index=index,
        name="H100",
        capacity_bytes=(allocatable_gib + 2) * GiB,
        reserve_bytes=2 * GiB,
        grade=grade,
        grade_reason="as the test says",
        link_bytes_per_s=50e9,
        is_software=True,
        swap_drivers=swap_drivers,
    )


def replica(
    name: str,
    gib: int,
    *,
    gpu_uuid: str = "gpu-0",
    gpu_uuids: tuple[str, ...] = (),
    weights_gib: int = 10,
    is_parkable: bool = True,
    minimum_grade: IsolationGrade | None = None,
    limit_gib: int = 0,
    weight: int = 1,
    priority: str | None = None,
    kind: EngineKind = EngineKind.SIMULATED,
) -> ReplicaProposal:
    """`gib` is of each of its GPUs: `gpu_uuids`, or the one. `limit_gib` 0: it never has more than its request."""
    return ReplicaProposal(
        replica_id=name,
        deployment_id=f"d-{name}",
        tenant="default",
        deployment=DeploymentSpec(
            name=name,
            engine=EngineSpec(kind=kind, weights_bytes=weights_gib * GiB),
            share=ShareSpec(
                request_bytes=gib * GiB,
                limit_bytes=max(gib, limit_gib) * GiB,
                minimum_grade=minimum_grade,
                gpu_count=max(1, len(gpu_uuids)),
                burst_weight=weight,
            ),
            priority=priority,
            swap=SwapSpec(is_parkable=is_parkable),
        ),
        shares=tuple(
            ShareProposal(
                replica_id=name,
                shard_index=index,
                gpu_uuid=uuid,
                request_bytes=gib * GiB,
                limit_bytes=max(gib, limit_gib) * GiB,
            )
            for index, uuid in enumerate(gpu_uuids or (gpu_uuid,))
        ),
    )


def proposal(*replicas: ReplicaProposal, node: str = NODE) -> PlacementProposed:
    name = "-".join(r.replica_id for r in replicas)
    return PlacementProposed(at_s=0.0, proposal_id=f"p-{name}", node=node, replicas=replicas, reason="tightest fit")


def release(name: str, *, node: str = NODE) -> ReleaseProposed:
    return ReleaseProposed(at_s=0.0, node=node, replica_id=name, reason="retired", drain_s=7.0)


class Agent:
    """One agent whose writer epoch is 1 and whose proposals come with rising sequences."""

    def __init__(
        self,
        *gpus: GpuOffer,
        host_gib: int = 1000,
        service: Service[NodeState] = SERVICE,
        start_attempt_count: int = 5,
        demand_s: float = 0.0,
    ) -> None:
        """`service`: another one to run in place of the real one; tests plant faults that checks must find."""
        self.service = service
        settings = NodeAgentSettings(
            node=NODE, residue_bytes=RESIDUE_GIB * GiB, start_attempt_count=start_attempt_count, demand_s=demand_s
        )
        self.state: NodeState = service.new_state(settings)
        self.now_s = 100.0
        self.seq = 0
        self.history: list[Fact] = []
        """Every fact that was folded, its own and those that it was handed."""
        self._probed = NodeProbed(
            machine_id="m",
            gpus=gpus or (gpu(),),
            host_budget_bytes=host_gib * GiB,
            holder_url="http://node-0:7070",
            label="software GPU",
        )
        self.handle(self._probed)

    def probed(self) -> NodeProbed:
        """What a look at its node finds: all as it was at first."""
        return self._probed

    def context(self) -> Context:
        return Context(now_s=self.now_s, writer_epoch=1, cause_seq=self.seq)

    def handle(self, item: Any) -> list[Outcome]:
        """What the core decides; its facts are folded as the shell folds them, and the invariants hold after it."""
        self.seq += 1
        self.now_s += 1.0
        if isinstance(item, Fact):
            self._fold(item)
        observe = self.service.observers.get(type(item))
        if observe is not None:
            observe(self.state, item, self.now_s)
        outcomes = list(self.service.handlers[type(item)](self.state, item, self.context()))
        for outcome in outcomes:
            if isinstance(outcome, Fact):
                fact = decode(encode(outcome))
                assert isinstance(fact, Fact)
                self._fold(fact)
        self.service.check_invariants(self.state)
        return outcomes

    def _fold(self, fact: Fact) -> None:
        self.history.append(fact)
        self.service.evolve(self.state, fact)

    def lease(self, name: str) -> Replica:
        return self.state.replicas[name]

    def residency(self, name: str) -> str:
        return self.lease(name).residency.value

    # --- Ways to come to a residency ----------------------------------------------------------------------------------

    def granted(self, name: str, gib: int, **values: Any) -> None:
        self.handle(proposal(replica(name, gib, **values)))

    def resident(self, name: str, gib: int, **values: Any) -> None:
        self.granted(name, gib, **values)
        self.handle(self.started(name))
        assert self.residency(name) == "resident"

    def parked(self, name: str, gib: int, **values: Any) -> None:
        self.resident(name, gib, **values)
        self.handle(self.park(name))
        self.handle(self.has_parked(name))
        assert self.residency(name) == "parked"

    # --- Orders, and what comes back of effects -----------------------------------------------------------------------

    def wake(self, name: str, *victims: str, wake_epoch: int | None = None, writer_epoch: int = 9) -> WakeOrdered:
        return WakeOrdered(
            node=NODE,
            writer_epoch=writer_epoch,
            deadline_ms=1000,
            replica_id=name,
            wake_epoch=self.lease(name).wake_epoch if wake_epoch is None else wake_epoch,
            victim_ids=victims,
        )

    def park(self, name: str, *, wake_epoch: int | None = None, writer_epoch: int = 9) -> ParkOrdered:
        return ParkOrdered(
            node=NODE,
            writer_epoch=writer_epoch,
            deadline_ms=1000,
            replica_id=name,
            wake_epoch=self.lease(name).wake_epoch if wake_epoch is None else wake_epoch,
            reason="idle",
        )

    def _of(self, name: str) -> dict[str, Any]:
        return {"replica_id": name, "lease_epoch": self.lease(name).lease_epoch}

    def started(self, name: str) -> EngineStarted:
        return EngineStarted(**self._of(name), endpoint=f"http://{name}", start_s=9.0, enforced_bytes=30 * GiB)

    def has_parked(self, name: str, *, residue_gib: int = RESIDUE_GIB, tier: ParkTier = ParkTier.HOST) -> EngineParked:
        return EngineParked(
            **self._of(name),
            residues=(residue_gib * GiB,) * len(self.lease(name).share_bytes),
            host_bytes=10 * GiB,
            copied_bytes=0,
            park_s=0.1,
            drain_s=0.2,
            reason="idle",
            tier=tier,
        )

    def stayed(self, name: str) -> EngineStayed:
        return EngineStayed(**self._of(name), reason="still busy")

    def woken(self, name: str) -> EngineWoken:
        return EngineWoken(
            **self._of(name), endpoint=f"http://{name}", copied_bytes=10 * GiB, restore_s=0.3, verify_s=0.1
        )

    def not_woken(self, name: str) -> EngineNotWoken:
        return EngineNotWoken(**self._of(name), reason="restore failed", short_by_bytes=0)

    def stopped(self, name: str) -> EngineStopped:
        return EngineStopped(**self._of(name))

    def tick(self) -> list[Outcome]:
        """Shares are looked at, long enough after the last change that nobody rests."""
        self.now_s += 10.0
        return self.handle(BurstDue())

    def load(self, name: str, kv_used_fraction: float, *, waiting_count: int = 0) -> LoadMeasured:
        return LoadMeasured(**self._of(name), kv_used_fraction=kv_used_fraction, waiting_count=waiting_count)

    def resized(self, effect: ResizeEngine, *gib: float) -> EngineResized:
        """It did what it was asked for; `gib`: it lives in these instead, by shard."""
        return EngineResized(
            **self._of(effect.replica.replica_id),
            reason=effect.reason,
            granted_bytes=tuple(int(size * GiB) for size in gib) or effect.granted_bytes,
            resize_epoch=effect.resize_epoch,
            resize_s=0.1,
        )

    def not_resized(self, effect: ResizeEngine, *gib: float, is_able: bool = True) -> EngineNotResized:
        """It did not; `gib`: what it is proven to live in, instead of what it had."""
        return EngineNotResized(
            **self._of(effect.replica.replica_id),
            reason=effect.reason,
            granted_bytes=tuple(int(size * GiB) for size in gib) or effect.before_bytes,
            resize_epoch=effect.resize_epoch,
            resize_s=2.0,
            problem="it has not shrunk",
            is_able=is_able,
        )

    def granted_gib(self, name: str) -> float:
        """On each of its GPUs, the largest."""
        return max(self.lease(name).share_bytes.values()) / GiB

    def lost(self, name: str, *, shaken: tuple[str, ...] = ()) -> EngineLost:
        return EngineLost(**self._of(name), reason="it ended with code 137", shaken_ids=shaken)

    def found(self, name: str, *, is_parked: bool = False) -> EngineFound:
        residues = (RESIDUE_GIB * GiB,) * len(self.lease(name).share_bytes) if is_parked else ()
        return EngineFound(**self._of(name), endpoint=f"http://{name}", is_parked=is_parked, residues=residues)

    def unexplained(self, name: str) -> EngineUnexplained:
        return EngineUnexplained(**self._of(name), reason="it does not answer")


def outline(outcomes: list[Outcome]) -> list[str]:
    """Kind and replica of each outcome, in order: what was decided, without numbers and steps' deadlines."""
    return [f"{type(outcome).__name__} {_about(outcome)}".strip() for outcome in without_deadlines(outcomes)]


def without_deadlines(outcomes: list[Outcome]) -> list[Outcome]:
    """All but the timers of steps: every step has one, and `test_suspects` looks at them."""
    return [o for o in outcomes if not (isinstance(o, Timer) and isinstance(o.input, StepOverdue))]


def _about(outcome: Outcome) -> str:
    match outcome:
        case EngineEffect():
            return outcome.replica.replica_id
        case Timer() if isinstance(outcome.input, EngineInput):
            return outcome.input.replica_id
        case LeaseGranted() | ReplicaReady():
            return " ".join(r.replica_id for r in outcome.replicas)
        case LeaseRefused():
            return " ".join(outcome.replica_ids)
        case _:
            return getattr(outcome, "replica_id", "")


def effects(outcomes: list[Outcome]) -> list[Effect]:
    return [outcome for outcome in outcomes if isinstance(outcome, Effect)]


def start_of(agent: Agent, name: str) -> StartEngine:
    lease = agent.lease(name)
    return StartEngine(
        replica=lease.proposal,
        lease_epoch=lease.lease_epoch,
        wake_epoch=lease.wake_epoch,
        swap_driver=lease.swap_driver,
    )

"""Placement's core with its state, for tests: commands and facts go in, facts and answers come out."""

from collections.abc import Sequence
from typing import Any

from kit.outcomes import Context, Outcome, Reply, Timer
from schemas.autoscaler import ReplicasDecided
from schemas.catalogue import decode, encode
from schemas.deployments import DeploymentSpec, EngineSpec, IsolationGrade, PlacementSpec, ShareSpec, SwapSpec
from schemas.inbox import DeployRequested
from schemas.messages import Command, Fact, Query
from schemas.nodes import (
    GpuOffer,
    Lease,
    LeaseGranted,
    LeaseRefused,
    LeaseReleased,
    NodeJoined,
    RefusalReason,
    ReplicaFailed,
)
from schemas.placement import CommandFact, PlacementFailed, PlacementProposed
from schemas.units import GiB
from services.placement import commands as _commands  # noqa: F401  # Registers its handlers.
from services.placement import explaining as _explaining  # noqa: F401
from services.placement import planning as _planning  # noqa: F401
from services.placement import views as _views  # noqa: F401
from services.placement.core import SERVICE
from services.placement.gangs import PlaceNext
from services.placement.settings import PlacementSettings
from services.placement.state import ClusterState

RESIDUE_GIB = 1


def gpu(
    uuid: str,
    *,
    allocatable_gib: int = 80,
    grade: IsolationGrade = IsolationGrade.DRIVER,
    name: str = "H100",
    foreign_gib: int = 0,
    peers: dict[str, float] | None = None,
) -> GpuOffer:
    return GpuOffer(
        gpu_uuid=uuid,
        index=int(uuid[-1]) if uuid[-1].isdigit() else 0,
        name=name,
        foreign_bytes=foreign_gib * GiB,
        peer_bytes_per_s=peers or {},
        capacity_bytes=(allocatable_gib + 2) * GiB,
        reserve_bytes=2 * GiB,
        grade=grade,
        grade_reason="as the test says",
        link_bytes_per_s=50e9,
        is_software=True,
    )


def spec(
    name: str,
    gib: int | None = None,
    *,
    portion: float | None = None,
    limit_gib: int | None = None,
    limit_portion: float | None = None,
    gpu_count: int = 1,
    weights_gib: int = 10,
    is_parkable: bool = True,
    minimum_grade: IsolationGrade | None = None,
    placing: dict[str, Any] | None = None,
    **values: Any,
) -> DeploymentSpec:
    """`placing`: fields of `PlacementSpec`."""
    return DeploymentSpec(
        name=name,
        engine=EngineSpec(weights_bytes=weights_gib * GiB),
        share=ShareSpec(
            request_bytes=None if gib is None else gib * GiB,
            request_portion=portion,
            limit_bytes=None if limit_gib is None else limit_gib * GiB,
            limit_portion=limit_portion,
            minimum_grade=minimum_grade,
            gpu_count=gpu_count,
        ),
        placement=PlacementSpec(**(placing or {})),
        swap=SwapSpec(is_parkable=is_parkable),
        **values,
    )


class Placement:
    """Commands get rising inbox sequences; parked replicas are expected to leave 1 GiB."""

    def __init__(self, *, tenant: str = "default", settings: dict[str, Any] | None = None) -> None:
        known = PlacementSettings(**{"residue_bytes": RESIDUE_GIB * GiB, **(settings or {})})
        self.state: ClusterState = SERVICE.new_state(known)
        self.now_s = 100.0
        self.seq = 0
        self.tenant = tenant
        self.takes_turns = True
        """Placing that was asked for follows at once; False: `PlaceNext` is left to the test."""

    def handle(self, item: Any) -> list[Outcome]:
        """What the core decides; facts are folded as the shell folds them, and the invariants hold after it."""
        if not isinstance(item, PlaceNext):
            self.seq += 1
            self.now_s += 1.0
        if isinstance(item, Fact):
            SERVICE.evolve(self.state, item)
        observe = SERVICE.observers.get(type(item))
        if observe is not None:
            observe(self.state, item, self.now_s)
        ctx = Context(now_s=self.now_s, writer_epoch=1, cause_seq=self.seq, tenant=self.tenant)
        handler = SERVICE.handlers.get(type(item))
        outcomes = [] if handler is None else list(handler(self.state, item, ctx))
        for outcome in outcomes:
            if isinstance(outcome, Fact):
                fact = decode(encode(outcome))
                assert isinstance(fact, Fact)
                SERVICE.evolve(self.state, fact)
        SERVICE.check_invariants(self.state)
        return [*self._without_turns(outcomes), *self._turns(outcomes)] if self.takes_turns else outcomes

    def _without_turns(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        return [outcome for outcome in outcomes if not self._is_turn(outcome)]

    def _turns(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Placing that is due at once."""
        return self.handle(PlaceNext()) if any(self._is_turn(outcome) for outcome in outcomes) else []

    def _is_turn(self, outcome: Outcome) -> bool:
        return isinstance(outcome, Timer) and isinstance(outcome.input, PlaceNext) and outcome.due_s <= self.now_s

    def ask(self, query: Query, *, tenant: str | None = None) -> Any:
        return SERVICE.answers[type(query)](self.state, query, tenant or self.tenant)

    # --- Inputs -------------------------------------------------------------------------------------------------------

    def join(self, *gpus: GpuOffer, node: str = "node-0", host_gib: int = 1000, **values: Any) -> list[Outcome]:
        joined = NodeJoined(
            node=node,
            at_s=self.now_s,
            machine_id="m",
            gpus=gpus or (gpu("gpu-0"),),
            host_budget_bytes=host_gib * GiB,
            holder_url="",
            label="software GPU",
            **values,
        )
        return self.handle(joined)

    def deploy(self, wish: DeploymentSpec, *, command_id: str = "") -> list[Outcome]:
        return self.handle(DeployRequested(command_id=command_id or f"c{self.seq + 1}", deployment=wish))

    def grant(self, proposed: PlacementProposed) -> list[Outcome]:
        leases = tuple(
            Lease(
                replica_id=replica.replica_id,
                shard_index=share.shard_index,
                gpu_uuid=share.gpu_uuid,
                request_bytes=share.request_bytes,
                granted_bytes=share.request_bytes,
                limit_bytes=share.limit_bytes,
                residue_bytes=RESIDUE_GIB * GiB,
                lease_epoch=1,
            )
            for replica in proposed.replicas
            for share in replica.shares
        )
        granted = LeaseGranted(
            node=proposed.node,
            at_s=self.now_s,
            proposal_id=proposed.proposal_id,
            leases=leases,
            replicas=proposed.replicas,
            gang_id=proposed.gang_id,
            gang_hold_s=proposed.gang_hold_s,
        )
        return self.handle(granted)

    def refuse(self, proposed: PlacementProposed) -> list[Outcome]:
        refused = LeaseRefused(
            node=proposed.node,
            at_s=self.now_s,
            proposal_id=proposed.proposal_id,
            replica_ids=tuple(r.replica_id for r in proposed.replicas),
            reason=RefusalReason.NO_ROOM,
            message="short by 7 bytes",
            free_bytes=0,
        )
        return self.handle(refused)

    def release(self, replica_id: str, *, node: str = "node-0") -> list[Outcome]:
        return self.handle(LeaseReleased(node=node, at_s=self.now_s, replica_id=replica_id, reason="stopped"))

    def fail(self, replica_id: str, *, node: str = "node-0") -> list[Outcome]:
        """For good."""
        failed = ReplicaFailed(
            node=node,
            at_s=self.now_s,
            replica_id=replica_id,
            deployment_id=self.state.replicas[replica_id].deployment_id,
            model="m",
            reason="it would not start",
            attempt_count=5,
            is_final=True,
            wake_epoch=5,
        )
        return self.handle(failed)

    def placed(self, wish: DeploymentSpec) -> PlacementProposed:
        """Deploy and grant; its proposal."""
        proposed = proposal(self.deploy(wish))
        self.grant(proposed)
        return proposed

    def scale(self, deployment_id: str, count: int) -> list[Outcome]:
        decided = ReplicasDecided(
            at_s=self.now_s, deployment_id=deployment_id, model="m", replica_count=count, reason="idle for 20 s"
        )
        return self.handle(decided)

    def id_of(self, model: str) -> str:
        deployment = self.state.named(self.tenant, model)
        assert deployment is not None, model
        return deployment.deployment_id


def kinds(outcomes: Sequence[Outcome]) -> list[str]:
    return [type(outcome).__name__ for outcome in outcomes]


def proposal(outcomes: Sequence[Outcome]) -> PlacementProposed:
    (found,) = [outcome for outcome in outcomes if isinstance(outcome, PlacementProposed)]
    return found


def failure(outcomes: Sequence[Outcome]) -> PlacementFailed:
    (found,) = [outcome for outcome in outcomes if isinstance(outcome, PlacementFailed)]
    return found


def verdict(outcomes: Sequence[Outcome], command: Command | None = None) -> tuple[str, str, str]:
    """(fact, verdict, code); exactly one fact names the command and exactly one answer is sent."""
    (reply,) = [outcome for outcome in outcomes if isinstance(outcome, Reply)]
    facts = [outcome for outcome in outcomes if isinstance(outcome, CommandFact)]
    return (type(facts[-1]).__name__, str(reply.answer.verdict), reply.answer.code)


def message(outcomes: Sequence[Outcome]) -> str:
    (reply,) = [outcome for outcome in outcomes if isinstance(outcome, Reply)]
    return reply.answer.message

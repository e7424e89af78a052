"""Facts as sentences, for people who read history."""

from collections.abc import Callable
from typing import Any, Final

from schemas.autoscaler import ReplicasDecided
from schemas.history import Progressed, WriterStarted
from schemas.messages import Fact
from schemas.nodes import (
    BorrowAccounted,
    GaveBack,
    GiveBackAsked,
    GpuFaulted,
    GpuObserved,
    GpuQuarantined,
    GpuReinstated,
    LeaseGranted,
    LeaseRefused,
    LeaseReleased,
    LeaseResized,
    NodeJoined,
    ParkAbandoned,
    ReplicaDraining,
    ReplicaFailed,
    ReplicaParked,
    ReplicaReady,
    ReplicaResident,
    ReplicaStarting,
    ReplicaSuspect,
    ReplicaWaking,
    WakeRefused,
)
from schemas.placement import (
    CommandDuplicated,
    CommandRejected,
    DeploymentAdmitted,
    DeploymentRetired,
    GangAbandoned,
    GangCommitted,
    GpuCloseAsked,
    GpuReinstateAsked,
    KeyAdded,
    KeyRevoked,
    MoveDecided,
    MoveEnded,
    NodeLost,
    NodeReturned,
    ParkAsked,
    PlacementFailed,
    PlacementProposed,
    PreemptionDecided,
    PreemptionEnded,
    QuotaSet,
    ReleaseProposed,
    RepackAsked,
    WakeAsked,
)
from schemas.swapper import DecisionClosed, ParkDecided, WakeDecided
from schemas.units import GiB


def gib(size_bytes: int) -> str:
    return f"{size_bytes / GiB:.1f} GiB"


def _victims(ids: tuple[str, ...]) -> str:
    if not ids:
        return ""
    return f", {', '.join(ids)} {'gives' if len(ids) == 1 else 'give'} way"


def _way(move: MoveDecided) -> str:
    if move.from_node != move.to_node:
        return f"from {move.from_node} to {move.to_node}"
    return f"on {move.to_node} from {', '.join(move.from_gpu_uuids)} to {', '.join(move.to_gpu_uuids)}"


def _missing(replica_count: int) -> str:
    if replica_count == 1:
        return "1 replica needs another place"
    return f"{replica_count or 'no'} replicas need another place"


def _replicas(count: int) -> str:
    return f"{count} replicas, " if count > 1 else ""


_TEXTS: Final[dict[type[Fact], Callable[[Any], str]]] = {
    WriterStarted: lambda f: f"instance {f.instance} took over",
    Progressed: lambda _: "nothing to decide for a while",
    DeploymentAdmitted: lambda f: f"admitted, revision {f.revision_count}",
    CommandRejected: lambda f: f"rejected: {f.message}",
    CommandDuplicated: lambda f: f"nothing to do: {f.message}",
    DeploymentRetired: lambda f: f"{f.model} retired",
    ParkAsked: lambda _: "an operator asked to park it",
    WakeAsked: lambda _: "an operator asked to wake it",
    KeyAdded: lambda f: f"key {f.key_id} accepted",
    KeyRevoked: lambda f: f"key {f.key_id} revoked",
    PlacementProposed: lambda f: (
        f"-> {f.node}, {_replicas(len(f.replicas))}"
        f"{gib(sum(share.request_bytes for r in f.replicas for share in r.shares))}; {f.reason}"
    ),
    PlacementFailed: lambda f: f"not placed: {f.message}; {f.remedy}",
    ReleaseProposed: lambda f: f"{f.replica_id} to be released: {f.reason}",
    GangCommitted: lambda f: f"gang complete: {len(f.replica_ids)} start on {f.node}",
    GangAbandoned: lambda f: f"gang given up: {len(f.replica_ids)} leases of {f.node} go back, {f.reason}",
    PreemptionDecided: lambda f: (
        f"room for {f.model} on {f.node}{_victims(tuple(dict.fromkeys(v.model for v in f.victims)))}; {f.reason}"
    ),
    PreemptionEnded: lambda f: f"claim on room ended: {f.reason}",
    MoveDecided: lambda f: f"{f.replica_id} moves {_way(f)}: {f.reason}",
    MoveEnded: lambda f: f"move {'done' if f.is_done else 'given up'}: {f.reason}",
    RepackAsked: lambda f: f"an operator asked for whole GPUs: {f.gpus_freed} can be freed",
    QuotaSet: lambda f: (
        f"{f.quota_tenant} is guaranteed {'all it asks for' if f.gpu_quota is None else f'{f.gpu_quota:g} GPUs'}"
    ),
    NodeLost: lambda f: f"{f.node} is silent for {f.silent_s:.0f} s: {_missing(len(f.replica_ids))}",
    NodeReturned: lambda f: (
        f"{f.node} is back after {f.away_s:.0f} s"
        + (f"; nothing new for {f.quarantine_s:.0f} s, loss {f.loss_count}" if f.quarantine_s else "")
    ),
    NodeJoined: lambda f: f"{f.node} offers {len(f.gpus)} GPUs ({f.label})",
    GpuCloseAsked: lambda f: (
        f"an operator closes {f.gpu_uuid} of {f.node}"
        + (" and wants it empty" if f.is_draining else "")
        + (f": {f.reason}" if f.reason else "")
    ),
    GpuReinstateAsked: lambda f: f"an operator says that {f.gpu_uuid} of {f.node} is well",
    GpuFaulted: lambda f: f"{f.gpu_uuid}: {f.message}",
    GpuQuarantined: lambda f: (
        f"{f.gpu_uuid} takes no new replica "
        + (f"for {f.quarantine_s:.0f} s" if f.quarantine_s else "until an operator says so")
        + f": {f.reason}"
    ),
    GpuReinstated: lambda f: f"{f.gpu_uuid} is well again after {f.away_s:.0f} s",
    ReplicaSuspect: lambda f: f"suspect: {f.reason}",
    LeaseResized: lambda f: (
        f"{gib(sum(f.granted_bytes))} granted now: {f.reason.value.replace('_', ' ')}"
        + (
            f"; it could not grow{'' if f.is_able else ' and will not be asked again'}: {f.problem}"
            if f.problem
            else ""
        )
    ),
    GiveBackAsked: lambda f: (
        f"must give back: {gib(f.asked_bytes)} are missing for {f.for_replica_id}"
        if f.is_owed
        else f"should give back: {f.for_replica_id} gets its part of {gib(f.asked_bytes)}"
        if f.for_replica_id
        else f"should give back {gib(f.asked_bytes)}, which it does not use"
    ),
    GaveBack: lambda f: (
        f"{f.step} gave {gib(f.freed_bytes)} of {gib(f.asked_bytes)} back in {f.step_s:.2f} s"
        + (f"; {f.reason}" if f.reason else "")
    ),
    BorrowAccounted: lambda f: f"borrowing on {f.gpu_uuid} accounted",
    GpuObserved: lambda f: f"{gib(f.foreign_bytes)} foreign on {f.gpu_uuid}",
    LeaseGranted: lambda f: f"{gib(sum(lease.granted_bytes for lease in f.leases))} granted by {f.node}",
    LeaseRefused: lambda f: f"{f.node} refused: {f.message}",
    LeaseReleased: lambda f: f"lease of {f.replica_id} ended: {f.reason}",
    ReplicaStarting: lambda _: "engine starting",
    ReplicaReady: lambda f: ", ".join(
        f"ready after {r.start_s:.1f} s, {gib(r.enforced_bytes)} enforced" for r in f.replicas
    ),
    ReplicaDraining: lambda f: f"draining: {f.reason}",
    ParkAbandoned: lambda f: f"stays resident: {f.reason}",
    ReplicaParked: lambda f: (
        f"parked in {f.park_s:.2f} s after {f.drain_s:.2f} s draining, {gib(f.copied_bytes)} copied, "
        f"{gib(f.residue_bytes)} stay; {f.reason}"
    ),
    ReplicaWaking: lambda f: "restoring" if f.is_reserved else f"wake accepted{_victims(f.victim_ids)}",
    ReplicaResident: lambda f: (
        f"resident after {f.wake_s:.2f} s (room {f.reserve_s:.2f}, restore {f.restore_s:.2f}, verify {f.verify_s:.2f})"
    ),
    WakeRefused: lambda f: f"wake refused: {f.reason}, short by {gib(f.short_by_bytes)}",
    ReplicaFailed: lambda f: f"engine failed ({f.attempt_count}): {f.reason}",
    ReplicasDecided: lambda f: f"{f.replica_count} replica{'' if f.replica_count == 1 else 's'}: {f.reason}",
    WakeDecided: lambda f: f"wake: {f.reason}{_victims(f.victim_ids)}",
    ParkDecided: lambda f: f"park: {f.reason}",
    DecisionClosed: lambda f: f"decision given up: {f.reason}",
}


def text_of(fact: Fact) -> str:
    """One sentence; the class's name when nobody has written one yet."""
    wording = _TEXTS.get(type(fact))
    return wording(fact) if wording is not None else type(fact).__name__

"""How facts change what placement knows. Nothing else does. Each fold costs what its fact names, not what there is."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, Final

from schemas.autoscaler import ReplicasDecided
from schemas.nodes import (
    LeaseGranted,
    LeaseRefused,
    LeaseReleased,
    LeaseResized,
    NodeJoined,
    ParkAbandoned,
    ReplicaDraining,
    ReplicaFact,
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
    CommandFact,
    DeploymentAdmitted,
    DeploymentRetired,
    KeyAdded,
    KeyRevoked,
    MoveDecided,
    MoveEnded,
    NodeLost,
    NodeReturned,
    PlacementFailed,
    PlacementProposed,
    PreemptionDecided,
    PreemptionEnded,
    ReasonCode,
    ReleaseProposed,
    RepackAsked,
)
from services.placement.gang_folds import join_gang, part_ended
from services.placement.state import Claim, ClusterState, Deployment, Key, Move, Node, Repacking, Replica

HOUR_S: Final = 3600.0

# --- Own facts --------------------------------------------------------------------------------------------------------


def fold_command(state: ClusterState, fact: CommandFact) -> None:
    """Move the inbox cursor on and remember the command, so that its repetition is recognised."""
    state.inbox_seq = max(state.inbox_seq, fact.inbox_seq)
    state.command_ids[f"{fact.tenant}/{fact.command_id}"] = type(fact).__name__
    while len(state.command_ids) > state.settings.remembered_command_count:
        del state.command_ids[next(iter(state.command_ids))]


def fold_admitted(state: ClusterState, fact: DeploymentAdmitted) -> None:
    fold_command(state, fact)
    deployment = Deployment(
        deployment_id=fact.deployment_id,
        tenant=fact.tenant,
        spec=fact.deployment,
        admitted_at_s=fact.at_s,
        revision_count=fact.revision_count,
        replica_count=fact.deployment.replica_count,
        short_since_s=fact.at_s,
    )
    index = state.index
    state.deployments[fact.deployment_id] = deployment
    index.add_deployment(deployment)


def fold_retired(state: ClusterState, fact: DeploymentRetired) -> None:
    fold_command(state, fact)
    index = state.index
    deployment = state.deployments.pop(fact.deployment_id, None)
    if deployment is not None:
        index.drop_deployment(deployment)
        state.observed.uses.forget(fact.deployment_id)


def fold_key_added(state: ClusterState, fact: KeyAdded) -> None:
    fold_command(state, fact)
    state.keys[fact.key_id] = Key(
        key_id=fact.key_id, tenant=fact.tenant, name=fact.name, key_hash=fact.key_hash, created_at_s=fact.at_s
    )


def fold_key_revoked(state: ClusterState, fact: KeyRevoked) -> None:
    fold_command(state, fact)
    state.keys.pop(fact.key_id, None)


def fold_proposed(state: ClusterState, fact: PlacementProposed) -> None:
    for proposal in fact.replicas:
        replica = Replica.proposed(
            proposal,
            node=fact.node,
            at_s=fact.at_s,
            reason=fact.reason,
            codes=fact.codes,
            gang_id=fact.gang_id,
            residue_bytes=state.settings.residue_bytes,
        )
        deployment = state.deployments.get(proposal.deployment_id)
        if deployment is not None:
            if not any(c.replica_id == proposal.replica_id for c in _claims_of(state, deployment)):
                deployment.created_count += 1  # Else it got its name with its claim.
            deployment.problem = deployment.remedy = ""
            deployment.alternatives, deployment.constraints = fact.alternatives, fact.constraints
            deployment.codes = fact.codes
            deployment.rests_until_s = 0.0
        add_replica(state, replica)
        state.index.count(proposal.deployment_id)
        if fact.gang_id:
            join_gang(state, fact, replica)


def fold_failed_placement(state: ClusterState, fact: PlacementFailed) -> None:
    deployment = state.deployments.get(fact.deployment_id)
    if deployment is not None:
        deployment.problem, deployment.remedy = fact.message, fact.remedy
        deployment.alternatives, deployment.constraints = fact.alternatives, fact.constraints
        deployment.codes = fact.codes
        deployment.rests_until_s = 0.0
        if deployment.gang_attempt_count >= state.settings.gang_attempt_count:
            deployment.gang_attempt_count = 0
            deployment.gang_not_before_s = fact.at_s + state.settings.gang_pause_max_s
        state.index.count(fact.deployment_id)


def fold_release(state: ClusterState, fact: ReleaseProposed) -> None:
    replica = state.replicas.get(fact.replica_id)
    if replica is not None:
        replica.is_releasing = True
        part_ended(state, replica, f"a lease on {fact.node} was to end: {fact.reason}")
        state.index.touch(replica)


# --- Preemption -------------------------------------------------------------------------------------------------------


DISPLACED_KEPT: Final = 20
"""Of those who gave their places to one deployment, so many are remembered for whoever asks."""


def _claims_of(state: ClusterState, deployment: Deployment) -> Collection[Claim]:
    return state.index.claims_of.get(deployment.deployment_id, {}).values()


def fold_preemption_decided(state: ClusterState, fact: PreemptionDecided) -> None:
    """The room is claimed, and the newcomer has its name. The displaced ones rest when they have left."""
    index = state.index
    deployment = state.deployments.get(fact.deployment_id)
    if deployment is None:
        return
    deployment.created_count += 1
    names = ", ".join(dict.fromkeys(victim.model for victim in fact.victims)) or "the rest of its gang"
    deployment.problem, deployment.remedy = f"room is being made for it on {fact.node}: {names} to leave", ""
    deployment.codes = (ReasonCode.WAITS_FOR_VICTIMS,)
    deployment.displaced = (*deployment.displaced, *fact.victims)[-DISPLACED_KEPT:]
    for victim in fact.victims:
        displaced = state.deployments.get(victim.deployment_id)
        if displaced is not None:
            displaced.displaced_by = fact.model
            displaced.rests_until_s = fact.at_s + state.settings.displaced_rest_s
            displaced.problem = f"{victim.replica_id} gave its place to {fact.model}: {victim.reason}"
            displaced.remedy = "it gets a place again when load falls"
            displaced.codes = (ReasonCode.PREEMPTED,)
            index.count(victim.deployment_id)
    claim = Claim(
        preemption_id=fact.preemption_id,
        deployment_id=fact.deployment_id,
        tenant=deployment.tenant,
        is_preemptible=deployment.spec.may_be_preempted,
        replica_id=fact.replica_id,
        node=fact.node,
        gpu_uuids=fact.gpu_uuids,
        request_bytes=fact.request_bytes,
        victims=fact.victims,
        decided_at_s=fact.at_s,
        reason=fact.reason,
    )
    state.claims[fact.preemption_id] = claim
    index.add_claim(claim)


def fold_preemption_ended(state: ClusterState, fact: PreemptionEnded) -> None:
    index = state.index
    claim = state.claims.pop(fact.preemption_id, None)
    if claim is not None:
        index.drop_claim(claim)


# --- Replicas come, move and go ---------------------------------------------------------------------------------------


def add_replica(state: ClusterState, replica: Replica) -> None:
    index = state.index
    state.replicas[replica.replica_id] = replica
    index.add_replica(replica)


def drop_replica(state: ClusterState, replica_id: str) -> Replica | None:
    """Its place is free; None where it is not known (any more)."""
    index = state.index
    replica = state.replicas.pop(replica_id, None)
    if replica is not None:
        index.drop_replica(replica)
    return replica


def _move(state: ClusterState, replica_id: str, to: str, at_s: float) -> Replica | None:
    replica = state.replicas.get(replica_id)
    if replica is None:
        return None
    index = state.index
    held_place = replica.holds_place
    replica.state, replica.since_s = to, at_s
    if held_place and not replica.holds_place:
        index.leave_place(replica)
    elif replica.holds_place and not held_place:
        index.hold_place(replica)
    return replica


def _lacks_from(state: ClusterState, deployment_id: str, at_s: float) -> None:
    """If it lacks replicas now, it does so since this moment."""
    if deployment_id in state.waiting:
        state.deployments[deployment_id].short_since_s = at_s


def ask_refused_again(state: ClusterState) -> None:
    """Some node has more room: every refusal may be a thing of the past."""
    for deployment in state.index.refused.values():
        deployment.refused_nodes = ()
    state.index.refused.clear()


# --- Moves ------------------------------------------------------------------------------------------------------------


def fold_repack_asked(state: ClusterState, fact: RepackAsked) -> None:
    fold_command(state, fact)
    until_s = fact.at_s + state.settings.repack_valid_s
    state.repacking = Repacking(until_s=until_s, left_count=fact.move_count_max)


def fold_move_decided(state: ClusterState, fact: MoveDecided) -> None:
    """It counts against what an operator asked for, as long as that lasts, else against the hour's budget.

    One that empties a GPU which an operator closed counts against neither.
    """
    state.moves[fact.move_id] = Move(
        move_id=fact.move_id,
        replica_id=fact.replica_id,
        replacement_id=fact.replacement_id,
        deployment_id=fact.deployment_id,
        decided_at_s=fact.at_s,
    )
    if state.draining.keys() & {*fact.from_gpu_uuids}:
        return
    asked = state.repacking
    if asked is not None and asked.left_count > 0 and fact.at_s <= asked.until_s:
        asked.left_count -= 1
    else:
        lately = [at_s for at_s in state.move_times_s if fact.at_s - at_s < HOUR_S]
        state.move_times_s = (*lately, fact.at_s)


def fold_move_ended(state: ClusterState, fact: MoveEnded) -> None:
    """What was moved rests. What did not succeed is not tried again soon: it costs a start each time."""
    move = state.moves.pop(fact.move_id, None)
    if move is None:
        return
    deployment, replacement = state.deployments.get(move.deployment_id), state.replicas.get(move.replacement_id)
    if fact.is_done and replacement is not None:
        replacement.moved_at_s = fact.at_s
    if deployment is not None and not fact.is_done:
        deployment.not_moved_before_s = fact.at_s + state.settings.move_rest_s


# --- Nodes are lost and come back -------------------------------------------------------------------------------------


def fold_lost(state: ClusterState, fact: NodeLost) -> None:
    """Nothing goes there, and its replicas count as missing; what they hold there stays in the node's account."""
    index, node = state.index, state.nodes[fact.node]
    index.lose_node(fact.node)
    node.lost_at_s, node.silent_since_s = fact.at_s, fact.at_s - fact.silent_s
    node.loss_times_s = (*losses(node.loss_times_s, fact.at_s, window_s=state.settings.flap_window_s), fact.at_s)
    index.rooms.set_open(node)


def fold_returned(state: ClusterState, fact: NodeReturned) -> None:
    """Its replicas count again, so that those which were replaced meanwhile are one too many."""
    index, node = state.index, state.nodes[fact.node]
    node.lost_at_s, node.returned_at_s = None, fact.at_s
    node.quarantine_until_s = fact.at_s + fact.quarantine_s
    index.regain_node(fact.node)
    for replica in state.on_node(fact.node):
        deployment = state.deployments.get(replica.deployment_id)
        if deployment is not None and replica.deployment_id not in state.waiting and not deployment.rests_until_s:
            deployment.problem = deployment.remedy = ""
    index.rooms.set_open(node)


def losses(times_s: Sequence[float], now_s: float, *, window_s: float) -> tuple[float, ...]:
    """Those of a node's losses that are remembered."""
    return tuple(at_s for at_s in times_s if now_s - at_s <= window_s)


# --- Facts of node agents and of the autoscaler -----------------------------------------------------------------------


def fold_joined(state: ClusterState, fact: NodeJoined) -> None:
    """The node as it is now; whether it is lost or in quarantine is not its own to say."""
    offer: dict[str, Any] = {
        "label": fact.label,
        "joined_at_s": fact.at_s,
        "gpus": {gpu.gpu_uuid: gpu for gpu in fact.gpus},
        "host_budget_bytes": fact.host_budget_bytes,
        "cpu_millicores": fact.cpu_millicores,
        "memory_bytes": fact.memory_bytes,
        "labels": fact.labels,
        "machine_id": fact.machine_id,
    }
    known = state.nodes.get(fact.node)
    index = state.index
    node = replace(known, **offer) if known is not None else Node(name=fact.node, **offer)
    state.nodes[fact.node] = node
    index.set_node(node)
    ask_refused_again(state)


def fold_granted(state: ClusterState, fact: LeaseGranted) -> None:
    granted: dict[str, list[tuple[int, int, int]]] = {}
    for lease in fact.leases:
        amounts = (lease.shard_index, lease.granted_bytes, lease.residue_bytes)
        granted.setdefault(lease.replica_id, []).append(amounts)
    for replica_id, leases in granted.items():
        replica = _move(state, replica_id, "granted", fact.at_s)
        if replica is None:
            continue
        leases.sort()
        replica.granted_bytes = tuple(granted_bytes for _, granted_bytes, _ in leases)
        replica.residue_bytes = tuple(residue_bytes for _, _, residue_bytes in leases)
        replica.wake_epoch = 1
        if replica.is_held and replica.gang_id in state.gangs:
            state.gangs[replica.gang_id].missing.pop(replica_id, None)
        state.index.remeasured(replica)
        deployment = state.deployments.get(replica.deployment_id)
        if deployment is not None and deployment.displaced_by and replica.deployment_id not in state.waiting:
            deployment.displaced_by = ""
        if deployment is not None and deployment.refused_nodes:
            deployment.refused_nodes = ()
            state.index.refused.pop(deployment.deployment_id, None)


def fold_refused(state: ClusterState, fact: LeaseRefused) -> None:
    for replica_id in fact.replica_ids:
        replica = drop_replica(state, replica_id)
        if replica is None:
            continue
        part_ended(state, replica, f"{fact.node} refused: {fact.message}")
        deployment = state.deployments.get(replica.deployment_id)
        if deployment is not None:
            deployment.refused_nodes = (*deployment.refused_nodes, fact.node)
            if deployment.deployment_id in state.waiting:  # Else only the second copy of one that moves was refused.
                deployment.problem = f"{fact.node} refused: {fact.message}"
            state.index.refused[deployment.deployment_id] = deployment
            state.index.count(deployment.deployment_id)


def fold_released(state: ClusterState, fact: LeaseReleased) -> None:
    released = state.replicas.get(fact.replica_id)
    was_waiting = released is None or released.deployment_id in state.waiting
    drop_replica(state, fact.replica_id)
    if released is not None:
        part_ended(state, released, f"a lease on {fact.node} ended: {fact.reason}")
        if not was_waiting:
            _lacks_from(state, released.deployment_id, fact.at_s)
    ask_refused_again(state)


def fold_replica_fact(state: ClusterState, fact: ReplicaFact) -> None:
    """Where a replica is now; one word per kind of fact. A node may release one by itself: its GPU is gone."""
    words: dict[type[ReplicaFact], str] = {
        ReplicaStarting: "starting",
        ReplicaDraining: "draining",
        ParkAbandoned: "resident",
        ReplicaSuspect: "suspect",
        ReplicaWaking: "waking",
    }
    replica = _move(state, fact.replica_id, words[type(fact)], fact.at_s)
    if replica is not None and isinstance(fact, ReplicaDraining) and fact.is_release and not replica.is_releasing:
        replica.is_releasing = True
        state.index.touch(replica)


def fold_ready(state: ClusterState, fact: ReplicaReady) -> None:
    for ready in fact.replicas:
        replica = _move(state, ready.replica_id, "resident", fact.at_s)
        if replica is not None:
            replica.endpoint, replica.last_start_s, replica.problem = ready.endpoint, ready.start_s, ""
            replica.wake_epoch = ready.wake_epoch
            if replica.ready_at_s is None:
                replica.ready_at_s = fact.at_s
                state.index.touch(replica)


def fold_parked(state: ClusterState, fact: ReplicaParked) -> None:
    replica = _move(state, fact.replica_id, "parked", fact.at_s)
    if replica is not None:
        replica.wake_epoch, replica.residue_bytes = fact.wake_epoch, fact.residues(len(replica.shares))
        _ends_borrowing(replica)
        state.index.remeasured(replica)


def fold_resized(state: ClusterState, fact: LeaseResized) -> None:
    """To be shown only: where there is room follows from requests, because what is borrowed is given back."""
    replica = state.replicas.get(fact.replica_id)
    if replica is not None:
        replica.granted_bytes = fact.granted_bytes


def _ends_borrowing(replica: Replica) -> None:
    if replica.granted_bytes:
        replica.granted_bytes = tuple(share.request_bytes for share in replica.shares)


def fold_resident(state: ClusterState, fact: ReplicaResident) -> None:
    replica = _move(state, fact.replica_id, "resident", fact.at_s)
    if replica is not None:
        replica.endpoint, replica.last_wake_s, replica.problem = fact.endpoint, fact.wake_s, ""


def fold_wake_refused(state: ClusterState, fact: WakeRefused) -> None:
    replica = state.replicas.get(fact.replica_id)
    if replica is not None and replica.state == "waking":
        _move(state, fact.replica_id, "parked" if replica.endpoint else "granted", fact.at_s)
        replica.problem = fact.reason


def fold_replica_failed(state: ClusterState, fact: ReplicaFailed) -> None:
    replica = _move(state, fact.replica_id, "failed" if fact.is_final else "granted", fact.at_s)
    if replica is not None:
        replica.problem = fact.reason
        _ends_borrowing(replica)
        replica.endpoint = ""
        replica.wake_epoch = fact.wake_epoch


def fold_replicas_decided(state: ClusterState, fact: ReplicasDecided) -> None:
    deployment = state.deployments.get(fact.deployment_id)
    if deployment is not None:
        was_waiting = fact.deployment_id in state.waiting
        deployment.replica_count = fact.replica_count
        state.index.count(fact.deployment_id)
        if not was_waiting:
            _lacks_from(state, fact.deployment_id, fact.at_s)

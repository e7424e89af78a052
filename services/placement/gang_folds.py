"""How the facts of gangs change what placement knows."""

from schemas.placement import GangAbandoned, GangCommitted, PlacementProposed
from services.placement.settings import PlacementSettings
from services.placement.state import ClusterState, Gang, Replica


def join_gang(state: ClusterState, fact: PlacementProposed, replica: Replica) -> None:
    gang = state.gangs.get(fact.gang_id)
    if gang is None:
        gang = Gang(gang_id=fact.gang_id, deployment_id=replica.deployment_id, proposed_at_s=fact.at_s)
        state.gangs[fact.gang_id] = gang
    gang.replica_ids[fact.node] = (*gang.replica_ids.get(fact.node, ()), replica.replica_id)
    gang.missing[replica.replica_id] = fact.node


def fold_committed(state: ClusterState, fact: GangCommitted) -> None:
    """This node's part may start."""
    gang = state.gangs.get(fact.gang_id)
    if gang is None:
        return
    gang.replica_ids.pop(fact.node, None)
    for replica_id in fact.replica_ids:
        replica = state.replicas.get(replica_id)
        if replica is not None:
            replica.is_held = False
    deployment = state.deployments.get(gang.deployment_id)
    if deployment is not None:
        deployment.gang_attempt_count = 0
    if not gang.replica_ids:
        del state.gangs[fact.gang_id]


def fold_abandoned(state: ClusterState, fact: GangAbandoned) -> None:
    """This node's part goes back; each lease still ends by its own fact."""
    for replica_id in fact.replica_ids:
        replica = state.replicas.get(replica_id)
        if replica is not None:
            replica.is_releasing = True
            state.index.touch(replica)
    gang = state.gangs.get(fact.gang_id)
    if gang is None:
        return
    gang.replica_ids.pop(fact.node, None)
    if gang.replica_ids:
        return
    del state.gangs[fact.gang_id]
    deployment = state.deployments.get(gang.deployment_id)
    if deployment is not None:
        deployment.gang_not_before_s = fact.at_s + gang_pause_s(state.settings, deployment.gang_attempt_count)
        deployment.gang_attempt_count += 1
        deployment.problem = f"its gang was given up: {fact.reason}"
        deployment.remedy = "it is tried again after a pause"
        state.index.count(gang.deployment_id)


def gang_pause_s(settings: PlacementSettings, attempt_count: int) -> float:
    """Before the next try, after so many that were given up before this one."""
    return min(settings.gang_pause_s * 2.0 ** min(attempt_count, 32), settings.gang_pause_max_s)


def part_ended(state: ClusterState, replica: Replica, problem: str) -> None:
    """A lease of it was refused or has ended; of a gang that is not complete, so has the gang."""
    gang = state.gangs.get(replica.gang_id)
    if gang is not None and replica.is_held:
        gang.problem = gang.problem or problem

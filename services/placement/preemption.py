"""Whom to displace when nothing fits, so that one more replica does.

Only preemptible workloads go, and only

- those of strictly lower priority; of another tenant that is within its part only where the newcomer's is so too;
- those of equal priority, of another tenant, as far as that one is over its part and the newcomer's is not.

They have had their minimum runtime, and the newcomer has waited for its preemption delay. So a newcomer displaces
neither its equals nor its betters, and what was displaced cannot displace whoever took its place: it has the lower
priority, or its own tenant would be over its part. Order of harm and its reasons: docs/adr/0017.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from schemas.deployments import AntiAffinity
from schemas.placement import Victim
from services.placement.harm import Candidate, Relief, Wanted
from services.placement.occupancy import Newcomer, Occupancy, Terms
from services.placement.ranking import Taken
from services.placement.state import Claim, ClusterState, Deployment, Node, Replica
from services.placement.tenants import Standing, gpus, over_quota, standing_of, terms_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Preemption:
    """A place for one replica, and who makes room for it there."""

    node: str
    gpu_uuids: tuple[str, ...]
    request_bytes: tuple[int, ...]
    """On each of these GPUs."""
    victims: tuple[Victim, ...]
    """Every one of them is needed."""
    reason: str


def may_displace_from_s(deployment: Deployment) -> float:
    """From when on it may displace others: it has waited for free room so long."""
    return deployment.short_since_s + deployment.spec.placement.preemption_delay_s


def victims_for(
    state: ClusterState,
    deployment: Deployment,
    now_s: float,
    *,
    taken: Taken | None = None,
    without_nodes: Collection[str] = (),
    standing: Standing | None = None,
) -> Preemption | None:
    """The least harm that makes room for one more replica; None: nobody may be displaced, or waiting is enough.

    `taken`: GPUs that were decided about since the state was folded; `without_nodes`: where replicas of the same
    deployment were put since then. `standing`: of this state, where several questions are asked of it. The index
    makes it O(log GPUs) and what changed since the last question of its kind.
    """
    if now_s < may_displace_from_s(deployment) or over_quota(state, deployment):
        return None
    standing = standing_of(state) if standing is None else standing
    terms = terms_of(state, deployment, standing)
    newcomer = Newcomer.of(deployment.spec, terms)
    occupancy = state.index.occupancy
    suits = _suits(state, deployment, now_s, without_nodes)

    def accept(place: str, relief: Relief) -> bool:
        node = state.nodes[occupancy.node_of(relief.gpu_uuids[0])]
        if not suits(node, relief):
            return False
        return _leaves_enough(state, relief, terms, standing)

    relief = occupancy.least_harm(newcomer, now_s=now_s, accept=accept, taken=taken or Taken())
    if relief is None or not relief.victims:
        return None
    node = state.nodes[occupancy.node_of(relief.gpu_uuids[0])]
    victims = tuple(
        _victim(state, replica_id, candidate, deployment, terms, standing)
        for candidate in sorted(relief.victims, key=lambda c: c.holder)
        for replica_id in candidate.replica_ids
    )
    return Preemption(
        node=node.name,
        gpu_uuids=relief.gpu_uuids,
        request_bytes=_sizes(occupancy, newcomer, node, relief),
        victims=victims,
        reason=_reason(relief),
    )


def _sizes(occupancy: Occupancy, newcomer: Newcomer, node: Node, relief: Relief) -> tuple[int, ...]:
    wanted = [occupancy.wanted(node.gpus[uuid], newcomer) for uuid in relief.gpu_uuids]
    return tuple(each.request_bytes for each in wanted if isinstance(each, Wanted))


def _suits(
    state: ClusterState, deployment: Deployment, now_s: float, without_nodes: Collection[str]
) -> Callable[[Node, Relief], bool]:
    """Whether all but the GPUs' room allows a node: what `least_harm` does not know of."""
    spec = deployment.spec
    refused = deployment.refused_nodes if len(deployment.refused_nodes) >= state.settings.refusal_count else ()
    siblings: list[Replica | Claim] = [
        *state.replicas_of(deployment.deployment_id),
        *state.index.claims_of.get(deployment.deployment_id, {}).values(),
    ]
    no_gpus: set[str] = set()
    no_nodes = set(refused)
    if spec.placement.anti_affinity is AntiAffinity.NODE:
        no_nodes.update((*without_nodes, *(sibling.node for sibling in siblings)))
    elif spec.placement.anti_affinity is AntiAffinity.GPU:
        no_gpus.update(uuid for sibling in siblings for uuid in sibling.gpu_uuids)

    def suits(node: Node, relief: Relief) -> bool:
        if not node.is_open(now_s) or node.name in no_nodes or not no_gpus.isdisjoint(relief.gpu_uuids):
            return False
        gone = {replica_id for victim in relief.victims for replica_id in victim.replica_ids}
        staying = [r for r in state.on_node(node.name) if r.replica_id not in gone and not r.is_releasing]
        if spec.host.cpu_millicores:
            used = sum(replica.cpu_millicores for replica in staying)
            if node.cpu_millicores is None or used + spec.host.cpu_millicores > node.cpu_millicores:
                return False
        if spec.host.memory_bytes:
            used = sum(replica.memory_bytes for replica in staying)
            if node.memory_bytes is None or used + spec.host.memory_bytes > node.memory_bytes:
                return False
        if spec.swap.is_parkable:
            parked = sum(replica.weights_bytes for replica in staying if replica.is_parkable)
            return parked + spec.engine.weights_bytes <= node.host_budget_bytes
        return True

    return suits


def _leaves_enough(state: ClusterState, relief: Relief, terms: Terms, standing: Standing) -> bool:
    """Whether each tenant that is taken from because it is over its part is so before each of its victims goes."""
    if not standing.parts:
        return True
    taken: dict[str, list[int]] = {}
    occupancy = state.index.occupancy
    for candidate in relief.victims:
        if terms.needs_over(tenant=candidate.tenant, priority=candidate.priority):
            replicas = [state.replicas[replica_id] for replica_id in candidate.replica_ids]
            parts = sum(
                occupancy.parts_of(replica.gpu_uuids, [share.request_bytes for share in replica.shares])
                for replica in replicas
            )
            taken.setdefault(candidate.tenant, []).append(parts)
    return all(sum(parts) - max(parts) < standing.over_parts(tenant) for tenant, parts in taken.items())


def _victim(
    state: ClusterState,
    replica_id: str,
    candidate: Candidate,
    newcomer: Deployment,
    terms: Terms,
    standing: Standing,
) -> Victim:
    replica = state.replicas[replica_id]
    deployment = state.deployments.get(replica.deployment_id)
    model = deployment.spec.name if deployment is not None else replica.deployment_id
    if terms.needs_over(tenant=candidate.tenant, priority=candidate.priority):
        over = gpus(standing.over_parts(candidate.tenant))
        reason = f"its tenant {candidate.tenant} holds {over} GPUs more than its part, and may be preempted"
    else:
        reason = f"priority {replica.priority} is below {newcomer.spec.priority_number}, and it may be preempted"
    if len(candidate.replica_ids) > 1:
        reason += "; its gang ends as a whole"
    return Victim(
        replica_id=replica_id,
        deployment_id=replica.deployment_id,
        model=model,
        tenant=replica.tenant,
        priority=replica.priority,
        freed_bytes=replica.request_bytes,
        reason=reason,
    )


def _reason(relief: Relief) -> str:
    count = relief.harm.ended_count
    return f"{count} {'replica' if count == 1 else 'replicas'}, the least harm of all places"

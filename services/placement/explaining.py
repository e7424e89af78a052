"""Why a model is where it is, why it is not elsewhere, who gave way, and what would help."""

from collections.abc import Sequence
from typing import Final

from schemas.abilities import told
from schemas.deployments import DeploymentSpec, SwapDriver
from schemas.placement import Alternative, Constraint
from schemas.queries import Explain, Explanation
from services.placement.choosing import Choice, NoChoice, choose
from services.placement.core import SERVICE
from services.placement.observed import latest_s
from services.placement.remedies import ways_out
from services.placement.state import ClusterState, Move, Replica
from services.placement.verdicts import ALTERNATIVES_MAX, constraints_of, objections
from services.placement.views import deployment_view, gpu_indices, victims_seen_by

REPLICAS_TOLD_MAX: Final = 4
"""Of a deployment with many replicas so many are told one by one."""


@SERVICE.answering(Explain)
def explain(state: ClusterState, query: Explain, tenant: str) -> Explanation:
    """The decisions' own records, and what would be decided about one more replica now.

    O(nodes x GPUs), when somebody asks; a decision itself counts nothing of this unless it fails.
    """
    deployment = state.named(tenant, query.model)
    if deployment is None:
        return Explanation(is_known=False, model=query.model, summary=f"there is no deployment '{query.model}'")
    replicas = state.replicas_of(deployment.deployment_id)
    is_short = len(replicas) < deployment.replica_count
    now_s = latest_s(state.observed, state.nodes.values())
    with state.index.rooms.trial(is_supposed=True):
        now = choose(state, deployment.spec, now_s=now_s, deployment_id=deployment.deployment_id)
    alternatives, constraints = _against(state, deployment.deployment_id, now_s)
    if replicas:
        summary = _summary(state, replicas)
    elif deployment.replica_count == 0:
        summary = "cold: scaled to zero, started by the next request"
    else:
        summary = f"not placed: {deployment.problem}"
    codes = tuple(dict.fromkeys(code for replica in replicas for code in replica.codes))
    return Explanation(
        is_known=True,
        model=query.model,
        summary=summary,
        alternatives=alternatives,
        remedy=deployment.remedy if is_short else "",
        deployment=deployment_view(state, deployment),
        codes=deployment.codes if is_short and deployment.codes else codes,
        policy=state.settings.policy,
        constraints=constraints,
        one_more=_one_more(state, now),
        engine=_engine(state, deployment.spec, replicas),
        displaced=victims_seen_by(tenant, deployment.displaced),
        displaced_by=deployment.displaced_by,
        moves=tuple(
            _moving(state, move) for move in state.moves.values() if move.deployment_id == deployment.deployment_id
        ),
        ways=ways_out(state, tenant, deployment.spec, now, now_s=now_s, deployment_id=deployment.deployment_id)
        if isinstance(now, NoChoice)
        else (),
    )


def _summary(state: ClusterState, replicas: Sequence[Replica]) -> str:
    parts = [_why(state, replica) for replica in replicas[:REPLICAS_TOLD_MAX]]
    rest = len(replicas) - len(parts)
    return "; ".join([*parts, *([f"and {rest} more"] if rest else [])])


def _against(
    state: ClusterState, deployment_id: str, now_s: float
) -> tuple[tuple[Alternative, ...], tuple[Constraint, ...]]:
    """(the nearest GPUs that would not do, all reasons counted), for one more replica as things are now."""
    demand = state.index.demand_of(deployment_id, state.deployments[deployment_id].spec)
    against = objections(state, demand, now_s)
    return tuple(against[:ALTERNATIVES_MAX]), constraints_of(against)


def _engine(state: ClusterState, spec: DeploymentSpec, replicas: Sequence[Replica]) -> tuple[str, ...]:
    """On the GPUs of its first replica; without one, what its kind can do anywhere."""
    offered: tuple[tuple[SwapDriver, ...], ...] = ()
    for replica in replicas[:1]:
        node = state.nodes.get(replica.node)
        if node is not None:
            offered = tuple(node.gpus[uuid].swap_drivers for uuid in replica.gpu_uuids if uuid in node.gpus)
    return told(spec.engine, offered or ((),))


def _one_more(state: ClusterState, now: Choice | NoChoice) -> str:
    if isinstance(now, NoChoice):
        return now.message
    gpus = ", ".join(f"gpu{index}" for index in gpu_indices(state, now.node, now.gpu_uuids))
    return f"would go to {now.node}/{gpus}, {now.reason}"


def _moving(state: ClusterState, move: Move) -> str:
    replacement = state.replicas.get(move.replacement_id)
    there = f" to {replacement.node}; {move.replacement_id} there is {replacement.state}" if replacement else ""
    return f"{move.replica_id} moves{there}"


def _why(state: ClusterState, replica: Replica) -> str:
    problem = f" ({replica.problem})" if replica.problem else ""
    gpus = "+".join(f"gpu{index}" for index in gpu_indices(state, replica.node, replica.gpu_uuids))
    return f"{replica.state}{problem} on {replica.node}/{gpus}, chosen as {replica.reason}"

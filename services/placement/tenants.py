"""What each tenant is guaranteed, its part of what others leave, and who is tried first.

A tenant's use is the sum of the requested portions of its GPUs. Without any quota there is nothing to divide: priority
and age decide. With quotas a tenant's *part* is its quota, as far as it wants that, and of what is left then a share by
its over-quota weight (progressive filling). All in whole parts of a GPU (`PARTS`), so that every reader agrees.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from heapq import heapify, heappop, heapreplace
from math import inf

from schemas.deployments import DeploymentSpec
from schemas.placement import QuotaSet
from services.placement.demands import base_bytes, exact
from services.placement.folds import fold_command
from services.placement.occupancy import Terms
from services.placement.packing.fleet import PARTS
from services.placement.state import ClusterState, Deployment, Quota


def fold_quota(state: ClusterState, fact: QuotaSet) -> None:
    """The quota as it is from now on; no limit and a weight of 1 is what a tenant has that was never named."""
    fold_command(state, fact)
    if fact.gpu_quota is None and fact.over_quota_weight == 1.0:
        state.quotas.pop(fact.quota_tenant, None)
        return
    state.quotas[fact.quota_tenant] = Quota(
        tenant=fact.quota_tenant,
        parts=None if fact.gpu_quota is None else round(fact.gpu_quota * PARTS),
        over_quota_weight=fact.over_quota_weight,
    )


# --- Dividing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What one tenant wants, in parts of GPUs."""

    tenant: str
    wanted_parts: int
    """What it holds, and what its waiting workloads ask for."""
    quota_parts: int
    weight: float


def divided(capacity_parts: int, demands: Iterable[Demand]) -> dict[str, int]:
    """{tenant: its part}: quotas first, what is left then by weight; nobody gets more than it wants.

    Where even quotas exceed the capacity, it is divided by them. The sum is the capacity, or all that is wanted (by
    tenants with a weight) where that is less, but for roundings of a part for each tenant.
    """
    ordered = sorted(demands, key=lambda demand: demand.tenant)
    guaranteed = _filled(
        capacity_parts,
        {d.tenant: min(d.wanted_parts, d.quota_parts) for d in ordered},
        {d.tenant: Fraction(d.quota_parts) for d in ordered},
    )
    more = _filled(
        capacity_parts - sum(guaranteed.values()),
        {d.tenant: d.wanted_parts - guaranteed[d.tenant] for d in ordered},
        {d.tenant: Fraction(d.weight) for d in ordered},
    )
    return {tenant: parts + more[tenant] for tenant, parts in guaranteed.items()}


def _filled(amount: int, limits: Mapping[str, int], weights: Mapping[str, Fraction]) -> dict[str, int]:
    """The amount divided by weight, nobody above its limit; who is full leaves the rest to the others.

    Whoever is full first is served first, so that one pass is enough.
    """
    result = dict.fromkeys(limits, 0)
    active = [tenant for tenant in limits if limits[tenant] > 0 and weights[tenant] > 0]
    active.sort(key=lambda tenant: (limits[tenant] / weights[tenant], tenant))
    weight_left = sum((weights[tenant] for tenant in active), Fraction(0))
    for tenant in active:
        result[tenant] = min(limits[tenant], int(amount * weights[tenant] / weight_left))
        amount -= result[tenant]
        weight_left -= weights[tenant]
    return result


# --- Where tenants stand ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What tenants hold and what is theirs, at one moment."""

    parts: Mapping[str, int]
    """{tenant: its part}; empty where there are no quotas."""
    used: Mapping[str, int]
    over: tuple[str, ...]
    """Those who hold more than their part, the one that is over most first."""

    def over_parts(self, tenant: str) -> int:
        return self.used.get(tenant, 0) - self.parts.get(tenant, 0)

    def is_within(self, tenant: str, ask_parts: int) -> bool:
        """Whether the tenant stays within its part with so much more."""
        return not self.parts or self.used.get(tenant, 0) + ask_parts <= self.parts.get(tenant, 0)


def standing_of(state: ClusterState) -> Standing:
    """O(1) without quotas, else O(tenants + nodes + waiting deployments)."""
    if not state.quotas:
        return Standing(parts={}, used={}, over=())
    occupancy = state.index.occupancy
    used = {tenant: occupancy.used_parts(tenant) for tenant in occupancy.tenants()}
    wanted = dict(used)
    largest_bytes = largest_gpu_bytes(state)
    for deployment_id in state.waiting:
        deployment = state.deployments[deployment_id]
        lacking = deployment.replica_count - state.placed_count(deployment_id)
        parts = lacking * ask_parts(deployment.spec, largest_bytes)
        wanted[deployment.tenant] = wanted.get(deployment.tenant, 0) + parts
    demands = [
        Demand(
            tenant=tenant,
            wanted_parts=parts,
            quota_parts=(quota.parts or 0) if (quota := state.quotas.get(tenant)) is not None else 0,
            weight=quota.over_quota_weight if quota is not None else 1.0,
        )
        for tenant, parts in wanted.items()
    ]
    capacity_parts = PARTS * sum(len(node.gpus) for node in state.nodes.values() if node.lost_at_s is None)
    parts_of = divided(capacity_parts, demands)
    over = [tenant for tenant in used if used[tenant] > parts_of[tenant]]
    over.sort(key=lambda tenant: (parts_of[tenant] - used[tenant], tenant))
    return Standing(parts=parts_of, used=used, over=tuple(over))


def largest_gpu_bytes(state: ClusterState) -> int:
    """What portions of the largest GPU are of; 0 where there is none."""
    return max((base_bytes(gpu) for node in state.nodes.values() for gpu in node.gpus.values()), default=0)


def ask_parts(spec: DeploymentSpec, gpu_bytes: int) -> int:
    """What one replica asks for, in parts of GPUs of that size: the least that it will be."""
    share = spec.share
    if share.request_portion is not None:
        return share.gpu_count * int(exact(share.request_portion) * PARTS)
    return share.gpu_count * ((share.request_bytes or 0) * PARTS // gpu_bytes if gpu_bytes else PARTS)


def most_parts(state: ClusterState, spec: DeploymentSpec) -> int:
    """What one replica takes at most, in parts of GPUs: bytes are a part of the smallest GPU that has so many."""
    size_bytes = spec.share.request_bytes
    if size_bytes is None:
        return ask_parts(spec, 0)
    sizes = {base_bytes(gpu) for node in state.nodes.values() for gpu in node.gpus.values()}
    return ask_parts(spec, min((size for size in sizes if size >= size_bytes), default=0))


def terms_of(state: ClusterState, deployment: Deployment, standing: Standing) -> Terms:
    """Whom a replica of it may displace."""
    is_within = not standing.parts or standing.is_within(
        deployment.tenant, ask_parts(deployment.spec, largest_gpu_bytes(state))
    )
    return Terms(
        priority=deployment.spec.priority_number,
        tenant=deployment.tenant if state.quotas else "",
        is_within=is_within,
        over=standing.over,
        has_quotas=bool(state.quotas),
    )


# --- Quotas -----------------------------------------------------------------------------------------------------------


def quota_of(state: ClusterState, tenant: str) -> tuple[float | None, float]:
    """(GPUs, None for no limit; over-quota weight), as they were set."""
    quota = state.quotas.get(tenant)
    if quota is None:
        return None, 1.0
    return None if quota.parts is None else quota.parts / PARTS, quota.over_quota_weight


def quota_left_parts(state: ClusterState, tenant: str) -> int | None:
    """What is left of a tenant's quota for workloads that are never preempted; None: no limit."""
    quota = state.quotas.get(tenant)
    if quota is None or quota.parts is None:
        return None
    return quota.parts - state.index.occupancy.fixed_parts(tenant)


def over_quota(state: ClusterState, deployment: Deployment, *, replica_count: int = 1, decided_parts: int = 0) -> str:
    """Why the tenant's quota rules out so many more replicas of it, with what is left; empty when it does not.

    Only workloads that are never preempted are bound by it: what is over quota can be taken back. `decided_parts`: of
    such workloads of the tenant, decided since the state was folded.
    """
    if deployment.spec.may_be_preempted:
        return ""
    left_parts = quota_left_parts(state, deployment.tenant)
    if left_parts is None:
        return ""
    left_parts -= decided_parts
    asked = replica_count * most_parts(state, deployment.spec)
    if asked <= left_parts:
        return ""
    quota = state.quotas[deployment.tenant].parts or 0
    return (
        f"{deployment.spec.name} asks for {gpus(asked)} GPUs that are never taken back, and of the quota of tenant "
        f"{deployment.tenant}, {gpus(quota)} GPUs, {gpus(max(0, left_parts))} are left"
    )


OVER_QUOTA_REMEDY = "make it preemptible, retire or scale down another workload, or ask the operator for a larger quota"


def gpus(parts: int) -> str:
    """Parts as a number of GPUs."""
    return f"{parts / PARTS:.2f}".rstrip("0").rstrip(".")


# --- Order ------------------------------------------------------------------------------------------------------------


def order_of(state: ClusterState, deployments: Iterable[Deployment]) -> list[Deployment]:
    """Who is tried first.

    Without quotas: the highest priority, then the longest wish, ties by id. With quotas priority orders within a
    tenant, and between tenants the one comes first that holds the smallest part of what is its own, counting what was
    put before it in this order; ties by name. O(n log n).
    """
    by_urgency = sorted(deployments, key=_urgency)
    if not state.quotas:
        return by_urgency
    standing = standing_of(state)
    largest_bytes = largest_gpu_bytes(state)
    queues: dict[str, list[Deployment]] = {}
    for deployment in reversed(by_urgency):
        queues.setdefault(deployment.tenant, []).append(deployment)
    used = {tenant: standing.used.get(tenant, 0) for tenant in queues}

    def turn(tenant: str) -> tuple[float | Fraction, str]:
        part = standing.parts.get(tenant, 0)
        return (Fraction(used[tenant], part) if part else inf, tenant)

    turns = [turn(tenant) for tenant in queues]
    heapify(turns)
    result = []
    while turns:
        tenant = turns[0][1]
        deployment = queues[tenant].pop()
        result.append(deployment)
        used[tenant] += ask_parts(deployment.spec, largest_bytes)
        if queues[tenant]:
            heapreplace(turns, turn(tenant))
        else:
            heappop(turns)
    return result


def _urgency(deployment: Deployment) -> tuple[int, float, str]:
    return (-deployment.spec.priority_number, deployment.admitted_at_s, deployment.deployment_id)

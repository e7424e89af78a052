"""What would become of wishes, answered by the same decisions that would be taken, and without taking any.

The first wish is decided on the fleet as it is, each next one on top of those before it. A plan is no reservation.
"""

from dataclasses import dataclass, field

from schemas.deployments import DeploymentSpec, problems_of
from schemas.placement import ReasonCode
from schemas.queries import (
    FreedGpu,
    Plan,
    PlanDeployments,
    PlannedDeployment,
    PlannedMove,
    PlannedReplica,
    PlanRepack,
    PlanVerdict,
    RepackPlan,
)
from services.placement import repacking
from services.placement.choosing import Choice, NoChoice, choose
from services.placement.core import SERVICE
from services.placement.defragment import Step
from services.placement.observed import latest_s
from services.placement.preemption import Preemption, victims_for
from services.placement.ranking import Taken
from services.placement.remedies import ways_out
from services.placement.state import ClusterState, Deployment
from services.placement.tenants import OVER_QUOTA_REMEDY, ask_parts, gpus, largest_gpu_bytes, quota_left_parts
from services.placement.views import gpu_indices, victims_seen_by

REPLICAS_MAX = 4096
"""Of one plan: a question is answered while others wait."""


@SERVICE.answering(PlanDeployments)
def plan_deployments(state: ClusterState, query: PlanDeployments, tenant: str) -> Plan:
    planning = _Planning(state, tenant)
    with state.index.rooms.trial(is_supposed=True):
        planned = tuple(planning.plan(spec) for spec in query.deployments)
    return Plan(
        deployments=planned,
        has_room_for_all=all(not each.problem for each in planned),
        as_of_seq=state.inbox_seq,
    )


@SERVICE.answering(PlanRepack)
def plan_repack(state: ClusterState, query: PlanRepack, tenant: str) -> RepackPlan:
    """By the search that the command uses. O(replicas)."""
    if tenant != state.settings.operator_tenant:
        problem = f"only the operator's tenant ('{state.settings.operator_tenant}') may ask for moves"
        return RepackPlan(problem=problem, as_of_seq=state.inbox_seq)
    newest_s = [replica.ready_at_s or replica.since_s for replica in state.replicas.values()]
    now_s = max([latest_s(state.observed, state.nodes.values()), *newest_s])
    plan = repacking.planned(state, move_count_max=query.move_count_max, now_s=now_s)
    uuids = state.index.rooms.gpu_uuids
    freed = [(node, uuids[node][index]) for node, index in plan.freed]
    return RepackPlan(
        moves=tuple(_planned_move(state, step) for step in plan.steps),
        freed=tuple(
            FreedGpu(node=node, gpu_uuid=uuid, gpu_index=gpu_indices(state, node, (uuid,))[0]) for node, uuid in freed
        ),
        as_of_seq=state.inbox_seq,
    )


def _planned_move(state: ClusterState, step: Step) -> PlannedMove:
    replica, place = state.replicas[step.occupant.replica_id], step.place
    uuids = [state.index.rooms.gpu_uuids[place.node][index] for index in place.gpu_indices]
    return PlannedMove(
        replica_id=replica.replica_id,
        model=state.deployments[replica.deployment_id].spec.name,
        tenant=replica.tenant,
        from_node=replica.node,
        from_gpu_indices=gpu_indices(state, replica.node, replica.gpu_uuids),
        to_node=place.node,
        to_gpu_indices=gpu_indices(state, place.node, uuids),
        moved_bytes=step.occupant.moved_bytes,
        is_serving=step.occupant.is_serving,
    )


@dataclass(slots=True)
class _Planning:
    """One plan on its way: what was put where so far is booked in the numbers."""

    state: ClusterState
    tenant: str
    touched_gpus: set[str] = field(default_factory=set)
    """Where the plan has put something, or others would give way: nobody is displaced there for a later wish, since
    who could be displaced is known of the fleet as it is."""
    fixed_parts: int = 0
    """What earlier wishes of the plan take of the tenant's quota for good."""
    left_count: int = REPLICAS_MAX

    def plan(self, spec: DeploymentSpec) -> PlannedDeployment:
        if problems := problems_of(spec):
            return PlannedDeployment(
                model=spec.name,
                verdict=PlanVerdict.REJECTED,
                wanted_count=spec.replica_count,
                problem=" ".join(problems),
                remedy="correct the wish; nothing of it is admitted",
            )
        present = self.state.named(self.tenant, spec.name)
        if present is not None and present.spec == spec:
            return self._present(present)
        verdict = PlanVerdict.NEW if present is None else PlanVerdict.REPLACED
        return self._placed(spec, verdict)

    def _present(self, present: Deployment) -> PlannedDeployment:
        replicas = tuple(
            PlannedReplica(
                node=replica.node,
                gpu_uuids=replica.gpu_uuids,
                gpu_indices=gpu_indices(self.state, replica.node, replica.gpu_uuids),
                request_bytes=tuple(share.request_bytes for share in replica.shares),
                codes=replica.codes,
                reason=replica.reason,
            )
            for replica in self.state.replicas_of(present.deployment_id)
            if not replica.is_releasing
        )
        lacks = len(replicas) < present.replica_count
        return PlannedDeployment(
            model=present.spec.name,
            verdict=PlanVerdict.UNCHANGED,
            wanted_count=present.replica_count,
            replicas=replicas,
            problem=present.problem if lacks else "",
            remedy=present.remedy if lacks else "",
            codes=present.codes if lacks else (),
            constraints=present.constraints if lacks else (),
        )

    def _placed(self, spec: DeploymentSpec, verdict: PlanVerdict) -> PlannedDeployment:
        """Replica after replica, as placement would; of a gang that is not complete nothing is placed."""
        replicas: list[PlannedReplica] = []
        problem: NoChoice | None = None
        ways: tuple[str, ...] = ()
        touched_before = set(self.touched_gpus)
        over_quota = self._over_quota(spec)
        with self.state.index.rooms.attempt() as keeps:
            chosen: list[Choice] = []
            while not over_quota and len(replicas) < spec.replica_count and self.left_count > 0:
                self.left_count -= 1
                found = self._one(spec, chosen)
                if isinstance(found, NoChoice):
                    problem = found
                    ways = self._ways(spec, found, chosen)
                    break
                replicas.append(found)
            if problem is None or not spec.placement.is_gang:
                keeps.append(True)
        fit_count = len(replicas)
        if problem is not None and spec.placement.is_gang:
            replicas, self.touched_gpus = [], touched_before
        text, remedy = self._told(spec, problem, over_quota, fit_count)
        return PlannedDeployment(
            model=spec.name,
            verdict=verdict,
            wanted_count=spec.replica_count,
            replicas=tuple(replicas),
            problem=text,
            remedy=remedy,
            missing_bytes=problem.missing_bytes if problem is not None else 0,
            codes=(ReasonCode.OVER_QUOTA,) if over_quota else problem.codes if problem is not None else (),
            constraints=problem.constraints if problem is not None else (),
            ways=ways,
        )

    def _ways(self, spec: DeploymentSpec, problem: NoChoice, chosen: list[Choice]) -> tuple[str, ...]:
        now_s = latest_s(self.state.observed, self.state.nodes.values())
        return ways_out(self.state, self.tenant, spec, problem, now_s=now_s, besides=chosen)

    def _told(self, spec: DeploymentSpec, problem: NoChoice | None, over_quota: str, fit_count: int) -> tuple[str, str]:
        """(problem, remedy); both empty when every replica has its place."""
        if over_quota:
            return over_quota, OVER_QUOTA_REMEDY
        if problem is not None:
            together = "" if spec.replica_count == 1 else f"{fit_count} of {spec.replica_count} replicas fit: "
            return f"{together}{problem.message}", problem.remedy
        if fit_count < spec.replica_count:
            return f"a plan looks at {REPLICAS_MAX} replicas at most", "plan fewer wishes at once"
        return "", ""

    def _one(self, spec: DeploymentSpec, chosen: list[Choice]) -> PlannedReplica | NoChoice:
        """A free place, or one that others would give, or why there is none. It is booked at once."""
        state, now_s = self.state, latest_s(self.state.observed, self.state.nodes.values())
        choice = choose(state, spec, now_s=now_s, besides=chosen)
        if isinstance(choice, Choice):
            chosen.append(choice)
            self.touched_gpus.update(choice.gpu_uuids)
            state.index.rooms.book("", state.index.demand_of("", spec), choice.place)
            return PlannedReplica(
                node=choice.node,
                gpu_uuids=choice.gpu_uuids,
                gpu_indices=gpu_indices(self.state, choice.node, choice.gpu_uuids),
                request_bytes=choice.request_bytes,
                codes=choice.codes,
                reason=choice.reason,
            )
        made = victims_for(state, self._wish(spec, now_s), now_s, taken=Taken(gpus=self.touched_gpus))
        return choice if made is None else self._by_preemption(made)

    def _by_preemption(self, made: Preemption) -> PlannedReplica:
        self.touched_gpus.update(made.gpu_uuids)
        return PlannedReplica(
            node=made.node,
            gpu_uuids=made.gpu_uuids,
            gpu_indices=gpu_indices(self.state, made.node, made.gpu_uuids),
            request_bytes=made.request_bytes,
            codes=(ReasonCode.ROOM_BY_PREEMPTION,),
            reason=made.reason,
            victims=victims_seen_by(self.tenant, made.victims),
        )

    def _wish(self, spec: DeploymentSpec, now_s: float) -> Deployment:
        """As if it had waited for its preemption delay: a plan says what would happen in the end."""
        return Deployment(
            deployment_id="",
            tenant=self.tenant,
            spec=spec,
            admitted_at_s=now_s,
            revision_count=1,
            replica_count=spec.replica_count,
            short_since_s=now_s - spec.placement.preemption_delay_s,
        )

    def _over_quota(self, spec: DeploymentSpec) -> str:
        """Why the tenant's quota has not so much left for what is never preempted, all replicas together."""
        if spec.may_be_preempted:
            return ""
        asked = spec.replica_count * ask_parts(spec, largest_gpu_bytes(self.state))
        left = quota_left_parts(self.state, self.tenant)
        if left is not None and asked > left - self.fixed_parts:
            rest = gpus(max(0, left - self.fixed_parts))
            return f"{spec.name} asks for {gpus(asked)} GPUs for good, and of the tenant's quota {rest} are left"
        self.fixed_parts += asked
        return ""

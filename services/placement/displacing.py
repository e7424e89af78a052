"""One input's decisions about whom to displace, and about quotas; each knows of those before it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kit.outcomes import Context, Outcome
from schemas.deployments import AntiAffinity
from schemas.placement import FailureReason, ReasonCode
from services.placement import claims
from services.placement.choosing import Choice, NoChoice
from services.placement.packing.fleet import Place
from services.placement.preemption import Preemption, may_displace_from_s, victims_for
from services.placement.ranking import Taken
from services.placement.state import ClusterState, Deployment
from services.placement.tenants import OVER_QUOTA_REMEDY, Standing, most_parts, over_quota, standing_of


class Displacing:
    """Within one input."""

    def __init__(self, state: ClusterState, ctx: Context) -> None:
        self._state = state
        self._ctx = ctx
        self._standing: Standing | None = None
        self._hopeless: set[tuple[object, ...]] = set()
        """Kinds of newcomers that may displace nobody."""
        self._kept_parts: dict[str, int] = {}
        """{tenant: parts of what was decided here and is never preempted}"""
        self.spoken_for: set[str] = set()
        """GPUs that were decided about, of which the state does not know yet."""
        self.outcomes: list[Outcome] = []
        self._turn = object()
        """Changes when GPUs are no longer spoken for."""

    @property
    def is_over(self) -> bool:
        """With quotas each preemption changes who is over his part, so that the next one waits for its fold."""
        return bool(self._state.quotas and self.outcomes)

    def book(self, deployment: Deployment, choice: Choice) -> None:
        """A place was chosen for it."""
        self.spoken_for.update(choice.gpu_uuids)
        self._keep(deployment)

    def _keep(self, deployment: Deployment) -> None:
        if self._state.quotas and not deployment.spec.may_be_preempted:
            parts = most_parts(self._state, deployment.spec)
            self._kept_parts[deployment.tenant] = self._kept_parts.get(deployment.tenant, 0) + parts

    def over_quota(self, deployment: Deployment, replica_count: int = 1) -> NoChoice | None:
        """Why its tenant's quota rules out so many more replicas of it."""
        kept_parts = self._kept_parts.get(deployment.tenant, 0)
        message = over_quota(self._state, deployment, replica_count=replica_count, decided_parts=kept_parts)
        if not message:
            return None
        return NoChoice(
            reason=FailureReason.OVER_QUOTA,
            message=message,
            missing_bytes=0,
            remedy=OVER_QUOTA_REMEDY,
            codes=(ReasonCode.OVER_QUOTA,),
        )

    def is_hopeless(self, deployment: Deployment) -> bool:
        """One like it was asked for in this input, and may displace nobody."""
        return self._kind(deployment) in self._hopeless

    def _kind(self, deployment: Deployment) -> tuple[object, ...]:
        spec = deployment.spec
        return (
            self._state.index.demand_of(deployment.deployment_id, spec),
            spec.priority_number,
            deployment.tenant if self._state.quotas else "",
            may_displace_from_s(deployment) <= self._ctx.now_s,
            deployment.deployment_id if spec.placement.anti_affinity is not AntiAffinity.NONE else "",
            deployment.refused_nodes,
        )

    def displace(self, deployment: Deployment, choice: NoChoice, replica_id: str, besides: Sequence[Choice]) -> bool:
        """Whether somebody gives way for one more replica of it; if so it is decided."""
        found = self._victims(deployment, choice, besides)
        if found is None:
            return False
        self._decide(deployment, [(replica_id, found)])
        return True

    def _victims(self, deployment: Deployment, choice: NoChoice, besides: Sequence[Choice]) -> Preemption | None:
        """Within the rooms' trial, where its room is booked."""
        kind = self._kind(deployment)
        if choice.reason is FailureReason.OVER_QUOTA or kind in self._hopeless:
            return None
        if self._standing is None:
            self._standing = standing_of(self._state)
        found = victims_for(
            self._state,
            deployment,
            self._ctx.now_s,
            taken=Taken(gpus=self.spoken_for, turn=self._turn),
            without_nodes={other.node for other in besides},
            standing=self._standing,
        )
        if found is None:
            self._hopeless.add(kind)
        else:
            self._claim(deployment, found)
        return found

    def _claim(self, deployment: Deployment, found: Preemption) -> None:
        """Nobody who is decided after it in this input gets that room."""
        rooms = self._state.index.rooms
        positions = rooms.positions[found.node]
        place = Place(found.node, tuple(positions[uuid] for uuid in found.gpu_uuids), found.request_bytes)
        demand = self._state.index.demand_of(deployment.deployment_id, deployment.spec)
        rooms.book(deployment.deployment_id, demand, place)
        self.spoken_for.update(gpus_of(self._state, found))

    def _decide(self, deployment: Deployment, found: Sequence[tuple[str, Preemption]]) -> None:
        for replica_id, preemption in found:
            self.outcomes += claims.decided(self._state, deployment, preemption, replica_id=replica_id, ctx=self._ctx)
            self._keep(deployment)

    @contextmanager
    def attempt(self) -> Iterator["_Attempt"]:
        """For several replicas, all of which must find room; nothing is decided before `keep`."""
        kept_parts = dict(self._kept_parts)
        spoken_for = set(self.spoken_for)
        attempt = _Attempt(self)
        yield attempt
        if not attempt.is_kept:
            self._kept_parts, self.spoken_for, self._turn = kept_parts, spoken_for, object()


class _Attempt:
    def __init__(self, displacing: Displacing) -> None:
        self._displacing = displacing
        self.is_kept = False

    def victims(self, deployment: Deployment, choice: NoChoice, besides: Sequence[Choice]) -> Preemption | None:
        """Who gives way for one more of them, beside those before."""
        return self._displacing._victims(deployment, choice, besides)

    def keep(self, deployment: Deployment, found: Sequence[tuple[str, Preemption]]) -> None:
        """All of them are decided."""
        self.is_kept = True
        self._displacing._decide(deployment, found)


def gpus_of(state: ClusterState, preemption: Preemption) -> set[str]:
    """The GPUs that it changes: the newcomer's, and all of its victims'."""
    victims = [state.replicas[victim.replica_id] for victim in preemption.victims]
    return {*preemption.gpu_uuids, *(uuid for victim in victims for uuid in victim.gpu_uuids)}


def free_room(choice: Choice) -> Preemption:
    """Room that is there, to be kept until all of a gang has room."""
    return Preemption(
        node=choice.node,
        gpu_uuids=choice.gpu_uuids,
        request_bytes=choice.request_bytes,
        victims=(),
        reason="free, and kept until the others of its gang have room",
    )

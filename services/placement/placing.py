"""Missing replicas become proposals, grouped by node; what fits nowhere is explained once, and tried when room grows.

Everything that is due is decided in one input, up to a bound: replicas are booked in the numbers as they are decided,
and the folds of the proposals book them again. `PlaceNext` asks for it; whoever makes room, or a wish, hands it over.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from kit.outcomes import Context, Input, Outcome, Timer
from schemas.placement import (
    PlacementFailed,
    PlacementProposed,
    PreemptionEnded,
    ReasonCode,
    ReleaseProposed,
    ReplicaProposal,
)
from services.placement import claims, gangs, presence
from services.placement.choosing import Choice, NoChoice, choose, no_choice
from services.placement.displacing import Displacing, free_room
from services.placement.gangs import PlaceNext
from services.placement.preemption import Preemption
from services.placement.state import ClusterState, Deployment, Replica
from services.placement.tenants import order_of


def place_soon(state: ClusterState, ctx: Context) -> list[Timer]:
    """Have everything placed that is due, in an input of its own, together with what comes at the same time."""
    return [next_turn(ctx)] if state.index.has_due(ctx.now_s) else []


def next_turn(ctx: Context) -> Timer:
    return Timer(due_s=ctx.now_s, input=PlaceNext())


def place_missing(state: ClusterState, ctx: Context, *, is_look: bool = False) -> list[Outcome]:
    """Proposals for all that is due, or as much of it as one input may decide; reasons for what fits nowhere.

    `is_look`: now and then, ask also for what is told already that it fits nowhere. Time alone may let it displace
    somebody: its delay is over, or another's minimum runtime is.
    """
    index = state.index
    rooms = index.rooms
    rooms.open_until(ctx.now_s, state.nodes)
    due = index.awake(ctx.now_s) if is_look else index.due(ctx.now_s)
    if not due and not index.unsettled and not (is_look and state.claims):
        return []
    turn = _Turn(state, ctx, is_look=is_look)
    turn.settle_claims()
    with rooms.trial():
        if is_look:
            turn.look_elsewhere()
        for deployment in order_of(state, due):
            if turn.is_over:
                turn.later_s.append(ctx.now_s)
                break
            turn.place(deployment)
    return turn.outcomes()


@dataclass(slots=True)
class _Group:
    """What one proposal will say."""

    choice: Choice
    gang_id: str
    replicas: list[ReplicaProposal] = field(default_factory=list)
    refusal_count: int = 0


class _Turn:
    """One input's decisions."""

    def __init__(self, state: ClusterState, ctx: Context, *, is_look: bool) -> None:
        self._state = state
        self._ctx = ctx
        self._is_look = is_look
        self._displacing = Displacing(state, ctx)
        self._ended: list[PreemptionEnded] = []
        self._groups: dict[tuple[str, ...], _Group] = {}
        self._failures: list[PlacementFailed] = []
        self._decided_count = 0
        self.later_s: list[float] = []
        """When to place again."""

    @property
    def is_over(self) -> bool:
        return self._displacing.is_over or self._decided_count >= self._state.settings.placed_per_input_count

    def settle_claims(self) -> None:
        """Newcomers whose room is there are proposed there; claims that have lost their sense end."""
        for claim, found in claims.settled(self._state, self._ctx):
            deployment = self._state.deployments.get(claim.deployment_id)
            is_gang = deployment is not None and deployment.spec.placement.is_gang
            if self.is_over and not is_gang:  # All newcomers of a gang are proposed together.
                self.later_s.append(self._ctx.now_s)
                continue
            self._decided_count += 1
            if isinstance(found, Choice):
                assert deployment is not None, claim.deployment_id
                self._propose(deployment, found, claim.replica_id, gangs.id_of(deployment) if is_gang else "")
                self._displacing.spoken_for.update(found.gpu_uuids)
            reason = found if isinstance(found, str) else f"{claim.replica_id} is proposed there"
            self._ended.append(claims.ended(claim, reason, self._ctx))
            self.later_s.append(self._ctx.now_s)

    def look_elsewhere(self) -> None:
        """The oldest claim whose victims are still there gives it up if there is room elsewhere; one in each look."""
        for claim in self._state.claims.values():
            deployment = self._state.deployments.get(claim.deployment_id)
            if (
                deployment is None
                or deployment.spec.placement.is_gang
                or claim.preemption_id in self._state.index.unsettled
            ):
                continue
            choice = self._choose(deployment, [])
            if isinstance(choice, Choice):
                self._propose(deployment, choice, claim.replica_id, "")
                self._ended.append(claims.ended(claim, "room turned up elsewhere", self._ctx))
                self.later_s.append(self._ctx.now_s)
            return

    def place(self, deployment: Deployment) -> None:
        if self._is_look and self._displacing.is_hopeless(deployment):
            return
        missing_count = self._state.index.lacking_count(deployment)
        if deployment.spec.placement.is_gang:
            self._place_gang(deployment, missing_count)
            return
        chosen: list[Choice] = []
        displaced_count = 0
        while len(chosen) + displaced_count < missing_count:
            if self.is_over:
                self.later_s.append(self._ctx.now_s)
                break
            self._decided_count += 1
            choice = self._displacing.over_quota(deployment) or self._choose(deployment, chosen)
            replica_id = name_of(deployment, len(chosen) + displaced_count + 1)
            if isinstance(choice, Choice):
                chosen.append(choice)
                self._propose(deployment, choice, replica_id, "")
            elif self._displacing.displace(deployment, choice, replica_id, chosen):
                displaced_count += 1
            else:
                self._fail(deployment, choice, len(chosen) + displaced_count)
                break

    def _place_gang(self, deployment: Deployment, missing_count: int) -> None:
        """All or none; a gang is decided in one input whatever its size."""
        if self._ctx.now_s < deployment.gang_not_before_s:
            return  # A timer was set when it was given up.
        if gangs.is_leaving(self._state, deployment):
            return  # What is proposed now would be a part of it. Its leases' ends come here again.
        rooms = self._state.index.rooms
        demand = self._state.index.demand_of(deployment.deployment_id, deployment.spec)
        question = gangs.question(deployment, missing_count)
        verdict = rooms.verdict(demand, self._ctx.now_s, question)
        over = self._displacing.over_quota(deployment, missing_count)
        if over is not None:
            self._fail(deployment, over, 0)
            return
        chosen: list[Choice] = []
        if verdict is None:
            with rooms.attempt() as keeps:
                found: Choice | NoChoice | None = None
                while len(chosen) < missing_count:
                    found = self._choose(deployment, chosen)
                    if isinstance(found, NoChoice):
                        break
                    chosen.append(found)
                if not isinstance(found, NoChoice):
                    keeps.append(True)
            if isinstance(found, NoChoice):
                verdict = gangs.incomplete(found, fit_count=len(chosen), wanted_count=missing_count)
                rooms.remember(demand, self._ctx.now_s, verdict, question, frozenset())
        self._decided_count += len(chosen) + 1
        if verdict is not None:
            if not self._displace_gang(deployment, missing_count):
                self._fail(deployment, no_choice(deployment.spec, verdict), 0)
            return
        gang_id = gangs.id_of(deployment)
        for count, choice in enumerate(chosen, start=1):
            self._propose(deployment, choice, name_of(deployment, count), gang_id)

    def _displace_gang(self, deployment: Deployment, missing_count: int) -> bool:
        """Room for all of it or for none: free room is claimed too, until the victims for the others have left."""
        found: list[Preemption] = []
        chosen: list[Choice] = []
        with self._state.index.rooms.attempt() as keeps, self._displacing.attempt() as attempt:
            while len(found) < missing_count:
                choice = self._choose(deployment, chosen)
                if isinstance(choice, Choice):
                    chosen.append(choice)
                    found.append(free_room(choice))
                    continue
                preemption = attempt.victims(deployment, choice, chosen)
                if preemption is None:
                    return False
                found.append(preemption)
            keeps.append(True)
            attempt.keep(deployment, [(name_of(deployment, n), each) for n, each in enumerate(found, start=1)])
        return True

    def _choose(self, deployment: Deployment, besides: Sequence[Choice]) -> Choice | NoChoice:
        """A choice is booked at once."""
        state = self._state
        refused = deployment.refused_nodes
        if len(refused) < state.settings.refusal_count:
            refused = ()  # A refusal may be a matter of a stale view: ask again on a fresh one, some times.
        choice = choose(
            state,
            deployment.spec,
            now_s=self._ctx.now_s,
            deployment_id=deployment.deployment_id,
            refused_nodes=refused,
            besides=besides,
        )
        if isinstance(choice, Choice):
            demand = state.index.demand_of(deployment.deployment_id, deployment.spec)
            state.index.rooms.book(deployment.deployment_id, demand, choice.place)
            self._displacing.book(deployment, choice)
        return choice

    def _propose(self, deployment: Deployment, choice: Choice, replica_id: str, gang_id: str) -> None:
        """With others for the same node, unless it was refused before: a group is refused as a whole."""
        refused = deployment.refused_nodes
        key = (choice.node, *choice.codes, gang_id, replica_id if refused else "")
        group = self._groups.setdefault(key, _Group(choice, gang_id, refusal_count=len(refused)))
        group.replicas.append(
            ReplicaProposal(
                replica_id=replica_id,
                deployment_id=deployment.deployment_id,
                tenant=deployment.tenant,
                deployment=deployment.spec,
                shares=choice.shares(replica_id),
                reason=choice.reason if choice.reason != group.choice.reason else "",
            )
        )

    def _fail(self, deployment: Deployment, choice: NoChoice, placed_count: int) -> None:
        """Once for each reason, not at each try."""
        if deployment.displaced_by and ReasonCode.PREEMPTED not in choice.codes:
            choice = replace(
                choice,
                message=f"{choice.message}; its place went to {deployment.displaced_by}",
                codes=(*choice.codes, ReasonCode.PREEMPTED),
            )
        if ReasonCode.TURNS_TAKEN in choice.codes and not self._is_look:
            self.later_s.append(self._ctx.now_s + self._state.settings.use_retry_s)
        if deployment.problem == choice.message and not placed_count:
            return
        self._failures.append(
            PlacementFailed(
                at_s=self._ctx.now_s,
                deployment_id=deployment.deployment_id,
                replica_id=name_of(deployment, placed_count + 1),
                model=deployment.spec.name,
                reason=choice.reason,
                message=choice.message,
                missing_bytes=choice.missing_bytes,
                remedy=choice.remedy,
                alternatives=choice.alternatives,
                codes=choice.codes,
                constraints=choice.constraints,
            )
        )

    def outcomes(self) -> list[Outcome]:
        timers = [Timer(due_s=due_s, input=PlaceNext()) for due_s in sorted(set(self.later_s))]
        held = sorted({group.gang_id for group in self._groups.values() if group.gang_id})
        timers += [gangs.limit(self._state, gang_id, self._ctx.now_s) for gang_id in held]
        proposed = [self._proposed(group) for group in self._groups.values()]
        return [*proposed, *self._ended, *self._displacing.outcomes, *self._failures, *timers]

    def _proposed(self, group: _Group) -> PlacementProposed:
        choice, first = group.choice, group.replicas[0]
        return PlacementProposed(
            at_s=self._ctx.now_s,
            proposal_id=f"{first.replica_id}-{group.refusal_count}",
            node=choice.node,
            replicas=tuple(group.replicas),
            reason=choice.reason,
            codes=(*choice.codes, *([ReasonCode.GANG] if group.gang_id else [])),
            policy=choice.policy,
            gang_id=group.gang_id,
            gang_hold_s=self._state.settings.gang_hold_s if group.gang_id else 0.0,
        )


def name_of(deployment: Deployment, count: int) -> str:
    """Of its next replica but `count - 1`. Each try has a name of its own, so that no late answer is mistaken."""
    return f"{_slug(deployment.spec.name)}-{deployment.deployment_id}-{deployment.created_count + count}"


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c == "-" else "-" for c in name.lower())[:40].strip("-")


# --- Releases ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseNext(Input):
    """Go on releasing what the deployment has too much, or all when it is gone."""

    deployment_id: str
    reason: str


def release_all(state: ClusterState, deployment: Deployment, reason: str, ctx: Context) -> list[Outcome]:
    """Of a gang that is not complete every lease goes back at once; all others drain."""
    here = _not_releasing(state, deployment.deployment_id)
    held = sorted({replica.gang_id for replica in here if replica.is_held})
    abandoned = [fact for gang_id in held for fact in gangs.abandon(state, gang_id, reason, ctx)]
    drained = [replica for replica in here if not replica.is_held]
    return [*abandoned, *release_some(state, deployment.deployment_id, drained, reason, ctx)]


def release_some(
    state: ClusterState, deployment_id: str, replicas: Sequence[Replica], reason: str, ctx: Context
) -> list[Outcome]:
    """As many as one input may decide; the rest in inputs of their own. One append holds 1,000 facts at most."""
    count = state.settings.placed_per_input_count
    released: list[Outcome] = [release(replica, reason, ctx) for replica in replicas[:count]]
    if len(replicas) > count:
        released.append(Timer(due_s=ctx.now_s, input=ReleaseNext(deployment_id=deployment_id, reason=reason)))
    return released


def release_next(state: ClusterState, due: ReleaseNext, ctx: Context) -> list[Outcome]:
    """What is too much now: a wish that grew meanwhile keeps what is left."""
    if _is_wanted(state, due.deployment_id):
        rest = presence.surplus(state, due.deployment_id)
    else:
        rest = [replica for replica in _not_releasing(state, due.deployment_id) if not replica.is_held]
    return release_some(state, due.deployment_id, rest, due.reason, ctx)


def releases_begun(state: ClusterState, ctx: Context) -> list[Timer]:
    """For a new instance: deployments that want no replicas and have some that are not released."""
    here = (replica for replica in state.replicas.values() if not replica.is_releasing and not replica.is_held)
    unwanted = sorted({replica.deployment_id for replica in here if not _is_wanted(state, replica.deployment_id)})
    reason = "nobody wants it any more"
    return [Timer(due_s=ctx.now_s, input=ReleaseNext(deployment_id=one, reason=reason)) for one in unwanted]


def _is_wanted(state: ClusterState, deployment_id: str) -> bool:
    deployment = state.deployments.get(deployment_id)
    return deployment is not None and deployment.replica_count > 0


def _not_releasing(state: ClusterState, deployment_id: str) -> list[Replica]:
    return [replica for replica in state.replicas_of(deployment_id) if not replica.is_releasing]


def release(replica: Replica, reason: str, ctx: Context) -> ReleaseProposed:
    return ReleaseProposed(at_s=ctx.now_s, node=replica.node, replica_id=replica.replica_id, reason=reason)

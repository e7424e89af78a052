"""The gateway's decisions: which replica serves a request, who waits, who is refused, and what others are told.

Pure: inputs come with the time `now_s` (Unix seconds that never go back), answers are values that the shell carries
out. Every request that `arrive` accepts ends in one of two ways: a `Refuse`, or a `Dispatch` that the shell ends with
`finished`.
"""

from collections.abc import Callable, Iterable
from typing import Final

from schemas.gateways import LoadSampled
from schemas.holders import RouteLease
from schemas.messages import Fact
from services.gateway import refusals
from services.gateway.actions import Action, Bounce, Dispatch, Publish, Refuse
from services.gateway.agenda import Agenda
from services.gateway.holds import Hold, HoldTable, Request
from services.gateway.loads import Loads
from services.gateway.refusals import Refusal
from services.gateway.routes import Deployment, Replica, RouteTable
from services.gateway.settings import GatewaySettings
from services.gateway.verdicts import Verdicts

RAMP_COUNT_MAX: Final = 1 << 20
"""The ramp is over; bounds the doubling."""
MODEL, DEADLINE, SAMPLE = "model", "deadline", "sample"
ALL, TURN = "all", "turn"


class Gateway:
    """All that one gateway knows and decides."""

    def __init__(self, settings: GatewaySettings, *, gateway_id: str, now_s: float) -> None:
        self.settings = settings
        self.gateway_id = gateway_id
        self.routes = RouteTable()
        self.holds = HoldTable(
            count_per_model_max=settings.hold_count_per_model_max,
            bytes_per_model_max=settings.hold_bytes_per_model_max,
            count_max=settings.hold_count_max,
            bytes_max=settings.hold_bytes_max,
            ramp_first_count=settings.ramp_first_count,
        )
        self.requests: dict[str, Request] = {}
        self.loads = Loads()
        self.shunned: dict[str, float] = {}
        """Until when a replica that bounced a request gets no new one."""
        self.agenda = Agenda()
        self.agenda.set((SAMPLE, ALL), now_s + settings.sample_every_s)
        self._verdicts = Verdicts(retry_after_unknown_s=settings.retry_after_unknown_s)
        self.is_stopping = False
        self._number = 0

    # --- Requests -----------------------------------------------------------------------------------------------------

    def arrive(
        self, request_id: str, *, tenant: str, model: str, body_bytes: int, patience_s: float | None, now_s: float
    ) -> list[Action]:
        """A request from a caller whose key is known. `patience_s` is what the client asked for, if it did."""
        deployment = self.routes.find(tenant, model)
        if self.is_stopping:
            return [Refuse(request_id=request_id, refusal=refusals.stopping())]
        if deployment is None:
            known = (other.spec.name for other in self.routes.of_tenant(tenant))
            return [Refuse(request_id=request_id, refusal=refusals.unknown_model(model, known))]
        self.loads.arrived(deployment.deployment_id, now_s=now_s)
        limit_s = deployment.spec.swap.return_deadline_s
        patience_s = limit_s if patience_s is None else min(patience_s, limit_s)
        self._number += 1
        request = Request(
            request_id=request_id,
            deployment_id=deployment.deployment_id,
            model=model,
            number=self._number,
            arrived_s=now_s,
            deadline_s=now_s + patience_s,
            body_bytes=body_bytes,
        )
        hold = self.holds.of(deployment.deployment_id)
        if not hold.waiting and (replica := self._best(deployment, now_s)):
            self.requests[request_id] = request
            return [self._dispatch(request, replica), *self._tell_turn(request.deployment_id, now_s)]
        refusal = self._verdicts.on_arrival(self.routes, self.holds, request, now_s=now_s)
        if refusal is not None:
            return [Refuse(request_id=request_id, refusal=refusal), *self._want(deployment, hold, now_s)]
        self.requests[request_id] = request
        return [*self._hold(request, now_s), *self._tell_turn(request.deployment_id, now_s)]

    def first_byte(self, request_id: str, *, now_s: float) -> list[Action]:
        """The answer has begun: the engine copes, so the ramp may double."""
        request = self.requests.get(request_id)
        hold = None if request is None else self.holds.holds.get(request.deployment_id)
        if hold is None or request_id not in hold.unanswered_ids:
            return []
        hold.unanswered_ids.remove(request_id)
        self._double(hold, now_s)
        return self._settle((hold.deployment_id,), now_s)

    def bounced(self, request_id: str, replica_id: str, why: Bounce, *, now_s: float) -> list[Action]:
        """Nothing of the answer had been sent: try elsewhere, or hold it again."""
        request = self.requests.get(request_id)
        if request is None or request.replica_id != replica_id:
            return []
        pause_s = self.settings.shun_asleep_s if why is Bounce.ASLEEP else self.settings.shun_broken_s
        self.shunned[replica_id] = max(self.shunned.get(replica_id, 0.0), now_s + pause_s)
        self._leave_replica(request)
        request.cut_count += why is Bounce.CUT
        if request.cut_count > self.settings.cut_count_max:
            return self._end(request, refusals.engine_cut(request.model, request.cut_count), now_s)
        return self._hold(request, now_s)

    def finished(self, request_id: str, *, now_s: float) -> list[Action]:
        """It is over, well or not, or its client left; from wherever it is. Any further word about it is ignored."""
        request = self.requests.pop(request_id, None)
        if request is None:
            return []
        self.agenda.discard((DEADLINE, request_id))
        if request.replica_id:
            self._leave_replica(request)
        else:
            self.holds.remove(request, now_s=now_s)
        return [*self._settle((request.deployment_id,), now_s), *self._tell_turn(request.deployment_id, now_s)]

    # --- News ---------------------------------------------------------------------------------------------------------

    def fact(self, fact: Fact, *, now_s: float) -> list[Action]:
        """A fact of history."""
        touched = self.routes.fold(fact)
        self._forgive(touched)
        return self._settle(sorted(touched), now_s)

    def replace_routes(self, routes: RouteTable, *, now_s: float) -> list[Action]:
        """A table that was folded from the start of history takes the place of the present one."""
        routes.leases = {
            node: lease
            for node, lease in self.routes.leases.items()
            if routes.holder_urls.get(node) == self.routes.holder_urls.get(node)
        }
        self.routes = routes
        return self._settle([hold.deployment_id for hold in self.holds.busy()], now_s)

    def lease(self, node: str, lease: RouteLease, *, sent_s: float, now_s: float) -> list[Action]:
        """A holder's answer to the wish sent at `sent_s`."""
        touched = self.routes.renew(node, lease, sent_s=sent_s)
        self._forgive(touched)
        return self._settle(sorted(touched), now_s)

    def stop(self, *, now_s: float) -> list[Action]:
        """Nothing new is taken, and what waits is refused; what runs may end."""
        self.is_stopping = True
        holds = list(self.holds.busy())
        return [a for hold in holds for a in self._refuse_all(hold, lambda _: refusals.stopping(), now_s)]

    def reconnected(self, *, now_s: float) -> list[Action]:
        """The bus is back: repeat every unanswered wish at once."""
        actions: list[Action] = []
        for hold in list(self.holds.busy()):
            hold.wanted_due_s = now_s
            actions += self._settle((hold.deployment_id,), now_s)
        return actions

    def tick(self, *, now_s: float) -> list[Action]:
        """Whatever is due by now; the shell calls it at `next_due_s`, at the latest."""
        actions: list[Action] = []
        for kind, key in self.agenda.pop_due(now_s):
            if kind == DEADLINE:
                actions += self._expire(key, now_s)
            elif kind == MODEL:
                actions += self._settle((key,), now_s)
            elif key == TURN:
                actions += self._sample((), now_s)
            else:
                actions += self._sample_all(now_s)
        return actions

    def next_due_s(self) -> float | None:
        return self.agenda.next_due_s()

    # --- Holding ------------------------------------------------------------------------------------------------------

    def _hold(self, request: Request, now_s: float) -> list[Action]:
        if now_s >= request.deadline_s or request.deployment_id not in self.routes.deployments:
            return self._end(request, self._verdicts.late(self.routes, request, now_s=now_s), now_s)
        self.holds.add(request, now_s=now_s)
        self.agenda.set((DEADLINE, request.request_id), request.deadline_s)
        return self._settle((request.deployment_id,), now_s)

    def _settle(self, deployment_ids: Iterable[str], now_s: float) -> list[Action]:
        """Release what can be released, refuse what never can be, and ask for what is away."""
        actions: list[Action] = []
        for deployment_id in deployment_ids:
            hold = self.holds.holds.get(deployment_id)
            deployment = self.routes.deployments.get(deployment_id)
            if deployment is None:
                actions += self._forget(deployment_id, hold, now_s)
            elif hold is not None and hold.waiting:
                actions += self._settle_one(deployment, hold, now_s)
            else:
                self.agenda.discard((MODEL, deployment_id))
        return actions

    def _settle_one(self, deployment: Deployment, hold: Hold, now_s: float) -> list[Action]:
        failure = self.routes.failure_of(deployment)
        if failure is not None:
            return self._refuse_all(hold, lambda request: self._verdicts.failed(request, failure), now_s)
        actions: list[Action] = []
        replica = self._best(deployment, now_s)
        if replica is not None and hold.unanswered_ids and now_s >= hold.ramp_due_s:
            self._double(hold, now_s)
        while replica is not None and len(hold.unanswered_ids) < hold.ramp_limit_count and (first := hold.first()):
            self.holds.remove(first, now_s=now_s)
            if not hold.unanswered_ids:
                hold.ramp_due_s = now_s + self.settings.ramp_step_s
            hold.unanswered_ids.add(first.request_id)
            actions.append(self._dispatch(first, replica))
            replica = self._best(deployment, now_s)
        if not hold.waiting:
            hold.wanted_told = None
            self.agenda.discard((MODEL, hold.deployment_id))
        elif replica is not None:
            hold.wanted_told = None
            self.agenda.set((MODEL, hold.deployment_id), hold.ramp_due_s)
        else:
            actions += self._want(deployment, hold, now_s)
            shunned_s = [until_s for r in deployment.replicas if (until_s := self.shunned.get(r, 0.0)) > now_s]
            self.agenda.set((MODEL, hold.deployment_id), min([hold.wanted_due_s, *shunned_s]))
        return actions

    def _want(self, deployment: Deployment, hold: Hold, now_s: float) -> list[Action]:
        """One wish for the model: at once when it is a new one, else at its next turn."""
        wanted = self.routes.wanted(deployment, now_s)
        if wanted == hold.wanted_told and now_s < hold.wanted_due_s:
            return []
        hold.wanted_told = wanted
        hold.wanted_due_s = now_s + self.settings.wanted_repeat_s
        first = hold.first()
        signal = hold.wish(deployment, gateway_id=self.gateway_id, wanted=wanted, now_s=now_s)
        return [Publish(signal=signal, request_id="" if first is None else first.request_id)]

    def _dispatch(self, request: Request, replica: Replica) -> Dispatch:
        request.replica_id = replica.replica_id
        self.loads.started(request.deployment_id, replica.replica_id)
        self.agenda.discard((DEADLINE, request.request_id))
        return Dispatch(
            request_id=request.request_id,
            replica_id=replica.replica_id,
            endpoint=self.routes.endpoint_of(replica),
            held_s=request.held_s,
        )

    def _leave_replica(self, request: Request) -> None:
        self.loads.ended(request.deployment_id, request.replica_id)
        request.replica_id = ""
        hold = self.holds.holds.get(request.deployment_id)
        if hold is not None:
            hold.unanswered_ids.discard(request.request_id)

    def _end(self, request: Request, refusal: Refusal, now_s: float) -> list[Action]:
        """One typed error for a request that is with no replica."""
        assert not request.replica_id, request
        del self.requests[request.request_id]
        self.agenda.discard((DEADLINE, request.request_id))
        self.holds.remove(request, now_s=now_s)
        refuse = Refuse(request_id=request.request_id, refusal=refusal)
        return [refuse, *self._tell_turn(request.deployment_id, now_s)]

    def _refuse_all(self, hold: Hold, refusal: Callable[[Request], Refusal], now_s: float) -> list[Action]:
        self.agenda.discard((MODEL, hold.deployment_id))
        return [action for request in hold.in_order() for action in self._end(request, refusal(request), now_s)]

    def _forget(self, deployment_id: str, hold: Hold | None, now_s: float) -> list[Action]:
        """The deployment is gone. What runs may end in peace."""
        if hold is None:
            return []
        actions = self._refuse_all(hold, lambda request: refusals.retired(request.model), now_s)
        self.holds.drop(deployment_id)
        return actions

    def _expire(self, request_id: str, now_s: float) -> list[Action]:
        request = self.requests.get(request_id)
        if request is None or request.replica_id:
            return []
        actions = self._end(request, self._verdicts.late(self.routes, request, now_s=now_s), now_s)
        return [*actions, *self._settle((request.deployment_id,), now_s)]

    def _best(self, deployment: Deployment, now_s: float) -> Replica | None:
        return self.routes.best(deployment, now_s=now_s, load=self.loads.by_replica, shunned=self.shunned)

    def _double(self, hold: Hold, now_s: float) -> None:
        hold.ramp_limit_count = min(2 * hold.ramp_limit_count, RAMP_COUNT_MAX)
        hold.ramp_due_s = now_s + self.settings.ramp_step_s

    def _forgive(self, deployment_ids: Iterable[str]) -> None:
        """News of a deployment outdates what its replicas did before."""
        for deployment_id in deployment_ids:
            deployment = self.routes.deployments.get(deployment_id)
            for replica_id in () if deployment is None else deployment.replicas:
                self.shunned.pop(replica_id, None)

    # --- Telling others -----------------------------------------------------------------------------------------------

    def _tell_turn(self, deployment_id: str, now_s: float) -> list[Action]:
        """A sample when this model turned busy or idle: at once, or when the last one is old enough."""
        hold = self.holds.holds.get(deployment_id)
        if not self.loads.has_turned(deployment_id, waiting_count=0 if hold is None else len(hold.waiting)):
            return []
        due_s = self.loads.told_s + self.settings.sample_gap_s
        if now_s >= due_s:
            return self._sample((), now_s)
        self.agenda.set((SAMPLE, TURN), due_s)
        return []

    def _sample_all(self, now_s: float) -> list[Action]:
        """The load of every model, idle ones too: others may have lost what they were told before."""
        self.agenda.set((SAMPLE, ALL), now_s + self.settings.sample_every_s)
        self.shunned = {key: until_s for key, until_s in self.shunned.items() if until_s > now_s}
        actions = self._sample(sorted(self.routes.models.values()), now_s)
        self.loads.forget(self.routes.deployments)
        return actions

    def _sample(self, idle_ids: Iterable[str], now_s: float) -> list[Action]:
        self.agenda.discard((SAMPLE, TURN))
        waiting = {hold.deployment_id: len(hold.waiting) for hold in self.holds.busy()}
        models = self.loads.sample(idle_ids, waiting=waiting, now_s=now_s)
        return [Publish(signal=LoadSampled(gateway=self.gateway_id, models=models))]

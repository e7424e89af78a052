"""Which error a request gets when it cannot be held or was held too long. Pure."""

from dataclasses import dataclass

from services.gateway import refusals
from services.gateway.holds import HoldTable, Request
from services.gateway.refusals import Refusal
from services.gateway.routes import RouteTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdicts:
    """Foretells from the last return of the same model when to try again; says so when nothing is known."""

    retry_after_unknown_s: float

    def on_arrival(self, routes: RouteTable, holds: HoldTable, request: Request, *, now_s: float) -> Refusal | None:
        """Why it makes no sense to hold this request; None when it does."""
        deployment = routes.deployments[request.deployment_id]
        failure = routes.failure_of(deployment)
        if failure is not None:
            return self.failed(request, failure)
        state = routes.state_of(deployment)
        eta_s = routes.eta_s(deployment, now_s)
        patience_s = request.deadline_s - request.arrived_s
        if eta_s is not None and eta_s > patience_s:
            return refusals.model_loading(request.model, state=state, eta_s=eta_s, patience_s=patience_s)
        scope = holds.full_scope(holds.of(request.deployment_id), request.body_bytes, request.model)
        if scope is None:
            return None
        retry_after_s = eta_s or self.retry_after_unknown_s
        return refusals.hold_full(request.model, scope=scope, state=state, retry_after_s=retry_after_s)

    def late(self, routes: RouteTable, request: Request, *, now_s: float) -> Refusal:
        """Its deadline passed in the hold."""
        deployment = routes.deployments.get(request.deployment_id)
        if deployment is None:
            return refusals.retired(request.model)
        return refusals.deadline_passed(
            request.model,
            state=routes.state_of(deployment),
            waited_s=now_s - request.arrived_s,
            retry_after_s=routes.eta_s(deployment, now_s) or self.retry_after_unknown_s,
            problem=deployment.problem,
        )

    def failed(self, request: Request, reason: str) -> Refusal:
        return refusals.engine_failed(request.model, reason=reason, retry_after_s=self.retry_after_unknown_s)

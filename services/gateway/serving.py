"""One request from its key to its last byte: wait for the core's decision, carry it out, tell the core how it went."""

import logging
from dataclasses import dataclass
from typing import Final

import aiohttp
from aiohttp import web

from kit.telemetry import Span, Tracer
from services.gateway import refusals
from services.gateway.actions import Bounce, Dispatch, Refuse
from services.gateway.downstream import Downstream
from services.gateway.metrics import Metrics
from services.gateway.refusals import Refusal
from services.gateway.routes import Caller
from services.gateway.runtime import Runtime, Ticket
from services.gateway.settings import GatewaySettings
from services.gateway.upstream import Answer, Silent, Upstream
from services.gateway.usage import StreamUsage, Usage, usage_of
from services.gateway.view import HistoryView
from services.gateway.wishes import Wish, key_hash_of, open_caller, read_wish, request_id_of, traceparent_of

STARTING_RETRY_S: Final = 1.0

log = logging.getLogger("gateway")


@dataclass(slots=True, kw_only=True)
class Exchange:
    """What one request is about, for all steps of serving it."""

    wish: Wish
    path: str
    ticket: Ticket
    downstream: Downstream
    request_id: str
    span: Span
    arrived_s: float
    label: str


class Serving:
    """Answers the routes that engines answer."""

    def __init__(
        self,
        settings: GatewaySettings,
        *,
        runtime: Runtime,
        view: HistoryView,
        upstream: Upstream,
        metrics: Metrics,
        tracer: Tracer,
    ) -> None:
        self.settings = settings
        self.runtime = runtime
        self.view = view
        self.upstream = upstream
        self.metrics = metrics
        self.tracer = tracer

    def caller_of(self, request: web.Request) -> Caller | Refusal:
        """Whose request it is, or why it is nobody's."""
        if not self.view.is_usable:
            return refusals.starting(STARTING_RETRY_S)
        key_hash = key_hash_of(request)
        caller = None if key_hash is None else self.runtime.core.routes.caller(key_hash)
        if caller is not None:
            return caller
        if not self.settings.auth_required:
            return open_caller(self.settings.open_tenant)
        return refusals.missing_key() if key_hash is None else refusals.wrong_key()

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """Chat, completions and embeddings: whatever names a model in its body."""
        request_id = request_id_of(request)
        downstream = Downstream(request, request_id=request_id)
        label = ""
        with self.tracer.span("gateway request", parent=traceparent_of(request), is_root=True) as span:
            span.set("http.route", request.path)
            span.set("sublet.request_id", request_id)
            try:
                caller = self.caller_of(request)
                if isinstance(caller, Refusal):
                    return await downstream.refuse(caller)
                wish = await read_wish(
                    request, bytes_max=self.settings.request_bytes_max, meter_streams=self.settings.meter_streams
                )
                if isinstance(wish, Refusal):
                    return await downstream.refuse(wish)
                deployment = self.runtime.core.routes.find(caller.tenant, wish.model)
                if deployment is not None:
                    label = self.metrics.label(wish.model)
                    span.set("sublet.model", wish.model)
                return await self._serve(request.path, caller, wish, downstream, request_id, span, label)
            except ConnectionResetError:
                # The client left while we wrote; nobody reads this any more.
                downstream.status = 0
                return web.Response(status=499)
            finally:
                span.set("http.response.status_code", downstream.status)
                # Status 0: the client left before it saw anything.
                self.metrics.requests.labels(label, str(downstream.status), downstream.code).inc()

    async def _serve(
        self,
        path: str,
        caller: Caller,
        wish: Wish,
        downstream: Downstream,
        request_id: str,
        span: Span,
        label: str,
    ) -> web.StreamResponse:
        arrived_s = self.runtime.now_s()
        ticket = self.runtime.arrive(
            tenant=caller.tenant,
            model=wish.model,
            body_bytes=len(wish.body),
            patience_s=wish.patience_s,
            traceparent=span.traceparent,
        )
        exchange = Exchange(
            wish=wish,
            path=path,
            ticket=ticket,
            downstream=downstream,
            request_id=request_id,
            span=span,
            arrived_s=arrived_s,
            label=label,
        )
        state = "resident" if ticket.is_decided else self._state_of(caller.tenant, wish.model)
        try:
            while True:
                await self._hold(exchange, state)
                decision = ticket.take()
                if isinstance(decision, Refuse):
                    held_s = self.runtime.now_s() - arrived_s
                    downstream.headers["x-sublet-held-ms"] = str(round(held_s * 1000))
                    return await downstream.refuse(decision.refusal)
                downstream.headers["x-sublet-state"] = state
                downstream.headers["x-sublet-held-ms"] = str(round(decision.held_s * 1000))
                response = await self._at_replica(exchange, decision)
                if response is not None:
                    return response
                state = self._state_of(caller.tenant, wish.model)
        finally:
            # The only place where a request ends for the core, also when its client left (this task is cancelled).
            self.runtime.finished(ticket)

    def _state_of(self, tenant: str, model: str) -> str:
        routes = self.runtime.core.routes
        deployment = routes.find(tenant, model)
        return "unknown" if deployment is None else routes.state_of(deployment)

    # --- The hold -----------------------------------------------------------------------------------------------------

    async def _hold(self, exchange: Exchange, state: str) -> None:
        """Until the core has decided; streams hear a comment line now and then."""
        ticket, wish = exchange.ticket, exchange.wish
        if ticket.is_decided:
            return
        attributes = {"sublet.model": wish.model, "sublet.state": state}
        with self.tracer.span("hold", parent=exchange.span.traceparent, attributes=attributes) as span:
            ticket.traceparent = span.traceparent
            timeout_s = self.settings.heartbeat_s if wish.is_stream else None
            while not await ticket.wait(timeout_s):
                exchange.downstream.headers.setdefault("x-sublet-state", state)
                await exchange.downstream.heartbeat(self._waiting_text(exchange))

    def _waiting_text(self, exchange: Exchange) -> str:
        core = self.runtime.core
        request = core.requests.get(exchange.ticket.id)
        deployment = None if request is None else core.routes.deployments.get(request.deployment_id)
        if deployment is None:
            return "waiting"
        now_s = self.runtime.now_s()
        eta_s = core.routes.eta_s(deployment, now_s)
        eta = "unknown" if eta_s is None else f"{eta_s:.1f}"
        waited_s = now_s - exchange.arrived_s
        return f"waiting state={core.routes.state_of(deployment)} waited_s={waited_s:.1f} eta_s={eta}"

    # --- At the replica -----------------------------------------------------------------------------------------------

    async def _at_replica(self, exchange: Exchange, decision: Dispatch) -> web.StreamResponse | None:
        """The answer, or None when the replica gave the request back and the core decides anew."""
        attributes = {"sublet.model": exchange.wish.model, "sublet.replica_id": decision.replica_id}
        with self.tracer.span("upstream", parent=exchange.span.traceparent, attributes=attributes) as span:
            headers = {
                "Content-Type": "application/json",
                "x-request-id": exchange.request_id,
                "traceparent": span.traceparent,
            }
            outcome = await self.upstream.post(
                decision.endpoint.rstrip("/") + exchange.path, body=exchange.wish.body, headers=headers
            )
            match outcome:
                case Bounce():
                    span.set("sublet.bounce", outcome.name.lower())
                    self.metrics.bounces.labels(outcome.name.lower()).inc()
                    self.runtime.bounced(exchange.ticket, decision.replica_id, outcome)
                    return None
                case Silent():
                    late = refusals.answer_late(exchange.wish.model, self.settings.silence_timeout_s)
                    return await exchange.downstream.refuse(late)
            self._answer_begins(exchange, decision)
            try:
                return await self._relay(exchange, outcome)
            finally:
                # Of an answer that was not read to its end (the client left) this cuts the connection, and the
                # engine stops working on it; of a complete one it gives the connection back.
                if outcome.response.content.at_eof():
                    outcome.response.release()
                else:
                    outcome.response.close()

    def _answer_begins(self, exchange: Exchange, decision: Dispatch) -> None:
        self.runtime.first_byte(exchange.ticket)
        if decision.held_s:
            self.metrics.hold_seconds.labels(exchange.label).observe(decision.held_s)
        self.metrics.first_byte_seconds.labels(exchange.label).observe(self.runtime.now_s() - exchange.arrived_s)

    async def _relay(self, exchange: Exchange, answer: Answer) -> web.StreamResponse:
        downstream = exchange.downstream
        if answer.is_stream:
            return await self._relay_stream(exchange, answer)
        if downstream.has_begun:
            # A heartbeat went out with status 200; the engine's own error, or whole answer, goes into the stream.
            await downstream.write(b"data: " + answer.first.replace(b"\n", b" ") + b"\n\n")
            return await downstream.end()
        self._count_tokens(exchange, usage_of(answer.first) if answer.status == 200 else None)
        return await downstream.whole(answer.status, answer.first, answer.content_type)

    async def _relay_stream(self, exchange: Exchange, answer: Answer) -> web.StreamResponse:
        downstream = exchange.downstream
        usage = StreamUsage(hides=exchange.wish.hides_usage)
        broken: Refusal | None = None
        await downstream.begin()
        if first := usage.pass_on(answer.first):
            await downstream.write(first)
        chunks = answer.response.content.iter_any().__aiter__()
        while True:
            try:
                chunk = await anext(chunks, b"")
            except aiohttp.SocketTimeoutError:
                broken = refusals.answer_late(exchange.wish.model, self.settings.silence_timeout_s)
                break
            except (aiohttp.ClientError, OSError) as error:
                broken = refusals.answer_broken(exchange.wish.model, type(error).__name__)
                break
            if not chunk:
                break
            if chunk := usage.pass_on(chunk):
                await downstream.write(chunk)
        if rest := usage.rest():
            await downstream.write(rest)
        self._count_tokens(exchange, usage.usage)
        if broken is None and not usage.has_ended:
            broken = refusals.answer_broken(exchange.wish.model, "the stream ended without its end mark")
        return await downstream.end() if broken is None else await downstream.refuse(broken)

    def _count_tokens(self, exchange: Exchange, usage: Usage | None) -> None:
        if usage is not None:
            self.metrics.tokens.labels(exchange.label, "prompt").inc(usage.prompt_tokens)
            self.metrics.tokens.labels(exchange.label, "completion").inc(usage.completion_tokens or 0)

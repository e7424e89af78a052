"""Requests that wait for their model, and what each model's queue knows. Pure."""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

from schemas.gateways import ModelWanted
from services.gateway.routes import Deployment


@dataclass(slots=True, kw_only=True)
class Request:
    """One accepted request. It is held while `replica_id` is empty, else it runs there."""

    request_id: str
    deployment_id: str
    model: str
    number: int
    """Order of arrival at this gateway; a request that comes back to the hold keeps it."""
    arrived_s: float
    deadline_s: float
    """Until here it may be held; an answer that has begun may take longer."""
    body_bytes: int
    replica_id: str = ""
    held_s: float = 0.0
    """Time spent in the hold before its present or last turn at a replica."""
    hold_since_s: float = 0.0
    cut_count: int = 0
    """How often a replica broke off after it got this request."""


@dataclass(slots=True, kw_only=True)
class Hold:
    """The queue of one deployment, in order of arrival. `byte_count` is the sum of its members' bodies."""

    deployment_id: str
    ramp_limit_count: int
    """How many released requests may be without a first token before the next is released."""
    waiting: dict[str, Request] = field(default_factory=dict)
    byte_count: int = 0
    unanswered_ids: set[str] = field(default_factory=set)
    """Released from here and still without a first token."""
    ramp_due_s: float = 0.0
    wanted_due_s: float = 0.0
    wanted_told: tuple[str, int] | None = None
    """Replica and wake epoch of the last `ModelWanted`."""
    _order: list[tuple[int, str]] = field(default_factory=list)
    """Heap of arrival numbers; members that left are skipped when they come up."""

    def add(self, request: Request) -> None:
        assert request.request_id not in self.waiting, request
        self.waiting[request.request_id] = request
        self.byte_count += request.body_bytes
        heapq.heappush(self._order, (request.number, request.request_id))

    def remove(self, request_id: str) -> Request | None:
        request = self.waiting.pop(request_id, None)
        if request is not None:
            self.byte_count -= request.body_bytes
            if not self.waiting:
                self._order.clear()
        return request

    def first(self) -> Request | None:
        """The longest waiting request."""
        while self._order and self._order[0][1] not in self.waiting:
            heapq.heappop(self._order)
        return self.waiting[self._order[0][1]] if self._order else None

    def wish(self, deployment: Deployment, *, gateway_id: str, wanted: tuple[str, int], now_s: float) -> ModelWanted:
        """The signal that asks for the model on behalf of all that wait here; also when it was too late to wait."""
        first = self.first()
        patience_s = deployment.spec.swap.return_deadline_s if first is None else first.deadline_s - now_s
        return ModelWanted(
            gateway=gateway_id,
            deployment_id=deployment.deployment_id,
            model=deployment.spec.name,
            replica_id=wanted[0],
            wake_epoch=wanted[1],
            waiting_count=max(1, len(self.waiting)),
            oldest_wait_s=0.0 if first is None else max(0.0, now_s - first.arrived_s),
            deadline_s=max(0.0, patience_s),
        )

    def in_order(self) -> list[Request]:
        return sorted(self.waiting.values(), key=lambda request: request.number)


@dataclass(slots=True, kw_only=True)
class HoldTable:
    """All holds, bounded by count and bytes for each model and in total."""

    count_per_model_max: int
    bytes_per_model_max: int
    count_max: int
    bytes_max: int
    ramp_first_count: int
    holds: dict[str, Hold] = field(default_factory=dict)
    count: int = 0
    byte_count: int = 0

    def of(self, deployment_id: str) -> Hold:
        hold = self.holds.get(deployment_id)
        if hold is None:
            hold = Hold(deployment_id=deployment_id, ramp_limit_count=self.ramp_first_count)
            self.holds[deployment_id] = hold
        return hold

    def full_scope(self, hold: Hold, body_bytes: int, model: str) -> str | None:
        """In whose name there is no room for one more; None when there is."""
        if len(hold.waiting) >= self.count_per_model_max or hold.byte_count + body_bytes > self.bytes_per_model_max:
            return f"'{model}'"
        if self.count >= self.count_max or self.byte_count + body_bytes > self.bytes_max:
            return "models at this gateway"
        return None

    def add(self, request: Request, *, now_s: float) -> Hold:
        """Hold it. Bounds are the caller's question: a request that was accepted once is never refused for room."""
        hold = self.of(request.deployment_id)
        if not hold.waiting:
            hold.ramp_limit_count = self.ramp_first_count
        request.hold_since_s = now_s
        hold.add(request)
        self.count += 1
        self.byte_count += request.body_bytes
        return hold

    def remove(self, request: Request, *, now_s: float) -> None:
        hold = self.holds.get(request.deployment_id)
        if hold is not None and hold.remove(request.request_id) is not None:
            self.count -= 1
            self.byte_count -= request.body_bytes
            request.held_s += now_s - request.hold_since_s

    def drop(self, deployment_id: str) -> None:
        """Forget an empty hold, so that deployments that are gone leave nothing behind."""
        hold = self.holds.get(deployment_id)
        if hold is not None and not hold.waiting:
            del self.holds[deployment_id]

    def busy(self) -> Iterator[Hold]:
        """Holds in which something waits, by deployment id."""
        return (self.holds[key] for key in sorted(self.holds) if self.holds[key].waiting)

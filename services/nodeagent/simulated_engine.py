"""Engines of a GPU host in virtual time: what each holds, and the requests that it serves; for the simulator only."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Protocol

from kit.outcomes import Input
from schemas.deployments import SwapDriver
from schemas.placement import ReplicaProposal
from schemas.units import MiB

CONTEXT_BYTES: Final = 500 * MiB
"""What an engine keeps on the device while it is parked."""
FIRST_BYTE_S: Final = 0.05
"""From a request's arrival at a resident engine to the first byte of its answer."""


class Clock(Protocol):
    """What the host needs of the simulation."""

    @property
    def now_s(self) -> float: ...

    def after(self, delay_s: float, action: Callable[[], None]) -> None: ...


class Routes(Protocol):
    """The holder's route table, as far as the agent's effects need it."""

    def open(self, replica_id: str, endpoint: str) -> None: ...

    def close(self, replica_id: str, then: Callable[[str], None]) -> None:
        """Call `then` with ``closed`` when no gateway routes there any more, or with ``reopened``."""
        ...

    def close_soon(self, replica_id: str) -> None: ...

    def forget(self, replica_id: str) -> None: ...


class Phase(StrEnum):
    LOADING = "loading"
    RESIDENT = "resident"
    ASLEEP = "asleep"


class Caller(Protocol):
    """Who sent a request: what becomes of it there."""

    def first_byte(self) -> None: ...

    def finished(self) -> None: ...

    def bounced(self, why: str) -> None:
        """Nothing of the answer was sent: ``asleep``, ``unreachable`` or ``cut``."""
        ...

    def broken(self) -> None:
        """The answer had begun, and will not be completed."""
        ...


@dataclass(frozen=True, slots=True)
class Done:
    """Hands an effect's result to the life of the agent that began it.

    What an agent does between two steps of an engine, such as a kill or an opened route, a dead one does not do;
    what an engine was told to do goes on.
    """

    tell: Callable[[float, Input], None]
    is_alive: Callable[[], bool]

    def __call__(self, after_s: float, result: Input) -> None:
        if self.is_alive():
            self.tell(after_s, result)


@dataclass(slots=True, eq=False)
class Engine:
    """One process that holds bytes of a GPU."""

    replica: ReplicaProposal
    lease_epoch: int
    phase: Phase
    busy_until_s: float
    is_closed: bool = False
    """Every gateway has acknowledged that its route is closed, or has lost its lease."""
    hung_until_s: float = 0.0
    doubtful_look_count: int = 0
    """As a suspect: looks at it that could neither adopt nor explain it."""
    in_flight: dict[Caller, bool] = field(default_factory=dict)
    """{caller: whether its answer has begun}"""
    on_idle: list[Callable[[], None]] = field(default_factory=list)
    share_bytes: dict[str, int] = field(default_factory=dict)
    """By GPU: what its shard there uses while it is awake."""
    limit_bytes: dict[str, int] = field(default_factory=dict)
    """By GPU: what the driver lets it have."""
    resize_epoch: int = -1
    """Of the last resize that it was told."""
    is_checkpointed: bool = False
    """While it is asleep: the driver has taken all of it, so that nothing stays."""

    def __post_init__(self) -> None:
        self.settle_at_request()

    def settle_at_request(self) -> None:
        """It is started or woken with its request; what it was told before is over."""
        self.resize_epoch += 1
        self.share_bytes = {share.gpu_uuid: share.request_bytes for share in self.replica.shares}
        self.limit_bytes = dict(self.share_bytes)

    def fall_asleep(self, driver: SwapDriver | None) -> None:
        self.phase = Phase.ASLEEP
        self.is_checkpointed = driver is SwapDriver.CHECKPOINT

    def live_in(self, sizes: Sequence[int]) -> None:
        """Use so much, by shard."""
        self.share_bytes = dict(zip(self.share_bytes, sizes, strict=True))

    def limit_to(self, sizes: Sequence[int]) -> None:
        """The driver's limit, by shard."""
        self.limit_bytes = dict(zip(self.limit_bytes, sizes, strict=True))

    def used_on(self, gpu_uuid: str) -> int:
        """What it uses of this GPU now; asleep, a context on each of its GPUs, or nothing when it is checkpointed."""
        share_bytes = self.share_bytes.get(gpu_uuid, 0)
        if self.phase is not Phase.ASLEEP:
            return share_bytes
        return 0 if self.is_checkpointed else min(CONTEXT_BYTES, share_bytes)

    def serve(self, caller: Caller, *, takes_s: float, clock: Clock) -> None:
        """Answer it, unless the engine dies before."""
        self.in_flight[caller] = False
        clock.after(FIRST_BYTE_S, lambda: self._begin(caller, takes_s, clock))

    def _begin(self, caller: Caller, takes_s: float, clock: Clock) -> None:
        if caller not in self.in_flight:
            return
        if clock.now_s < self.hung_until_s:
            clock.after(self.hung_until_s - clock.now_s, lambda: self._begin(caller, takes_s, clock))
            return
        self.in_flight[caller] = True
        caller.first_byte()
        clock.after(takes_s, lambda: self._end(caller, clock))

    def _end(self, caller: Caller, clock: Clock) -> None:
        if caller not in self.in_flight:
            return
        if clock.now_s < self.hung_until_s:
            clock.after(self.hung_until_s - clock.now_s, lambda: self._end(caller, clock))
            return
        self.leave(caller)
        caller.finished()

    def leave(self, caller: Caller) -> None:
        """Over, or its client went away."""
        self.in_flight.pop(caller, None)
        if not self.in_flight:
            waiting, self.on_idle = self.on_idle, []
            for go_on in waiting:
                go_on()

    def die(self) -> None:
        """Its connections break."""
        in_flight, self.in_flight = self.in_flight, {}
        for caller, has_begun in in_flight.items():
            if has_begun:
                caller.broken()
            else:
                caller.bounced("cut")
        waiting, self.on_idle = self.on_idle, []
        for go_on in waiting:
            go_on()

"""A node agent of three GPUs to which anything happens: wide replicas, gangs, losses, restarts, and time.

Judged by facts alone (`Books`, `Gangs`) after each of them, and by the agent's own invariants.
"""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, Final, TypeVar

from kit.outcomes import Effect, Input, Outcome, Timer
from kit.service import Service
from schemas.catalogue import decode, encode
from schemas.deployments import SwapDriver
from schemas.messages import Fact
from schemas.placement import GangAbandoned, GangCommitted, PlacementProposed
from services.nodeagent.core import SERVICE
from services.nodeagent.inputs import AliveDue, BurstDue, EngineEffect, ParkEngine, StartEngine, StopEngine, WakeEngine
from services.swarm.checks import Books
from services.swarm.gangs import Gangs
from services.swarm.ladders import Ladders
from tests.unit.nodeagent import builders as nodes

T = TypeVar("T")
Choose = Callable[[Sequence[Any]], Any]
"""One of them, by whoever plays."""

GPUS: Final = ("gpu-0", "gpu-1", "gpu-2")
PLACES: Final = tuple(places for count in (1, 2, 3) for places in combinations(GPUS, count))
SIZES_GIB: Final = tuple(range(2, 76))
HOLD_S: Final = 30.0
STEPS: Final = (
    "propose", "gang", "commit", "abandon", "wait", "release", "wake", "park", "end", "end", "stay", "lose", "restart",
)  # fmt: skip


class Alone:
    """One agent and what is on its way for it."""

    swap_drivers: tuple[SwapDriver, ...] = ()
    demand_s = 0.0

    def __init__(self, choose: Choose, service: Service[Any] = SERVICE) -> None:
        self.service = service
        gpus = [nodes.gpu(index, swap_drivers=self.swap_drivers) for index in range(len(GPUS))]
        self.agent = nodes.Agent(*gpus, service=service, demand_s=self.demand_s)
        self.books = Books(gpus={gpu.gpu_uuid: gpu for gpu in gpus})
        self.ladders = Ladders()
        self.gangs = Gangs()
        self.effects: list[EngineEffect] = []
        self.timers: list[Timer] = []
        self.gang_of: dict[str, str] = {}
        self._choose = choose
        self._number = 0

    def play(self, step_count: int) -> None:
        """So many steps; then time passes, and nothing may be held any more for a gang that nobody committed."""
        for _ in range(step_count):
            self.step(self._choose(STEPS))
        self.step("wait")
        self.gangs.check_ended(self.agent.now_s)
        for uuid in GPUS:
            assert self.agent.state.held_bytes(uuid) == self.books.sums.get(uuid, 0), "agent and account differ"

    def step(self, step: str) -> None:
        names = sorted(self.agent.state.replicas)
        if step in ("propose", "gang"):
            self._propose("" if step == "propose" else f"g{self._number}")
        elif step == "wait":
            self._wait(HOLD_S + 1.0)
        elif step == "restart":
            self._restart()
        elif step == "end":
            if self.effects:
                self._end(self.effects.pop(self._choose(range(len(self.effects)))))
        elif step in ("commit", "abandon"):
            if self.gang_of:
                self._settle_gang(self._choose(sorted(set(self.gang_of.values()))), is_commit=step == "commit")
        elif names:
            self._about(step, self._choose(names), names)

    def _about(self, step: str, name: str, names: list[str]) -> None:
        match step:
            case "release":
                self._handle(nodes.release(name))
            case "wake":
                victims = [other for other in names if self._choose((True, False))]
                self._handle(self.agent.wake(name, *victims))
            case "park":
                self._handle(self.agent.park(name))
            case "stay":
                self._handle(self.agent.stayed(name))
            case _:
                assert step == "lose", step
                self._handle(self.agent.lost(name))

    def _propose(self, gang_id: str) -> None:
        self._number += 1
        replicas = tuple(
            nodes.replica(
                f"r{self._number}-{part}",
                self._choose(SIZES_GIB),
                gpu_uuids=self._choose(PLACES),
                is_parkable=self._choose((True, True, True, False)),
                limit_gib=self._limit_gib(),
            )
            for part in range(self._choose((1, 1, 2)))
        )
        if gang_id:
            self.gang_of.update({replica.replica_id: gang_id for replica in replicas})
        proposed = PlacementProposed(
            at_s=0.0,
            proposal_id=f"p{self._number}",
            node=nodes.NODE,
            replicas=replicas,
            reason="",
            gang_id=gang_id,
            gang_hold_s=HOLD_S if gang_id else 0.0,
        )
        self.gangs.hear(proposed)
        self._handle(proposed)

    def _limit_gib(self) -> int:
        """Nobody has more than its request."""
        return 0

    def _settle_gang(self, gang_id: str, *, is_commit: bool) -> None:
        """As placement does: a commit only for a gang that was granted, of which it knows no end."""
        members = tuple(sorted(name for name, of in self.gang_of.items() if of == gang_id))
        if not is_commit:
            fact: Fact = GangAbandoned(
                at_s=0.0, node=nodes.NODE, gang_id=gang_id, replica_ids=members, reason="somebody refused"
            )
        elif all(name in self.gangs.granted for name in members):
            fact = GangCommitted(at_s=0.0, node=nodes.NODE, gang_id=gang_id, replica_ids=members)
        else:
            return
        for name in members:
            del self.gang_of[name]
        self.gangs.hear(fact)
        self._handle(fact)

    def _end(self, effect: EngineEffect) -> None:
        """It ends well; what became of its replica meanwhile is the agent's question."""
        name = effect.replica.replica_id
        if name not in self.agent.state.replicas:
            return
        match effect:
            case StartEngine():
                self._handle(self.agent.started(name))
            case ParkEngine():
                self._handle(self.agent.has_parked(name))
            case WakeEngine():
                self._handle(self.agent.woken(name))
            case StopEngine():
                self._handle(self.agent.stopped(name))

    def _wait(self, lasts_s: float) -> None:
        self.agent.now_s += lasts_s
        while due := [timer for timer in self.timers if timer.due_s <= self.agent.now_s]:
            first = min(due, key=lambda timer: timer.due_s)
            self.timers.remove(first)
            self._handle(first.input)

    def _restart(self) -> None:
        """The next life knows what the facts say; what was on its way is lost."""
        state = self.service.new_state(self.agent.state.settings)
        for told in self.agent.history:
            fact = decode(encode(told))
            assert isinstance(fact, Fact), fact
            self.service.evolve(state, fact)
        self.agent.state = state
        self.effects.clear()
        self.timers.clear()
        self._take(list(self.service.on_start(state, self.agent.context())))
        self._handle(self.agent.probed())

    def _handle(self, item: Fact | Input | Any) -> None:
        self._take(self.agent.handle(item))

    def _take(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            if isinstance(outcome, Fact):
                self.books.hear(outcome)
                self.ladders.hear(outcome)
                self.gangs.hear(outcome)
            elif isinstance(outcome, EngineEffect):
                self.effects.append(outcome)
            elif isinstance(outcome, Timer):
                self.timers += [] if isinstance(outcome.input, AliveDue | BurstDue) else [outcome]
            else:
                assert isinstance(outcome, Effect), outcome

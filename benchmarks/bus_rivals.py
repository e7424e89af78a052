"""Section ``rivals`` of the bus benchmark: two instances of one writer, each of which believes to be the one.

In every round both append behind the same fact at the same time, by the real path, on a cluster whose leader is killed
on the way; whoever loses rebuilds. The stream must be one line of facts, and exactly those that a winner was told of.
"""

import random
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import anyio

from benchmarks.ledger import Deposit, LedgerState, ledger, oracle, read_all
from benchmarks.nats_cluster import NatsCluster
from benchmarks.report import Value, quantiles
from benchmarks.sections import Measured, Setting, Wanted
from kit.bus import Bus, CaughtUp, Stream
from kit.bus_nats import NatsBus
from kit.commit import DirectCommitter
from kit.errors import Superseded
from kit.processor import Delivery, Processor
from kit.snapshots import Snapshot

BARS: Final = (
    Wanted(figure="race_both_won_count", op="==", bar=0),
    Wanted(figure="race_problem_count", op="==", bar=0),
    Wanted(figure="race_skipped_count", op="==", bar=0),
    Wanted(figure="race_won_a_count", op=">", bar=0),
    Wanted(figure="race_won_b_count", op=">", bar=0),
)
ROUNDS: Final = 10_000
ROUNDS_PER_SNAPSHOT: Final = 100
ROUNDS_PER_KILL: Final = 500
DOWN_S: Final = 1.0
"""From the kill to the start of the same server."""
CURRENT_S_MAX: Final = 60.0
SAY_EVERY: Final = 250

Say = Callable[[str], None]
Kill = Callable[[], Coroutine[Any, Any, None]]


@dataclass(slots=True)
class Race:
    """How often each rival won, and what was wrong."""

    round_count: int = 0
    won: dict[str, int] = field(default_factory=lambda: {"a": 0, "b": 0})
    both_won_count: int = 0
    none_won_count: int = 0
    kill_count: int = 0
    skipped_count: int = 0
    """Facts in the stream that a fold does not accept: harmless, and not expected."""
    rebuild_s: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Rival:
    """One of two instances of the writer, with the real decision and append path."""

    def __init__(self, name: str, bus: Bus) -> None:
        self.name = name
        self.won_ids: list[str] = []
        self._bus = bus
        self._life = 0
        self._is_writer = False
        self._random = random.Random(name)
        self._processor: Processor[LedgerState]
        self._committer: DirectCommitter

    async def rebuild(self, snapshot: Snapshot | None) -> None:
        """What the runner does after `Superseded`: a new processor, folded up to the end of history."""
        self._life += 1
        self._is_writer = False
        self._processor = Processor(ledger(), None, writer="rivals", instance=f"{self.name}-{self._life}")
        if snapshot is not None:
            self._processor.restore(snapshot)
        reading = self._bus.read(Stream.HISTORY, [self._processor.prefix], after_seq=self._processor.read_seq)
        async for item in reading:
            if isinstance(item, CaughtUp):
                break
            self._processor.replay_one(item)
        await reading.aclose()
        self._committer = DirectCommitter(self._bus, self._processor)

    async def append(self) -> bool:
        """One batch: taking over first after a rebuild, else some deposits. False: another instance was faster."""
        if self._is_writer:
            for _ in range(self._random.randint(1, 4)):
                deposit = Deposit(reason=self._random.randbytes(20).hex())
                self._processor.receive(Delivery(input=deposit, now_s=time.time()))
            batch = self._processor.take_batch()
        else:
            batch = self._processor.take_over(now_s=time.time())
        try:
            epoch = await self._committer.commit_durably(batch)
        except Superseded:
            return False
        if not self._is_writer:
            self._processor.started(writer_epoch=epoch)
            self._is_writer = True
        self.won_ids += [entry.id for entry in batch.entries]
        return True

    def snapshot(self) -> Snapshot:
        return self._processor.snapshot()

    @property
    def last_seq(self) -> int:
        return self._processor.last_seq

    @property
    def digest(self) -> str:
        return self._processor.state.digest


async def race(
    url: str, *, rounds: int, kill: Kill | None = None, kill_every: int = ROUNDS_PER_KILL, say: Say | None = None
) -> Race:
    """In each round both append behind the same fact, at the same time; whoever loses rebuilds.

    `kill` is called beside every `kill_every`-th round.
    """
    outcome = Race()
    order: list[str] = []
    async with NatsBus(url, name="a") as first, NatsBus(url, name="b") as second:
        rivals = [Rival("a", first), Rival("b", second)]
        snapshot: Snapshot | None = None
        for rival in rivals:
            await rival.rebuild(None)
        for number in range(1, rounds + 1):
            won = await _round(rivals, kill if number % kill_every == 0 else None)
            outcome.round_count += 1
            outcome.kill_count += kill is not None and number % kill_every == 0
            if say is not None and number % SAY_EVERY == 0:
                say(f"round {number}/{rounds}: won {outcome.won['a']} to {outcome.won['b']}")
            winners = [rival for rival in rivals if won[rival.name]]
            outcome.both_won_count += len(winners) == 2
            outcome.none_won_count += not winners
            for winner in winners:
                outcome.won[winner.name] += 1
                order += winner.won_ids
                winner.won_ids = []
                if number % ROUNDS_PER_SNAPSHOT == 0:
                    snapshot = winner.snapshot()
            for rival in rivals:
                if not won[rival.name]:
                    began_s = time.monotonic()
                    await _rebuild_to(rival, snapshot, max((winner.last_seq for winner in winners), default=0))
                    outcome.rebuild_s.append(time.monotonic() - began_s)
        await _judge_race(first, rivals, order, outcome)
    return outcome


async def _rebuild_to(rival: Rival, snapshot: Snapshot | None, last_seq: int) -> None:
    """A replica that is behind may tell an earlier end: the rival would lose once more, so look again."""
    while True:
        await rival.rebuild(snapshot)
        if rival.last_seq >= last_seq:
            return
        await anyio.sleep(0.05)


async def _round(rivals: Sequence[Rival], kill: Kill | None) -> dict[str, bool]:
    won: dict[str, bool] = {}

    async def append(rival: Rival) -> None:
        won[rival.name] = await rival.append()

    async with anyio.create_task_group() as tg:
        if kill is not None:
            tg.start_soon(kill)
        for rival in random.sample(rivals, len(rivals)):
            tg.start_soon(append, rival)
    return won


async def _judge_race(bus: Bus, rivals: Sequence[Rival], order: Sequence[str], outcome: Race) -> None:
    """By a fold with the real processor, and by the oracle, which knows nothing of it."""
    history = [stored async for stored in read_all(bus, ["sublet.fact.rivals.>"])]
    outcome.problems += oracle(history)
    fold = Processor(ledger(), None, writer="rivals", instance="judge")
    accepted = []
    for stored in history:
        skipped_count = fold.skipped_count
        fold.replay_one(stored)
        if fold.skipped_count == skipped_count:
            accepted.append(stored.id)
    outcome.skipped_count = fold.skipped_count
    if accepted != list(order):
        outcome.problems.append("the fold accepts other facts than the winners were told of")
    for rival in rivals:
        if rival.last_seq == fold.last_seq and rival.digest != fold.state.digest:
            outcome.problems.append(f"rival {rival.name} has another state than the fold of the whole stream")


def killing_leaders(cluster: NatsCluster) -> Kill:
    """SIGKILL of the leader beside the round, and its start one second later."""

    async def kill() -> None:
        with anyio.move_on_after(CURRENT_S_MAX):
            await cluster.until_current()  # Whom the last kill hit has caught up: one that is missing is all it bears.
        leader = await cluster.leader()
        cluster.kill(leader)
        await anyio.sleep(DOWN_S)
        await cluster.start(leader)

    return kill


def figures_of(outcome: Race) -> dict[str, Value]:
    return {
        "race_count": outcome.round_count,
        "race_won_a_count": outcome.won["a"],
        "race_won_b_count": outcome.won["b"],
        "race_both_won_count": outcome.both_won_count,
        "race_none_won_count": outcome.none_won_count,
        "race_kill_count": outcome.kill_count,
        "race_skipped_count": outcome.skipped_count,
        **quantiles("race_rebuild_s", outcome.rebuild_s, (50, 100)),
        "race_problem_count": len(outcome.problems),
    }


async def measure(setting: Setting) -> Measured:
    """See `benchmarks.sections`."""
    rounds = setting.count(ROUNDS, 50)
    async with NatsCluster(setting.folder) as cluster:
        outcome = await race(cluster.url, rounds=rounds, kill=killing_leaders(cluster), say=setting.progress.say)
    return Measured(figures=figures_of(outcome), notes=outcome.problems[:3])

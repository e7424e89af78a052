"""The append path on a cluster of three: a lost leader, and two writers who each believe to be the one.

`lose_leaders` and `race` take a running cluster or server and return plain figures; `benchmarks.bus` prints them.
"""

import random
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from benchmarks.ledger import Account, Deposit, LedgerState, Writer, ledger, living, oracle, read_all
from benchmarks.nats_cluster import NatsCluster
from benchmarks.report import Bar, Value, quantiles
from kit.bus import Bus, CaughtUp, Stream
from kit.bus_nats import NatsBus
from kit.commit import DirectCommitter
from kit.errors import Superseded
from kit.processor import Delivery, Processor
from kit.snapshots import Snapshot

WRITERS = ("w0", "w1", "w2")
LEADER_DOWN_S = 1.0
SETTLED_S = 1.0
"""Load before each kill."""
ROUND_S_MAX = 60.0
GAP_S_P50_MAX = 6.0
GAP_S_MAX = 15.0
ROUNDS_PER_SNAPSHOT = 100
ROUNDS_PER_KILL = 500

Say = Callable[[str], None]
Kill = Callable[[], Coroutine[Any, Any, None]]


# ---- a lost leader --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class LeaderLoss:
    """What callers of the append path saw."""

    gaps_s: list[float] = field(default_factory=list)
    """For each round the longest time that an append took among all writers, from the kill on."""
    error_count: int = 0
    acknowledged_count: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def lost_count(self) -> int:
        return sum("lost: " in problem for problem in self.problems)


async def lose_leaders(cluster: NatsCluster, *, rounds: int, seed: int = 1, say: Say = print) -> LeaderLoss:
    """`rounds` times under load: SIGKILL of the history's leader, then its start, until all replicas are current."""
    outcome = LeaderLoss()
    accounts = [Account(name) for name in WRITERS]
    async with AsyncExitStack() as stack:
        writers = []
        for number, account in enumerate(accounts):
            bus = await stack.enter_async_context(NatsBus(cluster.url, name=account.writer))
            writers.append(await stack.enter_async_context(living(account, bus, "i1", seed=seed + number)))
        async with anyio.create_task_group() as tg:
            for writer in writers:
                tg.start_soon(_work, writer, outcome)
            for number in range(1, rounds + 1):
                await anyio.sleep(SETTLED_S)
                gap_s = await _lose_leader(cluster, accounts)
                outcome.gaps_s.append(gap_s)
                say(f"leader loss {number}/{rounds}: appends waited up to {gap_s:.1f} s")
            await anyio.sleep(SETTLED_S)
            tg.cancel_scope.cancel()
    await _judge(cluster.url, accounts, outcome)
    return outcome


async def _work(writer: Writer, outcome: LeaderLoss) -> None:
    try:
        await writer.take_over()
        await writer.work(pause_s=0.002)
    except Exception as error:  # noqa: BLE001  (whatever a caller sees is an error here)
        outcome.error_count += 1
        outcome.problems.append(f"{writer.account.writer}: {error!r}")


async def _lose_leader(cluster: NatsCluster, accounts: Sequence[Account]) -> float:
    """The longest append from the kill on, until every writer has had one that began after it."""
    before = [len(account.gaps_s) for account in accounts]
    leader = await cluster.leader()
    cluster.kill(leader)
    await anyio.sleep(LEADER_DOWN_S)
    await cluster.start(leader)
    with anyio.move_on_after(ROUND_S_MAX):
        for account, count in zip(accounts, before, strict=True):
            await account.until_appended(count + 2)
        await cluster.until_current()
    return max(
        (gap_s for account, count in zip(accounts, before, strict=True) for gap_s in account.gaps_s[count:]),
        default=ROUND_S_MAX,
    )


async def _judge(url: str, accounts: Sequence[Account], outcome: LeaderLoss) -> None:
    async with NatsBus(url, name="judge") as bus:
        for account in accounts:
            async with living(account, bus, "judge", seed=0) as judge:
                outcome.problems += account.problems(judge.found)
            outcome.acknowledged_count += len(account.acknowledged)
        outcome.problems += oracle([stored async for stored in read_all(bus, ["sublet.fact.>"])])


def leader_loss_figures(outcome: LeaderLoss) -> dict[str, Value]:
    return {
        "leader_loss_count": len(outcome.gaps_s),
        **quantiles("leader_loss_gap_s", outcome.gaps_s, (50, 100)),
        "leader_loss_error_count": outcome.error_count,
        "leader_loss_acknowledged_count": outcome.acknowledged_count,
        "leader_loss_lost_count": outcome.lost_count,
        "leader_loss_problem_count": len(outcome.problems),
    }


def leader_loss_bars(figures: Mapping[str, Value]) -> list[Bar]:
    wanted: list[tuple[str, str, float]] = [
        ("leader_loss_gap_s_p50", "<=", GAP_S_P50_MAX),
        ("leader_loss_gap_s_p100", "<=", GAP_S_MAX),
        ("leader_loss_error_count", "==", 0),
        ("leader_loss_lost_count", "==", 0),
        ("leader_loss_problem_count", "==", 0),
    ]
    return [Bar(name=name, value=figures[name], op=op, bar=bar) for name, op, bar in wanted]


# ---- two writers ----------------------------------------------------------------------------------------------------


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


async def race(url: str, *, rounds: int, kill: Kill | None = None, kill_every: int = ROUNDS_PER_KILL) -> Race:
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
    """SIGKILL of the leader a moment into the round, and its start one second later."""

    async def kill() -> None:
        await anyio.sleep(random.uniform(0, 0.01))
        leader = await cluster.leader()
        cluster.kill(leader)
        await anyio.sleep(LEADER_DOWN_S)
        await cluster.start(leader)
        with anyio.move_on_after(ROUND_S_MAX):
            await cluster.until_current()

    return kill


def race_figures(outcome: Race) -> dict[str, Value]:
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


def race_bars(figures: Mapping[str, Value]) -> list[Bar]:
    zero = ("race_both_won_count", "race_problem_count", "race_skipped_count")
    bars = [Bar(name=name, value=figures[name], op="==", bar=0) for name in zero]
    won = ("race_won_a_count", "race_won_b_count")
    return [*bars, *(Bar(name=name, value=figures[name], op=">", bar=0) for name in won)]


async def measure(
    folder: Path, *, leader_rounds: int, race_rounds: int, say: Say = print
) -> tuple[dict[str, Value], list[Bar], list[str]]:
    """Both on a cluster of their own: figures, bars, and what was wrong."""
    figures: dict[str, Value] = {}
    bars: list[Bar] = []
    problems: list[str] = []
    if leader_rounds:
        async with NatsCluster(folder / "leader-loss") as cluster:
            losses = await lose_leaders(cluster, rounds=leader_rounds, say=say)
        figures |= leader_loss_figures(losses)
        bars += leader_loss_bars(figures)
        problems += losses.problems
    if race_rounds:
        async with NatsCluster(folder / "race") as cluster:
            raced = await race(cluster.url, rounds=race_rounds, kill=killing_leaders(cluster))
        figures |= race_figures(raced)
        bars += race_bars(figures)
        problems += raced.problems
    return figures, bars, problems

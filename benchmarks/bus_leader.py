"""Section ``leader`` of the bus benchmark: a cluster of three loses the leader of history under load, again and again.

What callers of the append path wait and see, and whether anything that they were told is missing afterwards.
"""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Final

import anyio

from benchmarks.ledger import Account, Writer, living, oracle, read_all
from benchmarks.nats_cluster import NatsCluster
from benchmarks.report import Value, quantiles
from benchmarks.sections import Measured, Setting, Wanted
from kit.bus_nats import NatsBus

BARS: Final = (
    Wanted(figure="leader_loss_gap_s_p50", op="<=", bar=6.0),
    Wanted(figure="leader_loss_gap_s_p100", op="<=", bar=15.0),
    Wanted(figure="leader_pause_gap_s_p100", op="<=", bar=15.0),
    Wanted(figure="leader_loss_error_count", op="==", bar=0),
    Wanted(figure="leader_loss_lost_count", op="==", bar=0),
    Wanted(figure="leader_loss_problem_count", op="==", bar=0),
)
WRITERS: Final = ("w0", "w1", "w2")
KILLS: Final = 12
PAUSES: Final = 3
PAUSE_S: Final = 15.0
DOWN_S: Final = 1.0
"""From the kill to the start of the same server."""
SETTLED_S: Final = 1.0
"""Load before each kill."""
ROUND_S_MAX: Final = 60.0

Say = Callable[[str], None]


@dataclass(slots=True)
class LeaderLoss:
    """What callers of the append path saw."""

    gaps_s: list[float] = field(default_factory=list)
    """For each kill the longest time that an append took among all writers, from it on."""
    pause_gaps_s: list[float] = field(default_factory=list)
    """The same for each pause."""
    error_count: int = 0
    acknowledged_count: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def lost_count(self) -> int:
        return sum("lost: " in problem for problem in self.problems)


async def lose_leaders(cluster: NatsCluster, *, kills: int, pauses: int = 0, seed: int = 1, say: Say) -> LeaderLoss:
    """Under load: SIGKILL of history's leader and its start, then SIGSTOP of the leader and SIGCONT, so many times."""
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
            for number in range(1, kills + 1):
                outcome.gaps_s.append(await _gap_s(cluster, accounts, _kill))
                say(f"leader killed {number}/{kills}: appends waited up to {outcome.gaps_s[-1]:.1f} s")
            for number in range(1, pauses + 1):
                outcome.pause_gaps_s.append(await _gap_s(cluster, accounts, _pause))
                say(f"leader paused {number}/{pauses}: appends waited up to {outcome.pause_gaps_s[-1]:.1f} s")
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


async def _kill(cluster: NatsCluster, leader: str) -> None:
    cluster.kill(leader)
    await anyio.sleep(DOWN_S)
    await cluster.start(leader)


async def _pause(cluster: NatsCluster, leader: str) -> None:
    cluster.pause(leader)
    try:
        await anyio.sleep(PAUSE_S)
    finally:
        cluster.resume(leader)


async def _gap_s(
    cluster: NatsCluster, accounts: Sequence[Account], strike: Callable[[NatsCluster, str], Awaitable[None]]
) -> float:
    """The longest append from the strike on, until every writer has had one that began after it."""
    await anyio.sleep(SETTLED_S)
    before = [len(account.gaps_s) for account in accounts]
    await strike(cluster, await cluster.leader())
    with anyio.move_on_after(ROUND_S_MAX):
        for account, count in zip(accounts, before, strict=True):
            await account.until_appended(count + 2)
        await cluster.until_current()
        return max(max(account.gaps_s[count:]) for account, count in zip(accounts, before, strict=True))
    return ROUND_S_MAX


async def _judge(url: str, accounts: Sequence[Account], outcome: LeaderLoss) -> None:
    async with NatsBus(url, name="judge") as bus:
        for account in accounts:
            async with living(account, bus, "judge", seed=0) as judge:
                outcome.problems += account.problems(judge.found)
            outcome.acknowledged_count += len(account.acknowledged)
        outcome.problems += oracle([stored async for stored in read_all(bus, ["sublet.fact.>"])])


def figures_of(outcome: LeaderLoss) -> dict[str, Value]:
    return {
        "leader_loss_count": len(outcome.gaps_s),
        **quantiles("leader_loss_gap_s", outcome.gaps_s, (50, 100)),
        "leader_pause_count": len(outcome.pause_gaps_s),
        **quantiles("leader_pause_gap_s", outcome.pause_gaps_s, (50, 100)),
        "leader_loss_error_count": outcome.error_count,
        "leader_loss_acknowledged_count": outcome.acknowledged_count,
        "leader_loss_lost_count": outcome.lost_count,
        "leader_loss_problem_count": len(outcome.problems),
    }


async def measure(setting: Setting) -> Measured:
    """See `benchmarks.sections`."""
    async with NatsCluster(setting.folder) as cluster:
        kills, pauses = setting.count(KILLS, 1), setting.count(PAUSES, 1)
        outcome = await lose_leaders(cluster, kills=kills, pauses=pauses, say=setting.progress.say)
    notes = ["A leader's successor is chosen by the servers' own clocks, 4 to 9 s after they last heard of it."]
    return Measured(figures=figures_of(outcome), notes=[*notes, *outcome.problems[:3]])

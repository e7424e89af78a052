"""``python -m benchmarks agent``: the node agent is ended by SIGKILL again and again while models take turns.

Every process of a stack on one software GPU, real HTTP and NATS. Most kills are aimed: they follow on the fact that
begins a start, a park, a wake, a release or a change of size. What counts is how soon the next life of the agent has
taken everything up, that no engine was started again for it, and that no request was lost.
"""

import argparse
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import anyio

import sublet
from benchmarks import faults, stack_run
from benchmarks.clients import Clients
from benchmarks.fleet import WEIGHTS, Fleet
from benchmarks.history import History, Replica
from benchmarks.progress import Progress
from benchmarks.report import Bar, Report, Value, commit, quantiles
from benchmarks.trace import Planned
from schemas.messages import Fact, token_of
from schemas.nodes import (
    GiveBackAsked,
    LeaseResized,
    NodeJoined,
    ReplicaDraining,
    ReplicaStarting,
    ReplicaSuspect,
    ReplicaWaking,
)
from services.local.settings import StackSettings
from services.local.stack import LocalStack
from sublet.context import load as load_context
from sublet.errors import SubletError

AGENT: Final = "nodeagent"
PAUSE_S_MAX: Final = 1.5
"""Between the return from one kill and the next, on average half of it: the agent gets something done in between."""
AIMED_FRACTION: Final = 0.75
AIM_S_MAX: Final = 2.0
"""When what a kill is aimed at has not begun within this, the agent is killed anyway."""
AFTER_S_MAX: Final = 0.15
"""From the fact that begins a step until the kill: a park takes tens of milliseconds here, a start a second."""
AIMS: Final[dict[str, type[Fact]]] = {
    "park": ReplicaDraining,
    "wake": ReplicaWaking,
    "start": ReplicaStarting,
    "size": LeaseResized,
    "give_back": GiveBackAsked,
}
"""{what a kill is aimed at: the fact that begins it}"""
MODELS: Final = ("one", "two", "three", "four")
"""Each with a share of 0.3 of the one GPU: three are resident at a time, so that they take turns."""
SHARE: Final = 0.3
LIMIT: Final = 0.36
"""What is left over is lent to those that serve, and asked back by whoever wakes."""
GUEST: Final = "guest"
"""Comes and goes: its starts and its ends fall into kills too."""
GUEST_SHARE: Final = 0.05
GUEST_PAUSE_S: Final = 1.0
GUEST_S_MAX: Final = 30.0
"""Then it is deployed or retired again: what its agent was asked in the moment of a kill may have been refused."""
REQUESTS_PER_S: Final = 4.0
ADOPTED_S_P50_MAX: Final = 2.0
ADOPTED_S_MAX: Final = 5.0
LOOK_EVERY_S: Final = 0.01
COLD_START_S: Final = 0.05
RESTART_LONGEST_S: Final = 0.1
"""The agent is started again at once, however soon it was killed again: what counts is how soon it is back to work."""
SEED: Final = 20


@dataclass(slots=True)
class Kills:
    """What came of each; in seconds from the kill."""

    ready_s: list[float] = field(default_factory=list)
    """Until the new process says that it is ready."""
    adopted_s: list[float] = field(default_factory=list)
    """Until its `NodeJoined` is in the stream too: it has looked at its node, and every replica is taken up with it."""
    cpu_s: list[float] = field(default_factory=list)
    """Of the processors, what the new process had used by then: what a return costs however busy the host is."""
    missed_count: int = 0
    """Not back within `faults.RECOVERY_S_MAX`."""
    aims: Counter[str] = field(default_factory=Counter)
    """{what was under way: kills that were aimed at it and met it}"""
    is_over: bool = False

    @property
    def done_count(self) -> int:
        return len(self.ready_s) + self.missed_count


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks agent",
        description="The node agent is killed again and again under load on a software GPU.",
    )
    parser.add_argument("--kills", type=int, default=100, help="how often (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=20.0, help="tell what there is by then (default: %(default)g)")
    parser.add_argument("--seed", type=int, default=SEED, help="of the load and the moments (default: %(default)s)")
    stack_run.add_arguments(parser)
    return parser


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0 when it ran, 1 when a bar is missed and asked for, or when it could not run."""
    return stack_run.exit_status(_parser().parse_args(arguments), _measured, settings=_settings)


def _settings(state_dir: Path) -> StackSettings:
    return StackSettings(
        state_dir=state_dir,
        gpu_count=1,
        uses_software_gpu=True,
        cold_start_s=COLD_START_S,
        restart_longest_s=RESTART_LONGEST_S,
    )


async def _measured(options: argparse.Namespace, stack: LocalStack, history: History, progress: Progress) -> Report:
    draw, kills = random.Random(options.seed), Kills()
    fleet = Fleet(stack, history, progress, MODELS)
    await fleet.deploy_these([sublet.deployment(m, weights=WEIGHTS, share=SHARE, limit=LIMIT) for m in MODELS])
    clients = Clients(gateway_url=stack.gateway_url, api_key=stack.api_key)
    pids_before = await fleet.engine_pids()
    history.tally.restart()
    began_s = time.monotonic()

    def line() -> str:
        return (
            f"killed {kills.done_count}/{options.kills}  answered {clients.answered_count}  "
            f"failed {clients.failures.total()}  wakes {len(history.tally.counts.wakes_s)}"
        )

    async with progress.showing(line), anyio.create_task_group() as tg:
        tg.start_soon(clients.run, _load(random.Random(f"{options.seed}/load"), kills))
        tg.start_soon(_guest, stack, history, kills)
        while kills.done_count < options.kills and time.monotonic() - began_s < 60 * options.minutes:
            await anyio.sleep(draw.uniform(0.0, PAUSE_S_MAX))
            await _aim(draw, history, kills)
            await _kill(stack, history, kills, at_s=time.monotonic() - began_s)
        kills.is_over = True
    pids_after = await fleet.engine_pids()
    kept_count = sum(pids_after.get(replica) == pid for replica, pid in pids_before.items())
    counts = history.tally.counts
    figures: dict[str, Value] = {
        "kill_count": kills.done_count,
        **quantiles("ready_s", kills.ready_s, (50, 95)),
        **quantiles("adopted_s", kills.adopted_s, (50, 95)),
        "adopted_s_max": round(max(kills.adopted_s), 4) if kills.adopted_s and not kills.missed_count else None,
        **quantiles("adopted_cpu_s", kills.cpu_s, (50, 95)),
        **{f"kill_in_{aim}_count": kills.aims[aim] for aim in AIMS},
        "sent_count": len(clients.requests),
        "answered_count": clients.answered_count,
        "lost_count": clients.failures.total(),
        "longest_request_s": round(max(r.end_s - r.sent_s for r in clients.requests if r.end_s is not None), 3),
        "wake_count": len(counts.wakes_s),
        "park_count": counts.park_count,
        "start_count": counts.cold_start_count,
        "resize_count": _fact_count(history, LeaseResized),
        "suspect_count": _fact_count(history, ReplicaSuspect),
        "engine_restart_count": len(pids_before) - kept_count,
        "seed": options.seed,
        "run_s": round(time.monotonic() - began_s, 1),
    }
    notes = ["Figures of a software GPU say nothing about the speed of a real one; docs/benchmarks.md defines each."]
    if clients.failures:
        notes.append("Lost: " + ", ".join(f"{count} x {code}" for code, count in clients.failures.items()) + ".")
    return Report(
        benchmark="agent",
        label=stack.label,
        commit=commit(),
        figures=figures,
        bars=_bars(figures, options.kills),
        notes=notes,
    )


def _bars(figures: dict[str, Value], kill_count: int) -> list[Bar]:
    wanted: list[tuple[str, str, int | float]] = [
        ("kill_count", ">=", kill_count),
        ("adopted_s_p50", "<=", ADOPTED_S_P50_MAX),
        ("adopted_s_max", "<=", ADOPTED_S_MAX),
        ("engine_restart_count", "==", 0),
        ("lost_count", "==", 0),
    ]
    return [Bar(name=name, value=figures[name], op=op, bar=bar) for name, op, bar in wanted]


# --- The load ---------------------------------------------------------------------------------------------------------


def _load(draw: random.Random, kills: Kills) -> Iterator[Planned]:
    """Short chats at random moments, to a model that changes every second or so: they take turns all the time."""
    at_s = 0.0
    while not kills.is_over:
        at_s += draw.expovariate(REQUESTS_PER_S)
        model = MODELS[int(at_s) % len(MODELS)] if draw.random() < 0.8 else draw.choice(MODELS)
        yield Planned(due_s=at_s, model=model, input_tokens=20, output_tokens=4)


async def _guest(stack: LocalStack, history: History, kills: Kills) -> None:
    """A small model is deployed, started, retired and gone, again and again."""
    wish = sublet.deployment(GUEST, weights="1GB", share=GUEST_SHARE)
    async with sublet.connect(load_context(path=stack.context_path)) as client:
        while not kills.is_over:
            try:
                await client.deploy(wish)
                await _until(lambda: any(r.is_ready for r in _guests(history)))
                await anyio.sleep(GUEST_PAUSE_S)
                await client.retire(GUEST)
                await _until(lambda: not _guests(history))
            except SubletError:
                await anyio.sleep(GUEST_PAUSE_S)  # No answer in time: asked again.


def _guests(history: History) -> list[Replica]:
    return [replica for replica in history.tally.replicas.values() if replica.model == GUEST]


async def _until(reached: Callable[[], bool]) -> None:
    """Or for a while at the most."""
    with anyio.move_on_after(GUEST_S_MAX):
        while not reached():  # noqa: ASYNC110  (the bus tells)
            await anyio.sleep(LOOK_EVERY_S)


# --- The kills --------------------------------------------------------------------------------------------------------


async def _aim(draw: random.Random, history: History, kills: Kills) -> None:
    """Returns when something has just begun, drawn by chance; now and then at once."""
    if draw.random() >= AIMED_FRACTION:
        return
    aim, after_s = draw.choice(list(AIMS)), draw.uniform(0.0, AFTER_S_MAX)
    seen_count = len(history.stored)
    with anyio.move_on_after(AIM_S_MAX):
        await _told(history, AIMS[aim], after_count=seen_count)
        await anyio.sleep(after_s)
        kills.aims[aim] += 1


async def _told(history: History, kind: type[Fact], *, after_count: int) -> None:
    """Returns when such a fact is in the stream behind so many."""
    token = token_of(kind)
    while not any(token in stored.subject.split(".") for stored in history.stored[after_count:]):  # noqa: ASYNC110  (the bus tells)
        await anyio.sleep(LOOK_EVERY_S)


async def _kill(stack: LocalStack, history: History, kills: Kills, *, at_s: float) -> None:
    """Returns when it has taken everything up again."""
    seen_count, began_s = len(history.stored), time.monotonic()
    killed = await faults.kill(stack, AGENT, at_s=at_s)
    with anyio.move_on_after(faults.RECOVERY_S_MAX) as scope:
        await _told(history, NodeJoined, after_count=seen_count)
    if killed.recovery_s is None or scope.cancelled_caught:
        kills.missed_count += 1
        return
    kills.ready_s.append(killed.recovery_s)
    kills.adopted_s.append(max(killed.recovery_s, time.monotonic() - began_s))
    kills.cpu_s.append(await _cpu_s(stack.pids[AGENT]))


async def _cpu_s(pid: int) -> float:
    fields = (await anyio.Path(f"/proc/{pid}/stat").read_text()).rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _fact_count(history: History, kind: type[Fact]) -> int:
    token = token_of(kind)
    return sum(token in stored.subject.split(".") for stored in history.stored)

"""``python -m benchmarks agent``: the node agent is ended by SIGKILL again and again while models take turns.

Every process of a stack on one software GPU, real HTTP and NATS. What counts is how soon the next life of the agent has
taken everything up, that no engine was started again for it, and that no request was lost.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import anyio

from benchmarks import faults
from benchmarks.clients import Clients
from benchmarks.fleet import Fleet, Stalled
from benchmarks.history import History
from benchmarks.progress import Progress
from benchmarks.report import Bar, Report, Value, commit, quantiles
from benchmarks.trace import Planned
from kit.bus import BusError
from kit.bus_nats import NatsBus
from kit.nats_access import ADMINISTRATOR, read_seed
from kit.supervisor import Interrupted, NotReady
from services.local.settings import StackSettings
from services.local.stack import LocalStack, running
from services.local.state import StackError
from sublet.errors import SubletError

AGENT: Final = "nodeagent"
EVERY_S: Final = 11.0
"""Between two kills. The supervisor waits longer and longer before it restarts what dies within 10 s of its start, and
that wait is not the agent's."""
MODELS: Final = ("one", "two", "three", "four")
"""Each with a share of 0.3 of the one GPU: three are resident at a time, so that they take turns."""
REQUESTS_PER_S: Final = 4.0
ADOPTED_S_P50_MAX: Final = 2.0
ADOPTED_S_MAX: Final = 5.0
LOOK_EVERY_S: Final = 0.01
COLD_START_S: Final = 0.05
SEED: Final = 20


@dataclass(slots=True)
class Kills:
    """What came of each; in seconds from the kill."""

    ready_s: list[float] = field(default_factory=list)
    """Until the new process says that it is ready."""
    adopted_s: list[float] = field(default_factory=list)
    """Until its `NodeJoined` is in the stream too: it has looked at its node, and every replica is taken up with it."""
    missed_count: int = 0
    """Not back within `faults.RECOVERY_S_MAX`."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks agent",
        description="The node agent is killed again and again under load on a software GPU.",
    )
    parser.add_argument("--kills", type=int, default=100, help="how often (default: %(default)s)")
    parser.add_argument("--every", type=float, default=EVERY_S, help="seconds between two (default: %(default)g)")
    parser.add_argument("--seed", type=int, default=SEED, help="of the load and the moments (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write figures and bars there")
    parser.add_argument("--check", action="store_true", help="exit status 1 when a bar is missed")
    return parser


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0 when it ran, 1 when a bar is missed and asked for, or when it could not run."""
    options = _parser().parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="sublet-agent-", ignore_cleanup_errors=True) as folder:
            settings = StackSettings(
                state_dir=Path(folder), gpu_count=1, uses_software_gpu=True, cold_start_s=COLD_START_S
            )
            report = anyio.run(_run, options, settings, backend_options={"use_uvloop": True})
    except Interrupted as interrupted:
        return 128 + interrupted.signal_number
    except (StackError, NotReady, Stalled, SubletError, BusError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if report is None:
        print("stopped; nothing was measured", file=sys.stderr)
        return 130
    print(report.table())
    if options.json:
        report.write(options.json)
    return 1 if options.check and report.missed else 0


async def _run(options: argparse.Namespace, settings: StackSettings) -> Report | None:
    progress = Progress()
    progress.say(f"starting a stack with one software GPU; seed {options.seed}")
    report: Report | None = None
    async with running(settings) as stack:
        seed = read_seed(stack.folder.keys, ADMINISTRATOR)
        async with NatsBus(stack.nats_url, seed, ADMINISTRATOR) as bus:
            history = History(bus)
            async with history.following():
                fleet = Fleet(stack, history, progress, MODELS)
                await fleet.deploy()
                report = await _measured(options, stack, fleet, progress)
        progress.say("stopping the stack")
    return report


async def _measured(options: argparse.Namespace, stack: LocalStack, fleet: Fleet, progress: Progress) -> Report:
    draw, history, kills = random.Random(options.seed), fleet.history, Kills()
    length_s = options.kills * (options.every + ADOPTED_S_P50_MAX) + 2.0
    requests = _load(draw, length_s=length_s)
    clients = Clients(gateway_url=stack.gateway_url, api_key=stack.api_key)
    pids_before = await fleet.engine_pids()
    history.tally.restart()
    began_s = time.monotonic()

    def line() -> str:
        done_count = len(kills.ready_s) + kills.missed_count
        return (
            f"killed {done_count}/{options.kills}  answered {clients.answered_count}  "
            f"failed {clients.failures.total()}  wakes {len(history.tally.counts.wakes_s)}"
        )

    async with progress.showing(line), anyio.create_task_group() as tg:
        tg.start_soon(clients.run, requests)
        for _ in range(options.kills):
            await anyio.sleep(options.every * draw.uniform(0.95, 1.05))
            await _kill(stack, history, kills, at_s=time.monotonic() - began_s)
    pids_after = await fleet.engine_pids()
    kept_count = sum(pids_after.get(replica) == pid for replica, pid in pids_before.items())
    figures: dict[str, Value] = {
        "kill_count": options.kills,
        **quantiles("ready_s", kills.ready_s, (50, 95)),
        **quantiles("adopted_s", kills.adopted_s, (50, 95)),
        "adopted_s_max": round(max(kills.adopted_s), 4) if kills.adopted_s and not kills.missed_count else None,
        "sent_count": len(clients.requests),
        "answered_count": clients.answered_count,
        "lost_count": clients.failures.total(),
        "longest_request_s": round(max(r.end_s - r.sent_s for r in clients.requests if r.end_s is not None), 3),
        "wake_count": len(history.tally.counts.wakes_s),
        "park_count": history.tally.counts.park_count,
        "engine_restart_count": len(pids_before) - kept_count,
        "seed": options.seed,
        "run_s": round(time.monotonic() - began_s, 1),
    }
    notes = ["Figures of a software GPU say nothing about the speed of a real one; docs/benchmarks.md defines each."]
    if clients.failures:
        notes.append("Lost: " + ", ".join(f"{count} x {code}" for code, count in clients.failures.items()) + ".")
    return Report(
        benchmark="agent", label=stack.label, commit=commit(), figures=figures, bars=_bars(figures), notes=notes
    )


def _bars(figures: dict[str, Value]) -> list[Bar]:
    wanted: list[tuple[str, str, int | float]] = [
        ("adopted_s_p50", "<=", ADOPTED_S_P50_MAX),
        ("adopted_s_max", "<=", ADOPTED_S_MAX),
        ("engine_restart_count", "==", 0),
        ("lost_count", "==", 0),
    ]
    return [Bar(name=name, value=figures[name], op=op, bar=bar) for name, op, bar in wanted]


def _load(draw: random.Random, *, length_s: float) -> list[Planned]:
    """Short chats at random moments, to a model that changes every second or so: they take turns all the time."""
    planned, at_s = [], 0.0
    while (at_s := at_s + draw.expovariate(REQUESTS_PER_S)) < length_s:
        model = MODELS[int(at_s) % len(MODELS)] if draw.random() < 0.8 else draw.choice(MODELS)
        planned.append(Planned(due_s=at_s, model=model, input_tokens=20, output_tokens=4))
    return planned


async def _kill(stack: LocalStack, history: History, kills: Kills, *, at_s: float) -> None:
    """Returns when it has taken everything up again."""
    seen_count, began_s = len(history.stored), time.monotonic()
    killed = await faults.kill(stack, AGENT, at_s=at_s)
    if killed.recovery_s is None:
        kills.missed_count += 1
        return
    with anyio.move_on_after(faults.RECOVERY_S_MAX) as scope:
        while not any(".nodes_joined_v1" in stored.subject for stored in history.stored[seen_count:]):  # noqa: ASYNC110  (the bus tells)
            await anyio.sleep(LOOK_EVERY_S)
    if scope.cancelled_caught:
        kills.missed_count += 1
        return
    kills.ready_s.append(killed.recovery_s)
    kills.adopted_s.append(max(killed.recovery_s, time.monotonic() - began_s))

"""``python -m benchmarks serve``: a real trace of many models through the whole stack on few GPUs.

Every process of a stack, real HTTP, open-loop clients. All models are deployed and parked before the clock starts.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio

from benchmarks import faults
from benchmarks.clients import Clients
from benchmarks.faults import Kill
from benchmarks.fleet import Fleet, Stalled
from benchmarks.history import Counts, History
from benchmarks.options import Parser
from benchmarks.progress import Progress
from benchmarks.replay import SETTINGS
from benchmarks.report import Bar, Report, Value, commit, quantiles
from benchmarks.trace import Planned, TraceError, busiest, plan, read
from kit.bus import BusError
from kit.bus_nats import NatsBus
from kit.nats_access import ADMINISTRATOR, read_seed
from kit.supervisor import Interrupted, NotReady
from services.local.settings import StackSettings
from services.local.stack import LocalStack, running
from services.local.state import StackError
from sublet.errors import SubletError

KILLABLE: Final = ("placement", "swapper", "nodeagent", "autoscaler", "gateway", "nats")
WAKES_MORE_THAN: Final = 40
COLD_START_S: Final = 0.05
"""Of the software engines: the run measures swaps, and no cold start lies within it."""


def _parser() -> Parser:
    parser = Parser(
        prog="python -m benchmarks serve",
        description="A real trace of many models through the whole stack on few software GPUs, over HTTP.",
    )
    add = parser.add_argument
    add(
        "--trace",
        type=Path,
        required=True,
        metavar="FILE",
        help="CSV or CSV.gz: t_s, model, input_tokens, output_tokens",
    )
    add("--models", type=_positive_int, default=56, help="so many of the trace's busiest models (default: %(default)s)")
    add("--gpus", type=_positive_int, default=2, help="software H100 80GB (default: %(default)s)")
    add("--speed", type=_positive, default=240.0, help="the trace's time is divided by it (default: %(default)g)")
    add("--start", type=_time, default=32400.0, help="seconds into the trace (default: %(default)g)")
    add("--every", type=_positive_int, default=10, help="send every so-manieth request (default: %(default)s)")
    add("--max-output", type=_positive_int, default=64, help="tokens of an answer at most (default: %(default)s)")
    add("--minutes", type=_positive, default=3.0, help="real time of the run (default: %(default)g)")
    add("--kill", choices=KILLABLE, help="end this part by SIGKILL at one third of the time")
    add("--json", type=Path, metavar="OUT", help="write figures and bars there")
    add("--check", action="store_true", help="exit status 1 when a bar is missed")
    add("--state", type=Path, metavar="DIR", help="keep the stack's logs and history in this new folder")
    return parser


def _positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1e9:
            return float(text)
    raise argparse.ArgumentTypeError(f"'{text}' is no positive number")


def _positive_int(text: str) -> int:
    if text.isascii() and text.isdecimal() and 0 < int(text) < 1_000_000:
        return int(text)
    raise argparse.ArgumentTypeError(f"'{text}' is no whole number from 1 on")


def _time(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < 1e12:
            return float(text)
    raise argparse.ArgumentTypeError(f"'{text}' is no time from 0 on")


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0 when it ran, 1 when a bar is missed and asked for, 2 for what was asked for wrongly."""
    options = _parser().parse_args(arguments)
    try:
        models, requests = _chosen(options)
        _check_places(options)
        with _state_folder(options.state) as folder:
            settings = StackSettings(
                state_dir=folder, gpu_count=options.gpus, uses_software_gpu=True, cold_start_s=COLD_START_S
            )
            ended = anyio.run(_run, options, settings, models, requests, backend_options={"use_uvloop": True})
    except TraceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as interrupted:
        return 128 + interrupted.signal_number
    except (StackError, NotReady, Stalled, SubletError, BusError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if isinstance(ended, int):
        print("stopped; nothing was measured", file=sys.stderr)
        return 128 + ended
    print(ended.table())
    if options.json:
        ended.write(options.json)
    return 1 if options.check and ended.missed else 0


def _chosen(options: argparse.Namespace) -> tuple[list[str], list[Planned]]:
    rows = read(options.trace)
    models = busiest(rows, options.models)
    requests = plan(
        rows,
        models=models,
        start_s=options.start,
        speed=options.speed,
        every=options.every,
        output_tokens_max=options.max_output,
        length_s=options.minutes * 60,
    )
    if not requests:
        raise TraceError(
            f"the trace {options.trace} has no request in that time; give another --start or more --minutes"
        )
    return models, requests


def _check_places(options: argparse.Namespace) -> None:
    """Before minutes of work, not after them."""
    if options.json and not options.json.resolve().parent.is_dir():
        raise TraceError(f"{options.json} cannot be written: there is no folder {options.json.resolve().parent}")
    if options.state and options.state.exists() and any(options.state.iterdir()):
        raise TraceError(f"{options.state} is not empty; --state takes a new folder")


@contextlib.contextmanager
def _state_folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="sublet-bench-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


# ---- the run --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """All that a report is made of."""

    deploy_s: float
    clients: Clients
    counts: Counts
    run_s: float
    killed: Kill | None
    pids_before: dict[str, int]
    pids_after: dict[str, int]
    equal_writers: list[str]
    history: History


async def _run(
    options: argparse.Namespace, settings: StackSettings, models: Sequence[str], requests: Sequence[Planned]
) -> Report | int:
    """The report, or the signal that ended it."""
    progress = Progress()
    progress.say(f"starting a stack with {settings.gpu_count} software GPUs")
    reports: list[Report] = []
    async with running(settings) as stack:
        started = stack
        seed = read_seed(stack.folder.keys, ADMINISTRATOR)
        async with NatsBus(stack.nats_url, seed, ADMINISTRATOR) as bus:
            history = History(bus)
            async with history.following():
                outcome = await _measured(options, stack, Fleet(stack, history, progress, models), requests, progress)
            reports.append(_report(options, stack.label, outcome, models))
        progress.say("stopping the stack")
    return reports[0] if reports else started.signal_received or 0


async def _measured(
    options: argparse.Namespace, stack: LocalStack, fleet: Fleet, requests: Sequence[Planned], progress: Progress
) -> Outcome:
    history = fleet.history
    deploy_s = await fleet.deploy()
    await fleet.park()
    pids_before = await fleet.engine_pids()
    history.tally.restart()
    clients = Clients(gateway_url=stack.gateway_url, api_key=stack.api_key)
    killed: list[Kill] = []
    began_s = time.monotonic()

    async def kill_at_a_third() -> None:
        await anyio.sleep(options.minutes * 60 / 3)
        progress.say(f"killing {options.kill}")
        killed.append(await faults.kill(stack, options.kill, at_s=clients.now_s))
        told = killed[0].recovery_s
        progress.say(f"{options.kill} is back" + ("" if told is None else f" after {told:.2f} s"))

    async with (
        progress.showing(lambda: _progress_line(clients, history, len(requests))),
        anyio.create_task_group() as tg,
    ):
        if options.kill:
            tg.start_soon(kill_at_a_third)
        await clients.run(requests)
    run_s = time.monotonic() - began_s
    progress.say("comparing the services with a replay of the stream")
    equal_writers = await fleet.equal_writers()
    return Outcome(
        deploy_s=deploy_s,
        clients=clients,
        counts=history.tally.counts,
        run_s=run_s,
        killed=killed[0] if killed else None,
        pids_before=pids_before,
        pids_after=await fleet.engine_pids(),
        equal_writers=equal_writers,
        history=history,
    )


def _progress_line(clients: Clients, history: History, planned_count: int) -> str:
    counts = history.tally.counts
    return (
        f"sent {len(clients.requests)}/{planned_count}  answered {clients.answered_count}  "
        f"failed {clients.failures.total()}  waiting {clients.waiting_count}  "
        f"resident {history.tally.resident_count}  wakes {len(counts.wakes_s)}"
    )


# ---- the report -----------------------------------------------------------------------------------------------------


def _report(options: argparse.Namespace, label: str, outcome: Outcome, models: Sequence[str]) -> Report:
    figures = _figures(outcome, len(models))
    wanted: list[tuple[str, str, int | float]] = [
        ("failed_count", "==", 0),
        ("engine_restart_count", "==", 0),
        ("wake_count", ">", WAKES_MORE_THAN),
        ("replay_equal_count", "==", len(SETTINGS)),
    ]
    if options.kill:
        wanted.append(("recovery_s", "<=", faults.RECOVERY_S_MAX))
    bars = [Bar(name=name, value=figures[name], op=op, bar=bar) for name, op, bar in wanted]
    return Report(
        benchmark="serve", label=label, commit=commit(), figures=figures, bars=bars, notes=_notes(outcome, models)
    )


def _figures(outcome: Outcome, model_count: int) -> dict[str, Value]:
    requests = outcome.clients.requests
    answered = [request for request in requests if request.is_answered]
    lost = faults.lost_with_gateway(requests, outcome.killed)
    counts, tally = outcome.counts, outcome.history.tally
    kept_count = sum(outcome.pids_after.get(replica) == pid for replica, pid in outcome.pids_before.items())
    residues = sorted(replica.residue_bytes for replica in tally.replicas.values())
    figures: dict[str, Value] = {
        "model_count": model_count,
        "gpu_count": len(tally.gpus),
        "deploy_s": round(outcome.deploy_s, 3),
        "run_s": round(outcome.run_s, 3),
        "sent_count": len(requests),
        "answered_count": len(answered),
        "failed_count": outcome.clients.failures.total() - len(lost),
        **quantiles("added_latency_s", [r.held_s for r in answered if r.held_s is not None]),
        **quantiles("first_token_s", [r.first_token_s for r in answered if r.first_token_s is not None]),
        **quantiles("send_lag_s", [r.sent_s - r.planned.due_s for r in requests], (99,)),
        "output_token_count": sum(r.token_count for r in answered),
        "wake_count": len(counts.wakes_s),
        "park_count": counts.park_count,
        **quantiles("wake_s", counts.wakes_s, (50, 95)),
        "wake_refused_count": counts.wake_refused_count,
        "park_abandoned_count": counts.park_abandoned_count,
        "resident_max_count": counts.resident_max_count,
        "resident_possible_count": tally.resident_possible_count(residues_count=True),
        "resident_possible_without_residue": tally.resident_possible_count(residues_count=False),
        "residue_bytes_p50": residues[len(residues) // 2] if residues else None,
        "engine_restart_count": len(outcome.pids_before) - kept_count,
        "engine_failed_count": counts.failed_count,
        "fact_count": len(outcome.history.stored),
        "replay_equal_count": len(outcome.equal_writers),
    }
    if outcome.killed is not None:
        told_s = outcome.killed.recovery_s
        figures |= {
            "recovery_s": None if told_s is None else round(told_s, 3),
            "lost_with_gateway_count": len(lost),
            "sent_again_count": sum(request.retry_count > 0 for request in requests),
            "engine_kept_count": kept_count,
        }
    return figures


def _notes(outcome: Outcome, models: Sequence[str]) -> list[str]:
    tally = outcome.history.tally
    possible = tally.resident_possible_count(residues_count=True)
    without = tally.resident_possible_count(residues_count=False)
    notes = ["Figures of a software GPU say nothing about the speed of a real one; docs/benchmarks.md defines each."]
    if possible < without:
        notes.append(
            f"The residues of {len(models)} parked engines leave room for {possible} resident models at once; "
            f"without residues it would be {without}."
        )
    if outcome.killed is not None:
        notes.append(f"{outcome.killed.name} was ended by SIGKILL {outcome.killed.at_s:.1f} s after the start.")
    if missing := sorted(set(SETTINGS) - set(outcome.equal_writers)):
        notes.append(f"The live state differs from a replay of the stream: {', '.join(missing)}.")
    if failures := outcome.clients.failures:
        notes.append("Failures: " + ", ".join(f"{count} x {code}" for code, count in sorted(failures.items())) + ".")
    return notes

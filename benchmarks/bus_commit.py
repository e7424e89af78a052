"""Group commit: the facts a second that one writer makes durable, through the runner and the committer of all services.

The product's runner runs a service of one handler: one fact for each input. A backlog of inputs waits for it, so it
handles up to `INPUTS_PER_BATCH_MAX` of them and appends their facts in one atomic batch with its check, awaits the
acknowledgement, and goes on: as a service does after a burst. The server syncs to disk before each acknowledgement.

Beside it the floor: nats-py sends atomic batches of as many ready bytes with the batch's headers alone, and nothing
else happens. The two take turns.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import anyio

from benchmarks.bus_sides import RAW_SUBJECT, Raw, fact, raw, server
from benchmarks.report import Value
from benchmarks.sections import Measured, Setting, Wanted
from kit.bus_nats import NatsBus
from kit.outcomes import Context, Input, Outcome
from kit.runner import INPUTS_PER_BATCH_MAX, Runner
from kit.service import Service
from kit.telemetry import Tracer
from schemas.autoscaler import ReplicasDecided
from schemas.catalogue import encode

BARS: Final = (Wanted(figure="commit_facts_per_s", op=">=", bar=4000),)
LOOK_EVERY_S: Final = 0.002
READY_TIMEOUT_S: Final = 10.0


@dataclass(slots=True)
class Total:
    """State of the service."""

    decided_count: int = 0


@dataclass(frozen=True, slots=True)
class Decide(Input):
    """One input; one fact."""

    number: int


def one_fact_each() -> Service[Total]:
    service: Service[Total] = Service(name="autoscaler", new_state=lambda _: Total(), reads=lambda _: [])

    @service.on(Decide)
    def decide(_state: Total, decide: Decide, ctx: Context) -> Sequence[Outcome]:
        model = f"org/model-{decide.number % 1000}"
        return [
            ReplicasDecided(
                at_s=ctx.now_s,
                deployment_id=f"d-{decide.number:016x}",
                model=model,
                replica_count=decide.number % 8,
                reason="requests per replica above the target for 30 s",
            )
        ]

    @service.folding(ReplicasDecided)
    def fold(state: Total, _fact: ReplicasDecided) -> None:
        state.decided_count += 1

    return service


async def measure(setting: Setting) -> Measured:
    """See `benchmarks.sections`."""
    count, rounds = setting.count(8192, 512), setting.count(5, 2)
    ours: list[float] = []
    floor: list[float] = []
    async with (
        server(setting.folder) as started,
        NatsBus(started.url) as bus,
        raw(started.url) as other,
        setting.progress.showing(lambda: f"rounds {len(floor)}/{rounds}"),
        anyio.create_task_group() as tg,
    ):
        runner = Runner(
            one_fact_each(),
            None,
            bus,
            writer="autoscaler",
            instance="bench",
            tracer=Tracer(None, None, root_ratio=0.0),
            needs_lease=False,
        )
        tg.start_soon(runner.run)
        with anyio.fail_after(READY_TIMEOUT_S):
            while not runner.status.is_ready:  # noqa: ASYNC110  (a flag, not an event)
                await anyio.sleep(LOOK_EVERY_S)
        await _committed(runner, count // 8)
        await _floor(other, count // 8)
        for _ in range(rounds):
            ours.append(count / await _committed(runner, count))
            floor.append(count / await _floor(other, count))
        dropped_count = runner.status.dropped_count
        tg.cancel_scope.cancel()
    assert dropped_count == 0, dropped_count
    figures: dict[str, Value] = {
        "commit_facts_per_s": round(statistics.median(ours)),
        "commit_facts_per_s_least": round(min(ours)),
        "commit_raw_floor_per_s": round(statistics.median(floor)),
    }
    return Measured(figures=figures)


async def _committed(runner: Runner[Total], count: int) -> float:
    """Seconds until as many facts are acknowledged."""
    target = runner.status.appended_count + count
    began_s = time.perf_counter()
    for number in range(count):
        runner.offer(Decide(number))
    while runner.status.appended_count < target:  # noqa: ASYNC110  (a counter, not an event)
        await anyio.sleep(LOOK_EVERY_S)
    return time.perf_counter() - began_s


async def _floor(other: Raw, count: int) -> float:
    body = encode(fact(0))
    began_s = time.perf_counter()
    for batch_number in range(count // INPUTS_PER_BATCH_MAX or 1):
        batch_id = f"floor-{began_s}-{batch_number}"
        size = min(count, INPUTS_PER_BATCH_MAX)
        for number in range(1, size):
            headers = {"Nats-Batch-Id": batch_id, "Nats-Batch-Sequence": str(number)}
            await other.client.publish(RAW_SUBJECT, body, headers=headers)
        headers = {"Nats-Batch-Id": batch_id, "Nats-Batch-Sequence": str(size), "Nats-Batch-Commit": "1"}
        await other.js.publish(RAW_SUBJECT, body, headers=headers)
    return time.perf_counter() - began_s

"""How fast services come back: history folded by the real cores from a real server, and starts from a snapshot.

The floor beside it is the same history read and decoded, with nothing folded. Rates are of wall time, the median of
three; `*_cpu_us_per_fact` is this process' own time, which other load on the machine touches less. The invariants'
check is what the shell does at every 1,000th commit.
"""

import gc
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any, Final

import anyio

from benchmarks.bus_sides import server
from benchmarks.made_history import BUSY_NODE, CLUSTER_WRITERS, MadeHistory
from benchmarks.progress import Progress
from benchmarks.report import Value
from benchmarks.sections import Measured, Setting, Wanted
from kit.bus import Bus, CaughtUp, Stored, Stream
from kit.bus_nats import NatsBus
from kit.processor import Processor
from kit.rebuild import rebuilt
from kit.runner import Runner
from kit.service import Service
from kit.shell_settings import ShellSettings
from kit.snapshots import pack
from kit.telemetry import Tracer
from schemas.catalogue import decode
from services.autoscaler.core import SERVICE as AUTOSCALER
from services.autoscaler.settings import AutoscalerSettings
from services.nodeagent import health, leases, residency, shares, suspicion
from services.nodeagent.core import SERVICE as NODEAGENT
from services.nodeagent.settings import NodeAgentSettings
from services.placement import commands
from services.placement.core import SERVICE as PLACEMENT
from services.placement.settings import PlacementSettings
from services.swapper.core import SERVICE as SWAPPER
from services.swapper.settings import SwapperSettings

HANDLERS: Final = (health, leases, residency, shares, suspicion, commands)
"""Modules whose import registers handlers."""
REPLICA_COUNT: Final = 20_000
CYCLE_COUNT: Final = 5_000
TAIL_CYCLE_COUNT: Final = 250
"""Four facts each: about 1,000 that came after the snapshot."""
ROUNDS: Final = 3
"""Of which the median counts."""
BARS: Final = (
    Wanted(figure="placement_facts_per_s", op=">=", bar=50_000),
    Wanted(figure="swapper_facts_per_s", op=">=", bar=50_000),
    Wanted(figure="nodeagent_facts_per_s", op=">=", bar=50_000),
    Wanted(figure="placement_start_s", op="<=", bar=1.0),
    Wanted(figure="swapper_start_s", op="<=", bar=1.0),
    Wanted(figure="autoscaler_start_s", op="<=", bar=1.0),
    # On the way of a wake; placement's and the autoscaler's are not.
    Wanted(figure="swapper_encode_s", op="<=", bar=0.05),
    Wanted(figure="nodeagent_encode_s", op="<=", bar=0.05),
)
SILENT: Final = Tracer(None, None, root_ratio=0.0)
SHELL: Final = ShellSettings(snapshot_every_count=1_000_000)

SERVICES: Final[tuple[tuple[str, Service[Any], Any], ...]] = (
    ("placement", PLACEMENT, PlacementSettings()),
    ("swapper", SWAPPER, SwapperSettings()),
    ("autoscaler", AUTOSCALER, AutoscalerSettings()),
    (f"node.{BUSY_NODE}", NODEAGENT, NodeAgentSettings(node=BUSY_NODE)),
)


@dataclass(slots=True)
class Figures:
    """What is measured, in the order of the table."""

    values: dict[str, Value] = field(default_factory=dict)

    def median(self, name: str, values: Sequence[float]) -> float:
        value = sorted(values)[len(values) // 2]
        self.values[name] = round(value) if name.endswith("_facts_per_s") else round(value, 4)
        return value


async def measure(setting: Setting) -> Measured:
    """See `benchmarks.sections`."""
    replica_count = setting.count(REPLICA_COUNT, REPLICA_COUNT // 20)
    async with server(setting.folder) as started, NatsBus(started.url, name="benchmark") as bus:
        figures = await _measure(
            bus, setting.progress, replica_count=replica_count, cycle_count=setting.count(CYCLE_COUNT, 100)
        )
    return Measured(figures=figures)


async def _measure(bus: Bus, progress: Progress, *, replica_count: int, cycle_count: int) -> dict[str, Value]:
    figures = Figures()
    history = MadeHistory(bus, replica_count)
    began_s = time.perf_counter()
    await history.fill(cycle_count=cycle_count, said=lambda count: progress.say(f"{count:,} facts appended"))
    figures.values["rebuild_replica_count"] = replica_count
    figures.values["rebuild_fact_count"] = history.fact_count
    figures.values["rebuild_fill_facts_per_s"] = round(history.fact_count / (time.perf_counter() - began_s))
    await _floor(bus, figures, progress)
    for name, service, settings in SERVICES:
        await _fold(bus, figures, progress, name=name, service=service, settings=settings)
    await _starts(bus, figures, progress, history)
    return figures.values


async def _floor(bus: Bus, figures: Figures, progress: Progress) -> None:
    for name, look in (("rebuild_read", lambda _: None), ("rebuild_floor", decode)):
        rates = [await _rate(bus, look) for _ in range(ROUNDS)]
        progress.say(f"{name}: {figures.median(f'{name}_facts_per_s', rates):,.0f} facts/s")


async def _rate(bus: Bus, look: Callable[[bytes], Any]) -> float:
    gc.collect()
    began_s, count = time.perf_counter(), 0
    async with aclosing(bus.read(Stream.HISTORY, ["sublet.fact.>"], after_seq=0)) as reading:
        async for item in reading:
            if isinstance(item, CaughtUp):
                break
            look(item.body)
            count += 1
    return count / (time.perf_counter() - began_s)


async def _fold(
    bus: Bus, figures: Figures, progress: Progress, *, name: str, service: Service[Any], settings: Any
) -> None:
    rates, times_s, cpu_s, count = [], [], [], 0
    processor: Processor[Any] | None = None
    for _ in range(ROUNDS):
        processor = None
        gc.collect()
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        async with AsyncExitStack() as stack:
            processor, _, count = await rebuilt(
                bus,
                lambda: Processor(service, settings, writer=name, instance="rebuilt"),
                None,
                stack=stack,
                follow=_ignore,
                log=logging.getLogger("rebuild"),
            )
        times_s.append(time.perf_counter() - began_s)
        cpu_s.append(time.process_time() - began_cpu_s)
        rates.append(count / times_s[-1])
    assert processor is not None
    assert processor.skipped_count == 0, f"{name} skipped {processor.skipped_count} facts of its own history"
    short = service.name
    figures.values[f"{short}_fact_count"] = count
    figures.median(f"{short}_rebuild_s", times_s)
    rate = figures.median(f"{short}_facts_per_s", rates)
    figures.values[f"{short}_cpu_us_per_fact"] = round(sorted(cpu_s)[ROUNDS // 2] / count * 1e6, 1)
    _codec(figures, short, processor)
    progress.say(f"{short}: {count:,} facts, {rate:,.0f} facts/s")


def _ignore(_: Stored) -> None:
    return


def _codec(figures: Figures, short: str, processor: Processor[Any]) -> None:
    """What a snapshot of this state costs."""
    processor.fold_foreign_to(processor.read_seq)
    times_s, packed_bytes = [], 0
    for _ in range(ROUNDS):
        began_s = time.perf_counter()
        snapshot = processor.snapshot()
        times_s.append(time.perf_counter() - began_s)
        packed_bytes = len(pack(snapshot))
    figures.median(f"{short}_encode_s", times_s)
    figures.values[f"{short}_snapshot_bytes"] = packed_bytes
    began_s = time.perf_counter()
    processor.service.check_invariants(processor.state)
    figures.values[f"{short}_check_s"] = round(time.perf_counter() - began_s, 4)


async def _starts(bus: Bus, figures: Figures, progress: Progress, history: MadeHistory) -> None:
    """From the start of a runner until it decides."""
    for name, service, settings in SERVICES:
        if name not in CLUSTER_WRITERS:
            continue
        figures.values[f"{service.name}_start_without_s"] = round((await _started(bus, name, service, settings))[0], 3)
    await history.cycle(TAIL_CYCLE_COUNT)
    for name, service, settings in SERVICES:
        if name not in CLUSTER_WRITERS:
            continue
        start_s, count = await _started(bus, name, service, settings)
        figures.values[f"{service.name}_start_s"] = round(start_s, 3)
        figures.values[f"{service.name}_tail_count"] = count
        progress.say(f"{service.name}: started in {start_s:.2f} s from a snapshot and {count:,} facts")


async def _started(bus: Bus, name: str, service: Service[Any], settings: Any) -> tuple[float, int]:
    """One life with a clean end, which leaves a snapshot: seconds until it was ready, and facts replayed."""
    runner = Runner(
        service,
        settings,
        bus,
        writer=name,
        instance=f"started-{time.monotonic_ns()}",
        tracer=SILENT,
        needs_lease=False,
        shell=SHELL,
    )
    gc.collect()
    began_s = time.perf_counter()
    async with anyio.create_task_group() as tg:
        tg.start_soon(runner.run)
        while not runner.status.is_ready:  # noqa: ASYNC110  (how `/readyz` is asked)
            await anyio.sleep(0.001)
        start_s = time.perf_counter() - began_s
        tg.cancel_scope.cancel()
    return start_s, runner.status.replayed_count

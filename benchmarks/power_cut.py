"""``power-cut``: the power goes at a random moment, again and again, and nothing that was acknowledged may be missing.

A real nats-server keeps its store, and a node agent its journal, on a disk that forgets what was not synced
(`benchmarks.lazy_disk`). Several writers append by the real path; then the server is killed, the disk drops all that
is not durable, everything starts again, and a fresh fold of the stream, with the journal's surplus, is compared with
what each writer was told. A control run without the server's `sync_interval` shows that the test would notice.
"""

import argparse
import contextlib
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import anyio

from benchmarks.lazy_disk import Names
from benchmarks.lazy_mount import LazyMount, why_not
from benchmarks.ledger import Account, Found, Writer, living, oracle, read_all
from benchmarks.nats_cluster import NatsCluster
from benchmarks.progress import Progress
from benchmarks.report import Bar, Report, Value, commit, quantiles
from kit.bus import BusError, Stored
from kit.bus_nats import NatsBus
from kit.journal import Journal, JournalDamaged
from kit.nats_server import NatsServer, NatsServerError, ServerConfig, ensure_streams_soon, stream_configs
from kit.nats_wire import ApiError

WRITERS = ("w0", "w1", "w2", "w3")
NODE = "node.n0"
LIFE_S_MAX = {1: 1.6, 3: 14.0}
"""{servers: the cut comes at a random moment within this time of their start}; one serves in 0.1 s, three in 5-10 s."""
WORK_S_MAX = 1.5
"""In every other life the cut comes within this time of the first append, however long the start took."""
CUTS_PER_INSTALLATION = 20
"""Then a new one begins, so that the first seconds of an installation are cut too, and replays stay short."""
CONTROL_WORK_S = 1.0


class ForgetfulConfig(ServerConfig):
    """What the server does by default: it acknowledges first and syncs within two minutes. For the control run only."""

    def text(self) -> str:
        wanted = "  sync_interval: always\n"
        text = ServerConfig.text(self)
        assert wanted in text
        return text.replace(wanted, "")


@dataclass(slots=True)
class Outcome:
    """Over all installations."""

    cut_count: int = 0
    writer_lives: int = 0
    acknowledged_count: int = 0
    unacknowledged_kept_count: int = 0
    torn_batch_count: int = 0
    snapshot_start_count: int = 0
    """Starts that were made from a snapshot too, and compared."""
    sync_count: int = 0
    problems: list[str] = field(default_factory=list)
    restart_s: list[float] = field(default_factory=list)
    """From the server's start until its streams answered and every writer had folded its history."""

    @property
    def lost_count(self) -> int:
        return sum("lost: " in problem for problem in self.problems)

    @property
    def stream_lost_count(self) -> int:
        return sum("stream gone" in problem for problem in self.problems)


class Servers(Protocol):
    """One server, or all of a cluster."""

    @property
    def url(self) -> str: ...

    async def start_async(self) -> None: ...

    def kill(self) -> None: ...

    def stop(self) -> None: ...


class WholeCluster:
    """Three servers on one disk, as on one power strip."""

    def __init__(self, folder: Path, disk: LazyMount) -> None:
        self._cluster = NatsCluster(folder, store_directory=disk.path / "nats")

    @property
    def url(self) -> str:
        return self._cluster.url

    async def start_async(self) -> None:
        await self._cluster.start_all()

    def kill(self) -> None:
        self._cluster.kill_all()

    def stop(self) -> None:
        self._cluster.kill_all()


class Installation:
    """Servers, their streams and its writers, over many cuts."""

    def __init__(
        self, servers: Servers, disk: LazyMount, outcome: Outcome, *, replica_count: int = 1, seed: int
    ) -> None:
        self._disk = disk
        self._servers = servers
        self._replica_count = replica_count
        self._journal_path = disk.path / "agent" / "journal"
        self._outcome = outcome
        self._random = random.Random(seed)
        self._accounts = {name: Account(name) for name in (*WRITERS, NODE)}
        self._has_streams = False
        self._works = anyio.Event()
        self._lives = 0

    @property
    def acknowledged_count(self) -> int:
        return sum(len(account.acknowledged) for account in self._accounts.values())

    async def live_and_cut(self, *, life_s: float, is_at_work: bool, torn_seed: int | None) -> None:
        """Start, check what is there, work, and lose the power `life_s` after the start began, or the work did."""
        self._works = anyio.Event()
        if not is_at_work:
            self._works.set()
        async with anyio.create_task_group() as tg:
            tg.start_soon(self._lose_power, life_s, tg.cancel_scope)
            with contextlib.suppress(OSError):  # The journal's disk went away under it.
                await self._live(works=True)
        self._disk.cut(torn_seed=torn_seed)
        self._outcome.cut_count += 1

    async def check(self) -> list[Stored]:
        """Start, check, and stop in order. The whole history, for the oracle."""
        history = await self._live(works=False)
        self._servers.stop()
        return history

    async def _lose_power(self, life_s: float, scope: anyio.CancelScope) -> None:
        await self._works.wait()
        await anyio.sleep(life_s)
        self._servers.kill()
        scope.cancel()

    async def _live(self, *, works: bool) -> list[Stored]:
        began_s = time.monotonic()
        try:
            await self._servers.start_async()
        except NatsServerError:
            if works and self._works.is_set():  # The power went while it started.
                return []
            raise
        async with AsyncExitStack() as stack:
            bus = await stack.enter_async_context(NatsBus(self._servers.url, name="power-cut"))
            await self._make_streams(bus)
            self._lives += 1
            writers = [await self._begin(stack, bus, account) for account in self._accounts.values()]
            self._outcome.restart_s.append(time.monotonic() - began_s)
            if not works:
                return [stored async for stored in read_all(bus, ["sublet.fact.>"])]
            async with anyio.create_task_group() as tg:
                for writer in writers:
                    tg.start_soon(self._work, writer)
                self._works.set()
        return []

    async def _make_streams(self, bus: NatsBus) -> None:
        if self._has_streams:
            for config in stream_configs():
                if config["storage"] != "memory":  # Gone with the server, by design.
                    await self._look_for(bus, config["name"])
        await ensure_streams_soon(bus, replica_count=self._replica_count, timeout_s=60)
        self._has_streams = True

    async def _look_for(self, bus: NatsBus, stream: str) -> None:
        """A cluster says nothing before it has leaders; that is no answer."""
        with anyio.fail_after(60):
            while True:
                try:
                    await bus.api(f"STREAM.INFO.{stream}")
                    return
                except ApiError as error:
                    if not error.is_transient:
                        self._outcome.problems.append(f"{stream}: stream gone: {error}")
                        return
                except BusError:
                    pass
                await anyio.sleep(0.1)

    async def _begin(self, stack: AsyncExitStack, bus: NatsBus, account: Account) -> Writer:
        journal = None
        if account.writer == NODE:
            try:
                journal = await anyio.to_thread.run_sync(Journal, self._journal_path)
            except JournalDamaged as error:
                self._outcome.problems += account.problems(Found(problem=f"lost: {error}"))
                raise
            stack.callback(_close, journal)
        instance, seed = f"i{self._lives}", self._random.getrandbits(32)
        life = living(account, bus, instance, seed=seed, journal=journal, keeps_snapshots=journal is None)
        writer = await stack.enter_async_context(life)
        self._outcome.problems += account.problems(writer.found)
        self._outcome.writer_lives += 1
        self._outcome.snapshot_start_count += writer.found.snapshot_digest != ""
        self._outcome.torn_batch_count += len(account.torn_batches(writer.found))
        account.batches.clear()
        held = set(account.acknowledged)
        kept = [entry_id for entry_id in writer.found.ids if entry_id not in held]
        self._outcome.unacknowledged_kept_count += len(kept)
        # What is there now is promised from now on: it must not vanish later. What is lost was told once.
        account.acknowledged = list(writer.found.ids)
        return writer

    async def _work(self, writer: Writer) -> None:
        before = len(writer.account.acknowledged)
        try:
            await writer.take_over()
            await writer.work(pause_s=0.002)
        finally:
            self._outcome.acknowledged_count += len(writer.account.acknowledged) - before


def _close(journal: Journal) -> None:
    with contextlib.suppress(OSError):
        journal.close()


async def cut_often(
    folder: Path,
    *,
    cut_count: int,
    names: Names,
    seed: int,
    server_count: int = 1,
    outcome: Outcome | None = None,
) -> Outcome:
    """`cut_count` cuts over as many installations as that takes."""
    outcome = outcome or Outcome()
    for number in range(0, cut_count, CUTS_PER_INSTALLATION):
        chance = random.Random(f"{seed}-{number}")
        place = folder / f"installation-{number}"
        with LazyMount(place / "disk", names=names) as disk:
            servers: Servers = WholeCluster(place / "servers", disk)
            if server_count == 1:
                servers = NatsServer(place / "server", ServerConfig(store_directory=disk.path / "nats"))
            installation = Installation(servers, disk, outcome, replica_count=server_count, seed=chance.getrandbits(32))
            for cut in range(min(CUTS_PER_INSTALLATION, cut_count - number)):
                # Every other cut leaves a part of what was not synced, as a disk may have got to it by chance.
                torn_seed = chance.getrandbits(32) if chance.random() < 0.5 else None
                is_at_work = cut % 2 == 0
                life_s = chance.uniform(0, WORK_S_MAX if is_at_work else LIFE_S_MAX[server_count])
                await installation.live_and_cut(life_s=life_s, is_at_work=is_at_work, torn_seed=torn_seed)
            outcome.problems += oracle(await installation.check())
            outcome.sync_count += disk.sync_count()
    return outcome


async def control(folder: Path, *, names: Names, seed: int) -> Outcome:
    """One cut of a server that syncs when it likes: how many acknowledged facts of the stream are lost."""
    outcome = Outcome()
    with LazyMount(folder / "disk", names=names) as disk:
        server = NatsServer(folder / "server", ForgetfulConfig(store_directory=disk.path / "nats"))
        installation = Installation(server, disk, outcome, seed=seed)
        await installation.live_and_cut(life_s=CONTROL_WORK_S, is_at_work=True, torn_seed=None)
        await installation.check()
    return outcome


def report(outcome: Outcome, careless: Outcome) -> Report:
    figures: dict[str, Value] = {
        "cut_count": outcome.cut_count,
        "writer_restart_count": outcome.writer_lives,
        "acknowledged_count": outcome.acknowledged_count,
        "lost_count": outcome.lost_count,
        "stream_lost_count": outcome.stream_lost_count,
        "other_problem_count": len(outcome.problems) - outcome.lost_count - outcome.stream_lost_count,
        "unacknowledged_kept_count": outcome.unacknowledged_kept_count,
        "torn_batch_count": outcome.torn_batch_count,
        "snapshot_start_count": outcome.snapshot_start_count,
        "sync_count": outcome.sync_count,
        **quantiles("restart_s", outcome.restart_s, (50, 100)),
        "control_acknowledged_count": careless.acknowledged_count,
        "control_lost_count": careless.lost_count,
    }
    wanted: list[tuple[str, str, int]] = [
        ("lost_count", "==", 0),
        ("stream_lost_count", "==", 0),
        ("other_problem_count", "==", 0),
        ("acknowledged_count", ">", 0),
        ("torn_batch_count", "==", 0),
        ("control_lost_count", ">", 0),
    ]
    about = (
        "The disk is a file system that drops whatever was not synced; the server and the append path are real. "
        "Speeds are that disk's and say nothing."
    )
    bars = [Bar(name=name, value=figures[name], op=op, bar=bar) for name, op, bar in wanted]
    return Report(
        benchmark="power-cut",
        label="host",
        commit=commit(),
        figures=figures,
        bars=bars,
        notes=[about, *outcome.problems[:5]],
    )


async def _run(options: argparse.Namespace, folder: Path) -> Report:
    outcome = Outcome()

    def line() -> str:
        return f"cuts {outcome.cut_count}/{options.cuts}  problems {len(outcome.problems)}"

    async with Progress().showing(line):
        await cut_often(
            folder / "runs",
            cut_count=options.cuts,
            names=options.names,
            seed=options.seed,
            server_count=options.servers,
            outcome=outcome,
        )
        careless = await control(folder / "control", names=options.names, seed=options.seed)
    return report(outcome, careless)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks power-cut", description=__doc__.split("\n")[0])
    parser.add_argument("--cuts", type=int, default=100, help="how often the power goes (100; about 3 s each)")
    parser.add_argument("--quick", action="store_true", help="the same as --cuts 5")
    parser.add_argument("--names", choices=("strict", "ordered"), default="ordered", help="see benchmarks/lazy_disk.py")
    parser.add_argument("--servers", type=int, choices=tuple(LIFE_S_MAX), default=1, help="3: all lose power at once")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures there")
    parser.add_argument("--check", action="store_true", help="end with 1 when a bar is missed")
    options = parser.parse_args(arguments)
    if options.quick:
        options.cuts = 5
    if options.cuts < 1:
        parser.error("--cuts must be at least 1")
    if options.json and not options.json.resolve().parent.is_dir():
        parser.error(f"{options.json} cannot be written: there is no folder {options.json.resolve().parent}")
    if reason := why_not():
        print(f"error: power-cut {reason}", file=sys.stderr)
        return 2
    try:
        with tempfile.TemporaryDirectory(prefix="sublet-power-") as folder:
            result = anyio.run(_run, options, Path(folder))
    except (NatsServerError, BusError, JournalDamaged, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(result.table())
    if options.json:
        result.write(options.json)
    return 1 if options.check and result.missed else 0

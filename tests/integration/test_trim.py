"""History is trimmed below every reader's snapshot and not before; everybody goes on as if nothing had gone."""

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
import pytest

from benchmarks.made_history import MadeHistory
from kit.bus import CaughtUp, Stored, Stream
from kit.bus_nats import NatsBus
from kit.nats_access import generate_keys, read_seed, user_names, users_of
from kit.nats_server import NatsServer, ServerConfig, ensure_streams
from kit.outcomes import Effect, Input
from kit.runner import Runner
from kit.service import Service, digest
from kit.shell_settings import ShellSettings
from kit.snapshot_store import SnapshotStore
from kit.telemetry import Tracer
from services.autoscaler.core import SERVICE as AUTOSCALER
from services.autoscaler.settings import AutoscalerSettings
from services.gateway.runtime import Runtime
from services.gateway.settings import GatewaySettings
from services.gateway.signals import Signals
from services.gateway.snapshots import newest
from services.gateway.view import FILTERS, ChainedTable, HistoryView
from services.nodeagent import health, leases, residency, shares, suspicion
from services.nodeagent.core import SERVICE as NODEAGENT
from services.nodeagent.settings import NodeAgentSettings
from services.placement import commands
from services.placement.core import SERVICE as PLACEMENT
from services.placement.eventlog import EventLog
from services.placement.settings import PlacementSettings
from services.placement.state import ClusterState
from services.provision.trim import CannotTrim, find_cut, main, make_cut
from services.swapper.core import SERVICE as SWAPPER
from services.swapper.settings import SwapperSettings
from tests.fixtures.nats import binary

pytestmark = [pytest.mark.nats, pytest.mark.anyio]
HANDLERS = (health, leases, residency, shares, suspicion, commands)
SERVICES: dict[str, tuple[Service[Any], Any]] = {
    "placement": (PLACEMENT, PlacementSettings()),
    "swapper": (SWAPPER, SwapperSettings()),
    "autoscaler": (AUTOSCALER, AutoscalerSettings()),
    **{f"node.node-{number}": (NODEAGENT, NodeAgentSettings(node=f"node-{number}")) for number in range(2)},
}


class Fleet:
    """A server with every user, and a history of 60 replicas on two nodes."""

    def __init__(self, server: NatsServer, keys: Path) -> None:
        self.server = server
        self.keys = keys

    def bus(self, user: str) -> NatsBus:
        return NatsBus(self.server.url, read_seed(self.keys, user), user)

    async def live(self, writer: str) -> tuple[Any, int]:
        """One life of a service with a clean end: its state at the start, and how much it read."""
        service, settings = SERVICES[writer]

        async def perform(effect: Effect, traceparent: str) -> Input | None:
            return None

        async with self.bus(writer) as bus:
            runner = Runner(
                service,
                settings,
                bus,
                writer=writer,
                instance=f"x{anyio.current_time()}",
                tracer=Tracer(None, None, root_ratio=0.0),
                perform=perform,
                needs_lease=False,
                shell=ShellSettings(),
            )
            async with anyio.create_task_group() as tg:
                tg.start_soon(runner.run)
                with anyio.fail_after(60):
                    while not runner.status.is_ready:
                        await anyio.sleep(0.005)
                assert runner.processor is not None
                state = runner.processor.state
                tg.cancel_scope.cancel()
        return state, runner.status.replayed_count

    async def history(self) -> list[Stored]:
        async with self.bus("admin") as bus:
            info = await bus.api(f"STREAM.INFO.{Stream.HISTORY}")
            return await read_from(bus, info["state"]["first_seq"] - 1)


async def read_from(bus: NatsBus, after_seq: int) -> list[Stored]:
    found = []
    async with aclosing(bus.read(Stream.HISTORY, FILTERS, after_seq=after_seq)) as reading:
        async for item in reading:
            if isinstance(item, CaughtUp):
                break
            found.append(item)
    return found


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    keys = tmp_path / "keys"
    names = user_names(nodes=["node-0", "node-1"], tenants=["default"])
    config = ServerConfig(store_directory=tmp_path / "store", users=users_of(generate_keys(keys, names)))
    plain = ServerConfig(store_directory=tmp_path / "store")
    # The history is appended by nobody's user: while it is made, the server asks for none.
    with NatsServer(tmp_path / "plain", plain, binary=binary()) as server:
        async with NatsBus(server.url) as bus:
            await ensure_streams(bus)
            await MadeHistory(bus, 60).fill(cycle_count=40)
    with NatsServer(tmp_path / "nats", config, binary=binary()) as server:
        yield Fleet(server, keys)


async def test_a_writer_without_a_snapshot_is_named_and_nothing_goes(fleet: Fleet) -> None:
    before = await fleet.history()
    for writer in SERVICES:
        if writer != "swapper":
            await fleet.live(writer)

    async with fleet.bus("admin") as bus:
        with pytest.raises(CannotTrim, match=r"^swapper has no snapshot that fits this history; start it"):
            await find_cut(bus)

    assert [s.seq for s in await fleet.history()][: len(before)] == [s.seq for s in before]


async def test_a_writer_whose_newest_snapshot_is_damaged_is_named(fleet: Fleet) -> None:
    for writer in SERVICES:
        await fleet.live(writer)
    async with fleet.bus("swapper") as bus:
        await bus.publish_stored("sublet.snapshot.swapper.chunk.0.0", b"rubbish", id="x")

    async with fleet.bus("admin") as bus:
        with pytest.raises(CannotTrim, match="the newest snapshot of swapper cannot be used"):
            await find_cut(bus)


async def test_everybody_goes_on_after_a_trim_as_if_nothing_had_gone(fleet: Fleet) -> None:
    before = {writer: digest((await fleet.live(writer))[0]) for writer in SERVICES}
    whole = ChainedTable()
    for stored in await fleet.history():
        whole.fold(stored)
    assert whole.skipped_count == 0
    states: dict[str, bytes] = {}

    async with fleet.bus("admin") as bus:
        cut = await find_cut(bus)
        assert cut.removed_count > 200
        await make_cut(bus, cut)
        assert (await find_cut(bus)).removed_count == 0

    history = await fleet.history()
    assert history[0].seq == cut.keep_from_seq
    for writer in SERVICES:
        state, replayed_count = await fleet.live(writer)
        states[writer] = digest(state)
        assert replayed_count < 50
    assert states == before
    async with fleet.bus("gateway") as bus:
        found = await newest(bus)
        assert found is not None
        table = ChainedTable()
        table.begin(*found)
        for item in await read_from(bus, table.seq):
            table.fold(item)
    assert table.skipped_count == 0
    assert table.routes.image() == whole.routes.image()
    assert table.routes.models == whole.routes.models
    assert table.routes.replicas == whole.routes.replicas


async def test_a_gateway_that_starts_after_a_trim_knows_every_route(fleet: Fleet) -> None:
    for writer in SERVICES:
        await fleet.live(writer)
    whole = ChainedTable()
    for stored in await fleet.history():
        whole.fold(stored)
    async with fleet.bus("admin") as bus:
        await make_cut(bus, await find_cut(bus))

    settings = GatewaySettings()
    async with fleet.bus("gateway") as bus, anyio.create_task_group() as tg:
        signals = Signals(bus, queue_max=10, timeout_s=1.0, clock=time.time)
        runtime = Runtime(settings, gateway_id="g", signals=signals, clock=time.time)
        view = HistoryView(bus, runtime)
        tg.start_soon(view.run)
        with anyio.fail_after(60):
            while not view.is_usable:
                await anyio.sleep(0.01)
        tg.cancel_scope.cancel()
    runtime.close()

    assert view.skipped_count == 0
    assert runtime.core.routes.image() == whole.routes.image()


async def test_the_log_of_events_goes_on_behind_the_start_of_a_trimmed_history(fleet: Fleet) -> None:
    """What was trimmed named the tenants of what is there still; placement's state knows them too."""
    for writer in SERVICES:
        await fleet.live(writer)
    async with fleet.bus("admin") as bus:
        await make_cut(bus, await find_cut(bus))
    state, _ = await fleet.live("placement")
    assert isinstance(state, ClusterState)

    async with fleet.bus("placement") as bus:
        events = EventLog(bus, lambda: state)
        async with anyio.create_task_group() as tg:
            tg.start_soon(events.follow)
            with anyio.fail_after(60):
                while events._last_seq < (await fleet.history())[-1].seq:
                    await anyio.sleep(0.01)
            tg.cancel_scope.cancel()

    assert events._tenant_of["r-0"] == "default"


def test_a_command_line_that_cannot_reach_its_seed_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "/nowhere/admin.nk", "--dry-run"]) == 1
    assert capsys.readouterr().err == "error: /nowhere/admin.nk cannot be read: No such file or directory\n"


async def test_the_command_says_what_would_go_and_then_takes_it_away(
    fleet: Fleet, capsys: pytest.CaptureFixture[str]
) -> None:
    for writer in SERVICES:
        await fleet.live(writer)
    arguments = ["--nats", fleet.server.url, "--seed", str(fleet.keys / "admin.nk")]

    assert await anyio.to_thread.run_sync(main, [*arguments, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert (await fleet.history())[0].seq == 1
    assert await anyio.to_thread.run_sync(main, arguments) == 0

    assert capsys.readouterr().out == f"trimmed: {told}"
    assert (await fleet.history())[0].seq > 200
    async with fleet.bus("swapper") as bus:
        assert len(await SnapshotStore(bus, "swapper").found()) == 1

"""A gateway on a real NATS server, with the real holder's route leases."""

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any

import pytest

from kit.bus import Bus
from kit.bus_nats import NatsBus
from kit.nats_server import NatsServer, ensure_streams
from services.holder.routes import Routes
from services.holder.server import lease_app
from tests.fixtures.nats import own_nats_server
from tests.unit.gateway import fleet
from tests.unit.gateway.world import World, serve, world

__all__ = ["own_nats_server"]

pytestmark = [pytest.mark.anyio, pytest.mark.nats]


@pytest.fixture
async def buses(own_nats_server: NatsServer) -> Callable[[str], AbstractAsyncContextManager[Bus]]:
    async with NatsBus(own_nats_server.url, name="reset") as bus:
        await ensure_streams(bus)
    return lambda name: NatsBus(own_nats_server.url, name=name)


async def ask(there: World, **more: Any) -> tuple[int, str]:
    async with there.chat(**more) as response:
        return response.status, await response.text()


async def test_a_server_that_is_killed_costs_resident_models_nothing_and_parked_ones_their_wait(
    own_nats_server: NatsServer, buses: Callable[[str], AbstractAsyncContextManager[Bus]]
) -> None:
    async with world(buses=buses) as there:
        await there.historian.append(fleet.admitted("resident"), fleet.proposed("resident", "r2"))
        await there.historian.append(fleet.ready("resident", "r2", endpoint=there.engine.url))
        there.holder.set_open("r2", there.engine.url)
        await there.until(lambda: "r2" in there.gateway.runtime.core.routes.leases["n"].endpoints)
        await there.park()
        there.engine.is_asleep = False
        held = asyncio.create_task(ask(there, stream=True))
        await there.until_wanted()

        own_nats_server.kill()
        await there.until(lambda: not there.gateway.view._bus.is_connected)
        during = [(await ask(there, model="resident"))[0] for _ in range(20)]
        count = len(there.wanted)
        await own_nats_server.start_async()
        await there.until_wanted(count + 1)
        await there.make_resident()
        status, text = await held

    assert [200] * 20 == during
    assert 200 == status
    assert text.endswith("data: [DONE]\n\n")


async def test_the_real_holder_grants_closes_and_opens(
    buses: Callable[[str], AbstractAsyncContextManager[Bus]],
) -> None:
    async with world(buses=buses, holder_token="secret") as there, AsyncExitStack() as stack:
        routes = Routes(term_s=60.0, born_version=1000)
        # A holder that has just begun waits a term for gateways of its former life, which it does not know.
        routes.table.born_at_s -= 600.0
        url = await serve(stack, lease_app(routes=routes, token="secret"))
        routes.open("r", endpoint=there.engine.url)
        await there.historian.append(fleet.joined(holder_url=url))
        await there.until(lambda: there.gateway.runtime.core.routes.holder_urls["n"] == url and there.is_routable())
        first = await ask(there)

        began_s = time.perf_counter()
        closed = await routes.close("r")
        close_s = time.perf_counter() - began_s
        held = asyncio.create_task(ask(there))
        await there.until_wanted()
        routes.open("r", endpoint=there.engine.url)
        second = await held

    assert 200 == first[0] == second[0]
    assert 0 == closed.expired_count
    assert close_s < 20, "long before the gateway's lease would end"

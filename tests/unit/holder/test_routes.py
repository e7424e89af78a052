"""The waiting around the table, in virtual time."""

import anyio
import pytest
from trio.testing import MockClock

from schemas.holders import RouteClosed, RouteLease, RouteLeaseWish
from services.holder.core import first_version
from services.holder.refusals import Refused
from services.holder.routes import Routes

pytestmark = pytest.mark.anyio
FIRST = first_version(unix_ms=1_000, former_first_version=None)


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, object]]:
    return "trio", {"clock": MockClock(autojump_threshold=0)}


async def old_routes() -> Routes:
    """A holder's routes, when no lease of a former life can be left."""
    routes = Routes(term_s=1.0, born_version=FIRST, clock=anyio.current_time)
    await anyio.sleep(10)
    return routes


async def wish(routes: Routes, *, seen_version: int, wait_s: float = 0.3, gateway: str = "g") -> RouteLease:
    return await routes.lease(RouteLeaseWish(gateway=gateway, seen_version=seen_version, wait_s=wait_s))


async def test_a_gateway_that_lags_is_answered_at_once() -> None:
    routes = await old_routes()
    routes.open("a", endpoint="http://x")
    began_s = anyio.current_time()

    lease = await wish(routes, seen_version=-1)

    assert began_s == anyio.current_time()
    assert ("a",) == lease.open_ids


async def test_a_gateway_that_is_up_to_date_waits_for_as_long_as_it_wished() -> None:
    routes = await old_routes()
    began_s = anyio.current_time()

    lease = await wish(routes, seen_version=FIRST, wait_s=0.3)

    assert lease.version == FIRST
    assert anyio.current_time() - began_s == pytest.approx(0.3)


async def test_no_wish_waits_for_more_than_half_a_term() -> None:
    routes = await old_routes()
    began_s = anyio.current_time()

    await wish(routes, seen_version=FIRST, wait_s=60)

    assert anyio.current_time() - began_s == pytest.approx(0.5)


async def test_a_close_reaches_a_waiting_gateway_at_once_and_ends_with_its_next_wish() -> None:
    routes = await old_routes()
    routes.open("a", endpoint="http://x")
    lease = await wish(routes, seen_version=-1)
    closed: list[RouteClosed] = []

    async def gateway() -> None:
        told = await wish(routes, seen_version=lease.version)
        assert ("a",) == told.closed_ids
        await anyio.sleep(0.02)
        await wish(routes, seen_version=told.version)

    async def agent() -> None:
        await anyio.sleep(0.1)
        closed.append(await routes.close("a"))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(gateway)
        tasks.start_soon(agent)

    assert closed[0].waited_s == pytest.approx(0.02)
    assert closed[0].expired_count == 0


async def test_a_close_without_gateways_is_answered_at_once() -> None:
    routes = await old_routes()
    routes.open("a", endpoint="http://x")

    assert (await routes.close("a")).waited_s == 0


async def test_a_dead_gateway_holds_a_close_until_its_lease_ends() -> None:
    routes = await old_routes()
    routes.open("a", endpoint="http://x")
    await wish(routes, seen_version=-1)

    closed = await routes.close("a")

    assert closed.waited_s == pytest.approx(1.0, abs=0.02)
    assert closed.expired_count == 1


async def test_a_close_that_is_overtaken_by_an_open_is_refused() -> None:
    routes = await old_routes()
    routes.open("a", endpoint="http://x")
    await wish(routes, seen_version=-1)

    async with anyio.create_task_group() as tasks:

        async def close() -> None:
            with pytest.raises(Refused, match="opened again"):
                await routes.close("a")

        tasks.start_soon(close)
        await anyio.sleep(0.1)
        routes.open("a", endpoint="http://x")


async def test_a_dead_engine_s_route_is_closed_without_waiting_and_an_unknown_one_stays_unknown() -> None:
    routes = await old_routes()
    routes.open("a", endpoint="http://x")

    routes.close_soon("a")
    routes.close_soon("b")

    assert ("a",) == routes.table.closed_ids()


async def test_all_routes_close_together_at_the_end() -> None:
    routes = await old_routes()
    for replica_id in ("a", "b", "c"):
        routes.open(replica_id, endpoint="http://x")
    await wish(routes, seen_version=-1)
    began_s = anyio.current_time()

    await routes.close_all()

    assert () == routes.table.open_ids()
    assert anyio.current_time() - began_s == pytest.approx(1.0, abs=0.02)

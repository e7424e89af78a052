"""Each user may do what its service needs on a real server, and nothing else."""

import re
import stat
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import anyio
import pytest

from kit.bus import AppendRefused, Entry, Forbidden, NoAnswer, Received, Stream
from kit.bus_nats import NatsBus
from kit.nats_access import SERVICES, access_of, generate_keys, permissions_of, read_seed, user_names, users_of
from kit.nats_server import NatsServer, ServerConfig, ensure_streams
from kit.nats_wire import tenant_inbox
from tests.fixtures.nats import binary

pytestmark = [pytest.mark.nats, pytest.mark.anyio]

WRITERS = ["placement", "swapper", "autoscaler", "node.n1"]
USERS = user_names(nodes=["n1", "n2"], tenants=["acme", "globex"])


class Installation:
    """A server with all users; `bus(user)` connects as one."""

    def __init__(self, server: NatsServer, keys: Path) -> None:
        self.server = server
        self.keys = keys

    def bus(self, user: str) -> NatsBus:
        inbox = tenant_inbox(user.removeprefix("tenant.")) if user.startswith("tenant.") else ""
        return NatsBus(self.server.url, read_seed(self.keys, user), user, inbox_prefix=inbox)

    @asynccontextmanager
    async def two(self, first: str, second: str) -> AsyncIterator[tuple[NatsBus, NatsBus]]:
        async with self.bus(first) as one, self.bus(second) as other:
            yield one, other


@pytest.fixture(scope="module")
async def installation(tmp_path_factory: pytest.TempPathFactory, anyio_backend: object) -> AsyncIterator[Installation]:
    directory = tmp_path_factory.mktemp("nats-users")
    users = users_of(generate_keys(directory / "keys", USERS))
    config = ServerConfig(store_directory=directory / "store", users=users)
    with NatsServer(directory, config, binary=binary()) as server:
        made = Installation(server, directory / "keys")
        async with made.bus("admin") as bus:
            await ensure_streams(bus)
        yield made


def fact(writer: str) -> Entry:
    subject = f"sublet.fact.{writer}.tested_v1"
    return Entry(subject=subject, body=b"{}", id="1", cause_seq=0, cursor_seq=0, previous_hash="")


async def last_seq_of(bus: NatsBus, writer: str) -> int:
    newest = await bus.last(f"sublet.fact.{writer}.>")
    return newest.seq if newest else 0


async def read_one(bus: NatsBus, stream: Stream, *filters: str) -> None:
    with anyio.fail_after(60):
        async with aclosing(bus.read(stream, filters, after_seq=0)) as reading:
            await reading.__anext__()


def keep(_: Received) -> None:
    return


async def denials(bus: NatsBus, subject: str) -> int:
    """How many denials one publish to the subject brings."""
    before = bus.denied_count
    await bus.publish(subject, b"{}")
    async with bus.subscribe(f"{subscribable(bus)}.probe", keep):
        pass  # The server has handled all that was sent before.
    return bus.denied_count - before


def subscribable(bus: NatsBus) -> str:
    return bus._connection.new_inbox()


# ---- allowed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", WRITERS)
async def test_a_writer_does_all_that_the_shell_asks_of_it(installation: Installation, writer: str) -> None:
    prefix = f"sublet.fact.{writer}.>"
    async with installation.bus(writer) as bus:
        seq = (await bus.append(prefix, [fact(writer)], last_seq=await last_seq_of(bus, writer))).last_seq
        assert (await bus.append(prefix, [fact(writer), fact(writer)], last_seq=seq)).last_seq == seq + 2
        await read_one(bus, Stream.HISTORY, prefix)
        await read_one(bus, Stream.HISTORY, prefix, "sublet.fact.node.>")
        await bus.publish_stored("sublet.record.x", b"{}", id=f"{writer}-1")
        await bus.publish_stored(f"sublet.dead.{writer.partition('.')[0]}", b"{}", id=f"{writer}-1")
        await bus.publish_stored(f"sublet.snapshot.{writer}.manifest.0", b"{}", id=f"{writer}-1")
        await read_one(bus, Stream.SNAPSHOTS, f"sublet.snapshot.{writer}.manifest.*")
        assert await bus.acquire_lease(writer, "a", term_s=0.01)
        assert await denials(bus, "sublet.signal.x") == 0
        assert bus.denied_count == 0


async def test_placement_reads_the_inbox_and_answers_commands_and_queries(installation: Installation) -> None:
    async with (
        installation.two("placement", "tenant.acme") as (placement, tenant),
        anyio.create_task_group() as tg,
    ):
        answers: list[Received] = []
        answered = anyio.Event()

        def receive_answer(received: Received) -> None:
            answers.append(received)
            answered.set()

        def receive_question(received: Received) -> None:
            tg.start_soon(lambda: placement.publish(received.reply_subject, b"view"))

        async with (
            placement.subscribe("sublet.query.*.placement.>", receive_question, queue="placement"),
            tenant.subscribe("sublet.out.acme.c-1", receive_answer),
        ):
            await tenant.publish_stored("sublet.in.acme.deploy", b"{}", id="c-1")
            await read_one(placement, Stream.INBOX, "sublet.in.>")
            await placement.publish("sublet.out.acme.c-1", b"admitted")
            with anyio.fail_after(60):
                await answered.wait()
            assert await tenant.request("sublet.query.acme.placement.ps", b"", timeout_s=60) == b"view"

    assert [answer.body for answer in answers] == [b"admitted"]


async def test_an_order_reaches_the_agent_of_its_node(installation: Installation) -> None:
    received: list[Received] = []
    arrived = anyio.Event()

    def receive(order: Received) -> None:
        received.append(order)
        arrived.set()

    async with (
        installation.two("swapper", "node.n1") as (swapper, agent),
        agent.subscribe("sublet.order.n1.*", receive),
    ):
        await swapper.publish("sublet.order.n1.wake", b"{}")
        with anyio.fail_after(60):
            await arrived.wait()

    assert [order.subject for order in received] == ["sublet.order.n1.wake"]


async def test_a_gateway_reads_history_and_asks_services(installation: Installation) -> None:
    async with installation.bus("gateway") as gateway:
        await read_one(gateway, Stream.HISTORY, "sublet.fact.>")
        await read_one(gateway, Stream.SNAPSHOTS, "sublet.snapshot.gateway.manifest.*")
        await gateway.publish_stored("sublet.record.x", b"{}", id="g-1")
        with pytest.raises(NoAnswer):
            await gateway.request("sublet.query.acme.placement.ps", b"", timeout_s=1)
        assert gateway.denied_count == 0


# ---- denied ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("user", [user for user in USERS if user not in WRITERS])
@pytest.mark.parametrize("writer", WRITERS)
async def test_nobody_else_appends_under_a_writers_prefix(installation: Installation, user: str, writer: str) -> None:
    async with installation.bus(user) as bus:
        with pytest.raises(AppendRefused, match=rf"NATS user '{user}' may not publish to sublet\.fact\."):
            await bus.append(f"sublet.fact.{writer}.>", [fact(writer)], last_seq=0)


@pytest.mark.parametrize("user", WRITERS)
async def test_a_writer_appends_under_no_other_prefix(installation: Installation, user: str) -> None:
    async with installation.bus(user) as bus:
        for writer in {*WRITERS, "node.n2"} - {user}:
            with pytest.raises(AppendRefused, match=rf"NATS user '{user}' may not publish to sublet\.fact\."):
                await bus.append(f"sublet.fact.{writer}.>", [fact(writer), fact(writer)], last_seq=0)


@pytest.mark.parametrize(
    ("user", "subject"),
    [
        ("placement", "sublet.in.acme.deploy"),
        ("placement", "sublet.dead.swapper"),
        ("swapper", "sublet.out.acme.c-1"),
        ("swapper", "$KV.sublet-leases.placement"),
        ("autoscaler", "$JS.API.STREAM.DELETE.SUBLET"),
        ("autoscaler", "$JS.API.STREAM.UPDATE.SUBLET"),
        ("autoscaler", "$JS.API.CONSUMER.MSG.NEXT.INBOX.read-1"),
        ("gateway", "sublet.order.n1.wake"),
        ("gateway", "sublet.in.acme.deploy"),
        ("gateway", "$JS.API.STREAM.PURGE.SUBLET"),
        ("gateway", "$JS.API.CONSUMER.CREATE.INBOX.x"),
        ("node.n1", "sublet.order.n2.wake"),
        ("node.n1", "sublet.out.acme.c-1"),
        ("node.n1", "_INBOX.placement.x"),
        ("node.n1", "$JS.API.STREAM.MSG.DELETE.SUBLET"),
        ("tenant.acme", "sublet.in.globex.deploy"),
        ("tenant.acme", "sublet.query.globex.placement.ps"),
        ("tenant.acme", "sublet.out.acme.c-1"),
        ("tenant.acme", "sublet.signal.gateways_model_wanted_v1"),
        ("tenant.acme", "sublet.order.n1.wake"),
        ("tenant.acme", "$JS.API.STREAM.INFO.SUBLET"),
        ("tenant.acme", "$JS.API.STREAM.INFO.INBOX"),
        ("tenant.acme", "$JS.API.CONSUMER.CREATE.SUBLET.x.sublet.fact.>"),
        ("tenant.acme", "_INBOX.placement.x"),
        ("tenant.acme", "_INBOX_globex.x"),
        ("swapper", "sublet.snapshot.placement.manifest.0"),
        ("swapper", "$JS.API.CONSUMER.CREATE.SNAPSHOTS.x.sublet.snapshot.placement.>"),
        ("swapper", "$JS.API.CONSUMER.CREATE.SNAPSHOTS.x"),
        ("swapper", "$JS.API.STREAM.PURGE.SNAPSHOTS"),
        ("gateway", "sublet.snapshot.gateway.manifest.0"),
        ("node.n1", "sublet.snapshot.node.n2.chunk.0.0"),
        ("tenant.acme", "sublet.snapshot.placement.manifest.0"),
        ("tenant.acme", "$JS.API.STREAM.INFO.SNAPSHOTS"),
        ("admin", "sublet.snapshot.placement.manifest.0"),
        ("admin", "sublet.order.n1.wake"),
        ("admin", "sublet.in.acme.deploy"),
    ],
)
async def test_a_user_may_not_publish_there(installation: Installation, user: str, subject: str) -> None:
    async with installation.bus(user) as bus:
        assert await denials(bus, subject) == 1


@pytest.mark.parametrize(
    ("user", "subject"),
    [
        ("tenant.acme", "sublet.fact.>"),
        ("tenant.acme", "sublet.>"),
        ("tenant.acme", ">"),
        ("tenant.acme", "sublet.in.acme.>"),
        ("tenant.acme", "sublet.out.globex.>"),
        ("tenant.acme", "sublet.out.*.c-1"),
        ("tenant.acme", "sublet.query.>"),
        ("tenant.acme", "sublet.order.>"),
        ("tenant.acme", "_INBOX.>"),
        ("tenant.acme", "_INBOX_globex.>"),
        ("tenant.acme", "$JS.EVENT.>"),
        ("node.n1", "sublet.order.n2.>"),
        ("node.n1", "sublet.order.>"),
        ("node.n1", "sublet.query.*.nodeagent.n2.>"),
        ("node.n1", "_INBOX.node.n2.>"),
        ("gateway", "sublet.in.>"),
        ("gateway", "sublet.out.>"),
        ("gateway", "sublet.query.*.placement.>"),
        ("swapper", "sublet.query.*.placement.>"),
        ("placement", "sublet.order.>"),
        ("placement", "_INBOX.>"),
    ],
)
async def test_a_user_may_not_subscribe_there(installation: Installation, user: str, subject: str) -> None:
    async with installation.bus(user) as bus:
        with pytest.raises(Forbidden, match=re.escape(f"may not subscribe to {subject}")):
            async with bus.subscribe(subject, keep):
                pass


async def test_a_forbidden_read_and_request_fail_at_once(installation: Installation) -> None:
    """Long before anybody has waited long enough for an answer."""
    async with installation.bus("tenant.acme") as tenant:
        with anyio.fail_after(20), pytest.raises(Forbidden):
            await read_one(tenant, Stream.HISTORY, "sublet.fact.>")
        with anyio.fail_after(20), pytest.raises(Forbidden):
            await tenant.request("sublet.query.globex.placement.ps", b"", timeout_s=60)
        with anyio.fail_after(20), pytest.raises(AppendRefused):
            await tenant.publish_stored("sublet.in.globex.deploy", b"", id="1")


async def test_a_service_may_answer_only_what_it_was_asked(installation: Installation) -> None:
    async with installation.bus("placement") as placement:
        assert await denials(placement, "_INBOX_acme.guessed") == 1


async def test_an_unknown_key_is_refused_at_once_and_says_so(installation: Installation, tmp_path: Path) -> None:
    generate_keys(tmp_path, ["stranger"])
    with anyio.fail_after(30), pytest.raises(Forbidden, match="does not know this key"):
        async with NatsBus(installation.server.url, read_seed(tmp_path, "stranger"), "stranger"):
            pass
    with anyio.fail_after(30), pytest.raises(Forbidden):
        async with NatsBus(installation.server.url):
            pass


# ---- keys and lists -------------------------------------------------------------------------------------------------


def test_seeds_are_for_their_owner_only_and_are_kept(tmp_path: Path) -> None:
    first = generate_keys(tmp_path / "keys", ["placement", "node.n1"])
    second = generate_keys(tmp_path / "keys", ["placement", "swapper"])

    assert first["placement"] == second["placement"]
    assert len({*first.values(), *second.values()}) == 3
    assert all(key.startswith("U") for key in first.values())
    for path in (tmp_path / "keys").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_seed(tmp_path / "keys", "placement").startswith("SU")


def test_no_two_writers_share_a_prefix() -> None:
    prefixes = [prefix for user in USERS for prefix in access_of(user).appends]

    assert len(prefixes) == len(set(prefixes)) == len(SERVICES) - 1 + 2


def test_only_the_administrator_may_change_streams() -> None:
    for user in USERS:
        allowed = permissions_of(access_of(user)).publish
        assert (">" in allowed or "$JS.API.>" in allowed) == (user == "admin")
        assert not any("STREAM.CREATE" in subject or "STREAM.DELETE" in subject for subject in allowed)

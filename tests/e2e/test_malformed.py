"""Bytes that nobody can read, published straight to NATS: told to the publisher, put aside, and no service stops."""

import contextlib
import json
import secrets
from collections.abc import AsyncIterator

import anyio
import msgspec
import pytest

from kit.bus import CaughtUp, Received, Stored, Stream
from kit.bus_nats import NatsBus
from kit.nats_access import read_seed
from kit.nats_wire import tenant_inbox
from tests.e2e.conftest import CHAT
from tests.e2e.stack import RunningStack, chat, eventually

pytestmark = [pytest.mark.nats, pytest.mark.anyio]

BAD_COMMANDS = {
    "no JSON": b"\x00\xff{not json",
    "empty": b"",
    "no type": b'{"command_id": "x"}',
    "unknown type": b'{"type": "inbox.deploy_requestd.v1", "command_id": "x"}',
    "a newer version": b'{"type": "inbox.deploy_requested.v9", "command_id": "x"}',
    "a fact": b'{"type": "swapper.park_decided.v1", "command_id": "x"}',
    "wrong kind of value": b'{"type": "inbox.park_requested.v1", "command_id": "x", "model": 7}',
    "nested too deeply": b'{"type": "inbox.park_requested.v1", "command_id": "x", "y": ' + b"[" * 20_000,
}
BAD_FACTS = {
    "no JSON": b"\x00\xff{not json",
    "unknown type": b'{"type": "swapper.no_such_thing.v1"}',
    "wrong kind of value": b'{"type": "swapper.park_decided.v1", "at_s": "soon"}',
}


@contextlib.asynccontextmanager
async def as_user(stack: RunningStack, user: str) -> AsyncIterator[NatsBus]:
    prefix = tenant_inbox("default") if user.startswith("tenant.") else ""
    async with NatsBus(stack.nats_url, read_seed(stack.folder.keys, user), user, inbox_prefix=prefix) as bus:
        yield bus


@pytest.mark.parametrize("case", BAD_COMMANDS)
async def test_a_command_that_cannot_be_read_is_rejected_to_its_publisher(stack: RunningStack, case: str) -> None:
    pids = stack.pids
    command_id = f"bad-{secrets.token_hex(6)}"
    body = BAD_COMMANDS[case].replace(b'"command_id": "x"', f'"command_id": "{command_id}"'.encode())
    answered = anyio.Event()
    answers: list[dict[str, str]] = []

    def receive(received: Received) -> None:
        answers.append(msgspec.json.decode(received.body))
        answered.set()

    async with (
        as_user(stack, "tenant.default") as bus,
        bus.subscribe(f"sublet.out.default.{command_id}", receive),
    ):
        await bus.publish_stored("sublet.in.default.inbox_deploy_requested_v1", body, id=command_id)
        with anyio.fail_after(60):
            await answered.wait()

    assert ("rejected", "SUB-INB-001") == (answers[0]["verdict"], answers[0]["code"])
    assert len(answers[0]["message"]) > 20
    await anyio.to_thread.run_sync(chat, stack.openai(), CHAT)
    assert pids == stack.pids


@pytest.mark.parametrize("case", BAD_FACTS)
@pytest.mark.parametrize("writer", ["placement", "swapper", "autoscaler", "node.local"])
async def test_a_fact_that_cannot_be_read_is_put_aside_by_its_owner(
    stack: RunningStack, writer: str, case: str
) -> None:
    pids = stack.pids
    subject = f"sublet.fact.{writer}.made_up_{secrets.token_hex(4)}"

    async with as_user(stack, writer) as bus:
        await bus.publish_stored(subject, BAD_FACTS[case], id=secrets.token_hex(8))
    async with as_user(stack, "admin") as bus:
        with anyio.fail_after(60):
            letter = await dead_letter(bus, subject)

    assert len(letter["reason"]) > 10
    await anyio.to_thread.run_sync(stack.wait_ready)
    assert pids == stack.pids


@pytest.mark.parametrize("body", [b"", b"\xff\xfe", b'{"type": ' + b"[" * 20_000, b'{"x": ' * 20_000], ids=range(4))
@pytest.mark.parametrize(
    "target",
    ["placement.queries_list_events_v1", "placement.queries_explain_v1", "nodeagent.local.queries_read_logs_v1"],
)
async def test_a_query_that_cannot_be_read_is_refused_in_words(stack: RunningStack, target: str, body: bytes) -> None:
    pids = stack.pids

    async with as_user(stack, "tenant.default") as bus:
        answer = msgspec.json.decode(await bus.request(f"sublet.query.default.{target}", body, timeout_s=30.0))
        await bus.publish(f"sublet.query.default.{target}", body)  # Without anybody to answer to.

    assert len(answer["error"]) > 10
    await anyio.to_thread.run_sync(stack.wait_ready)
    assert pids == stack.pids


async def test_parks_and_wakes_go_on_after_unreadable_facts(stack: RunningStack) -> None:
    for writer in ("placement", "swapper", "node.local"):
        async with as_user(stack, writer) as bus:
            await bus.publish_stored(f"sublet.fact.{writer}.made_up", b"?", id=secrets.token_hex(8))

    def work() -> None:
        stack.wait_ready()
        with stack.client() as client:
            client.park(CHAT)
            eventually(lambda: stack.state_of(CHAT) == "parked", "not parked")
        chat(stack.openai(), CHAT)

    await anyio.to_thread.run_sync(work)


async def dead_letter(bus: NatsBus, subject: str) -> dict[str, str]:
    """The dead letter about a message of this subject, as soon as there is one."""
    async for item in bus.read(Stream.DEAD, ["sublet.dead.>"], after_seq=0):
        if isinstance(item, CaughtUp):
            continue
        assert isinstance(item, Stored)
        letter: dict[str, str] = json.loads(item.body)
        if letter["subject"] == subject:
            return letter
    raise AssertionError("the stream ended")

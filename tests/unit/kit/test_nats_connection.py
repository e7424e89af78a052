"""Questions, answers and deadlines, over a transport that only remembers."""

import asyncio
import re

import anyio
import pytest

from kit.bus import Forbidden, subject_matches
from kit.nats_connection import Connection, Receive, Unanswered

pytestmark = pytest.mark.anyio


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": request.param}


class Transport:
    is_connected = True

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.subscriptions: dict[str, Receive] = {}

    def send(self, frames: bytes) -> bool:
        if self.is_connected:
            self.sent.append(frames)
        return self.is_connected

    def add_subscription(self, subject: str, queue: str, receive: Receive) -> int:
        self.subscriptions[subject] = receive
        return len(self.subscriptions)

    def remove_subscription(self, sid: int) -> None:
        return None

    def ping(self) -> asyncio.Future[bool]:
        raise NotImplementedError

    def answer(self, number: int, body: bytes) -> None:
        """The `number`th question sent is answered."""
        found = re.match(rb"H?PUB \S+ (\S+) ", self.sent[number])
        assert found is not None
        (receive,) = self.subscriptions.values()
        receive(found.group(1), b"", None, body)


def connected() -> tuple[Connection, Transport]:
    transport = Transport()
    connection = Connection(transport, user="test", inbox_prefix="_INBOX.test")
    connection.open()
    return connection, transport


async def test_each_question_gets_its_own_answer() -> None:
    connection, transport = connected()
    bodies: dict[int, bytes] = {}

    async def ask(number: int) -> None:
        bodies[number] = (await connection.ask(f"s.{number}", b"")).body

    async with anyio.create_task_group() as tg:
        for number in range(3):
            tg.start_soon(ask, number)
        await anyio.wait_all_tasks_blocked()
        for number in (2, 0, 1):
            transport.answer(number, b"%d" % number)
            transport.answer(number, b"again")

    assert bodies == {0: b"0", 1: b"1", 2: b"2"}


async def test_each_question_has_its_own_deadline() -> None:
    """Also one that is shorter than those before it; the answered one in between costs nobody anything."""
    connection, transport = connected()
    ended: list[tuple[str, float]] = []
    began_s = anyio.current_time()

    async def ask(timeout_s: float) -> None:
        with pytest.raises(Unanswered, match=f"within {timeout_s} s"):
            await connection.ask("s", b"", timeout_s=timeout_s)
        ended.append((f"{timeout_s}", anyio.current_time() - began_s))

    async def ask_well() -> None:
        await connection.ask("s", b"", timeout_s=0.2)

    async with anyio.create_task_group() as tg:
        tg.start_soon(ask, 0.3)
        tg.start_soon(ask, 0.1)
        tg.start_soon(ask_well)
        await anyio.wait_all_tasks_blocked()
        transport.answer(2, b"")

    assert [name for name, _ in ended] == ["0.1", "0.3"]
    assert all(float(name) - 0.01 <= at_s < float(name) + 5 for name, at_s in ended), ended  # A busy host is late.


async def test_a_deadline_that_is_over_before_the_question_is_asked_is_one() -> None:
    """A busy loop comes late to its calls; uvloop then has another kind of timer."""
    connection, _ = connected()

    async def ask(timeout_s: float) -> None:
        with pytest.raises(Unanswered):
            await connection.ask("s", b"", timeout_s=timeout_s)

    async with anyio.create_task_group() as tg:
        tg.start_soon(ask, -1.0)
        tg.start_soon(ask, -2.0)

    assert not connection._questions


async def test_an_answer_to_an_earlier_attempt_answers_a_later_one() -> None:
    """A server with a backlog answers late: it must not be asked for ever, each time too early given up."""
    connection, transport = connected()
    reply = connection.new_reply()
    with pytest.raises(Unanswered):
        await connection.ask("s", b"", timeout_s=0, reply=reply)
    bodies: list[bytes] = []

    async def ask_again() -> None:
        bodies.append((await connection.ask("s", b"", reply=reply)).body)

    async with anyio.create_task_group() as tg:
        tg.start_soon(ask_again)
        await anyio.wait_all_tasks_blocked()
        transport.answer(0, b"late")

    assert bodies == [b"late"]


async def test_a_question_that_is_asked_while_the_server_is_away_is_not_kept_for_later() -> None:
    connection, transport = connected()
    connection.lost()
    transport.is_connected = False
    with pytest.raises(Unanswered):
        await connection.ask("s", b"", timeout_s=0.05)
    transport.is_connected = True
    connection.back()

    assert not [frames for frames in transport.sent if frames.startswith(b"PUB s")]


async def test_a_lost_connection_and_a_denied_subject_fail_who_waits_at_once() -> None:
    connection, _ = connected()

    async def ask(subject: str, error: type[Exception]) -> None:
        with pytest.raises(error):
            await connection.ask(subject, b"", timeout_s=60)

    async with anyio.create_task_group() as tg:
        tg.start_soon(ask, "s.Allowed", Unanswered)
        tg.start_soon(ask, "s.Denied", Forbidden)
        await anyio.wait_all_tasks_blocked()
        connection.denied('permissions violation for publish to "s.denied"')
        await anyio.wait_all_tasks_blocked()
        connection.lost()


async def test_what_a_read_receives_does_not_come_twice() -> None:
    connection, transport = connected()
    (answers,) = transport.subscriptions

    assert not subject_matches(answers, connection.new_inbox())

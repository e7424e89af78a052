"""The client against a real event server, with a placement of ten lines; and how it fails."""

import asyncio
import contextlib
import json
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import nats
import pytest
from nats.aio.client import Client as Connection
from nats.aio.msg import Msg

import sublet
from sublet import _contract as contract
from sublet.context import Context
from sublet.errors import NotFound, Refused, SubletError, TimedOut, Unreachable
from tests.unit.sublet.fakes import FakeControlPlane, spec, view

pytestmark = pytest.mark.nats
SETTINGS = """
jetstream: {{store_dir: "{folder}/js"}}
listen: "127.0.0.1:-1"
ports_file_dir: "{folder}"
accounts: {{
  A: {{jetstream: enabled, users: [
    {{user: placement, password: p}},
    {{user: tenant, password: t, permissions: {{
      publish: ["sublet.in.acme.>", "sublet.query.acme.>"],
      subscribe: ["sublet.out.acme.>", "_INBOX_acme.>"]
    }}}}
  ]}}
}}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An event server on a free port; its address without a user."""
    from tests.conftest import nats_server_path

    folder = tmp_path_factory.mktemp("nats")
    (folder / "nats.conf").write_text(SETTINGS.format(folder=folder))
    process = subprocess.Popen(
        [str(nats_server_path()), "-c", str(folder / "nats.conf")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield _address(folder, process)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _address(folder: Path, process: "subprocess.Popen[bytes]") -> str:
    """The address that the server writes down when it listens."""
    ports = folder / f"nats-server_{process.pid}.ports"
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        with contextlib.suppress(OSError, ValueError):  # Not written yet, or half.
            return str(json.loads(ports.read_text())["nats"][0]).removeprefix("nats://")
        time.sleep(0.01)
    raise AssertionError("nats-server did not start")


def context_of(server: str, tenant: str = "acme") -> Context:
    return Context(nats_url=f"nats://tenant:t@{server}", tenant=tenant)


@asynccontextmanager
async def placement(server: str, plane: FakeControlPlane, *, is_mute: bool = False) -> AsyncIterator[Connection]:
    """Answers commands from the inbox and queries, as `plane` would."""
    connection = await nats.connect(f"nats://placement:p@{server}")
    await connection.jetstream().add_stream(name="INBOX", subjects=["sublet.in.>"])

    async def command(message: Msg) -> None:
        command_id = msgspec.json.decode(message.data)["command_id"]
        outgoing = sublet.client.Outgoing(
            subject=message.subject, answer_subject=f"sublet.out.acme.{command_id}", body=message.data, id=command_id,
            traceparent=(message.headers or {})["traceparent"],
        )  # fmt: skip
        body = await plane.command(outgoing, timeout_s=1)
        if body is not None and not is_mute:
            await connection.publish(outgoing.answer_subject, body)

    async def query(message: Msg) -> None:
        body = await plane.request(message.subject, message.data, timeout_s=1, traceparent="")
        await message.respond(body)

    await connection.subscribe("sublet.in.acme.>", cb=command)
    await connection.subscribe("sublet.query.acme.>", cb=query)
    await connection.flush()
    try:
        yield connection
    finally:
        await connection.jetstream().delete_stream("INBOX")
        await connection.close()


def test_commands_and_queries_go_there_and_back_with_a_tenants_permissions(server: str) -> None:
    plane = FakeControlPlane()
    plane.steps = [(view("resident"),)]

    async def scenario() -> None:
        async with placement(server, plane) as connection, sublet.connect(context_of(server)) as client:
            answer = await client.deploy(spec())
            stored = await connection.jetstream().stream_info("INBOX")
            listed = await client.deployments()

            assert (answer.verdict, answer.message) == ("admitted", "chat is admitted")
            assert stored.state.messages == 1
            assert [one.deployment.name for one in listed.deployments] == ["chat"]
            assert plane.sent[0].traceparent.startswith("00-")

    asyncio.run(scenario())


def test_many_are_applied_and_one_rejection_stops_none(server: str) -> None:
    plane = FakeControlPlane()
    plane.verdicts = {"m3": ("rejected", "SUB-ADM-001"), "m4": ("duplicate", "")}

    async def scenario() -> None:
        async with placement(server, plane), sublet.connect(context_of(server)) as client:
            applied = await client.apply([spec(f"m{number}") for number in range(40)])

            assert [one.spec.name for one in applied] == [f"m{number}" for number in range(40)]
            assert [one.spec.name for one in applied if one.error] == ["m3"]
            assert [one.spec.name for one in applied if one.is_unchanged] == ["m4"]

    asyncio.run(scenario())


def test_a_command_without_an_answer_is_stored(server: str) -> None:
    async def scenario() -> None:
        async with placement(server, FakeControlPlane(), is_mute=True) as connection:
            async with sublet.connect(context_of(server), timeout_s=2.0) as client:
                with pytest.raises(TimedOut, match="stored and will be handled"):
                    await client.park("chat")
            assert (await connection.jetstream().stream_info("INBOX")).state.messages == 1

    asyncio.run(scenario())


async def _error_of(context: Context, *, is_query: bool, timeout_s: float = 2.0) -> SubletError:
    with pytest.raises(SubletError) as caught:
        async with sublet.connect(context, timeout_s=timeout_s) as client:
            await (client.nodes() if is_query else client.wake("chat"))
    return caught.value


def test_a_server_without_a_stack_is_unreachable(server: str) -> None:
    query = asyncio.run(_error_of(context_of(server), is_query=True))
    command = asyncio.run(_error_of(context_of(server), is_query=False))

    assert isinstance(query, Unreachable)
    assert "no placement is active" in query.message
    assert isinstance(command, Unreachable)
    assert "make up" in command.fix


def test_another_tenants_subjects_are_refused(server: str) -> None:
    async def scenario() -> SubletError:
        async with placement(server, FakeControlPlane()):
            context = Context(nats_url=f"nats://tenant:t@{server}", tenant="other", inbox_prefix="_INBOX_acme")
            return await _error_of(context, is_query=False)

    error = asyncio.run(scenario())

    assert isinstance(error, Refused)
    assert "permissions violation" in error.message.lower()


def test_wrong_credentials_are_refused(server: str) -> None:
    error = asyncio.run(_error_of(Context(nats_url=f"nats://tenant:wrong@{server}"), is_query=True))

    assert isinstance(error, Refused)
    assert "wrong" not in error.message


def test_a_dead_port_is_found_at_once() -> None:
    began_s = time.monotonic()
    error = asyncio.run(
        _error_of(Context(nats_url="nats://127.0.0.1:1,nats://127.0.0.1:2"), is_query=True, timeout_s=60)
    )

    assert isinstance(error, Unreachable)
    assert time.monotonic() - began_s < 20
    assert error.fix.endswith("`make up`")


def test_without_any_context_the_fix_is_told() -> None:
    error = asyncio.run(_error_of(Context(), is_query=True))

    assert "no control plane is known here" in error.message


def test_the_synchronous_client_waits_for_each_answer(server: str) -> None:
    """Without a placement; every function goes the same way."""
    with sublet.connect_sync(context_of(server), timeout_s=2.0) as client, pytest.raises(Unreachable):
        client.nodes()


def test_a_replica_is_asked_for_by_its_model() -> None:
    assert sublet.client.replica_of(view("resident")).replica_id == "r1"
    with pytest.raises(NotFound, match="has no replica"):
        sublet.client.replica_of(view(problem="no room"))


def test_a_view_of_a_newer_control_plane_is_read() -> None:
    """Unknown fields and unknown words do not stop an older client."""
    body = contract.plain(contract.DeploymentList(deployments=(view("resident"),)))
    body["shiny"] = 1
    body["deployments"][0]["deployment"]["engine"]["kind"] = "warp-drive"

    listed = msgspec.json.decode(msgspec.json.encode(body), type=contract.DeploymentList)

    assert listed.deployments[0].deployment.engine.kind == "warp-drive"

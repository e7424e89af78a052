"""What a tenant may do over the bus: give commands, ask questions. As any client, with the tenant's own user."""

import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final, TypeVar

import anyio
import msgspec

from kit.bus import Bus, Received
from kit.bus_nats import NatsBus
from kit.nats_access import TENANT_PREFIX, read_seed
from kit.nats_wire import tenant_inbox
from schemas.catalogue import encode
from schemas.inbox import CommandAnswered
from schemas.messages import Command, Query, answer_subject, command_subject, query_subject
from schemas.queries import DeploymentList, DeploymentView, ListDeployments, LogChunk, ReadLogs, ReplicaView
from services.local.state import StackError, StateFolder

ANSWER_WAIT_S: Final = 15.0
LOOK_EVERY_S: Final = 0.05
V = TypeVar("V", bound=msgspec.Struct)


class _Refusal(msgspec.Struct):
    """`QueryRefused` and every view alike: the former alone has an `error`."""

    error: str = ""


class Tenant:
    """One connection of a tenant."""

    def __init__(self, bus: Bus, name: str) -> None:
        self._bus = bus
        self.name = name

    async def command(self, command: Command) -> CommandAnswered:
        """Placement's answer, whatever its verdict. Raises `StackError` when none comes."""
        answered = anyio.Event()
        answers: list[CommandAnswered] = []

        def receive(received: Received) -> None:
            answers.append(msgspec.json.decode(received.body, type=CommandAnswered))
            answered.set()

        async with self._bus.subscribe(answer_subject(self.name, command.command_id), receive):
            # Stored under an id of this attempt's own: a repeated one would be stored once, and answered only once.
            attempt = f"{command.command_id}-{secrets.token_hex(4)}"
            await self._bus.publish_stored(command_subject(self.name, command), encode(command), id=attempt)
            with anyio.move_on_after(ANSWER_WAIT_S):
                await answered.wait()
        if not answers:
            raise StackError(f"placement did not answer within {ANSWER_WAIT_S:g} s; look at its log")
        return answers[0]

    async def ask(self, query: Query, kind: type[V], *, node: str | None = None) -> V:
        body = await self._bus.request(query_subject(self.name, query, node), encode(query), timeout_s=ANSWER_WAIT_S)
        if refusal := msgspec.json.decode(body, type=_Refusal).error:
            raise StackError(refusal)
        return msgspec.json.decode(body, type=kind)

    async def deployment(self, model: str) -> DeploymentView | None:
        listed = await self.ask(ListDeployments(), DeploymentList)
        return next((view for view in listed.deployments if view.deployment.name == model), None)

    async def until(
        self, model: str, holds: Callable[[ReplicaView], bool], *, what: str, timeout_s: float
    ) -> ReplicaView:
        """The model's replica as soon as this holds of it. Raises `StackError` with its state when time is over."""
        seen = "not placed"
        with anyio.move_on_after(timeout_s):
            while True:
                view = await self.deployment(model)
                replica = view.replicas[0] if view is not None and view.replicas else None
                if replica is not None and holds(replica):
                    return replica
                if view is not None:
                    seen = (
                        f"{replica.state}: {replica.problem}" if replica is not None else f"not placed: {view.problem}"
                    )
                await anyio.sleep(LOOK_EVERY_S)
        raise StackError(f"{model} was not {what} within {timeout_s:g} s; it is {seen.rstrip(': ')}")

    async def log_lines(self, replica: ReplicaView) -> list[str]:
        """All that the replica's engine has written."""
        lines: list[str] = []
        after_bytes = 0
        while True:
            query = ReadLogs(replica_id=replica.replica_id, after_bytes=after_bytes, tail_count=1000)
            chunk = await self.ask(query, LogChunk, node=replica.node)
            lines += chunk.lines
            if not chunk.lines or chunk.next_bytes == after_bytes:
                return lines
            after_bytes = chunk.next_bytes


@asynccontextmanager
async def tenant_of(folder: StateFolder, *, nats_url: str, name: str) -> AsyncIterator[Tenant]:
    """A connection as this tenant of the stack in `folder`."""
    user = f"{TENANT_PREFIX}{name}"
    async with NatsBus(nats_url, read_seed(folder.keys, user), user, inbox_prefix=tenant_inbox(name)) as bus:
        yield Tenant(bus, name)

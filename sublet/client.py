"""The client: functions for everything a tenant can ask of a Sublet control plane.

>>> async with sublet.connect() as client:
...     await client.deploy(sublet.deployment("chat", weights="14.5GB", share=0.3))
...     for view in (await client.deployments()).deployments:
...         print(view.deployment.name)

Commands are stored by the event server before anything else happens, and answered by placement; queries are answered
from acknowledged state. Errors are those of `sublet.errors`.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

import msgspec

from sublet import _contract as contract
from sublet.context import START_IT, Context, load
from sublet.errors import Failed, NotFound, Refused, SubletError, TimedOut, Unreachable, rejection

COMMAND_TIMEOUT_S: Final = 10.0
QUERY_TIMEOUT_S: Final = 5.0
# Beside its own deadline a query that waits needs the way there and back.
QUERY_SLACK_S: Final = 2.0
KEY_PREFIX: Final = "sk-sublet-"
# Deploys of one apply that wait for their answers at the same time.
APPLY_CONCURRENCY: Final = 16

View = TypeVar("View", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """One command on its way to the inbox. The same `id` twice is stored once."""

    subject: str
    answer_subject: str
    body: bytes
    id: str
    traceparent: str


class Transport(Protocol):
    """What the client needs of a connection. `sublet.transport.NatsTransport` is the real one; tests pass another."""

    async def command(self, outgoing: Outgoing, *, timeout_s: float) -> bytes | None:
        """Listen for the answer, store the command, wait: the answer's body, or None when none came in time.

        Raises `Unreachable` when it could not be stored, and `Refused` when the server forbids it.
        """
        ...

    async def request(self, subject: str, body: bytes, *, timeout_s: float, traceparent: str) -> bytes:
        """The first answer. Raises `Unreachable`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NewKey:
    """A key that this client made. `key` is shown once; only its hash has travelled."""

    key_id: str
    key: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """What became of one deployment of an apply: an answer, or the error that it met."""

    spec: contract.DeploymentSpec
    answer: contract.CommandAnswered | None
    error: SubletError | None

    @property
    def is_unchanged(self) -> bool:
        return self.answer is not None and self.answer.verdict == "duplicate"


def fresh_traceparent() -> str:
    """A W3C trace context with a new, sampled trace id."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"


class Client:
    """One tenant's connection. `connect` makes it."""

    def __init__(
        self,
        transport: Transport,
        *,
        tenant: str,
        timeout_s: float = COMMAND_TIMEOUT_S,
        on_command: Callable[[Outgoing], None] | None = None,
    ) -> None:
        self._transport = transport
        self.tenant = tenant
        self.timeout_s = timeout_s
        """How long a command waits for its answer."""
        self.on_command = on_command
        """Told of each command before it leaves: its id, its subject, its trace."""

    # ---- commands ----------------------------------------------------------------------------------------------

    async def deploy(self, spec: contract.DeploymentSpec) -> contract.CommandAnswered:
        """Make this deployment so; the answer's verdict is ``duplicate`` when it is so already."""
        return await self._command(contract.DeployRequested(command_id=_command_id(), deployment=spec))

    async def apply(self, specs: Iterable[contract.DeploymentSpec]) -> list[Applied]:
        """Deploy all of them, in their order; an error of one does not stop the others."""
        room = asyncio.Semaphore(APPLY_CONCURRENCY)

        async def one(spec: contract.DeploymentSpec) -> Applied:
            async with room:
                try:
                    return Applied(spec=spec, answer=await self.deploy(spec), error=None)
                except SubletError as error:
                    return Applied(spec=spec, answer=None, error=error)

        return list(await asyncio.gather(*(one(spec) for spec in specs)))

    async def retire(self, model: str) -> contract.CommandAnswered:
        """Take the deployment away: drain, stop, release."""
        return await self._command(contract.RetireRequested(command_id=_command_id(), model=model))

    async def park(self, model: str) -> contract.CommandAnswered:
        """Give the model's GPU memory back now, whatever its warm window says."""
        return await self._command(contract.ParkRequested(command_id=_command_id(), model=model))

    async def wake(self, model: str) -> contract.CommandAnswered:
        """Bring the model back to its GPU now."""
        return await self._command(contract.WakeRequested(command_id=_command_id(), model=model))

    async def create_key(self, name: str = "") -> NewKey:
        """Make an API key here and have its hash accepted."""
        key = KEY_PREFIX + secrets.token_urlsafe(32)
        made = NewKey(key_id=f"key-{secrets.token_hex(6)}", key=key, name=name)
        key_hash = hashlib.sha256(key.encode()).hexdigest()
        await self._command(
            contract.KeyCreateRequested(command_id=_command_id(), key_id=made.key_id, key_hash=key_hash, name=name)
        )
        return made

    async def revoke_key(self, key_id: str) -> contract.CommandAnswered:
        """Stop accepting a key."""
        return await self._command(contract.KeyRevokeRequested(command_id=_command_id(), key_id=key_id))

    # ---- for the operator ----------------------------------------------------------------------------------------

    async def repack(self, *, move_count_max: int = 8) -> contract.CommandAnswered:
        """Free whole GPUs now by moving what may be moved, at most so many replicas."""
        return await self._command(contract.RepackRequested(command_id=_command_id(), move_count_max=move_count_max))

    async def set_quota(
        self, tenant: str, *, gpu_quota: float | None, over_quota_weight: float = 1.0
    ) -> contract.CommandAnswered:
        """What the tenant is guaranteed, in GPUs (None: no limit), and its part of what others leave."""
        command = contract.QuotaRequested(
            command_id=_command_id(),
            quota_tenant=tenant,
            gpu_quota=gpu_quota,
            over_quota_weight=over_quota_weight,
        )
        return await self._command(command)

    async def reinstate_gpu(self, node: str, gpu_uuid: str) -> contract.CommandAnswered:
        """Take new replicas on a quarantined GPU again, without trying it; the begin of its UUID is enough."""
        command = contract.GpuReinstateRequested(command_id=_command_id(), node=node, gpu_uuid=gpu_uuid)
        return await self._command(command)

    async def close_gpu(
        self, node: str, gpu_uuid: str, *, is_draining: bool = False, reason: str = ""
    ) -> contract.CommandAnswered:
        """Put nothing new on a GPU until it is reinstated; draining, what may be moved leaves it too."""
        command = contract.GpuCloseRequested(
            command_id=_command_id(), node=node, gpu_uuid=gpu_uuid, is_draining=is_draining, reason=reason
        )
        return await self._command(command)

    # ---- queries -----------------------------------------------------------------------------------------------

    async def deployments(self) -> contract.DeploymentList:
        return await self._query(contract.ListDeployments(), contract.DeploymentList)

    async def nodes(self) -> contract.NodeList:
        return await self._query(contract.ListNodes(), contract.NodeList)

    async def explain(self, model: str) -> contract.Explanation:
        """Why the model is where it is, or why it is not placed; `is_known` is False for no such model."""
        return await self._query(contract.Explain(model=model), contract.Explanation)

    async def plan(self, deployments: Iterable[contract.DeploymentSpec]) -> contract.Plan:
        """What would become of these, in their order, each on top of the last. Changes nothing."""
        return await self._query(contract.PlanDeployments(deployments=tuple(deployments)), contract.Plan)

    async def plan_repack(self, *, move_count_max: int = 8) -> contract.RepackPlan:
        """Which whole GPUs `repack` would free now, and by which moves. For the operator's tenant; moves nothing."""
        plan = await self._query(contract.PlanRepack(move_count_max=move_count_max), contract.RepackPlan)
        if plan.problem:
            raise Refused(plan.problem)
        return plan

    async def quotas(self) -> contract.QuotaList:
        """What tenants are guaranteed and hold; for the operator's tenant all of them."""
        return await self._query(contract.ListQuotas(), contract.QuotaList)

    async def events(
        self, *, after_seq: int = 0, model: str = "", limit_count: int = 100, wait_s: float = 0.0
    ) -> contract.EventList:
        """The tenant's events after a sequence; waits up to `wait_s` (at most 10) when there is none yet."""
        query = contract.ListEvents(after_seq=after_seq, model=model, limit_count=limit_count, wait_s=wait_s)
        try:
            return await self._query(query, contract.EventList, timeout_s=max(QUERY_TIMEOUT_S, wait_s + QUERY_SLACK_S))
        except Refused as error:
            if error.message != contract.NOTHING_TO_TELL:
                raise
            return contract.EventList(events=(), last_seq=after_seq)

    async def keys(self) -> contract.KeyList:
        return await self._query(contract.ListKeys(), contract.KeyList)

    async def logs(
        self, *, node: str, replica_id: str, after_bytes: int = 0, tail_count: int = 200
    ) -> contract.LogChunk:
        """Lines of one replica's engine; `next_bytes` is where the next call goes on."""
        query = contract.ReadLogs(replica_id=replica_id, after_bytes=after_bytes, tail_count=tail_count)
        return await self._query(query, contract.LogChunk, node=node)

    async def deployment(self, model: str) -> contract.DeploymentView | None:
        """One deployment by its model's name."""
        views = (await self.deployments()).deployments
        return next((view for view in views if view.deployment.name == model), None)

    # ---- the way there and back --------------------------------------------------------------------------------

    async def _command(self, command: contract.Command) -> contract.CommandAnswered:
        outgoing = Outgoing(
            subject=contract.command_subject(self.tenant, command),
            answer_subject=contract.answer_subject(self.tenant, command.command_id),
            body=contract.encode(command),
            id=command.command_id,
            traceparent=fresh_traceparent(),
        )
        if self.on_command is not None:
            self.on_command(outgoing)
        body = await self._transport.command(outgoing, timeout_s=self.timeout_s)
        if body is None:
            raise TimedOut(
                f"no answer within {self.timeout_s:g} s; the command is stored and will be handled",
                facts=(f"command {command.command_id}",),
                cause="placement is not running, or is catching up",
                fix="look again with `sublet ps`; there is no need to repeat the command",
                code="unanswered",
            )
        try:
            answer = msgspec.json.decode(body, type=contract.CommandAnswered)
        except msgspec.MsgspecError as error:
            raise Failed(f"the answer to command {command.command_id} cannot be read: {error}") from error
        if answer.verdict == "rejected":
            raise rejection(answer.message, answer.code or "refused")
        return answer

    async def _query(
        self, query: contract.Query, kind: type[View], *, node: str = "", timeout_s: float = QUERY_TIMEOUT_S
    ) -> View:
        body = await self._transport.request(
            contract.query_subject(self.tenant, query, node),
            contract.encode(query),
            timeout_s=timeout_s,
            traceparent=fresh_traceparent(),
        )
        try:
            if refused := msgspec.json.decode(body, type=_Refusal).error:
                raise Refused(refused, code="query_refused")
            return msgspec.json.decode(body, type=kind)
        except msgspec.MsgspecError as error:
            raise Failed(
                f"the answer of {query.service} cannot be read: {error}",
                fix="upgrade this client with `pip install -U sublet`",
            ) from error


class _Refusal(msgspec.Struct):
    """`QueryRefused` and every view alike: the former alone has an `error`."""

    error: str = ""


def _command_id() -> str:
    return secrets.token_hex(16)


@asynccontextmanager
async def connect(context: Context | None = None, *, timeout_s: float = COMMAND_TIMEOUT_S) -> AsyncIterator[Client]:
    """A client for this context, by default the one that the command line would use here. Raises `Unreachable`."""
    from sublet.transport import NatsTransport

    context = context or load()
    if not context.nats_url:
        raise Unreachable(
            "no control plane is known here: there is no context file and SUBLET_NATS_URL is not set", fix=START_IT
        )
    async with NatsTransport.open(context) as transport:
        yield Client(transport, tenant=context.tenant, timeout_s=timeout_s)


def replica_of(view: contract.DeploymentView) -> contract.ReplicaView:
    """The deployment's replica. Raises `NotFound` when it has none."""
    if not view.replicas:
        raise NotFound(
            f"{view.deployment.name} has no replica", cause=view.problem, fix=f"sublet explain {view.deployment.name}"
        )
    return view.replicas[0]

"""Puts the node agent together."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

import anyio
import msgspec
from anyio.abc import TaskGroup

from devices.api import Inventory
from devices.nvml import NvmlInventory
from kit import settings as kit_settings
from kit.bus import Bus, Received
from kit.journal import Journal
from kit.machine import Machine, kept_machine_id
from kit.outcomes import Effect, Input
from kit.runner import Runner
from kit.serving import connected, new_instance, serve, service_tracer, shell_settings
from schemas.catalogue import UNDECODABLE
from schemas.queries import LogChunk, QueryRefused, ReadLogs
from services.nodeagent import health, leases, residency, shares, suspicion
from services.nodeagent.core import SERVICE
from services.nodeagent.demand_watch import DemandWatch
from services.nodeagent.effects import reconciling
from services.nodeagent.effects.hands import Hands
from services.nodeagent.effects.performing import NodeEffects
from services.nodeagent.effects.probing import offered, our_pids
from services.nodeagent.effects.reconciling import record_in
from services.nodeagent.engine_client import EngineClient
from services.nodeagent.guard.making import guard_of
from services.nodeagent.guard.watchdog import Watchdog
from services.nodeagent.holder_client import HolderClient, HolderProblem
from services.nodeagent.logs import read_tail
from services.nodeagent.mover.mover import mover_of
from services.nodeagent.reconciling import Record
from services.nodeagent.rooms import Rooms
from services.nodeagent.runtimes.api import RuntimeProblem
from services.nodeagent.runtimes.docker import Containers
from services.nodeagent.settings import NodeAgentSettings
from services.nodeagent.state import NodeState
from services.nodeagent.watching import GpuWatch

HOLDER_WAIT_S: Final = 60.0
HOLDER_POLL_S: Final = 0.2
HANDLERS = (health, leases, residency, shares, suspicion)
"""Modules whose import registers handlers."""


async def main() -> None:
    chosen = kit_settings.load(NodeAgentSettings, service="nodeagent")
    telemetry = service_tracer("nodeagent", node=chosen.node)
    journal = Journal(Path(chosen.state_dir) / "journal")
    machine = Machine(machine_id=kept_machine_id(Path(chosen.state_dir)), take_over_from=chosen.take_over_from)
    holder, engines = HolderClient(chosen.holder_socket), EngineClient()
    settings = await with_broker(chosen, holder)
    inventory = await anyio.to_thread.run_sync(NvmlInventory)
    guard = guard_of(settings, inventory, holder)
    rooms = Rooms(guard)
    mover = mover_of(settings, engines)
    writer = f"node.{settings.node}"
    containers: Containers | None = None
    try:
        async with connected("nodeagent", user=writer) as (bus, connection), anyio.create_task_group() as watchers:

            async def perform(effect: Effect, traceparent: str) -> Input | None:
                return await effects.perform(effect, traceparent)

            runner: Runner[NodeState] = Runner(
                SERVICE,
                settings,
                bus,
                writer=writer,
                instance=new_instance(),
                tracer=telemetry,
                perform=perform,
                journal=journal,
                needs_lease=False,
                machine=machine,
                shell=shell_settings("nodeagent"),
            )
            containers = containers_of(settings, watchers)
            hands = Hands(
                settings=settings,
                guard=guard,
                holder=holder,
                engines=engines,
                mover=mover,
                tracer=telemetry,
                watchers=watchers,
                report=runner.offer,
                record=lambda: _record_of(runner),
                rooms=rooms,
                containers=containers,
            )
            effects = NodeEffects(hands)
            watchers.start_soon(mover.warm)
            _watch(hands, runner, inventory)
            async with bus.subscribe(_logs_subject(settings.node), _log_server(bus, runner, hands, watchers)):
                await serve(runner, connection, telemetry)
            watchers.cancel_scope.cancel()
    finally:
        await mover.close()
        if containers is not None:
            await containers.close()
        await holder.close()
        await engines.close()
        journal.close()


def _watch(hands: Hands, runner: Runner[NodeState], inventory: Inventory) -> None:
    """Over engines, whether they keep to their grants and have a lease, over accounts, and over GPUs' health."""
    watchdog = Watchdog(
        hands.settings,
        guard=hands.guard,
        holder=hands.holder,
        containers=hands.containers,
        state=lambda: runner.processor.state if runner.processor is not None else None,
        report=runner.offer,
    )
    hands.watchers.start_soon(watchdog.run)
    hands.watchers.start_soon(reconciling.keep, hands)
    if hands.guard.accounts is not None:
        hands.watchers.start_soon(hands.guard.accounts.keep, lambda: _deployments_of(runner))
    demand = DemandWatch(
        hands.engines,
        every_s=hands.settings.demand_s,
        state=lambda: runner.processor.state if runner.processor is not None else None,
        report=runner.offer,
    )
    hands.watchers.start_soon(demand.run)
    watch = GpuWatch(
        inventory,
        every_s=hands.settings.measure_s,
        offered=lambda: _offered_by(runner),
        our_pids=lambda: our_pids(hands),
        probe=lambda: offered(hands),
        report=runner.offer,
    )
    hands.watchers.start_soon(watch.run)


async def with_broker(settings: NodeAgentSettings, holder: HolderClient) -> NodeAgentSettings:
    """With the sockets of the memory broker that this host's holder keeps, unless they are set.

    Waits for the holder, without which an agent can do nothing: raises `HolderProblem` when it stays away.
    """
    if settings.broker_socket:
        return settings
    give_up_s = anyio.current_time() + HOLDER_WAIT_S
    while True:
        try:
            broker = (await holder.view()).broker
        except HolderProblem:
            if anyio.current_time() > give_up_s:
                raise
            await anyio.sleep(HOLDER_POLL_S)
            continue
        if broker is None:
            return settings
        return msgspec.structs.replace(
            settings, broker_socket=broker.control_socket, broker_engine_socket=broker.engine_socket
        )


def _record_of(runner: Runner[NodeState]) -> Record | None:
    """None while this agent does not decide: another may have taken its place."""
    processor = runner.processor if runner.status.is_ready else None
    return record_in(processor.state) if processor is not None else None


def _deployments_of(runner: Runner[NodeState]) -> Collection[str] | None:
    """Ids of the deployments that have replicas here; None before this node has joined."""
    state = runner.processor.state if runner.processor is not None else None
    if state is None or state.joined is None:
        return None
    return {replica.proposal.deployment_id for replica in state.replicas.values()}


def _offered_by(runner: Runner[NodeState]) -> Collection[str] | None:
    """UUIDs of the GPUs that this node offers; None before it was looked at."""
    state = runner.processor.state if runner.processor is not None else None
    return tuple(state.gpus) if state is not None and state.joined is not None else None


def containers_of(settings: NodeAgentSettings, tasks: TaskGroup) -> Containers:
    """Speaks to Docker when the first engine needs it."""
    return Containers(
        settings.docker_host or os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock",
        node=settings.node,
        state_dir=Path(settings.state_dir),
        tasks=tasks,
        log_bytes_max=settings.log_bytes_max,
        pull_deadline_s=settings.docker_pull_deadline_s,
        docker_config=Path(settings.docker_config).expanduser(),
    )


def _logs_subject(node: str) -> str:
    return f"sublet.query.*.nodeagent.{node}.queries_read_logs_v1"


def _log_server(bus: Bus, runner: Runner[NodeState], hands: Hands, tasks: Any) -> Any:
    """Answers `ReadLogs`: not from state but from files, hence beside the runner."""

    async def answer(received: Received) -> None:
        if not received.reply_subject:
            return
        tenant = received.subject.split(".")[2]
        try:
            query = msgspec.json.decode(received.body, type=ReadLogs)
            body = msgspec.json.encode(await _logs(query, tenant))
        except (*UNDECODABLE, LookupError, RuntimeProblem, OSError) as error:
            body = msgspec.json.encode(QueryRefused(error=str(error)))
        await bus.publish(received.reply_subject, body)

    async def _logs(query: ReadLogs, tenant: str) -> LogChunk:
        replica = runner.processor.state.replicas.get(query.replica_id) if runner.processor is not None else None
        if replica is None or replica.proposal.tenant != tenant:
            raise LookupError(f"there is no replica '{query.replica_id}' here")
        engine = await hands.runtime(replica.proposal).engine(query.replica_id)
        if engine is None:
            raise LookupError(f"'{query.replica_id}' has no engine now, so there is no log")
        return await anyio.to_thread.run_sync(
            lambda: read_tail(Path(engine.log_path), after_bytes=query.after_bytes, tail_count=query.tail_count)
        )

    return lambda received: tasks.start_soon(answer, received)


assert os.name == "posix", "the node agent runs on Linux"

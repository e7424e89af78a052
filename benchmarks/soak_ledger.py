"""The accounts at the end of a soak: what is left on the device and in host memory, and which steps took too long."""

import contextlib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

import anyio
import anyio.to_thread

import softgpu
from kit.bus import Stored
from schemas.brokers import BrokerView
from schemas.catalogue import UnreadableMessage, decode
from schemas.holders import HolderView
from schemas.nodes import LeaseReleased, ReplicaFact, ReplicaParked, ReplicaReady, ReplicaResident, ReplicaWaking
from services.local.stack import LocalStack
from services.nodeagent.broker_client import BrokerClient, BrokerProblem
from services.nodeagent.holder_client import HolderClient
from services.nodeagent.mover.mover import images_folder
from services.nodeagent.settings import NodeAgentSettings

SETTLE_S: Final = 10.0
"""The driver's account and the broker's follow an end within milliseconds."""
LOOK_EVERY_S: Final = 0.1
BLOCK_BYTES: Final = 512
OURS: Final = "-m services"
"""The memory broker, and what freezes engines by the driver's checkpoint: each keeps a context as long as it lives."""
AWAY_S: Final = 15.0
"""A step's deadline holds while its agent lives; it may be killed, come back, and give a step a while once more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftovers:
    """When every model is retired."""

    device_bytes: int
    """On the GPU, but for the contexts of the stack's own processes and the memory broker's pool."""
    pinned_bytes: int | None
    """Host memory that images are kept in; None: the broker does not say."""
    engine_count: int
    told: str = ""


async def left(stack: LocalStack, deployment_ids: Collection[str]) -> Leftovers:
    """What is left after a while at the most.

    The memory broker keeps images of ended replicas as long as there is room; those of these deployments are given up.
    """
    broker = (await _held(stack)).broker
    for deployment_id in sorted(deployment_ids):
        if broker is not None:
            with contextlib.suppress(BrokerProblem):  # Then their bytes are found.
                await BrokerClient(broker.control_socket).forget(deployment_id)
    found = await _left(stack)
    with anyio.move_on_after(SETTLE_S):
        while found.device_bytes or found.pinned_bytes or found.engine_count:
            await anyio.sleep(LOOK_EVERY_S)
            found = await _left(stack)
    return found


async def _held(stack: LocalStack) -> HolderView:
    holder = HolderClient(str(stack.folder.runtime / "holder.sock"))
    try:
        return await holder.view()
    finally:
        await holder.close()


async def _left(stack: LocalStack) -> Leftovers:
    held = await _held(stack)
    broker = await _broker(held)
    pooled_bytes = sum(gpu.pooled_bytes for gpu in broker.gpus) if broker else 0
    host = softgpu.Host(stack.folder.runtime / "gpu", gpus=0)
    status = await anyio.to_thread.run_sync(host.status)
    device_bytes, owners = 0, []
    for device in status["devices"]:
        for process in device["processes"]:
            size, command = process["used_bytes"], await _command(process["pid"])
            if command.startswith(OURS):
                size = max(0, size - process["context_bytes"])
            if broker is not None and process["pid"] == broker.pid:
                size = max(0, size - pooled_bytes)
            device_bytes += size
            owners += [f"{process['pid']} ({command}): {size}"] if size else []
    return Leftovers(
        device_bytes=device_bytes,
        pinned_bytes=None
        if broker is None
        else sum(pool.used_bytes + pool.reserved_bytes for pool in broker.host) + _image_bytes(stack),
        engine_count=len(held.engines),
        told=f"Left on the device: {', '.join(owners)}." if owners else "",
    )


def _image_bytes(stack: LocalStack) -> int:
    """Of frozen processes, which the checkpointer keeps in files."""
    settings = NodeAgentSettings(node=stack.settings.node, state_dir=str(stack.folder.service("nodeagent")))
    total_bytes = 0
    for path in images_folder(settings).rglob("*"):
        with contextlib.suppress(OSError):
            total_bytes += path.stat().st_blocks * BLOCK_BYTES if path.is_file() else 0
    return total_bytes


async def _command(pid: int) -> str:
    """How it was started, in short."""
    try:
        words = (await anyio.Path(f"/proc/{pid}/cmdline").read_bytes()).decode(errors="replace").split("\0")
    except OSError:
        return "gone"
    return " ".join(words[1:4])[:60]


async def _broker(held: HolderView) -> BrokerView | None:
    """None while there is none, or it does not say."""
    if held.broker is None:
        return None
    try:
        return await BrokerClient(held.broker.control_socket).look()
    except BrokerProblem:
        return None


def late_steps(history: Sequence[Stored], *, step_grace_s: float, wake_deadline_s: float) -> list[str]:
    """Steps that neither ended nor made their replica suspect within their time, by their replica's next fact."""
    grace_s = step_grace_s + AWAY_S + wake_deadline_s
    open_steps: dict[str, tuple[str, float]] = {}
    late = []
    for stored in history:
        try:
            fact = decode(stored.body)
        except UnreadableMessage:
            continue
        at_s: float = getattr(fact, "at_s", 0.0)
        names: tuple[str, ...] = ()
        if isinstance(fact, ReplicaFact | LeaseReleased):
            names = (fact.replica_id,)
        elif isinstance(fact, ReplicaReady):
            names = tuple(ready.replica_id for ready in fact.replicas)
        for name in names:
            step, ends_s = open_steps.pop(name, ("", at_s))
            if at_s > ends_s:
                late.append(f"{name}, {step}: {at_s - ends_s:.1f} s")
        if isinstance(fact, ReplicaFact) and fact.ends_within_s > 0:
            step = type(fact).__name__ + (" (reserved)" if isinstance(fact, ReplicaWaking) else "")
            open_steps[fact.replica_id] = (step, at_s + fact.ends_within_s + grace_s)
    return late + [f"{name}, {step}: has not ended" for name, (step, _) in open_steps.items()]


def cycles_by_driver(history: Sequence[Stored]) -> Counter[str]:
    """{swap driver: parks and wakes, one of each is one}; a wake's driver is that of the park before."""
    parks, wakes = Counter[str](), Counter[str]()
    driver: dict[str, str] = {}
    for stored in history:
        try:
            fact = decode(stored.body)
        except UnreadableMessage:
            continue
        if isinstance(fact, ReplicaParked):
            driver[fact.replica_id] = fact.swap_driver or "none"
            parks[driver[fact.replica_id]] += 1
        elif isinstance(fact, ReplicaResident) and fact.replica_id in driver:
            wakes[driver[fact.replica_id]] += 1
    return Counter({name: min(parks[name], wakes[name]) for name in parks})

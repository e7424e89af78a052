"""What this host has: its GPUs with what can be enforced on them, its memory, its processors."""

import os
from pathlib import Path

import anyio.to_thread
from msgspec.structs import replace

from kit.machine import kept_machine_id
from schemas.nodes import GpuOffer
from services.nodeagent.effects.hands import Hands
from services.nodeagent.guard.owners import started_ticks
from services.nodeagent.inputs import NodeProbed, ProbeNode
from services.nodeagent.processes import peer_pid, trees_of
from services.nodeagent.reconciling import either, leased


async def probe(hands: Hands, effect: ProbeNode, traceparent: str) -> NodeProbed:
    settings = hands.settings
    offers = await offered(hands)
    is_software = any(offer.is_software for offer in offers)
    budget_bytes = settings.host_budget_bytes or host_bytes("MemAvailable") // 2
    cpu_count, memory_bytes = os.cpu_count(), host_bytes("MemTotal")
    return NodeProbed(
        machine_id=kept_machine_id(Path(settings.state_dir)),
        gpus=offers,
        host_budget_bytes=budget_bytes,
        holder_url=settings.holder_url,
        label="software GPU" if is_software else "real GPU",
        cpu_millicores=None if cpu_count is None else 1000 * cpu_count,
        memory_bytes=_beside_budget(memory_bytes, budget_bytes) if memory_bytes else None,
    )


async def offered(hands: Hands) -> tuple[GpuOffer, ...]:
    """Every GPU that is here now, with what can be enforced on it and done for its engines."""
    offers = await hands.guard.offers(our_pids=await our_pids(hands))
    swaps = await hands.mover.offered(offers)
    return tuple(replace(offer, swap_drivers=swaps[offer.gpu_uuid]) for offer in offers)


async def our_pids(hands: Hands) -> frozenset[int]:
    """The processes whose GPU memory is no stranger's: engines, this agent, the holder, MPS, and all below them.

    An engine that no lease names is a stranger: what it uses is in nobody's account, so it counts as taken.
    Raises `RuntimeProblem`: without it nobody knows whose they are.
    """
    before = hands.record()
    engines = (await hands.holder.view()).engines
    if hands.containers is not None:
        engines += await hands.containers.views()
    after = hands.record()
    named = leased(engines, either(before, after) if before is not None and after is not None else None)
    roots = [engine.pid for engine in named if engine.is_alive] + [os.getpid()]
    roots += await hands.guard.compute.server_pids()
    holder_pid = await anyio.to_thread.run_sync(peer_pid, hands.settings.holder_socket)
    if holder_pid:
        roots.append(holder_pid)
    strays = [e.pid for e in engines if e not in named and e.is_alive and started_ticks(e.pid) == e.started_ticks]
    ours = await anyio.to_thread.run_sync(trees_of, roots)
    return ours - await anyio.to_thread.run_sync(trees_of, strays) if strays else ours


def _beside_budget(memory_bytes: int, budget_bytes: int) -> int:
    """What replicas may ask of the host's memory. A budget beyond what there is takes none: its weights are phantom."""
    return memory_bytes - budget_bytes if budget_bytes <= memory_bytes else memory_bytes


def host_bytes(name: str) -> int:
    """A line of the kernel's account of memory; 0 when it does not say.

    ``MemAvailable`` could be taken without swapping, as the kernel estimates it; ``MemTotal`` stays the same while
    engines come and go.
    """
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0

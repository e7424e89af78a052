"""A node agent's hands in a process of their own, told by lines what to do; for the tests beside it.

``python -m tests.integration.node_hands SOCKET STATE_DIR``, with the environment of a software GPU host. Each line on
stdin is an effect's name, on stdout its result and what the driver says is in use on each GPU.
"""

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import anyio
import msgspec

import softgpu
from devices.nvml import NvmlInventory
from kit.outcomes import Input
from kit.telemetry import Tracer
from schemas.deployments import SwapDriver
from schemas.nodes import ResizeReason
from schemas.placement import ReplicaProposal
from schemas.units import MiB
from services.nodeagent.effects.hands import Hands
from services.nodeagent.effects.performing import NodeEffects
from services.nodeagent.effects.probing import our_pids
from services.nodeagent.effects.reconciling import reconcile
from services.nodeagent.engine_client import EngineClient
from services.nodeagent.gpu_inputs import TryGpu
from services.nodeagent.guard.making import guard_of
from services.nodeagent.holder_client import HolderClient
from services.nodeagent.inputs import (
    AdoptEngine,
    EngineEffect,
    LookAtEngine,
    ParkEngine,
    ResizeEngine,
    StartEngine,
    StopEngine,
    WakeEngine,
)
from services.nodeagent.main import containers_of
from services.nodeagent.mover.mover import mover_of
from services.nodeagent.reconciling import Record
from services.nodeagent.rooms import Rooms
from services.nodeagent.settings import NodeAgentSettings
from services.nodeagent.transitions import Residency

DRAIN_S = 20.0


def effect_of(word: str, replica: ReplicaProposal) -> EngineEffect | TryGpu:
    common: dict[str, Any] = {"replica": replica, "lease_epoch": 7, "wake_epoch": 1}
    common["swap_driver"] = replica.deployment.engine.swap_driver
    if word.startswith("resize"):
        _, reason, epoch, granted_mib, before_mib = word.split()
        return ResizeEngine(
            **common,
            reason=ResizeReason(reason),
            granted_bytes=(int(granted_mib) * MiB,) * len(replica.shares),
            before_bytes=(int(before_mib) * MiB,) * len(replica.shares),
            resize_epoch=int(epoch),
            deadline_s=60.0,
        )
    match word:
        case "try":
            return TryGpu(gpu_uuid=replica.shares[0].gpu_uuid, fault_count=3)
        case "start":
            return StartEngine(**common)
        case "park":
            return ParkEngine(**common, drain_s=DRAIN_S, reason="the test says so")
        case "wake":
            return WakeEngine(**common)
        case "checkpoint":
            frozen = common | {"swap_driver": SwapDriver.CHECKPOINT}
            return ParkEngine(**frozen, drain_s=DRAIN_S, reason="it did not give back")
        case "thaw":
            return WakeEngine(**(common | {"swap_driver": SwapDriver.CHECKPOINT}))
        case "adopt-parked" | "adopt-resident":
            return AdoptEngine(**common, should_be_parked=word == "adopt-parked")
        case "look resident" | "look parked" | "look and end":
            return LookAtEngine(
                **common,
                was=Residency.PARKED if word == "look parked" else Residency.RESIDENT,
                granted_bytes=tuple(share.request_bytes for share in replica.shares),
                neighbours=(),
                may_end=word == "look and end",
            )
        case _:
            assert word == "stop", word
            return StopEngine(**common, drain_s=DRAIN_S)


def told(result: Input | None, host: softgpu.Host) -> dict[str, Any]:
    """The result, by its class and its fields, the bytes in use on each GPU and the limits on them."""
    status = host.status()
    limits = [
        {limit["device"]: limit["hard_bytes"] for limit in group["limits"] if limit["hard_bytes"]}
        for group in status["groups"]
    ]
    return {
        "kind": type(result).__name__,
        "result": dataclasses.asdict(result) if result is not None else {},
        "used": [device["used_bytes"] for device in status["devices"]],
        "limits": [limit for limit in limits if limit],
    }


def record_of(replica: ReplicaProposal, epochs: list[str]) -> Record:
    """That names leases of the replica with these epochs."""
    leases = frozenset((replica.replica_id, int(epoch)) for epoch in epochs)
    return Record(leases=leases, deployment_ids=frozenset({replica.deployment_id} if epochs else ()))


async def offers_of(hands: Hands) -> list[int]:
    """What counts as taken by strangers, by GPU."""
    offers = await hands.guard.offers(our_pids=await our_pids(hands))
    return [offer.foreign_bytes for offer in offers]


async def main(socket: str, state_dir: str, software_dir: str, more: str = "{}") -> None:
    given = {"holder_socket": socket, "state_dir": state_dir, "cold_start_s": 0.0} | json.loads(more)
    settings = msgspec.convert(given, NodeAgentSettings)
    holder, engines = HolderClient(socket), EngineClient()
    mover = mover_of(settings, engines)
    ended: list[Input] = []
    host = softgpu.Host(Path(software_dir), gpus=0)  # Another process made it.
    inventory = NvmlInventory()
    guard = guard_of(settings, inventory, holder)
    named: list[Record] = []
    async with anyio.create_task_group() as watchers:
        containers = containers_of(settings, watchers)
        hands = Hands(
            settings=settings,
            guard=guard,
            holder=holder,
            engines=engines,
            mover=mover,
            tracer=Tracer(None, None, root_ratio=0.0),
            watchers=watchers,
            report=ended.append,
            record=lambda: named[-1] if named else None,
            rooms=Rooms(guard),
            containers=containers,
        )
        effects = NodeEffects(hands)
        await guard.offers(our_pids=frozenset())
        replica = msgspec.json.decode(await anyio.to_thread.run_sync(sys.stdin.readline), type=ReplicaProposal)
        while word := (await anyio.to_thread.run_sync(sys.stdin.readline)).strip():
            if word == "offered":
                offers = await guard.offers(our_pids=frozenset())
                print(json.dumps(await mover.offered(offers)), flush=True)
                continue
            if word.startswith("record"):
                named.append(record_of(replica, word.split()[1:]))
                print(json.dumps({"foreign": await offers_of(hands)}), flush=True)
                continue
            if word == "reconcile":
                found = await reconcile(hands, pause_s=0.05)
                assert found is not None
                view = await holder.view()
                left = [engine.replica_id for engine in view.engines]
                print(json.dumps(told(None, host) | {"left": left, "leaves": sorted(view.leftover_namespaces),
                                                     "strays": len(found.strays)}), flush=True)  # fmt: skip
                continue
            result = await effects.perform(effect_of(word, replica), "")
            print(json.dumps(told(result, host)), flush=True)
        watchers.cancel_scope.cancel()
    await containers.close()
    await mover.close()
    await holder.close()
    await engines.close()


if __name__ == "__main__":
    anyio.run(functools.partial(main, *sys.argv[1:]))

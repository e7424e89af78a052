"""A watchdog in a process of its own, over engines that the tests beside it have started.

``python -m tests.integration.watching SOCKET STATE_DIR GRADE GPU LEASE... `` with the environment of a software GPU
host; a lease is ``name=MiB``. Each line on stdin is one look; on stdout what was told and who is stopped.
"""

import dataclasses
import json
import sys

import anyio
import anyio.to_thread
import msgspec

from devices.nvml import NvmlInventory
from kit.outcomes import Input
from schemas.deployments import IsolationGrade
from schemas.units import MiB
from services.nodeagent.guard import Guard
from services.nodeagent.guard.watchdog import Watchdog
from services.nodeagent.holder_client import HolderClient
from services.nodeagent.settings import NodeAgentSettings
from services.nodeagent.state import NodeState
from tests.unit.nodeagent import builders


def state_of(grade: IsolationGrade, gpu_uuid: str, leases: list[str]) -> NodeState:
    offer = msgspec.structs.replace(builders.gpu(grade=grade), gpu_uuid=gpu_uuid)
    agent = builders.Agent(offer)
    sizes = dict(lease.split("=") for lease in leases)
    for name in sizes:
        agent.granted(name, 1, gpu_uuid=gpu_uuid)
    for name, size in sizes.items():
        agent.lease(name).share_bytes = {gpu_uuid: int(size) * MiB}
        agent.lease(name).lease_epoch = 1
    return agent.state


async def main(socket: str, state_dir: str, grade: str, gpu_uuid: str, *leases: str) -> None:
    state = state_of(IsolationGrade(grade), gpu_uuid, list(leases))
    told: list[Input] = []
    holder = HolderClient(socket)
    settings = NodeAgentSettings(state_dir=state_dir, overuse_grace_s=0.0, stop_grace_s=0.0)
    watchdog = Watchdog(
        settings,
        guard=Guard(NvmlInventory(), settings),
        holder=holder,
        state=lambda: state,
        report=told.append,
    )
    while await anyio.to_thread.run_sync(sys.stdin.readline):
        told.clear()
        offenders = await watchdog.look()
        for offender in offenders:
            await watchdog.stop(offender)
        reports = [dataclasses.asdict(report) for report in told]
        print(json.dumps({"told": reports, "stopped": [one.replica_id for one in offenders]}), flush=True)
    await holder.close()


if __name__ == "__main__":
    anyio.run(lambda: main(*sys.argv[1:]))

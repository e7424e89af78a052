"""What the guard of a node agent offers, in a process of its own; for the tests beside it.

``python -m tests.integration.guard_offers SOCKET STATE_DIR [WORD...]``, with the environment of a software GPU host:
prints each GPU's grade and reason. Words: ``pretending``: the driver accepts limits, gives them back when asked, and
sets none; ``broker=FOLDER``: the state folder of this host's memory broker, and a reserve of 48 MiB for contexts.
"""

import json
import sys
from pathlib import Path

import anyio

from devices.api import MemoryLimit
from devices.nvml import NvmlInventory
from schemas.units import MiB
from services.nodeagent.guard.making import guard_of
from services.nodeagent.holder_client import HolderClient
from services.nodeagent.settings import NodeAgentSettings


class Pretending(NvmlInventory):
    def __init__(self) -> None:
        super().__init__()
        self._said: dict[tuple[str, str], MemoryLimit] = {}

    def set_limit(self, gpu_uuid: str, namespace: str, *, soft_bytes: int, hard_bytes: int | None) -> None:
        self._said[gpu_uuid, namespace] = MemoryLimit(soft_bytes=soft_bytes, hard_bytes=hard_bytes, used_bytes=0)

    def limit(self, gpu_uuid: str, namespace: str) -> MemoryLimit:
        return self._said.get((gpu_uuid, namespace)) or super().limit(gpu_uuid, namespace)


async def main(socket: str, state_dir: str, *words: str) -> None:
    brokers = [Path(word.removeprefix("broker=")) for word in words if word.startswith("broker=")]
    settings = NodeAgentSettings(
        holder_socket=socket,
        state_dir=state_dir,
        reserve_bytes=48 * MiB if brokers else 0,
        broker_socket=str(brokers[0] / "control.sock") if brokers else "",
        broker_engine_socket=str(brokers[0] / "engines.sock") if brokers else "",
    )
    holder = HolderClient(socket)
    guard = guard_of(settings, Pretending() if "pretending" in words else NvmlInventory(), holder)
    offers = await guard.offers(our_pids=frozenset())
    view = await holder.view()
    told = {
        "grades": [(offer.grade, offer.grade_reason) for offer in offers],
        "engines": [engine.replica_id for engine in view.engines],
        "foreign_bytes": sum(offer.foreign_bytes for offer in offers),
        "leftover": view.leftover_namespaces,
    }
    print(json.dumps(told), flush=True)
    await holder.close()


if __name__ == "__main__":
    anyio.run(main, sys.argv[1], sys.argv[2], *sys.argv[3:])

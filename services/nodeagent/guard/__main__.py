"""``python -m services.nodeagent.guard``: prove the grade of every GPU of this host again, now.

With the settings and the holder of the node agent. What was proven before is forgotten, for the agent's next start too.
"""

import sys

import anyio
import anyio.to_thread

from devices.api import DeviceError
from devices.nvml import NvmlInventory
from kit import settings as kit_settings
from services.nodeagent.guard.making import guard_of
from services.nodeagent.holder_client import HolderClient, HolderProblem
from services.nodeagent.main import with_broker
from services.nodeagent.settings import NodeAgentSettings


async def main() -> int:
    """The exit status: 1 where there is no driver or no holder."""
    settings = kit_settings.load(NodeAgentSettings, service="nodeagent")
    holder = HolderClient(settings.holder_socket)
    try:
        inventory = await anyio.to_thread.run_sync(NvmlInventory)
        guard = guard_of(await with_broker(settings, holder), inventory, holder)
        guard.forget_proofs()
        for offer in await guard.offers(our_pids=frozenset()):
            print(f"{offer.index}  {offer.gpu_uuid}  {offer.grade}: {offer.grade_reason}")
            print(f"   processors {offer.compute_sharing}: {offer.compute_sharing_reason}")
    except (DeviceError, HolderProblem) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        await holder.close()
    return 0


if __name__ == "__main__":
    sys.exit(anyio.run(main))

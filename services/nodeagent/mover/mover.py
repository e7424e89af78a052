"""All swap drivers of one host."""

import hashlib
import logging
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Final

import anyio

from schemas.deployments import ComputeSharing, SwapDriver
from schemas.nodes import GpuOffer
from services.nodeagent.broker_client import BrokerClient
from services.nodeagent.engine_client import EngineClient
from services.nodeagent.mover.checkpoint import Checkpoint
from services.nodeagent.mover.checkpointer_client import CheckpointerClient, CheckpointProblem
from services.nodeagent.mover.driver import Driver
from services.nodeagent.mover.kept_support import KeptSupport
from services.nodeagent.mover.over_http import RELEASE, SLEEP, OverHttp
from services.nodeagent.mover.restart import Restart
from services.nodeagent.mover.sleep_checkpoint import SleepCheckpoint
from services.nodeagent.mover.store import Store
from services.nodeagent.settings import NodeAgentSettings

log = logging.getLogger("nodeagent")

WARM_AFTER_S: Final = 5.0
"""By then everything is adopted. A park by checkpoint that comes sooner starts it itself."""
NOT_UNDER_MPS: Final = frozenset({SwapDriver.CHECKPOINT, SwapDriver.SLEEP_CHECKPOINT})
"""NVIDIA says nothing of clients of an MPS server that are checkpointed."""
SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108  (a memory file system is what is wanted)


class Mover:
    """Knows them by name, and what this node can do with them."""

    def __init__(
        self,
        drivers: Iterable[Driver],
        *,
        checkpointer: CheckpointerClient | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self._drivers: Mapping[SwapDriver, Driver] = {driver.name: driver for driver in drivers}
        self._checkpointer = checkpointer
        self._checkpoint = checkpoint

    async def warm(self) -> None:
        """Some time after a return: start what takes long to start, so that the first park need not wait for it."""
        await anyio.sleep(WARM_AFTER_S)
        if self._checkpoint is not None:
            try:
                await self._checkpoint.asked()
            except CheckpointProblem as problem:
                log.warning("no checkpoints now", extra={"reason": str(problem)})

    async def close(self) -> None:
        if self._checkpointer is not None:
            await self._checkpointer.close()

    def by(self, name: SwapDriver | None) -> Driver:
        """None: of a replica that was started before drivers had names; such a one sleeps when it is asked."""
        return self._drivers[name or SwapDriver.HTTP_SLEEP]

    async def offered(self, offers: Collection[GpuOffer]) -> dict[str, tuple[SwapDriver, ...]]:
        """{gpu_uuid: what can be done there, quickest return first}."""
        found: dict[str, list[SwapDriver]] = {offer.gpu_uuid: [] for offer in offers}
        for name in SwapDriver:
            if name in self._drivers:
                supported = await self._drivers[name].support(tuple(found))
                for offer in offers:
                    is_barred = offer.compute_sharing is ComputeSharing.MPS and name in NOT_UNDER_MPS
                    if supported[offer.gpu_uuid].is_supported and not is_barred:
                        found[offer.gpu_uuid].append(name)
        return {gpu_uuid: tuple(names) for gpu_uuid, names in found.items()}


def plain_drivers(engines: EngineClient) -> list[Driver]:
    """Those that need nothing of the node."""
    return [OverHttp(SLEEP, engines), OverHttp(RELEASE, engines), Restart()]


def mover_of(settings: NodeAgentSettings, engines: EngineClient) -> Mover:
    """All that this agent's settings allow; what the node can really do, `Mover.offered` finds out."""
    drivers = plain_drivers(engines)
    if settings.broker_socket:
        drivers.append(Store(engines, BrokerClient(settings.broker_socket)))
    if not settings.has_checkpoint:
        return Mover(drivers)
    client = CheckpointerClient(
        socket=images_folder(settings) / "checkpointer.sock",
        folder=images_folder(settings),
        is_plain=settings.is_checkpoint_plain,
    )
    kept = KeptSupport(Path(settings.state_dir) / f"checkpoint-support{'-plain' * settings.is_checkpoint_plain}.json")
    checkpoint = Checkpoint(client, lock_timeout_s=settings.lock_timeout_s, kept=kept)
    sleep_checkpoint = SleepCheckpoint(OverHttp(SLEEP, engines), checkpoint)
    return Mover([*drivers, checkpoint, sleep_checkpoint], checkpointer=client, checkpoint=checkpoint)


def images_folder(settings: NodeAgentSettings) -> Path:
    """The same after every restart of this agent, and no other's."""
    if settings.images_dir:
        return Path(settings.images_dir)
    mark = hashlib.sha256(str(Path(settings.state_dir).absolute()).encode()).hexdigest()[:12]
    return SHARED_MEMORY / f"sublet-images-{settings.node}-{mark}"

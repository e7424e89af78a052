"""All swap drivers of one host."""

from collections.abc import Collection, Iterable, Mapping

from schemas.deployments import SwapDriver
from services.nodeagent.engine_client import EngineClient
from services.nodeagent.mover.driver import Driver
from services.nodeagent.mover.over_http import RELEASE, SLEEP, OverHttp
from services.nodeagent.mover.restart import Restart


class Mover:
    """Knows them by name, and what this node can do with them."""

    def __init__(self, drivers: Iterable[Driver]) -> None:
        self._drivers: Mapping[SwapDriver, Driver] = {driver.name: driver for driver in drivers}

    def by(self, name: SwapDriver | None) -> Driver:
        """None: of a replica that was started before drivers had names; such a one sleeps when it is asked."""
        return self._drivers[name or SwapDriver.HTTP_SLEEP]

    async def offered(self, gpu_uuids: Collection[str]) -> dict[str, tuple[SwapDriver, ...]]:
        """{gpu_uuid: what can be done there, quickest return first}."""
        found: dict[str, list[SwapDriver]] = {gpu_uuid: [] for gpu_uuid in gpu_uuids}
        for name in SwapDriver:
            if name in self._drivers:
                supported = await self._drivers[name].support(gpu_uuids)
                for gpu_uuid in gpu_uuids:
                    if supported[gpu_uuid].is_supported:
                        found[gpu_uuid].append(name)
        return {gpu_uuid: tuple(names) for gpu_uuid, names in found.items()}


def plain_drivers(engines: EngineClient) -> list[Driver]:
    """Those that need nothing of the node."""
    return [OverHttp(SLEEP, engines), OverHttp(RELEASE, engines), Restart()]

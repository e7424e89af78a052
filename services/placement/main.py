"""Puts placement together."""

from kit import settings as kit_settings
from kit.runner import Runner
from kit.serving import connected, new_instance, serve, service_tracer, shell_settings
from services.placement import commands, views
from services.placement.core import SERVICE
from services.placement.eventlog import EventLog
from services.placement.settings import PlacementSettings

HANDLERS = (commands, views)
"""Modules whose import registers handlers and answers."""


async def main() -> None:
    settings = kit_settings.load(PlacementSettings, service="placement")
    telemetry = service_tracer("placement")
    async with connected("placement") as (bus, connection):
        runner = Runner(
            SERVICE,
            settings,
            bus,
            writer="placement",
            instance=new_instance(),
            tracer=telemetry,
            shell=shell_settings("placement"),
        )
        events = EventLog(bus, lambda: None if runner.processor is None else runner.processor.state)
        async with events.answering():
            await serve(runner, connection, telemetry, beside=[events.follow])

"""Puts placement together."""

from kit import settings as kit_settings
from kit.runner import Runner
from kit.serving import connected, new_instance, serve, service_tracer, shell_settings
from services.placement import commands, explaining, planning, views
from services.placement.core import SERVICE
from services.placement.eventlog import EventLog
from services.placement.settings import PlacementSettings

HANDLERS = (commands, explaining, planning, views)
"""Modules whose import registers handlers and answers."""


async def main() -> None:
    settings = kit_settings.load(PlacementSettings, service="placement")
    if settings.compiled:
        prepare_compiled()
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


def prepare_compiled() -> None:
    """Before anything is read: compiling takes seconds, the first time. Raises `SettingsError` without numba."""
    from services.placement.packing import compiled  # Loads numpy, which small fleets do without.

    if not compiled.prepare():
        problem = (
            "placement.compiled is true, but numba is not installed: pip install 'sublet[compiled]', or leave it out"
        )
        raise kit_settings.SettingsError([problem])

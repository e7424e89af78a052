"""Puts the autoscaler together."""

from kit import settings as kit_settings
from kit.runner import Runner
from kit.serving import connected, new_instance, serve, service_tracer, shell_settings
from services.autoscaler.core import SERVICE
from services.autoscaler.settings import AutoscalerSettings


async def main() -> None:
    settings = kit_settings.load(AutoscalerSettings, service="autoscaler")
    telemetry = service_tracer("autoscaler")
    async with connected("autoscaler") as (bus, connection):
        runner = Runner(
            SERVICE,
            settings,
            bus,
            writer="autoscaler",
            instance=new_instance(),
            tracer=telemetry,
            shell=shell_settings("autoscaler"),
        )
        await serve(runner, connection, telemetry)

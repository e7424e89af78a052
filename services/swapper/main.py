"""Puts the swapper together."""

from kit import settings as kit_settings
from kit.runner import Runner
from kit.serving import connected, new_instance, serve, service_tracer, shell_settings
from services.swapper.core import SERVICE
from services.swapper.settings import SwapperSettings


async def main() -> None:
    settings = kit_settings.load(SwapperSettings, service="swapper")
    telemetry = service_tracer("swapper")
    async with connected("swapper") as (bus, connection):
        runner = Runner(
            SERVICE,
            settings,
            bus,
            writer="swapper",
            instance=new_instance(),
            tracer=telemetry,
            shell=shell_settings("swapper"),
        )
        await serve(runner, connection, telemetry)

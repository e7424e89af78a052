"""`python -m services setup STEP`: the steps before an installation in containers runs, each a container that ends."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import anyio

from kit import settings as kit_settings
from kit.bus import BusError
from kit.bus_nats import NatsBus
from kit.nats_access import ADMINISTRATOR
from kit.nats_server import NatsServerError, ensure_streams_soon
from services.local.access import publish_key
from services.local.state import StackError, StateFolder, read_json
from services.provision.files import SEED_FILE, describe, write_all
from services.provision.settings import ProvisionSettings

USAGE: Final = """\
usage: python -m services setup STEP

Steps of an installation in containers, in this order; compose/compose.yaml runs them.

  files    keys, the NATS server's configuration, each container's secrets, the context for the host
  streams  the streams on the NATS server
  key      the development key's hash, through the inbox like any client's
"""


async def make_streams(settings: ProvisionSettings) -> None:
    """As the administrator; changes what differs."""
    seed = (Path(settings.secrets_dir) / ADMINISTRATOR / SEED_FILE).read_text(encoding="ascii").strip()
    async with NatsBus(settings.nats_url, seed, ADMINISTRATOR) as bus:
        await ensure_streams_soon(bus, replica_count=settings.replica_count)


async def admit_key(settings: ProvisionSettings) -> None:
    """As the tenant; harmless to repeat."""
    folder = StateFolder(Path(settings.secrets_dir) / "client")
    api_key = str(read_json(folder.context)["api_key"])
    await publish_key(folder, nats_url=settings.nats_url, tenant=settings.tenant, api_key=api_key)


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0 when the step is done, and may be repeated."""
    try:
        settings = kit_settings.load(ProvisionSettings, service="provision")
        match arguments:
            case ["files"]:
                write_all(settings)
                sys.stdout.write(describe(settings) + "\n")
            case ["streams"]:
                anyio.run(make_streams, settings)
            case ["key"]:
                anyio.run(admit_key, settings)
            case _:
                sys.stderr.write(USAGE)
                return 2
    except (kit_settings.SettingsError, BusError, NatsServerError, StackError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0

"""`python -m services trim`: take away the start of history that no reader needs any more.

Every writer goes on from any of its stored snapshots, gateways from one that is made here. Only the administrator may
do it: the server refuses it to every service.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio

from kit import settings as kit_settings
from kit.bus import Bus, BusError, CaughtUp, Stream
from kit.bus_nats import NatsBus
from kit.nats_access import ADMINISTRATOR
from kit.processor import writer_of
from kit.snapshot_store import Manifest, SnapshotStore
from kit.snapshots import SnapshotUnusable
from services.gateway.snapshots import WRITER as GATEWAY
from services.gateway.snapshots import newest, snapshot_of
from services.gateway.view import FILTERS, ChainedTable
from services.provision.files import SEED_FILE
from services.provision.settings import ProvisionSettings

NO_SNAPSHOT: Final = "no snapshot that fits this history; start it (one is taken at each clean end) and try again"

log = logging.getLogger("trim")


class CannotTrim(Exception):
    """Some reader could not go on; the text says which, and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What may go."""

    stream_id: str
    first_seq: int
    last_seq: int
    keep_from_seq: int
    """The oldest fact that some reader needs."""
    held_by: str
    """The writer that needs it."""

    @property
    def removed_count(self) -> int:
        return max(0, self.keep_from_seq - self.first_seq)

    def text(self) -> str:
        kept_count = self.last_seq - self.keep_from_seq + 1
        if not self.removed_count:
            return f"nothing to trim: {self.held_by} needs history from its present start ({self.first_seq}) on"
        return (
            f"{self.removed_count:,} facts below sequence {self.keep_from_seq} are in every snapshot; {kept_count:,} "
            f"stay ({self.held_by} needs them from there on)"
        )


async def find_cut(bus: NatsBus) -> Cut:
    """Raises `CannotTrim` with one sentence, `BusError`."""
    info = await bus.api(f"STREAM.INFO.{Stream.HISTORY}", {"subjects_filter": "sublet.fact.>"})
    state, stream_id = info["state"], str(info["created"])
    if not state.get("messages"):
        raise CannotTrim("history is empty")
    needs: list[tuple[int, str]] = []
    for writer in sorted({writer_of(subject) for subject in state["subjects"]}):
        store = SnapshotStore(bus, writer)
        fitting = [m for m in await store.found() if _fits(m, stream_id=stream_id, last_seq=state["last_seq"])]
        if not fitting:
            raise CannotTrim(f"{writer} has {NO_SNAPSHOT}")
        try:
            await store.load(fitting[0])
        except SnapshotUnusable as error:
            raise CannotTrim(f"the newest snapshot of {writer} cannot be used: {error}") from error
        # Its own newest fact stays: the next append must name it.
        needs.append((min(min(m.position.read_seq + 1, m.position.last_seq) for m in fitting), writer))
    keep_from_seq, held_by = min(needs)
    return Cut(
        stream_id=stream_id,
        first_seq=state["first_seq"],
        last_seq=state["last_seq"],
        keep_from_seq=keep_from_seq,
        held_by=held_by,
    )


def _fits(manifest: Manifest, *, stream_id: str, last_seq: int) -> bool:
    return manifest.position.stream_id == stream_id and manifest.position.read_seq <= last_seq


async def make_cut(bus: NatsBus, cut: Cut) -> None:
    """Keep for gateways what they would have read, then trim."""
    await keep_for_gateways(bus, cut)
    await bus.api(f"STREAM.PURGE.{Stream.HISTORY}", {"seq": cut.keep_from_seq})


async def keep_for_gateways(bus: Bus, cut: Cut) -> None:
    """Fold the facts that will go into a table of routes, and store it where gateways begin."""
    table = ChainedTable()
    found = await newest(bus)
    if found is not None and found[0].position.stream_id == cut.stream_id:
        table.begin(*found)
    up_to_seq = cut.keep_from_seq - 1
    if table.seq >= up_to_seq:
        return
    reading = bus.read(Stream.HISTORY, FILTERS, after_seq=table.seq, stream_id=cut.stream_id)
    async with aclosing(reading):
        async for item in reading:
            if isinstance(item, CaughtUp) or item.seq > up_to_seq:
                break
            table.fold(item)
    snapshot = snapshot_of(table.routes, stream_id=cut.stream_id, read_seq=up_to_seq, hashes=table.hashes)
    await SnapshotStore(bus, GATEWAY).save(snapshot)


async def run(*, url: str, seed: str | None, is_dry: bool) -> str:
    """What was done, or would be, in one sentence."""
    async with NatsBus(url, seed, ADMINISTRATOR) as bus:
        cut = await find_cut(bus)
        if cut.removed_count and not is_dry:
            await make_cut(bus, cut)
            return f"trimmed: {cut.text()}"
        return cut.text()


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0 when it is done or there is nothing to do, 1 when it cannot be, with a sentence."""
    parser = argparse.ArgumentParser(prog="python -m services trim", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="say what would go, and do nothing")
    parser.add_argument("--nats", metavar="URL", help="the NATS server; the set-up's without it")
    parser.add_argument("--seed", type=Path, metavar="FILE", help="the administrator's seed; the set-up's without it")
    options = parser.parse_args(arguments)
    try:
        settings = kit_settings.load(ProvisionSettings, service="provision")
        seed_path = options.seed or Path(settings.secrets_dir) / ADMINISTRATOR / SEED_FILE
        seed = seed_path.read_text(encoding="ascii").strip()
        told = anyio.run(lambda: run(url=options.nats or settings.nats_url, seed=seed, is_dry=options.dry_run))
    except OSError as error:
        sys.stderr.write(f"error: {error.filename or error} cannot be read: {error.strerror}\n")
        return 1
    except (CannotTrim, BusError, kit_settings.SettingsError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{told}\n")
    return 0

"""When the real shell takes a snapshot, and how it gets away without making an input wait for the network."""

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import anyio
from anyio.abc import TaskGroup

from kit.bus import BusError
from kit.commit import Committer
from kit.processor import Processor
from kit.shell_settings import ShellSettings
from kit.snapshot_store import SnapshotStore
from kit.snapshots import Snapshot

SHUTDOWN_TIMEOUT_S: Final = 2.0
"""For the snapshot of a clean end; without it the next start reads more."""
UPLOAD_WAIT_S: Final = 0.25
"""How long a node agent waits for its journal to be uploaded; then it goes on, and the next turn tries again."""
UPLOAD_RETRY_S: Final = 1.0
RETRY_S: Final = 60.0
"""After one that could not be stored."""

log = logging.getLogger(__name__)


class SnapshotKeeper:
    """Of one life of a writer."""

    def __init__(self, store: SnapshotStore, settings: ShellSettings, tg: TaskGroup, *, behind_count: int) -> None:
        """`behind_count`: what was replayed at the start, which the newest snapshot does not hold."""
        self._store = store
        self._settings = settings
        self._tg = tg
        self._behind_count = behind_count
        self._due_s = time.monotonic() + settings.snapshot_every_s
        self._is_saving = False
        self.taken_count = 0
        self.encode_s = 0.0
        """How long the newest one held up the loop."""

    def handled(self, count: int) -> None:
        self._behind_count += count

    def is_due(self, *, waiting_count: int) -> bool:
        """`waiting_count`: inputs in the queue. While any waits it can wait too, up to as many inputs again."""
        if self._is_saving:
            return False
        every_count = self._settings.snapshot_every_count
        if waiting_count and self._behind_count < 2 * every_count:
            return False
        return self._behind_count >= every_count or time.monotonic() >= self._due_s

    async def take(
        self, processor: Processor[Any], committer: Committer, *, commit: Callable[[], Awaitable[None]]
    ) -> None:
        """At an own fact that is acknowledged: encode it now, and store it beside whatever comes next."""
        if not committer.is_settled:
            return
        processor.mark_progress()
        await commit()
        with anyio.move_on_after(UPLOAD_WAIT_S) as scope:
            await committer.settled()
        if scope.cancelled_caught:
            self._postpone(UPLOAD_RETRY_S)
            return
        self._is_saving = True
        self._tg.start_soon(self._save, self._encoded(processor))

    async def take_last(self, processor: Processor[Any], committer: Committer) -> None:
        """At a clean end, although the tasks of this life are being cancelled."""
        if self._is_saving or not committer.is_settled:
            return
        with anyio.move_on_after(SHUTDOWN_TIMEOUT_S, shield=True):
            await self._save(self._encoded(processor))

    def _postpone(self, pause_s: float) -> None:
        self._behind_count = 0
        self._due_s = time.monotonic() + min(pause_s, self._settings.snapshot_every_s)

    def _encoded(self, processor: Processor[Any]) -> Snapshot:
        began_s = time.perf_counter()
        snapshot = processor.snapshot()
        self.encode_s = time.perf_counter() - began_s
        self._behind_count = 0
        self._due_s = time.monotonic() + self._settings.snapshot_every_s
        return snapshot

    async def _save(self, snapshot: Snapshot) -> None:
        try:
            manifest = await self._store.save(snapshot)
        except BusError as error:
            self._postpone(RETRY_S)
            log.warning("snapshot not stored", extra={"writer": snapshot.position.writer, "reason": str(error)})
        else:
            self.taken_count += 1
            log.info(
                "snapshot stored",
                extra={
                    "writer": snapshot.position.writer,
                    "seq": snapshot.position.last_seq,
                    "packed_bytes": manifest.packed_bytes,
                    "encode_s": round(self.encode_s, 4),
                },
            )
        finally:
            self._is_saving = False

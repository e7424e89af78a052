"""The fleet under a benchmark: deployed and parked through the client library, as a person would."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Final

import aiohttp
import anyio
import msgspec

import sublet
from benchmarks.history import History
from benchmarks.progress import Progress
from benchmarks.replay import SETTINGS, NotThereYet, load, replayed_digest
from kit.serving import StateMark
from services.local.stack import LocalStack
from services.nodeagent.holder_client import HolderClient
from sublet.client import Client
from sublet.context import load as load_context

LOOK_EVERY_S: Final = 0.05
STALL_S: Final = 120.0
"""Deploying or parking that makes no progress for so long has failed."""
REPLAY_S_MAX: Final = 20.0
"""A node's journal reaches the stream, and marks and stream meet, well within this."""
WEIGHTS: Final = "14.5GB"
SHARE: Final = 0.3


class Stalled(Exception):
    """The fleet does not get ready; the text says how far it came and the last problem."""


class Fleet:
    """Models on one stack."""

    def __init__(self, stack: LocalStack, history: History, progress: Progress, models: Sequence[str]) -> None:
        self.stack = stack
        self.history = history
        self.models = models
        self._progress = progress

    async def deploy(self) -> float:
        """Seconds from the first command until every model had been started. Raises `Stalled` or a `SubletError`."""
        specs = [sublet.deployment(model, weights=WEIGHTS, share=SHARE) for model in self.models]
        return await self.deploy_these(specs)

    async def deploy_these(self, specs: Sequence[Any]) -> float:
        """The same with wishes of one's own, one for each model."""
        began_s = time.monotonic()
        tally, count = self.history.tally, len(self.models)
        async with self._client() as client, self._progress.showing(lambda: f"deploying {tally.ready_count}/{count}"):
            for applied in await client.apply(specs):
                if applied.error is not None:
                    raise applied.error
            await self._until(lambda: tally.ready_count, count, "started")
        return time.monotonic() - began_s

    async def park(self) -> None:
        """Returns when all are parked: no request finds a resident model at first."""
        tally, count = self.history.tally, len(self.models)

        def parked_count() -> int:
            return tally.ready_count - tally.resident_count

        async with self._client() as client, self._progress.showing(lambda: f"parked {parked_count()}/{count}"):
            for replica in [r for r in tally.replicas.values() if r.is_resident]:
                await client.park(replica.model)
            await self._until(parked_count, count, "parked")

    async def engine_pids(self) -> dict[str, int]:
        """{replica_id: pid} of the engines that live now, as the holder knows them."""
        holder = HolderClient(str(self.stack.folder.runtime / "holder.sock"))
        try:
            view = await holder.view()
        finally:
            await holder.close()
        return {engine.replica_id: engine.pid for engine in view.engines if engine.is_alive}

    async def equal_writers(self) -> list[str]:
        """Services whose live state equals a replay of the stream, by name."""
        equal = []
        for name in SETTINGS:
            own = {"node": self.stack.settings.node} if name == "nodeagent" else {}
            replayable = load(name, {**own, **self.stack.settings.service_settings.get(name, {})})
            with anyio.move_on_after(REPLAY_S_MAX):
                while True:
                    mark = await self._mark(name)
                    try:
                        if mark is not None:
                            is_equal = replayed_digest(replayable, self.history.stored, mark) == mark.digest
                            equal += [name] if is_equal else []
                            break
                    except NotThereYet:
                        pass
                    await anyio.sleep(LOOK_EVERY_S)
        return equal

    async def _mark(self, name: str) -> StateMark | None:
        url = f"http://127.0.0.1:{self.stack.ports[name]}/digest"
        try:
            async with aiohttp.ClientSession() as session, session.get(url) as response:
                return msgspec.json.decode(await response.read(), type=StateMark) if response.status == 200 else None
        except (aiohttp.ClientError, OSError):
            return None

    def _client(self) -> AbstractAsyncContextManager[Client]:
        return sublet.connect(load_context(path=self.stack.context_path))

    async def _until(self, reached: Callable[[], int], wanted: int, what: str) -> None:
        best, best_at_s = -1, time.monotonic()
        while (now := reached()) < wanted:
            if now > best:
                best, best_at_s = now, time.monotonic()
            if time.monotonic() - best_at_s > STALL_S:
                problems = self.history.tally.problems
                why = f"; the last problem: {problems[-1]}" if problems else ""
                raise Stalled(f"{now} of {wanted} models are {what}, and none more for {STALL_S:g} s{why}")
            await anyio.sleep(LOOK_EVERY_S)

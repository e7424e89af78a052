"""The turns of a soak: who is asked for next, and whether what came back is what was parked."""

import random
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Final

import aiohttp
import anyio
import msgspec

import sublet
from benchmarks.fleet import Fleet, Stalled
from benchmarks.history import History
from benchmarks.progress import Progress
from schemas.deployments import SwapDriver
from services.local.stack import LocalStack
from services.nodeagent.holder_client import HolderClient, HolderProblem
from sublet.context import load as load_context
from sublet.errors import SubletError

MODELS_PER_GPU: Final = 4
SHARES: Final = (0.3, 0.45, 0.6)
"""Together 1.8 of each GPU: about half of the models are parked."""
WEIGHTS_MB: Final = (48, 200, 700)
WORKERS_PER_GPU: Final = 2
REQUEST_S: Final = 60.0
COMPARE_S: Final = 5.0
"""A frozen process answers nothing."""
LOOK_EVERY_S: Final = 0.05
AGAIN_S: Final = 0.2
SETTLED: Final = frozenset({"resident", "parked"})


class _Answer(msgspec.Struct):
    digest: str
    weights_generation: int = 0


class Cycles:
    """Models that do not fit together, asked for by chance."""

    def __init__(
        self, stack: LocalStack, history: History, progress: Progress, *, seed: int, drivers: Sequence[SwapDriver]
    ) -> None:
        self._stack = stack
        self._history = history
        self._progress = progress
        self._unsettled: list[str] = []
        self._draw = random.Random(f"{seed}/cycles")
        gpu_count = stack.settings.gpu_count
        names = [f"{drivers[number % len(drivers)]}-{number}" for number in range(MODELS_PER_GPU * gpu_count)]
        self.models: Final = {name: drivers[number % len(drivers)] for number, name in enumerate(names)}
        """{model: how it leaves its GPU}"""
        self._worker_count = WORKERS_PER_GPU * gpu_count
        self._fleet = Fleet(stack, history, progress, list(self.models))
        self._digests: dict[str, str] = {}
        """{model: of its weights, as they were first on the device}; equal in every life of its engine."""
        self._latest: tuple[deque[str], ...] = tuple(deque(maxlen=WORKERS_PER_GPU) for _ in range(gpu_count))
        """Asked for last, of each GPU: whoever is asked for next has probably been parked since."""
        self.answered_count = 0
        self.checked_count = 0
        self.wrong: list[str] = []
        self.problems: Counter[str] = Counter()

    @property
    def cycle_count(self) -> int:
        counts = self._history.tally.counts
        return min(len(counts.wakes_s), counts.park_count)

    async def deploy(self) -> None:
        specs = [
            sublet.deployment(
                model,
                weights=f"{self._draw.choice(WEIGHTS_MB)}MB",
                share=self._draw.choice(SHARES),
                swap=driver.value,
                minimum_residency="50ms",
            )
            for model, driver in self.models.items()
        ]
        await self._fleet.deploy_these(specs)

    async def run(self, count: int, *, is_enough: Callable[[], bool] = lambda: True) -> None:
        """Returns after so many cycles, or later when something else is wanted too."""
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=REQUEST_S)) as session,
            anyio.create_task_group() as tg,
        ):
            for number in range(self._worker_count):
                tg.start_soon(self._ask_on, session, number % self._stack.settings.gpu_count)
            while self.cycle_count < count or not is_enough():  # noqa: ASYNC110  (the bus tells)
                await anyio.sleep(LOOK_EVERY_S)
            tg.cancel_scope.cancel()

    async def _ask_on(self, session: aiohttp.ClientSession, gpu: int) -> None:
        """Models of one GPU, so that another where somebody stands still holds nobody up."""
        while True:
            model = self._draw.choice([model for model in self._models_on(gpu) if model not in self._latest[gpu]])
            self._latest[gpu].append(model)
            if await self._ask(session, model):
                await self._compare(session, model)
            else:
                await anyio.sleep(AGAIN_S)

    def _models_on(self, gpu: int) -> list[str]:
        """Where there are enough to take turns; else all."""
        tally = self._history.tally
        uuid = sorted(tally.gpus)[gpu]
        here = sorted(replica.model for replica in tally.replicas.values() if replica.gpu_uuid == uuid)
        return here if len(here) > WORKERS_PER_GPU else list(self.models)

    async def _ask(self, session: aiohttp.ClientSession, model: str) -> bool:
        """Whether it was answered. Where parts die and calls fail, some are not; each says why."""
        body = {"model": model, "messages": [{"role": "user", "content": "soak"}], "max_tokens": 2}
        headers = {"Authorization": f"Bearer {self._stack.api_key}"}
        url = f"{self._stack.gateway_url}/v1/chat/completions"
        try:
            async with session.post(url, json=body, headers=headers) as response:
                await response.read()
                status = str(response.status)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            status = type(error).__name__
        if status == "200":
            self.answered_count += 1
        else:
            self.problems[status] += 1
        return status == "200"

    async def _compare(self, session: aiohttp.ClientSession, model: str) -> None:
        """What lies on the device now with what lay there first; an engine that is parked again has nothing there."""
        endpoint = await self._endpoint(model)
        if endpoint is None:
            return
        try:
            async with session.get(
                f"{endpoint}/sublet/weights", timeout=aiohttp.ClientTimeout(total=COMPARE_S)
            ) as response:
                if response.status != 200:
                    return
                answer = msgspec.json.decode(await response.read(), type=_Answer)
        except (aiohttp.ClientError, TimeoutError, OSError, msgspec.MsgspecError):
            return
        first = self._digests.setdefault(model, answer.digest)
        self.checked_count += 1
        if first != answer.digest:
            self.wrong.append(f"{model} has {answer.digest}, had {first}")

    async def _endpoint(self, model: str) -> str | None:
        names = {r.replica_id for r in self._history.tally.replicas.values() if r.model == model}
        holder = HolderClient(str(self._stack.folder.runtime / "holder.sock"))
        try:
            view = await holder.view()
        except HolderProblem:
            return None
        finally:
            await holder.close()
        ports = [engine.port for engine in view.engines if engine.replica_id in names and engine.is_alive]
        return f"http://127.0.0.1:{ports[0]}" if ports else None

    # --- The end ------------------------------------------------------------------------------------------------------

    async def settle(self, *, within_s: float) -> bool:
        """Whether each model is resident or parked before the time is over, and stays what its engine says."""
        async with self._progress.showing(lambda: f"not settled: {', '.join(self._unsettled) or 'none'}"):
            with anyio.move_on_after(within_s):
                while not await self._is_settled():  # noqa: ASYNC110  (another process tells)
                    await anyio.sleep(AGAIN_S)
                return True
        return False

    async def _is_settled(self) -> bool:
        try:
            async with sublet.connect(load_context(path=self._stack.context_path)) as client:
                views = (await client.deployments()).deployments
        except SubletError:
            return False
        states = {view.deployment.name: [str(replica.state) for replica in view.replicas] for view in views}
        self._unsettled = [
            f"{model} {' '.join(states.get(model, ())) or 'nowhere'}"
            for model in self.models
            if len(states.get(model, ())) != 1 or not SETTLED.issuperset(states[model])
        ]
        return not self._unsettled

    async def check_all(self) -> None:
        """Wake each once more, without faults, and compare."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=REQUEST_S)) as session:
            for model in self.models:
                ends_s = time.monotonic() + REQUEST_S
                while not await self._ask(session, model):
                    if time.monotonic() > ends_s:
                        self.wrong.append(f"{model} does not answer when all is well")
                        break
                    await anyio.sleep(AGAIN_S)
                else:
                    await self._compare(session, model)

    def expect(self, digest: str) -> None:
        """Of every model from now on; for whoever wants to see the comparison fail."""
        self._digests = dict.fromkeys(self.models, digest)

    async def retire(self) -> frozenset[str]:
        """Returns when no lease is left; the ids of the deployments that there were."""
        async with sublet.connect(load_context(path=self._stack.context_path)) as client:
            deployment_ids = frozenset(view.deployment_id for view in (await client.deployments()).deployments)
            for model in self.models:
                await client.retire(model)
        with anyio.move_on_after(REQUEST_S) as scope:
            while self._history.tally.replicas:  # noqa: ASYNC110  (the bus tells)
                await anyio.sleep(LOOK_EVERY_S)
        if scope.cancelled_caught:
            raise Stalled(f"leases are left after the retirement: {sorted(self._history.tally.replicas)}")
        return deployment_ids

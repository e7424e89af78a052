"""What the demo does and measures: three models and a training job on two GPUs that would need four by themselves."""

import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread

from schemas.deployments import DeploymentSpec, EngineKind, EngineSpec, ShareSpec, WorkloadKind
from schemas.inbox import DeployRequested, ParkRequested, RetireRequested, Verdict
from schemas.messages import Command
from schemas.queries import ReplicaView
from schemas.units import GB
from services.local.chats import Chat, Chats, RequestFailed
from services.local.state import StackError
from services.local.tenant import LOOK_EVERY_S, Tenant

TRAINING: Final = "training-job"
READY_S: Final = 60.0
PARKED_S: Final = 15.0
RESIDENT_COUNT: Final = 7
PARKED_COUNT: Final = 3
TRAFFIC_S: Final = 12.0
TRAFFIC_PER_S: Final = 2.0
"""Requests per second to each model in the phase of mixed traffic."""
STEPS_BETWEEN: Final = 15
"""The training job makes at least so many steps between two of its interruptions."""
STEP_S: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One of the article's three models."""

    name: str
    weights_gb: float
    share: float
    limit: float

    @property
    def spec(self) -> DeploymentSpec:
        return DeploymentSpec(
            name=self.name,
            engine=EngineSpec(weights_bytes=round(self.weights_gb * GB)),
            share=ShareSpec(request_portion=self.share, limit_portion=self.limit),
        )


MODELS: Final = (
    Model(name="mistral-7b", weights_gb=14.5, share=0.3, limit=0.4),
    Model(name="nemotron-12b", weights_gb=24.6, share=0.4, limit=0.5),
    Model(name="nemotron-30b", weights_gb=32.3, share=0.65, limit=0.75),
)
RIVAL: Final = MODELS[2]
"""Shares its GPU with the training job by taking turns: 0.65 and 0.6 do not fit together."""
TRAINING_SHARE: Final = 0.6


@dataclass(slots=True)
class Measured:
    """Everything in seconds as a client saw it, medians where several."""

    cold_s: dict[str, float] = field(default_factory=dict)
    resident_s: dict[str, float] = field(default_factory=dict)
    parked_s: dict[str, float] = field(default_factory=dict)
    gpu_index: dict[str, int] = field(default_factory=dict)
    request_count: int = 0
    failed_count: int = 0
    token_count: int = 0
    interruption_count: int = 0
    """How often the training job gave way."""
    steps_lost: int = 0
    step_count: int = 0
    restart_count: int = 0
    """Of the training job's process; 0: it was the same one all the time."""
    checkpoint_step_count: int = 0


class Story:
    """The demo's acts, in order."""

    def __init__(self, tenant: Tenant, chats: Chats, *, checkpoints: Path, say: Callable[[str], None]) -> None:
        self._tenant = tenant
        self._chats = chats
        self._checkpoints = checkpoints
        self._say = say
        self._training_endpoints: set[str] = set()
        self.measured = Measured()

    async def tell(self) -> Measured:
        """All acts. Raises `StackError` or `RequestFailed` with one sentence when something is wrong."""
        await self._cold_starts()
        await self._resident()
        await self._after_park()
        await self._training_gives_way()
        await self._traffic()
        await self._last_checkpoint()
        return self.measured

    # ---- acts ------------------------------------------------------------------------------------------------------

    async def _cold_starts(self) -> None:
        for model in MODELS:
            await self._command(DeployRequested(command_id=_id(f"deploy-{model.name}"), deployment=model.spec))
            self._say(f"{model.name}: {model.weights_gb:g} GB, share {model.share:g}, limit {model.limit:g}")
        await self._command(DeployRequested(command_id=_id("deploy-training"), deployment=training_spec()))
        self._say(f"{TRAINING}: share {TRAINING_SHARE:g}, runs when there is room")
        self._say("the first requests wait for the engines' cold start")

        async def first(model: Model) -> None:
            chat = await self._chat(model)
            self.measured.cold_s[model.name] = chat.first_token_s
            self._say(f"{model.name}: first token {chat.first_token_s:.2f} s after a cold start")

        async with anyio.create_task_group() as tasks:
            for model in MODELS:
                tasks.start_soon(first, model)
        for model in MODELS:
            replica = await self._tenant.until(model.name, _is_resident, what="resident", timeout_s=READY_S)
            self.measured.gpu_index[model.name] = replica.gpu_index

    async def _resident(self) -> None:
        for model in MODELS:
            chats = [await self._chat(model) for _ in range(RESIDENT_COUNT)]
            first_s = statistics.median(chat.first_token_s for chat in chats)
            self.measured.resident_s[model.name] = first_s
            self._say(f"{model.name}: first token {first_s:.3f} s while resident, median of {RESIDENT_COUNT}")

    async def _after_park(self) -> None:
        for model in MODELS:
            if model is RIVAL:
                continue
            firsts_s = []
            for _ in range(PARKED_COUNT):
                await self._park(model)
                chat = await self._chat(model)
                if chat.state_at_arrival == "resident":
                    raise StackError(f"{model.name} was resident when its request came, although it had been parked")
                firsts_s.append(chat.first_token_s)
            self.measured.parked_s[model.name] = statistics.median(firsts_s)
            self._say(f"{model.name}: first token {statistics.median(firsts_s):.2f} s after a park")

    async def _training_gives_way(self) -> None:
        """Park the rival: training runs. Ask the rival: training yields at once. Park it again: training goes on."""
        firsts_s = []
        for number in range(PARKED_COUNT):
            await self._park(RIVAL)
            replica = await self._tenant.until(TRAINING, _is_resident, what="resident", timeout_s=READY_S)
            self._training_endpoints.add(replica.endpoint)
            self.measured.gpu_index[TRAINING] = replica.gpu_index
            steps = await self._steps(replica.endpoint)
            if number:
                self._say(f"{TRAINING}: goes on at step {steps}")
            now = await self._steps_beyond(replica.endpoint, steps + STEPS_BETWEEN)
            self._say(f"{TRAINING}: step {now} while {RIVAL.name} is parked")
            chat = await self._chat(RIVAL)
            firsts_s.append(chat.first_token_s)
            self._say(f"{RIVAL.name}: first token {chat.first_token_s:.2f} s after a park; {TRAINING} gave way")
            await self._tenant.until(TRAINING, lambda view: view.state == "parked", what="parked", timeout_s=PARKED_S)
        self.measured.parked_s[RIVAL.name] = statistics.median(firsts_s)
        await self._park(RIVAL)
        replica = await self._tenant.until(TRAINING, _is_resident, what="resident again", timeout_s=READY_S)
        await self._count_steps(replica)

    async def _count_steps(self, replica: ReplicaView) -> None:
        """From the job's own log: at which step it fell asleep, and at which it went on."""
        measured = self.measured
        slept: int | None = None
        for line in await self._tenant.log_lines(replica):
            record = _record(line)
            if record.get("message") == "asleep":
                slept = int(record["steps"])
                measured.interruption_count += 1
            elif record.get("message") == "awake" and slept is not None:
                measured.steps_lost += slept - int(record["steps"])
                slept = None
        measured.restart_count = len(self._training_endpoints | {replica.endpoint}) - 1
        measured.step_count = await self._steps(replica.endpoint)
        self._say(
            f"{TRAINING}: gave way {measured.interruption_count} times, {measured.steps_lost} steps lost, "
            f"{measured.restart_count} restarts"
        )

    async def _traffic(self) -> None:
        """All three at once, at random moments; the rival drives training out again."""
        self._say(f"mixed traffic to all three for {TRAFFIC_S:g} s")
        async with anyio.create_task_group() as tasks:
            for model in MODELS:
                tasks.start_soon(self._stream_of_chats, model, random.Random(model.name))
        self._say(f"{self.measured.request_count} requests in all, {self.measured.failed_count} failed")

    async def _stream_of_chats(self, model: Model, chance: random.Random) -> None:
        async def one() -> None:
            try:
                await self._chat(model, tokens_max=32)
            except RequestFailed as failure:
                self.measured.failed_count += 1
                self._say(f"failed: {failure}")

        ends_at_s = time.perf_counter() + TRAFFIC_S
        async with anyio.create_task_group() as tasks:
            while time.perf_counter() < ends_at_s:
                tasks.start_soon(one)
                await anyio.sleep(chance.expovariate(TRAFFIC_PER_S))

    async def _last_checkpoint(self) -> None:
        """Retiring the job ends it politely: its last checkpoint has every step that it made."""
        measured = self.measured
        view = await self._tenant.deployment(TRAINING)
        if view is None or not view.replicas:
            raise StackError(f"{TRAINING} is gone: {view.problem if view else 'nobody knows it'}")
        endpoint = view.replicas[0].endpoint or next(iter(self._training_endpoints))
        measured.step_count = max(measured.step_count, await self._steps(endpoint))
        await self._command(RetireRequested(command_id=_id("retire"), model=TRAINING))
        await self._until_gone(endpoint)
        measured.checkpoint_step_count = await anyio.to_thread.run_sync(newest_checkpoint, self._checkpoints)
        self._say(f"{TRAINING}: retired; its last checkpoint holds {measured.checkpoint_step_count} steps")

    # ---- parts -----------------------------------------------------------------------------------------------------

    async def _chat(self, model: Model, *, tokens_max: int = 16) -> Chat:
        self.measured.request_count += 1
        chat = await self._chats.chat(model.name, tokens_max=tokens_max)
        self.measured.token_count += chat.token_count
        return chat

    async def _park(self, model: Model) -> None:
        await self._command(ParkRequested(command_id=_id(f"park-{model.name}"), model=model.name))
        await self._tenant.until(model.name, lambda view: view.state == "parked", what="parked", timeout_s=PARKED_S)

    async def _command(self, command: Command) -> None:
        answer = await self._tenant.command(command)
        if answer.verdict is not Verdict.ADMITTED:
            raise StackError(f"{type(command).__name__} was {answer.verdict}: {answer.message}")

    async def _steps(self, endpoint: str) -> int:
        """The job's own counter."""
        state = await self._chats.state_of(endpoint)
        if "steps" not in state:
            raise StackError(f"{TRAINING}'s engine does not answer at {endpoint}")
        return int(state["steps"])

    async def _steps_beyond(self, endpoint: str, least: int) -> int:
        """The counter as soon as it is there. Raises `StackError` when the job does not get on."""
        steps = 0
        with anyio.move_on_after(READY_S):
            while True:
                steps = await self._steps(endpoint)
                if steps >= least:
                    return steps
                await anyio.sleep(STEP_S)
        raise StackError(f"{TRAINING} does not get on: step {steps} after {READY_S:g} s")

    async def _until_gone(self, endpoint: str) -> None:
        """Returns when the engine has ended; raises nothing, because its checkpoint is looked at next."""
        with anyio.move_on_after(PARKED_S):
            while True:
                if not await self._chats.state_of(endpoint):
                    return
                await anyio.sleep(LOOK_EVERY_S)


def training_spec() -> DeploymentSpec:
    return DeploymentSpec(
        name=TRAINING,
        kind=WorkloadKind.TRAINING,
        engine=EngineSpec(kind=EngineKind.TRAINING, weights_bytes=40 * GB, arguments={"step-s": str(STEP_S)}),
        share=ShareSpec(request_portion=TRAINING_SHARE),
    )


def newest_checkpoint(folder: Path) -> int:
    """Steps in the newest checkpoint; 0 without one."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in folder.rglob("*") if path.is_file()]
    return max((int(record["step_count"]) for record in records), default=0)


def _is_resident(replica: ReplicaView) -> bool:
    return replica.state == "resident" and bool(replica.endpoint)


def _record(line: str) -> dict[str, str]:
    """A log line as JSON; empty when it is none."""
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _id(what: str) -> str:
    return f"{what}-{random.SystemRandom().getrandbits(48):012x}"

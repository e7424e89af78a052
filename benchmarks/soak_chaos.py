"""What goes wrong in a soak: parts that die or stand still, and driver calls that fail, come late or damage a copy."""

import os
import random
import signal
import time
from collections import Counter
from typing import Final

import anyio
import anyio.to_thread

import softgpu
from benchmarks.history import History
from benchmarks.soak_faults import Faults
from benchmarks.soak_parts import AGENT, BROKER, CHECKPOINTER, ENGINE, PARTS, Parts
from services.local.stack import LocalStack

KILL_EVERY_S: Final = 5.0
REST_S: Final = {AGENT: 14.0, ENGINE: 4.0, BROKER: 33.0, CHECKPOINTER: 8.0}
"""Between two kills of a part. Whoever restarts an agent waits longer when it lived less than 10 s, a broker's 30 s."""
FAULT_EVERY_S: Final = 1.0
"""A fault that was not met by then is taken back."""
FAULTS_AT_ONCE: Final = 2
START_S: Final = 4.0
"""A part that was killed makes its first calls within this; no other fault is set meanwhile."""
STOP_EVERY_S: Final = 25.0
STOPS_S: Final = (1.5, 4.0, 20.0, 40.0)
"""How long an engine stands still. The longer ones are beyond a step's deadline and its grace in a soak's settings."""
IN_STEP_S: Final = 2.0
"""For so long is waited until something is being parked or woken, so that it is hit in the middle."""
ANSWERS_S: Final = 1.0


class Chaos:
    """Seeded: which part, which call, how; the moments depend on the host's speed too."""

    def __init__(self, stack: LocalStack, history: History, *, seed: int) -> None:
        self._draw = random.Random(f"{seed}/chaos")
        self.host = softgpu.Host(stack.folder.runtime / "gpu", gpus=0)
        self.parts = Parts(stack, history)
        self.faults = Faults(self.host, self.parts, seed=seed)
        self.kills: Counter[str] = Counter()
        self.in_step_count = 0
        """Kills and stops that came while their engine was in a step."""
        self.stop_count = 0
        self._killed_at_s = dict.fromkeys(PARTS, time.monotonic())
        self._stopped: set[int] = set()
        self._is_over = False

    @property
    def told(self) -> str:
        kills = "  ".join(f"{part} {self.kills[part]}" for part in PARTS)
        missing = f"  to be met {len(self.faults.missing())}" if self.faults.used else ""
        return f"killed: {kills}  stopped {self.stop_count}  faults met {self.faults.hits.total()}{missing}"

    async def begin_census(self) -> None:
        """Each call is counted from now on, also those of a start: agent and broker are started again."""
        await self.faults.count_calls()
        for part in (AGENT, BROKER):
            await self._kill(part)

    async def in_census(self) -> None:
        """Half-way: also what others call when these die is counted."""
        await self.faults.read_calls()
        for part in (ENGINE, CHECKPOINTER):
            await self._kill(part)

    async def end_census(self) -> None:
        await self.faults.read_calls()
        await self.end()
        self.kills.clear()

    async def run(self) -> None:
        """Until it is cancelled."""
        async with anyio.create_task_group() as tg:
            tg.start_soon(self._break)
            tg.start_soon(self._stand_still)

    def stop(self) -> None:
        self._is_over = True

    async def end(self) -> None:
        """No fault is left, and nobody stands still."""
        self._continue()
        await anyio.to_thread.run_sync(self.host.clear_faults)

    # --- Kills and faults, in turn ------------------------------------------------------------------------------------

    async def _break(self) -> None:
        kill_at_s = time.monotonic() + KILL_EVERY_S
        while not self._is_over:
            await self.faults.take_back()
            if time.monotonic() >= kill_at_s:
                await self._kill_one()
                kill_at_s = time.monotonic() + KILL_EVERY_S * self._draw.uniform(0.7, 1.3)
            else:
                for _ in range(FAULTS_AT_ONCE):
                    await self.faults.arm_one()
            await anyio.sleep(FAULT_EVERY_S)

    async def _kill_one(self) -> None:
        now_s = time.monotonic()
        rested = [part for part in PARTS if now_s - self._killed_at_s[part] >= REST_S[part]]
        if not rested:
            return
        part = max(rested, key=lambda part: (self.faults.shy_count(part), self._draw.random()))
        await self.faults.arm_for_start(part)
        if await self._kill(part):
            await anyio.sleep(START_S)

    async def _kill(self, part: str) -> bool:
        pid = await self._victim(part)
        self._killed_at_s[part] = time.monotonic()  # Also where there is none now: it is another part's turn.
        if pid is None:
            return False
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        self.kills[part] += 1
        return True

    async def _victim(self, part: str) -> int | None:
        """In the middle of somebody's step, where there is one soon."""
        with anyio.move_on_after(IN_STEP_S):
            while True:
                engines = await self.parts.engines()
                busy = [engines[name] for name in sorted(self.parts.in_step()) if name in engines]
                if busy and part == ENGINE:
                    self.in_step_count += 1
                    return self._draw.choice(busy)
                if busy:
                    break
                await anyio.sleep(0.01)
        pids = await self.parts.pids(part)
        return self._draw.choice(pids) if pids else None

    # --- Engines that do not answer -----------------------------------------------------------------------------------

    async def _stand_still(self) -> None:
        while not self._is_over:
            await anyio.sleep(STOP_EVERY_S * self._draw.uniform(0.5, 1.2))
            pid, stays_s = await self._victim(ENGINE), self._draw.choice(STOPS_S)
            if pid is None or self._is_over:
                continue
            try:
                os.kill(pid, signal.SIGSTOP)
            except ProcessLookupError:
                continue
            self._stopped.add(pid)
            self.stop_count += 1
            if await self.faults.answers(within_s=ANSWERS_S):
                await anyio.sleep(stays_s)
            self._continue()

    def _continue(self) -> None:
        for pid in self._stopped:
            try:
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                continue
        self._stopped.clear()

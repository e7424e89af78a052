"""Faults of driver calls in a soak: which calls the parts make, which are broken next, and which faults were met."""

import random
import re
from collections import Counter
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread

import devices
import softgpu
from benchmarks.soak_parts import Parts
from softgpu.host import is_modelled

NAME: Final = re.compile(r"\b(?:cu|nvml)[A-Z]\w+\b")
UNKNOWN: Final = 999
"""CUDA_ERROR_UNKNOWN, and NVML's."""
LATE_S: Final = 0.5
SHORT_S: Final = 0.1
"""Where many are late one after another."""
AFTER_MAX: Final = 4
"""One less go well first, at most."""
KINDS: Final = ("code", "delay")
"""Each call must be met by both."""
STANDING_MAX: Final = {"code": 3, "delay": 8}
"""Not more failures: each ends a start, and whoever restarts a part waits longer each time."""
COPIES: Final = frozenset({"cuMemcpyHtoDAsync", "cuMemcpyHtoD"})
EVERY_FOURTH: Final = 0.25


def calls() -> tuple[str, ...]:
    """All calls in the code; only `devices` makes any. Those that softgpu does not model are left out."""
    names: set[str] = set()
    for path in sorted(Path(devices.__path__[0]).glob("*.py")):
        names.update(NAME.findall(path.read_text(encoding="utf-8")))
    return tuple(name for name in sorted(names) if is_modelled(name))


class Faults:
    """Seeded: which call goes wrong next and how; those that were met least come first."""

    def __init__(self, host: softgpu.Host, parts: Parts, *, seed: int) -> None:
        self._host = host
        self._parts = parts
        self._draw = random.Random(f"{seed}/faults")
        self.calls = calls()
        self.used: Counter[str] = Counter()
        """{call: how often, in the census}; empty when there was none."""
        self.callers: dict[str, set[str]] = {}
        """{call: parts that were seen to make it}"""
        self.armed: Counter[tuple[str, str]] = Counter()
        self.hits: Counter[tuple[str, str]] = Counter()
        """{(call, kind): calls that were struck}"""
        self.struck: Counter[str] = Counter()
        """{part: how many of its calls were struck}"""

    # --- Which calls are made -----------------------------------------------------------------------------------------

    async def count_calls(self) -> None:
        """From now on, until faults are cleared; each call is struck by a delay of nothing."""

        def count() -> None:
            for call in self.calls:
                self._host.set_fault(call, times=-1, kind="delay")

        await anyio.to_thread.run_sync(count)

    async def read_calls(self) -> None:
        """How often each was made since `count_calls`, and by whom it was made last."""
        self._parts.look()
        for fault in (await self._status())["faults"]:
            if fault["hit_count"]:
                self.used[fault["function"]] = fault["hit_count"]
                self.callers.setdefault(fault["function"], set()).add(self._parts.named(fault["struck_pid"]))

    # --- Which go wrong -----------------------------------------------------------------------------------------------

    async def take_back(self) -> None:
        """Note which were met, and take back the others; some that were tried in vain wait for their call again.

        So a call that is rarely made, when something ends for example, is met at last.
        """
        self._parts.look()
        for fault in (await self._status())["faults"]:
            if fault["hit_count"]:
                self.hits[fault["function"], fault["kind"]] += fault["hit_count"]
                self.struck[self._parts.named(fault["struck_pid"])] += fault["hit_count"]
                self.callers.setdefault(fault["function"], set()).add(self._parts.named(fault["struck_pid"]))
        await anyio.to_thread.run_sync(self._host.clear_faults)
        for kind, most in STANDING_MAX.items():
            shy = [call for call in sorted(self.used) if self._is_shy(call, kind)]
            for call in self._draw.sample(shy, min(most, len(shy))):
                await self._arm(call, kind)

    async def arm_one(self) -> None:
        """One call in the near future, in whatever process meets it."""
        call, kind = self._next()
        if call in COPIES and self._draw.random() < EVERY_FOURTH:
            kind = "corrupt"
        await self._arm(call, kind, after=self._draw.randrange(AFTER_MAX))

    async def arm_for_start(self, part: str) -> None:
        """Before a part is killed: of its calls that no fault met though one was tried, all are late and one fails."""
        own = [call for call in sorted(self.used) if part in self.callers[call]]
        for call in own:
            if self._is_shy(call, "delay"):
                await self._arm(call, "delay", delay_s=SHORT_S)
        failing = [call for call in own if self._is_shy(call, "code")]
        if failing:
            await self._arm(self._draw.choice(failing), "code")

    def shy_count(self, part: str) -> int:
        """Faults that `arm_for_start` has for a part."""
        own = [call for call in sorted(self.used) if part in self.callers[call]]
        return sum(self._is_shy(call, kind) for call in own for kind in KINDS)

    def missing(self) -> list[str]:
        """Calls that are used and were not met by one of these faults."""
        return [f"{call} ({kind})" for call in sorted(self.used) for kind in KINDS if not self.hits[call, kind]]

    def _is_shy(self, call: str, kind: str) -> bool:
        """Tried and not met: it is probably made at a start only."""
        return self.armed[call, kind] > 0 and not self.hits[call, kind]

    def _next(self) -> tuple[str, str]:
        """The one tried and met least."""
        names = sorted(self.used) if self.used and self._draw.random() > EVERY_FOURTH else list(self.calls)
        return min(
            ((call, kind) for call in names for kind in KINDS),
            key=lambda fault: (self.armed[fault] + self.hits[fault], self._draw.random()),
        )

    async def _arm(self, call: str, kind: str, *, after: int = 0, delay_s: float = LATE_S) -> None:
        self.armed[call, kind] += 1

        def arm() -> None:
            if kind == "code":
                self._host.set_fault(call, after=after, code=UNKNOWN)
            else:
                self._host.set_fault(call, after=after, kind=kind, delay_s=delay_s)

        await anyio.to_thread.run_sync(arm)

    async def _status(self) -> softgpu.HostStatus:
        return await anyio.to_thread.run_sync(self._host.status)

    async def answers(self, *, within_s: float) -> bool:
        """Whether the software GPU's tables are free: a process that was stopped may hold them."""
        with anyio.move_on_after(within_s):
            await anyio.to_thread.run_sync(self._host.status, abandon_on_cancel=True)
            return True
        return False

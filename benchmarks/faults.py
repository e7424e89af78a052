"""Killing one part of a running stack in the middle of a run, and what came of it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import anyio

from benchmarks.clients import Sent
from kit.supervisor import holds
from services.local.parts import GATEWAY
from services.local.stack import LocalStack

LOOK_EVERY_S: Final = 0.02
RECOVERY_S_MAX: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """One part, ended by SIGKILL. Times in seconds from the start of the clock."""

    name: str
    at_s: float
    gone_s: float
    """When its process had ended: the kernel takes connections for it until then, and resets them."""
    recovery_s: float | None
    """Until it was ready again, as a process of its own, and the gateway too; None: not within `RECOVERY_S_MAX`."""


async def kill(stack: LocalStack, name: str, *, at_s: float) -> Kill:
    """End the part now; returns when it is ready again."""
    began_s = time.monotonic()
    old_pid = stack.kill(name)
    gone_s, recovery_s = at_s, None
    with anyio.move_on_after(RECOVERY_S_MAX):
        while stack.pids.get(name) == old_pid:  # noqa: ASYNC110  (another process tells, not a task)
            await anyio.sleep(LOOK_EVERY_S)
        gone_s = at_s + time.monotonic() - began_s
        while name not in stack.pids:  # noqa: ASYNC110  (the same)
            await anyio.sleep(LOOK_EVERY_S)
        for part in dict.fromkeys((name, GATEWAY)):
            while not await holds(stack.checks[part]):  # noqa: ASYNC110  (the same)
                await anyio.sleep(LOOK_EVERY_S)
        recovery_s = time.monotonic() - began_s
    return Kill(name=name, at_s=at_s, gone_s=gone_s, recovery_s=recovery_s)


def lost_with_gateway(requests: Sequence[Sent], killed: Kill | None) -> list[Sent]:
    """Requests whose connection broke because they were on their way through a gateway when it was killed."""
    if killed is None or killed.name != GATEWAY:
        return []
    return [r for r in requests if r.is_cut and r.sent_s <= killed.gone_s and (r.end_s or 0.0) >= killed.at_s]

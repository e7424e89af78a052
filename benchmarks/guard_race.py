"""Section ``race``: an owner's memory is given free while a borrower tries to take it every half millisecond.

The naive way is ballast: somebody holds the owner's bytes and frees them when the owner is told to come. Ours lowers
the borrower's hard limit to what it uses, reads it back, and only then gives the bytes free.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Final

import anyio
import anyio.to_thread

from benchmarks.guard_stage import CONTEXT_BYTES, LOOK_EVERY_S, PIECE_BYTES, ROOT, TOTAL_BYTES, Stage, stage
from benchmarks.report import Value
from benchmarks.sections import Measured, Setting, Wanted
from devices.api import DeviceSettings, Region
from devices.cuda import CudaDevice
from schemas.deployments import IsolationGrade

ROUNDS: Final = 100
QUICK_ROUNDS: Final = 5
OWNED_BYTES: Final = 6 * PIECE_BYTES
ORDER_S: Final = 0.002
"""Until an owner that was asleep allocates: an order over HTTP, its event loop, its GPU thread. In both ways."""
FULL_BYTES: Final = TOTAL_BYTES - OWNED_BYTES - 3 * CONTEXT_BYTES - PIECE_BYTES
"""What the borrower holds at least when no piece is left for it."""
FULL_WITHIN_S: Final = 10.0
BARS: Final = (Wanted(figure="race_frozen_served_count", op="==", bar=ROUNDS),)
OWNER: Final = """
import json, sys, time
from devices.api import DeviceSettings, OutOfMemory
from devices.cuda import CudaDevice
size_bytes = int(sys.argv[2])
device = CudaDevice(sys.argv[1], settings=DeviceSettings(chunk_bytes=size_bytes))
print(json.dumps("up"), flush=True)
for _ in sys.stdin:
    began_s, mine = time.perf_counter(), None
    while mine is None and time.perf_counter() - began_s < 0.05:
        try:
            mine = device.allocate(size_bytes)
        except OutOfMemory:
            time.sleep(0.0005)
    took_s = time.perf_counter() - began_s
    if mine is not None:
        device.free(mine)
    print(json.dumps(None if mine is None else took_s), flush=True)
"""


class Owner:
    """A process that comes for its bytes when it is told to."""

    def __init__(self, made: Stage) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", OWNER, made.gpu_uuid, str(OWNED_BYTES)],
            cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def hear(self) -> object:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def come(self) -> None:
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)

    def close(self) -> None:
        self._process.communicate("")


async def measure(setting: Setting) -> Measured:
    round_count = setting.count(ROUNDS, QUICK_ROUNDS)
    async with stage(setting.folder, grade=IsolationGrade.DRIVER) as made:
        owner = Owner(made)
        ballast = CudaDevice(made.gpu_uuid, settings=DeviceSettings(chunk_bytes=OWNED_BYTES))
        try:
            await anyio.to_thread.run_sync(owner.hear)
            await made.start("borrower", "take", granted_bytes=TOTAL_BYTES, piece_bytes=PIECE_BYTES)
            await made.is_up("borrower")
            naive = [await _round(made, owner, ballast, is_frozen=False) for _ in range(round_count)]
            frozen = [await _round(made, owner, ballast, is_frozen=True) for _ in range(round_count)]
        finally:
            ballast.close()
            owner.close()
    served = [took_s for took_s in frozen if took_s is not None]
    figures: dict[str, Value] = {
        "race_naive_served_count": sum(took_s is not None for took_s in naive),
        "race_frozen_served_count": len(served),
        "race_frozen_worst_s": max(served, default=None),
        "race_round_count": round_count,
    }
    note = (
        f"race: how often the owner got its bytes within 50 ms; it comes {1000 * ORDER_S:.0f} ms after "
        "they are free, as an order takes about that. The naive way has no bar."
    )
    return Measured(figures=figures, notes=[note])


async def _round(made: Stage, owner: Owner, ballast: CudaDevice, *, is_frozen: bool) -> float | None:
    """Fill the GPU, give the owner's bytes free, and tell it to come; the seconds that it took, None: it got none."""
    made.rest("borrower")
    await _until(made, lambda used: used < OWNED_BYTES)
    region = await anyio.to_thread.run_sync(ballast.allocate, OWNED_BYTES)
    made.go("borrower")
    await _until(made, lambda used: used > FULL_BYTES)
    if is_frozen:
        used = await anyio.to_thread.run_sync(made.direct_bytes)
        await made.hold("borrower", used["borrower"])
    took_s = await anyio.to_thread.run_sync(_give_free, owner, ballast, region)
    if is_frozen:
        await made.hold("borrower", TOTAL_BYTES)
    return took_s


def _give_free(owner: Owner, ballast: CudaDevice, region: Region) -> float | None:
    ballast.free(region)
    time.sleep(ORDER_S)
    owner.come()
    took_s = owner.hear()
    assert took_s is None or isinstance(took_s, float)
    return took_s


async def _until(made: Stage, is_so: Callable[[int], bool]) -> None:
    with anyio.fail_after(FULL_WITHIN_S):
        while not is_so((await anyio.to_thread.run_sync(made.direct_bytes)).get("borrower", 0)):  # noqa: ASYNC110
            await anyio.sleep(LOOK_EVERY_S / 4)

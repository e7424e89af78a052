"""Section ``backends``: eight processes that take all they can get, against each grade that a GPU can have.

Each grade is what the guard found by trying on that host. The owner is a ninth process, which 100 times takes what it
is guaranteed. What it costs when nothing enforces is shown without a bar, and so is the one thing that the broker
leaves open: the reserve, which contexts need, is there for whoever allocates by himself first.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import anyio
import anyio.to_thread

from benchmarks.guard_stage import (
    CONTEXT_BYTES,
    LOOK_EVERY_S,
    OWNER_BYTES,
    PIECE_BYTES,
    RESERVE_BYTES,
    TAKER_BYTES,
    TAKERS,
    Stage,
    stage,
)
from benchmarks.report import Value
from benchmarks.sections import Measured, Setting, Wanted
from schemas.deployments import IsolationGrade
from schemas.units import GiB

NOTE: Final = (
    f"{TAKERS} processes with {TAKER_BYTES >> 20} MiB each and an owner with {OWNER_BYTES >> 20}; new memory is dirty; "
    f"a context is {CONTEXT_BYTES >> 20} MiB. `cooperative` has no bar: these processes obey nobody. `broker`: of the "
    f"reserve of {RESERVE_BYTES >> 20} MiB, which no lease has, they took what is shown; `recut`: with the broker's "
    f"pieces of 1 GiB, which it cuts anew for asks of {PIECE_BYTES >> 20} MiB, so that they are free for a moment."
)
ROUNDS: Final = 100
QUICK_ROUNDS: Final = 5
ENFORCED: Final = (IsolationGrade.DRIVER, IsolationGrade.BROKER)
BARS: Final = (
    *(Wanted(figure=f"{grade}_beyond_grant_bytes", op="==", bar=0) for grade in ENFORCED),
    *(Wanted(figure=f"{grade}_owner_served_count", op="==", bar=ROUNDS) for grade in ENFORCED),
    *(Wanted(figure=f"{grade}_takers_bytes", op=">=", bar=TAKERS * (TAKER_BYTES - PIECE_BYTES)) for grade in ENFORCED),
)


@dataclass(slots=True)
class Seen:
    """The most that was seen at one moment."""

    beyond_bytes: int = 0
    held_bytes: int = 0
    reserve_taken_bytes: int = 0
    look_count: int = 0
    is_brokered: bool = False
    grants: Mapping[str, int] = field(default_factory=dict)

    def add(self, direct: Mapping[str, int], lent: Mapping[str, int]) -> None:
        """`direct` by the driver's account, `lent` by the broker's, by name."""
        held = {name: direct.get(name, 0) + lent.get(name, 0) for name in self.grants}
        self.held_bytes = max(self.held_bytes, sum(held.values()))
        if self.is_brokered:
            beyond_bytes = sum(max(0, lent.get(name, 0) + CONTEXT_BYTES - self.grants[name]) for name in held)
            beyond_bytes += max(0, sum(direct.values()) - RESERVE_BYTES)
            taken_bytes = sum(max(0, direct.get(name, 0) - CONTEXT_BYTES) for name in held)
            self.reserve_taken_bytes = max(self.reserve_taken_bytes, taken_bytes)
        else:
            beyond_bytes = sum(max(0, size - self.grants[name]) for name, size in held.items())
        self.beyond_bytes = max(self.beyond_bytes, beyond_bytes)
        self.look_count += 1


async def measure(setting: Setting) -> Measured:
    figures: dict[str, Value] = {}
    for grade in (*ENFORCED, IsolationGrade.COOPERATIVE):
        setting.progress.say(f"eight greedy processes against grade {grade}")
        folder = setting.folder / grade
        folder.mkdir()
        async with stage(folder, grade=grade) as made:
            figures |= await _against(made, grade, setting.count(ROUNDS, QUICK_ROUNDS))
    folder = setting.folder / "recut"
    folder.mkdir()
    setting.progress.say("eight greedy processes against a broker that must cut its pieces anew")
    async with stage(folder, grade=IsolationGrade.BROKER, broker_piece_bytes=GiB) as made:
        recut = await _against(made, IsolationGrade.BROKER, 1)
    figures["broker_recut_beyond_grant_bytes"] = recut["broker_beyond_grant_bytes"]
    return Measured(
        figures=figures,
        notes=[NOTE],
    )


async def _against(made: Stage, grade: IsolationGrade, round_count: int) -> dict[str, Value]:
    takers = [f"taker-{number}" for number in range(TAKERS)]
    seen = Seen(grants=dict.fromkeys(takers, TAKER_BYTES), is_brokered=grade is IsolationGrade.BROKER)
    for name in takers:
        await made.start(name, "take", granted_bytes=TAKER_BYTES, piece_bytes=PIECE_BYTES)
    # Its guarantee less its context, in one piece.
    piece_bytes, rounds = OWNER_BYTES - 2 * CONTEXT_BYTES, ("--rounds", str(round_count))
    await made.start("owner", "own", *rounds, granted_bytes=OWNER_BYTES, piece_bytes=piece_bytes)
    for name in made.started:
        await made.is_up(name)
    async with anyio.create_task_group() as looking:
        looking.start_soon(_look, made, seen)
        for name in takers:
            made.go(name)
        with anyio.move_on_after(5.0):
            while seen.held_bytes < TAKERS * (TAKER_BYTES - PIECE_BYTES):  # noqa: ASYNC110  (other processes)
                await anyio.sleep(LOOK_EVERY_S)
        made.go("owner")
        told = await made.told("owner")
        looking.cancel_scope.cancel()
    brokered: dict[str, Value] = {"broker_reserve_taken_bytes": seen.reserve_taken_bytes} if seen.is_brokered else {}
    return {
        f"{grade}_beyond_grant_bytes": seen.beyond_bytes,
        f"{grade}_takers_bytes": seen.held_bytes,
        f"{grade}_owner_served_count": told["served_count"],
        f"{grade}_owner_worst_s": told["worst_s"],
        f"{grade}_look_count": seen.look_count,
        **brokered,
    }


async def _look(made: Stage, seen: Seen) -> None:
    while True:
        seen.add(await anyio.to_thread.run_sync(made.direct_bytes), await made.lent_bytes())
        await anyio.sleep(LOOK_EVERY_S)

"""A step of modelled work by the clock: as long as it takes beside what runs on the same GPU meanwhile."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from engines.model.sharing import Demand, Sharing, demand_of, progress_rates
from engines.neighbours import Neighbours, board_path, speed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engines.model.timing import StepCost
    from engines.process import Log

# How often a step looks at its neighbours again. Most steps of a decoding engine are shorter and look once.
LOOK_EVERY_S = 0.02


class GpuPace:
    """Lets time pass for steps on the engine's GPUs. `join` makes neighbours known; without it the engine is alone.

    A step runs on all of them at once, and is as slow as on the one where most is going on.
    """

    def __init__(self, sharing: Sharing) -> None:
        self.sharing = sharing
        self.slowed_s = 0.0  # that steps took longer because of neighbours, in all
        self._boards: list[Neighbours] = []

    @property
    def sees_neighbours(self) -> bool:
        return bool(self._boards)

    def join(self, gpu_uuids: Sequence[str], log: Log) -> None:
        """Meet the other engines of those GPUs. Where that fails, the log says so and the engine runs as if alone."""
        for gpu_uuid in gpu_uuids:
            self._join(gpu_uuid, log)

    def _join(self, gpu_uuid: str, log: Log) -> None:
        try:
            self._boards.append(Neighbours(board_path(gpu_uuid)))
        except OSError as error:
            log.warning("other engines on this GPU are not seen", reason=str(error))

    async def spend(self, cost: StepCost, begun_s: float) -> float:
        """Wait until a step that began then (`time.perf_counter`) is over; its end by the model, which may be past."""
        due_s, left_s = begun_s + cost.host_s, cost.device_s
        demand = demand_of(cost)
        alone = progress_rates(self.sharing, (demand,))[0]
        while True:
            rate = self._rate(demand, alone)
            piece_s = min(left_s / rate, LOOK_EVERY_S)
            for board in self._boards:
                board.publish(demand, for_s=max(due_s + piece_s - time.perf_counter(), 0.0))
            due_s += piece_s
            left_s -= piece_s * rate
            self.slowed_s += piece_s * (1 - rate / alone)
            # Also when late: whoever else runs on the loop must get its turn.
            await asyncio.sleep(max(due_s - time.perf_counter(), 0))
            if left_s <= 1e-9:
                return due_s

    def rest(self) -> None:
        """No step follows for now."""
        for board in self._boards:
            board.rest()

    def close(self) -> None:
        while self._boards:
            self._boards.pop().close()

    def _rate(self, demand: Demand, alone: float) -> float:
        busy = [others for board in self._boards if (others := board.busy())]
        return min((speed(self.sharing, demand, others) for others in busy), default=alone)

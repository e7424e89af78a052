"""What a node agent's eyes see of a simulated host's GPUs, and what goes wrong with them; for the simulator only.

The real eyes look every two seconds. Here they look when something has changed, and again until the agent knows:
between two changes every look would tell the same.
"""

import random
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from kit.outcomes import Input
from schemas.deployments import IsolationGrade, SwapDriver
from schemas.nodes import GpuOffer
from schemas.units import GB, MiB
from services.nodeagent.gpu_inputs import GpuBack, GpuFaultSeen, GpuGone, GpuMeasured, GpuTried, TryGpu
from services.nodeagent.inputs import EngineEffect
from services.nodeagent.simulated_engine import Clock
from services.nodeagent.xids import LOST_XID, Blame, xid_of

if TYPE_CHECKING:
    from services.nodeagent.simulated import SimulatedHost
    from services.nodeagent.simulated_engine import Done

LINK_BYTES_PER_S: Final = 53 * GB
LOOK_S: Final = 2.0
TRIAL_S: Final = 1.0
NO_NEWS_BYTES: Final = 256 * MiB
"""A smaller change of foreign memory is none to the agent (`NodeAgentSettings.foreign_step_bytes`)."""


def copy_s(effect: EngineEffect) -> float:
    """How long its weights are on the link."""
    return effect.replica.deployment.engine.weights_bytes / LINK_BYTES_PER_S


class SimulatedEyes:
    """Of one host."""

    def __init__(self, host: "SimulatedHost", clock: Clock, *, seed: int) -> None:
        self._host = host
        self._clock = clock
        self._random = random.Random(f"{seed}/{host.node}/eyes")  # Reproducible by design.
        self._is_due = False
        self.report: Callable[[Input], None] = lambda _: None
        """Takes what is seen to the agent, if it lives."""
        self.offered: Callable[[], Mapping[str, GpuOffer] | None] = lambda: None
        """What the agent offers now; None while there is none that was told of its node."""
        self.sick_until_s: dict[str, float] = {}
        """{gpu_uuid: until when no engine can be started there}"""

    def look_soon(self) -> None:
        """Something has changed."""
        if not self._is_due:
            self._is_due = True
            self._clock.after(self._random.uniform(0.0, LOOK_S), self._look)

    def _look(self) -> None:
        self._is_due = False
        offered = self.offered() if self._host.is_up else None
        if offered is None or not self._tells_all(offered):
            self._is_due = True
            self._clock.after(LOOK_S, self._look)

    def _tells_all(self, offered: Mapping[str, GpuOffer]) -> bool:
        """One look; whether the agent knew all of it before."""
        if self._clock.now_s < self._host.silent_until_s:
            for gpu_uuid in offered:
                self.report(GpuMeasured(gpu_uuid=gpu_uuid, problem="the driver is silent"))
            return False
        here = {gpu.gpu_uuid: gpu for gpu in self._host.gpus}
        is_known = here.keys() == offered.keys()
        for gpu_uuid, offer in offered.items():
            if gpu_uuid not in here:
                self.report(GpuGone(gpu_uuid=gpu_uuid))
                continue
            foreign_bytes = self._host.foreign_bytes.get(gpu_uuid, 0)
            self.report(GpuMeasured(gpu_uuid=gpu_uuid, foreign_bytes=foreign_bytes, used_bytes=foreign_bytes))
            change_bytes = abs(foreign_bytes - offer.foreign_bytes)
            is_known &= change_bytes < NO_NEWS_BYTES and (foreign_bytes > 0 or not offer.foreign_bytes)
        for gpu_uuid, gpu in here.items():
            if gpu_uuid not in offered:
                self.report(GpuBack(gpu=self._host.with_foreign(gpu)))
        return is_known

    # --- What goes wrong ----------------------------------------------------------------------------------------------

    def raise_xid(self, gpu_uuid: str, code: int) -> None:
        """The driver reports an error; nobody hears it while the driver is silent."""
        if self._host.is_up and self._clock.now_s >= self._host.silent_until_s:
            self.report(GpuFaultSeen(gpu_uuid=gpu_uuid, code=code))

    def strike(self, index: int, code: int, which: int) -> list[str]:
        """An error strikes a GPU: the replicas whose engines die of it, one or all there."""
        gpu = self._host.gpus[index % len(self._host.gpus)]
        there = [name for name, engine in sorted(self._host.engines.items()) if gpu.gpu_uuid in engine.share_bytes]
        self.raise_xid(gpu.gpu_uuid, code)
        if xid_of(code).blame is Blame.HARDWARE:
            return there
        return there[which % len(there) :][:1] if there and xid_of(code).blame is Blame.APPLICATION else []

    def lose(self, gpu_uuid: str) -> None:
        self.raise_xid(gpu_uuid, LOST_XID)
        self.look_soon()

    def sicken(self, index: int, *, lasts_s: float) -> None:
        """For a while no engine can be started there, and the driver says nothing about it."""
        gpu = self._host.gpus[index % len(self._host.gpus)]
        self.sick_until_s[gpu.gpu_uuid] = self._clock.now_s + lasts_s

    def is_sick(self, gpu_uuid: str) -> bool:
        return self._clock.now_s < self.sick_until_s.get(gpu_uuid, 0.0)

    def try_gpu(self, effect: TryGpu, done: "Done") -> None:
        """Nothing comes of a trial of a GPU that is away: it is tried when it is back."""

        def tried() -> None:
            if self._clock.now_s < self._host.silent_until_s:
                self._clock.after(self._host.silent_until_s - self._clock.now_s + TRIAL_S, tried)
            elif any(gpu.gpu_uuid == effect.gpu_uuid for gpu in self._host.gpus):
                problem = "no context can be made" if self.is_sick(effect.gpu_uuid) else ""
                done(0.0, GpuTried(gpu_uuid=effect.gpu_uuid, fault_count=effect.fault_count, problem=problem))

        self._clock.after(TRIAL_S, tried)


def h100(index: int, *, node: str, has_checkpoint: bool = False) -> GpuOffer:
    """One simulated H100 with 80 GB, as a node offers it."""
    return GpuOffer(
        gpu_uuid=f"GPU-{node}-{index}",
        index=index,
        name="NVIDIA H100 80GB HBM3",
        capacity_bytes=81_559 * MiB,
        reserve_bytes=2048 * MiB,
        grade=IsolationGrade.DRIVER,
        grade_reason="simulated",
        link_bytes_per_s=LINK_BYTES_PER_S,
        is_software=True,
        swap_drivers=(SwapDriver.CHECKPOINT,) if has_checkpoint else (),
    )

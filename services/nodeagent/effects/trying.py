"""Whether a GPU that misbehaved does again what every engine needs: a context and a little memory."""

import sys
from pathlib import Path
from typing import Final

import anyio.to_thread

from devices.api import DeviceError
from schemas.units import MiB
from services.nodeagent.effects.hands import Hands
from services.nodeagent.effects.starting import engine_environment
from services.nodeagent.gpu_inputs import GpuTried, TryGpu
from services.nodeagent.guard.proof import Program, Proof

TRIED_BYTES: Final = 64 * MiB
"""Fits beside everything else: the reserve is there for it."""
TRIAL_S: Final = 60.0
"""A driver that is well makes a context within a second, a loaded one within some."""


async def try_gpu(hands: Hands, effect: TryGpu, traceparent: str) -> GpuTried | None:
    """By a process of the holder's, as engines are. None: the GPU is away, and is tried when it is back."""
    try:
        gpus = await anyio.to_thread.run_sync(hands.guard.inventory.gpus)
    except DeviceError as error:
        return _tried(effect, problem=str(error))
    gpu = next((gpu for gpu in gpus if gpu.uuid == effect.gpu_uuid), None)
    if gpu is None:
        return None
    program = Program(
        python=hands.settings.engine_python or sys.executable, environment=engine_environment(), deadline_s=TRIAL_S
    )
    proof = Proof(hands.holder, program, kept=Path(hands.settings.state_dir) / "gpu-trials.json")
    attempt = await proof.attempt(gpu, within_bytes=TRIED_BYTES, beyond_bytes=0)
    if attempt.failure:
        is_the_gpus = not attempt.failure.startswith("the holder: ")
        return _tried(effect, problem=attempt.failure, is_conclusive=is_the_gpus)
    if attempt.within == "granted":
        return _tried(effect)
    return _tried(effect, problem="there is no room for a trial", is_conclusive=False)


def _tried(effect: TryGpu, *, problem: str = "", is_conclusive: bool = True) -> GpuTried:
    return GpuTried(
        gpu_uuid=effect.gpu_uuid, fault_count=effect.fault_count, problem=problem, is_conclusive=is_conclusive
    )

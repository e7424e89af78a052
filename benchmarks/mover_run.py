"""The part of the mover's benchmark that sees GPUs: the agent's own hands over a holder, in a process of its own.

``python -m benchmarks.mover_run HOLDER_SOCKET STATE_DIR`` reads cases on standard input, one JSON line each, and
answers each with its outcome; before them it says what it runs on.
"""

import sys
from typing import Final, TypeVar

import anyio
import anyio.to_thread
import msgspec

from benchmarks.mover_cases import PLAIN, Case, Cycle, Outcome, Setting
from devices.api import DeviceError
from devices.cuda import CudaDevice
from devices.nvml import NvmlInventory
from kit.outcomes import Input
from kit.telemetry import Tracer
from schemas.deployments import DeploymentSpec, EngineKind, EngineSpec, ShareSpec
from schemas.placement import ReplicaProposal, ShareProposal
from schemas.units import GiB, MiB
from services.nodeagent.effects.hands import Hands
from services.nodeagent.effects.performing import NodeEffects
from services.nodeagent.engine_client import EngineClient
from services.nodeagent.guard.making import guard_of
from services.nodeagent.holder_client import HolderClient
from services.nodeagent.inputs import (
    EngineParked,
    EngineStarted,
    EngineWoken,
    ParkEngine,
    StartEngine,
    StopEngine,
    WakeEngine,
)
from services.nodeagent.main import with_broker
from services.nodeagent.mover.mover import mover_of
from services.nodeagent.rooms import Rooms
from services.nodeagent.settings import NodeAgentSettings

BESIDE_BYTES: Final = GiB + 768 * MiB
"""On each GPU beside the weights: context, workspace, and 1 GiB of cache."""
PROBE_BYTES: Final = 2 * GiB
DRAIN_S: Final = 10.0
T = TypeVar("T", bound=Input)


def link_bytes_per_s(gpu_uuid: str) -> float:
    """One large copy out of pinned memory, the best of three."""
    device = CudaDevice(gpu_uuid)
    try:
        region, host = device.allocate(PROBE_BYTES), device.host_arena(PROBE_BYTES)
        seconds = min(device.copy_to_device(region, host).copy_s for _ in range(3))
    finally:
        device.close()
    return PROBE_BYTES / seconds


def replica(case: Case, gpu_uuids: tuple[str, ...]) -> ReplicaProposal:
    request_bytes = case.weights_bytes // case.gpu_count + BESIDE_BYTES
    return ReplicaProposal(
        replica_id="measured",
        deployment_id="measured",
        tenant="default",
        deployment=DeploymentSpec(
            name="measured",
            engine=EngineSpec(
                kind=EngineKind.SIMULATED, weights_bytes=case.weights_bytes, swap_driver=case.driver, cold_start_s=0.0
            ),
            share=ShareSpec(request_bytes=request_bytes, gpu_count=case.gpu_count),
        ),
        shares=tuple(
            ShareProposal(
                replica_id="measured",
                shard_index=index,
                gpu_uuid=uuid,
                request_bytes=request_bytes,
                limit_bytes=request_bytes,
            )
            for index, uuid in enumerate(gpu_uuids[: case.gpu_count])
        ),
    )


class Failed(Exception):
    """An effect ended otherwise than it should."""


class Bench:
    """One host's hands, with cases."""

    def __init__(self, effects: NodeEffects, gpu_uuids: tuple[str, ...]) -> None:
        self._effects = effects
        self._gpu_uuids = gpu_uuids
        self._lease_epoch = 0

    async def run(self, case: Case) -> Outcome:
        if len(self._gpu_uuids) < case.gpu_count:
            return Outcome(case=case, problem=f"needs {case.gpu_count} GPUs")
        self._lease_epoch += 1
        common = {
            "replica": replica(case, self._gpu_uuids),
            "lease_epoch": self._lease_epoch,
            "wake_epoch": 1,
            "swap_driver": case.driver,
        }
        try:
            await self._do(StartEngine(**common), EngineStarted)  # type: ignore[arg-type]
            cycles = []
            for _ in range(case.repeat_count):
                parked = await self._do(ParkEngine(**common, drain_s=DRAIN_S, reason="measured"), EngineParked)  # type: ignore[arg-type]
                woken = await self._do(WakeEngine(**common), EngineWoken)  # type: ignore[arg-type]
                cycles.append(_cycle(parked, woken))
            return Outcome(case=case, cycles=tuple(cycles))
        except Failed as error:
            return Outcome(case=case, problem=str(error))
        finally:
            await self._effects.perform(StopEngine(**common, drain_s=0.0), "")  # type: ignore[arg-type]

    async def _do(self, effect: object, wanted: type[T]) -> T:
        result = await self._effects.perform(effect, "")  # type: ignore[arg-type]
        if not isinstance(result, wanted):
            raise Failed(f"{type(effect).__name__}: {result}")
        return result


def _cycle(parked: EngineParked, woken: EngineWoken) -> Cycle:
    return Cycle(
        park_s=parked.park_s,
        parked_bytes=parked.copied_bytes,
        restore_s=woken.restore_s,
        map_s=woken.map_s,
        copy_s=woken.copy_s,
        verify_s=woken.verify_s,
        woken_bytes=woken.copied_bytes,
        residue_bytes=sum(parked.residues),
    )


def _settings(holder_socket: str, state_dir: str, *, is_plain: bool) -> NodeAgentSettings:
    return NodeAgentSettings(
        holder_socket=holder_socket,
        state_dir=f"{state_dir}/{'plain' if is_plain else 'agent'}",
        is_checkpoint_plain=is_plain,
        wake_deadline_s=120.0,
    )


async def main(holder_socket: str, state_dir: str) -> None:
    inventory = NvmlInventory()
    gpus = inventory.gpus()
    setting = Setting(
        label="software GPU" if gpus[0].is_software else "real GPU",
        gpu_name=gpus[0].name,
        link_bytes_per_s=await anyio.to_thread.run_sync(link_bytes_per_s, gpus[0].uuid),
    )
    print(msgspec.json.encode(setting).decode(), flush=True)
    while line := (await anyio.to_thread.run_sync(sys.stdin.readline)).strip():
        case = msgspec.json.decode(line, type=Case)
        outcome = await _measured(case, inventory, _settings(holder_socket, state_dir, is_plain=case.way == PLAIN))
        print(msgspec.json.encode(outcome).decode(), flush=True)


async def _measured(case: Case, inventory: NvmlInventory, settings: NodeAgentSettings) -> Outcome:
    holder, engines = HolderClient(settings.holder_socket), EngineClient()
    settings = await with_broker(settings, holder)
    mover = mover_of(settings, engines)
    ended: list[Input] = []
    try:
        async with anyio.create_task_group() as watchers:
            guard = guard_of(settings, inventory, holder)
            offers = await guard.offers(our_pids=frozenset())
            offered = await mover.offered(offers)
            effects = NodeEffects(
                Hands(
                    settings=settings,
                    guard=guard,
                    holder=holder,
                    engines=engines,
                    mover=mover,
                    tracer=Tracer(None, None, root_ratio=0.0),
                    watchers=watchers,
                    report=ended.append,
                    rooms=Rooms(guard),
                )
            )
            outcome = Outcome(case=case, problem=f"this host cannot park by {case.driver}")
            if all(case.driver in drivers for drivers in offered.values()):
                outcome = await Bench(effects, tuple(offered)).run(case)
            watchers.cancel_scope.cancel()
    except DeviceError as error:
        return Outcome(case=case, problem=str(error))
    finally:
        await mover.close()
        await holder.close()
        await engines.close()
    return outcome


if __name__ == "__main__":
    anyio.run(main, sys.argv[1], sys.argv[2])

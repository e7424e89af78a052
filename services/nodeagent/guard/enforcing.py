"""`Guard`: which backend holds on which GPU of this host, and all that the rest of the agent asks of it."""

import logging
from collections.abc import Sequence
from dataclasses import replace as replaced
from typing import Final

import anyio
import anyio.to_thread
from msgspec.structs import replace

from devices.api import DeviceError, GpuDescription, Inventory, NotSupported
from schemas.deployments import GRADE_ORDER, IsolationGrade
from schemas.holders import EngineView
from schemas.nodes import GpuOffer
from schemas.placement import ReplicaProposal
from schemas.units import GB, MiB
from services.nodeagent.broker_client import BrokerProblem
from services.nodeagent.grades import brokered_bytes, grade_for, is_brokered, weakest
from services.nodeagent.guard.accounts import Accounts
from services.nodeagent.guard.api import Backend, NotEnforced, Share, Verdict
from services.nodeagent.guard.broker import BrokerQuota
from services.nodeagent.guard.compute import Compute
from services.nodeagent.guard.cooperative import EnginesBudget, Watched
from services.nodeagent.guard.driver import DriverLimits
from services.nodeagent.guard.hardware import MIG_PREFIX, HardwarePart
from services.nodeagent.guard.owners import started_ticks
from services.nodeagent.guard.proof import Proof
from services.nodeagent.processes import tree_of
from services.nodeagent.settings import NodeAgentSettings

log = logging.getLogger("nodeagent")

LINK_GB_PER_S: Final = {3: 13.0, 4: 26.0, 5: 53.0, 6: 106.0}
"""Achieved with pinned memory on 16 lanes, by PCIe generation; 53 is NVIDIA's figure for an H100 (gen 5)."""

UNIFIED_ONLY: Final = "/sys/fs/cgroup/cgroup.controllers"
"""Is there on hosts with cgroup v2 alone."""
NOBODYS_BYTES_MAX: Final = 64 * MiB
"""Used on a GPU beside what the driver reserves and what it lists by process: rounding, no engine's memory."""


class Guard:
    """Limits on the GPUs of this host. Without a `proof`, what the driver says of itself is believed."""

    def __init__(
        self,
        inventory: Inventory,
        settings: NodeAgentSettings,
        *,
        proof: Proof | None = None,
        accounts: Accounts | None = None,
        compute: Compute | None = None,
    ) -> None:
        self.inventory = inventory
        self.accounts = accounts
        self.compute = compute or Compute(None)
        self._settings = settings
        self._proof = proof
        self._backends: Sequence[Backend] = (
            HardwarePart(inventory),
            DriverLimits(inventory, proof),
            BrokerQuota(inventory, accounts, proof, reserve_bytes=settings.reserve_bytes),
            EnginesBudget(inventory),
            Watched(inventory),
        )
        assert [backend.grade for backend in self._backends] == list(GRADE_ORDER), "the strongest is tried first"
        self._chosen: dict[str, tuple[Backend, Verdict]] = {}

    # --- What is here -------------------------------------------------------------------------------------------------

    async def offers(self, *, our_pids: frozenset[int]) -> tuple[GpuOffer, ...]:
        """Every GPU of this host, with the grade that trying found, now."""
        sharing, sharing_reason = await self.compute.prove()
        our_pids |= await self.broker_pids()
        offers = []
        for gpu in await anyio.to_thread.run_sync(self.inventory.gpus):
            self._chosen[gpu.uuid] = await self._choose(gpu)
            offer = await anyio.to_thread.run_sync(self._offer, gpu, our_pids)
            offers.append(replace(offer, compute_sharing=sharing, compute_sharing_reason=sharing_reason))
        return tuple(offers)

    def forget_proofs(self) -> None:
        """Everything is tried again at the next look."""
        if self._proof is not None:
            self._proof.forget()

    async def _choose(self, gpu: GpuDescription) -> tuple[Backend, Verdict]:
        """The strongest backend that holds, with why; behind it, why the stronger ones do not."""
        missing = []
        for backend in self._backends:
            if backend.grade is IsolationGrade.COOPERATIVE and not self._settings.is_trusting_engines:
                missing.append("this host trusts no engine's budget")
                continue
            verdict = await backend.prove(gpu)
            if verdict.is_proven:
                return backend, replaced(verdict, reason="; ".join([verdict.reason, *missing]))
            if backend.grade is not IsolationGrade.HARDWARE:
                missing.append(verdict.reason)
        raise AssertionError("the last backend always holds")

    def _offer(self, gpu: GpuDescription, our_pids: frozenset[int]) -> GpuOffer:
        backend, verdict = self._chosen[gpu.uuid]
        used = self.inventory.process_bytes(gpu.uuid)
        lanes_fraction = (gpu.link_width_count or 16) / 16
        return GpuOffer(
            gpu_uuid=gpu.uuid,
            index=gpu.index,
            name=gpu.name,
            capacity_bytes=gpu.capacity_bytes,
            reserve_bytes=self._settings.reserve_bytes + gpu.reserved_bytes,
            foreign_bytes=sum(size or 0 for pid, size in used.items() if pid not in our_pids),
            grade=backend.grade,
            grade_reason=verdict.reason,
            link_bytes_per_s=LINK_GB_PER_S.get(gpu.link_generation or 4, 26.0) * lanes_fraction * GB,
            is_software=gpu.is_software,
            peer_bytes_per_s=dict(self.inventory.peer_bytes_per_s(gpu.uuid)),
            numa_index=gpu.numa_index,
            is_mig=gpu.uuid.startswith(MIG_PREFIX),
        )

    async def broker_pids(self) -> frozenset[int]:
        """Of the memory broker: what it holds is ours, and nobody's in particular."""
        view = await self.accounts.look() if self.accounts is not None else None
        return frozenset() if view is None or not view.pid else frozenset({view.pid})

    async def grade(self, gpu_uuid: str) -> IsolationGrade:
        return (await self._backend(gpu_uuid)).grade

    async def is_limiting(self, gpu_uuid: str, *, is_container: bool) -> bool:
        """Whether the driver will limit an engine there. Beside cgroup v1 Docker gives containers no leaf in v2."""
        has_leaf = not is_container or await anyio.Path(UNIFIED_ONLY).exists()
        return has_leaf and await self.grade(gpu_uuid) is IsolationGrade.DRIVER

    async def _backend(self, gpu_uuid: str) -> Backend:
        """As found at the last look; effects of an earlier life may come before the first."""
        if gpu_uuid not in self._chosen:
            gpus = await anyio.to_thread.run_sync(self.inventory.gpus)
            gpu = next((gpu for gpu in gpus if gpu.uuid == gpu_uuid), None)
            if gpu is None:
                raise NotEnforced(f"no GPU {gpu_uuid} on this host")
            self._chosen[gpu_uuid] = await self._choose(gpu)
        return self._chosen[gpu_uuid][0]

    # --- What engines may hold ----------------------------------------------------------------------------------------

    def environment(self, replica: ReplicaProposal, *, lease_epoch: int) -> dict[str, str]:
        """What its engine needs to be held; for the holder, before it starts."""
        variables = self.compute.environment(replica.deployment.share)
        if self.accounts is not None and is_brokered(replica.deployment.engine):
            variables |= self.accounts.environment(replica.replica_id, lease_epoch=lease_epoch)
        return variables

    async def hold(self, replica: ReplicaProposal, engine: EngineView, sizes: Sequence[int]) -> int:
        """Hold the engine to so much on each of its GPUs, by shard, and give the sum of the limits as read back.

        0 where none can be set; the grade says so. Before its gate opens, and at each new grant. Takes nothing back.
        Raises `NotEnforced`, `DeviceError`.
        """
        shares = [await self._share(replica, index, engine, size) for index, size in enumerate(sizes)]
        if self.accounts is not None and is_brokered(replica.deployment.engine):
            try:
                await self.accounts.allow(
                    replica.replica_id,
                    lease_epoch=engine.lease_epoch,
                    tenant=replica.tenant,
                    deployment_id=replica.deployment_id,
                    granted_bytes={share.gpu_uuid: share.brokered_bytes for share in shares},
                )
            except BrokerProblem as problem:
                raise NotEnforced(str(problem)) from problem
        return sum([await (await self._holding(share)).enforce(share) for share in shares])

    async def verify(self, replica: ReplicaProposal, engine: EngineView) -> None:
        """When it is ready: it is under its limits. Raises `NotEnforced`, `DeviceError`."""
        await self.compute.verify(await anyio.to_thread.run_sync(_processes, engine))
        for index, proposed in enumerate(replica.shares):
            share = await self._share(replica, index, engine, proposed.request_bytes)
            await (await self._holding(share)).verify(share)

    async def drain(self, engine: EngineView) -> None:
        """Before its processes get any signal."""
        if engine.is_alive and not engine.is_gated:
            await self.compute.drain(await anyio.to_thread.run_sync(_processes, engine))

    async def give_up(self, replica: ReplicaProposal, engine: EngineView) -> None:
        """Its guarantee, before an end that takes its cgroup along. Its hard limit holds to the end. Idempotent.

        A guarantee that is on a cgroup when that goes would stay with those above it, for good.
        """
        for index in range(len(replica.shares)):
            share = await self._share(replica, index, engine, 0)
            backend = await self._holding(share)
            if isinstance(backend, DriverLimits):
                await backend.give_up(share)

    async def lift(self, replica: ReplicaProposal, engine: EngineView) -> None:
        """Its process is gone, its cgroup goes next. Idempotent."""
        for index in range(len(replica.shares)):
            share = await self._share(replica, index, engine, 0)
            await (await self._holding(share)).lift(share)
        if self.accounts is not None and is_brokered(replica.deployment.engine):
            await self.accounts.close(replica.replica_id, lease_epoch=engine.lease_epoch)

    async def give_up_nobodys(self, engine: EngineView) -> None:
        """The same for an engine that no lease names, so that only the engine itself tells where it is."""
        for share in _of_nobody(engine):
            backend = await self._holding(share)
            if isinstance(backend, DriverLimits):
                await backend.give_up(share)

    async def lift_nobodys(self, engine: EngineView) -> None:
        """Its limits and its account; its process is gone. Idempotent."""
        for share in _of_nobody(engine):
            await (await self._holding(share)).lift(share)
        if self.accounts is not None:
            await self.accounts.close(engine.replica_id, lease_epoch=engine.lease_epoch)

    async def lift_group(self, namespace: str) -> None:
        """All limits of a group in which no process is left, on every GPU. Idempotent."""
        for gpu in await anyio.to_thread.run_sync(self.inventory.gpus):
            share = Share(gpu_uuid=gpu.uuid, namespace=namespace, request_bytes=0, granted_bytes=0)
            await (await self._holding(share)).lift(share)

    async def grade_of(self, replica: ReplicaProposal, engine: EngineView) -> IsolationGrade:
        """How its share is enforced, as it was started: the weakest over its GPUs."""
        shares = [await self._share(replica, index, engine, 0) for index in range(len(replica.shares))]
        found = [(await self._holding(share)).grade for share in shares]
        return weakest(*(grade_for(grade, replica.deployment.engine) or IsolationGrade.WATCHED for grade in found))

    async def _holding(self, share: Share) -> Backend:
        """What holds this very engine. The driver cannot hold one that has no cgroup of its own to set a limit on.

        So it is for containers on a host with cgroup v1, alone or beside v2: Docker puts them into v1's.
        """
        backend = await self._backend(share.gpu_uuid)
        if backend.grade is not IsolationGrade.DRIVER or share.namespace:
            return backend
        weaker = IsolationGrade.COOPERATIVE if self._settings.is_trusting_engines else IsolationGrade.WATCHED
        return next(other for other in self._backends if other.grade is weaker)

    async def _share(self, replica: ReplicaProposal, index: int, engine: EngineView, granted_bytes: int) -> Share:
        proposed = replica.shares[index]
        lent_bytes = 0
        if self.accounts is not None:
            lent_bytes = brokered_bytes(
                replica.deployment.engine,
                granted_bytes=granted_bytes,
                context_bytes=await self._context_bytes(proposed.gpu_uuid),
                shard_count=len(replica.shares),
            )
        return Share(
            gpu_uuid=proposed.gpu_uuid,
            namespace=engine.namespace,
            request_bytes=proposed.request_bytes,
            granted_bytes=granted_bytes,
            brokered_bytes=lent_bytes,
            replica_id=replica.replica_id,
            lease_epoch=engine.lease_epoch,
        )

    async def _context_bytes(self, gpu_uuid: str) -> int:
        """As measured when the grade was tried, else as the setting expects it."""
        await self._backend(gpu_uuid)
        measured_bytes = self._chosen[gpu_uuid][1].context_bytes
        return self._settings.residue_bytes if measured_bytes is None else measured_bytes

    async def used_bytes(self, gpu_uuid: str, namespace: str, pid: int) -> int | None:
        """What the engine uses now, by the driver's account; None when it does not say, or fails."""
        try:
            grade = await self.grade(gpu_uuid)
            return await anyio.to_thread.run_sync(self._used_bytes, gpu_uuid, namespace, pid, grade)
        except (DeviceError, NotEnforced) as problem:
            if not isinstance(problem, NotSupported):
                log.warning("not measured", extra={"gpu": gpu_uuid, "reason": str(problem)})
            return None

    def _used_bytes(self, gpu_uuid: str, namespace: str, pid: int, grade: IsolationGrade) -> int | None:
        if grade is IsolationGrade.DRIVER and namespace:
            return self.inventory.limit(gpu_uuid, namespace).used_bytes
        return self._listed_bytes(gpu_uuid, pid)

    def _listed_bytes(self, gpu_uuid: str, pid: int) -> int | None:
        """Of it and its children. Where none is listed it is 0 only when nobody's bytes are missing from the list."""
        listed = self.inventory.process_bytes(gpu_uuid)
        sizes = [listed[member] for member in tree_of(pid) if member in listed]
        if sizes:
            return None if None in sizes else sum(size or 0 for size in sizes)
        memory = self.inventory.memory(gpu_uuid)
        reserved_bytes = next((gpu.reserved_bytes for gpu in self.inventory.gpus() if gpu.uuid == gpu_uuid), 0)
        nobodys_bytes = memory.used_bytes - reserved_bytes - sum(size or 0 for size in listed.values())
        return 0 if nobodys_bytes < NOBODYS_BYTES_MAX else None


def _of_nobody(engine: EngineView) -> list[Share]:
    return [
        Share(
            gpu_uuid=gpu_uuid,
            namespace=engine.namespace,
            request_bytes=0,
            granted_bytes=0,
            replica_id=engine.replica_id,
            lease_epoch=engine.lease_epoch,
        )
        for gpu_uuid in engine.gpu_uuids
    ]


def _processes(engine: EngineView) -> frozenset[int]:
    """All of it; none where its pid is another process for us, in another pid namespace."""
    if started_ticks(engine.pid) != engine.started_ticks:
        return frozenset()
    return tree_of(engine.pid)

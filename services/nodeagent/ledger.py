"""Bytes of each GPU while one decision is being made: what is held, what is claimed by waiting wakes, what is free."""

from schemas.placement import ReplicaProposal
from services.nodeagent.state import NodeState, Replica, Residency


class Ledger:
    """A working copy of the node's account; a handler books what it decides, so that no byte is promised twice."""

    def __init__(self, state: NodeState, *, settled: Replica | None = None) -> None:
        """`settled`: its drain has just ended one way or the other, so it promises nothing any more."""
        self._offered = {replica.gpu_uuid: 0 for replica in state.replicas.values()}  # Of a GPU that is gone: nothing.
        self._offered.update({uuid: gpu.allocatable_bytes for uuid, gpu in state.gpus.items()})
        self._held = {uuid: state.held_bytes(uuid) for uuid in self._offered}
        self._claimed = dict.fromkeys(self._offered, 0)
        self._giving = dict.fromkeys(self._offered, 0)
        self._resting: dict[str, int] = dict.fromkeys(self._offered, 0)
        self._fixed: dict[str, int] = dict.fromkeys(self._offered, 0)
        self._largest: dict[str, int] = dict.fromkeys(self._offered, 0)
        for replica in state.replicas.values():
            gpu = replica.gpu_uuid
            if replica.residency is Residency.WAITING:
                self._claimed[gpu] += replica.share_bytes - replica.held_bytes
            elif replica.residency is Residency.DRAINING and replica is not settled:
                self._giving[gpu] += replica.share_bytes - replica.residue_bytes
            if replica.residency is not Residency.FAILED:
                self.lease(replica.proposal, replica.residue_bytes)

    def hold(self, gpu_uuid: str, extra_bytes: int) -> None:
        """Book bytes (negative: give back)."""
        self._held[gpu_uuid] += extra_bytes

    def free_bytes(self, gpu_uuid: str) -> int:
        """Held by no lease now."""
        return self._offered.get(gpu_uuid, 0) - self._held.get(gpu_uuid, 0)

    def unclaimed_bytes(self, gpu_uuid: str) -> int:
        """Free, and not claimed by a wake that waits for more."""
        return self.free_bytes(gpu_uuid) - self._claimed[gpu_uuid]

    def drop_claim(self, gpu_uuid: str, claimed_bytes: int) -> None:
        """A waiting wake was begun or refused."""
        self._claimed[gpu_uuid] -= claimed_bytes

    def promised_free_bytes(self, gpu_uuid: str) -> int:
        """Unclaimed once every replica that is draining now has parked. May be negative."""
        return self.unclaimed_bytes(gpu_uuid) + self._giving[gpu_uuid]

    def lease(self, replica: ReplicaProposal, residue_bytes: int) -> None:
        """Count a replica among those that must be able to live on its GPU together."""
        share = replica.shares[0]
        gpu = share.gpu_uuid
        if gpu not in self._resting:
            return
        if replica.deployment.swap.is_parkable:
            residue_bytes = min(residue_bytes, share.request_bytes)
            self._resting[gpu] += residue_bytes
            self._largest[gpu] = max(self._largest[gpu], share.request_bytes - residue_bytes)
        else:
            self._fixed[gpu] += share.request_bytes

    def short_for_lease(self, replica: ReplicaProposal, residue_bytes: int) -> int:
        """Bytes that are missing to take this replica too; 0 or less when it can live here.

        All that are always resident, the residues of all that park, and the largest share among those must fit
        together. Nothing needs to be free now: a lease without a process holds nothing, and its first start waits for
        its share like any wake.
        """
        share = replica.shares[0]
        gpu = share.gpu_uuid
        fixed, resting, largest = self._fixed[gpu], self._resting[gpu], self._largest[gpu]
        residue_bytes = min(residue_bytes, share.request_bytes)
        if replica.deployment.swap.is_parkable:
            resting += residue_bytes
            largest = max(largest, share.request_bytes - residue_bytes)
        else:
            fixed += share.request_bytes
        return fixed + resting + largest - self._offered[gpu]

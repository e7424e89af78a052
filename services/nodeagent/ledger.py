"""Bytes of each GPU while one decision is being made: what is held, borrowed, claimed by waiting wakes, and free."""

from collections.abc import Mapping
from typing import NamedTuple

from schemas.placement import ReplicaProposal
from services.nodeagent.state import NodeState, Replica, expected_residue
from services.nodeagent.transitions import Residency


class Shortage(NamedTuple):
    """The GPU that lacks most, and how much; 0 or less when nothing is missing on any."""

    short_bytes: int
    gpu_uuid: str


class Ledger:
    """A working copy of the node's account; a handler books what it decides, so that no byte is promised twice.

    Amounts are {gpu_uuid: bytes}: a replica that spans several GPUs takes and gives on all of them at once.
    """

    def __init__(self, state: NodeState, *, settled: Replica | None = None) -> None:
        """`settled`: what it was doing has just ended one way or the other, so it promises nothing any more."""
        self._settings = state.settings
        # Of a GPU that is gone: nothing.
        self._offered = {uuid: 0 for replica in state.replicas.values() for uuid in replica.share_bytes}
        self._offered.update({uuid: gpu.allocatable_bytes for uuid, gpu in state.gpus.items()})
        self._held = {uuid: state.held_bytes(uuid) for uuid in self._offered}
        self._claimed = dict.fromkeys(self._offered, 0)
        self._giving = dict.fromkeys(self._offered, 0)
        self._borrowed = dict.fromkeys(self._offered, 0)
        self._resting = dict.fromkeys(self._offered, 0)
        self._fixed = dict.fromkeys(self._offered, 0)
        self._largest = dict.fromkeys(self._offered, 0)
        for replica in state.replicas.values():
            if replica.residency is Residency.WAITING:
                _add(self._claimed, replica.wanted_bytes)
            elif replica.residency is Residency.DRAINING and replica is not settled:
                _add(self._giving, replica.yielding_bytes)
            elif replica.residency is Residency.RESIDENT and replica is not settled:
                _add(self._borrowed, replica.borrowed_bytes)
            if replica.residency is not Residency.FAILED:
                self._live(replica.request_bytes, replica.residue_bytes, is_parkable=_is_parkable(replica.proposal))

    def hold(self, amounts: Mapping[str, int]) -> None:
        """Book bytes (negative: give back)."""
        _add(self._held, amounts)

    def free_bytes(self, gpu_uuid: str) -> int:
        """Held by no lease now."""
        return self._offered.get(gpu_uuid, 0) - self._held.get(gpu_uuid, 0)

    def unclaimed_bytes(self, gpu_uuid: str) -> int:
        """Free, and not claimed by a wake that waits for more."""
        return self.free_bytes(gpu_uuid) - self._claimed[gpu_uuid]

    def has_unclaimed(self, wanted: Mapping[str, int]) -> bool:
        """Whether every GPU has what is wanted there, free and claimed by nobody."""
        return all(self.unclaimed_bytes(gpu_uuid) >= size for gpu_uuid, size in wanted.items())

    def drop_claim(self, claimed: Mapping[str, int]) -> None:
        """A waiting wake was begun or refused."""
        _add(self._claimed, {gpu_uuid: -size for gpu_uuid, size in claimed.items()})

    def is_lent(self, wanted: Mapping[str, int]) -> bool:
        """Whether every GPU has what is wanted there once all that is borrowed is given back, without any park."""
        return all(self.unclaimed_bytes(uuid) + self._borrowed[uuid] >= size for uuid, size in wanted.items())

    def claim(self, wanted: Mapping[str, int]) -> None:
        """A wake was accepted that waits for these."""
        _add(self._claimed, wanted)

    def drain(self, replica: Replica) -> None:
        """A resident replica begins to drain: its park will give all but its residue."""
        _add(self._giving, replica.yielding_bytes)
        self.settle_loan(replica.borrowed_bytes)

    def lend(self, amounts: Mapping[str, int]) -> None:
        """A resident replica has these beyond its request."""
        _add(self._borrowed, amounts)

    def settle_loan(self, amounts: Mapping[str, int]) -> None:
        """These are borrowed no longer."""
        _add(self._borrowed, {gpu_uuid: -size for gpu_uuid, size in amounts.items()})

    def lacking_bytes(self, gpu_uuid: str) -> int:
        """What waiting wakes want and neither is free nor comes from a park. 0 or less: nothing."""
        return -(self.unclaimed_bytes(gpu_uuid) + self._giving[gpu_uuid])

    def promised_free_bytes(self, gpu_uuid: str) -> int:
        """Unclaimed once all that drains has parked and all that is borrowed is given back. May be negative."""
        return self.unclaimed_bytes(gpu_uuid) + self._giving[gpu_uuid] + self._borrowed[gpu_uuid]

    def short_of(self, wanted: Mapping[str, int]) -> Shortage:
        """What is missing beyond all that is promised, on the GPU that lacks most; the first of equals."""
        return _worst({gpu_uuid: size - self.promised_free_bytes(gpu_uuid) for gpu_uuid, size in wanted.items()})

    def lease(self, replica: ReplicaProposal) -> None:
        """Count a proposed replica among those that must be able to live on their GPUs together."""
        self._live(*self._asked(replica), is_parkable=_is_parkable(replica))

    def short_for_lease(self, replica: ReplicaProposal) -> Shortage:
        """What is missing to take this replica too; 0 or less when it can live on all its GPUs.

        On each of them all that are always resident, the residues of all that park, and the largest share among those
        must fit together: then every one of them, also one that spans several GPUs, is resident when all others that
        park are parked. Nothing needs to be free now: a lease without a process holds nothing, and its first start
        waits for its share like any wake.
        """
        short: dict[str, int] = {}
        shares, residues = self._asked(replica)
        for gpu, share_bytes in shares.items():
            fixed, resting, largest = self._fixed[gpu], self._resting[gpu], self._largest[gpu]
            if _is_parkable(replica):
                resting += residues[gpu]
                largest = max(largest, share_bytes - residues[gpu])
            else:
                fixed += share_bytes
            short[gpu] = fixed + resting + largest - self._offered[gpu]
        return _worst(short)

    def _asked(self, replica: ReplicaProposal) -> tuple[dict[str, int], dict[str, int]]:
        shares = {share.gpu_uuid: share.request_bytes for share in replica.shares}
        return shares, {share.gpu_uuid: expected_residue(share, self._settings) for share in replica.shares}

    def _live(self, shares: Mapping[str, int], residues: Mapping[str, int], *, is_parkable: bool) -> None:
        for gpu, share_bytes in shares.items():
            if gpu not in self._offered:
                continue
            if is_parkable:
                residue_bytes = min(residues[gpu], share_bytes)
                self._resting[gpu] += residue_bytes
                self._largest[gpu] = max(self._largest[gpu], share_bytes - residue_bytes)
            else:
                self._fixed[gpu] += share_bytes


def _is_parkable(replica: ReplicaProposal) -> bool:
    return replica.deployment.swap.is_parkable


def _add(account: dict[str, int], amounts: Mapping[str, int]) -> None:
    for gpu_uuid, size in amounts.items():
        account[gpu_uuid] += size


def _worst(short: Mapping[str, int]) -> Shortage:
    gpu_uuid = max(short, key=lambda uuid: short[uuid])
    return Shortage(short[gpu_uuid], gpu_uuid)

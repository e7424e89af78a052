"""Who may share a GPU's bytes by taking turns. Three bounds hold for every GPU that is shared so (ADR 0014).

1. Each one's return: all that is always resident, the residues of all that park and the largest share above its
   residue fit together. This is the node agent's own rule, so that it grants what is proposed here.
2. Host memory for the parked weights of all (`rooms.Rooms.park_left`).
3. Expected use: shares that are expected to be in use at the same time fit together, with something to spare.
"""

import math
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from schemas.gateways import LoadSampled

if TYPE_CHECKING:
    from services.placement.settings import PlacementSettings
    from services.placement.state import ClusterState, Replica


@dataclass(slots=True)
class Account:
    """One GPU's promises in bytes."""

    allocatable_bytes: int
    """Capacity less the reserve and less what strangers use."""
    fixed_bytes: int = 0
    """Of those that never park."""
    resting_bytes: int = 0
    """Residues of those that do."""
    largest_bytes: int = 0
    """The largest share above its residue among those."""
    promised_bytes: int = 0
    """All requests."""
    claimed_bytes: int = 0
    """Kept for newcomers whose victims have not left yet."""
    tentative: list[tuple[str, int]] = field(default_factory=list)
    """(deployment_id, request) of those that park and were decided in the input at hand; empty between inputs."""

    def short_with(self, request_bytes: int, residue_bytes: int, *, is_parkable: bool) -> int:
        """What is missing for one more, by the first bound; 0 or less when it fits."""
        fixed, resting, largest = self.fixed_bytes + self.claimed_bytes, self.resting_bytes, self.largest_bytes
        if is_parkable:
            resting += residue_bytes
            largest = max(largest, request_bytes - residue_bytes)
        else:
            fixed += request_bytes
        return fixed + resting + largest - self.allocatable_bytes

    def left_bytes(self, request_bytes: int) -> int:
        """Allocatable less all requests with this one: negative when replicas must take turns."""
        return self.allocatable_bytes - self.promised_bytes - self.claimed_bytes - request_bytes

    def add(self, request_bytes: int, residue_bytes: int, *, is_parkable: bool) -> None:
        self.promised_bytes += request_bytes
        if is_parkable:
            self.resting_bytes += residue_bytes
            self.largest_bytes = max(self.largest_bytes, request_bytes - residue_bytes)
        else:
            self.fixed_bytes += request_bytes

    def recount(self, gpu_uuid: str, replicas: Iterable["Replica"]) -> None:
        """From those that are promised a place here."""
        self.fixed_bytes = self.resting_bytes = self.largest_bytes = self.promised_bytes = 0
        for replica in replicas:
            residue_bytes = replica.residue_on(gpu_uuid) if replica.is_parkable else 0
            self.add(replica.request_on(gpu_uuid), residue_bytes, is_parkable=replica.is_parkable)

    def saved(self) -> tuple[int, int, int, int, int]:
        return self.fixed_bytes, self.resting_bytes, self.largest_bytes, self.promised_bytes, len(self.tentative)

    def restore(self, saved: tuple[int, int, int, int, int]) -> None:
        self.fixed_bytes, self.resting_bytes, self.largest_bytes, self.promised_bytes, tentative_count = saved
        del self.tentative[tentative_count:]


@dataclass(slots=True)
class Use:
    """How much of the time one deployment is in use, from what gateways say."""

    part: float
    """Between 0 and 1: a mean that forgets, `use_window_s` back."""
    heard_at_s: float
    busy_at_s: dict[str, float] = field(default_factory=dict)
    """{gateway: when it last said that it has requests for it}, of those that did not say since that it has none"""

    def is_busy(self, now_s: float, *, gone_s: float) -> bool:
        """A gateway that is gone has no requests any more."""
        return any(now_s - at_s <= gone_s for at_s in self.busy_at_s.values())


@dataclass(slots=True)
class Uses:
    """Not history: lost at a restart, and then unknown, never zero."""

    by_deployment: dict[str, Use] = field(default_factory=dict)

    def observe(self, sample: LoadSampled, now_s: float, settings: "PlacementSettings", known: Container[str]) -> None:
        """`known`: ids of the deployments that there are; of others nothing is kept."""
        for load in sample.models:
            if load.deployment_id not in known:
                continue
            use = self.by_deployment.get(load.deployment_id)
            if use is None:
                use = Use(part=settings.assumed_use_fraction, heard_at_s=now_s)
                self.by_deployment[load.deployment_id] = use
            # What was so since the last word counts for the time since then.
            weight = 1.0 - math.exp(-max(0.0, now_s - use.heard_at_s) / settings.use_window_s)
            use.part += weight * (use.is_busy(now_s, gone_s=settings.gateway_gone_s) - use.part)
            use.heard_at_s = max(use.heard_at_s, now_s)
            if load.in_flight_count + load.waiting_count > 0:
                use.busy_at_s[sample.gateway] = now_s
            else:
                use.busy_at_s.pop(sample.gateway, None)

    def part_of(self, deployment_id: str, now_s: float, settings: "PlacementSettings") -> float:
        """The part of the time that it is expected to be in use; never less than assumed where nobody spoke lately."""
        use = self.by_deployment.get(deployment_id)
        if use is None:
            return settings.assumed_use_fraction
        if now_s - use.heard_at_s > settings.use_stale_s:
            return max(use.part, settings.assumed_use_fraction)
        return use.part

    def forget(self, deployment_id: str) -> None:
        self.by_deployment.pop(deployment_id, None)


def over_use_bytes(
    state: "ClusterState",
    node: str,
    gpu: int,
    request_bytes: int,
    *,
    is_parkable: bool,
    now_s: float,
    deployment_id: str = "",
) -> int:
    """By how much the third bound is missed with one more replica on this GPU; 0 or less when it holds.

    Expected use is the sum of each parkable request times the part of the time that its deployment is in use.
    """
    rooms, settings, uses = state.index.rooms, state.settings, state.observed.uses
    account, uuid = rooms.accounts[node][gpu], rooms.gpu_uuids[node][gpu]
    turns = [(r.deployment_id, r.request_on(uuid)) for r in state.on_gpu(uuid) if r.is_parkable]
    turns += account.tentative
    fixed_bytes = account.fixed_bytes + account.claimed_bytes
    if is_parkable:
        turns.append((deployment_id, request_bytes))
    else:
        fixed_bytes += request_bytes
    expected_bytes = sum(int(size * uses.part_of(wanted, now_s, settings)) for wanted, size in turns)
    return expected_bytes - int((account.allocatable_bytes - fixed_bytes) * settings.concurrent_use_fraction)

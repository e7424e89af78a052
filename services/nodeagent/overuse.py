"""Who uses more than it is granted, and who of these must be stopped. Pure: measurements and the time are arguments."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from schemas.deployments import IsolationGrade
from schemas.units import MiB
from services.nodeagent.grades import grade_for, weakest
from services.nodeagent.inputs import OveruseSeen
from services.nodeagent.state import NodeState

SLACK_BYTES: Final = 64 * MiB
"""Between the driver's account of a process and the limits that it enforces: rounding to its pieces of memory."""

STOPPED_ON: Final = frozenset({IsolationGrade.WATCHED, IsolationGrade.BROKER})
"""Where the watch itself ends overuse. `broker`: what is not lent can only have come out of the reserve, which every
context of the GPU needs. The other grades have a limit or a budget, and overuse there is for people to look at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowed:
    """What one replica may hold on one GPU, and how strongly it is held to that."""

    replica_id: str
    lease_epoch: int
    gpu_uuid: str
    granted_bytes: int
    grade: IsolationGrade

    @property
    def key(self) -> tuple[str, int, str]:
        return self.replica_id, self.lease_epoch, self.gpu_uuid


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What it was seen to hold; None: it could not be measured, which is neither zero nor too much."""

    allowed: Allowed
    used_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    reports: tuple[OveruseSeen, ...]
    stops: tuple[Allowed, ...]
    """Engines to be stopped now; each is in the reports too."""
    blind: frozenset[tuple[str, int, str]]
    """(replica, lease epoch, GPU) that could not be measured."""


def allowed_in(state: NodeState) -> dict[tuple[str, int, str], Allowed]:
    """What every replica with a process may hold now, by its key."""
    found = {}
    for replica in state.replicas.values():
        if not replica.has_process:
            continue
        for gpu_uuid, held_bytes in replica.held_bytes.items():
            gpu = state.gpus.get(gpu_uuid)
            if gpu is None:
                continue
            grade = replica.grade or grade_for(gpu.grade, replica.proposal.deployment.engine) or IsolationGrade.WATCHED
            allowed = Allowed(
                replica_id=replica.proposal.replica_id,
                lease_epoch=replica.lease_epoch,
                gpu_uuid=gpu_uuid,
                granted_bytes=held_bytes,
                grade=weakest(grade, gpu.grade),
            )
            found[allowed.key] = allowed
    return found


def larger_of(
    before: Mapping[tuple[str, int, str], Allowed], after: Mapping[tuple[str, int, str], Allowed]
) -> list[Allowed]:
    """What was allowed at some time while it was measured: of those that are in both, the larger grant."""
    return [max(before[key], after[key], key=lambda allowed: allowed.granted_bytes) for key in after if key in before]


@dataclass(slots=True, kw_only=True)
class Judge:
    """Remembers who is beyond its grant since when."""

    grace_s: float
    """An engine that nothing else holds is stopped when it is beyond its grant for so long."""
    since_s: dict[tuple[str, int, str], float] = field(default_factory=dict)
    stopped: set[tuple[str, int]] = field(default_factory=set)
    """(replica, lease epoch): asked for once."""

    def judge(self, measured: Iterable[Measured], *, now_s: float) -> Judgement:
        """Every measurement of one look at the host.

        What is seen is told once for as long as it lasts, and a second time when its engine is stopped. A measurement
        that is missing changes nothing: not whether it is beyond, and not since when.
        """
        reports: list[OveruseSeen] = []
        stops: list[Allowed] = []
        blind = set()
        known = set()
        for seen in measured:
            allowed, used_bytes = seen.allowed, seen.used_bytes
            known.add(allowed.key)
            if used_bytes is None:
                blind.add(allowed.key)
                continue
            if used_bytes <= allowed.granted_bytes + SLACK_BYTES:
                self.since_s.pop(allowed.key, None)
                continue
            is_new = allowed.key not in self.since_s
            since_s = self.since_s.setdefault(allowed.key, now_s)
            engine = (allowed.replica_id, allowed.lease_epoch)
            is_over = allowed.grade in STOPPED_ON and now_s - since_s >= self.grace_s
            is_stopped = is_over and engine not in self.stopped
            if is_stopped:
                self.stopped.add(engine)
                stops.append(allowed)
            if is_new or is_stopped:
                reports.append(_report(allowed, used_bytes, is_stopped=is_stopped))
        self._forget(known)
        return Judgement(reports=tuple(reports), stops=tuple(stops), blind=frozenset(blind))

    def _forget(self, known: set[tuple[str, int, str]]) -> None:
        """Leases that are over."""
        for key in self.since_s.keys() - known:
            del self.since_s[key]
        self.stopped &= {key[:2] for key in known}


def _report(allowed: Allowed, used_bytes: int, *, is_stopped: bool) -> OveruseSeen:
    return OveruseSeen(
        gpu_uuid=allowed.gpu_uuid,
        replica_id=allowed.replica_id,
        used_bytes=used_bytes,
        granted_bytes=allowed.granted_bytes,
        is_stopped=is_stopped,
    )

"""What a host holds compared with what its agent's record names, as a whole. Pure: both are arguments.

The record is history, so what it does not name is nobody's: an engine of a lease that has ended, an account or images
that nobody will ask for, a cgroup without a process. What it does name is never touched here: how an engine stands is
for its own adoption to find out.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

from schemas.brokers import BrokerView
from schemas.holders import EngineView
from services.nodeagent.state import NodeState

PROBE_PREFIX: Final = "guard-probe."
"""Names under which the holder knows probes of the agent itself, by which it tries a GPU, begin so, and no replica's;
whoever starts one ends it, and the next one of a GPU ends what a killed agent left."""
LeaseKey = tuple[str, int]
"""(replica_id, lease_epoch)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What the agent knows that should be here."""

    leases: frozenset[LeaseKey]
    deployment_ids: frozenset[str]
    """That have a replica here, running or not: their images may be needed."""

    @property
    def replica_ids(self) -> frozenset[str]:
        return frozenset(replica_id for replica_id, _ in self.leases)


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """What is here."""

    engines: tuple[EngineView, ...]
    """Of the holder and of Docker, dead ones too."""
    leaves: Mapping[str, str] = field(default_factory=dict)
    """{replica_id: cgroup} without an engine."""
    broker: BrokerView | None = None
    """None: there is none, or it does not answer."""
    process_bytes: Mapping[str, Mapping[int, int | None]] = field(default_factory=dict)
    """{gpu_uuid: {pid: bytes}} as the driver lists them; None: it does not say how much."""
    owners: Mapping[int, str] = field(default_factory=dict)
    """{pid: replica_id of the engine that it belongs to}"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stray:
    """An engine that no lease names, alive or dead."""

    engine: EngineView
    is_replaced: bool
    """Another lease of its replica is in the record: whatever bears the replica's name, such as its cgroup, is that
    lease's to clear."""
    used_bytes: Mapping[str, int | None]
    """{gpu_uuid: what its processes use there}; None: the driver does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Differences:
    """Everything that is here and should not be; by replica, or by deployment."""

    strays: tuple[Stray, ...] = ()
    """To be ended."""
    leaves: Mapping[str, str] = field(default_factory=dict)
    """{replica_id: cgroup} to be removed."""
    accounts: tuple[LeaseKey, ...] = ()
    """To be closed: neither a lease nor an engine that lives bears their name."""
    deployment_ids: tuple[str, ...] = ()
    """Whose images are to be forgotten."""

    def __bool__(self) -> bool:
        return bool(self.strays or self.leaves or self.accounts or self.deployment_ids)


def record_of(state: NodeState) -> Record:
    return Record(
        leases=frozenset((replica_id, replica.lease_epoch) for replica_id, replica in state.replicas.items()),
        deployment_ids=frozenset(replica.proposal.deployment_id for replica in state.replicas.values()),
    )


def either(before: Record, after: Record) -> Record:
    """What was named before or after a look: a lease that began or ended meanwhile is no difference."""
    return Record(leases=before.leases | after.leases, deployment_ids=before.deployment_ids | after.deployment_ids)


def leased(engines: Collection[EngineView], record: Record | None) -> tuple[EngineView, ...]:
    """Those that a lease names, and the agent's own probes; all while nothing is known of leases."""
    if record is None:
        return tuple(engines)
    return tuple(
        engine
        for engine in engines
        if (engine.replica_id, engine.lease_epoch) in record.leases or engine.replica_id.startswith(PROBE_PREFIX)
    )


def differences(record: Record, here: Holdings) -> Differences:
    named = leased(here.engines, record)
    strays = [engine for engine in here.engines if engine not in named]
    return Differences(
        strays=tuple(
            Stray(
                engine=engine,
                is_replaced=engine.replica_id in record.replica_ids,
                used_bytes=_used_bytes(engine.replica_id, here),
            )
            for engine in strays
            if engine.is_alive or engine.replica_id not in record.replica_ids
        ),
        leaves={
            name: leaf
            for name, leaf in sorted(here.leaves.items())
            if name not in record.replica_ids and not name.startswith(PROBE_PREFIX)
        },
        accounts=_accounts(record, here),
        deployment_ids=_deployments(record, here),
    )


def in_both(first: Differences, second: Differences) -> Differences:
    """What two looks have found: of an engine, by its process, with what it uses at the second."""
    processes = {(stray.engine.replica_id, stray.engine.lease_epoch, stray.engine.pid) for stray in first.strays}
    return Differences(
        strays=tuple(
            stray
            for stray in second.strays
            if (stray.engine.replica_id, stray.engine.lease_epoch, stray.engine.pid) in processes
        ),
        leaves={name: leaf for name, leaf in second.leaves.items() if name in first.leaves},
        accounts=tuple(key for key in second.accounts if key in first.accounts),
        deployment_ids=tuple(name for name in second.deployment_ids if name in first.deployment_ids),
    )


def _used_bytes(replica_id: str, here: Holdings) -> dict[str, int | None]:
    found: dict[str, int | None] = {}
    for gpu_uuid, listed in here.process_bytes.items():
        sizes = [size for pid, size in listed.items() if here.owners.get(pid) == replica_id]
        if sizes:
            found[gpu_uuid] = None if None in sizes else sum(size or 0 for size in sizes)
    return found


def _accounts(record: Record, here: Holdings) -> tuple[LeaseKey, ...]:
    """An engine that lives keeps its account until it is ended: it may still map what it was lent."""
    alive = {(engine.replica_id, engine.lease_epoch) for engine in here.engines if engine.is_alive}
    accounts = here.broker.accounts if here.broker is not None else ()
    open_keys = {(account.replica_id, account.lease_epoch) for account in accounts}
    return tuple(sorted(open_keys - record.leases - alive))


def _deployments(record: Record, here: Holdings) -> tuple[str, ...]:
    """An account that bears no deployment's name keeps its images under its replica's."""
    kept = set(here.broker.image_deployment_ids) if here.broker is not None else set()
    return tuple(sorted(kept - record.deployment_ids - record.replica_ids))

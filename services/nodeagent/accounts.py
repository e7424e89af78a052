"""Who lent and who borrowed how much, on each GPU, in bytes times seconds: integrated over the times of the facts.

What is borrowed comes first from bytes that no lease asks for, then from requests that their owners do not use just
now, each in proportion. So what was borrowed is exactly what was lent, by somebody or by nobody.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from schemas.nodes import BorrowAccounted, Borrowing

if TYPE_CHECKING:
    from services.nodeagent.state import NodeState

PARTS_PER_S: Final = 1_000_000
"""Time is counted in whole microseconds, so that sums do not depend on their order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Of one GPU, since it was told last. Amounts are bytes times microseconds."""

    from_s: float
    at_s: float
    """Until then it is counted."""
    borrowed: Mapping[str, int] = field(default_factory=dict)
    """{replica_id: amount}, so for the next."""
    lent: Mapping[str, int] = field(default_factory=dict)
    free: int = 0
    tenants: Mapping[str, str] = field(default_factory=dict)
    """{replica_id: its tenant}: an account outlives a lease."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loans:
    """Of one GPU at one time, in bytes."""

    borrowed: Mapping[str, int]
    lent: Mapping[str, int]
    free: int


def loans(state: "NodeState", gpu_uuid: str) -> Loans:
    """Who has more than its request now, and whose bytes these are. Rounding counts as nobody's."""
    here = {name: r for name, r in state.replicas.items() if gpu_uuid in r.share_bytes and r.residency != "failed"}
    asked = {name: replica.request_bytes[gpu_uuid] for name, replica in here.items()}
    over = {name: replica.held_on(gpu_uuid) - asked[name] for name, replica in here.items()}
    borrowed = {name: size for name, size in over.items() if size > 0}
    unused = {name: -size for name, size in over.items() if size < 0}
    gpu = state.gpus.get(gpu_uuid)
    nobodys_bytes = max(0, (gpu.allocatable_bytes if gpu is not None else 0) - sum(asked.values()))
    total_bytes = sum(borrowed.values())
    rest_bytes = max(0, total_bytes - nobodys_bytes)
    all_unused_bytes = sum(unused.values())
    lent = {name: rest_bytes * size // all_unused_bytes for name, size in unused.items() if rest_bytes > 0}
    return Loans(borrowed=borrowed, lent=lent, free=total_bytes - sum(lent.values()))


def counted(state: "NodeState", gpu_uuid: str, account: Account, *, at_s: float) -> Account:
    """The account until this time, if nothing has changed since it was counted."""
    parts = round(max(0.0, at_s - account.at_s) * PARTS_PER_S)
    now = loans(state, gpu_uuid)
    names = {*now.borrowed, *now.lent}
    return replace(
        account,
        at_s=max(at_s, account.at_s),
        borrowed=_sum(account.borrowed, now.borrowed, parts),
        lent=_sum(account.lent, now.lent, parts),
        free=account.free + now.free * parts,
        tenants={**account.tenants, **{name: state.replicas[name].proposal.tenant for name in sorted(names)}},
    )


def _sum(before: Mapping[str, int], sizes: Mapping[str, int], parts: int) -> dict[str, int]:
    return {**before, **{name: before.get(name, 0) + size * parts for name, size in sizes.items()}}


def count(state: "NodeState", at_s: float) -> None:
    """Before a fact of this time is folded."""
    for gpu_uuid, account in state.accounts.items():
        state.accounts[gpu_uuid] = counted(state, gpu_uuid, account, at_s=at_s)


def begin(state: "NodeState", replica_id: str, at_s: float) -> None:
    """After a grant has changed: every GPU on which it borrows has an account."""
    replica = state.replicas.get(replica_id)
    if replica is not None:
        for gpu_uuid, size in replica.borrowed_bytes.items():
            if size > 0:
                state.accounts.setdefault(gpu_uuid, Account(from_s=at_s, at_s=at_s))


def fold_accounted(state: "NodeState", fact: BorrowAccounted) -> None:
    """Told: the next begins, where somebody borrows still."""
    if loans(state, fact.gpu_uuid).borrowed:
        state.accounts[fact.gpu_uuid] = Account(from_s=fact.at_s, at_s=fact.at_s)
    else:
        state.accounts.pop(fact.gpu_uuid, None)


def statements(state: "NodeState", *, now_s: float) -> Iterator[BorrowAccounted]:
    """Of every GPU whose account is long enough, or from which a lease or the last borrower has gone."""
    for gpu_uuid, known in state.accounts.items():
        has_gone = any(name not in state.replicas for name in known.tenants)
        is_over = now_s > known.from_s and not loans(state, gpu_uuid).borrowed
        if now_s - known.from_s < state.settings.account_every_s and not has_gone and not is_over:
            continue
        account = counted(state, gpu_uuid, known, at_s=now_s)
        yield BorrowAccounted(
            node=state.settings.node,
            at_s=now_s,
            gpu_uuid=gpu_uuid,
            from_s=account.from_s,
            entries=tuple(
                Borrowing(
                    replica_id=name,
                    tenant=account.tenants[name],
                    lent_byte_s=account.lent.get(name, 0) // PARTS_PER_S,
                    borrowed_byte_s=account.borrowed.get(name, 0) // PARTS_PER_S,
                )
                for name in sorted(account.tenants)
            ),
            free_byte_s=account.free // PARTS_PER_S,
        )

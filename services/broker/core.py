"""Who may hold how much device memory, and who does. Pure: no device, no socket, no clock.

An account is one start of one replica. What it holds on a GPU is the sum of its ranges there and of what it says that a
former broker lent it (*adopted*). A grant is checked before memory is looked for, so no order of asks, changed grants,
lost connections and returns hands out more than was granted at that moment.
"""

import hmac
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from schemas.brokers import AccountOpen, AccountView, EngineHello
from services.broker.refusals import Refused

ACCOUNTS_MAX: Final = 1024
"""Bound of the table. A host has some tens of engines; an agent that never closes what it opened is stopped here."""

CONNECTIONS_MAX: Final = 64
"""Of one account: an engine has one for each of its GPUs, and a host has at most 16."""

RANGES_MAX: Final = 16_384
"""Of one account. An engine has a handful for its weights, and one for each slab by which its cache grows."""

NOT_OPEN_AGAIN_S: Final = 0.2
"""After a restart of the broker the agent opens its accounts again within a look or two."""

AccountKey: TypeAlias = tuple[str, int]
"""(replica_id, lease_epoch)"""


@dataclass(slots=True, kw_only=True)
class Range:
    """Device memory in the hands of an engine, under the engine's name for it."""

    range_id: str
    gpu_uuid: str
    size_bytes: int
    """What is counted: whole granules."""
    connection_id: int
    """Of the connection that asked for it; it may have ended since."""
    process: int
    """Who may map it."""
    is_ended: bool = False
    """It was returned, or its process ended, while its memory was still being made; it counts until that is back."""


@dataclass(slots=True, kw_only=True)
class Account:
    replica_id: str
    lease_epoch: int
    tenant: str
    deployment_id: str
    secret: str
    granted_bytes: dict[str, int]
    ranges: dict[str, Range] = field(default_factory=dict)
    adopted_bytes: dict[str, dict[int, int]] = field(default_factory=dict)
    """{gpu_uuid: {process: bytes of a former broker's memory}}"""
    hello_count: int = 0
    """Since it was opened at this broker."""
    connections: dict[int, int] = field(default_factory=dict)
    """{connection: process}. A process is its pid, or minus the connection where the kernel does not say."""

    @property
    def key(self) -> AccountKey:
        return self.replica_id, self.lease_epoch

    def held_bytes(self, gpu_uuid: str) -> int:
        ranges = sum(held.size_bytes for held in self.ranges.values() if held.gpu_uuid == gpu_uuid)
        return ranges + sum(self.adopted_bytes.get(gpu_uuid, {}).values())

    def gpu_uuids(self) -> tuple[str, ...]:
        """All that it may hold memory on or does, sorted."""
        held = {held.gpu_uuid for held in self.ranges.values()}
        return tuple(sorted({*self.granted_bytes, *self.adopted_bytes, *held}))


class Accounts:
    """All accounts. Methods raise `Refused` and then have changed nothing."""

    def __init__(self) -> None:
        self.by_key: dict[AccountKey, Account] = {}

    # ---- the agent

    def open(self, wish: AccountOpen) -> Account:
        known = self.by_key.get((wish.replica_id, wish.lease_epoch))
        if known is not None:
            if not hmac.compare_digest(known.secret, wish.key):
                raise Refused(f"the account of {wish.replica_id} has another key")
            known.granted_bytes = dict(wish.granted_bytes)
            return known
        if len(self.by_key) >= ACCOUNTS_MAX:
            raise Refused(f"{ACCOUNTS_MAX} accounts are open; close those whose engines are gone")
        if not wish.key:
            raise Refused(f"the account of {wish.replica_id} needs a key")
        account = Account(
            replica_id=wish.replica_id, lease_epoch=wish.lease_epoch, tenant=wish.tenant,
            deployment_id=wish.deployment_id, secret=wish.key, granted_bytes=dict(wish.granted_bytes),
        )  # fmt: skip
        self.by_key[account.key] = account
        return account

    def close(self, key: AccountKey) -> Account | None:
        """The account with all it still held, out of the table; None when there is none."""
        return self.by_key.pop(key, None)

    # ---- the engine

    def hello(self, hello: EngineHello, *, connection_id: int, process: int) -> Account:
        """The account of this engine, with the connection entered. Again from a process: what it maps replaces that."""
        account = self.by_key.get((hello.replica_id, hello.lease_epoch))
        if account is None:
            raise Refused(
                f"no account is open for {hello.replica_id}, lease epoch {hello.lease_epoch}",
                again_after_s=NOT_OPEN_AGAIN_S,
            )
        if not hmac.compare_digest(account.secret, hello.key):
            raise Refused(f"that is not the key of {hello.replica_id}")
        if len(account.connections) >= CONNECTIONS_MAX:
            raise Refused(f"{hello.replica_id} has {CONNECTIONS_MAX} connections already")
        account.connections[connection_id] = process
        account.hello_count += 1
        self._forget_nameless(account)
        for gpu_uuid, said_bytes in sorted(hello.held_bytes.items()):
            adopted = account.adopted_bytes.setdefault(gpu_uuid, {})
            # What this broker lent, over another connection or one that was lost, is known by its range.
            adopted[process] = max(0, said_bytes - self._ranged_bytes(account, gpu_uuid, process))
        return account

    def _forget_nameless(self, account: Account) -> None:
        """A process that the kernel does not name is known by its connection alone, and says anew what it maps."""
        connected = set(account.connections.values())
        for adopted in account.adopted_bytes.values():
            for process in [process for process in adopted if process < 0 and process not in connected]:
                del adopted[process]

    def _ranged_bytes(self, account: Account, gpu_uuid: str, process: int) -> int:
        """Of ranges that this process has, or that lost their connection."""
        return sum(
            held.size_bytes
            for held in account.ranges.values()
            if held.gpu_uuid == gpu_uuid and account.connections.get(held.connection_id, process) == process
        )

    def check_room(self, account: Account, *, gpu_uuid: str, size_bytes: int) -> None:
        """Raises `Refused` where the grant has no room for so much more."""
        granted_bytes = account.granted_bytes.get(gpu_uuid)
        if granted_bytes is None:
            raise Refused(f"{account.replica_id} was granted nothing on {gpu_uuid}", short_by_bytes=size_bytes)
        short_by_bytes = account.held_bytes(gpu_uuid) + size_bytes - granted_bytes
        if short_by_bytes > 0:
            raise Refused(
                f"{account.replica_id} holds {account.held_bytes(gpu_uuid)} of {granted_bytes} bytes that it was "
                f"granted on {gpu_uuid}, and asks for {size_bytes}",
                short_by_bytes=short_by_bytes,
            )

    def hold(self, account: Account, *, gpu_uuid: str, size_bytes: int, range_id: str, connection_id: int) -> Range:
        """From now on these bytes count as held; the memory itself comes after."""
        if range_id in account.ranges:
            raise Refused(f"{account.replica_id} has a range {range_id} already")
        if len(account.ranges) >= RANGES_MAX:
            raise Refused(f"{account.replica_id} has {RANGES_MAX} ranges already; ask for larger ones")
        self.check_room(account, gpu_uuid=gpu_uuid, size_bytes=size_bytes)
        held = Range(
            range_id=range_id, gpu_uuid=gpu_uuid, size_bytes=size_bytes, connection_id=connection_id,
            process=account.connections[connection_id],
        )  # fmt: skip
        account.ranges[range_id] = held
        return held

    def range_of(self, account: Account, range_id: str) -> Range:
        held = account.ranges.get(range_id)
        if held is None:
            raise Refused(f"{account.replica_id} has no range {range_id}")
        return held

    def let_go(self, account: Account, range_id: str) -> None:
        """The range's memory is back: it no longer counts."""
        account.ranges.pop(range_id, None)

    def return_adopted(self, account: Account, *, gpu_uuid: str, size_bytes: int, connection_id: int) -> None:
        """A former broker's memory was unmapped: the driver has it back, and so much less counts."""
        adopted = account.adopted_bytes.get(gpu_uuid, {})
        process = account.connections[connection_id]
        if size_bytes > adopted.get(process, 0):
            raise Refused(
                f"{account.replica_id} returns {size_bytes} bytes on {gpu_uuid} and said that it holds "
                f"{adopted.get(process, 0)}"
            )
        adopted[process] -= size_bytes

    # ---- ends

    def disconnected(self, account: Account, connection_id: int) -> None:
        """Its ranges stay held: the process may still map them."""
        account.connections.pop(connection_id, None)

    def process_gone(self, account: Account, process: int) -> list[Range]:
        """Nothing of this process maps anything any more: its ranges, which count until they are let go."""
        for adopted in account.adopted_bytes.values():
            adopted.pop(process, None)
        return [held for held in account.ranges.values() if held.process == process]

    def holders(self, account: Account) -> set[int]:
        """The processes that may still map memory of this account."""
        adopting = {
            process
            for adopted in account.adopted_bytes.values()
            for process, size_bytes in adopted.items()
            if size_bytes
        }
        return adopting | {held.process for held in account.ranges.values()}

    # ---- views

    def adopted_bytes(self, gpu_uuid: str) -> int:
        """Of all accounts: physical memory that is not ours to hand out, though nobody else knows of it."""
        return sum(sum(account.adopted_bytes.get(gpu_uuid, {}).values()) for account in self.by_key.values())

    def views(self, images: Callable[[Account], tuple[int, tuple[str, ...], str]]) -> tuple[AccountView, ...]:
        """`images` gives sealed bytes, the images' names and where they are."""
        found = []
        for _, account in sorted(self.by_key.items()):
            sealed_bytes, image_ids, tier = images(account)
            found.append(
                AccountView(
                    replica_id=account.replica_id,
                    lease_epoch=account.lease_epoch,
                    is_connected=bool(account.connections),
                    granted_bytes=account.granted_bytes,
                    held_bytes=_held(account),
                    is_held_known=account.hello_count >= len(account.granted_bytes),
                    sealed_bytes=sealed_bytes,
                    image_ids=image_ids,
                    tier=tier,
                )
            )
        return tuple(found)


def _held(account: Account) -> dict[str, int]:
    return {gpu_uuid: account.held_bytes(gpu_uuid) for gpu_uuid in account.gpu_uuids()}

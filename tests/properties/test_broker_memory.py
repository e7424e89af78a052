"""Whatever engines ask, return and lose, in whatever order: the broker hands out what it may, and counts right."""

from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from schemas.brokers import AccountOpen, EngineHello
from schemas.units import MiB
from services.broker.core import Account, Accounts
from services.broker.pool import Piece, Plan, Pool
from services.broker.refusals import Refused

GPU = "GPU-0"
REPLICAS = st.sampled_from(["a", "b", "c"])
TENANTS = {"a": "red", "b": "red", "c": "blue"}
PIDS = {"a": 11, "b": 12, "c": 13}
GRANTS = st.integers(4, 40).map(lambda count: count * 2 * MiB)
SIZES = st.integers(1, 12).map(lambda count: count * 2 * MiB)


@dataclass
class Physical:
    """What a driver would know: every piece that exists, whose bytes are in it, and who maps it."""

    exists: dict[int, int] = field(default_factory=dict)
    dirty: dict[int, str | None] = field(default_factory=dict)
    mapped: dict[int, tuple[str, str]] = field(default_factory=dict)
    """{piece: (replica, range)}"""


class Broker(RuleBasedStateMachine):
    """Accounts and a pool, driven as the shell drives them; asks may fail half way."""

    @initialize(
        keep=st.sampled_from([None, 0, 32 * MiB]), capacity=st.integers(8, 64), grants=st.tuples(GRANTS, GRANTS, GRANTS)
    )
    def start(self, keep: int | None, capacity: int, grants: tuple[int, ...]) -> None:
        self.accounts = Accounts()
        self.pool = Pool(capacity_bytes=capacity * 2 * MiB, piece_bytes_max=16 * MiB, keep_bytes=keep)
        self.physical = Physical()
        self.granted: dict[str, int] = {}
        self.pieces: dict[tuple[str, str], tuple[Piece, ...]] = {}
        self.connections: dict[str, int] = {}
        self.next_piece_id = 1
        self.next_connection = 1
        self.adopted: dict[str, int] = {}
        for replica, granted in zip(sorted(TENANTS), grants, strict=True):
            self.open(replica, granted)
            self.connect(replica, 0)

    # ---- what happens

    @rule(replica=REPLICAS, size=GRANTS)
    def open(self, replica: str, size: int) -> None:
        self.accounts.open(
            AccountOpen(
                replica_id=replica, lease_epoch=1, tenant=TENANTS[replica], key="k", granted_bytes={GPU: size}
            )
        )  # fmt: skip
        self.granted[replica] = size

    @rule(replica=REPLICAS, held=st.sampled_from([0, 0, 4 * MiB, 16 * MiB]))
    def connect(self, replica: str, held: int) -> None:
        """A first hello may tell of a former broker's memory, if the GPU could have had it."""
        account = self.account(replica)
        if account is None or replica in self.connections:
            return
        first = not account.ranges and not self.adopted.get(replica)
        held = min(held, self.pool.capacity_bytes - self.pool.made_bytes - sum(self.adopted.values())) if first else 0
        said = {GPU: held} if first and held > 0 else {}
        self.accounts.hello(
            EngineHello(replica_id=replica, lease_epoch=1, key="k", held_bytes=said),
            connection_id=self.next_connection, process=PIDS[replica],
        )  # fmt: skip
        if said:
            self.adopted[replica] = held
        self.connections[replica] = self.next_connection
        self.next_connection += 1

    @rule(replica=REPLICAS)
    def disconnect(self, replica: str) -> None:
        account = self.account(replica)
        if account is not None and replica in self.connections:
            self.accounts.disconnected(account, self.connections.pop(replica))

    @rule(
        replica=REPLICAS,
        size=SIZES,
        name=st.sampled_from(["w", "k1", "k2"]),
        fails_after=st.sampled_from([0, 1, 9, 9, 9]),
    )
    def ask(self, replica: str, size: int, name: str, fails_after: int) -> None:
        account = self.account(replica)
        if account is None or replica not in self.connections:
            return
        try:
            self.accounts.hold(
                account, gpu_uuid=GPU, size_bytes=size, range_id=name, connection_id=self.connections[replica]
            )
        except Refused:
            return
        adopted = self.accounts.adopted_bytes(GPU)
        if self.pool.short_bytes(size, adopted_bytes=adopted):
            self.accounts.let_go(account, name)
            return
        plan = self.pool.plan(size, tenant=account.tenant, adopted_bytes=adopted)
        assert size == sum(free.piece.size_bytes for free in plan.take) + sum(plan.make_bytes)
        self.pool.begin(plan)
        if fails_after < len(plan.make_bytes):
            self.fail(account, name, plan, made_count=fails_after)
        else:
            self.carry_out(account, name, plan)

    def carry_out(self, account: Account, name: str, plan: Plan) -> None:
        self.destroy(plan.destroy)
        for free in plan.take:
            if free.tenant != account.tenant:
                self.physical.dirty[free.piece.piece_id] = account.tenant  # scrubbed
            assert account.tenant == self.physical.dirty[free.piece.piece_id], "somebody else's bytes"
        made = tuple(self.make(size, account.tenant) for size in plan.make_bytes)
        for piece in made:
            self.pool.made(piece, is_lent=True)
        for size in plan.spare_bytes:
            self.pool.made(self.make(size, None), is_lent=False)
        pieces = (*(free.piece for free in plan.take), *made)
        for piece in pieces:
            assert piece.piece_id not in self.physical.mapped, "two engines would map one piece"
            self.physical.mapped[piece.piece_id] = account.replica_id, name
        self.pieces[account.replica_id, name] = pieces

    def fail(self, account: Account, name: str, plan: Plan, *, made_count: int) -> None:
        """The driver refuses after some pieces were made: all go back, whose bytes they hold is forgotten."""
        self.destroy(plan.destroy)
        made = tuple(self.make(size, None) for size in plan.make_bytes[:made_count])
        for piece in made:
            self.pool.made(piece, is_lent=True)
        self.pool.not_made(sum(plan.make_bytes[made_count:]) + sum(plan.spare_bytes))
        self.destroy(self.pool.give_back((*(free.piece for free in plan.take), *made), tenant=None))
        self.accounts.let_go(account, name)

    @rule(replica=REPLICAS, name=st.sampled_from(["w", "k1", "k2"]))
    def give_back(self, replica: str, name: str) -> None:
        account = self.account(replica)
        if account is not None and name in account.ranges:
            self.take(account, name)

    @rule(replica=REPLICAS, size=SIZES)
    def give_back_adopted(self, replica: str, size: int) -> None:
        account = self.account(replica)
        if account is None or replica not in self.connections:
            return
        try:
            self.accounts.return_adopted(
                account, gpu_uuid=GPU, size_bytes=size, connection_id=self.connections[replica]
            )
        except Refused:
            assert size > self.adopted.get(replica, 0)
        else:
            self.adopted[replica] -= size

    @rule(replica=REPLICAS, closes=st.sampled_from([False, False, True]))
    def end(self, replica: str, closes: bool) -> None:
        """Its process is gone; perhaps the agent closes the account too."""
        account = self.account(replica)
        if account is None:
            return
        if replica in self.connections:
            self.accounts.disconnected(account, self.connections.pop(replica))
        for held in self.accounts.process_gone(account, PIDS[replica]):
            self.take(account, held.range_id)
        self.adopted.pop(replica, None)
        if closes:
            self.accounts.close(account.key)
            self.granted.pop(replica, None)

    # ---- inside

    def account(self, replica: str) -> Account | None:
        return self.accounts.by_key.get((replica, 1))

    def take(self, account: Account, name: str) -> None:
        pieces = self.pieces.pop((account.replica_id, name))
        for piece in pieces:
            del self.physical.mapped[piece.piece_id]
        self.destroy(self.pool.give_back(pieces, tenant=account.tenant))
        self.accounts.let_go(account, name)

    def make(self, size: int, tenant: str | None) -> Piece:
        piece = Piece(piece_id=self.next_piece_id, size_bytes=size)
        self.next_piece_id += 1
        self.physical.exists[piece.piece_id] = size
        self.physical.dirty[piece.piece_id] = tenant
        return piece

    def destroy(self, pieces: tuple[Piece, ...]) -> None:
        for piece in pieces:
            assert piece.piece_id not in self.physical.mapped, "memory in use was destroyed"
            del self.physical.exists[piece.piece_id]
        self.pool.destroyed(pieces)

    # ---- what holds always

    @precondition(lambda self: hasattr(self, "pool"))
    @invariant()
    def what_is_held_and_what_is_free_is_all_that_was_made(self) -> None:
        held = sum(held.size_bytes for account in self.accounts.by_key.values() for held in account.ranges.values())
        assert self.pool.lent_bytes == held
        assert 0 == self.pool.planned_bytes == self.pool.leaving_bytes
        assert sum(self.physical.exists.values()) == held + self.pool.free_bytes

    @precondition(lambda self: hasattr(self, "pool"))
    @invariant()
    def the_gpu_is_never_promised_twice(self) -> None:
        assert self.accounts.adopted_bytes(GPU) == sum(self.adopted.values())
        assert self.pool.made_bytes + self.accounts.adopted_bytes(GPU) <= self.pool.capacity_bytes

    @precondition(lambda self: hasattr(self, "pool"))
    @invariant()
    def the_pool_keeps_its_bound(self) -> None:
        assert self.pool.keep_bytes is None or self.pool.free_bytes <= self.pool.keep_bytes


class Grants(Broker):
    """The same, where grants only grow: then nobody ever holds more than he was granted."""

    @rule(replica=REPLICAS, size=GRANTS)
    def open(self, replica: str, size: int) -> None:
        super().open(replica, max(size, self.granted.get(replica, 0)))

    @precondition(lambda self: hasattr(self, "pool"))
    @invariant()
    def nobody_holds_more_than_he_was_granted(self) -> None:
        for replica, granted in self.granted.items():
            account: Any = self.account(replica)
            assert account.held_bytes(GPU) <= max(granted, self.adopted.get(replica, 0))


COMMON = settings(max_examples=120, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck))
TestBroker = Broker.TestCase
TestBroker.settings = COMMON
TestGrants = Grants.TestCase
TestGrants.settings = COMMON

"""The route table: a close is never answered while some gateway may still route to the replica."""

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from schemas.holders import RouteLease
from services.holder.core import GATEWAYS_MAX, Closing, RouteTable, check_invariants, first_version

TERM_S = 1.0
REPLICAS = ("a", "b")


def new_table(*, now_s: float = 100.0, born_ago_s: float = 10.0) -> RouteTable:
    return RouteTable(
        term_s=TERM_S,
        born_version=first_version(unix_ms=1_000, former_first_version=None),
        born_at_s=now_s - born_ago_s,
    )


def wish(table: RouteTable, gateway: str, *, seen_version: int, now_s: float) -> RouteLease:
    table.acknowledge(gateway, seen_version=seen_version)
    return table.grant(gateway, wished_at_s=now_s, now_s=now_s)


@dataclass
class Gateway:
    """A gateway as its contract says it behaves."""

    name: str
    version: int = -1
    open_ids: frozenset[str] = frozenset()
    until_s: float = 0.0

    def receive(self, answer: RouteLease, *, sent_at_s: float) -> None:
        if answer.version >= self.version:
            self.version = answer.version
            self.open_ids = frozenset(answer.open_ids)
            self.until_s = max(self.until_s, sent_at_s + answer.term_s)

    def may_route_to(self, replica_id: str, *, now_s: float) -> bool:
        return now_s < self.until_s and replica_id in self.open_ids


@dataclass
class Wish:
    """One request of a gateway on its way: sent, waiting at the holder, answered."""

    gateway: Gateway
    seen_version: int
    sent_at_s: float
    came_at_s: float = 0.0
    answer: RouteLease | None = None


@dataclass
class Network:
    sent: list[Wish] = field(default_factory=list)
    waiting: list[Wish] = field(default_factory=list)
    answered: list[Wish] = field(default_factory=list)


class RoutesMachine(RuleBasedStateMachine):
    """Gateways, a holder that also restarts, and a network that delays, reorders and loses what they say."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 100.0
        self.unix_ms = 1_000
        self.table = new_table(now_s=self.now_s)
        self.gateways = [Gateway("g0")]
        self.gateway_count = 1
        self.net = Network()
        self.closings: list[Closing] = []
        self.closed: set[str] = set()
        self.is_restart_due = False

    @rule(seconds=st.sampled_from([0.05, 0.3, 0.75, 1.02]))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        self.unix_ms += int(seconds * 1000)

    @rule(replica_id=st.sampled_from(REPLICAS), endpoint=st.sampled_from(["x", "y"]))
    def agent_opens(self, replica_id: str, endpoint: str) -> None:
        self.table.open(replica_id, endpoint=endpoint)
        self.closed.discard(replica_id)

    @rule(replica_id=st.sampled_from(REPLICAS))
    def agent_closes(self, replica_id: str) -> None:
        self.closings.append(Closing(replica_id=replica_id, version=self.table.close(replica_id)))

    @rule(replica_id=st.sampled_from(REPLICAS))
    def agent_forgets(self, replica_id: str) -> None:
        self.table.forget(replica_id)

    @rule(data=st.data())
    def gateway_is_answered_at_once(self, data: st.DataObject) -> None:
        gateway = data.draw(st.sampled_from(self.gateways))
        answer = wish(self.table, gateway.name, seen_version=gateway.version, now_s=self.now_s)
        gateway.receive(answer, sent_at_s=self.now_s)

    @rule(data=st.data())
    def gateway_wishes(self, data: st.DataObject) -> None:
        gateway = data.draw(st.sampled_from(self.gateways))
        self.net.sent.append(Wish(gateway=gateway, seen_version=gateway.version, sent_at_s=self.now_s))

    @precondition(lambda self: self.net.sent)
    @rule(data=st.data(), waits=st.booleans())
    def wish_comes(self, data: st.DataObject, waits: bool) -> None:
        came = self.net.sent.pop(data.draw(st.integers(0, len(self.net.sent) - 1)))
        came.came_at_s = self.now_s
        is_up_to_date = self.table.acknowledge(came.gateway.name, seen_version=came.seen_version)
        self.net.waiting.append(came)
        if not (is_up_to_date and waits):
            self.answer(came)

    @precondition(lambda self: self.net.waiting)
    @rule(data=st.data())
    def holder_answers(self, data: st.DataObject) -> None:
        self.answer(data.draw(st.sampled_from(self.net.waiting)))

    def answer(self, came: Wish) -> None:
        self.net.waiting.remove(came)
        came.answer = self.table.grant(came.gateway.name, wished_at_s=came.came_at_s, now_s=self.now_s)
        self.net.answered.append(came)

    @precondition(lambda self: self.net.answered)
    @rule(data=st.data(), is_lost=st.booleans())
    def answer_comes(self, data: st.DataObject, is_lost: bool) -> None:
        back = self.net.answered.pop(data.draw(st.integers(0, len(self.net.answered) - 1)))
        if not is_lost and back.answer:
            back.gateway.receive(back.answer, sent_at_s=back.sent_at_s)

    @rule()
    def half_a_restart(self) -> None:
        """Restarts are rarer than the rest, or nothing ever grows old enough to go wrong."""
        self.is_restart_due = True

    @precondition(lambda self: len(self.gateways) < 3)
    @rule()
    def gateway_comes(self) -> None:
        self.gateways.append(Gateway(f"g{self.gateway_count}"))
        self.gateway_count += 1

    @precondition(lambda self: self.is_restart_due)
    @rule(clock_went_back_ms=st.sampled_from([0, 0, 900]))
    def holder_restarts(self, clock_went_back_ms: int) -> None:
        """Its engines are dead, and so is every wish that waited there."""
        self.is_restart_due = False
        self.unix_ms = max(0, self.unix_ms - clock_went_back_ms)
        self.table = RouteTable(
            term_s=TERM_S,
            born_version=first_version(unix_ms=self.unix_ms, former_first_version=self.table.born_version),
            born_at_s=self.now_s,
        )
        self.net.waiting.clear()
        self.closings.clear()
        self.closed.clear()

    def holder_looks(self) -> None:
        """As often as it can: an answer that is too early once is too early for good."""
        for closing in list(self.closings):
            if closing.is_overtaken(self.table):
                self.closings.remove(closing)
            elif closing.next_look_s(self.table, now_s=self.now_s) is None:
                self.closings.remove(closing)
                self.closed.add(closing.replica_id)

    @invariant()
    def no_gateway_routes_to_what_was_answered_closed(self) -> None:
        self.holder_looks()
        check_invariants(self.table)
        for replica_id in self.closed:
            assert not [g.name for g in self.gateways if g.may_route_to(replica_id, now_s=self.now_s)]

    def teardown(self) -> None:
        """Liveness: without another word from any gateway every close ends within a term of now."""
        self.now_s += TERM_S * 1.02
        for closing in self.closings:
            if not closing.is_overtaken(self.table):
                assert closing.next_look_s(self.table, now_s=self.now_s) is None


TestRoutes = RoutesMachine.TestCase
TestRoutes.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)


def test_a_close_waits_for_the_word_of_a_gateway_and_not_for_its_term() -> None:
    table = new_table()
    table.open("a", endpoint="http://x")
    lease = wish(table, "g", seen_version=-1, now_s=100.0)
    closing = Closing(replica_id="a", version=table.close("a"))

    assert closing.next_look_s(table, now_s=100.1) is not None
    table.acknowledge("g", seen_version=lease.version)
    assert closing.next_look_s(table, now_s=100.2) is not None
    table.acknowledge("g", seen_version=table.version)

    assert closing.next_look_s(table, now_s=100.3) is None
    assert closing.expired_count == 0


def test_a_gateway_that_falls_silent_holds_a_close_for_its_term_and_is_counted() -> None:
    table = new_table()
    table.open("a", endpoint="http://x")
    wish(table, "g", seen_version=-1, now_s=100.0)
    closing = Closing(replica_id="a", version=table.close("a"))

    next_look_s = closing.next_look_s(table, now_s=100.5)

    assert next_look_s is not None
    assert 101.0 <= next_look_s < 101.1
    assert closing.next_look_s(table, now_s=next_look_s) is None
    assert closing.expired_count == 1


def test_a_gateway_that_came_after_the_close_is_not_waited_for() -> None:
    table = new_table()
    closing = Closing(replica_id="a", version=table.close("a"))
    wish(table, "late", seen_version=-1, now_s=100.0)

    assert closing.next_look_s(table, now_s=100.0) is None


def test_a_new_holder_answers_no_close_before_leases_of_its_former_life_have_ended() -> None:
    table = new_table(born_ago_s=0.0)
    closing = Closing(replica_id="a", version=table.close("a"))

    assert closing.next_look_s(table, now_s=100.9) is not None
    assert closing.next_look_s(table, now_s=101.1) is None


def test_a_version_of_another_life_counts_as_nothing_seen() -> None:
    table = new_table()
    table.open("a", endpoint="http://x")
    wish(table, "g", seen_version=-1, now_s=100.0)
    closing = Closing(replica_id="a", version=table.close("a"))

    assert not table.acknowledge("g", seen_version=table.version + 5)

    assert closing.next_look_s(table, now_s=100.1) is not None


def test_opening_and_closing_twice_is_one_change() -> None:
    table = new_table()

    opened = table.open("a", endpoint="http://x")
    assert table.open("a", endpoint="http://x") == opened == table.version
    closed = table.close("a")
    assert table.close("a") == closed == table.version == opened + 1


def test_another_endpoint_is_a_change_that_gateways_are_told() -> None:
    table = new_table()
    table.open("a", endpoint="http://x")
    before = table.version

    table.open("a", endpoint="http://y")

    assert table.version > before
    assert wish(table, "g", seen_version=before, now_s=100.0).endpoints == ("http://y",)


def test_the_table_of_gateways_is_bounded_and_drops_those_that_are_gone() -> None:
    table = new_table()
    for number in range(GATEWAYS_MAX):
        wish(table, f"g{number}", seen_version=-1, now_s=100.0)

    assert not table.is_full("g0", now_s=100.0)
    assert table.is_full("one-more", now_s=100.0)
    assert not table.is_full("one-more", now_s=102.0)


def test_an_older_wish_that_is_answered_later_does_not_shorten_a_lease() -> None:
    table = new_table()
    table.open("a", endpoint="http://x")
    table.grant("g", wished_at_s=100.5, now_s=100.5)
    table.grant("g", wished_at_s=100.0, now_s=100.6)
    closing = Closing(replica_id="a", version=table.close("a"))

    assert closing.next_look_s(table, now_s=101.4) is not None


def test_versions_grow_over_restarts_even_when_the_clock_goes_back() -> None:
    """A gateway ignores what is older than it knows, and would ignore a holder that began below."""
    first = first_version(unix_ms=2_000, former_first_version=None)

    assert first_version(unix_ms=2_001, former_first_version=None) > first
    assert first_version(unix_ms=500, former_first_version=first) > first + 1_000_000
    assert first_version(unix_ms=4_102_444_800_000, former_first_version=first) < 2**53


def test_a_forgotten_replica_is_in_neither_list_and_gateways_are_told() -> None:
    table = new_table()
    table.open("a", endpoint="http://x")
    before = table.version

    table.forget("a")
    table.forget("a")

    assert table.version == before + 1
    assert (table.open_ids(), table.closed_ids()) == ((), ())

"""What the guard's benchmark counts as beyond a grant."""

from benchmarks.guard_backends import Seen
from benchmarks.guard_stage import CONTEXT_BYTES, RESERVE_BYTES, TAKER_BYTES
from schemas.units import MiB


def test_what_one_has_beyond_its_grant_is_not_made_up_for_by_another() -> None:
    seen = Seen(grants={"a": TAKER_BYTES, "b": TAKER_BYTES})

    seen.add({"a": TAKER_BYTES + 3 * MiB, "b": TAKER_BYTES - 10 * MiB, "owner": 1000 * MiB}, {})
    seen.add({"a": TAKER_BYTES, "b": TAKER_BYTES}, {})

    assert 3 * MiB == seen.beyond_bytes, "the most at one moment, the owner not counted"


def test_with_a_broker_memory_of_the_reserve_is_told_apart_from_memory_of_others() -> None:
    seen = Seen(grants={"a": TAKER_BYTES}, is_brokered=True)

    seen.add({"a": CONTEXT_BYTES + 20 * MiB}, {"a": TAKER_BYTES - CONTEXT_BYTES})
    assert (0, 20 * MiB) == (seen.beyond_bytes, seen.reserve_taken_bytes)

    seen.add({"a": RESERVE_BYTES + 5 * MiB}, {"a": TAKER_BYTES - CONTEXT_BYTES})
    assert 5 * MiB == seen.beyond_bytes

    seen.add({"a": CONTEXT_BYTES}, {"a": TAKER_BYTES})
    assert CONTEXT_BYTES == seen.beyond_bytes, "lent beyond its grant, its context counted"

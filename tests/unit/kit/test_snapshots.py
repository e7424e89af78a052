"""What a snapshot holds, what it is refused for, and that a start from one equals a fold from zero."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import pytest

from kit.processor import Processor
from kit.service import Service, digest
from kit.snapshots import (
    Snapshot,
    SnapshotUnusable,
    encode_state,
    pack,
    restore_state,
    state_types,
    unpack,
)
from tests.unit.kit.test_processor import History, started
from tests.unit.kit.toy import ToyState, toy


def restored(snapshot: Snapshot, service: Service[ToyState] | None = None) -> Processor[ToyState]:
    processor = Processor(service or toy(), None, writer="autoscaler", instance="two")
    processor.restore(unpack(snapshot.position, pack(snapshot)))
    return processor


def handled(history: History, processor: Processor[ToyState], *models: str) -> None:
    for model in models:
        processor.receive_stored(history.retire(model))
        history.commit(processor)


def test_what_follows_a_snapshot_folds_to_the_live_state() -> None:
    history = History()
    live = started(history)
    handled(history, live, "a", "b")
    taken = live.snapshot()
    handled(history, live, "c", "d")

    processor = restored(taken)
    processor.replay(history.stored[taken.position.read_seq :])

    assert digest(processor.state) == digest(live.state)
    assert (processor.last_seq, processor.last_hash, processor.cursor_seq, processor.writer_epoch) == (
        live.last_seq,
        live.last_hash,
        live.cursor_seq,
        live.writer_epoch,
    )
    assert processor.skipped_count == 0


def test_what_is_read_again_although_the_snapshot_holds_it_changes_nothing() -> None:
    """A reader that starts too early: own facts are known by their sequence, others' by their chain."""
    history = History()
    live = started(history)
    handled(history, live, "a", "b")

    processor = restored(live.snapshot())
    processor.replay(history.stored)

    assert digest(processor.state) == digest(live.state)


def test_others_facts_that_were_handled_in_silence_are_not_handled_again() -> None:
    history = History()
    live = started(history)
    handled(history, live, "a")
    live.mark_progress()
    history.commit(live)

    processor = restored(live.snapshot())
    processor.replay(history.stored[live.read_seq :])
    processor.take_over(now_s=200.0)
    processor.started(writer_epoch=len(history.stored) + 1)

    assert processor.catch_up(entries_max=100)
    assert processor.batch.is_empty


def test_a_snapshot_knows_the_newest_own_ids() -> None:
    history = History()
    live = started(history)
    handled(history, live, "a")

    processor = restored(live.snapshot())

    assert all(processor.knows(stored.id) for stored in history.stored if processor.is_own(stored))


def test_a_snapshot_is_taken_only_while_nothing_waits() -> None:
    history = History()
    live = started(history)
    live.receive_stored(history.retire("a"))

    with pytest.raises(AssertionError):
        live.snapshot()


def of_another_version() -> Service[ToyState]:
    service = toy()
    service.state_version = 2
    return service


def of_other_types() -> Service[Any]:
    @dataclass(slots=True)
    class Wider(ToyState):
        more: list[int] = field(default_factory=list)

    service: Service[Any] = toy()
    service.new_state = lambda _: Wider()
    return service


@pytest.mark.parametrize(
    ("service", "why"),
    [(of_another_version, "its state has version 1, not 2"), (of_other_types, "types have changed")],
)
def test_a_snapshot_of_another_build_is_refused(service: Callable[[], Service[Any]], why: str) -> None:
    taken = started(History()).snapshot()

    with pytest.raises(SnapshotUnusable, match=why):
        restored(taken, service())


def test_a_snapshot_of_another_writer_or_format_is_refused() -> None:
    taken = started(History()).snapshot()

    for changes in ({"writer": "swapper"}, {"format_version": 99}):
        other = msgspec.structs.replace(taken, position=msgspec.structs.replace(taken.position, **changes))
        with pytest.raises(SnapshotUnusable):
            restored(other)


@pytest.mark.parametrize("at", [0, 10, -5])
def test_damaged_bytes_are_refused(at: int) -> None:
    taken = started(History()).snapshot()
    packed = bytearray(pack(taken))
    packed[at] ^= 0xFF

    with pytest.raises(SnapshotUnusable):
        unpack(taken.position, bytes(packed))


def test_a_docstring_does_not_change_the_fingerprint_and_a_field_does() -> None:
    @dataclass
    class State:
        """One text."""

        count: int = 0

    first = state_types(State())

    @dataclass
    class State:  # type: ignore[no-redef]
        """Another text."""

        count: int = 0

    second = state_types(State())

    @dataclass
    class State:  # type: ignore[no-redef]
        count: float = 0

    assert first == second != state_types(State())


def test_what_is_observed_and_set_is_no_part_of_a_snapshot() -> None:
    state = ToyState(decided=["a"], observed={"a": 1})
    fresh = ToyState()

    restore_state(fresh, encode_state(state))

    assert fresh == replace(state, observed={})

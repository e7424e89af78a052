"""Folding in handling order, the hash chain, and what a rebuild must find again."""

from kit.bus import Stored
from kit.processor import CHAIN_START, SILENT_INPUTS_MAX, Delivery, Processor, chain_hash
from kit.service import digest
from schemas.catalogue import encode
from schemas.gateways import ModelWanted
from schemas.history import Progressed
from schemas.messages import fact_subject
from schemas.placement import DeploymentRetired
from tests.unit.kit.toy import Reminder, ToyState, Work, toy


class History:
    """A stream in a list, with a well-behaved placement writer."""

    def __init__(self) -> None:
        self.stored: list[Stored] = []
        self._placement_hash = CHAIN_START

    def retire(self, model: str, *, previous_hash: str | None = None) -> Stored:
        number = len(self.stored) + 1
        fact = DeploymentRetired(
            at_s=float(number),
            inbox_seq=number,
            command_id=f"c{number}",
            tenant="t",
            deployment_id=f"d-{model}",
            model=model,
        )
        body, subject, entry_id = encode(fact), fact_subject("placement", fact), f"placement:x:{number}"
        previous = self._placement_hash if previous_hash is None else previous_hash
        if previous_hash is None:
            self._placement_hash = chain_hash(previous, id=entry_id, subject=subject, body=body)
        return self.store(subject, body, entry_id=entry_id, previous_hash=previous)

    def store(
        self, subject: str, body: bytes, *, entry_id: str, previous_hash: str, cursor_seq: int = 0, cause_seq: int = 0
    ) -> Stored:
        stored = Stored(
            seq=len(self.stored) + 1,
            time_s=float(len(self.stored) + 1),
            subject=subject,
            body=body,
            id=entry_id,
            cause_seq=cause_seq,
            cursor_seq=cursor_seq,
            previous_hash=previous_hash,
        )
        self.stored.append(stored)
        return stored

    def commit(self, processor: Processor[ToyState]) -> None:
        batch = processor.take_batch()
        for entry in batch.entries:
            self.store(
                entry.subject,
                entry.body,
                entry_id=entry.id,
                previous_hash=entry.previous_hash,
                cursor_seq=entry.cursor_seq,
                cause_seq=entry.cause_seq,
            )
        processor.committed(batch, last_seq=len(self.stored))


def started(history: History, *, instance: str = "one") -> Processor[ToyState]:
    processor = Processor(toy(), None, writer="autoscaler", instance=instance)
    processor.replay(history.stored)
    batch = processor.take_over(now_s=100.0)
    for entry in batch.entries:
        history.store(
            entry.subject, entry.body, entry_id=entry.id, previous_hash=entry.previous_hash, cursor_seq=entry.cursor_seq
        )
    processor.committed(batch, last_seq=len(history.stored))
    processor.started(writer_epoch=len(history.stored))
    processor.catch_up(entries_max=100)
    return processor


def test_a_rebuild_gives_the_state_in_handling_order_not_in_stream_order() -> None:
    """Both retirements were in the stream before the first decision was; each was handled on its own."""
    history = History()
    processor = started(history)
    first, second = history.retire("a"), history.retire("b")
    processor.receive_stored(first)
    processor.receive_stored(second)
    history.commit(processor)

    rebuilt = started(history, instance="two")

    assert ["a:after 1", "b:after 2"] == processor.state.decided
    assert digest(rebuilt.state) == digest(processor.state)


def test_facts_beyond_the_last_cursor_are_handled_after_a_restart() -> None:
    history = History()
    started(history)
    history.retire("a")

    rebuilt = started(history, instance="two")

    assert ["a:after 1"] == rebuilt.state.decided
    assert [Work(model="a")] == [released.outcome for released in rebuilt.batch.released]


def test_a_long_absence_is_caught_up_in_bounded_batches() -> None:
    history = History()
    for number in range(5):
        history.retire(f"m{number}")
    processor = Processor(toy(), None, writer="autoscaler", instance="one")
    processor.replay(history.stored)
    processor.take_over(now_s=0.0)
    processor.started(writer_epoch=6)

    sizes = []
    is_done = False
    while not is_done:
        is_done = processor.catch_up(entries_max=2)
        sizes.append(len(processor.take_batch().entries))

    assert [2, 2, 1] == sizes


def test_an_input_that_was_handled_is_not_handled_again_after_a_restart() -> None:
    history = History()
    processor = started(history)
    processor.receive_stored(history.retire("a"))
    history.commit(processor)

    rebuilt = started(history, instance="two")

    assert ["a:after 1"] == rebuilt.state.decided
    assert rebuilt.batch.is_empty


def test_every_own_fact_names_its_cause_and_how_far_its_writer_had_read() -> None:
    history = History()
    processor = started(history)
    retired = history.retire("a")
    processor.receive_stored(retired)

    (entry,) = processor.take_batch().entries

    assert (retired.seq, retired.seq) == (entry.cause_seq, entry.cursor_seq)


def test_a_foreign_fact_that_does_not_continue_its_chain_is_skipped() -> None:
    """Somebody with the right to publish wrote under placement's prefix."""
    history = History()
    processor = started(history)
    processor.receive_stored(history.retire("forged", previous_hash="0123"))
    processor.receive_stored(history.retire("a"))

    assert ["a"] == processor.state.retired
    assert 1 == processor.skipped_count


def test_an_own_fact_of_a_stale_writer_is_skipped_on_replay() -> None:
    history = History()
    processor = started(history)
    processor.receive_stored(history.retire("a"))
    history.commit(processor)
    forged = history.stored[-1]
    history.store(forged.subject, forged.body, entry_id="autoscaler:ghost:0", previous_hash="not the last hash")

    rebuilt = started(history, instance="two")

    assert ["a:after 1"] == rebuilt.state.decided
    assert 1 == rebuilt.skipped_count


def test_unreadable_foreign_bytes_are_skipped_without_breaking_the_chain() -> None:
    history = History()
    processor = started(history)
    garbage = history.store("sublet.fact.placement.x", b"\xff{", entry_id="", previous_hash="")
    processor.receive_stored(garbage)
    processor.receive_stored(history.retire("a"))

    assert ["a"] == processor.state.retired


def test_time_never_goes_back() -> None:
    history = History()
    processor = started(history)
    processor.receive(Delivery(input=Reminder(model="late"), now_s=1.0))

    assert 100.0 == processor.now_s


def test_observations_are_no_part_of_history() -> None:
    history = History()
    processor = started(history)
    before = digest(processor.state)
    wanted = ModelWanted(gateway="g", deployment_id="d", model="a", replica_id="r")
    processor.receive(Delivery(input=wanted, now_s=101.0))

    assert {"a": 1} == processor.state.observed
    assert before == digest(processor.state)


def test_a_long_silence_moves_the_cursor_on() -> None:
    """Facts that lead to nothing must not be handled again for ever."""
    history = History()
    service = toy()
    service.handlers.pop(DeploymentRetired)
    processor = Processor(service, None, writer="autoscaler", instance="one")
    processor.take_over(now_s=0.0)
    processor.started(writer_epoch=1)
    for number in range(SILENT_INPUTS_MAX):
        processor.receive_stored(history.retire(f"m{number}"))

    (entry,) = processor.take_batch().entries

    assert b"history.progressed" in entry.body
    assert SILENT_INPUTS_MAX == entry.cursor_seq
    assert Progressed is not None


def test_the_chain_hash_depends_on_every_part() -> None:
    parts = {"id": "i", "subject": "s", "body": b"b"}
    base = chain_hash("0", **parts)  # type: ignore[arg-type]

    changed = [
        chain_hash("1", **parts),  # type: ignore[arg-type]
        chain_hash("0", id="j", subject="s", body=b"b"),
        chain_hash("0", id="i", subject="t", body=b"b"),
        chain_hash("0", id="i", subject="s", body=b"c"),
        chain_hash("0", id="is", subject="", body=b"b"),
    ]

    assert len({base, *changed}) == 6


def test_a_fact_of_a_clock_that_is_ahead_is_as_old_as_its_place_in_the_stream() -> None:
    """Else whoever waits until some time has passed since waits for as long as the clock is ahead."""
    heard: list[float] = []
    service = toy()
    service.folds[DeploymentRetired] = lambda _, fact: heard.append(fact.at_s)
    processor = Processor(service, None, writer="autoscaler", instance="one")
    fact = DeploymentRetired(at_s=3600.0, inbox_seq=1, command_id="c", tenant="t", deployment_id="d", model="m")
    body, subject = encode(fact), fact_subject("placement", fact)

    processor.receive_stored(
        Stored(seq=1, time_s=2.0, subject=subject, body=body, id="placement:x:1", previous_hash=CHAIN_START)
    )

    assert [2.0] == heard

"""Continuous batching without time: steps in, progress out."""

import random

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from engines.model.batching import (
    Batcher,
    BatchLimits,
    Chunk,
    KvGeometry,
    Progress,
    QueueFull,
    SequenceRequest,
    Step,
    TooLong,
)

PLAIN = KvGeometry(block_bytes=1024, state_blocks=0)


def batcher(
    *,
    block_limit: int = 100,
    sequences_max: int = 8,
    step_tokens_max: int = 64,
    waiting_max: int = 100,
    geometry: KvGeometry = PLAIN,
) -> Batcher:
    limits = BatchLimits(sequences_max=sequences_max, step_tokens_max=step_tokens_max, waiting_max=waiting_max)
    return Batcher(geometry=geometry, limits=limits, block_limit=block_limit)


def request(sequence_id: int, *, prompt: int = 16, output: int = 4) -> SequenceRequest:
    return SequenceRequest(sequence_id=sequence_id, prompt_tokens=prompt, output_tokens=output)


def one_step(subject: Batcher) -> tuple[Progress, ...]:
    step = subject.next_step()
    assert step is not None
    return subject.finish(step)


def test_the_step_that_ends_a_prompt_yields_the_first_token() -> None:
    subject = batcher()
    subject.submit(request(1, output=2))

    assert one_step(subject) == (Progress(1, 1, is_ended=False),)
    assert one_step(subject) == (Progress(1, 2, is_ended=True),)
    assert subject.next_step() is None


def test_a_newcomer_joins_the_next_step_of_those_that_run() -> None:
    subject = batcher()
    subject.submit(request(1))
    one_step(subject)
    subject.submit(request(2, prompt=10))

    assert subject.next_step() == Step(prefill=(Chunk(2, 0, 10),), decode=(1,), context_tokens=17)


def test_a_long_prompt_is_done_in_chunks_and_does_not_stop_the_others() -> None:
    subject = batcher(step_tokens_max=32)
    subject.submit(request(1))
    one_step(subject)
    subject.submit(request(2, prompt=50))

    first = subject.next_step()
    assert first is not None
    assert (first.prefill, first.decode) == ((Chunk(2, 0, 31),), (1,))
    assert [item.sequence_id for item in subject.finish(first)] == [1]
    second = subject.next_step()
    assert second is not None
    assert (second.prefill, second.decode) == ((Chunk(2, 31, 19),), (1,))
    assert {item.sequence_id for item in subject.finish(second)} == {1, 2}


def test_what_does_not_fit_beside_the_running_ones_waits_until_memory_is_free() -> None:
    subject = batcher(block_limit=3)
    subject.submit(request(1, prompt=32, output=1))
    subject.submit(request(2, prompt=32, output=1))

    assert one_step(subject) == (Progress(1, 1, is_ended=True),)
    assert one_step(subject) == (Progress(2, 1, is_ended=True),)


def test_a_sequence_holds_the_blocks_of_what_it_has_not_of_what_it_may_get() -> None:
    subject = batcher(block_limit=100)
    subject.submit(request(1, prompt=16, output=1000))
    used = []
    for _ in range(18):
        one_step(subject)
        used.append(subject.used_blocks)

    assert (used[0], used[1], used[16], used[17]) == (1, 2, 2, 3)


def test_the_one_admitted_last_gives_way_and_is_computed_again_with_what_it_had_produced() -> None:
    subject = batcher(block_limit=3)
    subject.submit(request(1, prompt=16, output=20))
    subject.submit(request(2, prompt=15, output=20))
    one_step(subject)
    one_step(subject)  # 1 needs a second block for its 17th token; 2 has 15 + 1 in one
    assert (subject.used_blocks, subject.preemption_count) == (3, 0)

    step = subject.next_step()  # 2 would need a second one
    assert step is not None
    assert (step.decode, step.prefill) == ((1,), ())
    assert (subject.preemption_count, subject.waiting_count) == (1, 1)
    subject.finish(step)
    while subject.running_count:
        assert [item.sequence_id for item in one_step(subject)] == [1]
        if subject.running_count == 0:
            break
    again = subject.next_step()
    assert again is not None
    assert again.prefill == (Chunk(2, 0, 17),)
    assert subject.finish(again) == (Progress(2, 3, is_ended=False),)


def test_found_prompt_tokens_take_blocks_but_no_computation() -> None:
    limits = BatchLimits(sequences_max=8, step_tokens_max=64, prefix_hit_fraction=0.75)
    subject = Batcher(geometry=PLAIN, limits=limits, block_limit=100)
    subject.submit(request(1, prompt=64))
    step = subject.next_step()

    assert step is not None
    assert step.prefill == (Chunk(1, 48, 16),)
    assert (subject.prefix_asked_tokens, subject.prefix_found_tokens) == (64, 48)
    assert subject.used_blocks == 4
    assert subject.finish(step) == (Progress(1, 1, is_ended=False),)


def test_of_a_prompt_found_in_full_the_last_token_is_computed() -> None:
    subject = Batcher(geometry=PLAIN, limits=BatchLimits(prefix_hit_fraction=1.0), block_limit=100)
    subject.submit(request(1, prompt=64))
    step = subject.next_step()

    assert step is not None
    assert step.prefill == (Chunk(1, 63, 1),)


def test_behind_a_sliding_window_blocks_are_free() -> None:
    geometry = KvGeometry.of(kv_bytes_per_token=64, state_bytes_per_sequence=0, window_tokens=64)

    assert geometry.blocks(64) == 4
    assert geometry.blocks(10_000) == 5


def test_a_large_request_is_not_overtaken_by_small_ones_behind_it() -> None:
    subject = batcher(block_limit=4)
    subject.submit(request(1, prompt=16, output=10))
    one_step(subject)
    subject.submit(request(2, prompt=48, output=10))
    subject.submit(request(3, prompt=1, output=1))

    one_step(subject)

    assert (subject.running_count, subject.waiting_count) == (1, 2)


def test_the_batch_has_a_bound() -> None:
    subject = batcher(sequences_max=2)
    for sequence_id in (1, 2, 3):
        subject.submit(request(sequence_id))
    one_step(subject)

    assert (subject.running_count, subject.waiting_count) == (2, 1)


def test_a_request_that_could_never_fit_is_refused_with_the_bound() -> None:
    subject = batcher(block_limit=4)

    assert subject.submit(request(1, prompt=60, output=5)) == TooLong(token_count=65, tokens_max=64)


def test_the_fixed_state_of_a_sequence_counts() -> None:
    """A Mamba model of this state fits two sequences, however short they are."""
    geometry = KvGeometry.of(kv_bytes_per_token=64, state_bytes_per_sequence=10 * 1024 - 1)
    subject = batcher(geometry=geometry, block_limit=25)
    for sequence_id in (1, 2, 3):
        subject.submit(request(sequence_id, prompt=1, output=1))
    step = subject.next_step()

    assert geometry.blocks(2) == 11
    assert step is not None
    assert [chunk.sequence_id for chunk in step.prefill] == [1, 2]


def test_a_full_queue_refuses() -> None:
    subject = batcher(waiting_max=1)
    subject.submit(request(1))

    assert subject.submit(request(2)) == QueueFull(waiting_count=1)


def test_a_cancelled_sequence_frees_its_memory_at_once() -> None:
    subject = batcher()
    subject.submit(request(1))
    subject.submit(request(2))
    step = subject.next_step()
    assert step is not None

    assert subject.cancel(1)
    assert subject.used_blocks == PLAIN.blocks(16)
    assert [item.sequence_id for item in subject.finish(step)] == [2]
    assert not subject.cancel(1)


def test_a_waiting_sequence_can_be_cancelled() -> None:
    subject = batcher(sequences_max=1)
    subject.submit(request(1))
    one_step(subject)
    subject.submit(request(2))

    assert subject.cancel(2)
    assert subject.waiting_count == 0


def test_a_request_for_no_output_ends_with_its_prompt() -> None:
    subject = batcher()
    subject.submit(request(1, output=0))

    assert one_step(subject) == (Progress(1, 0, is_ended=True),)
    assert subject.is_idle


def test_a_smaller_limit_spares_the_running_and_drops_what_can_no_longer_fit() -> None:
    subject = batcher(block_limit=10)
    subject.submit(request(1, prompt=64, output=16))  # 5 blocks
    one_step(subject)
    subject.submit(request(2, prompt=64, output=16))
    subject.submit(request(3, prompt=16, output=16))

    assert subject.set_block_limit(2) == (2,)
    assert (subject.running_count, subject.waiting_count) == (1, 1)
    assert subject.used_blocks == 5  # its whole length, so that it ends
    for _ in range(15):
        one_step(subject)
    assert (subject.running_count, subject.waiting_count, subject.used_blocks) == (0, 1, 0)


def test_a_running_sequence_that_cannot_end_in_what_is_left_is_dropped() -> None:
    subject = batcher(block_limit=6)
    subject.submit(request(1, prompt=16, output=64))  # 5 blocks in the end
    subject.submit(request(2, prompt=16, output=64))
    one_step(subject)

    assert subject.set_block_limit(3) == (2,)
    assert subject.used_blocks == 5


@st.composite
def lives(draw: st.DrawFn) -> tuple[Batcher, list[SequenceRequest], random.Random]:
    state_blocks = draw(st.integers(0, 3))
    subject = batcher(
        block_limit=draw(st.integers(4, 40)),
        sequences_max=draw(st.integers(1, 6)),
        step_tokens_max=draw(st.integers(8, 64)),
        geometry=KvGeometry(block_bytes=1024, state_blocks=state_blocks),
    )
    shapes = draw(st.lists(st.tuples(st.integers(1, 200), st.integers(0, 30)), min_size=1, max_size=20))
    requests = [request(index, prompt=prompt, output=output) for index, (prompt, output) in enumerate(shapes)]
    return subject, requests, random.Random(draw(st.integers(0, 1000)))


@given(lives())
def test_every_accepted_request_gets_all_its_tokens_and_all_memory_comes_back(
    life: tuple[Batcher, list[SequenceRequest], random.Random],
) -> None:
    subject, requests, dice = life
    counts: dict[int, int] = {}
    ended: set[int] = set()
    pending = list(requests)
    accepted: dict[int, SequenceRequest] = {}
    for _ in range(10_000):
        while pending and dice.random() < 0.3:
            arrival = pending.pop()
            if subject.submit(arrival) is None:
                accepted[arrival.sequence_id] = arrival
        step = subject.next_step()
        subject.check_invariants()
        assert subject.used_blocks <= subject.block_limit
        if step is None:
            if not pending:
                break
            continue
        assert step.prefill_tokens + len(step.decode) <= subject.limits.step_tokens_max
        for item in subject.finish(step):
            assert item.output_count - counts.get(item.sequence_id, 0) in {0, 1}
            counts[item.sequence_id] = item.output_count
            if item.is_ended:
                ended.add(item.sequence_id)
        subject.check_invariants()

    assert subject.is_idle
    assert subject.used_blocks == 0
    event(f"preempted: {subject.preemption_count > 0}")
    assert ended == set(accepted)
    assert all(counts[key] == arrival.output_tokens for key, arrival in accepted.items())


@pytest.mark.parametrize("block_count", [0, 2, 3, 50])
def test_the_longest_sequence_is_the_longest_that_fits(block_count: int) -> None:
    geometry = KvGeometry(block_bytes=1024, state_blocks=2)
    tokens_max = geometry.tokens_max(block_count)

    assert not tokens_max or geometry.blocks(tokens_max) <= block_count
    assert geometry.blocks(tokens_max + 1) > block_count


@given(lives(), st.lists(st.integers(0, 40), min_size=1, max_size=5))
def test_whatever_becomes_of_the_limit_each_request_ends_or_is_dropped(
    life: tuple[Batcher, list[SequenceRequest], random.Random], limits: list[int]
) -> None:
    subject, requests, dice = life
    left = {arrival.sequence_id: arrival for arrival in requests if subject.submit(arrival) is None}
    counts = dict.fromkeys(left, 0)
    for _ in range(20_000):
        if limits and dice.random() < 0.05:
            used_before = subject.used_blocks
            limit_before = subject.block_limit
            for key in subject.set_block_limit(limits.pop()):
                del left[key]
            assert subject.used_blocks <= max(used_before, limit_before)
        used_before = subject.used_blocks
        step = subject.next_step()
        subject.check_invariants()
        assert subject.used_blocks <= max(subject.block_limit, used_before)
        if step is None:
            break
        for item in subject.finish(step):
            assert item.output_count - counts[item.sequence_id] in {0, 1}
            counts[item.sequence_id] = item.output_count
            if item.is_ended:
                assert item.output_count == left.pop(item.sequence_id).output_tokens

    assert subject.is_idle
    assert not left

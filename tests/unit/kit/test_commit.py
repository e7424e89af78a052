"""How a batch becomes appends: at once if one holds it, else the last input's facts by themselves."""

import pytest

from kit.bus import APPEND_ENTRIES_MAX, Entry
from kit.bus_memory import MemoryBus, MemoryServer
from kit.commit import DirectCommitter, appends
from kit.processor import Batch, Delivery, Processor
from schemas.messages import prefix_of
from tests.unit.kit.toy import WorkDone, toy

pytestmark = pytest.mark.anyio


def batch(count: int, *, last_input_start: int) -> Batch:
    entries = [
        Entry(subject="sublet.fact.autoscaler.x", body=b"{}", id=f"e{n}", cause_seq=0, cursor_seq=0, previous_hash="")
        for n in range(count)
    ]
    return Batch(entries=entries, last_input_start=last_input_start)


@pytest.mark.parametrize(
    ("count", "last_input_start", "expected"),
    [
        (APPEND_ENTRIES_MAX, 400, [APPEND_ENTRIES_MAX]),
        (1089, 400, [400, 689]),
        (1400, 0, [1000, 400]),
        (1401, 400, [400, 1000, 1]),
    ],
)
def test_no_append_is_larger_than_the_server_takes(count: int, last_input_start: int, expected: list[int]) -> None:
    made = batch(count, last_input_start=last_input_start)

    parts = list(appends(made))

    assert expected == [len(part) for part in parts]
    assert made.entries == [entry for part in parts for entry in part]


async def test_a_batch_of_two_appends_is_stored_whole_and_in_order() -> None:
    async with MemoryBus(MemoryServer()) as bus:
        processor = Processor(toy(), None, writer="autoscaler", instance="a")
        made = batch(1089, last_input_start=400)

        last_seq = await DirectCommitter(bus, processor).commit_durably(made)

        newest = await bus.last(prefix_of("autoscaler"))
    assert newest is not None
    assert (1089, "e1088") == (newest.seq, newest.id)
    assert 1089 == last_seq == processor.last_seq


def test_the_processor_tells_where_the_last_inputs_facts_begin() -> None:
    processor = Processor(toy(), None, writer="autoscaler", instance="a")

    for model in ("a", "b", "c"):
        processor.receive(Delivery(input=WorkDone(model=model), now_s=0.0))

    assert 3 == len(processor.batch.entries)
    assert 2 == processor.batch.last_input_start

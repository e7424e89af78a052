"""The engine's client of the memory broker: what it asks, what it maps, and what it does when the broker goes."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from devices.api import Device, OutOfMemory, Region
from engines.backing import BrokerBacking, at_once
from engines.simulated.memory import KvSlabs
from engines.store.connection import CONNECT_WITHIN_S, StoreError, StoreSettings, settings_from
from engines.store.memory import GpuStore
from schemas.brokers import (
    BrokerDone,
    BrokerRefused,
    EngineHello,
    ImageRestore,
    ImageSeal,
    MemoryAsk,
    MemoryReturn,
)
from tests.unit.engines.store_broker import HANG_UP, PIECE_BYTES, PaperDevice, PlayedBroker, grant

pytestmark = pytest.mark.processes

SIZE_BYTES = 8 * PIECE_BYTES


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[PlayedBroker]:
    played = PlayedBroker(tmp_path / "broker")
    yield played
    played.stop()


@pytest.fixture
def device() -> PaperDevice:
    return PaperDevice()


@pytest.fixture
def store(broker: PlayedBroker, device: PaperDevice) -> Iterator[GpuStore]:
    opened = GpuStore(cast("Device", device), broker.settings())
    yield opened
    opened.close()


@pytest.fixture
def region(device: PaperDevice) -> Region:
    return device.reserve(SIZE_BYTES)


@pytest.fixture(autouse=True)
def no_descriptor_is_left_open() -> Iterator[None]:
    """Each descriptor left open would keep device memory from everybody."""
    yield
    pieces = [link for link in Path("/proc/self/fd").iterdir() if _target(link).startswith("/memfd:piece")]
    assert not pieces


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:
        return ""


def test_the_first_line_says_who_asks(broker: PlayedBroker, store: GpuStore) -> None:
    assert EngineHello(replica_id="r/0", lease_epoch=3, key="secret") == broker.wait_for(EngineHello)


def test_memory_comes_and_goes_at_the_same_address(
    broker: PlayedBroker, store: GpuStore, device: PaperDevice, region: Region
) -> None:
    for _ in range(2):
        taken = store.take(region, "a")
        assert (SIZE_BYTES, 0.125) == (taken.size_bytes, taken.reserve_s)
        assert [PIECE_BYTES] * 8 == device.mapped[region.region_id]
        assert SIZE_BYTES == store.held_bytes == sum(broker.ranges.values())

        assert SIZE_BYTES == store.give_back(region, "a")
        assert not device.mapped
        assert 0 == store.held_bytes == sum(broker.ranges.values())

    assert store.give_back(region, "a") == 0


def test_more_pieces_than_one_message_carries_arrive_in_their_order(store: GpuStore, device: PaperDevice) -> None:
    large = device.reserve(600 * PIECE_BYTES)

    store.take(large, "large")

    assert [PIECE_BYTES] * 600 == device.mapped[large.region_id]


def test_many_ranges_are_had_in_one_question_and_each_is_given_back_alone(
    broker: PlayedBroker, store: GpuStore, device: PaperDevice
) -> None:
    regions = {f"kv-{number}": device.reserve(SIZE_BYTES) for number in range(40)}

    taken = store.take_all(regions)

    assert 1 == len(broker.told(MemoryAsk))
    assert 40 * SIZE_BYTES == taken.size_bytes == store.held_bytes == sum(broker.ranges.values())
    assert all([PIECE_BYTES] * 8 == device.mapped[region.region_id] for region in regions.values())
    assert SIZE_BYTES == store.give_back(regions["kv-7"], "kv-7")
    assert "kv-7" not in broker.ranges
    assert 39 * SIZE_BYTES == store.held_bytes == sum(broker.ranges.values())


def test_ranges_of_which_the_driver_does_not_map_one_are_all_returned(
    broker: PlayedBroker, store: GpuStore, device: PaperDevice
) -> None:
    regions = {f"kv-{number}": device.reserve(SIZE_BYTES) for number in range(4)}
    device.error, device.good_imports = OutOfMemory(call="cuMemMap", code="OUT", requested_bytes=1, free_bytes=0), 2

    with pytest.raises(OutOfMemory):
        store.take_all(regions)

    assert (0, {}, {}) == (store.held_bytes, broker.ranges, device.mapped)


def test_other_memory_may_be_asked_for_once_a_restore_has_its_own(
    broker: PlayedBroker, store: GpuStore, region: Region
) -> None:
    broker._images["image"] = region.size_bytes
    lent: list[int] = []

    store.restore(
        region, "a", image_id="image", generation=1, on_lent=lambda: lent.append(len(broker.told(ImageRestore)))
    )

    assert [1] == lent


def test_a_refusal_leaves_nothing_and_says_what_was_missing(
    broker: PlayedBroker, store: GpuStore, device: PaperDevice, region: Region
) -> None:
    broker.answers[MemoryAsk] = lambda _: [BrokerRefused(refused="the grant is full", short_by_bytes=77)]

    with pytest.raises(StoreError, match="the grant is full") as refused:
        store.take(region, "a")

    assert (77, True) == (refused.value.short_by_bytes, refused.value.is_refused)
    assert not device.mapped
    assert store.held_bytes == 0


def test_a_refusal_that_will_pass_is_waited_for(broker: PlayedBroker, store: GpuStore, region: Region) -> None:
    answers: Iterator[list[Any]] = iter(
        [[BrokerRefused(refused="not yet", again_after_s=0.01)], [grant("a", SIZE_BYTES)]]
    )
    broker.answers[MemoryAsk] = lambda _: next(answers)

    assert SIZE_BYTES == store.take(region, "a").size_bytes


def test_what_the_driver_does_not_map_is_returned_at_once(
    broker: PlayedBroker, store: GpuStore, device: PaperDevice, region: Region
) -> None:
    for ask in (lambda: store.take(region, "a"), lambda: restored(broker, store, region)):
        device.error = OutOfMemory(call="cuMemMap", code="OUT", requested_bytes=1, free_bytes=0)
        with pytest.raises(OutOfMemory):
            ask()
        assert not broker.ranges
        assert store.held_bytes == 0


def restored(broker: PlayedBroker, store: GpuStore, region: Region) -> Any:
    broker._images["image"] = region.size_bytes
    return store.restore(region, "a", image_id="image", generation=1)


def test_a_restore_maps_before_the_copy_is_over(
    broker: PlayedBroker, store: GpuStore, device: PaperDevice, region: Region
) -> None:
    store.take(region, "a")
    store.seal("a", image_id="image", generation=4, content_id="bytes")
    store.give_back(region, "a")

    result = store.restore(region, "a", image_id="image", generation=4)

    assert (SIZE_BYTES, 0.5, 0.25) == (result.copied_bytes, result.copy_s, result.wait_s)
    assert region.region_id in device.mapped
    assert ImageSeal(range_id="a", image_id="image", generation=4, content_id="bytes") == broker.wait_for(ImageSeal)
    assert broker.wait_for(ImageRestore).generation == 4


def test_a_restore_whose_copy_fails_leaves_nothing(
    broker: PlayedBroker, store: GpuStore, device: PaperDevice, region: Region
) -> None:
    def answers(ask: ImageRestore) -> list[Any]:
        broker.ranges["a"] = SIZE_BYTES
        return [grant("a", SIZE_BYTES), BrokerRefused(refused="the image is damaged")]

    broker.answers[ImageRestore] = answers
    with pytest.raises(StoreError, match="damaged"):
        store.restore(region, "a", image_id="image", generation=1)

    assert not device.mapped
    assert not broker.ranges


# ---- a broker that goes ----


def test_another_broker_is_told_what_is_still_mapped_and_gets_it_back_by_its_size(
    broker: PlayedBroker, store: GpuStore, device: PaperDevice, region: Region
) -> None:
    store.take(region, "a")
    broker.stop()
    second = PlayedBroker(broker.path)
    try:
        assert {"GPU-1": SIZE_BYTES} == second.wait_for(EngineHello).held_bytes  # nobody asked anything
        other = device.reserve(SIZE_BYTES)
        store.take(other, "b")

        store.give_back(region, "a")
        store.give_back(other, "b")

        expected = [
            MemoryReturn(range_id="a", gpu_uuid="GPU-1", size_bytes=SIZE_BYTES),
            MemoryReturn(range_id="b"),
        ]
        assert expected == second.told(MemoryReturn)
        assert not device.mapped
    finally:
        second.stop()


def test_a_question_that_the_broker_died_of_is_asked_again_once(
    broker: PlayedBroker, store: GpuStore, device: PaperDevice, region: Region
) -> None:
    answers: Iterator[list[Any]] = iter([[HANG_UP], [grant("a", SIZE_BYTES)]])
    broker.answers[MemoryAsk] = lambda _: next(answers)

    store.take(region, "a")

    assert [{}, {}] == [hello.held_bytes for hello in broker.told(EngineHello)]
    assert store.held_bytes == SIZE_BYTES


def test_a_question_that_kills_every_broker_is_given_up(
    broker: PlayedBroker, store: GpuStore, device: PaperDevice, region: Region
) -> None:
    broker.answers[MemoryAsk] = lambda _: [HANG_UP]

    with pytest.raises(StoreError) as lost:
        store.take(region, "a")

    assert not lost.value.is_refused
    assert len(broker.told(MemoryAsk)) == 2
    assert not device.mapped


def test_a_broker_that_dies_within_a_copy_leaves_nothing_mapped_when_it_is_asked_again(
    broker: PlayedBroker, store: GpuStore, device: PaperDevice, region: Region
) -> None:
    """Half of an image must never be taken for the whole."""
    broker._images["image"] = SIZE_BYTES
    mapped_at_hello: list[int] = []
    was_asked = threading.Event()

    def dies_once(ask: ImageRestore) -> list[Any]:
        if was_asked.is_set():
            return broker._answers(ask)
        was_asked.set()
        return [grant("a", SIZE_BYTES), HANG_UP]

    def hello(question: EngineHello) -> list[Any]:
        mapped_at_hello.append(sum(question.held_bytes.values()))
        return [BrokerDone()]

    broker.answers[ImageRestore] = dies_once
    broker.answers[EngineHello] = hello

    store.restore(region, "a", image_id="image", generation=1)

    assert [0] == mapped_at_hello
    assert SIZE_BYTES == store.held_bytes


def test_memory_of_a_broker_that_is_gone_cannot_be_sealed(
    broker: PlayedBroker, store: GpuStore, region: Region
) -> None:
    store.take(region, "a")
    broker.stop()
    second = PlayedBroker(broker.path)
    try:
        second.wait_for(EngineHello)
        with pytest.raises(StoreError, match="a broker that is gone"):
            store.seal("a", image_id="image", generation=1, content_id="")
    finally:
        second.stop()


def test_parking_needs_no_broker(broker: PlayedBroker, store: GpuStore, device: PaperDevice, region: Region) -> None:
    store.take(region, "a")
    broker.stop()

    assert SIZE_BYTES == store.give_back(region, "a")
    assert not device.mapped


def test_parking_does_not_wait_for_a_broker_that_does_not_know_the_engine_yet(
    broker: PlayedBroker, store: GpuStore, device: PaperDevice, region: Region
) -> None:
    """Nor starves while the client says hello again and again."""
    store.take(region, "a")
    broker.stop()
    second = PlayedBroker(broker.path)
    second.answers[EngineHello] = lambda _: [BrokerRefused(refused="no account is open", again_after_s=0.01)]
    try:
        second.wait_for(EngineHello)
        started_s = time.monotonic()

        assert SIZE_BYTES == store.give_back(region, "a")

        assert time.monotonic() - started_s < CONNECT_WITHIN_S / 2
        assert not device.mapped
    finally:
        second.stop()


def test_a_wrong_key_is_told_at_once(broker: PlayedBroker, device: PaperDevice) -> None:
    settings = StoreSettings(socket_path=str(broker.path), replica_id="r/0", lease_epoch=3, key="guessed")

    with pytest.raises(StoreError, match="another key"):
        GpuStore(cast("Device", device), settings)


# ---- the engine's own words ----


def test_a_refusal_for_want_of_bytes_is_out_of_memory(
    broker: PlayedBroker, device: PaperDevice, region: Region
) -> None:
    broker.answers[MemoryAsk] = lambda _: [BrokerRefused(refused="the grant is full", short_by_bytes=PIECE_BYTES)]
    backing = BrokerBacking(cast("Device", device), broker.settings())

    with pytest.raises(OutOfMemory, match="the grant is full") as raised:
        backing.back(region, "kv-0")

    assert (SIZE_BYTES, SIZE_BYTES - PIECE_BYTES) == (raised.value.requested_bytes, raised.value.free_bytes)
    backing.close()


def test_a_cache_grows_in_one_question_to_what_there_is_room_for(broker: PlayedBroker, device: PaperDevice) -> None:
    granted_bytes = 5 * SIZE_BYTES

    def within_the_grant(question: MemoryAsk) -> list[Any]:
        short_by_bytes = question.size_bytes * (1 + len(question.more_range_ids)) - granted_bytes
        if short_by_bytes > 0:
            return [BrokerRefused(refused="the grant is full", short_by_bytes=short_by_bytes)]
        return broker._answers(question)

    broker.answers[MemoryAsk] = within_the_grant
    backing = BrokerBacking(cast("Device", device), broker.settings())
    cache = KvSlabs(backing, slab_bytes=SIZE_BYTES)

    with pytest.raises(OutOfMemory):
        cache.grow(9)

    assert (5, 5, 2) == (cache.backed_count, len(broker.ranges), len(broker.told(MemoryAsk)))
    backing.close()


def test_replicas_have_images_of_their_own(broker: PlayedBroker, device: PaperDevice, region: Region) -> None:
    """They share bytes by content; under one name, the update of one would replace the weights of the other."""
    backing = BrokerBacking(cast("Device", device), broker.settings())
    backing.back(region, "weights-0")
    backing.seal(region, "weights-0", generation=1, content_id="")

    assert broker.wait_for(ImageSeal).image_id == "r/0/weights-0"
    backing.close()


def test_the_environment_says_where_the_broker_is_and_who_asks() -> None:
    environment = {
        "SUBLET_BROKER_SOCKET": "/run/broker",
        "SUBLET_BROKER_KEY": "k",
        "SUBLET_REPLICA_ID": "r",
        "SUBLET_LEASE_EPOCH": "7",
    }

    assert StoreSettings(socket_path="/run/broker", replica_id="r", lease_epoch=7, key="k") == settings_from(
        environment
    )
    assert settings_from({}) is None
    assert "k'" not in repr(settings_from(environment))
    for name in ("SUBLET_BROKER_KEY", "SUBLET_REPLICA_ID", "SUBLET_LEASE_EPOCH"):
        with pytest.raises(ValueError, match=name):
            settings_from({**environment, name: ""})


def test_calls_on_several_gpus_run_at_the_same_time_and_all_end() -> None:
    meeting = threading.Barrier(3, timeout=20)
    ended: list[int] = []

    def call(number: int) -> int:
        meeting.wait()
        ended.append(number)
        if number:
            raise OutOfMemory(call="x", code=str(number), requested_bytes=1, free_bytes=0)
        return number

    with pytest.raises(OutOfMemory):
        at_once([lambda: call(0), lambda: call(1), lambda: call(2)])
    assert [0, 1, 2] == sorted(ended)
    assert os.getpid() == at_once([os.getpid])[0]

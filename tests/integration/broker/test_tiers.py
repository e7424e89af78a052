"""Host memory, disk, bytes kept once, and a pool that keeps everything."""

import time

import pytest

from devices.api import MiB
from tests.integration.broker.conftest import MakeWorld, World
from tests.integration.broker.peers import Agent, EngineProcess, RefusedAnswer, until

WEIGHTS = 64 * MiB


def account(world: World, agent: Agent, replica_id: str, *, tenant: str = "a", gpu: int = 0) -> EngineProcess:
    agent.open(replica_id, {world.host.uuids()[gpu]: 512 * MiB}, tenant=tenant, deployment=f"d-{tenant}")
    engine = world.engine(replica_id, gpu=gpu)
    engine.do("hello")
    return engine


def parked(engine: EngineProcess, byte: int, *, content_id: str = "", range_id: str = "weights") -> dict[str, object]:
    """Weights full of one byte, sealed and given back."""
    engine.do("ask", range_id, WEIGHTS)
    engine.do("fill", range_id, byte)
    sealed: dict[str, object] = engine.do("seal", range_id, "image", 1, content_id)
    engine.do("give_back", range_id)
    return sealed


def test_the_image_that_was_unused_longest_goes_to_disk_and_comes_back_right(world: MakeWorld) -> None:
    one = world(host_budget_bytes=2 * WEIGHTS, disk_budget_bytes=2 * WEIGHTS)
    agent = one.agent()
    engines = [account(one, agent, name) for name in ("first", "second", "third")]
    for number, engine in enumerate(engines):
        parked(engine, 40 + number)

    view = agent.view()
    assert ["disk", "host", "host"] == [view.tier for view in view.accounts]
    assert WEIGHTS == view.disk_used_bytes
    for number, engine in enumerate(engines):
        assert WEIGHTS == engine.do("restore", "again", "image", 1)["copied_bytes"]
        assert [40 + number] == engine.do("bytes_seen", "again")


def test_both_tiers_full_is_said_before_the_first_park(world: MakeWorld) -> None:
    one = world(host_budget_bytes=2 * WEIGHTS, disk_budget_bytes=2 * WEIGHTS)
    agent = one.agent()
    agent.reserve("first", 2 * WEIGHTS)
    agent.reserve("second", WEIGHTS)

    with pytest.raises(RefusedAnswer, match="host memory for images is full") as refused:
        agent.reserve("third", WEIGHTS)

    assert WEIGHTS == refused.value.short_by_bytes
    agent.reserve("first", 0)
    agent.reserve("third", WEIGHTS)


def test_with_both_tiers_as_full_as_they_may_be_every_image_still_wakes(world: MakeWorld) -> None:
    one = world(host_budget_bytes=WEIGHTS, disk_budget_bytes=2 * WEIGHTS)
    agent = one.agent()
    first, second = account(one, agent, "first"), account(one, agent, "second")
    parked(first, 41)
    parked(second, 42)
    third = account(one, agent, "third")
    assert "and so is the disk" in str(parked(third, 43)["refused"])

    for _ in range(2):
        for engine, byte in ((first, 41), (second, 42)):
            assert WEIGHTS == engine.do("restore", "again", "image", 1)["copied_bytes"]
            assert [byte] == engine.do("bytes_seen", "again")
            engine.do("give_back", "again")


def test_a_prefetch_brings_an_image_from_disk_before_the_wake(world: MakeWorld) -> None:
    one = world(host_budget_bytes=WEIGHTS, disk_budget_bytes=3 * WEIGHTS)
    agent = one.agent()
    first, second = account(one, agent, "first"), account(one, agent, "second")
    parked(first, 41)
    parked(second, 42)
    assert ["disk", "host"] == [view.tier for view in agent.view().accounts]

    agent.prefetch("first")

    assert ["host", "disk"] == [view.tier for view in agent.view().accounts]


def test_an_image_on_disk_that_was_damaged_is_refused(world: MakeWorld) -> None:
    one = world(host_budget_bytes=WEIGHTS, disk_budget_bytes=3 * WEIGHTS)
    agent = one.agent()
    first, second = account(one, agent, "first"), account(one, agent, "second")
    parked(first, 41)
    parked(second, 42)
    path = next((one.folder / "broker" / "images").glob("slab-*"))
    with path.open("r+b") as slab:
        slab.write(b"flipped")

    assert "checksum" in first.do("restore", "weights", "image", 1)["refused"]
    assert [0, 0] == [sum(view.held_bytes.values()) for view in agent.view().accounts]


def test_replicas_of_one_tenant_keep_equal_bytes_once_and_tenants_never_share(world: MakeWorld) -> None:
    one = world()
    agent = one.agent()
    first, second = account(one, agent, "first"), account(one, agent, "second")
    stranger = account(one, agent, "stranger", tenant="b")
    parked(first, 41)
    parked(second, 41)
    parked(stranger, 41)

    until(lambda: agent.view().host[0].shared_bytes == WEIGHTS)

    assert 2 * WEIGHTS == agent.view().host[0].used_bytes
    agent.forget("d-b")
    until(lambda: agent.view().host[0].used_bytes == WEIGHTS)
    second.do("restore", "again", "image", 1)
    assert [41] == second.do("bytes_seen", "again")


def test_content_that_is_known_by_name_is_not_copied_again(world: MakeWorld) -> None:
    one = world()
    agent = one.agent()
    first, second = account(one, agent, "first"), account(one, agent, "second")
    stranger = account(one, agent, "stranger", tenant="b")

    copied = [parked(engine, 41, content_id="sha256:abc")["copied_bytes"] for engine in (first, second, stranger)]

    assert [WEIGHTS, 0, WEIGHTS] == copied
    assert 2 * WEIGHTS == agent.view().host[0].used_bytes


def test_a_newer_generation_takes_the_place_of_the_older(world: MakeWorld) -> None:
    one = world()
    agent = one.agent()
    engine = account(one, agent, "r")
    engine.do("ask", "weights", WEIGHTS)
    for generation, byte in ((1, 41), (2, 42)):
        engine.do("fill", "weights", byte)
        engine.do("seal", "weights", "image", generation)

    assert WEIGHTS == agent.view().host[0].used_bytes
    assert "generation 2 already" in engine.do("seal", "weights", "image", 1)["refused"]
    engine.do("give_back", "weights")
    engine.do("restore", "weights", "image", 2)
    assert [42] == engine.do("bytes_seen", "weights")


def test_a_broker_that_keeps_everything_leaves_nothing_to_allocate_behind_its_back(world: MakeWorld) -> None:
    one = world(hold="all", reserve_bytes=32 * MiB)
    agent = one.agent()
    free = one.host.status()["devices"][0]
    until(lambda: free["total_bytes"] - free["reserved_bytes"] - one.used_bytes() <= 32 * MiB)
    pooled_bytes = agent.view().gpus[0].pooled_bytes

    engine = account(one, agent, "r")
    assert [32 * MiB, 32 * MiB, 6 * MiB] == engine.do("ask", "weights", 70 * MiB)["piece_bytes"]
    assert [0] == engine.do("bytes_seen", "weights")
    view = agent.view().gpus[0]
    assert (pooled_bytes - 70 * MiB, 70 * MiB) == (view.pooled_bytes, view.lent_bytes)
    engine.do("give_back", "weights")
    assert pooled_bytes == agent.view().gpus[0].pooled_bytes


def test_two_gpus_copy_at_the_same_time_and_a_wake_passes_a_seal(world: MakeWorld) -> None:
    """On links of 64 MiB/s: a wake of 64 MiB takes a second, and the seal of 256 MiB before it four."""
    one = world(gpus=2, total_bytes=1024 * MiB, host_budget_bytes=1024 * MiB)
    agent = one.agent()
    first, second = account(one, agent, "first"), account(one, agent, "second", gpu=1)
    trainer = account(one, agent, "trainer")
    parked(first, 41)
    parked(second, 42)
    trainer.do("ask", "state", 256 * MiB)
    for gpu in (0, 1):
        one.host.set_bandwidth(gpu, h2d=64 * MiB, d2h=64 * MiB, pageable=0)
    began_s = time.monotonic()
    trainer.tell("seal", "state", "image", 1)
    until(lambda: agent.view().gpus[0].waiting_copies + agent.view().gpus[1].waiting_copies == 1)

    second.tell("restore", "again", "image", 1)
    woken = first.do("restore", "again", "image", 1)
    woken_s = time.monotonic() - began_s
    second.hear()
    sealed = trainer.hear()

    assert woken["wait_s"] < 2.0, "for the slab that was on the link"
    assert woken_s < sealed["seal_s"], "the wake came first though it began later"
    assert 256 * MiB == sealed["copied_bytes"]

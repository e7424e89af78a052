"""Whoever is killed, whenever: engines go on, nothing is promised twice, and everything comes back."""

import random
import time

import pytest

from devices.api import MiB
from tests.integration.broker.conftest import MakeWorld, World
from tests.integration.broker.peers import Agent, EngineProcess, RefusedAnswer, until

WEIGHTS = 64 * MiB


def serving(world: World, replica_id: str, granted_bytes: int, *, tenant: str = "a") -> tuple[Agent, EngineProcess]:
    """An engine with sealed weights, and the agent's connection."""
    agent = world.agent()
    agent.open(replica_id, {world.gpu: granted_bytes}, tenant=tenant, deployment="d")
    engine = world.engine(replica_id)
    engine.do("hello")
    engine.do("ask", "weights", WEIGHTS)
    engine.do("write", "weights", f"weights of {replica_id}")
    engine.do("seal", "weights", "image", 3)
    return agent, engine


def restarted(world: World, *replica_ids: str, granted_bytes: int) -> Agent:
    world.broker.kill()
    world.broker.restart()
    agent = world.agent()
    for replica_id in replica_ids:
        agent.open(replica_id, {world.gpu: granted_bytes}, tenant="a", deployment="d")
    return agent


def test_engines_outlive_the_broker_and_what_they_map_counts_against_their_grant(world: MakeWorld) -> None:
    one = world()
    _, engine = serving(one, "r", 100 * MiB)

    agent = restarted(one, "r", granted_bytes=100 * MiB)

    assert "weights of r" == engine.do("read", "weights", 12), "it serves on while nobody is there"
    assert not agent.view().accounts[0].is_held_known, "nothing held proves nothing yet"
    engine.do("hello", WEIGHTS)
    assert agent.view().accounts[0].is_held_known
    assert {one.gpu: WEIGHTS} == agent.view().accounts[0].held_bytes
    assert 0 == agent.view().gpus[0].lent_bytes, "it is not the new broker's to pool"
    assert "was granted" in engine.do("ask", "cache", 40 * MiB)["refused"]

    engine.do("give_back_adopted", "weights")

    assert {one.gpu: 0} == agent.view().accounts[0].held_bytes
    until(lambda: one.used_bytes() < WEIGHTS)
    assert [32 * MiB, 8 * MiB] == engine.do("ask", "cache", 40 * MiB)["piece_bytes"]


def test_images_outlive_the_broker_and_wake_the_engine_that_sealed_them(world: MakeWorld) -> None:
    one = world()
    _, engine = serving(one, "r", 100 * MiB)
    engine.do("write", "weights", "changed since")
    engine.do("unmap", "weights")

    agent = restarted(one, "r", granted_bytes=100 * MiB)

    account = agent.view().accounts[0]
    assert (("image",), "host") == (account.image_ids, account.tier)
    engine.do("hello")
    assert WEIGHTS == engine.do("restore", "weights", "image", 3)["copied_bytes"]
    assert "weights of r" == engine.do("read", "weights", 12)
    assert "generation 3, not 2" in engine.do("restore", "other", "image", 2)["refused"]


@pytest.mark.parametrize("kind", ["truncated", "garbage", "missing block"])
def test_what_cannot_be_trusted_is_not_adopted(world: MakeWorld, kind: str) -> None:
    one = world()
    serving(one, "r", 100 * MiB)
    one.broker.kill()
    index = one.folder / "arena" / "index.json"
    if kind == "truncated":
        index.write_bytes(index.read_bytes()[:-20])
    elif kind == "garbage":
        index.write_bytes(b"nonsense")
    else:
        (one.folder / "arena" / one.pinned_files()[0]).unlink()

    one.broker.restart()
    agent = one.agent()
    agent.open("r", {one.gpu: 100 * MiB}, tenant="a", deployment="d")

    assert () == agent.view().accounts[0].image_ids
    agent.reserve("r", 400 * MiB)


def test_damaged_bytes_of_a_former_life_are_noticed_and_forgotten(world: MakeWorld) -> None:
    one = world()
    agent, _ = serving(one, "r", 100 * MiB)
    until(lambda: b'"digest":"' in (one.folder / "arena" / "index.json").read_bytes().replace(b'"digest":""', b""))
    one.broker.kill()
    for name in one.pinned_files():
        with (one.folder / "arena" / name).open("r+b") as block:
            block.seek(1 * MiB)
            block.write(b"flipped")

    one.broker.restart()
    agent = one.agent()
    agent.open("r", {one.gpu: 100 * MiB}, tenant="a", deployment="d")

    until(lambda: agent.view().accounts[0].image_ids == ())


def test_an_engine_killed_in_the_middle_of_its_wake_gives_everything_back(world: MakeWorld) -> None:
    one = world()
    agent, engine = serving(one, "r", 200 * MiB)
    engine.do("give_back", "weights")
    one.host.set_bandwidth(0, h2d=8 * MiB, d2h=0, pageable=0)  # eight seconds, so that the kill falls into it
    engine.tell("restore", "weights", "image", 3)
    until(lambda: agent.view().gpus[0].waiting_copies == 1)

    engine.kill()

    until(lambda: agent.view().accounts[0].held_bytes == {one.gpu: 0})
    assert 0 == agent.view().gpus[0].waiting_copies
    assert ("image",) == agent.view().accounts[0].image_ids, "the image stays for the next start"


def test_a_broker_killed_in_the_middle_of_a_wake_leaves_no_memory_behind(world: MakeWorld) -> None:
    one = world()
    _, engine = serving(one, "r", 200 * MiB)
    engine.do("give_back", "weights")
    one.host.set_bandwidth(0, h2d=8 * MiB, d2h=0, pageable=0)
    engine.tell("restore", "weights", "image", 3)
    until(lambda: one.used_bytes() >= WEIGHTS)

    agent = restarted(one, "r", granted_bytes=200 * MiB)
    assert "lost" in engine.hear()
    one.host.set_bandwidth(0, h2d=0, d2h=0, pageable=0)
    engine.do("hello")

    assert WEIGHTS == engine.do("restore", "again", "image", 3)["copied_bytes"]
    assert "weights of r" == engine.do("read", "again", 12)
    assert ("image",) == agent.view().accounts[0].image_ids


def test_a_lost_gpu_ends_the_broker_and_the_next_one_serves_the_other_gpu(world: MakeWorld) -> None:
    one = world(gpus=2)
    _, engine = serving(one, "r", 200 * MiB)
    other = one.host.uuids()[1]
    agent = one.agent()
    agent.open("s", {other: 100 * MiB})
    survivor = one.engine("s", gpu=1)
    survivor.do("hello")
    survivor.do("ask", "weights", 8 * MiB)
    one.host.set_lost(0)

    engine.tell("ask", "cache", 8 * MiB)
    assert 70 == one.broker.process.wait(timeout=60)
    one.broker.restart()

    agent = one.agent()
    agent.open("s", {other: 100 * MiB})
    survivor.do("hello", 8 * MiB)
    assert [8 * MiB] == survivor.do("ask", "cache", 8 * MiB)["piece_bytes"]
    with pytest.raises(RefusedAnswer, match="no GPU"):
        agent.open("r", {one.gpu: 100 * MiB})


def test_an_account_is_not_closed_under_a_living_engine(world: MakeWorld) -> None:
    one = world()
    agent, engine = serving(one, "r", 100 * MiB)

    with pytest.raises(RefusedAnswer, match="is alive and maps memory"):
        agent.close_account("r")

    engine.kill()
    agent.close_account("r")
    assert () == agent.view().accounts
    assert 0 == agent.view().gpus[0].lent_bytes


def test_a_lost_connection_keeps_the_memory_for_the_engine_that_maps_it(world: MakeWorld) -> None:
    one = world()
    agent, engine = serving(one, "r", 100 * MiB)

    engine.do("hello", WEIGHTS)  # a second connection: the first one ends

    assert {one.gpu: WEIGHTS} == agent.view().accounts[0].held_bytes, "counted once"
    assert "weights of r" == engine.do("read", "weights", 12)
    engine.do("give_back_adopted", "weights")
    assert {one.gpu: 0} == agent.view().accounts[0].held_bytes


def test_whenever_the_broker_is_killed_the_kept_image_is_one_that_was_sealed(world: MakeWorld) -> None:
    """An engine seals one generation after the other, each of other bytes; kills fall anywhere into that."""
    moments = random.Random(20251125)
    one = world(host_budget_bytes=4 * WEIGHTS)
    agent = one.agent()
    agent.open("r", {one.gpu: 4 * WEIGHTS}, tenant="a", deployment="d")
    engine = one.engine("r")
    engine.do("hello")
    engine.do("ask", "weights", WEIGHTS)
    newest = engine.do("seal_on", "weights", "image", 1, 2)
    for life in range(6):
        engine.tell("seal_on", "weights", "image", newest + 1, 200)
        time.sleep(moments.uniform(0.0, 0.25))
        agent = restarted(one, "r", granted_bytes=4 * WEIGHTS)
        last = engine.hear()

        engine.do("hello", WEIGHTS)
        kept = [
            generation
            for generation in (last + 1, last)  # one that was kept may not have been answered any more
            if "refused" not in engine.do("restore", f"copy-{life}-{generation}", "image", generation)
        ]
        assert 1 == len(kept), "exactly one generation is kept, and none that was answered is lost"
        newest = kept[0]
        name = f"copy-{life}-{newest}"
        assert [newest % 251] == engine.do("bytes_seen", name)
        engine.do("give_back", name)
        engine.do("unmap", "weights")
        engine.do("hello")
        engine.do("ask", "weights", WEIGHTS)
    assert WEIGHTS == agent.view().host[0].used_bytes

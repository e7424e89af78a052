"""The broker as agent and engines meet it, on a software GPU that hands out dirty memory."""

import pytest

from devices.api import MiB
from tests.integration.broker.conftest import MakeWorld, World
from tests.integration.broker.peers import Agent, RefusedAnswer, until


def opened(world: World, replica_id: str, granted_bytes: int, *, tenant: str = "a", deployment: str = "") -> Agent:
    agent = world.agent()
    agent.open(replica_id, {world.gpu: granted_bytes}, tenant=tenant, deployment=deployment)
    return agent


def test_an_engine_gets_clean_memory_up_to_its_grant_and_no_more(world: MakeWorld) -> None:
    one = world()
    agent = opened(one, "r", 100 * MiB)
    engine = one.engine("r")
    engine.do("hello")

    grant = engine.do("ask", "weights", 70 * MiB)

    assert [32 * MiB, 32 * MiB, 6 * MiB] == grant["piece_bytes"]
    assert [0] == engine.do("bytes_seen", "weights")
    refused = engine.do("ask", "cache", 32 * MiB)
    assert 2 * MiB == refused["short_by_bytes"], refused
    agent.open("r", {one.gpu: 102 * MiB})
    assert [32 * MiB] == engine.do("ask", "cache", 32 * MiB)["piece_bytes"]
    assert {one.gpu: 102 * MiB} == agent.view().accounts[0].held_bytes


def test_many_ranges_of_one_question_are_clean_and_all_of_them_or_none(world: MakeWorld) -> None:
    one = world()
    agent = opened(one, "r", 100 * MiB)
    engine = one.engine("r")
    engine.do("hello")
    names = [f"kv-{number}" for number in range(12)]

    refused = engine.do("ask_each", [*names, "kv-12"], 8 * MiB)
    assert 4 * MiB == refused["short_by_bytes"], refused
    assert 0 == sum(agent.view().accounts[0].held_bytes.values()) == agent.view().gpus[0].lent_bytes
    assert "twice" in engine.do("ask_each", ["kv-0", "twice", "twice"], MiB)["refused"]
    assert "129" in engine.do("ask_each", [f"many-{number}" for number in range(129)], MiB)["refused"]
    assert 0 == sum(agent.view().accounts[0].held_bytes.values()) == agent.view().gpus[0].lent_bytes

    granted = engine.do("ask_each", names, 8 * MiB)

    assert [8 * MiB] * 12 == granted["piece_bytes"]
    assert all([0] == engine.do("bytes_seen", name) for name in names)
    assert {one.gpu: 96 * MiB} == agent.view().accounts[0].held_bytes
    engine.do("give_back", "kv-5")
    assert {one.gpu: 88 * MiB} == agent.view().accounts[0].held_bytes
    engine.kill()
    until(lambda: agent.view().gpus[0].lent_bytes == 0)


def test_an_image_comes_back_byte_for_byte_at_the_same_address(world: MakeWorld) -> None:
    one = world()
    agent = opened(one, "r", 100 * MiB)
    agent.reserve("r", 70 * MiB)
    engine = one.engine("r")
    engine.do("hello")
    engine.do("ask", "weights", 70 * MiB)
    for offset in (0, 5000, 33 * MiB, 70 * MiB - 8):
        engine.do("write", "weights", f"at{offset:06}"[:8], offset)
    before = [engine.do("read", "weights", 8, offset) for offset in (0, 5000, 33 * MiB, 70 * MiB - 8)]

    sealed = engine.do("seal", "weights", "image", 1)
    engine.do("give_back", "weights")
    free_bytes = one.used_bytes()
    restored = engine.do("restore", "weights", "image", 1)

    assert 70 * MiB == sealed["copied_bytes"] == restored["copied_bytes"]
    assert before == [engine.do("read", "weights", 8, offset) for offset in (0, 5000, 33 * MiB, 70 * MiB - 8)]
    assert free_bytes < 70 * MiB, "parked memory is the driver's again"
    account = agent.view().accounts[0]
    assert (70 * MiB, ("image",), "host") == (account.sealed_bytes, account.image_ids, account.tier)


def test_nobody_sees_another_tenants_bytes_in_memory_that_the_pool_kept(world: MakeWorld) -> None:
    one = world(pooled_bytes_max=512 * MiB)
    opened(one, "first", 128 * MiB, tenant="a")
    agent = opened(one, "second", 128 * MiB, tenant="b")
    first, second = one.engine("first"), one.engine("second")
    first.do("hello")
    second.do("hello")
    first.do("ask", "weights", 128 * MiB)
    first.do("fill", "weights", 77)
    first.do("give_back", "weights")
    assert 128 * MiB == agent.view().gpus[0].pooled_bytes

    second.do("ask", "weights", 128 * MiB)

    assert [0] == second.do("bytes_seen", "weights")
    assert 0 == agent.view().gpus[0].pooled_bytes, "it is the very memory"


def test_a_killed_engine_gives_everything_back(world: MakeWorld) -> None:
    one = world()
    agent = opened(one, "r", 128 * MiB)
    engine = one.engine("r")
    engine.do("hello")
    engine.do("ask", "weights", 128 * MiB)

    engine.kill()

    until(lambda: agent.view().accounts[0].held_bytes == {one.gpu: 0})
    assert 0 == agent.view().gpus[0].lent_bytes
    assert one.used_bytes() < 128 * MiB
    agent.close_account("r")
    assert () == agent.view().accounts


def test_a_stranger_a_wrong_key_and_a_closed_account_get_nothing(world: MakeWorld) -> None:
    one = world()
    agent = opened(one, "r", 128 * MiB)
    stranger = one.engine("stranger")
    assert "no account is open" in stranger.do("hello", 0, 0.0)["refused"]
    with pytest.raises(RefusedAnswer, match="no GPU"):
        agent.open("other", {"GPU-none": 1})
    engine = one.engine("r")
    engine.do("hello")

    agent.close_account("r")

    assert "was closed" in engine.do("ask", "weights", 2 * MiB)["refused"]

"""Engines whose memory is the memory broker's: real processes on a software GPU, with phantom memory and real bytes."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import softgpu
from tests.integration.engine_broker import LEASE_EPOCH, BrokerProcess, process_bytes
from tests.unit.engines.running import (
    SMALL_CONTEXT_BYTES,
    Engine,
    GiB,
    MiB,
    simulated,
    software_host,
    training,
    used_bytes,
)


@dataclass(frozen=True)
class World:
    """A host with its broker, and engines of a size that suits it."""

    host: softgpu.Host
    broker: BrokerProcess
    weights_bytes: int
    memory_bytes: int
    gpu_count: int = 1

    def engine(
        self, replica_id: str = "r/0", *, granted_bytes: int | None = None, lease_epoch: int = LEASE_EPOCH
    ) -> Engine:
        environment = self.broker.admit(
            replica_id, granted_bytes=granted_bytes or self.memory_bytes, lease_epoch=lease_epoch
        )
        return simulated(
            self.host,
            model="small-model",
            weights_bytes=self.weights_bytes,
            memory_bytes=self.memory_bytes,
            extra_environment=environment,
            gpu_count=self.gpu_count,
        )


@pytest.fixture(params=["phantom", "real bytes"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    if request.param == "phantom":
        with software_host(phantom=True) as host, BrokerProcess(host, tmp_path, host_budget_bytes=40 * GiB) as broker:
            yield World(host, broker, 12 * GiB, 20 * GiB)
    else:
        with small_world(tmp_path) as made:
            yield made


@pytest.fixture
def small(tmp_path: Path) -> Iterator[World]:
    """Real bytes: what comes back can be compared."""
    with small_world(tmp_path) as made:
        yield made


class small_world:  # noqa: N801 (a context manager)
    def __init__(self, state_dir: Path, *, gpu_count: int = 1, **settings: object) -> None:
        self._host = software_host(
            phantom=False, gpus=gpu_count, total_bytes=512 * MiB, context_bytes=SMALL_CONTEXT_BYTES
        )
        self._state_dir = state_dir
        self._gpu_count = gpu_count
        self._settings = {"host_budget_bytes": 512 * MiB, "block_bytes": 32 * MiB, **settings}

    def __enter__(self) -> World:
        host = self._host.__enter__()
        self._broker = BrokerProcess(host, self._state_dir, **self._settings)
        return World(host, self._broker, 96 * MiB + 12345, 200 * MiB, self._gpu_count)

    def __exit__(self, *_: object) -> None:
        self._broker.end()
        self._host.__exit__(None, None, None)


def ask(engine: Engine) -> int:
    return engine.complete(model="small-model").status


def test_nothing_but_the_context_is_the_engines_own(world: World) -> None:
    with world.engine().ready() as engine:
        assert ask(engine) == 200
        state = engine.get("/sublet/state").json
        (share,) = state["gpus"]

        assert state["is_brokered"]
        assert state["context_bytes"] == share["context_bytes"] == process_bytes(world.host, engine.pid)
        held_bytes = sum(world.broker.account("r/0").held_bytes.values())
        assert held_bytes == share["brokered_bytes"] == state["held_bytes"] - state["context_bytes"]


def test_a_park_copies_nothing_and_a_wake_brings_the_weights_back(world: World) -> None:
    with world.engine().ready() as engine:
        before = engine.complete(model="small-model").json["choices"]
        digest = engine.get("/sublet/weights").json
        weights_bytes = engine.get("/sublet/state").json["weights_bytes"]
        assert world.broker.account("r/0").sealed_bytes == weights_bytes
        resident_bytes = used_bytes(world.host)

        slept = engine.post("/sleep").json
        account = world.broker.account("r/0")
        assert slept["copied_bytes"] == 0
        assert not any(account.held_bytes.values())
        assert slept["freed_bytes"] == resident_bytes - used_bytes(world.host)
        assert ask(engine) == 503

        woken = engine.post("/wake_up").json
        assert woken["copied_bytes"] == weights_bytes
        assert min(woken["map_s"], woken["verify_s"], woken["wake_s"]) > 0
        assert engine.get("/sublet/weights").json == digest
        assert engine.complete(model="small-model").json["choices"] == before


def test_updated_weights_are_sealed_by_the_next_park_and_come_back(small: World) -> None:
    with small.engine().ready() as engine:
        first = engine.get("/sublet/weights").json["digest"]
        updated = engine.post("/sublet/weights").json["digest"]
        assert first != updated

        weights_bytes = engine.get("/sublet/state").json["weights_bytes"]
        for copied_bytes in (weights_bytes, 0):
            assert engine.post("/sleep").json["copied_bytes"] == copied_bytes
            assert engine.post("/wake_up").status == 200
            assert engine.get("/sublet/weights").json == {"weights_generation": 2, "digest": updated}


def test_replicas_of_one_model_share_their_sealed_weights_until_one_is_updated(small: World) -> None:
    with small.engine("r/0").ready() as first:
        once_bytes = sum(pool.used_bytes for pool in small.broker.look().host)
        first.post("/sleep")
        with small.engine("r/1").ready() as second:
            assert sum(pool.used_bytes for pool in small.broker.look().host) == once_bytes > 0
            digest = second.get("/sublet/weights").json["digest"]
            updated = second.post("/sublet/weights").json["digest"]
            second.post("/sleep")

            assert first.post("/wake_up").status == 200
            assert first.get("/sublet/weights").json["digest"] == digest
            first.post("/sleep")
            assert second.post("/wake_up").status == 200
            assert second.get("/sublet/weights").json["digest"] == updated


def test_shards_on_two_gpus_come_back_together(tmp_path: Path) -> None:
    with small_world(tmp_path, gpu_count=2) as wide, wide.engine().ready() as engine:
        digest = engine.get("/sublet/weights").json
        assert len(engine.get("/sublet/state").json["gpus"]) == 2
        engine.post("/sleep")
        assert [0, 0] == sorted(wide.broker.account("r/0").held_bytes.values())

        woken = engine.post("/wake_up").json

        assert woken["copied_bytes"] == engine.get("/sublet/state").json["weights_bytes"]
        assert engine.get("/sublet/weights").json == digest
        held = wide.broker.account("r/0").held_bytes.values()
        assert len(set(held)) == 1


def test_a_shard_without_room_keeps_the_others_away(tmp_path: Path) -> None:
    with small_world(tmp_path, gpu_count=2) as wide, wide.engine("r/0").ready() as engine:
        engine.post("/sleep")
        with simulated(
            wide.host,
            model="small-model",
            weights_bytes=wide.weights_bytes,
            memory_bytes=460 * MiB,
            extra_environment=wide.broker.admit("r/1", granted_bytes=460 * MiB),
        ).ready() as neighbour:
            refused = engine.post("/wake_up")
            assert refused.status == 500
            assert not any(wide.broker.account("r/0").held_bytes.values())
            neighbour.post("/sleep")

            assert engine.post("/wake_up").status == 200
            assert ask(engine) == 200


def test_an_account_smaller_than_the_budget_makes_a_smaller_cache(small: World) -> None:
    with small.engine(granted_bytes=150 * MiB).ready() as engine:
        warning = engine.wait_for("budget not reached")
        state = engine.get("/sublet/state").json

        assert warning["target_bytes"] == state["budget_bytes"] < small.memory_bytes
        assert 0 < state["kv_bytes"]
        assert sum(small.broker.account("r/0").held_bytes.values()) <= 150 * MiB
        engine.post("/sleep")
        assert engine.post("/wake_up").status == 200
        assert ask(engine) == 200


def test_an_account_that_does_not_hold_the_weights_is_a_clear_end(small: World) -> None:
    with small.engine(granted_bytes=20 * MiB) as engine:
        assert engine.wait() == 1
        assert engine.wait_for("CUDA out of memory")["requested_bytes"] > 20 * MiB


def test_an_engine_serves_parks_and_wakes_over_the_brokers_death(small: World) -> None:
    with small.engine().ready() as engine:
        digest = engine.get("/sublet/weights").json
        held_bytes = engine.get("/sublet/state").json["gpus"][0]["brokered_bytes"]
        small.broker.end()
        assert ask(engine) == 200
        small.broker.start()
        small.broker.admit("r/0", granted_bytes=small.memory_bytes)
        # Each of its connections says what it has.
        small.broker.until(lambda view: sum(view.accounts[0].held_bytes.values()) == held_bytes)

        assert engine.post("/sleep").json["copied_bytes"] == 0
        assert not any(small.broker.account("r/0").held_bytes.values())
        assert process_bytes(small.host, engine.pid) == SMALL_CONTEXT_BYTES
        assert engine.post("/wake_up").status == 200
        assert engine.get("/sublet/weights").json == digest


def test_weights_that_cannot_be_sealed_stay_where_they_are(small: World) -> None:
    """Their memory is of a broker that is gone, and only its maker can read it."""
    with small.engine().ready() as engine:
        updated = engine.post("/sublet/weights").json["digest"]
        small.broker.end()
        small.broker.start()
        small.broker.admit("r/0", granted_bytes=small.memory_bytes)
        small.broker.until(lambda view: view.accounts[0].is_connected)

        assert engine.post("/sleep").error["code"] == "not_sealed"
        assert engine.get("/sublet/weights").json["digest"] == updated
        assert ask(engine) == 200


def test_an_engine_that_is_killed_leaves_nothing_with_the_broker(small: World) -> None:
    with small.engine().ready() as engine:
        engine.kill()
        small.broker.until(lambda view: not any(view.accounts[0].held_bytes.values()))
        small.broker.close_account("r/0")

        assert all(pool.lent_bytes == 0 for pool in small.broker.look().gpus)


def test_the_next_start_of_a_replica_seals_over_what_the_last_one_left(small: World) -> None:
    with small.engine().ready() as engine:
        engine.post("/sublet/weights")
        engine.post("/sleep")
        engine.kill()
        small.broker.close_account("r/0")
    once_bytes = sum(pool.used_bytes for pool in small.broker.look().host)

    with small.engine(lease_epoch=LEASE_EPOCH + 1).ready() as again:
        digest = again.get("/sublet/weights").json["digest"]
        again.post("/sleep")
        assert again.post("/wake_up").status == 200
        assert again.get("/sublet/weights").json == {"weights_generation": 1, "digest": digest}
        assert sum(pool.used_bytes for pool in small.broker.look().host) == once_bytes


def test_where_the_broker_holds_the_whole_gpu_an_engine_needs_nothing_beyond_it(tmp_path: Path) -> None:
    with small_world(tmp_path, hold="all", reserve_bytes=32 * MiB) as full:
        full.broker.until(lambda _: used_bytes(full.host) >= (512 - 32 - 2) * MiB)
        with full.engine().ready() as engine:
            assert ask(engine) == 200
            engine.post("/sleep")
            assert engine.post("/wake_up").status == 200


def goes_on(job: Engine, *, beyond_steps: int) -> None:
    job.until(lambda state: state["steps"] > beyond_steps)


def test_a_training_job_goes_on_at_the_very_next_step(world: World, tmp_path: Path) -> None:
    environment = world.broker.admit("job/0", granted_bytes=world.memory_bytes)
    with training(
        world.host, tmp_path / "ck", memory_bytes=world.memory_bytes // 2, extra_environment=environment
    ).ready() as job:
        job.until(lambda state: state["steps"] > 5)
        for _ in range(2):
            slept = job.post("/sleep").json
            assert slept["copied_bytes"] == job.get("/sublet/state").json["weights_bytes"]
            assert not any(world.broker.account("job/0").held_bytes.values())
            woken = job.post("/wake_up").json
            assert woken["steps"] == slept["steps"]
            goes_on(job, beyond_steps=slept["steps"] + 2)

"""The driver `store`: who has to say what before a park is a park."""

from collections.abc import Iterable
from typing import Any, cast

import pytest

from schemas.brokers import AccountView, BrokerView, GpuPoolView, HostReserve
from schemas.deployments import DeploymentSpec, EngineKind, EngineSpec, ShareSpec
from schemas.holders import EngineView
from schemas.nodes import ParkTier
from schemas.placement import ReplicaProposal, ShareProposal
from services.nodeagent.broker_client import BrokerProblem
from services.nodeagent.engine_client import EngineProblem, EngineState
from services.nodeagent.mover import store
from services.nodeagent.mover.driver import Broken, Parked, StillParked, StillResident, SwapTarget, Woken
from services.nodeagent.mover.store import Store

pytestmark = pytest.mark.anyio

ENGINE = EngineView(
    replica_id="r", lease_epoch=7, pid=1, started_ticks=1, port=1, is_gated=False, is_alive=True, exit_code=None,
    namespace="sublet-r", log_path="/nowhere",
)  # fmt: skip


def target(kind: EngineKind = EngineKind.SIMULATED) -> SwapTarget:
    shares = tuple(
        ShareProposal(replica_id="r", shard_index=index, gpu_uuid=uuid, request_bytes=100, limit_bytes=100)
        for index, uuid in enumerate(("GPU-0", "GPU-1"))
    )
    spec = DeploymentSpec(
        name="m", engine=EngineSpec(kind=kind, weights_bytes=60), share=ShareSpec(request_portion=0.5)
    )
    replica = ReplicaProposal(replica_id="r", deployment_id="d", tenant="t", deployment=spec, shares=shares)
    return SwapTarget(replica=replica, lease_epoch=7, engine=ENGINE, endpoint="http://e", timeout_s=1.0)


class PlayedEngine:
    """Goes to sleep, or refuses to."""

    def __init__(self, *, state: str = "asleep", refusal: EngineProblem | None = None) -> None:
        self.asked: list[str] = []
        self._state = state
        self._refusal = refusal

    async def post(self, url: str, *, timeout_s: float, body: bytes | None = None) -> bytes:
        self.asked.append(url.removeprefix("http://e"))
        if self._refusal is not None:
            raise self._refusal
        return b'{"copied_bytes": 5, "map_s": 0.5, "copy_s": 0.25}'

    async def state(self, endpoint: str, kind: EngineKind = EngineKind.SIMULATED) -> EngineState:
        return EngineState(state=self._state)


class PlayedBroker:
    """Says these views one after the other, the last one for ever; a string is a broker that does not answer."""

    def __init__(self, views: Iterable[BrokerView | str]) -> None:
        self._views = list(views)
        self.reserved: list[HostReserve] = []

    async def look(self) -> BrokerView:
        view = self._views.pop(0) if len(self._views) > 1 else self._views[0]
        if isinstance(view, str):
            raise BrokerProblem(view)
        return view

    async def reserve(self, wish: HostReserve) -> None:
        self.reserved.append(wish)
        if wish.size_bytes > 1000:
            raise BrokerProblem("host memory is full", short_by_bytes=wish.size_bytes - 1000)


def view(held: dict[str, int] | None = None, *, lease_epoch: int = 7, tier: str = "host") -> BrokerView:
    account = AccountView(
        replica_id="r", lease_epoch=lease_epoch, is_connected=True, granted_bytes={}, held_bytes=held or {},
        sealed_bytes=60, image_ids=(), tier=tier,
    )  # fmt: skip
    pools = tuple(
        GpuPoolView(gpu_uuid=uuid, pooled_bytes=0, lent_bytes=0, waiting_copies=0, link_busy_s=0.0)
        for uuid in ("GPU-0", "GPU-1")
    )
    return BrokerView(accounts=(account,), gpus=pools, host=(), disk_budget_bytes=0, disk_used_bytes=0)


def driver(engine: PlayedEngine, *views: BrokerView | str) -> Store:
    return Store(cast(Any, engine), cast(Any, PlayedBroker(views)))


@pytest.fixture(autouse=True)
def short_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PROOF_S", 0.2)
    monkeypatch.setattr(store, "PROOF_POLL_S", 0.001)


async def test_a_park_is_done_when_the_broker_says_that_nothing_is_lent() -> None:
    engine = PlayedEngine()
    still, empty = view({"GPU-0": 0, "GPU-1": 8}), view({"GPU-0": 0, "GPU-1": 0})

    parked = await driver(engine, "the broker is away", still, empty).park(target())

    assert Parked(copied_bytes=5, host_bytes=60) == parked
    assert ["/sleep?level=1&mode=wait"] == engine.asked


async def test_a_park_whose_image_went_to_disk_says_so() -> None:
    assert ParkTier.DISK == (await driver(PlayedEngine(), view(tier="disk")).park(target())).tier


@pytest.mark.parametrize(
    ("seen", "reason"),
    [
        (view({"GPU-1": 8}), "still holds 8 bytes"),
        (view(lease_epoch=6), "does not know its account"),
        ("it does not answer", "it does not answer"),
    ],
)
async def test_bytes_that_are_not_proven_free_are_not_told_as_free(seen: BrokerView | str, reason: str) -> None:
    """Another account's empty books, or no books, prove nothing."""
    with pytest.raises(Broken, match=f"not proven free after its park: .*{reason}"):
        await driver(PlayedEngine(), seen).park(target())


async def test_an_engine_that_could_not_seal_its_weights_stays_as_it_is() -> None:
    engine = PlayedEngine(state="resident", refusal=EngineProblem("the weights could not be sealed", status=503))

    with pytest.raises(StillResident, match="could not be sealed"):
        await driver(engine, view({"GPU-0": 50})).park(target())


async def test_an_engine_that_is_neither_asleep_nor_resident_is_broken() -> None:
    engine = PlayedEngine(state="failed", refusal=EngineProblem("boom", status=503))

    with pytest.raises(Broken):
        await driver(engine, view()).park(target())


async def test_a_wake_of_our_engines_is_one_call_so_that_weights_and_cache_come_at_once() -> None:
    engine = PlayedEngine()

    woken = await driver(engine, view()).wake(target())

    assert ["/wake_up"] == engine.asked
    assert Woken(copied_bytes=5, map_s=0.5, copy_s=0.25) == woken


async def test_a_wake_of_vllm_brings_weights_before_the_cache_and_tells_its_parts() -> None:
    engine = PlayedEngine()

    woken = await driver(engine, view()).wake(target(EngineKind.VLLM))

    assert ["/wake_up?tags=weights", "/wake_up?tags=kv_cache"] == engine.asked
    assert Woken(copied_bytes=10, map_s=1.0, copy_s=0.5) == woken


async def test_a_wake_without_room_leaves_it_parked() -> None:
    engine = PlayedEngine(refusal=EngineProblem("out of memory", short_by_bytes=3, status=500))

    with pytest.raises(StillParked) as refused:
        await driver(engine, view()).wake(target())

    assert refused.value.short_by_bytes == 3


async def test_it_is_offered_on_the_gpus_that_the_broker_has_while_it_answers() -> None:
    there = await driver(PlayedEngine(), view()).support(("GPU-1", "GPU-9"))
    away = await driver(PlayedEngine(), "it does not answer").support(("GPU-1",))

    assert (True, False) == (there["GPU-1"].is_supported, there["GPU-9"].is_supported)
    assert (False, "it does not answer") == (away["GPU-1"].is_supported, away["GPU-1"].reason)


async def test_host_memory_is_promised_before_the_first_park_and_given_back_at_the_end() -> None:
    broker = PlayedBroker([view()])
    subject = Store(cast(Any, PlayedEngine()), cast(Any, broker))

    await subject.prepare(target())
    await subject.forget(target())

    promised = HostReserve(replica_id="r", deployment_id="d", size_bytes=60, gpu_uuids=("GPU-0", "GPU-1"))
    assert [(60, promised.gpu_uuids), (0, promised.gpu_uuids)] == [
        (wish.size_bytes, wish.gpu_uuids) for wish in broker.reserved
    ]

"""Which backend holds whom, and to how much; on the virtual driver."""

import pytest

from devices.profiles import profile
from devices.virtual import VirtualInventory
from devices.virtual_host import VirtualGpu, VirtualHost
from schemas.deployments import DeploymentSpec, EngineKind, EngineSpec, IsolationGrade, ShareSpec
from schemas.holders import EngineView
from schemas.placement import ReplicaProposal, ShareProposal
from schemas.units import GiB
from services.nodeagent.guard import Guard, NotEnforced, Share
from services.nodeagent.guard.driver import DriverLimits, verdict_of
from services.nodeagent.guard.proof import Attempt, limits_to_try
from services.nodeagent.rooms import Rooms
from services.nodeagent.settings import NodeAgentSettings

pytestmark = pytest.mark.anyio
LEAF = "/sys/fs/cgroup/leaf"


def guard_on(host: VirtualHost, **settings: object) -> Guard:
    return Guard(VirtualInventory(host), NodeAgentSettings(**settings))  # type: ignore[arg-type]


def host_of(uuid: str = "GPU-0", *, has_limits: bool = True) -> VirtualHost:
    host = VirtualHost([VirtualGpu(uuid=uuid, profile=profile("h100-80"))], has_limits=has_limits)
    host.add_namespace(LEAF)
    return host


def engine(namespace: str = LEAF, *, pid: int = 1) -> EngineView:
    return EngineView(
        replica_id="r", lease_epoch=7, pid=pid, started_ticks=1, port=1, is_gated=False, is_alive=True, exit_code=None,
        namespace=namespace, log_path="",
    )  # fmt: skip


def replica(kind: EngineKind = EngineKind.VLLM, *, gpu_uuid: str = "GPU-0") -> ReplicaProposal:
    share = ShareProposal(
        replica_id="r", shard_index=0, gpu_uuid=gpu_uuid, request_bytes=20 * GiB, limit_bytes=40 * GiB
    )
    spec = DeploymentSpec(
        name="m", engine=EngineSpec(kind=kind, weights_bytes=10 * GiB), share=ShareSpec(request_bytes=20 * GiB)
    )
    return ReplicaProposal(replica_id="r", deployment_id="d", tenant="t", deployment=spec, shares=(share,))


@pytest.mark.parametrize(("granted_gib", "soft_gib"), [(20, 20), (35, 20), (1, 1)])
async def test_soft_is_the_request_and_hard_the_grant_of_now(granted_gib: int, soft_gib: int) -> None:
    """Resident, in a burst, and parked with a residue below its request."""
    host = host_of()
    guard = guard_on(host)

    enforced = await guard.hold(replica(), engine(), (granted_gib * GiB,))

    limit = guard.inventory.limit("GPU-0", LEAF)
    assert (soft_gib * GiB, granted_gib * GiB) == (limit.soft_bytes, limit.hard_bytes)
    assert granted_gib * GiB == enforced


async def test_what_the_broker_may_lend_is_not_in_the_drivers_limit() -> None:
    host = host_of()
    share = Share(
        gpu_uuid="GPU-0", namespace=LEAF, request_bytes=20 * GiB, granted_bytes=30 * GiB, brokered_bytes=29 * GiB
    )
    inventory = VirtualInventory(host)

    assert 1 * GiB == await DriverLimits(inventory, None).enforce(share)

    limit = inventory.limit("GPU-0", LEAF)
    assert (0, 1 * GiB) == (limit.soft_bytes, limit.hard_bytes)


async def test_an_engine_without_a_cgroup_of_its_own_is_held_less_strongly_and_that_is_told() -> None:
    """A container on a host with cgroup v1: its engine's budget is all there is."""
    guard = guard_on(host_of())
    assert [IsolationGrade.DRIVER] == [offer.grade for offer in await guard.offers(our_pids=frozenset())]

    assert 0 == await guard.hold(replica(), engine(namespace=""), (20 * GiB,))

    assert IsolationGrade.COOPERATIVE is await guard.grade_of(replica(), engine(namespace=""))
    assert IsolationGrade.WATCHED is await guard.grade_of(replica(EngineKind.OPENAI), engine(namespace=""))
    assert IsolationGrade.DRIVER is await guard.grade_of(replica(), engine())
    await guard.verify(replica(), engine(namespace=""))
    await guard.lift(replica(), engine(namespace=""))


async def test_an_engine_that_runs_elsewhere_than_under_its_limit_is_found_out() -> None:
    guard = guard_on(host_of())
    await guard.hold(replica(), engine(), (20 * GiB,))

    with pytest.raises(NotEnforced, match="nothing is counted"):
        await guard.verify(replica(), engine())


@pytest.mark.parametrize("has_limits", [True, False])
async def test_an_engine_sees_its_grant_where_the_driver_limits_it_and_else_the_whole_gpu(*, has_limits: bool) -> None:
    """One that sizes itself by a part of what it sees would else take a part of the whole GPU for its own."""
    guard = guard_on(host_of(has_limits=has_limits))

    [room] = await Rooms(guard).of({"GPU-0": 20 * GiB}, is_container=False)

    whole_bytes = guard.inventory.memory("GPU-0").capacity_bytes
    assert (20 * GiB if has_limits else whole_bytes) == room.visible_bytes


async def test_a_host_that_trusts_no_engine_offers_watched_and_says_so() -> None:
    guard = guard_on(host_of(has_limits=False), is_trusting_engines=False)

    [offer] = await guard.offers(our_pids=frozenset())

    assert IsolationGrade.WATCHED is offer.grade
    assert "trusts no engine's budget" in offer.grade_reason


async def test_a_mig_device_is_held_by_the_hardware_at_its_size() -> None:
    host = host_of("MIG-0", has_limits=False)
    guard = guard_on(host)

    [offer] = await guard.offers(our_pids=frozenset())

    assert (IsolationGrade.HARDWARE, True) == (offer.grade, offer.is_mig)
    assert offer.capacity_bytes == await guard.hold(replica(gpu_uuid="MIG-0"), engine(), (20 * GiB,))


@pytest.mark.parametrize(
    ("tried", "is_proven", "words"),
    [
        (Attempt(context="granted", within="granted", beyond="refused", shown_bytes=1000), True, "refused"),
        (Attempt(context="granted", within="granted", beyond="refused", shown_bytes=9999), True, "see the whole GPU"),
        (Attempt(context="granted", within="granted", beyond="granted"), False, "does not enforce"),
        (Attempt(context="refused"), False, "too little memory"),
        (Attempt(context="granted", within="refused"), False, "too little memory"),
        (Attempt(failure="it fell over"), False, "it fell over"),
        (Attempt(), False, "could not be proven"),
    ],
)
def test_only_what_was_granted_within_and_refused_beyond_is_a_proof(
    tried: Attempt, words: str, *, is_proven: bool
) -> None:
    verdict = verdict_of(tried, limit_bytes=1000)

    assert is_proven == verdict.is_proven
    assert words in verdict.reason


@pytest.mark.parametrize("free_bytes", [0, 1 << 20, 64 << 20, 3 * GiB, 80 * GiB])
def test_what_is_tried_beyond_would_be_had_without_a_limit(free_bytes: int) -> None:
    """Else a full GPU would pass for a limit."""
    limit_bytes, _, beyond_bytes = limits_to_try(free_bytes)

    assert beyond_bytes <= free_bytes // 2
    assert limit_bytes <= beyond_bytes, "with a context there, so much more is too much"

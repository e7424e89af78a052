"""Replicas that span several GPUs: planned on all of them or not at all, and giving way on all of them."""

from schemas.nodes import WakeRefused
from schemas.placement import GangCommitted
from services.swapper.state import Tier
from tests.unit.swapper.builders import NODE, Swapper, outline

BOTH = ("gpu-0", "gpu-1")


def swapper_of(gpu_count: int = 2) -> Swapper:
    return Swapper(gpu_count=gpu_count)


def idle(swapper: Swapper, *, after_s: float = 10.0) -> None:
    swapper.now_s += after_s
    swapper.handle(swapper.load())


def test_a_wake_names_victims_on_every_gpu_that_lacks_room() -> None:
    swapper = swapper_of()
    swapper.parked("wide", 60, gpu_uuids=BOTH)
    swapper.resident("left", 70, gpu_uuids=("gpu-0",))
    swapper.resident("right", 70, gpu_uuids=("gpu-1",))
    idle(swapper)

    assert ["order wake wide", "wake wide <- left right"] == outline(swapper.handle(swapper.wanted("wide")))


def test_a_wake_that_lacks_room_on_one_gpu_only_disturbs_nobody_on_the_other() -> None:
    swapper = swapper_of()
    swapper.parked("wide", 30, gpu_uuids=BOTH)
    swapper.resident("left", 40, gpu_uuids=("gpu-0",))
    swapper.resident("right", 70, gpu_uuids=("gpu-1",))
    idle(swapper)

    assert ["order wake wide", "wake wide <- right"] == outline(swapper.handle(swapper.wanted("wide")))


def test_without_enough_victims_on_one_gpu_nobody_gives_way_on_any() -> None:
    swapper = swapper_of()
    swapper.parked("wide", 60, gpu_uuids=BOTH)
    swapper.resident("left", 70, gpu_uuids=("gpu-0",))
    swapper.resident("right", 70, gpu_uuids=("gpu-1",), is_parkable=False)
    idle(swapper)

    assert [] == swapper.handle(swapper.wanted("wide"))


def test_one_victim_that_spans_both_gpus_is_enough_for_both() -> None:
    swapper = swapper_of()
    swapper.parked("a", 60, gpu_uuids=BOTH)
    swapper.resident("wide", 70, gpu_uuids=BOTH)
    idle(swapper)

    assert ["order wake a", "wake a <- wide"] == outline(swapper.handle(swapper.wanted("a")))


def test_a_victim_that_turns_out_not_to_be_needed_stays() -> None:
    """`small` is the older one; `wide` alone frees enough on both."""
    swapper = swapper_of()
    swapper.parked("a", 60, gpu_uuids=BOTH)
    swapper.resident("small", 20, gpu_uuids=("gpu-0",))
    swapper.now_s += 1
    swapper.resident("wide", 55, gpu_uuids=BOTH)
    idle(swapper)

    assert ["order wake a", "wake a <- wide small"] == outline(swapper.handle(swapper.wanted("a")))

    other = swapper_of()
    other.parked("a", 60, gpu_uuids=BOTH)
    other.resident("small", 5, gpu_uuids=("gpu-0",))
    other.now_s += 1
    other.resident("wide", 70, gpu_uuids=BOTH)
    idle(other)

    assert ["order wake a", "wake a <- wide"] == outline(other.handle(other.wanted("a")))


def test_what_a_wide_victim_frees_elsewhere_is_there_for_others() -> None:
    swapper = swapper_of()
    swapper.parked("left", 60, gpu_uuids=("gpu-0",))
    swapper.parked("right", 60, gpu_uuids=("gpu-1",))
    swapper.resident("wide", 70, gpu_uuids=BOTH)
    idle(swapper)
    swapper.handle(swapper.wanted("left"))

    assert ["order wake right", "wake right"] == outline(swapper.handle(swapper.wanted("right")))


def test_nobody_less_urgent_takes_room_on_either_gpu_from_one_that_waits_for_both() -> None:
    """`wide` cannot come now, since `right` is busy; the room on gpu-0 is not given away under it."""
    swapper = swapper_of()
    swapper.parked("wide", 60, gpu_uuids=BOTH)
    swapper.parked("small", 30, gpu_uuids=("gpu-0",))
    swapper.resident("right", 70, gpu_uuids=("gpu-1",))
    swapper.now_s += 10
    swapper.handle(swapper.load("right"))

    assert [] == swapper.handle(swapper.wanted("wide"))
    swapper.now_s += 0.1
    assert [] == swapper.handle(swapper.wanted("small"))


def test_gpus_that_no_wide_replica_links_are_decided_on_each_by_itself() -> None:
    swapper = swapper_of(4)
    swapper.parked("wide", 30, gpu_uuids=BOTH)
    swapper.parked("b", 30, gpu_uuids=("gpu-1", "gpu-2"))

    assert [("gpu-0", "gpu-1", "gpu-2"), ("gpu-3",)] == swapper.state.groups(["gpu-0", "gpu-2", "gpu-3"])


def test_a_wide_training_returns_only_when_all_its_gpus_have_been_quiet() -> None:
    swapper = swapper_of()
    swapper.parked("job", 30, gpu_uuids=BOTH, is_training=True)
    swapper.resident("right", 20, gpu_uuids=("gpu-1",))
    quiet_s = swapper.state.settings.training_return_s
    swapper.handle(swapper.load())
    swapper.now_s += 10 * quiet_s
    swapper.fact_only(swapper.draining("right"))
    swapper.fact_only(swapper.has_parked("right"))

    assert "wake job" not in outline(swapper.tick(after_s=quiet_s / 2))
    assert "wake job" in outline(swapper.tick(after_s=quiet_s))


# --- Gangs ------------------------------------------------------------------------------------------------------------


def test_a_lease_that_is_held_for_a_gang_is_woken_by_nothing_before_its_commit() -> None:
    swapper = swapper_of()
    swapper.granted("a", 30, gang_id="g-1")

    assert [] == swapper.handle(swapper.wanted("a"))
    assert [] == swapper.tick(after_s=1.0)

    swapper.handle(GangCommitted(at_s=swapper.now_s, node=NODE, gang_id="g-1", replica_ids=("a",)))
    assert ["wake a", "order wake a"] == sorted(outline(swapper.tick(after_s=1.0)), reverse=True)


def test_a_refused_wake_settles_on_every_gpu() -> None:
    swapper = swapper_of()
    swapper.parked("wide", 60, gpu_uuids=BOTH)
    idle(swapper)
    swapper.handle(swapper.wanted("wide"))
    swapper.handle(swapper.waking("wide"))
    refused = swapper.refused("wide")
    assert isinstance(refused, WakeRefused)
    swapper.handle(refused)

    replica = swapper.state.replicas["wide"]
    assert Tier.PARKED is replica.tier
    assert {"gpu-0": 1 << 30, "gpu-1": 1 << 30} == {uuid: replica.held_on(uuid) for uuid in BOTH}

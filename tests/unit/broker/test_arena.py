"""What is promised, shared and demoted, one case at a time; tests/properties has all of them in any order."""

import pytest

from schemas.units import MiB
from services.broker.arena import Arena, Image
from services.broker.refusals import Refused
from services.broker.space import Block


def arena_of(host_mib: int, *, disk_mib: int = 0) -> Arena:
    slab_bytes_max = 10 * MiB if disk_mib else 256 * MiB
    arena = Arena(host_budget_bytes=host_mib * MiB, disk_budget_bytes=disk_mib * MiB, slab_bytes_max=slab_bytes_max)
    arena.space.add(Block(block_id=1, numa_index=0, size_bytes=host_mib * MiB))
    return arena


def sealed(
    arena: Arena, replica_id: str, mib: int, *, generation: int = 1, image_id: str = "w", content: str = ""
) -> Image:
    slabs = arena.new_slabs(mib * MiB, tenant="t", replica_id=replica_id, numa_order=())
    image = Image(
        replica_id=replica_id, image_id=image_id, deployment_id=f"d-{replica_id}", tenant="t", generation=generation,
        content_id=content, size_bytes=mib * MiB, slab_ids=tuple(slab.slab_id for slab in slabs),
    )  # fmt: skip
    arena.seal(image)
    arena.idle(slabs)
    return image


def test_a_promise_that_does_not_fit_says_what_is_missing() -> None:
    arena = arena_of(40, disk_mib=30)  # of which one slab of 10 is kept free
    arena.reserve(replica_id="a", deployment_id="d", size_bytes=40 * MiB)

    with pytest.raises(Refused) as refused:
        arena.reserve(replica_id="b", deployment_id="d", size_bytes=30 * MiB)

    assert 10 * MiB == refused.value.short_by_bytes


def test_what_was_promised_is_not_sealed_by_somebody_else() -> None:
    arena = arena_of(40)
    arena.reserve(replica_id="a", deployment_id="d", size_bytes=30 * MiB)

    with pytest.raises(Refused, match="full"):
        arena.new_slabs(12 * MiB, tenant="t", replica_id="b", numa_order=())

    assert 30 * MiB == sealed(arena, "a", 30).size_bytes


def test_a_replaced_image_that_others_still_use_no_longer_counts_for_who_sealed_it() -> None:
    arena = arena_of(40)
    arena.reserve(replica_id="a", deployment_id="d", size_bytes=20 * MiB)
    first = sealed(arena, "a", 20, content="x")
    shared = arena.slabs_of(first)
    arena.seal(
        Image(
            replica_id="b", image_id="w", deployment_id="d-b", tenant="t", generation=1, content_id="x",
            size_bytes=20 * MiB, slab_ids=tuple(slab.slab_id for slab in shared),
        )
    )  # fmt: skip
    arena.reserve(replica_id="c", deployment_id="d", size_bytes=10 * MiB)

    sealed(arena, "a", 10, generation=2)

    assert arena.sealed_bytes + sum(arena.promised_bytes(name) for name in arena.reserved) <= 40 * MiB


def test_the_longest_unused_leave_first_and_what_is_being_copied_stays() -> None:
    arena = arena_of(40, disk_mib=40)
    first, second, third = sealed(arena, "a", 10), sealed(arena, "b", 10), sealed(arena, "c", 10)
    arena.touch(first)
    arena.busy(arena.slabs_of(second))

    assert arena.slabs_of(third) == arena.coldest(10 * MiB)
    assert (*arena.slabs_of(third), *arena.slabs_of(first)) == arena.coldest(20 * MiB)
    assert () == arena.coldest(30 * MiB)


def test_slabs_without_known_bytes_are_never_taken_for_equal() -> None:
    arena = arena_of(40)
    first, second = (arena.slabs_of(sealed(arena, name, 10))[0] for name in ("a", "b"))
    first.digest, second.digest = "", ""

    assert arena.same_as(first) is None

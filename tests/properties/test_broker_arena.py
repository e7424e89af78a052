"""Whatever is sealed, replaced, copied, demoted and forgotten: images keep their bytes, and both tiers their bounds."""

from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from schemas.units import MiB
from services.broker.arena import Arena, Image, Slab
from services.broker.refusals import Refused
from services.broker.space import GRANULE_BYTES, Block, Extent, Space

REPLICAS = st.sampled_from(["a1", "a2", "b1"])
TENANT = {"a1": "red", "a2": "red", "b1": "blue"}
DEPLOYMENT = {"a1": "a", "a2": "c", "b1": "b"}
NAMES = st.sampled_from(["weights", "cache"])
SIZES = st.sampled_from([1, 5, 10, 10, 10, 20, 40]).map(lambda count: count * MiB)
CONTENTS = st.sampled_from(["x", "y"])
BLOCK_BYTES = 32 * MiB


class Keeping(RuleBasedStateMachine):
    """The arena as the shell drives it, beside a plain record of what each image holds."""

    @initialize(blocks=st.integers(1, 4), disk=st.sampled_from([0, 32 * MiB, 200 * MiB]))
    def start(self, blocks: int, disk: int) -> None:
        self.arena = Arena(host_budget_bytes=blocks * BLOCK_BYTES, disk_budget_bytes=disk, slab_bytes_max=8 * MiB)
        for block_id in range(1, blocks + 1):
            self.arena.space.add(Block(block_id=block_id, numa_index=block_id % 2, size_bytes=BLOCK_BYTES))
        self.content: dict[tuple[str, str], str] = {}
        """{image: its bytes}"""
        self.bytes_of: dict[int, str] = {}
        """{slab: its bytes}"""
        self.restoring: list[tuple[Slab, ...]] = []
        for replica in sorted(TENANT):
            self.reserve(replica, 12 * MiB)
            self.seal(replica, "weights", size=10 * MiB, content="x", generation=1, aborts=False)

    @rule(replica=REPLICAS, size=SIZES)
    def reserve(self, replica: str, size: int) -> None:
        before = dict(self.arena.reserved)
        try:
            self.arena.reserve(replica_id=replica, deployment_id=DEPLOYMENT[replica], size_bytes=size)
        except Refused:
            assert before == self.arena.reserved, "a refused promise leaves the former one"

    @rule(
        replica=REPLICAS,
        name=NAMES,
        size=SIZES,
        content=CONTENTS,
        generation=st.integers(1, 3),
        aborts=st.sampled_from([False, False, True]),
    )
    def seal(self, replica: str, name: str, size: int, content: str, generation: int, aborts: bool) -> None:
        try:
            slabs = self.arena.new_slabs(size, tenant=TENANT[replica], replica_id=replica, numa_order=(1, 0))
        except Refused:
            return
        if not slabs:
            return
        for slab in slabs:
            self.bytes_of[slab.slab_id] = content
        if not aborts:
            self.enter(replica, name, content, generation, slabs, size)
        self.arena.idle(slabs)

    @rule(replica=REPLICAS, name=NAMES, other=REPLICAS, other_name=NAMES)
    def seal_known_content(self, replica: str, name: str, other: str, other_name: str) -> None:
        image = self.arena.images.get((other, other_name))
        assume(image is not None)
        assert image is not None
        same = self.arena.known_content(
            tenant=TENANT[replica], content_id=image.content_id, size_bytes=image.size_bytes
        )
        if same is None:
            assert TENANT[replica] != TENANT[other], "a tenant's own content is known"
            return
        assert same.tenant == TENANT[replica], "never across tenants"
        self.enter(replica, name, image.content_id, 9, self.arena.slabs_of(same), image.size_bytes)

    def enter(self, replica: str, name: str, content: str, generation: int, slabs: tuple[Slab, ...], size: int) -> None:
        self.arena.seal(
            Image(
                replica_id=replica, image_id=name, deployment_id=DEPLOYMENT[replica], tenant=TENANT[replica],
                generation=generation, content_id=content, size_bytes=size,
                slab_ids=tuple(slab.slab_id for slab in slabs),
            )
        )  # fmt: skip
        self.content[replica, name] = content

    @rule(replica=REPLICAS, name=NAMES)
    def begin_restore(self, replica: str, name: str) -> None:
        image = self.arena.images.get((replica, name))
        if image is not None and self.arena.tier_of(image) == "host":
            slabs = self.arena.slabs_of(image)
            self.arena.busy(slabs)
            self.restoring.append(slabs)

    @rule()
    def end_restore(self) -> None:
        if self.restoring:
            self.arena.idle(self.restoring.pop(0))

    @rule(needed=SIZES)
    def demote(self, needed: int) -> None:
        for slab in self.arena.coldest(needed):
            if not slab.is_on_disk:
                if self.arena.disk_used_bytes + slab.size_bytes > self.arena.disk_budget_bytes:
                    return
                slab.is_on_disk = True
            self.arena.left_host(slab)

    @rule(data=st.data())
    def name_a_slab(self, data: st.DataObject) -> None:
        """Its digest becomes known; equal ones of a tenant become one."""
        nameless = sorted(slab_id for slab_id, slab in self.arena.slabs.items() if slab.user_count and not slab.digest)
        assume(nameless)
        slab = self.arena.slabs[data.draw(st.sampled_from(nameless))]
        slab.digest = self.bytes_of[slab.slab_id]
        same = self.arena.same_as(slab)
        if same is not None:
            assert (same.tenant, same.size_bytes) == (slab.tenant, slab.size_bytes)
            self.arena.merge(slab, same)

    @rule(deployment=st.sampled_from(["a", "b", "c"]))
    def forget(self, deployment: str) -> None:
        self.arena.forget_deployment(deployment)
        assert deployment not in self.arena.deployment_ids()
        self.content = {key: kept for key, kept in self.content.items() if DEPLOYMENT[key[0]] != deployment}

    # ---- what holds always

    @invariant()
    def every_image_holds_its_own_bytes(self) -> None:
        if not hasattr(self, "arena"):
            return
        assert self.content.keys() == self.arena.images.keys()
        for key, image in self.arena.images.items():
            slabs = self.arena.slabs_of(image)
            assert {self.content[key]} == {self.bytes_of[slab.slab_id] for slab in slabs}
            assert {image.tenant} == {slab.tenant for slab in slabs}
            assert image.size_bytes == sum(slab.size_bytes for slab in slabs)
            assert all(slab.extent is not None or slab.is_on_disk for slab in slabs)

    @invariant()
    def what_is_restored_stays_where_it_is(self) -> None:
        for slabs in getattr(self, "restoring", []):
            assert all(slab.extent is not None for slab in slabs)
            assert all(self.arena.slabs.get(slab.slab_id) is slab for slab in slabs), "it was given to somebody else"

    @invariant()
    def extents_never_overlap_and_none_is_lost(self) -> None:
        if not hasattr(self, "arena"):
            return
        extents = [slab.extent for slab in self.arena.slabs.values() if slab.extent is not None]
        extents += [extent for free in self.arena.space.free.values() for extent in free]
        assert cover(extents) == dict.fromkeys(self.arena.space.blocks, BLOCK_BYTES)

    @invariant()
    def both_tiers_keep_their_bounds_and_nothing_unused_stays(self) -> None:
        if not hasattr(self, "arena"):
            return
        assert self.arena.disk_used_bytes <= self.arena.disk_budget_bytes
        assert self.arena.host_used_bytes <= self.arena.host_budget_bytes
        users = [slab_id for image in self.arena.images.values() for slab_id in image.slab_ids]
        for slab in self.arena.slabs.values():
            assert users.count(slab.slab_id) == slab.user_count
            assert slab.user_count or slab.busy_count

    @invariant()
    def a_promise_can_be_kept(self) -> None:
        if hasattr(self, "arena"):
            promised = sum(self.arena.promised_bytes(replica) for replica in self.arena.reserved)
            assert self.arena.sealed_bytes + promised <= self.arena.room_bytes


def cover(extents: list[Extent]) -> dict[int, int]:
    """{block: bytes} that the extents cover; they must not overlap, and lie without gaps."""
    found: dict[int, int] = {}
    for extent in sorted(extents):
        assert extent.offset_bytes == found.get(extent.block_id, 0), "a gap, or an overlap"
        assert extent.size_bytes > 0
        found[extent.block_id] = extent.end_bytes
    return found


TestKeeping = Keeping.TestCase
TestKeeping.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_space_that_is_free_in_crumbs_is_still_all_of_use() -> None:
    space = Space()
    space.add(Block(block_id=1, numa_index=0, size_bytes=10 * GRANULE_BYTES))
    taken = [space.take(GRANULE_BYTES, slab_bytes_max=4 * GRANULE_BYTES)[0] for _ in range(10)]
    for extent in taken[::2]:
        space.give(extent)

    assert () == space.take(6 * GRANULE_BYTES, slab_bytes_max=4 * GRANULE_BYTES)
    assert 5 == len(space.take(5 * GRANULE_BYTES, slab_bytes_max=4 * GRANULE_BYTES))


def test_the_nearest_node_is_used_first_and_the_other_when_it_is_full() -> None:
    space = Space()
    space.add(Block(block_id=1, numa_index=0, size_bytes=4 * GRANULE_BYTES))
    space.add(Block(block_id=2, numa_index=1, size_bytes=4 * GRANULE_BYTES))

    extents = space.take(6 * GRANULE_BYTES, slab_bytes_max=4 * GRANULE_BYTES, numa_order=(1,))

    assert [(2, 4 * GRANULE_BYTES), (1, 2 * GRANULE_BYTES)] == [(one.block_id, one.size_bytes) for one in extents]

"""Victims: allowed, enough, none in vain, and of all such sets the least harmful; held against brute force."""

import random
from itertools import chain, combinations

import pytest

from schemas.units import GiB
from services.placement.preemption import Preemption, victims_for
from services.placement.state import ClusterState, Deployment, Replica
from services.placement.tenants import Standing, standing_of
from tests.unit.placement.crowds import GPU_GIB, RESIDUE_GIB, Crowd, drawn_crowd, wish

NOW_S = 100.0


def ids(preemption: Preemption | None) -> list[str]:
    assert preemption is not None
    return [victim.replica_id for victim in preemption.victims]


# --- By hand ----------------------------------------------------------------------------------------------------------


def test_the_lowest_priority_gives_way() -> None:
    crowd = Crowd()
    crowd.join("n0", 2)
    crowd.stand(wish("low", 80, priority="low"), ("n0-gpu-0",))
    crowd.stand(wish("lower", 80, priority="very-low"), ("n0-gpu-1",))

    found = victims_for(crowd.state, crowd.admit(wish("new", 40)), NOW_S)

    assert ["lower-1"] == ids(found)
    assert found is not None
    assert ("n0", ("n0-gpu-1",), (40 * GiB,)) == (found.node, found.gpu_uuids, found.request_bytes)
    assert "priority 25 is below 150, and it may be preempted" == found.victims[0].reason


@pytest.mark.parametrize(
    ("priority", "is_preemptible"), [("very-high", True), ("high", None), ("low", False), ("very-high", None)]
)
def test_neither_an_equal_nor_what_is_not_preemptible_gives_way(priority: str, is_preemptible: bool | None) -> None:
    crowd = Crowd()
    crowd.join("n0")
    crowd.stand(wish("there", 80, priority=priority, is_preemptible=is_preemptible), ("n0-gpu-0",))

    assert victims_for(crowd.state, crowd.admit(wish("new", 40)), NOW_S) is None


def test_training_displaces_no_inference_by_its_default_priority() -> None:
    crowd = Crowd()
    crowd.join("n0")
    crowd.stand(wish("chat", 80, is_preemptible=True), ("n0-gpu-0",))

    assert victims_for(crowd.state, crowd.admit(wish("training", 40, priority="low")), NOW_S) is None


def test_what_must_stop_stays_where_what_may_park_can_go() -> None:
    crowd = Crowd()
    crowd.join("n0", 2)
    crowd.stand(wish("stops", 80, priority="low"), ("n0-gpu-0",))
    crowd.stand(wish("parks", 80, priority="low", is_parkable=True), ("n0-gpu-1",))

    assert ["parks-1"] == ids(victims_for(crowd.state, crowd.admit(wish("new", 80)), NOW_S))


def test_fewest_victims_then_least_excess_then_the_youngest() -> None:
    crowd = Crowd()
    crowd.join("n0", 4)
    crowd.stand(wish("half", 40, priority="low"), ("n0-gpu-0",), ("n0-gpu-0",))
    crowd.stand(wish("big", 80, priority="low"), ("n0-gpu-1",))
    crowd.stand(wish("old", 70, priority="low"), ("n0-gpu-2",), ready_at_s=10.0)
    crowd.stand(wish("young", 70, priority="low"), ("n0-gpu-3",), ready_at_s=20.0)

    assert ["young-1"] == ids(victims_for(crowd.state, crowd.admit(wish("new", 60)), NOW_S))


def test_a_minimum_runtime_is_had() -> None:
    crowd = Crowd()
    crowd.join("n0")
    crowd.stand(wish("there", 80, priority="low", minimum_runtime_s=60.0), ("n0-gpu-0",), ready_at_s=50.0)
    newcomer = crowd.admit(wish("new", 40))

    assert victims_for(crowd.state, newcomer, 109.9) is None
    assert ["there-1"] == ids(victims_for(crowd.state, newcomer, 110.0))


def test_a_newcomer_waits_before_it_displaces() -> None:
    crowd = Crowd()
    crowd.join("n0")
    crowd.stand(wish("there", 80, priority="low"), ("n0-gpu-0",))
    newcomer = crowd.admit(wish("new", 40, preemption_delay_s=30.0), at_s=50.0)

    assert victims_for(crowd.state, newcomer, 79.9) is None
    assert ["there-1"] == ids(victims_for(crowd.state, newcomer, 80.0))


def test_a_gang_ends_as_a_whole_and_is_dearer_than_one_replica() -> None:
    crowd = Crowd()
    crowd.join("n0", 2)
    crowd.join("n1", 2)
    crowd.stand(wish("gang", 80, priority="low"), ("n0-gpu-0",), ("n1-gpu-0",), gang_id="g")
    newcomer = crowd.admit(wish("new", 80, gpu_count=1))
    crowd.stand(wish("fixed", 80, priority="high"), ("n0-gpu-1",), ("n1-gpu-1",))

    found = victims_for(crowd.state, newcomer, NOW_S)

    assert ["gang-1", "gang-2"] == ids(found)
    assert found is not None
    assert found.victims[0].reason.endswith("its gang ends as a whole")

    crowd.join("n2")
    crowd.stand(wish("alone", 80, priority="low"), ("n2-gpu-0",))

    assert ["alone-1"] == ids(victims_for(crowd.state, newcomer, NOW_S))


def test_several_gpus_are_freed_by_those_who_stand_on_several() -> None:
    crowd = Crowd()
    crowd.join("n0", 4)
    crowd.stand(wish("wide", 80, priority="low", gpu_count=2), ("n0-gpu-1", "n0-gpu-3"))
    crowd.stand(wish("single", 80, priority="low"), ("n0-gpu-0",), ("n0-gpu-2",))

    found = victims_for(crowd.state, crowd.admit(wish("new", 60, gpu_count=2)), NOW_S)

    assert ["wide-1"] == ids(found)
    assert found is not None
    assert ("n0-gpu-1", "n0-gpu-3") == found.gpu_uuids


def test_nobody_ends_where_somebody_leaves_anyway() -> None:
    crowd = Crowd()
    crowd.join("n0", 2)
    crowd.stand(wish("going", 80), ("n0-gpu-0",))
    crowd.stand(wish("there", 80, priority="low"), ("n0-gpu-1",))
    crowd.begin_release("going-1")

    assert victims_for(crowd.state, crowd.admit(wish("new", 80)), NOW_S) is None


def test_a_lost_node_is_no_place() -> None:
    crowd = Crowd()
    crowd.join("n0")
    crowd.stand(wish("there", 80, priority="low"), ("n0-gpu-0",))
    crowd.state.nodes["n0"].lost_at_s = 1.0

    assert victims_for(crowd.state, crowd.admit(wish("new", 40)), NOW_S) is None


# --- Tenants ----------------------------------------------------------------------------------------------------------


def two_tenants(*, priority: str = "low") -> Crowd:
    """Each has a quota of one GPU; b holds two, both preemptible."""
    crowd = Crowd()
    crowd.join("n0", 2)
    crowd.quota("a", 1.0)
    crowd.quota("b", 1.0)
    crowd.stand(wish("b", 80, priority=priority, is_preemptible=True), ("n0-gpu-0",), ("n0-gpu-1",), tenant="b")
    return crowd


def test_a_tenant_within_its_quota_takes_back_from_one_that_is_over_it_at_equal_priority() -> None:
    crowd = two_tenants()

    found = victims_for(crowd.state, crowd.admit(wish("new", 80, priority="low"), tenant="a"), NOW_S)

    assert 1 == len(ids(found))
    assert found is not None
    assert "its tenant b holds 1 GPUs more than its part, and may be preempted" == found.victims[0].reason


def test_a_better_one_is_not_taken_back_for_a_quota() -> None:
    crowd = two_tenants(priority="medium")

    assert victims_for(crowd.state, crowd.admit(wish("new", 80, priority="low"), tenant="a"), NOW_S) is None


def test_who_is_over_its_own_quota_takes_nothing_from_one_that_is_within() -> None:
    crowd = two_tenants()
    crowd.release("b-2")
    crowd.stand(wish("a", 80, priority="low"), ("n0-gpu-1",), tenant="a")

    newcomer = crowd.admit(wish("new", 80, priority="very-high", is_preemptible=True), tenant="a")

    assert ["a-1"] == ids(victims_for(crowd.state, newcomer, NOW_S)), "its own tenant's, but not b's"


# --- Against brute force ----------------------------------------------------------------------------------------------


def may_go(state: ClusterState, replica: Replica, newcomer: Deployment, standing: Standing) -> bool:
    """The rules again, in plain words."""
    runtime_s = state.deployments[replica.deployment_id].spec.placement.minimum_runtime_s
    if not replica.is_preemptible or replica.is_releasing:
        return False
    if replica.ready_at_s is not None and NOW_S < replica.ready_at_s + runtime_s:
        return False
    share = newcomer.spec.share.request_bytes or 0
    is_within = not standing.parts or standing.is_within(newcomer.tenant, share * 1_000_000 // (GPU_GIB * GiB))
    is_over = bool(standing.parts) and standing.over_parts(replica.tenant) > 0
    is_other = bool(standing.parts) and replica.tenant != newcomer.tenant
    priority = newcomer.spec.priority_number
    if replica.priority < priority:
        return is_within or not is_other or is_over
    return replica.priority == priority and is_other and is_within and is_over


def fits(state: ClusterState, uuid: str, newcomer: Deployment, gone: tuple[Replica, ...]) -> bool:
    """Beside all who stay, or by turns with them unless that was so from the beginning."""

    def account(stay: list[Replica]) -> tuple[int, int]:
        request = newcomer.spec.share.request_bytes or 0
        residue = min(RESIDUE_GIB * GiB, request) if newcomer.spec.swap.is_parkable else request
        rests = [r.residue_on(uuid) if r.is_parkable else r.request_on(uuid) for r in stay] + [residue]
        all_of = [r.request_on(uuid) for r in stay] + [request]
        largest = max(whole - rest for whole, rest in zip(all_of, rests, strict=True))
        return sum(all_of), sum(rests) + largest

    here = state.on_gpu(uuid)
    room = GPU_GIB * GiB
    beside, turns = account([r for r in here if r not in gone])
    return beside <= room or (turns <= room and account(here)[1] > room)


def best_by_brute_force(state: ClusterState, newcomer: Deployment, standing: Standing) -> tuple[object, ...] | None:
    """The least of all sets of all places."""
    quota = state.quotas.get(newcomer.tenant)
    if not newcomer.spec.may_be_preempted and quota is not None:
        kept = [
            r.request_bytes for r in state.replicas.values() if r.tenant == newcomer.tenant and not r.is_preemptible
        ]
        gpus = (sum(kept) + (newcomer.spec.share.request_bytes or 0)) / (GPU_GIB * GiB)
        if gpus > (quota.parts or 0) / 1_000_000:
            return None
    found: list[tuple[object, ...]] = []
    uuids = [uuid for node in state.nodes.values() for uuid in node.gpus]
    for uuid in uuids:
        allowed = [r for r in state.on_gpu(uuid) if may_go(state, r, newcomer, standing)]
        subsets = chain.from_iterable(combinations(allowed, n) for n in range(1, len(allowed) + 1))
        if fits(state, uuid, newcomer, ()):
            continue
        missing = sum(r.request_on(uuid) for r in state.on_gpu(uuid))
        missing += (newcomer.spec.share.request_bytes or 0) - GPU_GIB * GiB
        options: list[tuple[tuple[object, ...], tuple[Replica, ...]]] = []
        for victims in subsets:
            if fits(state, uuid, newcomer, victims):
                rank = {tenant: place for place, tenant in enumerate(standing.over)}
                harm = (
                    max(v.priority for v in victims),
                    max(rank.get(v.tenant, len(rank)) for v in victims),
                    sum(not v.is_parkable for v in victims),
                    len(victims),
                    sum(v.request_bytes for v in victims) - max(0, missing),
                    -sum(v.ready_at_s if v.ready_at_s is not None else v.since_s for v in victims),
                    tuple(sorted(v.replica_id for v in victims)),
                )
                options.append((harm, victims))
        if options:
            least, ending = min(options, key=lambda option: option[0])
            if leaves_enough(ending, newcomer, standing):
                found.append((least, (uuid,)))
    return min(found) if found else None


def leaves_enough(victims: tuple[Replica, ...], newcomer: Deployment, standing: Standing) -> bool:
    if not standing.parts:
        return True
    share = newcomer.spec.share.request_bytes or 0
    is_within = standing.is_within(newcomer.tenant, share * 1_000_000 // (GPU_GIB * GiB))
    for tenant in {v.tenant for v in victims} - {newcomer.tenant}:
        parts = [
            v.request_bytes * 1_000_000 // (GPU_GIB * GiB)
            for v in victims
            if v.tenant == tenant and (v.priority == newcomer.spec.priority_number or not is_within)
        ]
        if parts and sum(parts) - max(parts) >= standing.over_parts(tenant):
            return False
    return True


@pytest.mark.parametrize("has_quotas", [False, True])
def test_victims_are_the_least_harm_that_brute_force_finds(has_quotas: bool) -> None:
    found_count = 0
    for seed in range(250):
        crowd = drawn_crowd(seed, has_quotas=has_quotas)
        for number, gib in enumerate((20, 40, 80)):
            newcomer = crowd.admit(
                wish(f"new{number}", gib, priority=("medium", "very-high")[seed % 2], is_parkable=seed % 3 == 0),
                tenant="ab"[seed % 2],
            )
            standing = standing_of(crowd.state)
            expected = best_by_brute_force(crowd.state, newcomer, standing)

            found = victims_for(crowd.state, newcomer, NOW_S)

            if expected is None:
                assert found is None, (seed, gib, found)
                continue
            found_count += 1
            harm = expected[0]
            assert isinstance(harm, tuple)
            assert harm[-1] == tuple(sorted(ids(found))), (seed, gib)
    assert found_count > 100, "the drawn fleets are no test"


def fit_all(state: ClusterState, gpus: tuple[str, ...], newcomer: Deployment, gone: tuple[Replica, ...]) -> bool:
    return all(fits(state, uuid, newcomer, gone) for uuid in gpus)


def test_several_gpus_get_victims_that_are_allowed_enough_and_all_needed() -> None:
    """And of no higher priority than needed. On several GPUs the least harm as a whole is not promised."""
    found_count = 0
    for seed in range(150):
        crowd = drawn_crowd(seed, node_gpus=(3, 4))
        state = crowd.state
        newcomer = crowd.admit(wish("new", (30, 60)[seed % 2], gpu_count=2 + seed % 2, priority="high"))
        standing = standing_of(state)

        found = victims_for(state, newcomer, NOW_S)

        if found is None:
            for node in state.nodes.values():
                allowed = tuple(r for r in state.on_node(node.name) if may_go(state, r, newcomer, standing))
                can = [uuid for uuid in node.gpus if fits(state, uuid, newcomer, allowed)]
                free = [uuid for uuid in node.gpus if fits(state, uuid, newcomer, ())]
                assert len(can) < newcomer.spec.share.gpu_count or len(free) >= newcomer.spec.share.gpu_count, seed
            continue
        found_count += 1
        victims = tuple(state.replicas[victim_id] for victim_id in ids(found))
        assert all(may_go(state, victim, newcomer, standing) for victim in victims), seed
        assert fit_all(state, found.gpu_uuids, newcomer, victims), seed
        assert len(found.gpu_uuids) == len(set(found.gpu_uuids)) == newcomer.spec.share.gpu_count
        for victim in victims:
            others = tuple(v for v in victims if v is not victim)
            assert not fit_all(state, found.gpu_uuids, newcomer, others), (seed, victim.replica_id)
        highest = max(victim.priority for victim in victims)
        for node in state.nodes.values():
            lower = [r for r in state.on_node(node.name) if may_go(state, r, newcomer, standing)]
            lower = [r for r in lower if r.priority < highest]
            can = [uuid for uuid in node.gpus if fits(state, uuid, newcomer, tuple(lower))]
            free = [uuid for uuid in node.gpus if fits(state, uuid, newcomer, ())]
            assert len(can) < newcomer.spec.share.gpu_count or len(free) >= newcomer.spec.share.gpu_count, seed
    assert found_count > 50, "the drawn fleets are no test"


@pytest.mark.parametrize("has_quotas", [False, True])
def test_what_was_kept_up_answers_as_what_is_made_anew(has_quotas: bool) -> None:
    """Whatever was asked before, whoever came and went."""
    differs_count = 0
    for seed in range(60):
        draw = random.Random(seed)
        crowd = drawn_crowd(seed, has_quotas=has_quotas, node_gpus=(2, 2))
        wishes = [
            crowd.admit(wish(f"new{n}", gib, priority="high", gpu_count=count), tenant=tenant)
            for n, (gib, count, tenant) in enumerate(((20, 1, "a"), (80, 1, "b"), (50, 2, "a")))
        ]
        before = None
        for step in range(12):
            now_s = NOW_S + 5 * step
            change_something(crowd, draw, step)
            for newcomer in wishes:
                kept = victims_for(crowd.state, newcomer, now_s)
                crowd.state.derived, index = None, crowd.state.derived

                assert victims_for(crowd.state, newcomer, now_s) == kept, (seed, step, newcomer.spec.name)

                crowd.state.derived = index
                differs_count += kept != before
                before = kept
    assert differs_count > 500, "nothing changed that mattered"


def change_something(crowd: Crowd, draw: random.Random, step: int) -> None:
    state = crowd.state
    present = sorted(state.replicas)
    kind = draw.choice(("release", "leave", "come", "gang", "quota", "join"))
    if kind == "release" and present:
        crowd.release(draw.choice(present))
    elif kind == "leave" and present:
        crowd.begin_release(draw.choice(present))
    elif kind == "come":
        uuid = draw.choice([uuid for node in state.nodes.values() for uuid in node.gpus])
        crowd.stand(wish(f"s{step}", draw.choice((5, 10)), priority="low"), (uuid,), tenant=draw.choice("ab"))
    elif kind == "gang":
        gang = wish(f"g{step}", 5, priority="very-low")
        crowd.stand(gang, ("n0-gpu-0",), ("n1-gpu-1",), gang_id=f"g{step}", tenant="b")
    elif kind == "quota" and state.quotas:
        crowd.quota(draw.choice("ab"), draw.choice((0.5, 1.0, 3.0)))
    elif kind == "join":
        crowd.join(f"x{step}", 2, allocatable_gib=draw.choice((40, 80)))

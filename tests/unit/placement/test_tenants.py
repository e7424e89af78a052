"""Quotas, what is divided above them, and the order of those who wait."""

import random

import pytest

from services.placement.packing.fleet import PARTS
from services.placement.state import Deployment
from services.placement.tenants import Demand, divided, order_of, over_quota, standing_of
from tests.unit.placement.crowds import Crowd, wish


def demand(tenant: str, wanted: float, quota: float = 0.0, weight: float = 1.0) -> Demand:
    return Demand(tenant=tenant, wanted_parts=int(wanted * PARTS), quota_parts=int(quota * PARTS), weight=weight)


def gpus(parts: dict[str, int]) -> dict[str, float]:
    return {tenant: count / PARTS for tenant, count in parts.items()}


@pytest.mark.parametrize(
    ("demands", "expected"),
    [
        ([demand("a", 10, 2), demand("b", 10, 4)], {"a": 3, "b": 5}),
        ([demand("a", 10, 2, weight=3), demand("b", 10, 4)], {"a": 3.5, "b": 4.5}),
        ([demand("a", 1, 2), demand("b", 10, 4)], {"a": 1, "b": 7}),
        ([demand("a", 3, 2), demand("b", 3, 4)], {"a": 3, "b": 3}),
        ([demand("a", 20, 12), demand("b", 20, 4)], {"a": 6, "b": 2}),
        ([demand("a", 10, 4, weight=0), demand("b", 10)], {"a": 4, "b": 4}),
        ([demand("a", 10, 4, weight=0), demand("b", 1)], {"a": 4, "b": 1}),
        ([], {}),
    ],
)
def test_quotas_first_then_weights_and_nobody_gets_more_than_it_wants(
    demands: list[Demand], expected: dict[str, float]
) -> None:
    assert expected == pytest.approx(gpus(divided(8 * PARTS, demands)))


def test_all_is_divided_and_no_part_is_made_up() -> None:
    for seed in range(500):
        draw = random.Random(seed)
        demands = [
            demand(f"t{n}", draw.uniform(0, 9), draw.choice((0, 1, 2.5)), draw.choice((0.5, 1.0, 3.0)))
            for n in range(draw.randint(1, 6))
        ]
        capacity = draw.randint(0, 20 * PARTS)

        found = divided(capacity, demands)

        wanted = {d.tenant: d.wanted_parts for d in demands}
        guaranteed = {d.tenant: min(d.wanted_parts, d.quota_parts) for d in demands}
        assert all(0 <= found[tenant] <= wanted[tenant] for tenant in found), seed
        assert abs(sum(found.values()) - min(capacity, sum(wanted.values()))) <= len(demands), seed
        if sum(guaranteed.values()) <= capacity:
            assert all(found[tenant] >= guaranteed[tenant] for tenant in found), seed


def names(deployments: list[Deployment]) -> list[str]:
    return [deployment.spec.name for deployment in deployments]


def test_without_quotas_priority_and_then_age_decide() -> None:
    crowd = Crowd()
    waiting = [
        crowd.admit(wish("late", 10, priority="high"), at_s=9.0),
        crowd.admit(wish("low", 10, priority="low"), at_s=1.0, tenant="b"),
        crowd.admit(wish("early", 10, priority="high"), at_s=2.0, tenant="c"),
    ]

    assert ["early", "late", "low"] == names(order_of(crowd.state, waiting))


def test_between_tenants_who_has_least_of_its_part_comes_first_and_priority_orders_within_each() -> None:
    crowd = Crowd()
    crowd.join("n0", 4)
    crowd.quota("a", 2.0)
    crowd.quota("b", 2.0)
    crowd.stand(wish("there", 80), ("n0-gpu-0",), tenant="a")
    waiting = [
        crowd.admit(wish("a-high", portion=1.0, priority="high"), tenant="a"),
        crowd.admit(wish("b-low", portion=1.0, priority="low"), tenant="b"),
        crowd.admit(wish("b-medium", portion=1.0, priority="medium"), tenant="b"),
    ]

    assert ["b-medium", "a-high", "b-low"] == names(order_of(crowd.state, waiting))


def test_a_quota_binds_what_is_never_preempted_and_tells_what_is_left() -> None:
    crowd = Crowd()
    crowd.join("n0", 4)
    crowd.quota("a", 1.5)
    crowd.stand(wish("there", 80), ("n0-gpu-0",), tenant="a")
    crowd.stand(wish("lent", 80, priority="low"), ("n0-gpu-1",), tenant="a")

    assert "" == over_quota(crowd.state, crowd.admit(wish("half", portion=0.5), tenant="a"))
    assert "" == over_quota(crowd.state, crowd.admit(wish("more", portion=1.0, priority="low"), tenant="a"))
    assert "" == over_quota(crowd.state, crowd.admit(wish("other", portion=1.0), tenant="b"))
    assert (
        "whole asks for 1 GPUs that are never taken back, and of the quota of tenant a, 1.5 GPUs, 0.5 are left"
        == over_quota(crowd.state, crowd.admit(wish("whole", portion=1.0), tenant="a"))
    )


def test_what_leaves_and_what_is_on_a_lost_node_is_not_counted() -> None:
    crowd = Crowd()
    crowd.join("n0", 2)
    crowd.join("n1")
    crowd.quota("a", 3.0)
    crowd.stand(wish("m", 80), ("n0-gpu-0",), ("n0-gpu-1",), ("n1-gpu-0",), tenant="a")
    occupancy = crowd.state.index.occupancy
    assert 3 * PARTS == occupancy.used_parts("a")

    crowd.begin_release("m-1")
    crowd.state.index.lose_node("n1")
    crowd.state.nodes["n1"].lost_at_s = 1.0

    assert (PARTS, PARTS) == (occupancy.used_parts("a"), occupancy.fixed_parts("a"))


def test_a_tenant_that_holds_more_than_its_part_is_over() -> None:
    crowd = Crowd()
    crowd.join("n0", 4)
    crowd.quota("a", 1.0)
    crowd.quota("b", 1.0)
    crowd.stand(wish("a", 80, priority="low"), *[(f"n0-gpu-{n}",) for n in range(4)], tenant="a")
    assert () == standing_of(crowd.state).over, "nobody else wants anything"

    crowd.admit(wish("b", portion=1.0, priority="low", replica_count=3), tenant="b")

    standing = standing_of(crowd.state)
    assert (("a",), 2 * PARTS) == (standing.over, standing.over_parts("a"))

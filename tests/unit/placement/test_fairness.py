"""Nobody is starved: properties of a fleet in which tenants want more than there is, and workloads come and go."""

import random

import pytest

from schemas.inbox import QuotaRequested
from schemas.placement import CommandDuplicated, CommandRejected, FailureReason, PlacementFailed, QuotaSet
from services.placement import commands as _commands  # noqa: F401  # Registers its handlers.
from services.placement.packing.fleet import PARTS
from services.placement.tenants import Demand, divided
from tests.unit.placement.crowds import wish
from tests.unit.placement.living import Living


def used_gpus(living: Living, tenant: str) -> float:
    return living.state.index.occupancy.used_parts(tenant) / PARTS


@pytest.mark.parametrize("seed", range(20))
def test_under_constant_demand_each_tenant_reaches_its_part_less_one_workload(seed: int) -> None:
    """Whoever came first and took everything."""
    draw = random.Random(seed)
    gpu_count = draw.choice((4, 6, 8))
    living = Living()
    living.join("n0", gpu_count)
    terms = {tenant: (draw.choice((0.0, 1.0, 2.0)), draw.choice((1.0, 2.0, 3.0))) for tenant in ("a", "b", "c")}
    for tenant, (quota, weight) in terms.items():
        living.quota(tenant, quota, weight)
    order = draw.sample(sorted(terms), 3)
    for tenant in order:
        living.deploy(wish(f"job-{tenant}", portion=1.0, priority="low", replica_count=gpu_count), tenant=tenant)
        living.run_for(draw.choice((1, 60)))
    living.run_for(120)

    demands = [
        Demand(tenant=t, wanted_parts=gpu_count * PARTS, quota_parts=int(quota * PARTS), weight=weight)
        for t, (quota, weight) in terms.items()
    ]
    parts = divided(gpu_count * PARTS, demands)
    for tenant in terms:
        assert used_gpus(living, tenant) > parts[tenant] / PARTS - 1, (tenant, terms, order)

    before = len(living.preemptions())
    living.run_for(300)
    assert before == len(living.preemptions()), "a fair division is not redivided"


@pytest.mark.parametrize("seed", range(12))
def test_a_wish_within_its_tenants_quota_is_placed_while_others_never_stop_asking(seed: int) -> None:
    """Jobs of equal or lower priority come and go; the others' queue is never empty."""
    draw = random.Random(seed)
    living = Living()
    living.join("n0", 4)
    living.quota("busy", 2.0, 3.0)
    living.quota("quiet", 2.0)
    for index in range(12):
        living.deploy(wish(f"busy{index}", portion=draw.choice((0.5, 1.0)), priority="low"), tenant="busy")
    living.run_for(20)
    assert used_gpus(living, "busy") == 4, "it holds all that there is"
    priority = draw.choice(("low", "medium", "very-high"))
    living.deploy(wish("quiet", portion=draw.choice((0.5, 1.0)), priority=priority, replica_count=2), tenant="quiet")
    for index in range(30):
        if index % 3 == 0:
            name = next(iter(n for n in living.placed() if n.startswith("busy")), None)
            if name is not None:
                living.retire(name, tenant="busy")
        living.deploy(wish(f"more{index}", portion=0.5, priority="low"), tenant="busy")
        living.run_for(5)

    assert ["quiet", "quiet"] == [name for name in living.placed() if name == "quiet"]


def test_what_is_never_preempted_stays_within_the_quota_whatever_is_asked() -> None:
    for seed in range(15):
        draw = random.Random(seed)
        living = Living()
        living.join("n0", 3)
        living.join("n1", 2)
        quotas = {"a": 1.5, "b": 2.0}
        for tenant, quota in quotas.items():
            living.quota(tenant, quota)
        for index in range(25):
            tenant = draw.choice(("a", "b"))
            name = f"m{draw.randrange(10)}"
            if draw.random() < 0.25 and living.state.named(tenant, name) is not None:
                living.retire(name, tenant=tenant)
            else:
                gib, portion = draw.choice(((None, 0.5), (None, 1.0), (30, None)))
                priority = draw.choice(("low", "high", "very-high"))
                spec = wish(name, gib, portion=portion, priority=priority, replica_count=draw.choice((1, 2)))
                living.deploy(spec, tenant=tenant)
            living.run_for(draw.choice((1, 10)))
            for who, quota in quotas.items():
                fixed = living.state.index.occupancy.fixed_parts(who)
                assert fixed <= quota * PARTS, (seed, index, who)
        reasons = [f.reason for f in living.told(PlacementFailed) if isinstance(f, PlacementFailed)]
        assert seed or FailureReason.OVER_QUOTA in reasons


def test_quotas_are_the_operators() -> None:
    living = Living(operator_tenant="boss")
    living.now(QuotaRequested(command_id="1", quota_tenant="a", gpu_quota=9.0), tenant="a")
    living.now(QuotaRequested(command_id="2", quota_tenant="a", gpu_quota=2.0), tenant="boss")
    living.now(QuotaRequested(command_id="3", quota_tenant="a", gpu_quota=2.0), tenant="boss")
    living.now(QuotaRequested(command_id="4", quota_tenant="a", gpu_quota=None), tenant="boss")
    living.run_for(1)

    (rejected,) = living.told(CommandRejected)
    assert isinstance(rejected, CommandRejected)
    assert ("SUB-OPR-001", "only the operator's tenant ('boss') may set quotas") == (rejected.code, rejected.message)
    assert [2.0, None] == [fact.gpu_quota for fact in living.told(QuotaSet) if isinstance(fact, QuotaSet)]
    assert 1 == len(living.told(CommandDuplicated))
    assert {} == living.state.quotas

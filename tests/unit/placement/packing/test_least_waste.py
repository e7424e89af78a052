"""The default policy: what is free stays worth most to those who are likely to come."""

import random
from collections.abc import Mapping
from fractions import Fraction

from services.placement.packing.fleet import Ask, Fleet, GpuShape
from services.placement.packing.index import RETOLD_PERCENT, Packer
from services.placement.packing.least_waste import LeastWaste
from services.placement.packing.policies import policy_named
from services.placement.packing.potential import Potential
from tests.unit.placement.packing.fleets import GPU, fleet_of, node, share


def informed(fleet: Fleet, classes: Mapping[Ask, int]) -> Potential:
    policy = LeastWaste().informed(fleet, classes)
    assert isinstance(policy, Potential)
    return policy


def chosen(fleet: Fleet, classes: Mapping[Ask, int], ask: Ask) -> tuple[str, tuple[int, ...]]:
    place = Packer(fleet, LeastWaste(), classes=classes).choose(ask)
    assert place is not None
    return place.node, place.gpu_indices


def test_a_hole_is_kept_for_those_whom_it_fits() -> None:
    """0.3 goes with 0.7; a quarter goes to another quarter, though the hole of 0.3 would be the tighter fit."""
    fleet = fleet_of(a=node(GPU, GPU))
    fleet.take("a", (0, 1), (700, 500))
    assert chosen(fleet, {share(700): 10, share(300): 12, share(250): 10}, share(250)) == ("a", (1,))


def test_a_small_one_goes_into_a_rest_that_is_worth_nothing_to_others() -> None:
    fleet = fleet_of(a=node(GPU, GPU, GPU))
    fleet.take("a", (0, 1), (470, 810))
    assert chosen(fleet, {share(470): 10, share(810): 10, share(160): 1}, share(160)) == ("a", (1,))


def test_cpu_is_taken_where_no_gpu_will_miss_it() -> None:
    fleet = fleet_of(a=node(GPU, cpu_milli=16_000), b=node(GPU, cpu_milli=64_000))
    trainer = Ask(portion=Fraction(1), cpu_milli=12_000)
    assert chosen(fleet, {trainer: 1}, Ask(gpu_count=0, cpu_milli=8_000)) == ("b", ())
    assert chosen(fleet, {trainer: 1}, Ask(size_units=500, cpu_milli=12_000))[0] == "b"


def test_where_nobody_asks_for_cpu_no_gpu_is_short_of_it() -> None:
    fleet = fleet_of(a=node(GPU, cpu_milli=0))
    assert informed(fleet, {share(500): 3}).shortages == ()
    assert chosen(fleet, {share(500): 3}, share(500)) == ("a", (0,))


def test_without_counts_used_gpus_are_filled_before_idle_ones() -> None:
    fleet = fleet_of(a=node(GPU, GPU), b=node(GPU, GPU))
    fleet.take("b", (1,), (400,))
    assert chosen(fleet, {}, share(300)) == ("b", (1,))


def test_a_used_gpu_is_filled_before_an_idle_one_although_it_would_be_full_then() -> None:
    """FGD would rather have two holes of use than a whole GPU and a small rest, where nobody asks for whole ones."""
    fleet = fleet_of(a=node(GPU, GPU))
    fleet.take("a", (1,), (375,))
    assert chosen(fleet, {share(375): 1, share(500): 1}, share(500)) == ("a", (1,))


def test_gpus_of_different_capacity_compare_by_what_is_taken_of_them() -> None:
    """A share in bytes is a larger part of a small GPU; it does not shun it for that."""
    small = GpuShape(model="S", capacity_units=40)
    large = GpuShape(model="L", capacity_units=80)
    holes = informed(fleet_of(a=node(small), b=node(large)), {share(20): 1}).holes
    lost_small = holes[small][500] - holes[small][0]
    lost_large = holes[large][750] - holes[large][500]
    assert lost_small == lost_large > 0


def test_a_kind_that_only_some_can_use_is_worth_what_it_is_to_them() -> None:
    old, new = GpuShape(model="old", capacity_units=1000), GpuShape(model="new", capacity_units=1000)
    only_new = Ask(size_units=250, gpu_models=frozenset({"new"}))
    holes = informed(fleet_of(a=node(old), b=node(new)), {only_new: 1, share(500): 1}).holes
    assert holes[old][250] == 0
    assert holes[new][250] > 0


def test_the_order_of_the_counts_does_not_matter() -> None:
    fleet = fleet_of(a=node(GPU, GPU))
    classes = {Ask(size_units=size, cpu_milli=7 * size): 1 + size % 5 for size in range(30, 1000, 67)}
    assert informed(fleet, classes) == informed(fleet, dict(reversed(classes.items())))


def test_a_policy_is_told_anew_once_the_counts_have_moved_by_half() -> None:
    packer = Packer(fleet_of(a=node(GPU)), LeastWaste(), classes={share(500): 10})
    first = packer.policy
    packer.observed(share(250), 10 * RETOLD_PERCENT // 100 - 1)
    assert packer.policy is first
    packer.observed(share(250))
    second = packer.policy
    assert isinstance(second, Potential)
    assert second.holes[GPU][250] > 0
    packer.forgotten(share(250), 5)
    assert packer.policy is second, "5 of 15 is less than half"
    packer.forgotten(share(500), 3)
    assert packer.policy is not second


MIX = ((1000, 8, 12_000), (810, 3, 4_000), (470, 2, 20_000), (320, 1, 15_000), (230, 1, 18_000), (0, 2, 18_000))
"""(milli-GPU, how often of 17, milli-CPU): in the style of the openb traces."""


def allocated_milli(policy: str, seed: int) -> int:
    """After 130 % of the cluster were asked for."""
    nodes = {f"n{i:02}": node(*[GPU] * (2 if i % 3 else 8), cpu_milli=104_000 if i % 3 else 96_000) for i in range(12)}
    fleet = fleet_of(**nodes)
    asks = [Ask(gpu_count=1, size_units=m, cpu_milli=c) if m else Ask(gpu_count=0, cpu_milli=c) for m, _, c in MIX]
    classes = {ask: often for ask, (_, often, _) in zip(asks, MIX, strict=True)}
    packer = Packer(fleet, policy_named(policy), classes=classes)
    capacity = sum(len(shape.gpus) * 1000 for shape in nodes.values())
    asked = allocated = 0
    rng = random.Random(seed)
    while asked < 1.3 * capacity:
        ask = rng.choices(asks, weights=list(classes.values()))[0]
        asked += ask.size_units or 0
        place = packer.choose(ask)
        if place is not None:
            fleet.take(place.node, place.gpu_indices, place.units, ask.cpu_milli)
            allocated += sum(place.units)
    return allocated


def test_an_overfull_cluster_is_filled_better_than_by_fragmentation_alone() -> None:
    ours, theirs = (sum(allocated_milli(policy, seed) for seed in range(6)) for policy in ("least-waste", "fgd"))
    assert ours > theirs

"""`Packer.choose` on small fleets: what fits, what is taken first, what a trial leaves behind."""

from fractions import Fraction

import pytest

from services.placement.packing.fleet import Ask, GpuShape, Place
from services.placement.packing.index import Packer
from services.placement.packing.policies import policy_named
from tests.unit.placement.packing.fleets import GPU, fleet_of, node, packer_of, share, whole


def taken(packer: Packer, ask: Ask) -> Place | None:
    place = packer.choose(ask)
    if place is not None:
        packer.fleet.take(place.node, place.gpu_indices, place.units, ask.cpu_milli, ask.memory_bytes)
    return place


def test_partly_used_gpus_are_filled_before_a_fresh_one_is_touched() -> None:
    packer = packer_of(a=node(GPU, GPU), b=node(GPU))
    packer.fleet.take("b", [0], [300])

    assert Place("b", (0,), (500,)) == taken(packer, share(500))
    assert Place("b", (0,), (200,)) == taken(packer, share(200))


def test_spread_takes_the_least_used_gpu_of_the_least_used_node() -> None:
    packer = packer_of("spread", a=node(GPU, GPU), b=node(GPU, GPU))
    packer.fleet.take("a", [0], [300])
    packer.fleet.take("b", [1], [200])

    assert Place("b", (0,), (500,)) == taken(packer, share(500))


def test_gpu_spread_is_inside_the_node_only() -> None:
    packer = packer_of(a=node(GPU, GPU), b=node(GPU))
    packer.fleet.take("a", [0], [300])
    packer.fleet.take("b", [0], [900])

    assert Place("a", (1,), (500,)) == packer.choose(share(500), gpu_spread=True)


def test_a_portion_is_of_each_gpu_and_a_whole_gpu_has_nothing_on_it() -> None:
    packer = packer_of(a=node(GpuShape(model="L4", capacity_units=7)), b=node(GPU))

    assert Place("b", (0,), (333,)) == packer.choose(Ask(portion=Fraction(1, 3)), without_nodes={"a"})
    packer.fleet.set_foreign("b", 0, 1)
    assert Place("a", (0,), (7,)) == packer.choose(whole())
    packer.fleet.take("a", [0], [1])
    assert packer.choose(whole()) is None
    assert Place("a", (0,), (2,)) == packer.choose(Ask(portion=Fraction(1, 3)), without_nodes={"b"})


def test_several_gpus_come_from_one_node_and_the_best_linked_of_equals_are_taken() -> None:
    pairs = ((0, 1, 1, 4), (1, 0, 4, 1), (1, 4, 0, 1), (4, 1, 1, 0))
    packer = packer_of(a=node(GPU), b=node(GPU, GPU, GPU, GPU, links=pairs))

    assert Place("b", (0, 3), (1000, 1000)) == taken(packer, whole(2))
    assert Place("b", (1, 2), (1000, 1000)) == taken(packer, whole(2))
    assert packer.choose(whole(2)) is None


def test_what_a_node_lacks_rules_it_out() -> None:
    packer = packer_of(
        a=node(GPU, cpu_milli=1000),
        b=node(GPU, memory_bytes=10),
        c=node(GpuShape(model="T4", capacity_units=1000)),
        d=node(GPU),
        e=node(GPU, labels=frozenset({"zone=x"})),
        f=node(GpuShape(model="H100", capacity_units=1000, grade_rank=3), labels=frozenset({"zone=x"})),
    )
    ask = Ask(1, None, 10, 2000, 20, frozenset({"H100"}), frozenset({"zone=x"}), 2)

    assert packer.choose(ask) == Place("e", (0,), (10,))
    assert packer.choose(ask, without_nodes=["e"]) is None
    packer.fleet.set_open("e", False)
    assert packer.choose(ask) is None


def test_an_ask_without_gpus_needs_the_host_only() -> None:
    packer = packer_of("first-fit", a=node(cpu_milli=500), b=node(GPU))

    assert Place("b", (), ()) == packer.choose(Ask(gpu_count=0, cpu_milli=1000))


def test_a_trial_leaves_nothing_behind_and_trials_nest() -> None:
    packer = packer_of(a=node(GPU, GPU))

    with packer.trial():
        assert Place("a", (0,), (1000,)) == taken(packer, whole())
        with packer.trial():
            assert Place("a", (1,), (1000,)) == taken(packer, whole())
            assert packer.choose(share(1)) is None
        assert (0, 1000) == packer.fleet.free_units("a")
    assert (1000, 1000) == packer.fleet.free_units("a")


def test_more_than_there_is_may_be_taken_and_nothing_fits_until_it_is_given_back() -> None:
    packer = packer_of(a=node(GPU))
    packer.fleet.take("a", [0], [700], 1000, 5)
    packer.fleet.take("a", [0], [700], 1000, 5)

    assert (-400,) == packer.fleet.free_units("a")
    assert packer.choose(share(1)) is None
    packer.fleet.give("a", [0], [700], 1000, 5)
    assert Place("a", (0,), (300,)) == packer.choose(share(300))
    assert (63_000, (1 << 40) - 5) == (packer.fleet.cpu_milli_left("a"), packer.fleet.memory_bytes_left("a"))


def test_classes_are_counted_and_cannot_be_forgotten_more_often_than_seen() -> None:
    packer = packer_of(a=node(GPU))
    packer.observed(share(100), 2)
    packer.forgotten(share(100))
    packer.forgotten(share(100))

    with pytest.raises(ValueError, match="more often"):
        packer.forgotten(share(100))


def test_bad_words_are_refused_with_one_sentence() -> None:
    with pytest.raises(ValueError, match="did you mean 'best-fit'"):
        policy_named("bestfit")
    with pytest.raises(ValueError, match="either a portion or a size"):
        Ask()
    with pytest.raises(ValueError, match="in the fleet already"):
        fleet_of(a=node(GPU)).add_node("a", node(GPU))

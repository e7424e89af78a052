"""The index answers as the reference does that looks at every node, whatever happened before; compiled or not."""

import os
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.placement.packing import reference
from services.placement.packing.fleet import Ask, Fleet, GpuShape, NodeShape, Place
from services.placement.packing.index import Packer
from services.placement.packing.policies import POLICIES, policy_named

NAMES = [f"node-{i}" for i in range(7)]
KINDS = [
    GpuShape(model="A", capacity_units=1000),
    GpuShape(model="A", capacity_units=80 << 30, grade_rank=1),
    GpuShape(model="B", capacity_units=7, grade_rank=2),
]
LABELS = [frozenset[str](), frozenset({"zone=x"}), frozenset({"zone=x", "disk=fast"})]
PORTIONS = [Fraction(1), Fraction(1, 2), Fraction(1, 3), Fraction(3, 10), Fraction(19, 100)]
LINKS = ((0, 1, 3, 1), (1, 0, 1, 3), (3, 1, 0, 1), (1, 3, 1, 0))


@st.composite
def shapes(draw: st.DrawFn) -> NodeShape:
    gpus = tuple(draw(st.lists(st.sampled_from(KINDS[: draw(st.integers(1, 3))]), max_size=4)))
    return NodeShape(
        cpu_milli=draw(st.sampled_from([1000, 16_000, 96_000])),
        memory_bytes=draw(st.sampled_from([10, 1 << 40])),
        gpus=gpus,
        labels=draw(st.sampled_from(LABELS)),
        links=tuple(row[: len(gpus)] for row in LINKS[: len(gpus)]) if draw(st.booleans()) else (),
    )


@st.composite
def asks(draw: st.DrawFn) -> Ask:
    count = draw(st.sampled_from([0, 1, 1, 1, 1, 2, 3]))
    is_portion = draw(st.booleans())
    return Ask(
        gpu_count=count,
        portion=draw(st.sampled_from(PORTIONS)) if count and is_portion else None,
        size_units=draw(st.sampled_from([0, 1, 3, 300, 500, 1000, 30 << 30])) if count and not is_portion else None,
        cpu_milli=draw(st.sampled_from([0, 500, 4000, 12_000])),
        memory_bytes=draw(st.sampled_from([0, 0, 6])),
        gpu_models=draw(st.sampled_from([frozenset[str](), frozenset({"A"}), frozenset({"A", "B"})])),
        labels=draw(st.sampled_from(LABELS[:2])),
        grade_rank=draw(st.sampled_from([None, None, 1])),
    )


def check_story(data: st.DataObject, policy: str, *, is_compiled: bool) -> None:
    fleet = Fleet()
    for name in data.draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True)):
        fleet.add_node(name, data.draw(shapes()))
    known = data.draw(st.lists(asks(), min_size=1, max_size=6))
    classes = {ask: data.draw(st.integers(1, 50)) for ask in known}
    packer = Packer(fleet, policy_named(policy), classes=classes, is_compiled=is_compiled)
    taken: list[tuple[Place, Ask]] = []
    draws = 0
    for _ in range(data.draw(st.integers(1, 25))):
        match data.draw(st.sampled_from(["take"] * 6 + ["give", "foreign", "open", "node", "class", "trial"])):
            case "take":
                ask = data.draw(st.sampled_from(known))
                without = data.draw(st.lists(st.sampled_from(NAMES), max_size=2))
                spread = data.draw(st.booleans())
                place = packer.choose(ask, without_nodes=without, gpu_spread=spread)
                expected = reference.choose(
                    fleet, packer.policy, ask, without_nodes=without, gpu_spread=spread, draw=draws
                )
                draws += policy == "random"
                assert expected == place
                if place is not None:
                    taken.append((place, ask))
                    fleet.take(place.node, place.gpu_indices, place.units, ask.cpu_milli, ask.memory_bytes)
            case "give" if taken:
                place, ask = taken.pop(data.draw(st.integers(0, len(taken) - 1)))
                if place.node in fleet.nodes:
                    fleet.give(place.node, place.gpu_indices, place.units, ask.cpu_milli, ask.memory_bytes)
            case "foreign":
                name = data.draw(st.sampled_from(fleet.names))
                if gpus := fleet.nodes[name].shape.gpus:
                    index = data.draw(st.integers(0, len(gpus) - 1))
                    fleet.set_foreign(name, index, data.draw(st.sampled_from([0, 1, 200, 2000])))
            case "open":
                fleet.set_open(data.draw(st.sampled_from(fleet.names)), data.draw(st.booleans()))
            case "node":
                name = data.draw(st.sampled_from(NAMES))
                if name not in fleet.nodes:
                    fleet.add_node(name, data.draw(shapes()))
                elif len(fleet.names) > 1:
                    fleet.remove_node(name)
                    taken = [(place, ask) for place, ask in taken if place.node != name]
            case "class":
                packer.observed(data.draw(st.sampled_from(known)), 10)
            case "trial":
                before = {room.name: (list(room.free_units), room.cpu_milli, room.memory_bytes) for room in fleet}
                with packer.trial():
                    for ask in data.draw(st.lists(st.sampled_from(known), max_size=4)):
                        place = packer.choose(ask)
                        assert reference.choose(fleet, packer.policy, ask, draw=draws) == place
                        draws += policy == "random"
                        if place is not None:
                            fleet.take(place.node, place.gpu_indices, place.units, ask.cpu_milli, ask.memory_bytes)
                assert before == {
                    room.name: (list(room.free_units), room.cpu_milli, room.memory_bytes) for room in fleet
                }


@pytest.mark.parametrize("policy", [policy.name for policy in POLICIES])
@settings(
    deadline=None, max_examples=int(os.environ.get("PACKING_EXAMPLES", "40")), suppress_health_check=[*HealthCheck]
)
@given(data=st.data())
def test_the_plain_index_answers_as_the_reference(policy: str, data: st.DataObject) -> None:
    check_story(data, policy, is_compiled=False)


@pytest.mark.parametrize("policy", [policy.name for policy in POLICIES])
@settings(
    deadline=None, max_examples=int(os.environ.get("PACKING_EXAMPLES", "40")), suppress_health_check=[*HealthCheck]
)
@given(data=st.data())
def test_the_compiled_index_answers_as_the_reference(policy: str, data: st.DataObject) -> None:
    pytest.importorskip("numba", reason="numba is not installed: the index runs plain")
    check_story(data, policy, is_compiled=True)

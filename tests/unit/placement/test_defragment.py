"""Moves that turn whole GPUs free or let a waiting ask in."""

import random
from collections import defaultdict
from typing import Any

import pytest

from services.placement.defragment import Board, Gpu, Occupant, Plan, free_gpus, make_room
from services.placement.packing.fleet import Ask, Fleet, GpuShape, NodeShape
from services.placement.packing.index import Packer
from services.placement.packing.policies import policy_named

CAPACITY = 100


class Cluster:
    """Nodes of some GPUs of 100 units; occupants by name."""

    def __init__(self, *gpu_counts: int, policy: str = "best-fit", cpu_milli: int = 10**6) -> None:
        self.fleet = Fleet()
        for number, count in enumerate(gpu_counts):
            gpus = tuple(GpuShape(model="H100", capacity_units=CAPACITY) for _ in range(count))
            self.fleet.add_node(f"n{number}", NodeShape(cpu_milli=cpu_milli, memory_bytes=10**6, gpus=gpus))
        self.occupants: dict[str, Occupant] = {}
        self.packer = Packer(self.fleet, policy_named(policy))
        self.park_room: dict[str, int] = {}

    def put(self, name: str, node: str, *gpus: int, units: int, cpu_milli: int = 0, **values: Any) -> None:
        ask = Ask(gpu_count=len(gpus), size_units=units, cpu_milli=cpu_milli)
        values.setdefault("moved_bytes", units)
        its = Occupant(replica_id=name, node=node, gpu_indices=gpus, units=(units,) * len(gpus), ask=ask, **values)
        self.occupants[name] = its
        self.fleet.take(node, gpus, its.units, cpu_milli, 0)

    @property
    def board(self) -> Board:
        on_gpu: dict[Gpu, list[Occupant]] = defaultdict(list)
        for occupant in self.occupants.values():
            for gpu in occupant.gpus:
                on_gpu[gpu].append(occupant)
        return Board(packer=self.packer, on_gpu=on_gpu, park_room=self.park_room)

    def free(self, **values: Any) -> Plan:
        values.setdefault("move_count_max", 8)
        return free_gpus(self.board, **values)

    def room_for(self, gpu_count: int, units: int, **values: Any) -> Plan | None:
        values.setdefault("move_count_max", 8)
        return make_room(self.board, Ask(gpu_count=gpu_count, size_units=units), **values)


def moves(plan: Plan | None) -> dict[str, tuple[str, tuple[int, ...]]]:
    assert plan is not None
    return {step.occupant.replica_id: (step.place.node, step.place.gpu_indices) for step in plan.steps}


def test_the_least_used_gpu_is_emptied_into_the_fuller_one() -> None:
    cluster = Cluster(2)
    cluster.put("a", "n0", 0, units=50)
    cluster.put("b", "n0", 1, units=20)

    plan = cluster.free()

    assert ({"b": ("n0", (0,))}, (("n0", 1),)) == (moves(plan), plan.freed)


def test_nothing_moves_where_no_gpu_would_turn_free() -> None:
    cluster = Cluster(2)
    cluster.put("a", "n0", 0, units=60)
    cluster.put("b", "n0", 1, units=50)
    assert () == cluster.free().steps

    alone = Cluster(1, 1)
    alone.put("a", "n0", 0, units=10)
    assert () == alone.free().steps, "an idle GPU is no target: nothing would be won"


def test_what_may_not_be_moved_keeps_its_gpu() -> None:
    cluster = Cluster(2)
    cluster.put("a", "n0", 0, units=50, is_movable=False)
    cluster.put("b", "n0", 1, units=20, is_movable=False)

    assert () == cluster.free().steps


def test_serving_replicas_stay_where_idle_ones_can_go_and_on_demand_only() -> None:
    cluster = Cluster(3)
    cluster.put("full", "n0", 0, units=60, is_movable=False)
    cluster.put("serves", "n0", 1, units=10, is_serving=True)
    cluster.put("idle", "n0", 2, units=30)

    assert ["idle"] == list(moves(cluster.free(move_count_max=1)))
    assert {"idle", "serves"} == set(moves(cluster.free()))
    assert {"idle"} == set(moves(cluster.free(may_move_serving=False)))


def test_fewest_bytes_for_each_freed_gpu_are_moved() -> None:
    cluster = Cluster(3)
    cluster.put("full", "n0", 0, units=60, is_movable=False)
    cluster.put("heavy", "n0", 1, units=30, moved_bytes=500)
    cluster.put("light", "n0", 2, units=40, moved_bytes=100)

    assert ["light"] == list(moves(cluster.free(move_count_max=1)))


def test_among_equals_a_whole_node_turns_free() -> None:
    cluster = Cluster(2, 1)
    cluster.put("full", "n0", 0, units=60, is_movable=False)
    cluster.put("a", "n0", 1, units=30)
    cluster.put("b", "n1", 0, units=30)

    assert ["b"] == list(moves(cluster.free(move_count_max=1)))


def test_the_budget_is_kept() -> None:
    cluster = Cluster(3)
    cluster.put("full", "n0", 0, units=50, is_movable=False)
    for number in range(3):
        cluster.put(f"a{number}", "n0", 1, units=10)
    cluster.put("b", "n0", 2, units=45)

    assert ["b"] == list(moves(cluster.free(move_count_max=2)))


def test_a_replica_on_two_gpus_frees_both() -> None:
    cluster = Cluster(2, 2)
    for index in range(2):
        cluster.put(f"full{index}", "n0", index, units=60, is_movable=False)
    cluster.put("wide", "n1", 0, 1, units=30)

    plan = cluster.free()

    assert ({"wide": ("n0", (0, 1))}, (("n1", 0), ("n1", 1))) == (moves(plan), plan.freed)


def test_host_memory_of_the_target_is_reserved_for_its_parked_weights() -> None:
    cluster = Cluster(1, 1)
    cluster.put("a", "n0", 0, units=50, is_movable=False)
    cluster.put("b", "n1", 0, units=20, park_bytes=7)

    cluster.park_room = {"n0": 6}
    assert () == cluster.free().steps
    cluster.park_room = {"n0": 7}
    assert ["b"] == list(moves(cluster.free()))


def test_foreign_memory_keeps_a_gpu_from_being_whole() -> None:
    cluster = Cluster(2)
    cluster.put("a", "n0", 0, units=50, is_movable=False)
    cluster.put("b", "n0", 1, units=20)
    cluster.fleet.set_foreign("n0", 1, 5)

    assert () == cluster.free().steps


def test_room_is_made_for_a_whole_gpu_by_the_cheapest_moves() -> None:
    cluster = Cluster(3)
    cluster.put("a", "n0", 0, units=40, moved_bytes=900)
    cluster.put("b", "n0", 1, units=30, moved_bytes=100)
    cluster.put("c", "n0", 2, units=30, moved_bytes=50, is_serving=True)

    plan = cluster.room_for(1, CAPACITY)

    assert {"b": ("n0", (0,))} == moves(plan)


def test_only_as_much_moves_as_the_ask_needs() -> None:
    cluster = Cluster(2)
    cluster.put("x", "n0", 0, units=60, is_movable=False)
    cluster.put("small", "n0", 0, units=15)
    cluster.put("fixed", "n0", 1, units=65, is_movable=False)
    cluster.put("other", "n0", 1, units=10)

    assert {"small": ("n0", (1,))} == moves(cluster.room_for(1, 40))


def test_room_for_several_gpus_of_one_node_may_use_idle_ones_elsewhere() -> None:
    cluster = Cluster(2, 1)
    cluster.put("a", "n0", 1, units=30)

    plan = cluster.room_for(2, CAPACITY)

    assert ({"a": ("n1", (0,))}, (("n0", 1),)) == (moves(plan), plan.freed if plan else ())


def test_room_that_no_move_can_make_is_none() -> None:
    cluster = Cluster(2)
    cluster.put("a", "n0", 0, units=60)
    cluster.put("b", "n0", 1, units=50)

    assert cluster.room_for(1, CAPACITY) is None
    assert cluster.room_for(3, CAPACITY) is None


def test_a_gpu_that_is_being_emptied_is_no_target_and_counts_on() -> None:
    """A plan larger than what may move at once is continued, not begun anew elsewhere."""
    cluster = Cluster(3)
    cluster.put("full", "n0", 0, units=40, is_movable=False)
    cluster.put("gone", "n0", 1, units=30, is_leaving=True, is_movable=False)
    cluster.put("next", "n0", 1, units=20)
    cluster.put("other", "n0", 2, units=55)

    plan = cluster.free(move_count_max=1)

    assert ({"next": ("n0", (2,))}, (("n0", 1),)) == (moves(plan), plan.freed)


def test_room_that_is_on_its_way_is_not_made_twice() -> None:
    cluster = Cluster(2)
    cluster.put("gone", "n0", 0, units=30, is_leaving=True, is_movable=False)
    cluster.put("other", "n0", 1, units=30)

    plan = cluster.room_for(1, CAPACITY)

    assert plan is not None
    assert () == plan.steps


# --- Properties -------------------------------------------------------------------------------------------------------


def drawn(seed: int) -> Cluster:
    draw = random.Random(seed)
    cluster = Cluster(*(draw.randint(1, 4) for _ in range(draw.randint(1, 4))), cpu_milli=draw.choice([20, 10**6]))
    for number in range(draw.randint(1, 14)):
        gpu_count = draw.choice([1, 1, 1, 2])
        units, cpu_milli = draw.choice([10, 20, 30, 50, 70, 100]), draw.randint(0, 5)
        node = draw.choice(sorted(cluster.fleet.nodes))
        free = cluster.fleet.free_units(node)
        fitting = [index for index, left in enumerate(free) if left >= units]
        if len(fitting) < gpu_count or cluster.fleet.cpu_milli_left(node) < cpu_milli:
            continue
        cluster.put(
            f"r{number}",
            node,
            *sorted(draw.sample(fitting, gpu_count)),
            units=units,
            cpu_milli=cpu_milli,
            is_movable=draw.random() < 0.8,
            is_serving=draw.random() < 0.3,
            moved_bytes=draw.choice([0, 10, 1000]),
            park_bytes=draw.choice([0, 3]),
        )
    cluster.park_room = {node: draw.choice([0, 4, 100]) for node in cluster.fleet.nodes}
    return cluster


def picture(cluster: Cluster) -> Any:
    fleet = cluster.fleet
    return {n: (fleet.free_units(n), fleet.cpu_milli_left(n), fleet.memory_bytes_left(n)) for n in fleet.nodes}


def carried_out(cluster: Cluster, plan: Plan) -> None:
    """Every target is taken while every source is held: nothing is ever promised twice."""
    for step in plan.steps:
        its, place = step.occupant, step.place
        cluster.fleet.take(place.node, place.gpu_indices, place.units, its.ask.cpu_milli)
        cluster.park_room[place.node] -= its.park_bytes
        assert its.is_movable
        assert min(cluster.fleet.free_units(place.node)) >= 0
        assert cluster.fleet.cpu_milli_left(place.node) >= 0
        assert cluster.park_room[place.node] >= 0 or not its.park_bytes
    for step in plan.steps:
        its = step.occupant
        cluster.fleet.give(its.node, its.gpu_indices, its.units, its.ask.cpu_milli)


def idle_count(cluster: Cluster) -> int:
    return sum(left == CAPACITY for node in cluster.fleet.nodes for left in cluster.fleet.free_units(node))


@pytest.mark.parametrize("seed", range(300))
def test_freeing_never_promises_twice_loses_nothing_and_frees_what_it_says(seed: int) -> None:
    cluster = drawn(seed)
    before, idle_before = picture(cluster), idle_count(cluster)
    may_move_serving = seed % 2 == 0

    plan = cluster.free(move_count_max=seed % 7, may_move_serving=may_move_serving)

    assert before == picture(cluster), "trying changes nothing"
    assert plan == cluster.free(move_count_max=seed % 7, may_move_serving=may_move_serving)
    assert len({step.occupant.replica_id for step in plan.steps}) == len(plan.steps) <= seed % 7
    assert may_move_serving or plan.serving_count == 0
    carried_out(cluster, plan)
    assert idle_before + len(plan.freed) == idle_count(cluster)
    assert bool(plan.steps) == bool(plan.freed)
    for node, index in plan.freed:
        assert CAPACITY == cluster.fleet.free_units(node)[index]


@pytest.mark.parametrize("seed", range(300))
def test_room_that_was_made_is_there_when_the_moves_are_done(seed: int) -> None:
    cluster = drawn(seed)
    draw = random.Random(seed)
    ask = Ask(gpu_count=draw.choice([1, 1, 2]), size_units=draw.choice([50, 80, 100]))
    if cluster.packer.choose(ask) is not None:
        return
    before = picture(cluster)

    plan = make_room(cluster.board, ask, move_count_max=6)

    assert before == picture(cluster), "trying changes nothing"
    if plan is not None:
        assert 0 < len(plan.steps) <= 6
        carried_out(cluster, plan)
        assert cluster.packer.choose(ask) is not None


@pytest.mark.parametrize("seed", range(300))
def test_a_lone_movable_replica_that_fits_a_used_gpu_is_always_found(seed: int) -> None:
    cluster = drawn(seed)
    board = cluster.board
    fits = [
        occupant
        for occupant in cluster.occupants.values()
        if occupant.is_movable and not occupant.park_bytes and occupant.ask.gpu_count == 1
        if [occupant] == list(board.on_gpu[occupant.gpus[0]]) and occupant.units[0] < CAPACITY
        for node in cluster.fleet
        if node.cpu_milli >= occupant.ask.cpu_milli
        for index, free in enumerate(node.free_units)
        if (node.name, index) in board.on_gpu and (node.name, index) != occupant.gpus[0] and free >= occupant.units[0]
    ]

    assert not fits or cluster.free().freed

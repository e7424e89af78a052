"""Moves that make room for an arrival that fits nowhere."""

from pathlib import Path

import pytest

from benchmarks import placement
from benchmarks.openb import Cluster, PodList
from benchmarks.placement_moves import Moves
from benchmarks.placement_run import Held, carry_out
from services.placement.packing.fleet import Ask, Fleet, GpuShape, NodeShape, Place
from services.placement.packing.index import Packer
from services.placement.packing.policies import policy_named

GPU = GpuShape(model="A", capacity_units=1000)


def share(milli: int, cpu_milli: int = 0) -> Ask:
    return Ask(size_units=milli, cpu_milli=cpu_milli)


class Story:
    """Nodes of two GPUs (or as many as said), and pods put where the test says."""

    def __init__(self, *names: str, gpus: int = 2, cpu_milli: int = 64_000) -> None:
        self.fleet = Fleet()
        for name in names:
            self.fleet.add_node(name, NodeShape(cpu_milli=cpu_milli, memory_bytes=0, gpus=(GPU,) * gpus))
        self.packer = Packer(self.fleet, policy_named("best-fit"))
        self.held: list[Held] = []

    def put(self, ask: Ask, node: str, *gpus: int) -> None:
        self._take(Held(ask, Place(node, gpus, (ask.size_units or 0,) * len(gpus))))

    def _take(self, held: Held) -> None:
        ask, place = held.ask, held.place
        self.fleet.take(place.node, place.gpu_indices, place.units, ask.cpu_milli, ask.memory_bytes)
        self.held.append(held)

    def arrive(self, ask: Ask, move_count_max: int) -> tuple[Place | None, int]:
        assert self.packer.choose(ask) is None
        place, moved_count = Moves(move_count_max)(self.packer, ask, self.held)
        if place is not None:
            self._take(Held(ask, place))
        self.check()
        return place, moved_count

    def check(self) -> None:
        """What is held and what the fleet has left agree, and nothing is promised twice."""
        free = {room.name: [1000] * len(room.shape.gpus) for room in self.fleet}
        cpu = {room.name: room.shape.cpu_milli for room in self.fleet}
        for held in self.held:
            cpu[held.place.node] -= held.ask.cpu_milli
            for gpu, units in zip(held.place.gpu_indices, held.place.units, strict=True):
                free[held.place.node][gpu] -= units
        for room in self.fleet:
            assert room.free_units == free[room.name]
            assert room.cpu_milli == cpu[room.name]
            assert min(room.free_units) >= 0
            assert room.cpu_milli >= 0


def test_two_halves_share_a_gpu_so_that_a_whole_one_is_free() -> None:
    story = Story("a")
    story.put(share(400), "a", 0)
    story.put(share(500), "a", 1)
    place, moved_count = story.arrive(share(1000), 1)
    assert (place, moved_count) == (Place("a", (0,), (1000,)), 1), "the smaller one moves"


def test_who_gives_way_may_send_another_away_in_turn() -> None:
    """0.72 needs the place of 0.66, which needs the place of 0.3, which finds the only hole that is left."""
    story = Story("a", "b", "c", gpus=1)
    story.put(share(660), "a", 0)
    story.put(share(340), "b", 0)
    story.put(share(300), "b", 0)
    story.put(share(700), "c", 0)
    assert story.arrive(share(720), 1) == (None, 0)
    assert story.arrive(share(720), 2) == (Place("a", (0,), (720,)), 2)


def test_nobody_moves_for_an_arrival_that_will_not_fit_even_so() -> None:
    story = Story("a")
    story.put(share(600), "a", 0)
    story.put(share(600), "a", 1)
    before = list(story.held)
    assert story.arrive(share(500), 4) == (None, 0)
    assert story.held == before


def test_several_gpus_of_one_node_are_cleared_together() -> None:
    story = Story("a", "b")
    story.put(share(300), "a", 0)
    story.put(share(300), "a", 1)
    story.put(share(700), "b", 0)
    story.put(share(700), "b", 1)
    pair = Ask(gpu_count=2, size_units=1000)
    assert story.arrive(pair, 1) == (None, 0)
    assert story.arrive(pair, 2) == (Place("a", (0, 1), (1000, 1000)), 2)


def test_a_pod_without_gpus_gives_way_where_cpu_is_missing() -> None:
    story = Story("a", "b", gpus=1, cpu_milli=10_000)
    story.put(Ask(gpu_count=0, cpu_milli=6_000), "a")
    story.put(share(1000), "b", 0)
    assert story.arrive(share(1000, cpu_milli=8_000), 1) == (Place("a", (0,), (1000,)), 1)
    assert story.held[0].place.node == "b"


def test_a_run_with_moves_drops_fewer_and_takes_no_more_than_there_is() -> None:
    shape = NodeShape(cpu_milli=96_000, memory_bytes=1 << 40, gpus=(GPU,) * 4)
    cluster = Cluster(shapes=tuple((f"n{i}", shape) for i in range(6)))
    sizes = [1000, 700, 600, 450, 350, 250, 150, 1000, 100]
    pods = PodList(name="mix", asks=tuple(share(size, cpu_milli=4 * size) for size in sizes))
    plain = [carry_out(cluster, pods, "spread", seed, is_compiled=False) for seed in range(4)]
    moved = [carry_out(cluster, pods, "spread", seed, is_compiled=False, mover=Moves(3)) for seed in range(4)]
    assert sum(run.allocated_percent for run in moved) > sum(run.allocated_percent for run in plain)
    assert all(run.moved_count > 0 and run.allocated_percent <= 100 for run in moved)


def test_what_a_repacking_could_free_at_most_is_known() -> None:
    """Each 0.6 needs a GPU of its own; one GPU for each pair of halves, however they lie."""
    shape = NodeShape(cpu_milli=0, memory_bytes=0, gpus=(GPU,) * 4)
    cluster = Cluster(shapes=(("a", shape),))
    spoilt = carry_out(cluster, PodList(name="mix", asks=(share(500),)), "spread", 0, is_compiled=False)
    full = carry_out(cluster, PodList(name="mix", asks=(share(600),)), "spread", 0, is_compiled=False)
    assert (0, 0) == (round(spoilt.repack_frees_percent, 6), round(full.repack_frees_percent, 6))
    assert (100, 60) == (spoilt.allocated_percent, full.allocated_percent)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--migrate", "-1"], "so 0 or more, not -1"), (["--migrate", "2", "--docs"], "leave --migrate out")],
)
def test_words_that_make_no_sense(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        placement.main(words)
    assert message in capsys.readouterr().err


def test_a_report_with_moves_says_what_they_gained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes, pods = tmp_path / "nodes.csv", tmp_path / "pods.csv"
    nodes.write_text("sn,cpu_milli,memory_mib,gpu,model\n" + "".join(f"n{i},64000,1024,2,A\n" for i in range(4)))
    pods.write_text(
        "name,cpu_milli,memory_mib,num_gpu,gpu_milli\n"
        + "".join(f"p{i},1000,1,1,{milli}\n" for i, milli in enumerate((1000, 600, 300, 400)))
    )
    words = ["--nodes", str(nodes), "--pods", str(pods), "--policy", "spread", "--seeds", "1-3", "--migrate", "2"]
    assert placement.main(words) == 0
    out = capsys.readouterr().out
    assert "moves_gain_points" in out
    assert "repack_frees_percent_at_most" in out
    assert "which the published protocol forbids" in " ".join(out.split())

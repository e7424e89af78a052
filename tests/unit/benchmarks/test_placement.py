"""The openb protocol: files, order of arrivals, figures, and words for what is asked wrongly."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import placement, placement_page
from benchmarks.openb import MIB, InputError, gpu_milli_of, list_name, read_cluster, read_pods
from benchmarks.placement_run import Held, Run, Runs, carry_out, seeds_of
from benchmarks.progress import Progress
from services.placement.packing.fleet import Ask, Place
from services.placement.packing.index import Packer

NODES = """sn,cpu_milli,memory_mib,gpu,model
node-b,64000,1024,2,T4
node-a,96000,1024,1,V100
node-c,96000,1024,0,
"""
PODS = """name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec
pod-2,1000,1,1,500,
pod-1,2000,2,1,1000,T4|P100
pod-3,4000,,0,0,
pod-4,4000,1,2,1000,
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    nodes, pods = tmp_path / "nodes.csv", tmp_path / "openb_pod_list_small.csv.gz"
    nodes.write_text(NODES)
    pods.write_bytes(gzip.compress(PODS.encode()))
    return nodes, pods


def test_nodes_without_gpus_are_not_used_and_the_rest_is_in_order_of_names(files: tuple[Path, Path]) -> None:
    cluster = read_cluster(files[0])

    assert ["node-a", "node-b"] == [name for name, _ in cluster.shapes]
    assert 3000 == cluster.gpu_milli
    assert (64_000, 1024 * MIB, 2) == (
        cluster.shapes[1][1].cpu_milli,
        cluster.shapes[1][1].memory_bytes,
        len(cluster.shapes[1][1].gpus),
    )
    assert 9000 == cluster.times(3).gpu_milli
    assert ["node-a-000", "node-a-001"] == [name for name, _ in cluster.times(2).shapes][:2]


def test_pods_are_read_in_order_of_names(files: tuple[Path, Path]) -> None:
    pods = read_pods(files[1])

    assert "small" == pods.name
    assert (
        Ask(1, None, 1000, 2000, 2 * MIB, frozenset({"T4", "P100"})),
        Ask(1, None, 500, 1000, MIB),
        Ask(0, None, None, 4000, 0),
        Ask(2, None, 1000, 4000, MIB),
    ) == pods.asks


def test_arrivals_are_all_pods_and_then_clones_until_130_percent_are_asked_for(files: tuple[Path, Path]) -> None:
    cluster, pods = read_cluster(files[0]), read_pods(files[1])
    arrivals = pods.arrivals(100, cluster.times(10).gpu_milli)

    assert sorted(map(repr, pods.asks)) == sorted(map(repr, arrivals[:4]))
    asked = [gpu_milli_of(ask) for ask in arrivals]
    assert sum(asked) >= 39_000 > sum(asked) - asked[-1]
    assert arrivals == pods.arrivals(100, cluster.times(10).gpu_milli)
    assert arrivals != pods.arrivals(101, cluster.times(10).gpu_milli)


def test_a_list_that_asks_for_more_than_130_percent_loses_pods(files: tuple[Path, Path]) -> None:
    assert sum(map(gpu_milli_of, read_pods(files[1]).arrivals(1, 1000))) <= 1300


@pytest.mark.parametrize("policy", ["random", "dot-product", "best-fit", "first-fit", "fgd", "least-waste", "spread"])
def test_no_run_takes_more_than_there_is(files: tuple[Path, Path], policy: str) -> None:
    cluster, pods = read_cluster(files[0]).times(20), read_pods(files[1])
    run = carry_out(cluster, pods, policy, 7, is_compiled=False)

    assert 70 < run.allocated_percent <= 100
    assert run.arrival_count == len(run.decision_ns)
    assert 131 == len(run.curve)
    assert list(run.curve) == sorted(run.curve)
    assert run.allocated_percent == run.curve[-1]
    assert run == carry_out_again(run, lambda: carry_out(cluster, pods, policy, 7, is_compiled=False))


def carry_out_again(run: Run, again: Callable[[], Run]) -> Run:
    """The same run, with the times of the first."""
    second = again()
    return Run(
        seed=second.seed,
        arrival_count=second.arrival_count,
        dropped_count=second.dropped_count,
        moved_count=second.moved_count,
        allocated_percent=second.allocated_percent,
        repack_frees_percent=second.repack_frees_percent,
        curve=second.curve,
        decision_ns=run.decision_ns,
        run_s=run.run_s,
    )


def test_a_mover_is_asked_after_each_failed_arrival_and_its_place_is_taken(files: tuple[Path, Path]) -> None:
    cluster, pods = read_cluster(files[0]), read_pods(files[1])

    def mover(packer: Packer, ask: Ask, held: list[Held]) -> tuple[Place | None, int]:
        """Throws out who came last, which no real one does."""
        last = held.pop()
        packer.fleet.give(
            last.place.node, last.place.gpu_indices, last.place.units, last.ask.cpu_milli, last.ask.memory_bytes
        )
        return packer.choose(ask), 1

    plain = carry_out(cluster, pods, "first-fit", 3, is_compiled=False)
    moved = carry_out(cluster, pods, "first-fit", 3, is_compiled=False, mover=mover)

    assert (True, 0) == (plain.dropped_count > 0, plain.moved_count)
    assert moved.moved_count > 0


@pytest.mark.parametrize(("text", "seeds"), [("7", (7,)), ("100-102", (100, 101, 102)), ("5,100-101,5", (5, 100, 101))])
def test_seeds(text: str, seeds: tuple[int, ...]) -> None:
    assert seeds == seeds_of(text)


def test_the_figures_of_one_list_and_one_policy_have_plain_names(files: tuple[Path, Path], tmp_path: Path) -> None:
    nodes, pods = files
    out = tmp_path / "out.json"

    status = placement.main(
        ["--nodes", str(nodes), "--pods", str(pods), "--policy", "best-fit", "--seeds", "42-43", "--json", str(out)]
    )

    report = json.loads(out.read_text())
    assert 0 == status
    assert {"allocated_percent_mean", "decision_us_p50", "decision_us_p99", "run_s"} <= report["figures"].keys()
    assert ["42", "43"] == list(report["figures"]["allocated_percent_by_seed"])


def test_several_lists_or_policies_are_told_apart(files: tuple[Path, Path]) -> None:
    cluster, pods = read_cluster(files[0]), read_pods(files[1])
    outcome = placement.measure(cluster, [pods], ["fgd", "least-waste"], [1], scale=2, progress=Progress())
    report = outcome.report()

    assert "fgd_allocated_percent_mean" in report.figures
    assert {"small_over_own_fgd_points", "least_waste_decision_us_growth"} <= {bar.name for bar in report.bars}
    assert "| small |" in placement_page.text(outcome, "abc")
    assert placement_page.picture(outcome).count("<polyline") == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--seeds", "x"], "error: --seeds: 'x' is neither a seed nor a range of seeds such as 100-109"),
        (["--seeds", "9-3"], "'9-3' is neither"),
        (["--policy", "fdg"], "there is no placement policy 'fdg'; did you mean 'fgd'?"),
        (["--scale", "0"], "1 or more, not 0"),
        (["--json", "/no/such/folder/out.json"], "its folder does not exist"),
    ],
)
def test_what_is_asked_wrongly_gets_one_sentence(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        placement.main(arguments)

    error = capsys.readouterr().err
    assert 2 == left.value.code
    assert told in error
    assert 1 == error.count("\n")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("nodes", None, "cannot be read: No such file or directory"),
        ("nodes", b"sn,cpu_milli\na,1\n", "has no column memory_mib, gpu, model; it needs sn, "),
        ("nodes", b"sn,cpu_milli,memory_mib,gpu,model\na,1,1,0,\n", "no node in it has a GPU"),
        ("nodes", b"sn,cpu_milli,memory_mib,gpu,model\na,1,1,1,T4\na,1,1,1,T4\n", "node 'a' is in it more than once"),
        ("nodes", b"sn,cpu_milli,memory_mib,gpu,model\na,x,1,1,T4\n", "nodes.csv:2: cpu_milli must be a whole number"),
        ("nodes", b"\x1f\x8bnothing", "cannot be read: "),
        ("nodes", gzip.compress(NODES.encode())[:40], "cannot be read: it is neither CSV nor gzipped CSV"),
        ("nodes", gzip.compress(NODES.encode())[:20] + bytes(40), "cannot be read: it is neither CSV nor gzipped CSV"),
        ("nodes", b"\xff\xfe\x00", "cannot be read: it is neither CSV nor gzipped CSV"),
        ("nodes", b"", "has no column sn, "),
        ("pods", b"name,cpu_milli,memory_mib,num_gpu,gpu_milli\n", "no pods in it"),
        ("pods", b"name,cpu_milli,memory_mib,num_gpu,gpu_milli\na,1,1,1,0\n", "gpu_milli must be from 1 to 1000"),
        ("pods", b"name,cpu_milli,memory_mib,num_gpu,gpu_milli\na,1,1,0,0\n", "asks for a GPU, so there is nothing"),
    ],
)
def test_files_that_cannot_be_used_get_one_sentence(
    files: tuple[Path, Path], name: str, content: bytes | None, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {"nodes": files[0], "pods": files[1].with_name("pods.csv")}
    paths["pods"].write_text(PODS)
    if content is None:
        paths[name].unlink()
    else:
        paths[name].write_bytes(content)

    status = placement.main(["--nodes", str(paths["nodes"]), "--pods", str(paths["pods"]), "--seeds", "1"])

    error = capsys.readouterr().err
    assert 2 == status
    assert told in error
    assert 1 == len([line for line in error.splitlines() if line.startswith("error: ")])


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        read_pods(tmp_path / "none.csv")
    assert "none" == list_name(tmp_path / "none.csv.gz")


def test_runs_are_summed_up_over_seeds() -> None:
    def run(seed: int, percent: float) -> Run:
        return Run(
            seed=seed,
            arrival_count=1,
            dropped_count=0,
            moved_count=0,
            allocated_percent=percent,
            repack_frees_percent=0.0,
            curve=(percent,),
            decision_ns=(1000 * seed,),
            run_s=1.0,
        )

    runs = Runs(pods="a", policy="fgd", runs=(run(1, 90), run(3, 92)))

    assert (91, 2.0, (91,)) == (runs.allocated_percent, runs.decision_us(99), runs.curve)

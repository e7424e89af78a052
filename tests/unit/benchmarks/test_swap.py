"""The swap world: what waits for what, its figures, the clairvoyant and the bound, and words for wrong questions."""

import gzip
import json
from pathlib import Path

import pytest

from benchmarks import swap
from benchmarks.swap_bound import Belady, bound_added_s_mean
from benchmarks.swap_traces import RECIPES, made, read_arrivals
from benchmarks.swap_world import GB, Request, Sized, World, dealt, service_s
from services.swapper.policies import POLICIES

BIG = Sized(weights_bytes=60 * GB)
SMALL = Sized(weights_bytes=14_500_000_000)


def request(t_s: float, model: str, runs_s: float = 1.0) -> Request:
    return Request(t_s=t_s, model=model, service_s=runs_s)


def added(requests: list[Request], sizes: dict[str, Sized], *, gpu_count: int = 1, policy: str = "lru") -> list[float]:
    tally = World(sizes, gpu_count=gpu_count, policy=POLICIES[policy]()).run(requests)
    return [round(s, 6) for s in tally.added_s]


def test_a_load_takes_its_fixed_part_and_its_bytes_and_a_second_request_waits_for_the_rest() -> None:
    assert [1.45, 0.95, 0.0] == added([request(0, "a"), request(0.5, "a"), request(9, "a")], {"a": BIG})


def test_one_load_at_a_time_goes_over_a_gpus_link() -> None:
    assert [0.54, 1.08] == added([request(0, "a"), request(0, "b")], {"a": SMALL, "b": SMALL})


def test_each_gpu_has_its_own_link() -> None:
    assert [0.54, 0.54] == added([request(0, "a"), request(0, "b")], {"a": SMALL, "b": SMALL}, gpu_count=2)


def test_a_running_model_stays_and_the_other_waits_for_its_end() -> None:
    """The first is ready at 1.45 s and runs for 10 s; the second comes at 2 s."""
    assert [1.45, 10.9] == added([request(0, "a", 10), request(2, "b")], {"a": BIG, "b": BIG})


@pytest.mark.parametrize("policy", list(POLICIES))
def test_with_room_for_all_each_model_is_loaded_once(policy: str) -> None:
    requests = [request(10.0 * index, f"m{index % 4}") for index in range(40)]
    sizes = {f"m{index}": SMALL for index in range(4)}

    tally = World(sizes, gpu_count=1, policy=POLICIES[policy]()).run(requests)

    assert 4 == tally.load_count
    assert 90.0 == tally.warm_hit_percent
    assert tally.resident_gb_mean == pytest.approx(4 * SMALL.held_bytes / GB, rel=0.05)


def test_parking_is_free_and_memory_is_held_until_then() -> None:
    tally = World({"a": BIG, "b": BIG}, gpu_count=1, policy=POLICIES["lru"]()).run(
        [request(0, "a"), request(100, "b", 98.55)]
    )

    assert 200 == tally.length_s
    assert tally.resident_gb_mean == pytest.approx(69)
    assert tally.link_busy_percent == pytest.approx(100 * 2 * 1.45 / 200)


def test_sizes_are_dealt_by_the_seed_so_that_all_occur_alike() -> None:
    models = [f"m{index}" for index in range(12)]

    assert dealt(models, seed=1) == dealt(models, seed=1)
    assert dealt(models, seed=1) != dealt(models, seed=2)
    assert 2 == sum(size.weights_bytes == 60 * GB for size in dealt(models, seed=1).values())


def turns(count: int) -> tuple[list[Request], dict[str, Sized]]:
    """Five models in an irregular turn, of which four fit."""
    requests = [request(20.0 * index, f"m{(index * index + index // 3) % 5}", 0.1) for index in range(count)]
    return requests, {f"m{index}": SMALL for index in range(5)}


@pytest.mark.parametrize("policy", list(POLICIES))
def test_nobody_passes_the_bound_and_the_clairvoyant_is_between(policy: str) -> None:
    requests, sizes = turns(200)

    bound = bound_added_s_mean(requests, sizes, gpu_count=1)
    belady = World(sizes, gpu_count=1, policy=Belady(requests)).run(requests).added_s_mean
    online = World(sizes, gpu_count=1, policy=POLICIES[policy]()).run(requests).added_s_mean

    assert bound <= belady + 1e-9
    assert belady <= online


def test_the_bound_is_met_where_nothing_can_be_saved() -> None:
    """Two that never fit beside one another, in turn: every request loads."""
    requests = [request(50.0 * index, "ab"[index % 2]) for index in range(20)]

    assert bound_added_s_mean(requests, {"a": BIG, "b": BIG}, gpu_count=1) == pytest.approx(1.45)


@pytest.fixture
def lengths(tmp_path: Path) -> Path:
    path = tmp_path / "lengths.csv.gz"
    path.write_bytes(gzip.compress(b"t_s,service,input_tokens,output_tokens\n0,code,1,1\n1,conv,800,10\n"))
    return path


def test_made_traces_are_the_same_each_time_and_use_conversations_only(lengths: Path) -> None:
    first, second = made("zipf", lengths, time_scale=1), made("zipf", lengths, time_scale=2)

    assert first.requests[7].t_s == 2 * second.requests[7].t_s
    assert {service_s(800, 10)} == {request.service_s for request in first.requests}
    assert 42_000 < len(first.requests) < 44_500
    assert 64 == len(first.models)


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_gives_arrivals_in_order(name: str, lengths: Path) -> None:
    times = [request.t_s for request in made(name, lengths, time_scale=1).requests]

    assert times == sorted(times)
    assert len(times) > 1000


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "small.csv"
    rows = [f"{30 * index},m{(index * index) % 7},100,10" for index in range(60)]
    path.write_text("\n".join(["t_s,model,input_tokens,output_tokens", *rows]))
    return path


def test_time_runs_faster_for_arrivals_only(trace: Path) -> None:
    slow, fast = read_arrivals(trace, time_scale=1), read_arrivals(trace, time_scale=10)

    assert (30, 3) == (slow.requests[1].t_s, fast.requests[1].t_s)
    assert slow.requests[1].service_s == fast.requests[1].service_s


def test_a_run_writes_figures_and_prints_a_table_that_fits(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"

    status = swap.main(["--trace", str(trace), "--gpus", "1", "--policy", "lru", "--seeds", "1-2", "--json", str(out)])

    assert 0 == status
    figures = json.loads(out.read_text())["figures"]
    assert {
        "loads_mean",
        "warm_hit_percent",
        "added_latency_s_mean",
        "added_latency_s_p50",
        "added_latency_s_p95",
        "added_latency_s_p99",
        "over_1s_percent",
        "resident_gb_mean",
        "link_busy_percent",
        "belady_added_latency_s_mean",
        "bound_added_latency_s_mean",
    } <= set(figures)
    assert all(len(line) <= 88 for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "fifo"], "error: --policy: there is no policy 'fifo'; there is: all, likely-return"),
        (["--gpus", "0"], "error: --gpus: '0' is not a number of GPUs such as 4"),
        (["--time-scale", "0"], "error: --time-scale: arrivals come so many times as fast, so more than 0"),
        (["--seeds", "x"], "error: --seeds: 'x' is neither a seed nor a range"),
        (["--trace", "/none.csv"], "error: the trace /none.csv cannot be read"),
    ],
)
def test_what_is_asked_wrongly_is_told(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = swap.main(arguments)
    except SystemExit as stop:
        status = int(str(stop.code))

    assert 2 == status
    assert capsys.readouterr().err.startswith(message)

"""What the mover's benchmark tells of its cycles, without a GPU."""

from benchmarks.mover import bars
from benchmarks.mover_cases import PLAIN, Case, Cycle, Outcome, Setting, cases, figures

SETTING = Setting(label="software GPU", gpu_name="H100", link_bytes_per_s=50e9)


def cycle(*, copy_s: float = 0.2, verify_s: float = 0.01, parked_bytes: int = 0) -> Cycle:
    return Cycle(
        park_s=0.05,
        parked_bytes=parked_bytes,
        restore_s=copy_s + 0.03,
        map_s=0.1,
        copy_s=copy_s,
        verify_s=verify_s,
        woken_bytes=10_000_000_000,
        residue_bytes=500,
    )


def outcome(*cycles: Cycle, gpu_count: int = 1) -> Outcome:
    case = Case(way="store", weights_bytes=10_000_000_000, gpu_count=gpu_count, repeat_count=len(cycles))
    return Outcome(case=case, cycles=cycles)


def test_the_slow_way_is_measured_once_on_one_gpu() -> None:
    found = cases(["store", PLAIN], [1.0, 2.0], [1, 2], repeat_count=5)

    assert [("store", 1, 5)] * 2 + [("store", 2, 5)] * 2 + [(PLAIN, 1, 1)] * 2 == [
        (case.way, case.gpu_count, case.repeat_count) for case in found
    ]


def test_figures_are_medians_and_each_gpu_has_a_link() -> None:
    one = figures(outcome(cycle(copy_s=0.21), cycle(copy_s=0.25), cycle(copy_s=9.0)), SETTING)
    two = figures(outcome(cycle(copy_s=0.1), gpu_count=2), SETTING)

    assert (0.25, 0.2, 0.8) == tuple(one[f"store_1x10_{name}"] for name in ("copy_s", "floor_s", "link_fraction"))
    assert (0.1, 1.0) == tuple(two[f"store_2x10_{name}"] for name in ("floor_s", "link_fraction"))


def test_a_bar_holds_for_the_worst_of_all_cases_and_is_missed_without_any() -> None:
    found = figures(outcome(cycle()), SETTING) | figures(outcome(cycle(copy_s=0.1, verify_s=0.5), gpu_count=2), SETTING)

    told = {bar.name: bar.is_met for bar in bars(found)}
    assert not told.pop("store_outside_copy_s_max")
    assert all(told.values())
    assert not any(bar.is_met for bar in bars({}))

"""The simulator's benchmark: what it measures exists, and a violation or a quiet run misses a bar."""

from benchmarks import sim
from services.swarm.plan import draw_plan
from services.swarm.run import Failure, carry_out

OPTIONS = ["--seeds", "1", "--hours", "0.02"]


def report_of(sweep: sim.Sweep) -> dict[str, bool]:
    """{bar: whether it is met}"""
    sweep.wall_s = 1.0
    options = sim._parser().parse_args(OPTIONS)
    report = sim._report(options, [5.0, 6.0], [50_000.0], sim.HASHED_SEEDS, sweep)
    return {bar.name: bar.is_met for bar in report.bars}


def one_run() -> sim.Sweep:
    sweep = sim.Sweep()
    sweep.add(carry_out(draw_plan(1, lasts_s=72.0)), 0.5)
    return sweep


def test_speeds_are_measured() -> None:
    assert 0 < sim.kernel_us_per_delivery(seconds=5.0) < 1000
    assert sim.real_cores_speed(0, lasts_s=30.0) > 0


def test_a_sweep_without_violations_meets_its_bars() -> None:
    met = report_of(one_run())

    assert met["violation_count"]
    assert met["faults_per_seed_min"]
    assert not met["fault_kind_count"], "one short run cannot have had them all"


def test_a_violation_misses_the_bar_and_is_named() -> None:
    sweep = one_run()
    outcome = carry_out(draw_plan(2, lasts_s=30.0))
    outcome.failure = Failure(seed=2, message="a lease too much\nmore", signature="x", at_s=1.0)

    sweep.add(outcome, 0.5)

    assert not report_of(sweep)["violation_count"]
    assert ["seed 2: a lease too much"] == sweep.failures

"""What the watchdog makes of what it measures: who is told, who is stopped, and who never is."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.deployments import IsolationGrade
from schemas.holders import EngineView
from schemas.units import GiB
from services.nodeagent.guard.owners import owners_of
from services.nodeagent.overuse import SLACK_BYTES, STOPPED_ON, Allowed, Judge, Measured, allowed_in, larger_of
from tests.unit.nodeagent.builders import Agent, gpu

GRANT = 10 * GiB


def allowed(name: str = "a", *, grade: IsolationGrade = IsolationGrade.WATCHED, granted_bytes: int = GRANT) -> Allowed:
    return Allowed(replica_id=name, lease_epoch=1, gpu_uuid="gpu-0", granted_bytes=granted_bytes, grade=grade)


def seen(used_bytes: int | None, **values: object) -> Measured:
    return Measured(allowed=allowed(**values), used_bytes=used_bytes)  # type: ignore[arg-type]


@pytest.mark.parametrize("grade", [IsolationGrade.WATCHED, IsolationGrade.BROKER])
def test_overuse_is_told_once_and_its_engine_is_stopped_after_the_grace(grade: IsolationGrade) -> None:
    judge = Judge(grace_s=2.0)
    told = [judge.judge([seen(11 * GiB, grade=grade)], now_s=now_s) for now_s in (0.0, 1.0, 2.0, 3.0)]

    assert [[False], [], [True], []] == [[report.is_stopped for report in one.reports] for one in told]
    assert [0, 0, 1, 0] == [len(one.stops) for one in told]


@pytest.mark.parametrize("grade", [grade for grade in IsolationGrade if grade not in STOPPED_ON])
def test_on_every_other_grade_overuse_is_told_and_nobody_is_stopped(grade: IsolationGrade) -> None:
    judge = Judge(grace_s=2.0)

    told = [judge.judge([seen(11 * GiB, grade=grade)], now_s=now_s) for now_s in (0.0, 100.0)]

    assert [1, 0] == [len(one.reports) for one in told]
    assert () == told[0].stops + told[1].stops


def test_the_grace_begins_anew_when_it_was_within_its_grant_in_between() -> None:
    judge = Judge(grace_s=2.0)
    for now_s, used in ((0.0, 11), (1.5, 9), (3.0, 11), (4.5, 11)):
        assert () == judge.judge([seen(used * GiB)], now_s=now_s).stops


def test_what_cannot_be_measured_is_neither_zero_nor_too_much() -> None:
    judge = Judge(grace_s=2.0)
    judge.judge([seen(11 * GiB)], now_s=0.0)

    missing = judge.judge([seen(None)], now_s=5.0)
    assert ((), ()) == (missing.reports, missing.stops)
    assert {allowed().key} == missing.blind

    assert [allowed()] == list(judge.judge([seen(11 * GiB)], now_s=6.0).stops), "it was beyond since 0 s"


def test_the_drivers_rounding_is_no_overuse() -> None:
    assert () == Judge(grace_s=0.0).judge([seen(GRANT + SLACK_BYTES)], now_s=0.0).reports
    assert 1 == len(Judge(grace_s=0.0).judge([seen(GRANT + SLACK_BYTES + 1)], now_s=0.0).reports)


looks = st.lists(
    st.dictionaries(st.sampled_from("abc"), st.one_of(st.none(), st.integers(0, 20).map(lambda gib: gib * GiB))),
    max_size=12,
)


@given(looks=looks, grace_s=st.floats(0, 5))
def test_whoever_is_stopped_was_itself_measured_beyond_its_own_grant(
    looks: list[dict[str, int | None]], grace_s: float
) -> None:
    """Never a neighbour, whatever the neighbours do; and each engine once."""
    judge = Judge(grace_s=grace_s)
    stopped = []
    for now_s, look in enumerate(looks):
        measured = [seen(used, name=name) for name, used in look.items()]
        for offender in judge.judge(measured, now_s=float(now_s)).stops:
            used = look[offender.replica_id]
            assert used is not None
            assert used > offender.granted_bytes + SLACK_BYTES
            stopped.append((now_s, offender.replica_id))
            for earlier_s in range(now_s - int(grace_s), now_s):
                earlier = looks[earlier_s].get(offender.replica_id, None) if earlier_s >= 0 else None
                assert earlier is None or earlier > offender.granted_bytes + SLACK_BYTES


def test_a_replica_is_allowed_what_its_lease_holds_at_each_step_of_its_life() -> None:
    agent = Agent(gpu(grade=IsolationGrade.WATCHED))

    agent.granted("a", 30)
    assert [30 * GiB] == [one.granted_bytes for one in allowed_in(agent.state).values()], "it is starting"
    agent.handle(agent.started("a"))
    agent.handle(agent.park("a"))
    agent.handle(agent.has_parked("a"))
    assert [1 * GiB] == [one.granted_bytes for one in allowed_in(agent.state).values()], "its residue"
    agent.handle(agent.wake("a"))
    assert [30 * GiB] == [one.granted_bytes for one in allowed_in(agent.state).values()], "before it may use it"


def test_while_a_grant_changes_the_larger_one_counts() -> None:
    small, large = allowed(granted_bytes=1 * GiB), allowed(granted_bytes=30 * GiB)

    assert [large] == larger_of({small.key: small}, {large.key: large})
    assert [large] == larger_of({large.key: large}, {small.key: small})
    assert [] == larger_of({small.key: small}, {}), "its lease is over"


def process(proc: Path, pid: int, *, parent: int, cgroup: str = "0::/user.slice") -> None:
    folder = proc / str(pid)
    folder.mkdir(parents=True)
    (folder / "stat").write_text(f"{pid} (a (strange) name) S {parent} " + "0 " * 17 + f"{1000 + pid} 0")
    (folder / "cgroup").write_text(f"12:cpu:/\n{cgroup}\n")


def engine(name: str, pid: int, *, namespace: str, is_alive: bool = True, off_ticks: int = 0) -> EngineView:
    return EngineView(
        replica_id=name, lease_epoch=1, pid=pid, started_ticks=1000 + pid + off_ticks, port=1, is_gated=False,
        is_alive=is_alive, exit_code=None, namespace=namespace, log_path="",
    )  # fmt: skip


def test_a_process_belongs_to_the_engine_that_it_descends_from_or_whose_cgroup_it_is_in(tmp_path: Path) -> None:
    process(tmp_path, 10, parent=1)
    process(tmp_path, 11, parent=10)
    process(tmp_path, 12, parent=11)
    process(tmp_path, 20, parent=1, cgroup="0::/sublet/leaf-b/workers")
    process(tmp_path, 21, parent=1, cgroup="0::/sublet/leaf-bb")
    process(tmp_path, 30, parent=1)
    engines = [
        engine("a", 10, namespace="sublet-a"),
        engine("b", 99, namespace="/sys/fs/cgroup/sublet/leaf-b"),
        engine("dead", 30, namespace="sublet-dead", is_alive=False),
    ]

    assert {10: "a", 12: "a", 20: "b"} == owners_of([10, 12, 20, 21, 30, 404], engines, proc=tmp_path)


def test_a_stranger_with_an_engines_pid_is_not_the_engine(tmp_path: Path) -> None:
    """An agent in a pid namespace of its own would stop an engine for what somebody else uses."""
    process(tmp_path, 10, parent=1)
    process(tmp_path, 11, parent=10)

    assert {} == owners_of([10, 11], [engine("a", 10, namespace="sublet-a", off_ticks=5)], proc=tmp_path)

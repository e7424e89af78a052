"""What a GPU's grade is worth for one engine, and that a share is refused where it cannot be held as asked."""

import msgspec
import pytest

from schemas.deployments import (
    GRADE_ORDER,
    ComputeSharing,
    DeploymentSpec,
    EngineKind,
    EngineSpec,
    IsolationGrade,
    ShareSpec,
    SwapDriver,
)
from schemas.nodes import LeaseGranted, LeaseRefused, RefusalReason
from schemas.units import GiB
from services.nodeagent.grades import brokered_bytes, grade_for, weakest, why_not_enforced
from tests.unit.nodeagent.builders import Agent, gpu, proposal, replica


def wish(
    kind: EngineKind = EngineKind.SIMULATED,
    *,
    minimum: IsolationGrade | None = None,
    compute_portion: float | None = None,
) -> DeploymentSpec:
    return DeploymentSpec(
        name="m",
        engine=EngineSpec(kind=kind, weights_bytes=10 * GiB),
        share=ShareSpec(request_portion=0.5, minimum_grade=minimum, compute_portion=compute_portion),
    )


@pytest.mark.parametrize("offered", GRADE_ORDER)
@pytest.mark.parametrize("minimum", GRADE_ORDER)
def test_a_minimum_grade_is_granted_exactly_where_the_gpu_has_it(
    offered: IsolationGrade, minimum: IsolationGrade
) -> None:
    """Unenforced is never silent."""
    has_it = GRADE_ORDER.index(offered) <= GRADE_ORDER.index(minimum)
    agent = Agent(gpu(grade=offered))

    outcomes = agent.handle(proposal(replica("a", 10, minimum_grade=minimum)))

    if has_it:
        assert isinstance(outcomes[0], LeaseGranted)
    else:
        refused = outcomes[0]
        assert isinstance(refused, LeaseRefused)
        assert RefusalReason.GRADE_NOT_AVAILABLE is refused.reason
        assert f"'{offered}', not '{minimum}': as the test says" in refused.message


@pytest.mark.parametrize("kind", EngineKind)
def test_a_budget_counts_for_an_engine_that_keeps_one_only(kind: EngineKind) -> None:
    is_watched = kind in {EngineKind.NIM, EngineKind.LLAMA_SERVER, EngineKind.OPENAI}

    assert (grade_for(IsolationGrade.COOPERATIVE, wish(kind).engine) is IsolationGrade.WATCHED) == is_watched
    refused = why_not_enforced(gpu(grade=IsolationGrade.COOPERATIVE), wish(kind, minimum=IsolationGrade.COOPERATIVE))
    assert (refused is not None) == is_watched
    assert grade_for(IsolationGrade.DRIVER, wish(kind).engine) is IsolationGrade.DRIVER


@pytest.mark.parametrize("kind", EngineKind)
def test_where_the_broker_holds_the_gpu_only_engines_that_ask_it_may_run(kind: EngineKind) -> None:
    refused = why_not_enforced(gpu(grade=IsolationGrade.BROKER), wish(kind))

    assert (refused is None) == (kind in {EngineKind.SIMULATED, EngineKind.TRAINING})


@pytest.mark.parametrize("grade", GRADE_ORDER)
def test_an_engine_whose_weights_become_the_brokers_later_is_refused_where_its_own_limit_leaves_them_out(
    grade: IsolationGrade,
) -> None:
    """It would die loading, with a word of nothing but memory."""
    made = wish(EngineKind.VLLM)
    asked = msgspec.structs.replace(made, engine=msgspec.structs.replace(made.engine, swap_driver=SwapDriver.STORE))

    refused = why_not_enforced(gpu(grade=grade), asked)

    reasons = {
        IsolationGrade.DRIVER: RefusalReason.SWAP_NOT_AVAILABLE,
        IsolationGrade.BROKER: RefusalReason.GRADE_NOT_AVAILABLE,
    }
    assert reasons.get(grade) == (refused[0] if refused is not None else None)


def test_a_compute_ceiling_is_refused_with_the_reason_where_mps_is_off() -> None:
    sliced = msgspec.structs.replace(gpu(), compute_sharing_reason="MPS is switched off here")

    refused = why_not_enforced(sliced, wish(compute_portion=0.25))

    assert refused is not None
    assert RefusalReason.COMPUTE_NOT_AVAILABLE is refused[0]
    assert "MPS is switched off here" in refused[1]
    shared = msgspec.structs.replace(gpu(), compute_sharing=ComputeSharing.MPS)
    assert why_not_enforced(shared, wish(compute_portion=0.25)) is None
    assert why_not_enforced(sliced, wish()) is None


def test_what_is_lent_and_what_is_allocated_directly_are_never_more_than_the_grant() -> None:
    ours = wish().engine
    stored = msgspec.structs.replace(wish(EngineKind.VLLM).engine, swap_driver=SwapDriver.STORE)
    plain = wish(EngineKind.VLLM).engine
    for granted in (0, 1 * GiB, 40 * GiB):
        for engine in (ours, stored, plain):
            lent = brokered_bytes(engine, granted_bytes=granted, context_bytes=GiB // 2, shard_count=2)
            assert 0 <= lent <= granted
    assert 40 * GiB - GiB // 2 == brokered_bytes(ours, granted_bytes=40 * GiB, context_bytes=GiB // 2, shard_count=1), (
        "all but the context"
    )
    assert 5 * GiB == brokered_bytes(stored, granted_bytes=40 * GiB, context_bytes=GiB // 2, shard_count=2), "weights"
    assert 0 == brokered_bytes(plain, granted_bytes=40 * GiB, context_bytes=GiB // 2, shard_count=1)


def test_the_weakest_of_several_gpus_counts() -> None:
    assert weakest(IsolationGrade.DRIVER, IsolationGrade.WATCHED, IsolationGrade.HARDWARE) is IsolationGrade.WATCHED

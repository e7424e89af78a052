"""What would make it fit: every way that is told gives the place that it names."""

from kit.service import digest
from schemas.deployments import DeploymentSpec, IsolationGrade, ShareSpec
from schemas.inbox import RetireRequested
from schemas.queries import Explain, PlanDeployments
from tests.unit.placement.builders import Placement, gpu, spec


def ways(placement: Placement, wish: DeploymentSpec) -> tuple[str, ...]:
    """As a plan tells them; asking changes nothing."""
    before = digest(placement.state)
    (planned,) = placement.ask(PlanDeployments(deployments=(wish,))).deployments
    assert digest(placement.state) == before
    found: tuple[str, ...] = planned.ways
    return found


def full() -> Placement:
    """Two GPUs of 80 GiB with 50 and 70 GiB that never park."""
    placement = Placement()
    placement.join(gpu("gpu-0"), gpu("gpu-1"))
    placement.placed(spec("big", 70, is_parkable=False))
    placement.placed(spec("mid", 50, is_parkable=False))
    return placement


def test_a_smaller_share_or_one_who_leaves_would_do() -> None:
    placement = full()
    wish = spec("new", 40, is_parkable=False)
    gpu_of = {r.deployment_id: r.gpu_uuids[0] for r in placement.state.replicas.values()}
    there = f"node-0/gpu{gpu_of[placement.id_of('mid')][-1]}"

    assert ways(placement, wish) == (
        f"with a share of 30.0 GiB instead of 40.0 GiB it would go to {there}",
        f"once mid is retired it would go to {there}",
    )


def test_the_ways_that_are_told_are_true() -> None:
    smaller, retired = full(), full()

    smaller.placed(spec("new", 30, is_parkable=False))
    retired.handle(RetireRequested(command_id="retire-mid", model="mid"))
    retired.release(next(r for r in retired.state.replicas if r.startswith("mid")))
    retired.placed(spec("new", 40, is_parkable=False))


def test_a_portion_is_told_in_hundredths() -> None:
    placement = full()
    wish = spec("new", portion=0.5, is_parkable=False)

    assert ways(placement, wish)[0].startswith("with a share of 0.37 instead of 0.50 it would go to node-0/gpu")


def test_a_share_larger_than_any_gpu_is_cut_to_what_is_free() -> None:
    placement = full()

    assert ways(placement, spec("new", 90, is_parkable=False))[0].startswith(
        "with a share of 30.0 GiB instead of 90.0 GiB it would go to node-0/gpu"
    )


def test_what_the_wish_asks_of_nodes_is_left_out_one_by_one() -> None:
    placement = Placement()
    placement.join(gpu("gpu-0", grade=IsolationGrade.COOPERATIVE))
    share = ShareSpec(request_portion=0.5, minimum_grade=IsolationGrade.DRIVER)

    assert ways(placement, spec("labelled", 10, placing={"node_labels": {"rack": "a"}})) == (
        "without asking for rack=a it would go to node-0/gpu0",
    )
    assert ways(placement, spec("picky", 10, placing={"gpu_models": ("B200",)})) == (
        "on GPUs other than B200 it would go to node-0/gpu0",
    )
    graded = DeploymentSpec(name="graded", engine=spec("x", 1).engine, share=share)
    assert ways(placement, graded) == ("without its minimum grade it would go to node-0/gpu0",)


def test_nothing_is_told_that_would_not_help() -> None:
    placement = Placement()
    placement.join(gpu("gpu-0", grade=IsolationGrade.COOPERATIVE))
    both = spec("both", 10, placing={"gpu_models": ("B200",), "node_labels": {"rack": "a"}})

    assert ways(placement, both) == ()


def test_deployments_of_others_are_not_named() -> None:
    placement = full()
    placement.tenant = "other"

    assert not [way for way in ways(placement, spec("new", 40, is_parkable=False)) if "retired" in way]


def test_an_explanation_tells_them_where_one_more_has_no_place() -> None:
    placement = full()
    placement.deploy(spec("new", 40, is_parkable=False))

    assert placement.ask(Explain(model="new")).ways[0].startswith("with a share of 30.0 GiB instead of 40.0 GiB")
    assert placement.ask(Explain(model="new")).one_more

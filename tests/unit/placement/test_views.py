"""What clients are told: their own deployments, why they are where they are, and every fact in one sentence."""

import msgspec

from schemas.catalogue import FACTS
from schemas.deployments import SwapDriver
from schemas.inbox import KeyCreateRequested
from schemas.queries import Explain, ListDeployments, ListKeys, ListNodes
from schemas.units import GiB
from services.placement import wording
from tests.unit.placement.builders import Placement, gpu, spec
from tests.unit.placement.test_commands import HASH


def furnished() -> Placement:
    placement = Placement()
    placement.join(gpu("gpu-0"), gpu("gpu-1", allocatable_gib=40))
    placement.placed(spec("a", 50))
    placement.deploy(spec("big", 90))
    return placement


def test_a_list_shows_the_tenants_deployments_in_name_order_with_what_is_wrong() -> None:
    views = furnished().ask(ListDeployments()).deployments

    assert [("a", 1, ""), ("big", 0, "use a share smaller by 10.0 GiB")] == [
        (view.deployment.name, len(view.replicas), view.remedy) for view in views
    ]


def test_another_tenant_sees_nothing_of_it() -> None:
    placement = furnished()

    assert () == placement.ask(ListDeployments(), tenant="other").deployments
    assert not placement.ask(Explain(model="a"), tenant="other").is_known
    assert () == placement.ask(ListKeys(), tenant="other").keys


def test_a_node_shows_what_is_promised_and_what_is_held_on_each_gpu() -> None:
    (node,) = furnished().ask(ListNodes()).nodes

    first, second = node.gpus
    assert (50 * GiB, 0, 0) == (first.promised_bytes, first.held_bytes, second.promised_bytes)
    assert 10 * GiB == node.host_parked_bytes


def test_an_explanation_says_why_here_and_why_not_elsewhere() -> None:
    placement = furnished()

    placed, not_placed = placement.ask(Explain(model="a")), placement.ask(Explain(model="big"))

    assert "granted on node-0/gpu0, chosen as room beside all requests: 30.0 GiB left to promise" == placed.summary
    assert ["larger than the GPU"] == [other.reason for other in placed.alternatives]
    assert not_placed.summary.startswith("not placed: big fits no GPU")
    assert not_placed.remedy


def test_of_many_replicas_the_first_few_are_told_one_by_one() -> None:
    placement = Placement()
    for number in range(6):
        placement.join(gpu("gpu-0"), node=f"node-{number}")
    placement.deploy(spec("wide", 50, is_parkable=False, replica_count=5))

    wide = placement.ask(Explain(model="wide"))

    assert 4 == wide.summary.count("chosen as")
    assert wide.summary.endswith("; and 1 more")


def test_what_is_missing_is_told_as_it_is_now() -> None:
    placement = Placement()
    placement.join(gpu("gpu-0"))
    placement.placed(spec("first", 30, is_parkable=False))
    placement.deploy(spec("large", 60, is_parkable=False))
    placement.placed(spec("second", 20, is_parkable=False))

    explanation = placement.ask(Explain(model="large"))

    assert "not placed: large fits no GPU; nearest is node-0/gpu0: no room by 10.0 GiB" == explanation.summary
    assert explanation.one_more.endswith("no room by 30.0 GiB")


def test_an_explanation_tells_what_can_be_done_with_the_engine_where_it_runs() -> None:
    placement = Placement()
    placement.join(msgspec.structs.replace(gpu("gpu-0"), swap_drivers=(SwapDriver.STORE, SwapDriver.RESTART)))
    placement.placed(spec("first", 30))

    told = placement.ask(Explain(model="first")).engine

    assert ("parked by store", "its CUDA context stays on the GPU") == told[:2]
    assert "its cache grows and shrinks while it serves" == told[-1]


def test_a_cold_deployment_is_explained_as_cold() -> None:
    placement = furnished()
    placement.scale(placement.id_of("a"), 0)
    placement.release("a-d2-1")

    assert "cold: scaled to zero, started by the next request" == placement.ask(Explain(model="a")).summary


def test_an_unknown_model_is_explained_as_such() -> None:
    explanation = Placement().ask(Explain(model="x"))

    assert (False, "there is no deployment 'x'") == (explanation.is_known, explanation.summary)


def test_keys_are_listed_without_their_hash() -> None:
    placement = Placement()
    placement.handle(KeyCreateRequested(command_id="c", key_id="k", key_hash=HASH, name="laptop"))

    (key,) = placement.ask(ListKeys()).keys

    assert ("k", "laptop") == (key.key_id, key.name)
    assert HASH not in str(key)


def test_every_fact_has_a_sentence() -> None:
    assert set(FACTS.values()) == set(wording._TEXTS)  # The table is what is tested.

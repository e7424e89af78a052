"""What the index answers: the same when it is kept up by folds as when it is made anew from the state."""

from kit.service import digest
from kit.snapshots import encode_state, restore_state
from schemas.autoscaler import ReplicasDecided
from services.placement.core import SERVICE
from services.placement.index import Index
from services.placement.state import ClusterState
from tests.unit.placement.builders import Placement, gpu, spec


def answers(index: Index) -> dict[str, object]:
    """All that it knows, by ids."""
    ids = {
        name: {key: sorted(inner) for key, inner in getattr(index, name).items()}
        for name in ("of_deployment", "on_gpu", "on_node")
    }
    named = {key: deployment.deployment_id for key, deployment in index.named.items()}
    return {
        **ids,
        "named": named,
        "placed": dict(index.placed_counts),
        "waiting": sorted(index.waiting),
        "refused": sorted(index.refused),
        "claims": {key: sorted(inner) for key, inner in index.claims_of.items()},
        "victims": {key: claim.preemption_id for key, claim in index.claim_of_victim.items()},
        "unsettled": sorted(index.unsettled),
    }


def is_kept(state: ClusterState) -> bool:
    return answers(state.index) == answers(Index(state))


def test_an_index_that_was_kept_equals_one_that_is_made_anew() -> None:
    placement = Placement()
    placement.join(gpu("gpu-0"), gpu("gpu-1"))
    first = placement.placed(spec("a", 60))
    placement.placed(spec("b", 60, is_parkable=False))
    placement.deploy(spec("c", 70, is_parkable=False))
    assert is_kept(placement.state)

    placement.fail(first.replicas[0].replica_id)

    assert is_kept(placement.state)
    here = [r.replica_id for uuid in ("gpu-0", "gpu-1") for r in placement.state.on_gpu(uuid)]
    assert ["c", "b"] == [replica_id.partition("-")[0] for replica_id in here]


def test_who_lacks_replicas_is_known_without_looking_at_all() -> None:
    placement = Placement()
    placement.deploy(spec("a", 60))
    deployment_id = placement.id_of("a")
    assert [deployment_id] == list(placement.state.waiting)

    placement.join()
    assert [] == list(placement.state.waiting)

    decided = ReplicasDecided(at_s=1.0, deployment_id=deployment_id, model="a", replica_count=3, reason="busy")
    SERVICE.evolve(placement.state, decided)
    assert [deployment_id] == list(placement.state.waiting)


def test_replicas_on_a_lost_node_do_not_count_as_placed() -> None:
    placement = Placement()
    placement.join()
    placement.placed(spec("a", 60))
    state = placement.state

    state.index.lose_node("node-0")
    state.nodes["node-0"].lost_at_s = 5.0

    assert (0, [placement.id_of("a")]) == (state.placed_count(placement.id_of("a")), list(state.waiting))
    assert is_kept(state)

    state.nodes["node-0"].lost_at_s = None
    state.index.regain_node("node-0")

    assert (1, []) == (state.placed_count(placement.id_of("a")), list(state.waiting))


def test_a_restored_state_has_an_index_of_its_own_and_the_digest_does_not_hold_one() -> None:
    placement = Placement()
    placement.join()
    placement.placed(spec("a", 60))
    restored = SERVICE.new_state(placement.state.settings)

    restore_state(restored, encode_state(placement.state))

    assert digest(placement.state) == digest(restored)
    assert answers(placement.state.index) == answers(restored.index)
    found = restored.named("default", "a")
    assert found is restored.deployments[placement.id_of("a")]


def test_the_newest_deployment_has_the_name() -> None:
    """The one that it replaces is retired in the same input."""
    placement = Placement()
    placement.join()
    placement.placed(spec("a", 60))
    placement.deploy(spec("a", 50))

    found = placement.state.named("default", "a")

    assert found is not None
    assert 2 == found.revision_count
    assert is_kept(placement.state)

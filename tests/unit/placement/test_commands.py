"""Every command leads to exactly one fact that names it and to one answer."""

from typing import Any

import pytest

from kit.outcomes import UnreadableCommand
from schemas.inbox import (
    DeployRequested,
    KeyCreateRequested,
    KeyRevokeRequested,
    ParkRequested,
    RetireRequested,
    WakeRequested,
)
from schemas.nodes import ReplicaFailed
from schemas.placement import CommandFact, DeploymentAdmitted
from services.placement.core import SERVICE
from tests.unit.placement.builders import Placement, kinds, message, spec, verdict

HASH = "0123456789abcdef" * 4


def commands() -> list[Any]:
    """One of each, with the same id; all of them sound while model `a` and key `k` are there."""
    return [
        DeployRequested(command_id="same", deployment=spec("b", 10)),
        RetireRequested(command_id="same", model="a"),
        ParkRequested(command_id="same", model="a"),
        WakeRequested(command_id="same", model="a"),
        KeyCreateRequested(command_id="same", key_id="k2", key_hash=HASH),
        KeyRevokeRequested(command_id="same", key_id="k"),
    ]


def furnished() -> Placement:
    placement = Placement()
    placement.join()
    placement.placed(spec("a", 30))
    placement.handle(KeyCreateRequested(command_id="key", key_id="k", key_hash=HASH))
    return placement


@pytest.mark.parametrize("command", commands(), ids=lambda c: type(c).__name__)
def test_a_sound_command_is_admitted_once_and_its_repetition_is_a_duplicate(command: Any) -> None:
    placement = furnished()

    fact, admitted, _ = verdict(placement.handle(command))
    inbox_seq = placement.seq
    again = placement.handle(command)

    assert "admitted" == admitted
    assert ("CommandDuplicated", "duplicate", "") == verdict(again)
    assert f"this command was handled before ({fact})" == message(again)
    assert ["CommandDuplicated", "Reply"] == kinds(again)
    assert inbox_seq + 1 == placement.state.inbox_seq


@pytest.mark.parametrize("command", commands(), ids=lambda c: type(c).__name__)
def test_the_same_id_of_another_tenant_is_another_command(command: Any) -> None:
    placement = furnished()
    placement.handle(command)
    placement.tenant = "other"

    assert "CommandDuplicated" != verdict(placement.handle(command))[0]


def test_a_deployment_is_admitted_with_its_inbox_sequence_as_its_id() -> None:
    placement = Placement()

    admitted = placement.deploy(spec("a", 30))[0]

    assert isinstance(admitted, DeploymentAdmitted)
    assert ("d1", 1, 1) == (admitted.deployment_id, admitted.inbox_seq, admitted.revision_count)


def test_the_same_wish_twice_changes_nothing() -> None:
    placement = furnished()

    again = placement.deploy(spec("a", 30))

    assert ["CommandDuplicated", "Reply"] == kinds(again)
    assert "a is deployed like this already" == message(again)


def test_another_wish_for_a_name_releases_and_replaces_the_old_one() -> None:
    placement = furnished()
    old_id = placement.id_of("a")

    outcomes = placement.deploy(spec("a", 40))

    assert ["ReleaseProposed", "DeploymentRetired", "DeploymentAdmitted", "Reply", "PlacementProposed"] == kinds(
        outcomes
    )
    assert 2 == placement.state.deployments[placement.id_of("a")].revision_count
    assert old_id not in placement.state.deployments
    assert 1 == len({outcome.inbox_seq for outcome in outcomes if isinstance(outcome, CommandFact)})


def test_an_unsound_wish_is_rejected_with_every_reason_at_once() -> None:
    outcomes = Placement().deploy(spec("a", portion=1.5, limit_portion=1.2, priority="urgent"))

    assert ("CommandRejected", "rejected", "SUB-ADM-001") == verdict(outcomes)
    for part in ("is below the request", "'urgent' is unknown", "how many GPUs as gpu_count"):
        assert part in message(outcomes)
    assert ["CommandRejected", "Reply"] == kinds(outcomes)


def test_a_limit_below_the_request_is_rejected() -> None:
    assert "raise the limit or lower the request" in message(Placement().deploy(spec("a", 30, limit_gib=20)))


@pytest.mark.parametrize("kind", [RetireRequested, ParkRequested, WakeRequested])
def test_an_unknown_model_is_rejected_and_the_known_ones_are_named(kind: Any) -> None:
    outcomes = furnished().handle(kind(command_id="c", model="x"))

    assert ("CommandRejected", "rejected", "SUB-MDL-001") == verdict(outcomes)
    assert "there is no deployment 'x'; there are: a" == message(outcomes)


@pytest.mark.parametrize("kind", [RetireRequested, ParkRequested, WakeRequested])
def test_a_model_of_another_tenant_is_unknown_and_not_named(kind: Any) -> None:
    placement = furnished()
    placement.tenant = "other"

    assert "there is no deployment 'a'; nothing is deployed" == message(
        placement.handle(kind(command_id="c", model="a"))
    )


def test_what_is_not_parkable_is_not_parked() -> None:
    placement = Placement()
    placement.deploy(spec("fixed", 30, is_parkable=False))

    outcomes = placement.handle(ParkRequested(command_id="p", model="fixed"))

    assert ("CommandRejected", "rejected", "SUB-SWP-001") == verdict(outcomes)


def test_a_retired_deployment_is_gone_and_its_replicas_are_released() -> None:
    placement = furnished()

    outcomes = placement.handle(RetireRequested(command_id="r", model="a"))

    assert ["DeploymentRetired", "Reply", "ReleaseProposed"] == kinds(outcomes)
    assert {} == placement.state.deployments


@pytest.mark.parametrize("key_hash", ["", "abc", HASH.upper(), "g" * 64])
def test_a_key_whose_hash_is_none_is_rejected(key_hash: str) -> None:
    outcomes = Placement().handle(KeyCreateRequested(command_id="c", key_id="k", key_hash=key_hash))

    assert ("CommandRejected", "rejected", "SUB-KEY-001") == verdict(outcomes)


def test_a_key_id_that_is_taken_is_rejected() -> None:
    outcomes = furnished().handle(KeyCreateRequested(command_id="c", key_id="k", key_hash=HASH))

    assert "SUB-KEY-002" == verdict(outcomes)[2]


@pytest.mark.parametrize(("tenant", "key_id"), [("default", "x"), ("other", "k")])
def test_only_an_own_key_is_revoked(tenant: str, key_id: str) -> None:
    placement = furnished()
    placement.tenant = tenant

    assert "SUB-KEY-003" == verdict(placement.handle(KeyRevokeRequested(command_id="c", key_id=key_id)))[2]
    assert ["k"] == list(placement.state.keys)


def test_a_command_that_cannot_be_read_is_rejected_with_the_reason() -> None:
    outcomes = Placement().handle(UnreadableCommand(command_id="c", reason="no JSON"))

    assert ("CommandRejected", "rejected", "SUB-INB-001") == verdict(outcomes)
    assert "the command cannot be read: no JSON" == message(outcomes)


def test_remembered_commands_are_bounded_and_the_oldest_are_forgotten_first() -> None:
    placement = Placement()
    count = placement.state.settings.remembered_command_count
    placement.state.command_ids.update({f"default/old{number}": "x" for number in range(count)})

    placement.deploy(spec("a", 30), command_id="new")

    assert count == len(placement.state.command_ids)
    assert "default/old0" not in placement.state.command_ids
    assert "default/new" in placement.state.command_ids


# --- What failed for good ---------------------------------------------------------------------------------------------


def with_a_failed_replica() -> Placement:
    placement = furnished()
    failed = ReplicaFailed(
        node="node-0",
        at_s=1.0,
        replica_id="a-d2-1",
        deployment_id="d2",
        model="a",
        reason="it ended with code 1",
        attempt_count=5,
        is_final=True,
        wake_epoch=6,
    )
    SERVICE.evolve(placement.state, failed)
    return placement


def test_a_wake_of_what_failed_for_good_is_rejected_with_the_reason_and_a_way_out() -> None:
    outcomes = with_a_failed_replica().handle(WakeRequested(command_id="w", model="a"))

    assert ("CommandRejected", "rejected", "SUB-SWP-003") == verdict(outcomes)
    assert "a failed for good (it ended with code 1); deploy it again to try anew" == message(outcomes)


def test_the_same_wish_again_tries_anew_what_failed_for_good() -> None:
    outcomes = with_a_failed_replica().deploy(spec("a", 30))

    assert ["ReleaseProposed", "DeploymentRetired", "DeploymentAdmitted", "Reply", "PlacementProposed"] == kinds(
        outcomes
    )


def test_a_wake_of_what_is_not_placed_is_rejected_with_the_reason_and_the_remedy() -> None:
    placement = furnished()
    placement.deploy(spec("big", 90))

    outcomes = placement.handle(WakeRequested(command_id="w", model="big"))

    assert ("CommandRejected", "rejected", "SUB-SWP-002") == verdict(outcomes)
    assert message(outcomes).startswith("big is not placed: big fits no GPU")
    assert message(outcomes).endswith("use a share smaller by 10.0 GiB")


def test_a_wake_of_what_is_cold_is_admitted() -> None:
    placement = furnished()
    placement.scale("d2", 0)
    placement.release("a-d2-1")

    assert "admitted" == verdict(placement.handle(WakeRequested(command_id="w", model="a")))[1]

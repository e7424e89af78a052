"""What a host holds compared with the record: what is named is left alone, and all else goes."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from schemas.brokers import AccountView, BrokerView
from schemas.holders import EngineView
from services.nodeagent.reconciling import (
    PROBE_PREFIX,
    Differences,
    Holdings,
    Record,
    differences,
    either,
    in_both,
    leased,
)

NAMES = ["a", "b", "c", "d"]
PROBE = f"{PROBE_PREFIX}0"
EPOCHS = [1, 2]
GPUS = ["gpu-0", "gpu-1"]
KEYS = st.tuples(st.sampled_from(NAMES), st.sampled_from(EPOCHS))


def engine(replica_id: str, lease_epoch: int, pid: int, *, is_alive: bool) -> EngineView:
    return EngineView(
        replica_id=replica_id, lease_epoch=lease_epoch, pid=pid, started_ticks=pid, port=1, is_gated=False,
        is_alive=is_alive, exit_code=None if is_alive else 0, gpu_uuids=tuple(GPUS), namespace=f"/g/{replica_id}",
        log_path="",
    )  # fmt: skip


def account(replica_id: str, lease_epoch: int) -> AccountView:
    return AccountView(
        replica_id=replica_id, lease_epoch=lease_epoch, is_connected=False, granted_bytes={}, held_bytes={},
        sealed_bytes=0, image_ids=(), tier="",
    )  # fmt: skip


def broker(accounts: list[AccountView], deployment_ids: list[str]) -> BrokerView:
    return BrokerView(
        accounts=tuple(accounts), gpus=(), host=(), disk_budget_bytes=0, disk_used_bytes=0,
        image_deployment_ids=tuple(deployment_ids),
    )  # fmt: skip


@st.composite
def records(draw: st.DrawFn) -> Record:
    """One lease of each replica at the most."""
    leases = draw(st.dictionaries(st.sampled_from(NAMES), st.sampled_from(EPOCHS)))
    return Record(leases=frozenset(leases.items()), deployment_ids=frozenset(f"d-{name}" for name in leases))


@st.composite
def holdings(draw: st.DrawFn) -> Holdings:
    found = draw(st.dictionaries(st.sampled_from([*NAMES, PROBE]), st.tuples(st.sampled_from(EPOCHS), st.booleans())))
    engines = tuple(
        engine(name, epoch, 100 + number, is_alive=is_alive)
        for number, (name, (epoch, is_alive)) in enumerate(sorted(found.items()))
    )
    leaves = draw(st.sets(st.sampled_from([name for name in [*NAMES, PROBE, "z"] if name not in found])))
    accounts = [account(*key) for key in sorted(draw(st.sets(KEYS)))]
    kept = sorted(draw(st.sets(st.sampled_from([f"d-{name}" for name in NAMES]))))
    sizes = st.dictionaries(st.integers(98, 104), st.none() | st.integers(0, 9))
    return Holdings(
        engines=engines,
        leaves={name: f"/g/{name}" for name in sorted(leaves)},
        broker=draw(st.sampled_from([None, broker(accounts, kept)])),
        process_bytes={gpu_uuid: draw(sizes) for gpu_uuid in GPUS},
        owners={one.pid: one.replica_id for one in engines if one.is_alive},
    )


def seen_to(here: Holdings, found: Differences) -> Holdings:
    """The host after all of it was done."""
    ended = [stray.engine for stray in found.strays]
    cleared = {stray.engine.replica_id for stray in found.strays if not stray.is_replaced}
    kept = [replace_dead(one) if one in ended else one for one in here.engines if one.replica_id not in cleared]
    left = here.broker
    if left is not None:
        left = broker(
            [one for one in left.accounts if (one.replica_id, one.lease_epoch) not in found.accounts],
            [name for name in left.image_deployment_ids if name not in found.deployment_ids],
        )
    leaves = {name: leaf for name, leaf in here.leaves.items() if name not in found.leaves}
    return replace(here, engines=tuple(kept), leaves=leaves, broker=left)


def replace_dead(one: EngineView) -> EngineView:
    return engine(one.replica_id, one.lease_epoch, one.pid, is_alive=False)


@given(records(), holdings())
def test_what_a_lease_names_is_left_alone(record: Record, here: Holdings) -> None:
    found = differences(record, here)

    assert not record.leases & {(stray.engine.replica_id, stray.engine.lease_epoch) for stray in found.strays}
    assert not record.leases & set(found.accounts)
    assert not record.replica_ids & found.leaves.keys()
    assert not record.deployment_ids & set(found.deployment_ids)


@given(records(), holdings())
def test_a_probe_by_which_the_agent_tries_a_gpu_is_its_own(record: Record, here: Holdings) -> None:
    found = differences(record, here)

    assert PROBE not in {stray.engine.replica_id for stray in found.strays} | found.leaves.keys()
    assert {one for one in here.engines if one.replica_id == PROBE} <= set(leased(here.engines, record))


@given(records(), holdings())
def test_a_living_engine_is_ended_exactly_where_no_lease_of_its_epoch_is_there(record: Record, here: Holdings) -> None:
    alive = {(one.replica_id, one.lease_epoch) for one in here.engines if one.is_alive and one.replica_id != PROBE}
    found = differences(record, here).strays
    ended = {(stray.engine.replica_id, stray.engine.lease_epoch) for stray in found if stray.engine.is_alive}

    assert alive - record.leases == ended


@given(records(), holdings())
def test_an_engine_that_lives_keeps_its_account_for_it_may_still_map_what_it_was_lent(
    record: Record, here: Holdings
) -> None:
    alive = {(one.replica_id, one.lease_epoch) for one in here.engines if one.is_alive}

    assert not alive & set(differences(record, here).accounts)


@given(records(), holdings())
def test_when_all_is_seen_to_only_accounts_of_what_was_ended_are_left_and_then_nothing(
    record: Record, here: Holdings
) -> None:
    """An engine's account is closed when it is gone; where its replica has another lease, by the next look."""
    first = seen_to(here, differences(record, here))
    again = differences(record, first)

    assert (again.strays, again.leaves, again.deployment_ids) == ((), {}, ())
    ended = {(one.replica_id, one.lease_epoch) for one in here.engines if one.is_alive}
    assert set(again.accounts) <= ended
    assert not differences(record, seen_to(first, again))


@given(records(), records(), holdings())
def test_a_lease_that_begins_or_ends_during_a_look_is_no_difference(
    before: Record, after: Record, here: Holdings
) -> None:
    found = differences(either(before, after), here)

    for record in (before, after):
        assert not record.leases & {(stray.engine.replica_id, stray.engine.lease_epoch) for stray in found.strays}


@given(records(), holdings(), holdings())
def test_what_one_of_two_looks_did_not_find_is_left_for_the_next(
    record: Record, first: Holdings, second: Holdings
) -> None:
    one, two = differences(record, first), differences(record, second)
    found = in_both(one, two)

    assert set(found.accounts) == set(one.accounts) & set(two.accounts)
    assert set(found.deployment_ids) == set(one.deployment_ids) & set(two.deployment_ids)
    assert found.leaves.keys() == one.leaves.keys() & two.leaves.keys()
    assert all(stray in two.strays for stray in found.strays)


@given(records(), holdings())
def test_a_stray_s_bytes_are_told_and_never_guessed(record: Record, here: Holdings) -> None:
    for stray in differences(record, here).strays:
        for gpu_uuid, size in stray.used_bytes.items():
            own = here.process_bytes[gpu_uuid][stray.engine.pid]
            assert own == size


def test_a_broker_that_does_not_answer_says_nothing_about_accounts() -> None:
    record = Record(leases=frozenset(), deployment_ids=frozenset())

    assert not differences(record, Holdings(engines=()))

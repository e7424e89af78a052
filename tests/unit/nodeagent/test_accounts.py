"""Accounts with the memory broker over restarts: of the broker and of the agent, which both forget them."""

from pathlib import Path
from typing import Any, cast

import anyio
import pytest

from schemas.brokers import AccountClose, AccountOpen, AccountView, BrokerView
from services.nodeagent.broker_client import BrokerProblem
from services.nodeagent.guard import accounts
from services.nodeagent.guard.accounts import Accounts

pytestmark = pytest.mark.anyio


class PlayedBroker:
    """Knows what was opened since its last restart."""

    def __init__(self) -> None:
        self.life = 1
        self.is_away = False
        self.opened: list[AccountOpen] = []
        self.forgotten: list[str] = []
        self.looks = 0

    def restart(self) -> None:
        self.life += 1
        self.opened = []

    async def look(self) -> BrokerView:
        self._answer()
        self.looks += 1
        views = tuple(
            AccountView(
                replica_id=account.replica_id, lease_epoch=account.lease_epoch, is_connected=False,
                granted_bytes=account.granted_bytes, held_bytes={}, sealed_bytes=0, image_ids=(), tier="",
            )
            for account in self.opened
        )  # fmt: skip
        return BrokerView(
            broker_id=str(self.life), accounts=views, gpus=(), host=(), disk_budget_bytes=0, disk_used_bytes=0
        )

    async def open(self, account: AccountOpen) -> None:
        self._answer()
        self.opened.append(account)

    async def close(self, account: AccountClose) -> None:
        self._answer()

    async def forget(self, deployment_id: str) -> None:
        self._answer()
        self.forgotten.append(deployment_id)

    def _answer(self) -> None:
        if self.is_away:
            raise BrokerProblem("it does not answer")


def kept(broker: PlayedBroker, folder: Path) -> Accounts:
    return Accounts(cast(Any, broker), engine_socket="/e", secret_path=folder / "secret")


async def allow(subject: Accounts, replica_id: str, *, granted_bytes: int) -> None:
    await subject.allow(
        replica_id, lease_epoch=1, tenant="t", deployment_id="d", granted_bytes={"GPU-0": granted_bytes}
    )


async def until_opened(subject: Accounts, broker: PlayedBroker, *, count: int) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(subject.keep, lambda: None)
        with anyio.fail_after(10):
            while len(broker.opened) < count:
                await anyio.sleep(0.001)
        tasks.cancel_scope.cancel()


async def kept_for_a_while(subject: Accounts, broker: PlayedBroker, deployment_ids: list[str] | None) -> None:
    """Several looks long."""
    end = broker.looks + 4
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(subject.keep, lambda: deployment_ids)
        with anyio.fail_after(10):
            while broker.looks < end:
                await anyio.sleep(0.001)
        tasks.cancel_scope.cancel()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts, "KEEP_EVERY_S", 0.001)


async def test_a_restarted_broker_is_told_what_is_granted_now(tmp_path: Path) -> None:
    broker = PlayedBroker()
    subject = kept(broker, tmp_path)
    await allow(subject, "a", granted_bytes=5)
    await allow(subject, "a", granted_bytes=7)
    await allow(subject, "b", granted_bytes=1)
    await subject.close("b", lease_epoch=1)
    key = broker.opened[0].key
    broker.restart()

    await until_opened(subject, broker, count=1)

    (again,) = broker.opened
    assert ("a", {"GPU-0": 7}, key) == (again.replica_id, again.granted_bytes, again.key)


async def test_a_restarted_agent_still_knows_them(tmp_path: Path) -> None:
    broker = PlayedBroker()
    await allow(kept(broker, tmp_path), "a", granted_bytes=5)
    key = broker.opened[0].key
    broker.restart()

    await until_opened(kept(broker, tmp_path), broker, count=1)

    assert [("a", key)] == [(account.replica_id, account.key) for account in broker.opened]
    assert key not in (tmp_path / "broker-accounts.json").read_text()


async def test_a_grant_that_was_made_while_the_broker_was_away_is_told_when_it_is_back(tmp_path: Path) -> None:
    broker = PlayedBroker()
    subject = kept(broker, tmp_path)
    broker.is_away = True
    with pytest.raises(BrokerProblem):
        await allow(subject, "a", granted_bytes=5)
    broker.is_away = False

    await until_opened(subject, broker, count=1)

    assert ["a"] == [account.replica_id for account in broker.opened]


async def test_a_list_that_cannot_be_read_is_no_list(tmp_path: Path) -> None:
    (tmp_path / "broker-accounts.json").write_text("[{")

    await allow(kept(PlayedBroker(), tmp_path), "a", granted_bytes=5)


async def test_images_are_forgotten_once_their_deployment_has_no_replica_and_no_engine_here(tmp_path: Path) -> None:
    broker = PlayedBroker()
    subject = kept(broker, tmp_path)
    await allow(subject, "a", granted_bytes=5)
    await kept_for_a_while(subject, broker, [])  # its engine still runs
    await subject.close("a", lease_epoch=1)
    await kept_for_a_while(subject, broker, None)  # not known yet
    await kept_for_a_while(subject, broker, ["d"])  # a replica that starts again
    assert [] == broker.forgotten

    await kept_for_a_while(kept(broker, tmp_path), broker, ["other"])  # by the next agent

    assert ["d"] == broker.forgotten

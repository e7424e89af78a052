"""Accounts of engines with the memory broker: opened before the gate, resized with the grant, closed at the end.

A broker that is started again knows none of them, and an agent that is started again has forgotten them. So they are
written down, without their keys, and `keep` opens them again at every broker that it has not seen before.
"""

import hashlib
import hmac
import logging
import secrets
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Final

import anyio
import msgspec

from schemas.brokers import AccountClose, AccountOpen, BrokerView
from services.nodeagent.broker_client import BrokerClient, BrokerProblem

log = logging.getLogger("nodeagent")

KEEP_EVERY_S: Final = 0.5
"""A restarted broker holds up its engines' parks and wakes for so long at most."""


class _Kept(msgspec.Struct, frozen=True, kw_only=True):
    """The file: accounts that are open, without keys, and deployments that may have images."""

    accounts: list[AccountOpen] = []
    deployment_ids: list[str] = []


class Accounts:
    """The agent's side. The key of an account follows from a secret of this host, so a restarted agent knows it too."""

    def __init__(self, client: BrokerClient, *, engine_socket: str, secret_path: Path) -> None:
        self._client = client
        self._engine_socket = engine_socket
        self._secret = _kept_secret(secret_path)
        self._path = secret_path.with_name("broker-accounts.json")
        kept = _read(self._path)
        self._open = {(account.replica_id, account.lease_epoch): account for account in kept.accounts}
        self._deployment_ids = set(kept.deployment_ids)

    def environment(self, replica_id: str, *, lease_epoch: int) -> dict[str, str]:
        """What the engine needs to ask the broker."""
        return {
            "SUBLET_BROKER_SOCKET": self._engine_socket,
            "SUBLET_BROKER_KEY": self._key(replica_id, lease_epoch),
            "SUBLET_REPLICA_ID": replica_id,
            "SUBLET_LEASE_EPOCH": str(lease_epoch),
        }

    async def allow(
        self, replica_id: str, *, lease_epoch: int, tenant: str, deployment_id: str, granted_bytes: Mapping[str, int]
    ) -> None:
        """The engine may hold so much on each GPU from now on; opens the account. Raises `BrokerProblem`."""
        account = AccountOpen(
            replica_id=replica_id,
            lease_epoch=lease_epoch,
            tenant=tenant,
            key=self._key(replica_id, lease_epoch),
            granted_bytes=dict(granted_bytes),
            deployment_id=deployment_id,
        )
        # Before it is asked: a broker that is away now learns of it when it is back.
        self._open[replica_id, lease_epoch] = account
        self._deployment_ids.add(deployment_id)
        self._write()
        await self._client.open(account)

    async def close(self, replica_id: str, *, lease_epoch: int) -> None:
        """The engine is gone. A broker that is away has forgotten the account by itself when it is back."""
        if self._open.pop((replica_id, lease_epoch), None) is not None:
            self._write()
        try:
            await self._client.close(AccountClose(replica_id=replica_id, lease_epoch=lease_epoch))
        except BrokerProblem as problem:
            log.warning("account not closed", extra={"replica": replica_id, "reason": str(problem)})

    async def keep(self, deployment_ids: Callable[[], Collection[str] | None]) -> None:
        """Open them again at a broker that was restarted, and let it forget images that nobody needs; for ever.

        `deployment_ids` are those that this node has replicas of; None while that is not known.
        """
        broker_id = ""
        while True:
            try:
                view = await self._client.look()
                if view.broker_id != broker_id:
                    known = {(account.replica_id, account.lease_epoch) for account in view.accounts}
                    for key, account in sorted(self._open.items()):
                        if key not in known:
                            await self._client.open(msgspec.structs.replace(account, key=self._key(*key)))
                    broker_id = view.broker_id
                await self._forget_all_but(deployment_ids())
            except BrokerProblem as problem:
                log.debug("accounts wait for the broker", extra={"reason": str(problem)})
            await anyio.sleep(KEEP_EVERY_S)

    async def _forget_all_but(self, deployment_ids: Collection[str] | None) -> None:
        """The images of deployments that have no replica here any more, nor an engine that is about to end."""
        if deployment_ids is None:
            return
        needed = {*deployment_ids, *(account.deployment_id for account in self._open.values())}
        for deployment_id in sorted(self._deployment_ids - needed):
            await self._client.forget(deployment_id)
            self._deployment_ids.discard(deployment_id)
            self._write()

    async def close_nobodys(self, account: AccountClose) -> None:
        """One that no lease names, and no engine has. Raises `BrokerProblem`."""
        if self._open.pop((account.replica_id, account.lease_epoch), None) is not None:
            self._write()
        await self._client.close(account)

    async def forget(self, deployment_id: str) -> None:
        """The images of a deployment that has no replica here. Raises `BrokerProblem`."""
        await self._client.forget(deployment_id)

    async def look(self) -> BrokerView | None:
        """None when the broker does not answer."""
        try:
            return await self._client.look()
        except BrokerProblem as problem:
            log.warning("broker problem", extra={"reason": str(problem)})
            return None

    def _write(self) -> None:
        """In one step, so that a killed agent leaves the old list or the new one."""
        accounts = [msgspec.structs.replace(account, key="") for _, account in sorted(self._open.items())]
        draft = self._path.with_suffix(".new")
        kept = _Kept(accounts=accounts, deployment_ids=sorted(self._deployment_ids))
        draft.write_bytes(msgspec.json.encode(kept))
        draft.replace(self._path)

    def _key(self, replica_id: str, lease_epoch: int) -> str:
        return hmac.new(self._secret, f"{replica_id} {lease_epoch}".encode(), hashlib.sha256).hexdigest()


def _read(path: Path) -> _Kept:
    """What a former agent wrote down; nothing where that cannot be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Kept)
    except (OSError, msgspec.MsgspecError):
        return _Kept()


def _kept_secret(path: Path) -> bytes:
    """32 random bytes, made once; readable for this user alone."""
    try:
        return bytes.fromhex(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        secret = secrets.token_bytes(32)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.chmod(0o600)
        path.write_text(secret.hex(), encoding="ascii")
        return secret

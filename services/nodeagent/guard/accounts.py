"""Accounts of engines with the memory broker: opened before the gate, resized with the grant, closed at the end.

A broker that is started again knows none of them, and an agent that is started again has forgotten them. So they are
written down, without their keys, and `keep` opens them again at every broker that it has not seen before.
"""

import hashlib
import hmac
import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import anyio
import msgspec

from schemas.brokers import AccountClose, AccountOpen, BrokerView
from services.nodeagent.broker_client import BrokerClient, BrokerProblem

log = logging.getLogger("nodeagent")

KEEP_EVERY_S: Final = 0.5
"""A restarted broker holds up its engines' parks and wakes for so long at most."""


class Accounts:
    """The agent's side. The key of an account follows from a secret of this host, so a restarted agent knows it too."""

    def __init__(self, client: BrokerClient, *, engine_socket: str, secret_path: Path) -> None:
        self._client = client
        self._engine_socket = engine_socket
        self._secret = _kept_secret(secret_path)
        self._path = secret_path.with_name("broker-accounts.json")
        self._open = _read(self._path)

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

    async def keep(self) -> None:
        """Open them again at a broker that was restarted; for ever."""
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
            except BrokerProblem as problem:
                log.debug("accounts wait for the broker", extra={"reason": str(problem)})
            await anyio.sleep(KEEP_EVERY_S)

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
        draft.write_bytes(msgspec.json.encode(accounts))
        draft.replace(self._path)

    def _key(self, replica_id: str, lease_epoch: int) -> str:
        return hmac.new(self._secret, f"{replica_id} {lease_epoch}".encode(), hashlib.sha256).hexdigest()


def _read(path: Path) -> dict[tuple[str, int], AccountOpen]:
    """What a former agent had opened; none where nothing can be read."""
    try:
        accounts = msgspec.json.decode(path.read_bytes(), type=list[AccountOpen])
    except (OSError, msgspec.MsgspecError):
        return {}
    return {(account.replica_id, account.lease_epoch): account for account in accounts}


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

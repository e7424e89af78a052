"""Accounts of engines with the memory broker: opened before the gate, resized with the grant, closed at the end."""

import hashlib
import hmac
import logging
import secrets
from collections.abc import Mapping
from pathlib import Path

from schemas.brokers import AccountClose, AccountOpen, BrokerView
from services.nodeagent.broker_client import BrokerClient, BrokerProblem

log = logging.getLogger("nodeagent")


class Accounts:
    """The agent's side. The key of an account follows from a secret of this host, so a restarted agent knows it too."""

    def __init__(self, client: BrokerClient, *, engine_socket: str, secret_path: Path) -> None:
        self._client = client
        self._engine_socket = engine_socket
        self._secret = _kept_secret(secret_path)

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
        await self._client.open(
            AccountOpen(
                replica_id=replica_id,
                lease_epoch=lease_epoch,
                tenant=tenant,
                key=self._key(replica_id, lease_epoch),
                granted_bytes=dict(granted_bytes),
                deployment_id=deployment_id,
            )
        )

    async def close(self, replica_id: str, *, lease_epoch: int) -> None:
        """The engine is gone. A broker that is away has forgotten the account by itself when it is back."""
        try:
            await self._client.close(AccountClose(replica_id=replica_id, lease_epoch=lease_epoch))
        except BrokerProblem as problem:
            log.warning("account not closed", extra={"replica": replica_id, "reason": str(problem)})

    async def look(self) -> BrokerView | None:
        """None when the broker does not answer."""
        try:
            return await self._client.look()
        except BrokerProblem as problem:
            log.warning("broker problem", extra={"reason": str(problem)})
            return None

    def _key(self, replica_id: str, lease_epoch: int) -> str:
        return hmac.new(self._secret, f"{replica_id} {lease_epoch}".encode(), hashlib.sha256).hexdigest()


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

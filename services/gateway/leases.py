"""Keeps a route lease from every node's holder, over HTTP, so that routing needs nobody else."""

import asyncio
import logging
from typing import Final

import aiohttp
import msgspec

from schemas.catalogue import encode
from schemas.holders import RouteLease, RouteLeaseWish
from services.gateway.runtime import Runtime
from services.gateway.settings import GatewaySettings

SAFETY_S: Final = 0.3
"""A renewal may be kept open only while at least this much of the term is left after it."""
PACE_S: Final = 0.05
"""Between answers that bring nothing new; bounds a holder that does not keep renewals open."""

log = logging.getLogger("gateway")


class RouteLeases:
    """One task per node. The term of a lease counts from before its wish was sent."""

    def __init__(
        self,
        settings: GatewaySettings,
        runtime: Runtime,
        session: aiohttp.ClientSession,
        group: asyncio.TaskGroup,
        *,
        gateway_id: str,
    ) -> None:
        self.problems: dict[str, str] = {}
        """{node: why its lease could not be renewed last time}."""
        self._settings = settings
        self._runtime = runtime
        self._session = session
        self._group = group
        self._gateway_id = gateway_id
        self._seen: dict[str, int] = {}
        """{node: version acted on}; kept over restarts of a task, because it must never go back."""
        self._tasks: dict[str, tuple[str, asyncio.Task[None]]] = {}

    def follow(self, nodes: dict[str, str]) -> None:
        """Have one task for each node's present holder. `nodes` is {node: holder url}."""
        for node, (url, task) in list(self._tasks.items()):
            if nodes.get(node) != url:
                task.cancel()
                del self._tasks[node]
                self.problems.pop(node, None)
        for node, url in nodes.items():
            if node not in self._tasks:
                task = self._group.create_task(self._renew_for_ever(node, url), name=f"route lease of {node}")
                self._tasks[node] = (url, task)

    async def _renew_for_ever(self, node: str, url: str) -> None:
        while True:
            sent_s = self._runtime.now_s()
            try:
                lease = await self._renew(node, url, sent_s)
            except (aiohttp.ClientError, TimeoutError, OSError, msgspec.MsgspecError) as error:
                self._note(node, f"{type(error).__name__}: {error}")
                await asyncio.sleep(self._settings.lease_retry_s)
                continue
            self._note(node, "")
            is_news = lease.version != self._seen.get(node)
            # The core stops routing to what is closed before the next wish acknowledges it.
            self._runtime.lease(node, lease, sent_s=sent_s)
            self._seen[node] = max(lease.version, self._seen.get(node, -1))
            if not is_news and self._runtime.now_s() - sent_s < PACE_S:
                await asyncio.sleep(PACE_S)

    async def _renew(self, node: str, url: str, sent_s: float) -> RouteLease:
        present = self._runtime.core.routes.leases.get(node)
        left_s = 0.0 if present is None else present.ends_s - sent_s
        wish = RouteLeaseWish(
            gateway=self._gateway_id,
            seen_version=self._seen.get(node, -1),
            wait_s=max(0.0, min(self._settings.lease_wait_s, left_s - SAFETY_S)),
        )
        token = self._settings.holder_token
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
        timeout = aiohttp.ClientTimeout(total=self._settings.lease_timeout_s)
        async with self._session.post(
            url.rstrip("/") + "/routes/lease", data=encode(wish), headers=headers, timeout=timeout
        ) as answer:
            body = await answer.read()
            if answer.status != 200:
                raise aiohttp.ClientPayloadError(f"status {answer.status}: {body[:200].decode(errors='replace')}")
            return _DECODER.decode(body)

    def _note(self, node: str, problem: str) -> None:
        """Logs only changes: a holder that is away is asked twenty times a second."""
        if self.problems.get(node, "") != problem:
            log.warning("route lease", extra={"node": node, "problem": problem or "renewed again"})
        if problem:
            self.problems[node] = problem
        else:
            self.problems.pop(node, None)


_DECODER: Final[msgspec.json.Decoder[RouteLease]] = msgspec.json.Decoder(RouteLease)

"""The client for code that is not asynchronous: the same functions, each waiting for its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from sublet import _contract as contract
from sublet.client import COMMAND_TIMEOUT_S, Applied, Client, NewKey, connect
from sublet.context import Context

Result = TypeVar("Result")


class SyncClient:
    """See `sublet.client.Client`. Not for use from several threads at once, nor inside an event loop."""

    def __init__(self, client: Client, runner: asyncio.Runner) -> None:
        self._client = client
        self._runner = runner

    def _wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self._runner.run(work)

    def deploy(self, spec: contract.DeploymentSpec) -> contract.CommandAnswered:
        return self._wait(self._client.deploy(spec))

    def apply(self, specs: Iterable[contract.DeploymentSpec]) -> list[Applied]:
        return self._wait(self._client.apply(specs))

    def retire(self, model: str) -> contract.CommandAnswered:
        return self._wait(self._client.retire(model))

    def park(self, model: str) -> contract.CommandAnswered:
        return self._wait(self._client.park(model))

    def wake(self, model: str) -> contract.CommandAnswered:
        return self._wait(self._client.wake(model))

    def create_key(self, name: str = "") -> NewKey:
        return self._wait(self._client.create_key(name))

    def revoke_key(self, key_id: str) -> contract.CommandAnswered:
        return self._wait(self._client.revoke_key(key_id))

    def plan(self, deployments: Iterable[contract.DeploymentSpec]) -> contract.Plan:
        return self._wait(self._client.plan(deployments))

    def plan_repack(self, *, move_count_max: int = 8) -> contract.RepackPlan:
        return self._wait(self._client.plan_repack(move_count_max=move_count_max))

    def quotas(self) -> contract.QuotaList:
        return self._wait(self._client.quotas())

    def repack(self, *, move_count_max: int = 8) -> contract.CommandAnswered:
        return self._wait(self._client.repack(move_count_max=move_count_max))

    def set_quota(
        self, tenant: str, *, gpu_quota: float | None, over_quota_weight: float = 1.0
    ) -> contract.CommandAnswered:
        return self._wait(self._client.set_quota(tenant, gpu_quota=gpu_quota, over_quota_weight=over_quota_weight))

    def reinstate_gpu(self, node: str, gpu_uuid: str) -> contract.CommandAnswered:
        return self._wait(self._client.reinstate_gpu(node, gpu_uuid))

    def close_gpu(
        self, node: str, gpu_uuid: str, *, is_draining: bool = False, reason: str = ""
    ) -> contract.CommandAnswered:
        return self._wait(self._client.close_gpu(node, gpu_uuid, is_draining=is_draining, reason=reason))

    def deployments(self) -> contract.DeploymentList:
        return self._wait(self._client.deployments())

    def deployment(self, model: str) -> contract.DeploymentView | None:
        return self._wait(self._client.deployment(model))

    def nodes(self) -> contract.NodeList:
        return self._wait(self._client.nodes())

    def explain(self, model: str) -> contract.Explanation:
        return self._wait(self._client.explain(model))

    def events(
        self, *, after_seq: int = 0, model: str = "", limit_count: int = 100, wait_s: float = 0.0
    ) -> contract.EventList:
        return self._wait(self._client.events(after_seq=after_seq, model=model, limit_count=limit_count, wait_s=wait_s))

    def keys(self) -> contract.KeyList:
        return self._wait(self._client.keys())

    def logs(self, *, node: str, replica_id: str, after_bytes: int = 0, tail_count: int = 200) -> contract.LogChunk:
        return self._wait(
            self._client.logs(node=node, replica_id=replica_id, after_bytes=after_bytes, tail_count=tail_count)
        )


@contextmanager
def connect_sync(context: Context | None = None, *, timeout_s: float = COMMAND_TIMEOUT_S) -> Iterator[SyncClient]:
    """`sublet.connect` for code that is not asynchronous."""
    with asyncio.Runner() as runner:
        opening = connect(context, timeout_s=timeout_s)
        client = runner.run(opening.__aenter__())
        try:
            yield SyncClient(client, runner)
        finally:
            runner.run(opening.__aexit__(None, None, None))

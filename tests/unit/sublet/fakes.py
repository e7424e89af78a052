"""A control plane in memory: what a client sends is kept, what it is answered is scripted."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from click.testing import CliRunner, Result

from sublet import _contract as contract
from sublet.cli import cli
from sublet.cli.session import Session
from sublet.client import Client, Outgoing
from sublet.context import Context
from sublet.errors import SubletError, Unreachable

GIB = 1024**3
NOW_S = 1_795_600_000.0
GPU = "GPU-00000000-0000-0000-0000-000000000001"


def spec(name: str = "chat", **changes: Any) -> contract.DeploymentSpec:
    """A deployment of 0.3 to 0.4 of a GPU."""
    fields: dict[str, Any] = {
        "engine": contract.EngineSpec(weights_bytes=14_500_000_000),
        "share": contract.ShareSpec(request_portion=0.3, limit_portion=0.4),
    }
    return contract.DeploymentSpec(name=name, **(fields | changes))


def replica(state: str, **changes: Any) -> contract.ReplicaView:
    fields: dict[str, Any] = {
        "replica_id": "r1", "node": "a", "gpu_uuid": GPU, "gpu_index": 0, "state": state, "since_s": NOW_S - 720,
        "request_bytes": 24 * GIB, "granted_bytes": 24 * GIB, "limit_bytes": 32 * GIB, "residue_bytes": GIB,
        "wake_epoch": 1,
    }  # fmt: skip
    return contract.ReplicaView(**(fields | changes))


def view(
    state: str = "", *, name: str = "chat", problem: str = "", remedy: str = "", **changes: Any
) -> contract.DeploymentView:
    """A deployment with one replica in this state, or with none."""
    wish = changes.pop("deployment", None) or spec(name)
    return contract.DeploymentView(
        deployment_id=f"d-{name}",
        tenant="default",
        deployment=wish,
        admitted_at_s=NOW_S - 3600,
        problem="" if state else problem,
        remedy=remedy,
        replicas=(replica(state, problem=problem, **changes),) if state else (),
    )


def event(seq: int, **changes: Any) -> contract.EventView:
    fields: dict[str, Any] = {
        "at_s": NOW_S, "writer": "node.a", "type": "ReplicaParked", "model": "chat",
        "text": "parked in 0.64 s", "cause_seq": seq - 1,
    }  # fmt: skip
    return contract.EventView(seq=seq, **(fields | changes))


class FakeControlPlane:
    """A `Transport` that answers from its attributes."""

    def __init__(self) -> None:
        self.sent: list[Outgoing] = []
        self.asked: list[tuple[str, bytes]] = []
        self.verdicts: dict[str, tuple[str, str]] = {}
        """{model: (verdict, code)}; others are admitted."""
        self.is_silent = False
        self.error: SubletError | None = None
        self.steps: list[tuple[contract.DeploymentView, ...]] = [()]
        """What deployments look like at each question; the last one stays."""
        self.nodes: tuple[contract.NodeView, ...] = ()
        self.explanation = contract.Explanation(is_known=False, model="")
        self.events: list[contract.EventView] = []
        self.keys: tuple[contract.KeyView, ...] = ()
        self.plan = contract.Plan(deployments=(), has_room_for_all=True)
        self.quotas: tuple[contract.QuotaView, ...] = ()
        self.repack_plan = contract.RepackPlan()
        self.log: dict[str, list[str]] = {}
        self.refusal = ""
        self.clock_s = 0.0

    async def command(self, outgoing: Outgoing, *, timeout_s: float) -> bytes | None:
        if self.error is not None:
            raise self.error
        self.sent.append(outgoing)
        if self.is_silent:
            return None
        body = msgspec.json.decode(outgoing.body)
        model = body.get("model") or body.get("key_id") or body.get("deployment", {}).get("name", "the command")
        verdict, code = self.verdicts.get(model, ("admitted", ""))
        answer = contract.CommandAnswered(
            command_id=outgoing.id,
            verdict=verdict,
            message=f"{model} is {verdict}",
            code=code,
            inbox_seq=len(self.sent),
        )
        return contract.encode(answer)

    async def request(self, subject: str, body: bytes, *, timeout_s: float, traceparent: str) -> bytes:
        if self.error is not None:
            raise self.error
        self.asked.append((subject, body))
        if self.refusal:
            return contract.encode(contract.QueryRefused(error=self.refusal))
        return contract.encode(self._answer(subject.rpartition(".")[2], msgspec.json.decode(body)))

    def _answer(self, token: str, query: dict[str, Any]) -> msgspec.Struct:
        match token:
            case "queries_list_deployments_v1":
                views = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
                return contract.DeploymentList(deployments=views, labels=("software GPU",), as_of_seq=7)
            case "queries_list_nodes_v1":
                return contract.NodeList(nodes=self.nodes)
            case "queries_explain_v1":
                return self.explanation
            case "queries_plan_deployments_v1":
                return self.plan
            case "queries_plan_repack_v1":
                return self.repack_plan
            case "queries_list_quotas_v1":
                return contract.QuotaList(quotas=self.quotas)
            case "queries_list_keys_v1":
                return contract.KeyList(keys=self.keys)
            case "queries_list_events_v1":
                later = [one for one in self.events if one.seq > query["after_seq"]]
                last_seq = max((one.seq for one in self.events), default=0)
                return contract.EventList(events=tuple(later[: query["limit_count"]]), last_seq=last_seq)
            case "queries_read_logs_v1":
                lines = self.log.get(query["replica_id"], [])
                return contract.LogChunk(lines=tuple(lines[query["after_bytes"] :]), next_bytes=len(lines))
        raise AssertionError(token)

    @asynccontextmanager
    async def open_client(self, context: Context) -> AsyncIterator[Client]:
        if isinstance(self.error, Unreachable):
            raise self.error
        yield Client(self, tenant=context.tenant)

    async def sleep(self, duration_s: float) -> None:
        self.clock_s += duration_s
        if self.clock_s > 600:
            raise AssertionError("waits for ever")

    def bodies(self) -> list[dict[str, Any]]:
        return [msgspec.json.decode(one.body) for one in self.sent]


def run(
    plane: FakeControlPlane, *words: str, environ: dict[str, str] | None = None, folder: Path | None = None
) -> Result:
    """The command line against this control plane."""
    session = Session(
        open_client=plane.open_client,
        environ={"SUBLET_NATS_URL": "nats://fake", "HOME": "/nonexistent", **(environ or {})},
        folder=folder or Path("/nonexistent"),
        now_s=lambda: NOW_S,
        monotonic_s=lambda: plane.clock_s,
        sleep=plane.sleep,
    )
    return CliRunner().invoke(cli, list(words), obj=session, prog_name="sublet")

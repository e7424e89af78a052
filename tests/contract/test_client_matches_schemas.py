"""The client restates the public messages; here the two statements are compared, so that neither drifts."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec
import pytest

import sublet
from schemas import catalogue, deployments, inbox, messages, placement, queries
from schemas.generators.asyncapi import STREAMS
from schemas.generators.message_schema import ANSWER_OF, STAND_INS
from schemas.messages import answer_subject, command_subject, query_subject, tag_of
from sublet import _contract as contract
from sublet.client import Client
from sublet.errors import InvalidInput
from tests.unit.sublet.fakes import FakeControlPlane

# What the client leaves out on purpose: bounds and enumerations (an older client reads newer answers), and words.
LOOSE = frozenset(
    {
        "description", "title", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "pattern", "minLength",
        "maxLength",
    }
)  # fmt: skip
SENT: dict[str, Callable[[Client], Awaitable[Any]]] = {
    "inbox.deploy_requested.v1": lambda client: client.deploy(
        sublet.deployment(
            "chat", weights="14.5GB", share={"request": 0.3, "limit": 0.4}, priority="high", kind="inference",
            engine="simulated", warm="5m", cold_after="1h", parkable=True, cold_start="10s", minimum_grade="driver",
            preemptible=False, model="mistral", arguments={"max-model-len": 8192}, return_deadline="10s",
            minimum_residency="1s",
        )
    ),
    "inbox.retire_requested.v1": lambda client: client.retire("chat"),
    "inbox.park_requested.v1": lambda client: client.park("chat"),
    "inbox.wake_requested.v1": lambda client: client.wake("chat"),
    "inbox.repack_requested.v1": lambda client: client.repack(move_count_max=3),
    "inbox.quota_requested.v1": lambda client: client.set_quota("acme", gpu_quota=2.5, over_quota_weight=2.0),
    "inbox.gpu_reinstate_requested.v1": lambda client: client.reinstate_gpu("host-1", "GPU-4"),
    "inbox.gpu_close_requested.v1": lambda client: client.close_gpu("host-1", "GPU-4", is_draining=True, reason="fan"),
    "inbox.key_create_requested.v1": lambda client: client.create_key("laptop"),
    "inbox.key_revoke_requested.v1": lambda client: client.revoke_key("key-1"),
}  # fmt: skip
ASKED: dict[str, Callable[[Client], Awaitable[Any]]] = {
    "queries.list_deployments.v1": lambda client: client.deployments(),
    "queries.list_nodes.v1": lambda client: client.nodes(),
    "queries.explain.v1": lambda client: client.explain("chat"),
    "queries.plan_deployments.v1": lambda client: client.plan([sublet.deployment("chat", weights="1GB", share=0.5)]),
    "queries.plan_repack.v1": lambda client: client.plan_repack(move_count_max=3),
    "queries.list_quotas.v1": lambda client: client.quotas(),
    "queries.list_events.v1": lambda client: client.events(after_seq=3, model="chat", wait_s=5.0),
    "queries.list_keys.v1": lambda client: client.keys(),
    "queries.read_logs.v1": lambda client: client.logs(node="a", replica_id="r1", after_bytes=7),
}


def comparable(kind: type[Any]) -> Any:
    """The JSON Schema of a type and of all below it, without what is loose."""
    return loosened(msgspec.json.schema(STAND_INS.get(kind, kind)))


def loosened(schema: Any) -> Any:
    """Enumerations become strings; bounds and words go."""
    if isinstance(schema, list):
        return [loosened(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("$ref") in ENUMERATIONS:
        rest = {key: value for key, value in schema.items() if key != "$ref"}
        return {"type": "string", **loosened(rest)}
    kept = {key: value for key, value in schema.items() if key not in LOOSE or isinstance(value, dict)}
    return {key: loosened(value) for key, value in kept.items() if f"#/$defs/{key}" not in ENUMERATIONS}


ENUMERATIONS = {
    f"#/$defs/{kind.__name__}"
    for kind in (
        deployments.EngineKind, deployments.WorkloadKind, deployments.IsolationGrade, deployments.Strategy,
        deployments.AntiAffinity, deployments.Runtime, deployments.SwapDriver, deployments.ComputeSharing,
        inbox.Verdict, placement.ReasonCode, queries.PlanVerdict,
    )
}  # fmt: skip


def mirrored() -> list[tuple[type[Any], type[Any]]]:
    """Pairs (ours, the vocabulary's) of every message and view that the client uses."""
    ours: list[type[contract.Message]] = [*contract.COMMANDS, contract.CommandAnswered, *contract.ANSWER_OF]
    pairs: list[tuple[type[Any], type[Any]]] = [
        (kind, catalogue.MESSAGES[str(kind.__struct_config__.tag)]) for kind in ours
    ]
    views: dict[str, type[Any]] = {view.__name__: view for view in ANSWER_OF.values()}
    pairs += [(view, views[view.__name__]) for view in contract.ANSWER_OF.values()]
    return [*pairs, (contract.QueryRefused, queries.QueryRefused)]


@pytest.mark.parametrize(("ours", "theirs"), mirrored(), ids=lambda kind: kind.__name__)
def test_both_sides_have_the_same_schema(ours: type[Any], theirs: type[Any]) -> None:
    assert comparable(ours) == comparable(theirs)


def test_the_client_knows_every_command_and_query() -> None:
    assert {kind.__struct_config__.tag for kind in contract.COMMANDS} == set(catalogue.COMMANDS)
    assert {kind.__struct_config__.tag for kind in contract.ANSWER_OF} == set(catalogue.QUERIES)
    assert set(SENT) == set(catalogue.COMMANDS)
    assert set(ASKED) == set(catalogue.QUERIES)


def test_the_clients_words_are_the_vocabularys() -> None:
    assert contract.ENGINES == tuple(deployments.EngineKind)
    assert contract.KINDS == tuple(deployments.WorkloadKind)
    assert contract.RUNTIMES == tuple(deployments.Runtime)
    assert contract.SWAP_DRIVERS == tuple(deployments.SwapDriver)
    assert contract.STRATEGIES == tuple(deployments.Strategy)
    assert contract.ANTI_AFFINITIES == tuple(deployments.AntiAffinity)
    assert contract.GRADES == deployments.GRADE_ORDER
    assert contract.PRIORITIES == tuple(deployments.PRIORITIES)
    assert contract.DEFAULT_PRIORITIES == deployments.DEFAULT_PRIORITY
    assert contract.VERDICTS == tuple(inbox.Verdict)


def client_of(plane: FakeControlPlane) -> Client:
    return Client(plane, tenant="acme")


@pytest.mark.parametrize("tag", SENT)
def test_a_commands_bytes_decode_with_the_vocabulary(tag: str) -> None:
    plane = FakeControlPlane()

    asyncio.run(_await(SENT[tag](client_of(plane))))

    (sent,) = plane.sent
    command = catalogue.decode(sent.body)
    assert isinstance(command, messages.Command)
    assert tag_of(command) == tag
    assert (sent.id, sent.subject) == (command.command_id, command_subject("acme", command))
    assert sent.answer_subject == answer_subject("acme", command.command_id)
    if isinstance(command, inbox.DeployRequested):
        assert deployments.problems_of(command.deployment) == []


@pytest.mark.parametrize("tag", ASKED)
def test_a_querys_bytes_decode_with_the_vocabulary(tag: str) -> None:
    plane = FakeControlPlane()

    asyncio.run(_await(ASKED[tag](client_of(plane))))

    subject, body = plane.asked[0]
    query = catalogue.decode(body)
    assert isinstance(query, messages.Query)
    assert tag_of(query) == tag
    assert subject == query_subject("acme", query, "a")


@pytest.mark.parametrize(
    "words",
    [
        {"share": 0.3},
        {"share": "20GiB", "limit": "30GiB"},
        {"share": 1.0, "kind": "training", "priority": "very-low"},
        {"share": 0.4, "limit": "20GiB"},
    ],
)
def test_what_the_models_file_accepts_is_admitted(words: dict[str, Any]) -> None:
    body = contract.encode(sublet.deployment("chat", weights="1GB", **words))

    spec = msgspec.json.decode(body, type=deployments.DeploymentSpec)

    assert deployments.problems_of(spec) == []


ENGINE_WORDS: list[dict[str, Any]] = [
    *(
        {name: value for name, value in zip(("engine", "image", "command", "runtime"), values, strict=True) if value}
        for values in itertools.product(
            deployments.EngineKind, (None, "an/image:1"), (None, ["serve", "{port}"]), (None, *deployments.Runtime)
        )
    ),
    *(
        {"engine": kind, "swap": swap, "image": "an/image:1"}
        for kind, swap in itertools.product(deployments.EngineKind, deployments.SwapDriver)
    ),
    *(
        {"engine": kind, "image": "an/image:1", where: {name: "x"}}
        for kind, where, name in itertools.product(
            deployments.EngineKind,
            ("environment", "arguments"),
            ("HF_TOKEN", "PASSWORD", "MAX_TOKENS", "SUBLET_X", "port", "a-key", "monkey"),
        )
    ),
]


@pytest.mark.parametrize("words", ENGINE_WORDS, ids=str)
def test_the_client_and_the_admission_agree_on_what_can_be_started(words: dict[str, Any]) -> None:
    """What is refused there must be told here first, with its place in the file; what is told here, refused there."""
    words = {name: str(value) if isinstance(value, StrEnum) else value for name, value in words.items()}
    words |= {"kind": "training"} if words["engine"] == "training" else {}
    plain = deployments.DeploymentSpec(
        name="chat",
        kind=deployments.WorkloadKind(words.get("kind", "inference")),
        engine=deployments.EngineSpec(
            kind=deployments.EngineKind(words["engine"]),
            weights_bytes=1,
            image=words.get("image", ""),
            command=tuple(words.get("command", ())),
            runtime=deployments.Runtime(words["runtime"]) if "runtime" in words else None,
            swap_driver=deployments.SwapDriver(words["swap"]) if "swap" in words else None,
            environment=words.get("environment", {}),
            arguments=words.get("arguments", {}),
        ),
        share=deployments.ShareSpec(request_portion=0.3),
    )
    is_told = False
    try:
        sublet.deployment("chat", weights="1GB", share=0.3, **words)
    except InvalidInput:
        is_told = True

    assert bool(deployments.problems_of(plain)) == is_told


def test_a_refusal_is_told_from_every_view() -> None:
    """The client takes an object with `error` for a refusal; so no view may have such a field."""
    assert [view.__name__ for view in ANSWER_OF.values() if "error" in view.__struct_fields__] == []


def test_a_query_that_waited_in_vain_is_recognised() -> None:
    pending = pytest.importorskip("kit.queries")

    assert f'error="{contract.NOTHING_TO_TELL}"' in Path(pending.__file__).read_text()


def test_a_tenants_permissions_are_what_the_client_needs() -> None:
    """`tests/unit/sublet/test_client.py` runs the client with exactly these."""
    access = pytest.importorskip("kit.nats_access")

    permissions = access.permissions_of(access.tenant_access("acme"))

    assert permissions.publish == ("sublet.in.acme.>", "sublet.query.acme.>")
    assert permissions.subscribe == ("_INBOX_acme.>", "sublet.out.acme.>")


def test_the_documented_streams_are_the_buss() -> None:
    bus = pytest.importorskip("kit.bus")

    assert {name: tuple(stream["subjects"]) for name, stream in STREAMS.items()} == {
        name: subjects for name, subjects in bus.STREAM_SUBJECTS.items() if name in STREAMS
    }


async def _await(work: Awaitable[Any]) -> None:
    await work

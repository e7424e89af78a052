"""How one knows that the weights that came back are those that went."""

from dataclasses import dataclass
from typing import Final

import msgspec

from schemas.deployments import EngineKind
from schemas.placement import ReplicaProposal
from services.nodeagent.engine_client import EngineClient, EngineProblem

QUICK_S: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """Two of the same weights are equal."""

    token: str
    """The likeliest one after a prompt whose answer is beyond doubt; empty where the engine gives no text."""
    digest: str = ""
    """Of the bytes at some places of the weights, from an engine that tells; empty: not told, or not moved for real."""


class _Weights(msgspec.Struct, kw_only=True):
    digest: str


async def shown_by(engines: EngineClient, replica: ReplicaProposal, endpoint: str, *, timeout_s: float) -> Proof:
    """Raises `EngineProblem` when it gives no token."""
    deployment = replica.deployment
    token = await engines.verify(endpoint, deployment.name, deployment.kind, timeout_s=timeout_s)
    if deployment.engine.kind is not EngineKind.SIMULATED or not (await engines.state(endpoint)).is_bulk_checked:
        return Proof(token=token)
    content = await engines.get(f"{endpoint}/sublet/weights", timeout_s=QUICK_S)
    try:
        told = msgspec.json.decode(content, type=_Weights)
    except msgspec.MsgspecError as error:
        raise EngineProblem("the engine does not tell its weights") from error
    return Proof(token=token, digest=told.digest)

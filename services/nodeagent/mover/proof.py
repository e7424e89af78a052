"""How one knows that the weights that came back are those that went."""

from dataclasses import dataclass, field
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
    weights_generation: int = field(default=0, compare=False)
    """Which weights these are, from an engine that counts their changes; 0: not told."""


class _Weights(msgspec.Struct, kw_only=True):
    digest: str


async def shown_by(engines: EngineClient, replica: ReplicaProposal, endpoint: str, *, timeout_s: float) -> Proof:
    """Raises `EngineProblem` when it gives no token."""
    deployment = replica.deployment
    # Before the token: of weights that change meanwhile the older number is taken, and they are asked again.
    kind = deployment.engine.kind
    state = await engines.state(endpoint, kind) if kind is EngineKind.SIMULATED else None
    token = await engines.verify(endpoint, deployment.name, deployment.kind, timeout_s=timeout_s)
    if state is None or not state.is_bulk_checked:
        return Proof(token=token, weights_generation=state.weights_generation if state is not None else 0)
    content = await engines.get(f"{endpoint}/sublet/weights", timeout_s=QUICK_S)
    try:
        told = msgspec.json.decode(content, type=_Weights)
    except msgspec.MsgspecError as error:
        raise EngineProblem("the engine does not tell its weights") from error
    return Proof(token=token, digest=told.digest, weights_generation=state.weights_generation)


async def shown_again(
    engines: EngineClient, replica: ReplicaProposal, endpoint: str, *, known: Proof | None, timeout_s: float
) -> Proof:
    """What `known` says, as long as the engine tells that its weights have not changed since; else asked anew.

    So a park costs no token, and bytes that were damaged while the engine served are noticed too. Raises
    `EngineProblem`.
    """
    if known is not None and known.weights_generation:
        state = await engines.state(endpoint, replica.deployment.engine.kind)
        if state.weights_generation == known.weights_generation:
            return known
    return await shown_by(engines, replica, endpoint, timeout_s=timeout_s)

"""The list of models as clients see it: OpenAI's form, llama.cpp's status words, and our state beside them. Pure."""

from typing import Any, Final

from schemas.deployments import ShareSpec
from services.gateway.routes import COLD, Deployment, ReplicaState, RouteTable

STATUS_WORDS: Final = {
    ReplicaState.RESIDENT.value: "loaded",
    ReplicaState.DRAINING.value: "loaded",
    ReplicaState.WAKING.value: "loading",
    ReplicaState.STARTING.value: "loading",
    ReplicaState.SUSPECT.value: "loading",
    ReplicaState.PARKED.value: "sleeping",
    ReplicaState.FAILED.value: "unloaded",
    COLD: "unloaded",
}
"""llama.cpp's router has four words since March 2026; programs that know them show the right dot."""


def model_list(routes: RouteTable, tenant: str, *, now_s: float) -> dict[str, Any]:
    """All models of the tenant by name, parked and cold ones too."""
    return {"object": "list", "data": [model_body(routes, d, now_s=now_s) for d in routes.of_tenant(tenant)]}


def model_body(routes: RouteTable, deployment: Deployment, *, now_s: float) -> dict[str, Any]:
    state = routes.state_of(deployment)
    eta_s = routes.eta_s(deployment, now_s)
    more: dict[str, Any] = {
        "state": state,
        "eta_s": None if eta_s is None else round(eta_s, 3),
        "share": share_body(deployment.spec.share),
        "replicas": len(deployment.replicas),
    }
    problem = routes.failure_of(deployment) or deployment.problem
    if problem:
        more["problem"] = problem
    return {
        "id": deployment.spec.name,
        "object": "model",
        "created": int(deployment.admitted_s),
        "owned_by": deployment.tenant,
        "status": {"value": STATUS_WORDS[state]},
        "sublet": more,
    }


def share_body(share: ShareSpec) -> dict[str, Any]:
    """Only what was wished for: portions or bytes."""
    fields = {
        "request_portion": share.request_portion,
        "request_bytes": share.request_bytes,
        "limit_portion": share.limit_portion,
        "limit_bytes": share.limit_bytes,
    }
    return {name: value for name, value in fields.items() if value is not None}

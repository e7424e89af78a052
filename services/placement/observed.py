"""What placement hears and does not keep: which nodes are there, and how busy gateways say that models are.

No part of history: lost at a restart, and then unknown, never zero.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from schemas.gateways import LoadSampled, ModelLoad
from schemas.nodes import NodeAlive
from services.placement.overcommit import Uses
from services.placement.settings import PlacementSettings

if TYPE_CHECKING:
    from services.placement.state import Node


@dataclass(slots=True)
class GatewayLoad:
    """One gateway's newest sample."""

    heard_at_s: float
    models: dict[str, ModelLoad]
    """{deployment_id: its load}"""


@dataclass(slots=True)
class Observed:
    """All that is heard. A restart begins it anew."""

    alive_at_s: dict[str, float] = field(default_factory=dict)
    """{node: when it was last heard}"""
    heard_at_s: float | None = None
    """When any node was last heard."""
    listening_since_s: float | None = None
    """Since then nodes are heard without a pause: a node's silence counts from here at the earliest."""
    gateways: dict[str, GatewayLoad] = field(default_factory=dict)
    uses: Uses = field(default_factory=Uses)
    """How much of the time deployments are in use."""


def observe_alive(observed: Observed, alive: NodeAlive, now_s: float, *, settings: PlacementSettings) -> None:
    """A node is there. The first one after a time in which nobody was heard begins a new time of listening."""
    last_s = observed.heard_at_s
    if last_s is None or now_s - last_s > settings.nobody_heard_s:
        observed.listening_since_s = now_s
    observed.heard_at_s = now_s
    observed.alive_at_s[alive.node] = now_s


def observe_load(observed: Observed, sample: LoadSampled, now_s: float) -> None:
    models = {model.deployment_id: model for model in sample.models}
    observed.gateways[sample.gateway] = GatewayLoad(heard_at_s=now_s, models=models)


def is_idle(observed: Observed, deployment_id: str, *, now_s: float, settings: PlacementSettings) -> bool:
    """True only when every gateway that may route to it says so, freshly. Not knowing is not idle."""
    is_known = False
    for load in observed.gateways.values():
        age_s = now_s - load.heard_at_s
        if age_s > settings.gateway_gone_s:
            continue
        if age_s > settings.load_fresh_s:
            return False
        is_known = True
        model = load.models.get(deployment_id)
        if model is not None and model.in_flight_count + model.waiting_count > 0:
            return False
    return is_known


def latest_s(observed: Observed, nodes: "Iterable[Node]") -> float:
    """The newest time that anybody told placement: questions come without one."""
    heard = [observed.heard_at_s or 0.0, *(load.heard_at_s for load in observed.gateways.values())]
    return max([*heard, *(node.joined_at_s for node in nodes)])

"""Whether this gateway could serve a request to a parked model now, and what is wrong when it could not. Pure."""

from dataclasses import dataclass
from typing import Any

from services.gateway.routes import ReplicaState, RouteTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What readiness is judged by; each is a step on the way of a wake."""

    view_problem: str
    is_connected: bool
    signal_age_s: float | None
    """Since the bus last took a signal; None when it never did."""
    signal_age_s_max: float
    lease_problems: dict[str, str]
    is_stopping: bool


def report(routes: RouteTable, facts: Facts, *, now_s: float) -> dict[str, Any]:
    """The body of /readyz: `ready`, and every problem with its cause and what to do."""
    problems = []
    if facts.is_stopping:
        problems.append(_problem("stopping", "this gateway is shutting down", "use another one"))
    if facts.view_problem:
        problems.append(_problem("history", facts.view_problem, "look at NATS and at this gateway's permissions"))
    if not facts.is_connected:
        problems.append(
            _problem("bus", "no connection to NATS: models that are resident go on, parked ones cannot be woken",
                     "start NATS, or check SUBLET_NATS_URL")
        )  # fmt: skip
    elif facts.signal_age_s is None or facts.signal_age_s > facts.signal_age_s_max:
        age = "never" if facts.signal_age_s is None else f"{facts.signal_age_s:.1f} s ago"
        problems.append(
            _problem("signals", f"the bus last took a signal {age}", "look at NATS; it may be slow or full")
        )
    for node in _unleased(routes, now_s):
        why = facts.lease_problems.get(node, "its holder has not answered yet")
        problems.append(_problem(f"route lease of {node}", why, f"look at the holder of {node}"))
    return {"ready": not problems, "problems": problems}


def _unleased(routes: RouteTable, now_s: float) -> list[str]:
    """Nodes with resident replicas to which nothing may be sent, because there is no lease."""
    nodes = {replica.node for replica in routes.replicas.values() if replica.state is ReplicaState.RESIDENT}
    leases = routes.leases
    return sorted(node for node in nodes if node not in leases or leases[node].ends_s <= now_s)


def _problem(what: str, why: str, remedy: str) -> dict[str, str]:
    return {"what": what, "why": why, "remedy": remedy}

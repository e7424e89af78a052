"""Which nodes are there: lost when silent for long, back when heard again, held off when they come and go.

Pure. Silence counts only while placement can hear at all: after a restart of its own, or when nobody was heard for a
while (the bus was away, or placement stood still), every node gets its whole time anew.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kit.outcomes import Context, Input, Outcome, Timer
from schemas.placement import NodeLost, NodeReturned, ReleaseProposed
from services.placement.folds import losses
from services.placement.state import ClusterState, Node, Replica


@dataclass(frozen=True, slots=True, kw_only=True)
class LookAround(Input):
    """Look whether a node has fallen silent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SettleReturned(Input):
    """The node has been back for a moment: what it brought, and what replaced it meanwhile, can be weighed."""

    node: str


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantineOver(Input):
    """A node may be given something new again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trim(Input):
    """Release what is one too many, of whichever deployment."""


def begin(state: ClusterState, ctx: Context) -> Iterator[Outcome]:
    """What has to be looked at after a start: the tick, what is too many, nodes that came back, ends of quarantines."""
    yield look_later(state, ctx)
    yield Timer(due_s=ctx.now_s + state.settings.return_settle_s, input=Trim())
    for name in sorted(state.nodes):
        node = state.nodes[name]
        if node.lost_at_s is None and node.returned_at_s:
            yield settle_later(state, node.name, returned_at_s=node.returned_at_s, ctx=ctx)
        if node.quarantine_until_s > ctx.now_s:
            yield Timer(due_s=node.quarantine_until_s, input=QuarantineOver())


def look_later(state: ClusterState, ctx: Context) -> Timer:
    return Timer(due_s=ctx.now_s + state.settings.presence_tick_s, input=LookAround())


def settle_later(state: ClusterState, node: str, *, returned_at_s: float, ctx: Context) -> Timer:
    due_s = max(ctx.now_s, returned_at_s + state.settings.return_settle_s)
    return Timer(due_s=due_s, input=SettleReturned(node=node))


def closed(state: ClusterState, now_s: float) -> dict[str, str]:
    """Why nothing new may go to these nodes: {node: reason}."""
    return {
        node.name: "the node is lost" if node.lost_at_s is not None else "the node is quarantined: it came and went"
        for node in state.nodes.values()
        if not node.is_open(now_s)
    }


def silent_s(state: ClusterState, node: Node, now_s: float) -> float | None:
    """How long the node has been silent, as far as placement can tell; None when it cannot, for nobody is heard."""
    observed = state.observed
    if observed.heard_at_s is None or observed.listening_since_s is None:
        return None
    if now_s - observed.heard_at_s > state.settings.nobody_heard_s:
        return None
    heard_s = observed.alive_at_s.get(node.name, 0.0)
    return now_s - max(heard_s, observed.listening_since_s, node.joined_at_s, node.returned_at_s)


def lost(state: ClusterState, ctx: Context) -> list[NodeLost]:
    """Nodes that have been silent for too long, by name, each with the replicas that need another place."""
    found = []
    for name in sorted(state.nodes):
        node = state.nodes[name]
        silence_s = silent_s(state, node, ctx.now_s) if node.lost_at_s is None else None
        if silence_s is not None and silence_s >= state.settings.node_lost_s:
            ids = tuple(sorted(replica.replica_id for replica in state.on_node(name)))
            found.append(NodeLost(at_s=ctx.now_s, node=name, silent_s=silence_s, replica_ids=ids))
    return found


def returned(state: ClusterState, name: str, ctx: Context) -> NodeReturned | None:
    """The fact that a lost node is there again; None for one that was not lost."""
    node = state.nodes.get(name)
    if node is None or node.lost_at_s is None:
        return None
    count = len(losses(node.loss_times_s, ctx.now_s, window_s=state.settings.flap_window_s))
    return NodeReturned(
        at_s=ctx.now_s,
        node=name,
        away_s=max(0.0, ctx.now_s - node.silent_since_s),
        quarantine_s=quarantine_s(state, count),
        loss_count=count,
    )


def quarantine_s(state: ClusterState, loss_count: int) -> float:
    """Nothing for a first loss; twice as long with each further one, up to a cap."""
    settings = state.settings
    if loss_count < 2:
        return 0.0
    doublings = min(loss_count - 2, 32)  # Beyond, any cap is reached.
    return min(settings.quarantine_max_s, settings.quarantine_s * 2.0**doublings)


# --- One too many -----------------------------------------------------------------------------------------------------

_STANDING = ("resident", "waking", "draining", "parked", "suspect", "starting", "granted", "proposed")
"""States of a replica, nearest to serving first; one that is not named here comes last."""


def surplus(state: ClusterState, deployment_id: str) -> list[Replica]:
    """The replicas of a deployment that are too many, as long as it is wished for at all; the best ones are kept.

    Kept are: those nearest to serving; among equals those on nodes that were not lost lately; then the oldest. What is
    being released, or is on a lost node, is no longer counted. While a replica is being moved its replacement goes with
    it: it counts from the end of the move on, when this is asked again.
    """
    deployment = state.deployments.get(deployment_id)
    if deployment is None:
        return []
    coming = {move.replacement_id for move in state.moves.values()}
    here = [
        replica
        for replica in state.replicas_of(deployment_id)
        if not replica.is_releasing and not state.is_lost(replica) and replica.replica_id not in coming
    ]
    here.sort(key=lambda replica: _keeping_order(state, replica))
    return here[deployment.replica_count :]


def trimmed(state: ClusterState, deployment_ids: Iterable[str], reason: str, ctx: Context) -> list[ReleaseProposed]:
    """Releases of what is one too many of these."""
    return [
        ReleaseProposed(at_s=ctx.now_s, node=replica.node, replica_id=replica.replica_id, reason=reason)
        for deployment_id in sorted(set(deployment_ids))
        for replica in surplus(state, deployment_id)
    ]


def _keeping_order(state: ClusterState, replica: Replica) -> tuple[int, bool]:
    """For a stable sort of replicas that are in the order of their proposals."""
    standing = _STANDING.index(replica.state) if replica.state in _STANDING else len(_STANDING)
    node = state.nodes.get(replica.node)
    return standing, node is None or bool(node.loss_times_s)


def settled(state: ClusterState, name: str, ctx: Context) -> list[ReleaseProposed]:
    """Releases of what a node's return made surplus, on whichever node that is."""
    node = state.nodes.get(name)
    if node is None or node.lost_at_s is not None or ctx.now_s < node.returned_at_s + state.settings.return_settle_s:
        return []
    deployment_ids = [replica.deployment_id for replica in state.on_node(name)]
    return trimmed(state, deployment_ids, f"one too many since {name} is back", ctx)

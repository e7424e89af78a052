"""Views in words: state with its sign, share, place, what is next. Pure functions of what placement answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from sublet import _contract as contract
from sublet import quantities


class State(NamedTuple):
    sign: str
    word: str
    tone: str

    def __str__(self) -> str:
        return f"{self.sign} {self.word}"


READY: Final = State("●", "ready", "good")
COLD: Final = State("·", "cold", "")
NOT_PLACED: Final = State("✗", "not placed", "bad")
STATES: Final = {
    "proposed": State("◐", "placing", "busy"),
    "granted": COLD,
    "starting": State("◐", "starting", "busy"),
    "resident": READY,
    "draining": State("◐", "parking", "busy"),
    "waking": State("◐", "waking", "busy"),
    "parked": State("○", "parked", ""),
    "failed": State("✗", "failed", "bad"),
}
TONES: Final = {"●": "good", "◐": "busy", "✗": "bad"}
PHASES: Final = {
    "proposed": "place proposed on {where}",
    "granted": "share granted on {where}",
    "starting": "engine starting on {where}",
    "resident": "ready on {where}",
    "draining": "draining",
    "waking": "waking on {where}",
    "parked": "parked in host memory of {node}",
    "failed": "failed: {problem}",
}


CODES: Final = {
    "room_beside_all": "room beside all others",
    "takes_turns": "shares by taking turns",
    "room_by_preemption": "others give way",
    "room_by_moving": "others were moved",
    "gang": "with its gang",
    "no_node": "no node has joined",
    "node_lost": "node is lost",
    "node_quarantined": "node is quarantined",
    "gpu_quarantined": "GPU is quarantined",
    "mig_taken": "MIG instance is taken",
    "node_refused": "node refused it",
    "gpu_model": "another GPU model",
    "node_labels": "labels are missing",
    "anti_affinity": "too near to another replica",
    "grade_not_available": "isolation too weak",
    "too_few_gpus": "too few GPUs",
    "larger_than_gpu": "larger than the GPU",
    "no_gpu_room": "no room",
    "turns_taken": "those that share are in use at once",
    "no_host_cpu": "no CPU left on the host",
    "no_host_memory": "no host memory left",
    "no_park_memory": "no host memory for parked weights",
    "foreign_memory": "memory used by processes of others",
    "over_quota": "over quota",
    "gang_incomplete": "not all of its gang fit",
    "waits_for_victims": "room is being made",
    "preempted": "gave its place",
}
"""Reason codes in a few words."""


def state_of(view: contract.DeploymentView) -> State:
    """The state of a deployment: that of its first replica. Words of a newer control plane are shown as they are."""
    if not view.replicas:
        return NOT_PLACED if view.problem else COLD
    state = view.replicas[0].state
    return STATES.get(state, State("◐", state, "busy"))


def state_text(view: contract.DeploymentView, *, now_s: float) -> str:
    """`○ parked 12 min`: for parked models also since when."""
    state = state_of(view)
    if len(view.replicas) > 1:
        signs = [STATES.get(replica.state, state).word for replica in view.replicas]
        ready = signs.count(READY.word)
        return f"{READY if ready else state} {ready or signs.count(state.word)} of {len(signs)}"
    if view.replicas and view.replicas[0].state == "parked":
        return f"{state} {quantities.span(max(0.0, now_s - view.replicas[0].since_s))}"
    return str(state)


def engine_text(engine: contract.EngineSpec) -> str:
    """`vllm`, or `vllm (docker)` for one whose program runs in a container."""
    is_container = engine.runtime == "docker" or (engine.runtime is None and bool(engine.image))
    return f"{engine.kind} (docker)" if is_container else engine.kind


def share_text(view: contract.DeploymentView) -> str:
    """`0.50 +0.21`: the request, and what is borrowed beyond it, in the unit that the deployment was written in."""
    share = view.deployment.share
    replica = view.replicas[0] if view.replicas else None
    is_resident = replica is not None and replica.state in ("resident", "draining")
    burst_bytes = replica.granted_bytes - replica.request_bytes if replica is not None and is_resident else 0
    if share.request_portion is not None:
        text = f"{share.request_portion:.2f}"
        if replica is not None and replica.request_bytes > 0 and burst_bytes > 0:
            text += f" +{share.request_portion * burst_bytes / replica.request_bytes:.2f}"
        return text
    text = f"{quantities.gib(share.request_bytes or 0)} GiB"
    return f"{text} +{quantities.gib(burst_bytes)}" if burst_bytes > 0 else text


def limit_text(view: contract.DeploymentView) -> str:
    share = view.deployment.share
    if share.limit_portion is not None:
        return f"{share.limit_portion:.2f}"
    return f"{quantities.gib(share.limit_bytes)} GiB" if share.limit_bytes is not None else "-"


def where_text(view: contract.DeploymentView) -> str:
    """`a/gpu0`; only the node while parked or cold."""
    if not view.replicas:
        return "-"
    places = list(dict.fromkeys(r.node if r.state == "parked" else place_of(r) for r in view.replicas))
    return " ".join(places[:2]) + (f" +{len(places) - 2}" if len(places) > 2 else "")


def gpus_text(indices: Sequence[int]) -> str:
    """`gpu0`, or `gpu0+1+2`."""
    return "gpu" + "+".join(str(index) if index >= 0 else "?" for index in indices)


def place_of(replica: contract.ReplicaView) -> str:
    if len(replica.gpu_indices) > 1:
        return f"{replica.node}/{gpus_text(replica.gpu_indices)}"
    return f"{replica.node}/gpu{replica.gpu_index}" if replica.gpu_index >= 0 else f"{replica.node}/gpu?"


def next_text(view: contract.DeploymentView) -> str:
    """What will happen to it next, and when that is known."""
    if view.problem or (view.replicas and view.replicas[0].problem):
        return "explain says why"
    if not view.replicas:
        return "-"
    replica, swap = view.replicas[0], view.deployment.swap
    match replica.state:
        case "resident":
            return f"parks when idle {quantities.span(swap.warm_window_s)}" if swap.is_parkable else "stays"
        case "parked":
            return _in_about("wakes", replica.last_wake_s)
        case "granted" if view.deployment.kind == "training":
            return "starts when there is room"
        case "granted":
            return _in_about("starts", replica.last_start_s)
        case "waking":
            return _in_about("ready", replica.last_wake_s)
        case "starting":
            return _in_about("ready", replica.last_start_s)
        case _:
            return "-"


def _in_about(verb: str, duration_s: float | None) -> str:
    if duration_s is not None:
        return f"{verb} in ~{duration_s:.1f} s"
    return "-" if verb == "ready" else f"{verb} on request"


def phase_of(view: contract.DeploymentView | None) -> str:
    """What a deployment is at, in a few words for whoever follows it."""
    if view is None:
        return "gone"
    if not view.replicas:
        return f"not placed: {view.problem}" if view.problem else "waiting for a place"
    replica = view.replicas[0]
    phase = PHASES.get(replica.state, replica.state)
    return phase.format(
        where=place_of(replica), node=replica.node, problem=replica.problem or "its engine did not start"
    )


def counted(texts: Iterable[str]) -> list[str]:
    """Equal ones once, in the order in which they came, with how many there are: `tune (lab) x2`."""
    return [text if count == 1 else f"{text} x{count}" for text, count in Counter(texts).items()]


def gpu_type(name: str) -> str:
    """The model of a GPU without its maker."""
    return name.removeprefix("NVIDIA ")


def label_of(labels: tuple[str, ...]) -> str:
    """The line that goes below every table with figures from GPUs that are not real."""
    return ", ".join(labels)

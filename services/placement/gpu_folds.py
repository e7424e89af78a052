"""What nodes tell of single GPUs while they run: strangers on them, and whether they may be given anything new."""

from msgspec.structs import replace

from schemas.nodes import GpuObserved, GpuOffer, GpuQuarantined, GpuReinstated
from schemas.placement import GpuCloseAsked
from services.placement.folds import ask_refused_again, fold_command
from services.placement.state import ClusterState


def fold_observed(state: ClusterState, fact: GpuObserved) -> None:
    """What strangers use counts as taken from now on."""
    gpu = _known(state, fact.node, fact.gpu_uuid)
    if gpu is not None:
        is_less = fact.foreign_bytes < gpu.foreign_bytes
        _set(state, fact.node, replace(gpu, foreign_bytes=fact.foreign_bytes))
        if is_less:
            ask_refused_again(state)


def fold_quarantined(state: ClusterState, fact: GpuQuarantined) -> None:
    """What is there keeps its place; nothing new comes beside it."""
    gpu = _known(state, fact.node, fact.gpu_uuid)
    if gpu is not None:
        _set(state, fact.node, replace(gpu, quarantine_reason=fact.reason))


def fold_close_asked(state: ClusterState, fact: GpuCloseAsked) -> None:
    """Its node closes it; whether it is to be emptied is placement's own."""
    fold_command(state, fact)
    if fact.is_draining:
        state.draining[fact.gpu_uuid] = fact.node


def fold_reinstated(state: ClusterState, fact: GpuReinstated) -> None:
    state.draining.pop(fact.gpu_uuid, None)
    gpu = _known(state, fact.node, fact.gpu_uuid)
    if gpu is not None:
        _set(state, fact.node, replace(gpu, quarantine_reason=""))
        ask_refused_again(state)


def _known(state: ClusterState, node: str, gpu_uuid: str) -> GpuOffer | None:
    """None for one that the node does not offer: it is away, and comes back with all that is to be known of it."""
    there = state.nodes.get(node)
    return there.gpus.get(gpu_uuid) if there is not None else None


def _set(state: ClusterState, node: str, gpu: GpuOffer) -> None:
    index = state.index
    state.nodes[node].gpus[gpu.gpu_uuid] = gpu
    index.set_gpu(state.nodes[node], gpu)

"""What would make it fit: changes of the wish, and deployments to retire. Each was tried before it is told."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Final

from msgspec.structs import replace

from schemas.deployments import AntiAffinity, DeploymentSpec, HostSpec, ShareSpec
from schemas.nodes import GpuOffer
from schemas.placement import Alternative, ReasonCode
from schemas.units import GiB
from services.placement.choosing import Choice, NoChoice, choose
from services.placement.demands import base_bytes, request_bytes_on
from services.placement.state import ClusterState
from services.placement.views import gpu_indices

WAYS_MAX: Final = 4
"""So many are told."""
_OF_BYTES: Final = frozenset(
    {ReasonCode.NO_GPU_ROOM, ReasonCode.LARGER_THAN_GPU, ReasonCode.FOREIGN_MEMORY, ReasonCode.TURNS_TAKEN}
)
_OF_COMPANY: Final = frozenset({ReasonCode.NO_GPU_ROOM, ReasonCode.TURNS_TAKEN})
"""What those on the same GPU are the reason of."""


def ways_out(
    state: ClusterState,
    tenant: str,
    spec: DeploymentSpec,
    problem: NoChoice,
    *,
    now_s: float,
    deployment_id: str = "",
    besides: Sequence[Choice] = (),
) -> tuple[str, ...]:
    """What would give one more replica a place now, the smallest change of the wish first. For questions.

    A changed wish is decided like any other; only deployments of the same tenant are named to be retired.
    """
    siblings = state.replicas_of(deployment_id)
    near = tuple(sorted({replica.node for replica in siblings}))
    apart = spec.placement.anti_affinity
    ways: list[str] = []
    smaller = list(_smaller(state, spec, problem.alternatives))
    for words, changed in [*smaller, *_changes(state, spec, problem)]:
        if ways and (words, changed) in smaller:
            continue
        is_near_a_matter = changed.placement.anti_affinity is not AntiAffinity.NONE
        if is_near_a_matter and siblings and apart is AntiAffinity.GPU:
            continue
        refused = near if is_near_a_matter else ()
        found = choose(state, changed, now_s=now_s, refused_nodes=refused, besides=besides)
        if isinstance(found, Choice):
            ways.append(f"{words} it would go to {_where(state, found.node, found.gpu_uuids)}")
    ways += _retiring(state, tenant, spec, problem, deployment_id)
    return tuple(ways[:WAYS_MAX])


def _changes(state: ClusterState, spec: DeploymentSpec, problem: NoChoice) -> Iterator[tuple[str, DeploymentSpec]]:
    """The wish with one thing less, for each thing that rules GPUs out."""
    against, wish = {constraint.code for constraint in problem.constraints}, spec.placement
    if ReasonCode.GRADE_NOT_AVAILABLE in against:
        yield "without its minimum grade", replace(spec, share=replace(spec.share, minimum_grade=None))
    if ReasonCode.NODE_LABELS in against:
        labels = ", ".join(f"{key}={value}" for key, value in sorted(wish.node_labels.items()))
        yield f"without asking for {labels}", replace(spec, placement=replace(wish, node_labels={}))
    if ReasonCode.GPU_MODEL in against:
        models = ", ".join(wish.gpu_models)
        yield f"on GPUs other than {models}", replace(spec, placement=replace(wish, gpu_models=()))
    if ReasonCode.ANTI_AFFINITY in against:
        nearer = replace(wish, anti_affinity=AntiAffinity.NONE)
        yield "if its replicas may be near each other,", replace(spec, placement=nearer)
    if against & {ReasonCode.NO_HOST_CPU, ReasonCode.NO_HOST_MEMORY}:
        yield "without asking for CPU and memory of the host", replace(spec, host=HostSpec())
    if against & _OF_COMPANY and not spec.swap.is_parkable:
        yield "if it may be parked,", replace(spec, swap=replace(spec.swap, is_parkable=True))
    if ReasonCode.NO_PARK_MEMORY in against:
        yield "if it is never parked,", replace(spec, swap=replace(spec.swap, is_parkable=False))


def _smaller(
    state: ClusterState, spec: DeploymentSpec, alternatives: Sequence[Alternative]
) -> Iterator[tuple[str, DeploymentSpec]]:
    """What the nearest GPU has room for, and what would fit beside all others somewhere; the larger one first."""
    share, offers = spec.share, []
    near = [other for other in alternatives if other.code in _OF_BYTES and other.short_by_bytes]
    if near and (offer := state.nodes[near[0].node].gpus.get(near[0].gpu_uuid)) is not None:
        offers.append((request_bytes_on(offer, share) - near[0].short_by_bytes, offer))
    if near and (emptiest := _emptiest(state, share.gpu_count)) is not None:
        offers.append(emptiest)
    told = set()
    for size_bytes, offer in sorted(offers, key=lambda each: -each[0]):
        words, smaller = _share_of(max(0, size_bytes), offer, share)
        if smaller is not None and words not in told:
            told.add(words)
            yield words, replace(spec, share=smaller)


def _share_of(size_bytes: int, offer: GpuOffer, share: ShareSpec) -> tuple[str, ShareSpec | None]:
    """In the unit that it was written in, rounded down to hundredths or to tenths of a GiB; None: nothing is left."""
    if share.request_portion is not None:
        portion = int(Fraction(100 * size_bytes, base_bytes(offer))) / 100
        words = f"with a share of {portion:.2f} instead of {share.request_portion:.2f}"
        smaller = replace(share, request_portion=portion, limit_portion=None, limit_bytes=None)
        return words, smaller if 0 < portion < share.request_portion else None
    tenths, before_bytes = size_bytes * 10 // GiB, share.request_bytes or 0
    words = f"with a share of {tenths / 10:.1f} GiB instead of {before_bytes / GiB:.1f} GiB"
    smaller = replace(share, request_bytes=tenths * GiB // 10, limit_portion=None, limit_bytes=None)
    return words, smaller if 0 < tenths * GiB // 10 < before_bytes else None


def _emptiest(state: ClusterState, gpu_count: int) -> tuple[int, GpuOffer] | None:
    """(bytes that nobody is promised, the GPU) where so many GPUs of one node have most."""
    rooms, found = state.index.rooms, []
    for room in rooms.fleet:
        if room.is_open and len(room.shape.gpus) >= gpu_count > 0:
            left = sorted((-account.left_bytes(0), gpu) for gpu, account in enumerate(rooms.accounts[room.name]))
            found.append((left[gpu_count - 1][0], room.name, left[gpu_count - 1][1]))
    if not found:
        return None
    minus_bytes, node, gpu = min(found)
    return -minus_bytes, state.nodes[node].gpus[rooms.gpu_uuids[node][gpu]]


def _retiring(
    state: ClusterState, tenant: str, spec: DeploymentSpec, problem: NoChoice, deployment_id: str
) -> Iterator[str]:
    """The smallest of the tenant's own on one of the nearest GPUs without which its request fits beside all others."""
    if spec.share.gpu_count != 1:
        return
    found = []
    for other in problem.alternatives:
        if other.code not in _OF_COMPANY:
            continue
        account = state.index.rooms.accounts[other.node][state.index.rooms.positions[other.node][other.gpu_uuid]]
        request_bytes = request_bytes_on(state.nodes[other.node].gpus[other.gpu_uuid], spec.share)
        short_bytes = -account.left_bytes(request_bytes)
        found += [
            (replica.request_on(other.gpu_uuid), state.deployments[replica.deployment_id].spec.name, other)
            for replica in state.on_gpu(other.gpu_uuid)
            if replica.tenant == tenant
            and replica.deployment_id != deployment_id
            and replica.deployment_id in state.deployments
            and replica.request_on(other.gpu_uuid) >= short_bytes
        ]
    if found:
        _, model, other = min(found, key=lambda each: (each[0], each[1], each[2].node, each[2].gpu_uuid))
        yield f"once {model} is retired it would go to {_where(state, other.node, (other.gpu_uuid,))}"


def _where(state: ClusterState, node: str, gpu_uuids: Sequence[str]) -> str:
    return f"{node}/gpu{'+'.join(str(index) for index in gpu_indices(state, node, gpu_uuids))}"

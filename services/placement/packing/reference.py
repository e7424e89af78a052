"""The choice by looking at every node: slow and plain. `Packer` must answer the same."""

from collections.abc import Collection

from services.placement.packing.fleet import Ask, Fleet, NodeRoom, Place, unsuited
from services.placement.packing.policies import Random
from services.placement.packing.rating import Fit, Policy, fits_on, linked


def choose(
    fleet: Fleet,
    policy: Policy,
    ask: Ask,
    *,
    without_nodes: Collection[str] = (),
    gpu_spread: bool = False,
    draw: int = 0,
) -> Place | None:
    """The best rated node with room beside all that is promised, ties to the smaller name. O(nodes x GPUs).

    `policy` is informed already. `draw` is for `Random` alone: the number of the decision.
    """
    roomy = _roomy(fleet, ask, without_nodes)
    if not roomy:
        return None
    if isinstance(policy, Random):
        room, fits = roomy[policy.drawn(draw, len(roomy))]
        return drawn_place(policy, room, ask, fits, draw, gpu_spread=gpu_spread)
    rated = [(policy.rate(room, ask, fits, gpu_spread=gpu_spread), room, fits) for room, fits in roomy]
    rating, room, fits = max(rated, key=lambda entry: entry[0].score)  # The first of equals.
    return place_of(room, fits, rating.gpu_indices)


def drawn_place(policy: Random, room: NodeRoom, ask: Ask, fits: list[Fit], draw: int, *, gpu_spread: bool) -> Place:
    """One GPU of this node at random; of several GPUs the tightest."""
    gpus = policy.rate(room, ask, fits, gpu_spread=gpu_spread).gpu_indices
    if ask.gpu_count == 1 and not gpu_spread:
        gpus = (fits[policy.drawn(~draw, len(fits))].gpu_index,)
    return place_of(room, fits, gpus)


def place_of(room: NodeRoom, fits: list[Fit], gpus: tuple[int, ...]) -> Place:
    """These GPUs of this node, or equally good ones with better links."""
    gpus = linked(room, fits, gpus)
    units = {fit.gpu_index: fit.units for fit in fits}
    return Place(room.name, gpus, tuple(units[gpu] for gpu in gpus))


def _roomy(fleet: Fleet, ask: Ask, without_nodes: Collection[str]) -> list[tuple[NodeRoom, list[Fit]]]:
    found = []
    for room in fleet:
        if unsuited(room, ask, without_nodes):
            continue
        fits = fits_on(room, ask)
        if len(fits) >= ask.gpu_count:
            found.append((room, fits))
    return found

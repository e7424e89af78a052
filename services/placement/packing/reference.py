"""The choice by looking at every node: slow and plain. `Packer` must answer the same."""

from collections.abc import Collection

from services.placement.packing.fleet import Ask, Fleet, Place, unsuited
from services.placement.packing.policies import Policy, Rating, fits_on


def choose(
    fleet: Fleet, policy: Policy, ask: Ask, *, without_nodes: Collection[str] = (), gpu_spread: bool = False
) -> Place | None:
    """The best rated node with room beside all that is promised, ties to the smaller name. O(nodes x GPUs)."""
    best: tuple[Rating, Place] | None = None
    for room in fleet:
        if unsuited(room, ask, without_nodes):
            continue
        fits = fits_on(room, ask)
        if len(fits) < ask.gpu_count:
            continue
        rating = policy.rate(room, ask, fits, gpu_spread=gpu_spread)
        if best is None or rating.score > best[0].score:
            units = {fit.gpu_index: fit.units for fit in fits}
            best = rating, Place(room.name, rating.gpu_indices, tuple(units[g] for g in rating.gpu_indices))
    return best[1] if best else None

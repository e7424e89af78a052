"""Our default policy: the place after which the cluster's free GPUs are worth most to what is likely to come."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Final

from services.placement.packing.fleet import PARTS, Ask, Fleet, GpuShape, NodeRoom
from services.placement.packing.hole_values import STEPS, hole_values
from services.placement.packing.potential import RATE_MAX, Potential, typical_classes
from services.placement.packing.rating import Fit, Policy, Rating

WEIGHT_SUM: Final = 10_000
"""Popularity of classes is counted in so many parts; a rarer class has no weight."""
MINOR_SHARE: Final = 20
"""FGD's fragmentation, and that an idle GPU is whole, count as one part in so many of a GPU's worth: enough to choose
among places that are equal by worth, not enough to outweigh it. From 1 in 10 to 1 in 33 there is no difference
(docs/adr/0013)."""


class LeastWaste(Policy):
    """The place where a node loses the least of its value.

    That is, in GPUs:

    - what each GPU's free part is worth to the classes that are asked for (`hole_values`), each kind of GPU with the
      classes that can use it, and in proportion to its capacity, so that large and small GPUs compare;
    - less the free GPUs that the node's free CPU cannot feed, at the cores for each GPU that the classes with GPUs ask
      for on average: a GPU without CPU is as good as taken;
    - less FGD's fragmentation (Weng et al., ATC'23) of the classes with GPUs, a twentieth of it;
    - plus a twentieth of each idle GPU: who needs a whole one may come although nobody did yet.

    Nothing in it depends on how much is still to come. All comes from the
    cluster and from how often each class was asked for. Without any such counts, an idle GPU is worth keeping and all
    other places are alike, so asks fill used GPUs first. Where nobody asks for CPU, the second term is nothing.
    """

    name = "least-waste"

    def informed(self, fleet: Fleet, classes: Mapping[Ask, int]) -> Policy:
        on_gpus = {ask: count for ask, count in classes.items() if ask.gpu_count and count > 0}
        typical = typical_classes(on_gpus)
        total = sum(count for _, count in typical)
        kinds = list(dict.fromkeys(gpu for room in fleet for gpu in room.shape.gpus))
        rate = _fed_parts(kinds, on_gpus)
        return Potential(
            name=self.name,
            typical=tuple((ask, weight) for ask, count in typical if (weight := count * WEIGHT_SUM // total)),
            shortages=((rate, WEIGHT_SUM * MINOR_SHARE),) if rate is not None else (),
            holes=_holes(kinds, on_gpus),
        )

    def rate(self, room: NodeRoom, ask: Ask, fits: Sequence[Fit], *, gpu_spread: bool = False) -> Rating:
        raise AssertionError("this policy rates once it is informed of cluster and classes")


def _holes(kinds: Sequence[GpuShape], classes: Mapping[Ask, int]) -> dict[GpuShape, tuple[int, ...]]:
    """{kind of GPU: [thousandths free] the worth of the hole}."""
    largest = max((kind.capacity_units for kind in kinds), default=1)
    holes = {}
    for kind in kinds:
        demand: dict[int, int] = {}
        for ask, count in classes.items():
            units = ask.units_on(kind)
            if units is not None and 0 < units <= kind.capacity_units:
                size = units * STEPS // kind.capacity_units
                demand[size] = demand.get(size, 0) + count * ask.gpu_count
        whole = WEIGHT_SUM * MINOR_SHARE * PARTS * kind.capacity_units // largest
        worths = [round(worth * whole) for worth in hole_values(demand)]
        worths[STEPS] += whole // MINOR_SHARE
        holes[kind] = tuple(worths)
    return holes


def _fed_parts(kinds: Sequence[GpuShape], classes: Mapping[Ask, int]) -> int | None:
    """Parts of GPUs that one core feeds, by what the classes ask for; None where they ask for no CPU, or no GPU."""
    asked_milli = sum(ask.cpu_milli * count for ask, count in classes.items())
    gpus = sum(_gpus_asked(kinds, ask) * count for ask, count in classes.items())
    return min(RATE_MAX, int(PARTS * gpus * 1000 / asked_milli)) if asked_milli and gpus else None


def _gpus_asked(kinds: Sequence[GpuShape], ask: Ask) -> Fraction:
    """In whole GPUs: a size in bytes is of the first kind that will do."""
    if ask.portion is not None:
        return ask.gpu_count * ask.portion
    capacity = next((kind.capacity_units for kind in kinds if ask.units_on(kind)), 0)
    return ask.gpu_count * min(Fraction(1), Fraction(ask.size_units or 0, capacity)) if capacity else Fraction(0)

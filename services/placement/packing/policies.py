"""The policies, by name."""

import difflib
from collections.abc import Sequence
from typing import Final

from services.placement.packing.fleet import PARTS, Ask, NodeRoom
from services.placement.packing.least_waste import LeastWaste
from services.placement.packing.potential import Fgd
from services.placement.packing.rating import CPU_MAX_MILLI, Fit, Policy, Rating, closeness, tightest


class FirstFit(Policy):
    """The first node by name."""

    name = "first-fit"

    def rate(self, room: NodeRoom, ask: Ask, fits: Sequence[Fit], *, gpu_spread: bool = False) -> Rating:
        return Rating(0, tightest(ask, fits, is_spread=gpu_spread))


class BestFit(Policy):
    """The node left with the least: half by its CPU, half by its GPUs. The formula of the FGD artefact (ATC'23)."""

    name = "best-fit"

    def rate(self, room: NodeRoom, ask: Ask, fits: Sequence[Fit], *, gpu_spread: bool = False) -> Rating:
        gpus = tightest(ask, fits, is_spread=gpu_spread)
        return Rating(closeness(room, ask, fits, gpus), gpus)


class Spread(Policy):
    """The node left with the most, the GPU with the most: the opposite of `BestFit`."""

    name = "spread"

    def rate(self, room: NodeRoom, ask: Ask, fits: Sequence[Fit], *, gpu_spread: bool = False) -> Rating:
        gpus = tightest(ask, fits, is_spread=True)
        return Rating(-closeness(room, ask, fits, gpus), gpus)


class DotProduct(Policy):
    """The node whose free CPU and GPUs point the least in the direction of the ask (Tetris, as in the FGD artefact).

    ``int(100 * (1 - (cpu_free * cpu_ask / 128k^2 + gpu_free * gpu_ask / 8000^2) / 2))``, the tightest GPU.
    """

    name = "dot-product"

    def rate(self, room: NodeRoom, ask: Ask, fits: Sequence[Fit], *, gpu_spread: bool = False) -> Rating:
        gpus = tightest(ask, fits, is_spread=gpu_spread)
        parts = {fit.gpu_index: fit.parts for fit in fits}
        gpu_milli = sum(parts[gpu] for gpu in gpus) * 1000 // PARTS
        free_milli = sum(room.free_parts(gpu) for gpu in range(len(room.free_units))) * 1000 // PARTS
        # Over the common denominator: 128,000 is sixteen times 8,000.
        product = room.cpu_milli * ask.cpu_milli + 256 * free_milli * gpu_milli
        whole = 2 * CPU_MAX_MILLI**2
        return Rating(100 * (whole - product) // whole, gpus)


class Random(Policy):
    """Any node with room and any GPU of it, each alike. For comparison: who uses it says the number of the draw."""

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def rate(self, room: NodeRoom, ask: Ask, fits: Sequence[Fit], *, gpu_spread: bool = False) -> Rating:
        return Rating(0, tightest(ask, fits, is_spread=gpu_spread))

    def drawn(self, draw: int, count: int) -> int:
        """A number below `count`, from seed and number of the draw alone (splitmix64)."""
        mixed = (self.seed * 0xD1342543DE82EF95 + (draw + 1) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        return ((mixed ^ (mixed >> 31)) * count) >> 64


DEFAULT_POLICY: Final = LeastWaste.name
POLICIES: Final[tuple[type[Policy], ...]] = (Random, DotProduct, BestFit, FirstFit, Fgd, LeastWaste, Spread)


def policy_named(name: str) -> Policy:
    """`default` is our own. Raises `ValueError` with the names that there are."""
    for policy in POLICIES:
        if policy.name == (DEFAULT_POLICY if name == "default" else name):
            return policy()
    names = [policy.name for policy in POLICIES]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"there is: default, {', '.join(names)}"
    raise ValueError(f"there is no placement policy '{name}'; {hint}")

"""Who is worth keeping on a GPU: one policy a module, all behind `port.Policy`. Pure."""

from collections.abc import Callable
from typing import Final

from services.swapper.policies.cost_rate import CostRate
from services.swapper.policies.frequency import Frequency
from services.swapper.policies.landlord import Landlord
from services.swapper.policies.likely_return import LikelyReturn
from services.swapper.policies.port import Policy
from services.swapper.policies.recency import Recency

CLASSIC: Final[dict[str, Callable[[], Policy]]] = {
    "lru": Recency,
    "lfu": Frequency,
    "landlord": Landlord,
    "cost-rate": CostRate,
}
POLICIES: Final[dict[str, Callable[[], Policy]]] = {"likely-return": LikelyReturn, **CLASSIC}
DEFAULT_POLICY: Final = "likely-return"

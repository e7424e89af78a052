"""`cost-rate`: restore seconds over bytes times the expected gap, the gap a moving mean of its own gaps.

An idle time beyond the expected gap is the expectation: a model that has stopped coming is not kept for its past.
"""

from typing import Final

from services.swapper.policies.port import Remembering, Worth

NEWEST_GAP_FRACTION: Final = 0.3
"""Of the mean: heavy enough to follow a change within a few gaps, as TCP's estimate of its round trip (1/8) is not."""
UNKNOWN_GAP_S: Final = 3600.0
"""Of a model that came once: longer than most gaps, so that those that return are kept."""


class CostRate(Remembering):
    def __init__(self) -> None:
        super().__init__()
        self._gap_s: dict[str, float] = {}

    def used(self, key: str, *, now_s: float, was_idle: bool) -> None:
        last_used_s = self.usage(key).last_used_s
        if self.usage(key).use_count:
            gap_s, known_s = max(0.0, now_s - last_used_s), self._gap_s.get(key)
            mean_s = gap_s if known_s is None else known_s + NEWEST_GAP_FRACTION * (gap_s - known_s)
            self._gap_s[key] = mean_s
        super().used(key, now_s=now_s, was_idle=was_idle)

    def rested(self, key: str, *, now_s: float) -> None:
        """Gaps are from request to request."""

    def forgotten(self, key: str) -> None:
        super().forgotten(key)
        self._gap_s.pop(key, None)

    def worth(self, key: str, *, now_s: float, since_s: float, restore_s: float, size_bytes: int) -> Worth:
        last_used_s = max(since_s, self.usage(key).last_used_s)
        gap_s = max(self._gap_s.get(key, UNKNOWN_GAP_S), now_s - last_used_s, 1e-3)
        return (restore_s / (max(1, size_bytes) * gap_s), last_used_s)

"""`likely-return`, the default: restore seconds times how likely the next request is now, the cheapest set gives way.

How likely is a rate (a hazard) that falls with the time a model has been idle and rises with how often it came. Which
of the two tells more differs: under bursty traffic it is the idle time, where models are asked for independently it is
the long-run rate. So their weights are learned as requests come, one set for all models, by Poisson regression: an
arrival that ends an idle time says "now", every second of idle time before said "not yet". The logarithm of the rate
is a weighted sum of the logarithms of

- the idle time, in seconds, plus one;
- the model's rate of returns since all began, drawn to the mean of all models while it is little known;
- its rate of late (half-lives of `HALF_LIVES_S`), relative to that, drawn to it likewise.

A return is an arrival that finds the model idle: a burst of requests that run beside one another is one return. Weights
start half-way between idle time and long-run rate, held there as `PRIOR_EVENT_COUNT` returns would; each return makes
one Newton step with all exposure so far, so that they settle. Measured effects: docs/swapper.md.
"""

import math
from dataclasses import dataclass, field
from typing import Final

from services.swapper.policies.port import Worth

HALF_LIVES_S: Final = (3600.0, 21_600.0)
"""An hour and a quarter of a day: what changes faster shows in the idle time, what changes slower in the long run."""
START_WEIGHTS: Final = (0.0, -0.5, 0.5, 0.0, 0.0)
PRIOR_EVENT_COUNT: Final = 10.0
"""Enough that the first returns do not turn the weights, few enough that an hour of traffic does."""
STEP_MAX: Final = 0.5
"""Of a weight at one return: early steps are poorly conditioned."""
START_S: Final = 60.0
"""Added to the time watched: no rate is told from the first seconds."""
LOG_RATE_MIN, LOG_RATE_MAX = -30.0, 5.0
CATCH_UP_S: Final = 60.0
"""The idle time of one that does not return is counted when it has doubled, and no sooner than after this."""
LN2: Final = math.log(2.0)
Features = tuple[float, ...]


@dataclass(slots=True)
class Known:
    """One model's past."""

    return_count: int = 0
    returned_at_s: float = 0.0
    decayed: list[float] = field(default_factory=lambda: [0.0] * len(HALF_LIVES_S))
    """Returns, each halved once in a half-life, as of `returned_at_s`"""
    rested_at_s: float = 0.0
    counted_to_s: float = 0.0
    """Until then its idle time is in the weights."""
    is_busy: bool = False


class LikelyReturn:
    adds = True

    def __init__(self) -> None:
        self._known: dict[str, Known] = {}
        self._turn: list[str] = []
        """Keys, in the order of their first use: one is caught up with at each use"""
        self._turn_index = 0
        self._began_s: float | None = None
        self._return_count = 0
        self._weights = _Weights()

    def used(self, key: str, *, now_s: float, was_idle: bool) -> None:
        if self._began_s is None:
            self._began_s = now_s
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = Known(returned_at_s=now_s)
            self._turn.append(key)
            self._return(known, now_s)
        elif was_idle:
            if not known.is_busy:
                self._expose(known, now_s)
                self._weights.learn(self._features(known, now_s, idle_s=now_s - known.rested_at_s))
            self._return(known, now_s)
        known.is_busy = True
        self._catch_up(now_s)

    def _return(self, known: Known, now_s: float) -> None:
        past_s = now_s - known.returned_at_s
        for index, half_life_s in enumerate(HALF_LIVES_S):
            known.decayed[index] = known.decayed[index] * 2.0 ** (-past_s / half_life_s) + 1.0
        known.returned_at_s = now_s
        known.return_count += 1
        self._return_count += 1

    def _catch_up(self, now_s: float) -> None:
        self._turn_index = (self._turn_index + 1) % len(self._turn)
        known = self._known[self._turn[self._turn_index]]
        idle_s = known.counted_to_s - known.rested_at_s
        if not known.is_busy and now_s - known.counted_to_s > idle_s + CATCH_UP_S:
            self._expose(known, now_s)

    def rested(self, key: str, *, now_s: float) -> None:
        known = self._known.get(key)
        if known is not None and known.is_busy:
            known.is_busy, known.rested_at_s, known.counted_to_s = False, now_s, now_s

    def restored(self, key: str, *, now_s: float, restore_s: float, size_bytes: int) -> None:
        pass

    def parked(self, key: str, *, now_s: float) -> None:
        pass

    def forgotten(self, key: str) -> None:
        if self._known.pop(key, None) is not None:
            self._turn.remove(key)
            self._turn_index = 0

    def worth(self, key: str, *, now_s: float, since_s: float, restore_s: float, size_bytes: int) -> Worth:
        known = self._known.get(key) or Known(returned_at_s=since_s, rested_at_s=since_s)
        idle_s = now_s - max(known.rested_at_s, since_s)
        return (restore_s * self._weights.rate_per_s(self._features(known, now_s, idle_s=idle_s)),)

    # --- The rate -----------------------------------------------------------------------------------------------------

    def _features(self, known: Known, now_s: float, *, idle_s: float) -> Features:
        """Rates are means of what was counted and of one more return at the rate that is known better."""
        watched_s = START_S + (now_s - self._began_s if self._began_s is not None else 0.0)
        mean_per_s = (self._return_count + 1) / (watched_s * max(1, len(self._known)))
        rate_per_s = (known.return_count + 1) / (watched_s + 1 / mean_per_s)
        features = [1.0, math.log(max(0.0, idle_s) + 1.0), math.log(rate_per_s)]
        past_s = max(0.0, now_s - known.returned_at_s)
        for half_life_s, decayed in zip(HALF_LIVES_S, known.decayed, strict=True):
            window_s = half_life_s / LN2 * (1.0 - 2.0 ** (-watched_s / half_life_s))
            lately = (decayed * 2.0 ** (-past_s / half_life_s) + 1.0) / (window_s + 1 / rate_per_s)
            features.append(math.log(lately / rate_per_s))
        return tuple(features)

    def _expose(self, known: Known, until_s: float) -> None:
        """Its idle time up to then goes into the weights, in pieces over which the idle time doubles."""
        begin_s = known.counted_to_s
        while begin_s < until_s:
            idle_s = begin_s - known.rested_at_s
            end_s = min(until_s, begin_s + idle_s + 1.0)
            middle_s = (begin_s + end_s) / 2
            features = self._features(known, middle_s, idle_s=middle_s - known.rested_at_s)
            self._weights.expose(features, length_s=end_s - begin_s)
            begin_s = end_s
        known.counted_to_s = until_s


class _Weights:
    """Online Poisson regression: exposure adds curvature and pulls down, an event pulls up and makes a Newton step."""

    def __init__(self) -> None:
        self._count = len(START_WEIGHTS)
        self._weights = list(START_WEIGHTS)
        self._curvature = [
            [PRIOR_EVENT_COUNT if row == column else 0.0 for column in range(self._count)] for row in range(self._count)
        ]
        self._slope = [0.0] * self._count

    def rate_per_s(self, features: Features) -> float:
        log_rate = sum(weight * feature for weight, feature in zip(self._weights, features, strict=True))
        return math.exp(max(LOG_RATE_MIN, min(LOG_RATE_MAX, log_rate)))

    def expose(self, features: Features, *, length_s: float) -> None:
        expected = self.rate_per_s(features) * length_s
        for row, feature in enumerate(features):
            self._slope[row] -= expected * feature
            curvature = self._curvature[row]
            for column, other in enumerate(features):
                curvature[column] += expected * feature * other

    def learn(self, features: Features) -> None:
        for row, feature in enumerate(features):
            self._slope[row] += feature
        step = _solved(self._curvature, self._slope)
        self._weights = [w + max(-STEP_MAX, min(STEP_MAX, s)) for w, s in zip(self._weights, step, strict=True)]
        self._slope = [0.0] * self._count


def _solved(matrix: list[list[float]], right: list[float]) -> list[float]:
    """`x` with `matrix x = right`; the matrix is symmetric and positive, so that no row needs to be exchanged."""
    count = len(right)
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for index in range(count):
        pivot = rows[index]
        for below in range(index + 1, count):
            factor = rows[below][index] / pivot[index]
            for column in range(index, count + 1):
                rows[below][column] -= factor * pivot[column]
    solved = [0.0] * count
    for index in reversed(range(count)):
        known = sum(rows[index][column] * solved[column] for column in range(index + 1, count))
        solved[index] = (rows[index][count] - known) / rows[index][index]
    return solved

"""What a policy is: it remembers who was used when, and says what parking one of them would cost.

Rules that hold whatever the policy are not here and not in any policy: who may give way at all is decided before a
policy is asked (`services/swapper/policy.py`), and how many give way is decided after it (`selection.py`).
"""

from dataclasses import dataclass
from typing import Final, Protocol

Worth = tuple[float, ...]
"""What it is worth to keep one resident; the smaller, the sooner it gives way.

Of a policy that `adds`: one number above 0, in seconds lost for each second of absence: a set is worth the sum."""

UNUSED_S: Final = -1e18
"""When something was last used that never was: before all that was."""


class Policy(Protocol):
    """Pure: no clock, no chance; the same calls lead to the same answers, whatever the order of any dict."""

    adds: bool
    """Its worth can be added up: the cheapest set gives way. Else: one after the other, until it is enough."""

    def used(self, key: str, *, now_s: float, was_idle: bool) -> None:
        """A request came; `was_idle`: nothing of this model was running or waiting before it."""

    def rested(self, key: str, *, now_s: float) -> None:
        """Its last request has ended."""

    def restored(self, key: str, *, now_s: float, restore_s: float, size_bytes: int) -> None:
        """It is being brought back, which takes `restore_s` on an idle link."""

    def parked(self, key: str, *, now_s: float) -> None:
        """It gave way."""

    def forgotten(self, key: str) -> None:
        """It is gone for good."""

    def worth(self, key: str, *, now_s: float, since_s: float, restore_s: float, size_bytes: int) -> Worth:
        """Of keeping it, now that it is idle. That it came, at `since_s`, counts as a use: it came for someone.

        `restore_s`, `size_bytes`: what its return takes, and what parking it would free.
        """


@dataclass(slots=True)
class Usage:
    """What most policies remember of one model."""

    last_used_s: float = UNUSED_S
    use_count: int = 0


class Remembering:
    """A policy's start: who was used when, and how often."""

    adds = False

    def __init__(self) -> None:
        self._usage: dict[str, Usage] = {}

    def used(self, key: str, *, now_s: float, was_idle: bool) -> None:
        usage = self._usage.get(key)
        if usage is None:
            usage = self._usage[key] = Usage()
        usage.last_used_s = now_s
        usage.use_count += 1

    def rested(self, key: str, *, now_s: float) -> None:
        usage = self._usage.get(key)
        if usage is not None:
            usage.last_used_s = now_s

    def restored(self, key: str, *, now_s: float, restore_s: float, size_bytes: int) -> None:
        pass

    def parked(self, key: str, *, now_s: float) -> None:
        pass

    def forgotten(self, key: str) -> None:
        self._usage.pop(key, None)

    def usage(self, key: str) -> Usage:
        return self._usage.get(key) or Usage()

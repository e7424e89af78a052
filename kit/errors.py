"""Error kinds, because a shell can do three things: try again, tell the sender, or put the bytes aside.

Anything else is a bug: it stops the service, and the supervisor restarts it from history.
"""


class Retryable(Exception):
    """It may work later; hand the input in again after this time."""

    def __init__(self, reason: str, *, after_s: float) -> None:
        super().__init__(reason)
        self.after_s = after_s


class Corrupt(Exception):
    """These bytes will never be understood; they belong into the dead-letter stream with the reason."""

    def __init__(self, why: str, *, body: bytes) -> None:
        super().__init__(why)
        self.body = body


class Superseded(Exception):
    """Another instance writes under this service's prefix: stop deciding and rebuild from history."""


class InvariantBroken(Exception):
    """The state is not as it must be: this instance stops at once, and its next start folds history anew."""


class NotReady(Exception):
    """The service cannot serve until somebody acts; the text says who and how."""

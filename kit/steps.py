"""The steps of the real shell, named, so that a test can stop an instance at each of them.

Between two steps an instance may die for good; what a step's name says has happened when it is passed. Production code
gives no hook, and then a step costs one comparison.
"""

from collections.abc import Awaitable, Callable
from enum import StrEnum


class Step(StrEnum):
    """In the order of a life: first those of taking over, then those of every input."""

    HISTORY_READ = "history read"
    JOURNAL_FOLDED = "journal folded"
    JOURNAL_TRIMMED = "journal trimmed"
    TAKING_OVER = "taking over"
    """`WriterStarted` is decided and nowhere else yet."""
    TAKEN_OVER = "taken over"
    """It is acknowledged; what the core re-issues is decided and has not left."""
    CAUGHT_UP = "caught up"
    """What others wrote beyond the last cursor is handled and committed, and what follows from it has left."""
    SUBSCRIBED = "subscribed"
    RECEIVED = "received"
    """An input was taken from the queue and is not handled."""
    HANDLED = "handled"
    """Its facts are folded and in no history yet."""
    SENT_AHEAD = "sent ahead"
    """An order has left before its fact."""
    COMMITTING = "committing"
    JOURNALED = "journaled"
    """The batch is on the local disk and not in the stream."""
    UPLOADED = "uploaded"
    """The stream holds entries that this instance still counts as not uploaded."""
    COMMITTED = "committed"
    """The batch is durable; nothing that follows from it has left."""
    RELEASED = "released"
    """One outcome has left (an effect: is about to begin); those after it have not."""
    PERFORMED = "performed"
    """An effect has ended and its result is not handed in."""
    ANSWERED = "answered"


AtStep = Callable[[Step, object], Awaitable[None]]
"""(step, what it is about: an input, an outcome, a batch, entries, a result, or None)"""

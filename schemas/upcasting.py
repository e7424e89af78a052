"""Old versions of messages, brought to the newest one when they are read.

A new field with a default needs nothing here. Anything else is a new version: change the class's tag to ``.v<N+1>`` and
register a function that turns the old body into the new one. Old facts stay in history for ever, so do upcasters.
"""

from collections.abc import Callable
from typing import Any, Final

import msgspec

Body = dict[str, Any]
Upcaster = Callable[[Body], Body]

_UPCASTERS: Final[dict[str, tuple[str, Upcaster]]] = {}
"""{old tag: (next tag, function from the old body to the next one, both without ``type``)}"""


def register(old_tag: str, new_tag: str, upcaster: Upcaster) -> None:
    """Announce how an old version becomes the next one. Steps chain: v1 -> v2 -> v3."""
    assert old_tag not in _UPCASTERS, old_tag
    _UPCASTERS[old_tag] = (new_tag, upcaster)


def upcast(tag: str, body: bytes | memoryview) -> bytes | None:
    """The body in the next version of its message, or None when nothing is registered for this tag."""
    step = _UPCASTERS.get(tag)
    if step is None:
        return None
    new_tag, upcaster = step
    fields = msgspec.json.decode(body)
    fields.pop("type")
    return msgspec.json.encode({"type": new_tag, **upcaster(fields)})

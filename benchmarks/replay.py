"""Whether a replay of the stream gives the state that a service holds: its decisions are a fold of history, or are not.

A running service tells the hash of its state and its place in history (`kit.serving.StateMark`). A fresh processor of
the same service folds the stream up to that place, from nothing, and must come to the same hash.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from kit.bus import Stored, subject_matches
from kit.processor import Processor
from kit.service import Service
from kit.serving import StateMark, digest_hex

SETTINGS: Final = {
    "placement": "PlacementSettings",
    "swapper": "SwapperSettings",
    "autoscaler": "AutoscalerSettings",
    "nodeagent": "NodeAgentSettings",
}
"""Every log-processing service, with the name of its settings class in ``services.<name>.settings``."""


class NotThereYet(Exception):
    """What the mark names is not in the history at hand: in a journal, or on its way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayable:
    """A service as its shell would make it."""

    service: Service[Any]
    settings: Any


def load(name: str, settings: Mapping[str, object]) -> Replayable:
    """The service with these settings over its defaults; its shell's module registers every handler and fold."""
    importlib.import_module(f"services.{name}.main")
    service: Service[Any] = importlib.import_module(f"services.{name}.core").SERVICE
    kind = getattr(importlib.import_module(f"services.{name}.settings"), SETTINGS[name])
    return Replayable(service=service, settings=msgspec.convert(dict(settings), kind, strict=False))


def replayed_digest(replayable: Replayable, history: Sequence[Stored], mark: StateMark) -> str:
    """The hash of the state folded from `history` alone, up to the mark's place. Raises `NotThereYet`."""
    if mark.cursor_seq > (history[-1].seq if history else 0):
        raise NotThereYet(mark.writer)
    fresh = Processor(replayable.service, replayable.settings, writer=mark.writer, instance="replay")
    filters = (fresh.prefix, *fresh.reads)
    for stored in history:
        if not any(subject_matches(pattern, stored.subject) for pattern in filters):
            continue
        if fresh.is_own(stored) and fresh.last_hash == mark.last_hash:
            continue
        fresh.replay_one(stored)
    if fresh.last_hash != mark.last_hash:
        raise NotThereYet(mark.writer)
    fresh.fold_foreign_to(mark.cursor_seq)
    return digest_hex(fresh.state)

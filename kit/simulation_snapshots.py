"""Snapshots in the virtual-time shell: one of each writer is kept, of a moment drawn evenly among all that there were.

Its random numbers are its own, so that a run without snapshots and one with them draw the same network.
"""

import random
from dataclasses import dataclass, field
from typing import Any

from kit.processor import Processor
from kit.snapshots import Position, pack, unpack


@dataclass(slots=True)
class _Kept:
    moment_count: int = 0
    kept_at: int = 0
    """Which of these moments is kept; 0: none."""
    position: Position | None = None
    packed: bytes = b""


@dataclass(slots=True)
class DrawnSnapshots:
    """What a store holds in the real shell; as bytes, so that every test that restores also reads them."""

    seed: int
    _random: random.Random = field(init=False)
    _kept: dict[str, _Kept] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random = random.Random(f"{self.seed}/snapshots")  # Reproducible by design.

    def offer(self, processor: Processor[Any]) -> None:
        """A moment at which a snapshot could be taken; the n-th replaces the one before by a chance of 1/n."""
        kept = self._kept.setdefault(processor.writer, _Kept())
        kept.moment_count += 1
        if self._random.random() * kept.moment_count < 1:
            snapshot = processor.snapshot()
            kept.position, kept.packed = snapshot.position, pack(snapshot)
            kept.kept_at = kept.moment_count

    def is_drawn(self) -> bool:
        """Whether this start is one from a snapshot: every second."""
        return self._random.random() < 0.5

    def kept_at(self, writer: str) -> int:
        """Names the snapshot that is kept now; 0 while there is none."""
        kept = self._kept.get(writer)
        return 0 if kept is None else kept.kept_at

    def restore(self, processor: Processor[Any]) -> bool:
        """Bring a new processor to the kept moment; False when there is none."""
        kept = self._kept.get(processor.writer)
        if kept is None or kept.position is None:
            return False
        processor.restore(unpack(kept.position, kept.packed))
        return True

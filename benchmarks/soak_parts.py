"""The parts of a stack that use the driver: who they are, and which of them is whose."""

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from benchmarks.history import History
from schemas.catalogue import UnreadableMessage, decode
from schemas.nodes import LeaseReleased, ReplicaFact, ReplicaReady
from services.local.stack import LocalStack
from services.nodeagent.holder_client import HolderClient, HolderProblem

AGENT: Final = "nodeagent"
ENGINE: Final = "engine"
BROKER: Final = "broker"
CHECKPOINTER: Final = "checkpointer"
PARTS: Final = (AGENT, ENGINE, BROKER, CHECKPOINTER)
MARKS: Final = {
    b"services.nodeagent.mover.checkpointer\0": CHECKPOINTER,
    b"services.nodeagent.guard\0": "probe",
    b"services\0nodeagent\0": AGENT,
    b"services\0broker\0": BROKER,
    b"engines\0": ENGINE,
}
"""In a command line, of the narrowest first."""
KEPT_S: Final = 1.0


class Parts:
    """Processes of one stack, looked up anew each time."""

    def __init__(self, stack: LocalStack, history: History) -> None:
        self._stack = stack
        self._history = history
        self._named: dict[int, str] = {}
        """{pid: part}, also of those that have died."""
        self._looked_at_s = 0.0
        self._read_count = 0
        self._in_step: set[str] = set()

    async def pids(self, part: str) -> list[int]:
        """In a stated order; empty while there is none."""
        self.look()
        agent, holder = self._stack.pids.get(AGENT), self._stack.pids.get("holder")
        match part:
            case "nodeagent":
                return [] if agent is None else [agent]
            case "broker":
                return [pid for pid in _children(holder) if _part(pid) == BROKER]
            case "checkpointer":
                return [pid for pid in _children(agent) if _part(pid) == CHECKPOINTER]
            case _:
                return sorted((await self.engines()).values())

    async def engines(self) -> dict[str, int]:
        """{replica_id: pid} of those that live."""
        holder = HolderClient(str(self._stack.folder.runtime / "holder.sock"))
        try:
            return {engine.replica_id: engine.pid for engine in (await holder.view()).engines if engine.is_alive}
        except HolderProblem:
            return {}
        finally:
            await holder.close()

    def in_step(self) -> frozenset[str]:
        """Replicas that are starting, being parked, woken or stopped now, as far as history is known."""
        for stored in self._history.stored[self._read_count :]:
            self._read_count += 1
            try:
                fact = decode(stored.body)
            except (UnreadableMessage, msgspec.MsgspecError):
                continue
            if isinstance(fact, ReplicaFact):
                (self._in_step.add if fact.ends_within_s > 0 else self._in_step.discard)(fact.replica_id)
            elif isinstance(fact, ReplicaReady):
                self._in_step.difference_update(ready.replica_id for ready in fact.replicas)
            elif isinstance(fact, LeaseReleased):
                self._in_step.discard(fact.replica_id)
        return frozenset(self._in_step)

    def look(self) -> None:
        """Remember who is who, before somebody dies; looks at most once in a while."""
        if time.monotonic() - self._looked_at_s < KEPT_S:
            return
        self._looked_at_s = time.monotonic()
        holder, agent = self._stack.pids.get("holder"), self._stack.pids.get(AGENT)
        for pid in (*_descendants(holder), *_descendants(agent), *([agent] if agent else [])):
            if (part := _part(pid)) is not None:
                self._named[pid] = part

    def named(self, pid: int) -> str:
        """Which part it is or was; ``gone`` for one that nobody had looked at."""
        return _part(pid) or self._named.get(pid, "gone")


def _part(pid: int) -> str | None:
    with suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        return next((part for mark, part in MARKS.items() if mark in command), None)
    return None


def _children(pid: int | None) -> list[int]:
    """In the order of the kernel."""
    pids: list[int] = []
    with suppress(OSError):
        for task in sorted(Path(f"/proc/{pid}/task").iterdir()):
            with suppress(OSError):
                pids += [int(word) for word in (task / "children").read_text().split()]
    return pids


def _descendants(pid: int | None) -> Iterator[int]:
    for child in _children(pid):
        yield child
        yield from _descendants(child)

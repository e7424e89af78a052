"""What the node agent asks of a runtime, and how that says no."""

from typing import Protocol

from schemas.holders import EngineView


class RuntimeProblem(Exception):
    """It refused, or cannot be reached; asking again later may help. `status` is that of its answer, 0 for none."""

    def __init__(self, reason: str, *, status: int = 0) -> None:
        super().__init__(reason)
        self.status = status


class StartRefused(Exception):
    """This engine cannot be started here as it is wished; asking again does not help."""


class Runtime(Protocol):
    """Engines of one host, by replica."""

    async def engine(self, replica_id: str) -> EngineView | None:
        """None when it knows no such engine."""

    async def open_gate(self, replica_id: str, *, lease_epoch: int) -> EngineView:
        """Let it run. Idempotent."""

    async def stop(self, replica_id: str, *, lease_epoch: int, grace_s: float) -> None:
        """Returns when nothing is left of it. Idempotent."""

    async def wait_for_exit(self, replica_id: str, *, lease_epoch: int, timeout_s: float) -> EngineView:
        """Its view as soon as it has ended, or after the time."""

    async def forget(self, replica_id: str, *, lease_epoch: int) -> None:
        """Drop a dead one. Idempotent."""

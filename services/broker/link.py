"""Whose copy goes next over one GPU's link. Pure.

Copies of both directions stand in one line: a GPU that sends while it receives was seen to receive at half its rate
(NVIDIA/nvbandwidth#53), and a wake is what somebody waits for. A job gives way between its slabs, so that a wake waits
for the slabs that the driver has (5 ms for 256 MiB at 53 GB/s) and not for an image. A job whose next slab is not ready
yet lets others go.

Of a wake more slabs are handed over at once than of others: nobody goes before it, and on a host whose processors are
busy the link would rest whenever a thread comes late.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from schemas.brokers import LinkClass

S = TypeVar("S")

RUNNING_MAX: Final = {LinkClass.WAKE: 4, LinkClass.PREFETCH: 2, LinkClass.SEAL: 2}
"""Slabs of one job that are with the driver: one on the link, and the next."""

RANK: Final = {LinkClass.WAKE: 0, LinkClass.PREFETCH: 1, LinkClass.SEAL: 2}


@dataclass(slots=True, kw_only=True)
class Job(Generic[S]):
    """One image on its way; `S` is a slab's copy."""

    job_id: int
    link_class: LinkClass
    ready: deque[S] = field(default_factory=deque)
    is_complete: bool = False
    """No slab follows those that are ready."""
    running_count: int = 0

    @property
    def is_done(self) -> bool:
        return self.is_complete and not self.ready and not self.running_count


class Link(Generic[S]):
    """The line of one GPU."""

    def __init__(self) -> None:
        self._jobs: dict[int, Job[S]] = {}

    @property
    def waiting_count(self) -> int:
        return len(self._jobs)

    def add(self, job: Job[S]) -> None:
        self._jobs[job.job_id] = job

    def next(self) -> tuple[Job[S], S] | None:
        """The slab to copy now, out of its job: of the highest class, then of the oldest job. None: none may go now."""
        ready = [job for job in self._jobs.values() if job.ready and job.running_count < RUNNING_MAX[job.link_class]]
        if not ready:
            return None
        job = min(ready, key=lambda job: (RANK[job.link_class], job.job_id))
        job.running_count += 1
        return job, job.ready.popleft()

    def copied(self, job: Job[S]) -> None:
        """A slab that `next` gave is copied, or has failed."""
        job.running_count -= 1

    def drop(self, job: Job[S]) -> None:
        """What it has not begun is not copied any more."""
        job.ready.clear()
        job.is_complete = True

    def remove_if_done(self, job: Job[S]) -> bool:
        """True when all of it is over; it is out of the line then."""
        if job.is_done:
            self._jobs.pop(job.job_id, None)
        return job.is_done

"""Faults in the shell: parts of the runner, the committers, the log processor, the journal and the stream, replaced.

Each seed draws which service is killed, killed twice or made to stand still, at which point, how many acks are lost,
and what a stranger puts into history; then the whole story is told in the real shell and must end as if nothing had
been.
"""

import functools
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import anyio

from kit.bus import Acknowledged, AppendConflict, AppendUnknown, Entry, Stored
from kit.bus_memory import MemoryServer
from kit.commit import Committer, DirectCommitter, JournaledCommitter
from kit.history import append_surely, last_surely
from kit.processor import Batch, Processor, writer_of
from kit.runner import Runner
from kit.snapshots import Snapshot
from schemas.catalogue import encode
from schemas.messages import Order
from schemas.placement import DeploymentRetired
from tests.faults.mortal import DEFAULT_PIECES, STORED, UNSENT, Pieces, Point
from tests.faults.mortal_fleet import AGENT, TENANT, WRITERS, Fleet
from tests.faults.telling import expect_calm, tell
from tests.properties.planted.bug import Bug

# --- Committers -------------------------------------------------------------------------------------------------------


class _ActsBeforeItIsWritten(JournaledCommitter):
    """Effects begin while their facts are in memory only."""

    async def commit(self, batch: Batch) -> None:
        if batch.entries:
            self._queue(batch.entries)


class _ForgetsTheSurplus(JournaledCommitter):
    """What an earlier life wrote to its journal and not into the stream is dropped."""

    async def recover(self) -> None:
        await anyio.to_thread.run_sync(self._journal.trim, [entry.id for entry in self._journal.entries])


class _AppendsAgain(DirectCommitter):
    """After a lost ack the same facts are appended behind themselves."""

    async def commit_durably(self, batch: Batch) -> int:
        processor = self._processor
        last_seq = processor.last_seq
        while True:
            try:
                last_seq = (await self._bus.append(processor.prefix, batch.entries, last_seq=last_seq)).last_seq
                break
            except AppendUnknown:
                newest = await last_surely(self._bus, processor.prefix)
                last_seq = newest.seq if newest is not None else 0
        processor.committed(batch, last_seq=last_seq)
        return last_seq


class _GoesOnAfterAConflict(DirectCommitter):
    """Another instance wrote; it takes over the newest sequence and keeps its own state."""

    async def commit_durably(self, batch: Batch) -> int:
        processor = self._processor
        last_seq = processor.last_seq
        while True:
            try:
                last_seq = (await self._bus.append(processor.prefix, batch.entries, last_seq=last_seq)).last_seq
                break
            except (AppendUnknown, AppendConflict):
                newest = await last_surely(self._bus, processor.prefix)
                last_seq = newest.seq if newest is not None else 0
                if newest is not None and newest.id == batch.entries[-1].id:
                    break
        processor.committed(batch, last_seq=last_seq)
        return last_seq


class _StoresOneByOne(DirectCommitter):
    """What belongs together is appended fact by fact."""

    async def commit_durably(self, batch: Batch) -> int:
        processor = self._processor
        for entry in batch.entries:
            processor.last_seq = await append_surely(self._bus, processor.prefix, [entry], last_seq=processor.last_seq)
        return processor.last_seq


def _runner_with(
    *, direct: type[DirectCommitter] = DirectCommitter, journaled: type[JournaledCommitter] = JournaledCommitter
) -> Pieces:
    class Changed(Runner[Any]):
        def _committer(self, processor: Processor[Any]) -> Committer:
            if self._journal is None:
                return direct(self._bus, processor)
            return journaled(self._bus, processor, self._journal, passed=self.passed)

    return Pieces(runner=Changed)


# --- Processors -------------------------------------------------------------------------------------------------------


class _Trusting(Processor[Any]):
    """Obeys whoever orders something."""

    def _refusal(self, order: Order, *, waited_s: float) -> str:
        return ""


class _FollowsAnyChain(Processor[Any]):
    """Takes a fact for genuine whatever went before it."""

    def _accept_foreign(self, stored: Stored) -> Any:
        self._foreign_hashes[writer_of(stored.subject)] = stored.previous_hash
        return super()._accept_foreign(stored)


class _StopsTheChainAtNonsense(Processor[Any]):
    """Leaves an unreadable fact out of the chain that its successors continue."""

    def _accept_foreign(self, stored: Stored) -> Any:
        writer = writer_of(stored.subject)
        before = self._foreign_hashes.get(writer)
        accepted = super()._accept_foreign(stored)
        if accepted is None and before is not None:
            self._foreign_hashes[writer] = before
        return accepted


class _ForgetsChainsInASnapshot(Processor[Any]):
    """Begins from a snapshot as if nothing had gone before."""

    def restore(self, snapshot: Snapshot) -> None:
        super().restore(snapshot)
        self._foreign_hashes.clear()


class _ReadsBehindItsSnapshot(Processor[Any]):
    """Begins to read a few facts too late."""

    def restore(self, snapshot: Snapshot) -> None:
        super().restore(snapshot)
        self.read_seq += 3


class _DropsWhatIsAfterItsCursor(Processor[Any]):
    """What came while nobody was there is folded and never handled."""

    def catch_up(self, *, entries_max: int) -> bool:
        if self._waiting:
            self.fold_foreign_to(self._waiting[-1].stored.seq)
        return True


class _ReissuesNothing(Processor[Any]):
    """Takes over without a look at what is unfinished."""

    def started(self, *, writer_epoch: int) -> None:
        self.writer_epoch = writer_epoch


def _processing_with(kind: type[Processor[Any]]) -> Pieces:
    class Changed(Runner[Any]):
        def _new_processor(self) -> Processor[Any]:
            usual = super()._new_processor()
            return kind(
                self._service,
                self._settings,
                writer=usual.writer,
                instance=usual.instance,
                machine_id=usual.machine_id,
            )

    return Pieces(runner=Changed)


# --- The stream -------------------------------------------------------------------------------------------------------


class _LaxServer(MemoryServer):
    """Takes an append whatever sequence it names."""

    def append(self, prefix: str, entries: Sequence[Entry], last_seq: int) -> Acknowledged:
        newest = self.last(prefix)
        return super().append(prefix, entries, newest.seq if newest is not None else 0)


# --- Playing a seed ---------------------------------------------------------------------------------------------------


@functools.cache
def passed_by(plant: Callable[[], Pieces]) -> dict[str, list[Point]]:
    """{writer: the points of a run in which nothing goes wrong but what is planted}. Raises what a check finds."""
    fleet = tell(pieces=plant())
    expect_calm(fleet)
    return {writer: member.passed[0] for writer, member in fleet.members.items()}


def choices(seed: int, points: dict[str, list[Point]]) -> dict[str, Any]:
    """What befalls the story."""
    draw = random.Random(f"shell/{seed}")  # Reproducible by design.
    writer = draw.choice(WRITERS)
    passed = points[writer]
    kinds = list({(point.step, point.kind): point for point in passed}.values())
    within = [point for point in passed if point.step == STORED] or kinds  # In the middle of what belongs together.
    point = draw.choice(draw.choice([passed, kinds, within]))
    found: dict[str, Any] = {
        "seed": seed,
        "ack_lost_fraction": draw.choice([0.0, 0.15]),
        "down_s": draw.choice([0.2, 2.0]),
    }
    match draw.choice(["killed", "killed twice", "still", "strange"]):
        case "still" if writer != AGENT:
            found["freeze"] = (writer, point)
        case "killed twice":
            found["kills"] = {writer: (point, draw.choice(kinds))}
        case "strange":
            found["beside"] = partial(_intrude, writer, draw.uniform(0.5, 15.0), is_readable=draw.random() < 0.5)
        case _:
            found["kills"] = {writer: (point,)}
    return found


async def _intrude(writer: str, after_s: float, fleet: Fleet, *, is_readable: bool) -> None:
    """A forged retirement that does not continue the chain, or nonsense that does."""
    await anyio.sleep(after_s)
    await fleet.until(lambda: True, what="all are ready")
    runner = fleet.members[writer].runner
    if runner is None or runner.processor is None:
        return
    forged = DeploymentRetired(at_s=0.0, inbox_seq=1, command_id="x", tenant=TENANT, deployment_id="d1", model="a")
    body = encode(forged) if is_readable else b"{not json"
    fleet.intrude(writer, body, previous_hash="forged" if is_readable else runner.processor.last_hash)


def play(plant: Callable[[], Pieces], seed: int) -> None:
    points = passed_by(plant)
    expect_calm(tell(pieces=plant(), **choices(seed, points)))


def play_known(plant: Callable[[], Pieces], befalls: dict[str, Any]) -> None:
    expect_calm(tell(pieces=plant(), **befalls))


_PLANTED: tuple[tuple[str, Callable[[], Pieces], str, str], ...] = (
    (
        "an agent that acts before its facts are written",
        partial(_runner_with, journaled=_ActsBeforeItIsWritten),
        "journal",
        "an engine runs of which history knows nothing; engines are compared with leases",
    ),
    (
        "a journal whose surplus is forgotten",
        partial(_runner_with, journaled=_ForgetsTheSurplus),
        "journal surplus",
        "what was acted upon is lost; engines are compared with leases",
    ),
    (
        "a writer that appends again after a lost ack",
        partial(_runner_with, direct=_AppendsAgain),
        "ack lost",
        "facts are there twice; a prefix must be one chain",
    ),
    (
        "a writer that goes on after a conflict",
        partial(_runner_with, direct=_GoesOnAfterAConflict),
        "I6: rebuild after a conflict",
        "it decides on a state that is not history's; a prefix must be one chain",
    ),
    (
        "a stream that takes a stale writer's append",
        lambda: Pieces(server=_LaxServer),
        "I6: stale append",
        "two writers at once; a prefix must be one chain",
    ),
    (
        "an agent that obeys a superseded swapper",
        partial(_processing_with, _Trusting),
        "I6: stale order",
        "a wake that nobody wants; each wake is held against the writer of its time",
    ),
    (
        "a batch that is stored one by one",
        partial(_runner_with, direct=_StoresOneByOne),
        "group commit",
        "half of a decision is in history; each command has its facts, each wish its end",
    ),
    (
        "a reader that follows any chain",
        partial(_processing_with, _FollowsAnyChain),
        "hash chain",
        "a forged fact is folded; the story must end alike",
    ),
    (
        "a chain that stops at nonsense",
        partial(_processing_with, _StopsTheChainAtNonsense),
        "unreadable fact",
        "all later facts of that writer are left out; the story must go on",
    ),
    (
        "a snapshot without its chains",
        partial(_processing_with, _ForgetsChainsInASnapshot),
        "snapshot",
        "all later facts are left out; the story must go on",
    ),
    (
        "a start that reads behind its snapshot",
        partial(_processing_with, _ReadsBehindItsSnapshot),
        "snapshot",
        "a few facts are never heard; replay must equal what was lived",
    ),
    (
        "facts after the cursor never handled",
        partial(_processing_with, _DropsWhatIsAfterItsCursor),
        "take-over: cursor",
        "a proposal gets no answer; the story must go on",
    ),
    (
        "a take-over that re-issues nothing",
        partial(_processing_with, _ReissuesNothing),
        "take-over: effects, timers",
        "what was begun is never ended; the story must go on",
    ),
)

_PARKING = {"kills": {AGENT: (Point(UNSENT, "nodes_replica_draining_v1"),)}}
_KNOWN: dict[str, dict[str, Any]] = {
    "an agent that acts before its facts are written": _PARKING,
    "a journal whose surplus is forgotten": _PARKING,
    "a batch that is stored one by one": {"kills": {"placement": (Point(STORED, "placement_deployment_retired_v1"),)}},
    "an agent that obeys a superseded swapper": {"freeze": ("swapper", Point("received", "nodes_replica_ready_v1"))},
}
"""What finds a fault for which a random seed is rare."""


def _known(name: str, plant: Callable[[], Pieces]) -> Callable[[], None] | None:
    return partial(play_known, plant, _KNOWN[name]) if name in _KNOWN else None


BUGS = tuple(
    Bug(name=name, guards=guards, breaks=breaks, play=partial(play, plant), play_known=_known(name, plant))
    for name, plant, guards, breaks in _PLANTED
)
SOUND = Bug(name="nothing", guards="", breaks="", play=partial(play, lambda: DEFAULT_PIECES))

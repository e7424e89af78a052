"""The stream of a simulation, who reads which part of it, and what a fold of it from zero gives."""

import copy
import hashlib
import pickle
from collections import deque
from collections.abc import Sequence
from typing import Any

from kit.bus import Entry, Stored, subject_matches
from kit.processor import Batch, Processor, writer_of
from kit.service import Service, digest
from kit.simulation_members import Member, Party
from kit.simulation_snapshots import DrawnSnapshots
from schemas.messages import prefix_of


class History:
    """Facts in one total order, with a table of readers for each subject, so that no store looks at every member."""

    def __init__(self) -> None:
        self.stream: list[Stored] = []
        self.ids: set[str] = set()
        self._newest: dict[str, Stored] = {}
        self._prefixes: dict[str, str] = {}
        self._parties: list[Party] = []
        self._readers: dict[str, tuple[Party, ...]] = {}
        self._trace = hashlib.sha256()
        self._folds: dict[str, _Following] = {}
        self._folds_from_snapshots: dict[str, _Following] = {}

    def trace_hash(self) -> str:
        return self._trace.hexdigest()

    def newest(self, prefix: str) -> Stored | None:
        """The newest entry under a writer's prefix."""
        return self._newest.get(prefix)

    def last_seq(self, prefix: str) -> int:
        newest = self._newest.get(prefix)
        return 0 if newest is None else newest.seq

    def follow(self, party: Party) -> None:
        self._parties.append(party)
        self._readers.clear()

    def readers(self, subject: str) -> tuple[Party, ...]:
        found = self._readers.get(subject)
        if found is None:
            found = tuple(p for p in self._parties if any(subject_matches(pattern, subject) for pattern in p.filters))
            self._readers[subject] = found
        return found

    def store(self, entries: Sequence[Entry], *, now_s: float) -> list[Stored]:
        stored_now = []
        for entry in entries:
            subject = entry.subject
            stored = Stored(
                seq=len(self.stream) + 1,
                time_s=now_s,
                subject=subject,
                body=entry.body,
                id=entry.id,
                cause_seq=entry.cause_seq,
                cursor_seq=entry.cursor_seq,
                previous_hash=entry.previous_hash,
            )
            self.stream.append(stored)
            self.ids.add(entry.id)
            prefix = self._prefixes.get(subject)
            if prefix is None:
                prefix = self._prefixes[subject] = prefix_of(writer_of(subject))
            self._newest[prefix] = stored
            self._trace.update(f"{now_s:.9f} {subject} {entry.id} ".encode())
            self._trace.update(entry.body)
            stored_now.append(stored)
        return stored_now

    # --- Folds ----------------------------------------------------------------------------------------------

    def rebuilt(
        self,
        service: Service[Any],
        settings: Any,
        *,
        writer: str,
        instance: str,
        journal: Sequence[Entry] = (),
        snapshots: DrawnSnapshots | None = None,
    ) -> Processor[Any]:
        """A fold of all that is stored, then of the journal's surplus: what a new instance knows before it takes over.

        The fold of each writer's history goes on where the last one ended, and a copy of it is handed out; so a restart
        costs what is new since the last, not all of history, and yet the state is a fold from zero. With `snapshots`,
        if they have one, it is a fold from there, which goes on likewise until another one is kept.
        """
        kept_at = 0 if snapshots is None else snapshots.kept_at(writer)
        folds = self._folds_from_snapshots if kept_at else self._folds
        fold = folds.get(writer)
        if fold is None or fold.kept_at != kept_at:
            begun = Processor(service, settings, writer=writer, instance="replay")
            if snapshots is not None:
                snapshots.restore(begun)
            fold = folds[writer] = _Following(begun, kept_at=kept_at)
        fold.advance(self.stream)
        processor = fold.copy(instance)
        for entry in journal:
            if not processor.knows(entry.id):
                processor.replay_own(entry, seq=processor.last_seq)
        return processor

    def check_replay(self, member: Member, live: Processor[Any], snapshots: DrawnSnapshots) -> None:
        """A fold from zero, and one from a snapshot, gives the live state of a quiet member, byte for byte."""
        lived = digest(live.state)
        for begins_at in (None, snapshots):
            fresh = self.rebuilt(
                member.service,
                member.settings,
                writer=member.writer,
                instance="replay",
                journal=member.journal,
                snapshots=begins_at,
            )
            fresh.fold_foreign_to(live.cursor_seq)
            replayed = digest(fresh.state)
            assert replayed == lived, (
                f"{member.writer}: replay differs, {'from a snapshot' if begins_at else 'from zero'}\n"
                f"replayed {replayed!r}\nlived    {lived!r}"
            )


class _Following:
    """One writer's fold, as far as it has been read: from zero, or from the snapshot that was kept at some moment."""

    def __init__(self, processor: Processor[Any], *, kept_at: int) -> None:
        self.kept_at = kept_at
        self._processor = processor
        self._filters = (processor.prefix, *processor.reads)
        self._position = processor.read_seq
        self._matches: dict[str, bool] = {}

    def advance(self, stream: Sequence[Stored]) -> None:
        """All that is new and concerns this writer."""
        matches, processor = self._matches, self._processor
        for index in range(self._position, len(stream)):
            stored = stream[index]
            is_read = matches.get(stored.subject)
            if is_read is None:
                is_read = any(subject_matches(pattern, stored.subject) for pattern in self._filters)
                matches[stored.subject] = is_read
            if is_read:
                processor.replay_one(stored)
        self._position = len(stream)

    def copy(self, instance: str) -> Processor[Any]:
        """Shares nothing that changes with the original."""
        made = copy.copy(self._processor)
        for name, value in vars(made).items():
            if isinstance(value, deque | dict | list | set):
                setattr(made, name, copy.copy(value))
        # By way of bytes: faster than a deep copy, and nothing can be shared by mistake.
        made.state = pickle.loads(pickle.dumps(made.state, pickle.HIGHEST_PROTOCOL))  # noqa: S301  # Our own bytes.
        made.batch = Batch()
        made.instance = instance
        return made

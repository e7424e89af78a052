"""The real-time shell: runs one service over a bus, exactly as `kit.processor` decides.

Order of events, for every input: handle -> commit its facts -> let orders, effects, timers and replies go -> answer
queries. One append is in flight per writer; what arrives meanwhile is handled next and leaves in one batch.
"""

import heapq
import itertools
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from typing import Any, Final, Generic, TypeVar

import anyio
import msgspec
from anyio.abc import TaskGroup
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from msgspec import structs

from kit.bus import Bus, BusError, HistoryGone, Received, Stored, Stream
from kit.commit import Committer, DirectCommitter, JournaledCommitter
from kit.errors import InvariantBroken, Superseded
from kit.inbox import inbox_delivery
from kit.journal import Journal
from kit.liveness import LEASE_TERM_S, ActiveLease
from kit.machine import Machine
from kit.outcomes import Effect, Input, Reply, Timer
from kit.processor import Delivery, Processor, Released
from kit.queries import PendingQueries, Question
from kit.rebuild import rebuilt
from kit.service import Service
from kit.shell_settings import ShellSettings
from kit.snapshot_keeper import SnapshotKeeper
from kit.snapshot_store import SnapshotStore
from kit.status import Status
from kit.steps import AtStep, Step
from kit.telemetry import Tracer
from schemas.catalogue import UnknownVersion, UnreadableMessage, decode, encode
from schemas.messages import Message, Order, Signal, answer_subject, message_subject, token_of

S = TypeVar("S")
D = TypeVar("D", Delivery, Stored)

INPUTS_WAITING_MAX: Final = 10_000
"""Stored inputs wait for room (back-pressure); fleeting ones beyond it are dropped and counted."""
INPUTS_PER_BATCH_MAX: Final = 256
"""Handled between two appends: bounds one atomic batch well below the server's 1,000."""
ENTRIES_PER_BATCH_MAX: Final = 400
"""Handling stops here and commits; what one more input adds stays within the server's 1,000 entries of a batch, or is
appended by itself."""
REBUILD_PAUSE_S: Final = 0.5
LOOK_EVERY_S: Final = 10.0
BARE: Final = ShellSettings(snapshot_every_count=0, check_every_count=0)
GONE_RETRY_S: Final = 5.0
"""Somebody must bring back history or a snapshot first."""

Performer = Callable[[Effect, str], Awaitable[Input | None]]
"""(effect, traceparent) -> its result as an input.

Failures are results too; an exception is a bug and stops the service.
"""


class Runner(Generic[S]):
    """Runs one instance of a service until cancelled."""

    def __init__(
        self,
        service: Service[S],
        settings: Any,
        bus: Bus,
        *,
        writer: str,
        instance: str,
        tracer: Tracer,
        perform: Performer | None = None,
        journal: Journal | None = None,
        needs_lease: bool = True,
        clock: Callable[[], float] = time.time,
        machine: Machine | None = None,
        shell: ShellSettings = BARE,
        at_step: AtStep | None = None,
    ) -> None:
        """`machine`: None for a writer that may run anywhere. `at_step`: for tests that stop it between two steps."""
        self._service = service
        self._settings = settings
        self._bus = bus
        self._writer = writer
        self._instance = instance
        self._tracer = tracer
        self._perform = perform
        self._journal = journal
        self._needs_lease = needs_lease
        self._lease = ActiveLease(bus, writer, instance)
        self._clock = clock
        self._machine = machine
        self._shell = shell
        self._at_step = at_step
        self._offset_s = 0.0
        self._log = logging.getLogger(service.name)
        self._generations = itertools.count(1)
        self.status = Status()
        self.processor: Processor[S] | None = None
        """The live state; None until history was read for the first time."""
        self._live: _Live[S] | None = None

    def now_s(self) -> float:
        """Local time, offset so that it is never behind the stream's, nor behind what was decided already.

        Else a clock that is set back would hold up every timer until it has caught up.
        """
        local_s = self._clock() + self._offset_s
        decided_s = 0.0 if self.processor is None else self.processor.now_s
        if decided_s > local_s:
            self._offset_s += decided_s - local_s
            return decided_s
        return local_s

    def offer(self, result: Input) -> None:
        """Hand in what a watch of the shell saw, for example that an engine ended.

        Lost when the service is rebuilding: what it would have told must be found again by an effect of `on_start`.
        """
        if self._live is not None:
            self._live.offer(Delivery(input=result, now_s=self.now_s()))

    async def run(self) -> None:
        """Serve for ever; rebuild from history when another instance took over.

        A fact in a version that this build does not know makes it not ready, until somebody upgrades it.
        """
        while True:
            try:
                await self._run_once()
            except* Superseded as group:
                self.status.is_ready, self.status.why_not = False, "rebuilding: another instance wrote here"
                self.status.rebuilt_count += 1
                self._log.warning("superseded, rebuilding", extra={"reason": str(_first(group))})
            except* UnknownVersion as group:
                await self._stop_deciding(str(_first(group)))
            except* HistoryGone as group:
                self.status.is_ready, self.status.why_not = False, str(_first(group))
                self._log.error("not ready", extra={"reason": self.status.why_not})
                await anyio.sleep(GONE_RETRY_S)
            await anyio.sleep(REBUILD_PAUSE_S)

    async def _stop_deciding(self, why: str) -> None:
        """An upgrade in the wrong order: guessing could be wrong and a restart would not help, so say so and wait."""
        self.status.is_ready, self.status.why_not = False, why
        self._log.error("not ready", extra={"reason": why})
        await anyio.sleep_forever()

    async def passed(self, step: Step, what: object = None) -> None:
        if self._at_step is not None:
            await self._at_step(step, what)

    async def _run_once(self) -> None:
        await self._become_active()
        async with AsyncExitStack() as stack:
            store = SnapshotStore(self._bus, self._writer) if self._shell.snapshot_every_count else None
            processor, reader, count = await rebuilt(
                self._bus, self._new_processor, store, stack=stack, follow=self._follow, log=self._log
            )
            self.status.replayed_count = count
            await self.passed(Step.HISTORY_READ)
            if self._machine is not None and (why := self._machine.refusal(self._writer, processor.last_machine_id)):
                await self._stop_deciding(why)
            committer = self._committer(processor)
            tg = await stack.enter_async_context(anyio.create_task_group())
            live = _Live(self, processor, committer, tg)
            stack.callback(live.close)
            if store is not None:
                live.keeper = SnapshotKeeper(store, self._shell, tg, behind_count=count)
            await committer.start(tg)
            await live.take_over()
            self.processor = processor
            tg.start_soon(live.read_history, reader)
            await live.open_subscriptions(stack)
            await self.passed(Step.SUBSCRIBED)
            if self._needs_lease:
                tg.start_soon(self._lease.keep)
            self.status.is_ready, self.status.why_not = True, ""
            self._log.info("active", extra={"writer_epoch": processor.writer_epoch, "cursor_seq": processor.cursor_seq})
            self._live = live
            try:
                await live.serve()
            except anyio.get_cancelled_exc_class():
                await live.end()
                raise
            finally:
                self._live = None

    def _new_processor(self) -> Processor[S]:
        return Processor(
            self._service,
            self._settings,
            writer=self._writer,
            instance=f"{self._instance}-{next(self._generations)}",
            machine_id=self._machine.machine_id if self._machine is not None else "",
        )

    def _committer(self, processor: Processor[S]) -> Committer:
        if self._journal is None:
            return DirectCommitter(self._bus, processor, hold=self.status.hold)
        return JournaledCommitter(self._bus, processor, self._journal, passed=self.passed, hold=self.status.hold)

    async def _become_active(self) -> None:
        while self._needs_lease:
            why_not = await self._lease.take()
            if not why_not:
                return
            self.status.why_not = why_not
            await anyio.sleep(LEASE_TERM_S / 4)

    def _follow(self, stored: Stored) -> None:
        self._offset_s = max(self._offset_s, stored.time_s - self._clock())


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first plain exception in nested groups."""
    found = group.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found


class _Live(Generic[S]):
    """One life between taking over and being cancelled or superseded."""

    def __init__(self, runner: Runner[S], processor: Processor[S], committer: Committer, tg: TaskGroup) -> None:
        self._runner = runner
        self._service = runner._service
        self._bus = runner._bus
        self._processor = processor
        self._committer = committer
        self._passed = runner.passed
        self._tg = tg
        self.keeper: SnapshotKeeper | None = None
        self._is_quiet = False
        """Nothing is being handled, committed or released."""
        self._commit_count = 0
        self._timers: list[tuple[float, int, Delivery]] = []
        self._timer_numbers = itertools.count()
        self._timer_added = anyio.Event()
        self._queries: PendingQueries[S] = PendingQueries(self._service, self._bus)
        self._send: MemoryObjectSendStream[Delivery | Stored | Question]
        self._receive: MemoryObjectReceiveStream[Delivery | Stored | Question]
        self._send, self._receive = anyio.create_memory_object_stream(INPUTS_WAITING_MAX)

    def close(self) -> None:
        self._send.close()
        self._receive.close()

    async def take_over(self) -> None:
        now_s = self._runner.now_s()
        await self._committer.recover()
        batch = self._processor.take_over(now_s=now_s)
        await self._passed(Step.TAKING_OVER, batch)
        last_seq = await self._committer.commit_durably(batch)
        self._processor.started(writer_epoch=last_seq)
        await self._passed(Step.TAKEN_OVER, self._processor.batch)
        while not self._processor.catch_up(entries_max=ENTRIES_PER_BATCH_MAX):
            await self._commit()
        await self._commit()
        await self._passed(Step.CAUGHT_UP)

    # --- Inputs -------------------------------------------------------------------------------------------------------

    async def read_history(self, reader: Any) -> None:
        async for item in reader:
            if isinstance(item, Stored) and self._processor.concerns(item.subject):
                self._runner._follow(item)
                await self._send.send(item)

    async def open_subscriptions(self, stack: AsyncExitStack) -> None:
        service, processor = self._service, self._processor
        for kind in service.signals:
            await stack.enter_async_context(
                self._bus.subscribe(f"sublet.signal.{token_of(kind)}", self._receive_message)
            )
        node = processor.writer.removeprefix("node.")
        for kind in service.orders:
            await stack.enter_async_context(
                self._bus.subscribe(f"sublet.order.{node}.{token_of(kind)}", self._receive_message)
            )
        for kind in service.answers:
            target = f"{service.name}.{node}" if kind.is_per_node else service.name
            await stack.enter_async_context(
                self._bus.subscribe(
                    f"sublet.query.*.{target}.{token_of(kind)}", self._receive_question, queue=service.name
                )
            )
        if service.inbox_cursor is not None:
            self._tg.start_soon(self._read_inbox, service.inbox_cursor(processor.state))
        self._tg.start_soon(self._run_timers)
        self._tg.start_soon(self._queries.expire, lambda: self._processor.state)

    def _receive_message(self, received: Received) -> None:
        try:
            message = decode(received.body)
        except (UnreadableMessage, UnknownVersion) as error:
            self._runner._log.warning("unreadable message", extra={"subject": received.subject, "reason": str(error)})
            return
        self.offer(Delivery(input=message, now_s=self._runner.now_s(), traceparent=received.traceparent))

    def _receive_question(self, received: Received) -> None:
        self.offer(Question(received=received, arrived_s=anyio.current_time()))

    def offer(self, item: Delivery | Question) -> None:
        try:
            self._send.send_nowait(item)
        except anyio.WouldBlock:
            self._runner.status.dropped_count += 1

    async def _read_inbox(self, after_seq: int) -> None:
        async with aclosing(self._bus.read(Stream.INBOX, ["sublet.in.>"], after_seq=after_seq)) as reader:
            async for item in reader:
                if isinstance(item, Stored):
                    await self._send.send(inbox_delivery(item, now_s=self._runner.now_s()))

    async def _run_timers(self) -> None:
        while True:
            now_s = self._runner.now_s()
            while self._timers and self._timers[0][0] <= now_s:
                _, _, delivery = heapq.heappop(self._timers)
                await self._send.send(delivery)
            self._timer_added = anyio.Event()
            wait_s = max(0.0, self._timers[0][0] - now_s) if self._timers else 3600.0
            with anyio.move_on_after(min(wait_s, 3600.0)):
                await self._timer_added.wait()

    # --- The loop -----------------------------------------------------------------------------------------------------

    async def serve(self) -> None:
        if self.keeper is not None:
            self._tg.start_soon(self._look_by_time)
        while True:
            self._is_quiet = True
            item = await self._receive.receive()
            self._is_quiet = False
            await self._handle(item)
            for _ in range(INPUTS_PER_BATCH_MAX):
                if len(self._processor.batch.entries) >= ENTRIES_PER_BATCH_MAX:
                    break
                try:
                    item = self._receive.receive_nowait()
                except anyio.WouldBlock:
                    break
                await self._handle(item)
            await self._commit()
            if self.keeper is not None and self._bus.is_connected and self.keeper.is_due(waiting_count=self._waiting):
                await self.keeper.take(self._processor, self._committer, commit=self._commit)
            await self._queries.answer_ready(self._processor.state)
            await self._passed(Step.ANSWERED)

    @property
    def _waiting(self) -> int:
        return self._receive.statistics().current_buffer_used

    async def end(self) -> None:
        """A clean end: the next start begins here, if nothing was under way."""
        if self.keeper is not None and self._is_quiet and self._bus.is_connected:
            await self.keeper.take_last(self._processor, self._committer)

    async def _look_by_time(self) -> None:
        """Wakes the loop of a writer for whom nothing else does, when a snapshot is due by time."""
        while True:
            await anyio.sleep(LOOK_EVERY_S)
            if self.keeper is not None and self.keeper.is_due(waiting_count=0):
                await self._send.send(Delivery(input=None, now_s=self._runner.now_s()))

    async def _handle(self, item: Delivery | Stored | Question) -> None:
        if isinstance(item, Question):
            self._queries.add(item)
            return
        await self._passed(Step.RECEIVED, item)
        before_count = len(self._processor.batch.released)
        if isinstance(item, Stored):
            await self._handle_stored(item)
        else:
            name = f"{self._service.name} {type(item.input).__name__}"
            with self._runner._tracer.span(name, parent=item.traceparent) as span:
                why_not = self._processor.receive(_under(item, span.traceparent), handled_s=self._runner.now_s())
            if why_not:
                self._runner.status.refused_order_count += 1
                self._runner._log.warning("order refused", extra={"order": name, "reason": why_not})
        self._runner.status.handled_count += 1
        if self.keeper is not None:
            self.keeper.handled(1)
            self._runner.status.snapshot_count = self.keeper.taken_count
        await self._passed(Step.HANDLED, item)
        await self._send_ahead(before_count)

    async def _handle_stored(self, stored: Stored) -> None:
        processor = self._processor
        if processor.is_own(stored):
            processor.read_seq = stored.seq
            if processor.is_mine(stored.id) or stored.seq <= processor.last_seq or processor.knows(stored.id):
                return
            await self._put_aside(stored)
            raise Superseded(f"sequence {stored.seq} under {processor.prefix} is not of this instance")
        parts = stored.subject.split(".")
        with self._runner._tracer.span(f"{self._service.name} {parts[-1]}", parent=stored.traceparent) as span:
            processor.receive_stored(_under(stored, span.traceparent))
        self._runner.status.skipped_count = processor.skipped_count

    async def _put_aside(self, stored: Stored) -> None:
        """What cannot be read under the own prefix goes to the dead letters with the reason, once."""
        try:
            decode(stored.body)
            return
        except UnreadableMessage as error:
            body = msgspec.json.encode(
                {"seq": stored.seq, "subject": stored.subject, "reason": error.reason, "body": stored.body}
            )
        subject, dead_id = f"sublet.dead.{self._service.name}", f"dead:{stored.subject}:{stored.seq}"
        try:
            await self._bus.publish_stored(subject, body, id=dead_id)
        except BusError as error:  # It stays in history; a full store must not end the service.
            self._runner._log.warning("no dead letter", extra={"subject": stored.subject, "reason": str(error)})

    async def _send_ahead(self, before_count: int) -> None:
        """Of what was released since, not of the whole batch again for each of its inputs."""
        waiting = self._processor.batch.released
        since = waiting[before_count:]
        ahead = [item for item in since if isinstance(item.outcome, Order) and item.outcome.goes_ahead]
        for item in ahead:
            waiting.remove(item)
            await self._publish(item)
            await self._passed(Step.SENT_AHEAD, item.outcome)

    async def _commit(self) -> None:
        batch = self._processor.take_batch()
        if batch.is_empty:
            return
        await self._passed(Step.COMMITTING, batch)
        await self._committer.commit(batch)
        self._runner.status.appended_count += len(batch.entries)
        await self._passed(Step.COMMITTED, batch)
        for item in batch.released:
            await self._release(item)
            await self._passed(Step.RELEASED, item.outcome)
        self._commit_count += 1
        every_count = self._runner._shell.check_every_count
        if every_count and self._commit_count % every_count == 0:
            self._check_invariants()

    def _check_invariants(self) -> None:
        """The answer to a broken one is to stop: whatever is decided from such a state is wrong as well."""
        try:
            self._service.check_invariants(self._processor.state)
        except AssertionError as error:
            self._runner._log.exception("invariant broken", extra={"service": self._service.name})
            raise InvariantBroken(f"{self._service.name}: {error}") from error

    async def _release(self, item: Released) -> None:
        outcome = item.outcome
        if isinstance(outcome, Order | Signal):
            await self._publish(item)
        elif isinstance(outcome, Reply):
            await self._bus.publish(
                answer_subject(outcome.tenant, outcome.answer.command_id),
                encode(outcome.answer),
                traceparent=item.traceparent,
            )
        elif isinstance(outcome, Timer):
            delivery = Delivery(input=outcome.input, now_s=outcome.due_s, traceparent=item.traceparent)
            heapq.heappush(self._timers, (outcome.due_s, next(self._timer_numbers), delivery))
            self._timer_added.set()
        else:
            self._tg.start_soon(self._carry_out, outcome, item.traceparent)

    async def _publish(self, item: Released) -> None:
        message = item.outcome
        assert isinstance(message, Message), message
        await self._bus.publish(
            message_subject(self._processor.writer, message), encode(message), traceparent=item.traceparent
        )

    async def _carry_out(self, effect: Effect, traceparent: str) -> None:
        assert self._runner._perform is not None, f"{self._service.name} has effects but nobody to perform them"
        name = f"{self._service.name} {type(effect).__name__}"
        with self._runner._tracer.span(name, parent=traceparent) as span:
            result = await self._runner._perform(effect, span.traceparent)
            await self._passed(Step.PERFORMED, result)
            if result is not None:
                delivery = Delivery(input=result, now_s=self._runner.now_s(), traceparent=span.traceparent)
                await self._send.send(delivery)


def _under(item: D, traceparent: str) -> D:
    """The same input, continuing the given trace."""
    if traceparent == item.traceparent:
        return item
    return structs.replace(item, traceparent=traceparent)

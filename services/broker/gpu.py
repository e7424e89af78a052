"""One GPU of the broker: its pool carried out on the device, and the thread that copies.

The state of the pool is changed on the event loop only. Driver calls that make and destroy memory run one after the
other in a worker thread; copies run in threads of their own, slab by slab, as `Link` says.
"""

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import anyio
import anyio.to_thread

from devices.api import Device, DeviceError, DeviceLost, HostBuffer, OutOfMemory, Region, round_up
from schemas.brokers import GpuPoolView, LinkClass
from services.broker.link import RUNNING_MAX, Job, Link
from services.broker.pool import Piece, Plan, Pool
from services.broker.refusals import Refused
from services.broker.wire import close_all

LINK_THREADS: Final = max(RUNNING_MAX.values())
"""Each submits a slab while another's is on the link: else the link rests between two slabs."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A part of a slab that lies in one piece."""

    piece_id: int
    piece_offset_bytes: int
    host: HostBuffer
    host_offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Where a slab of an image lies, in the image's order."""

    host: HostBuffer
    offset_bytes: int
    size_bytes: int


@dataclass(slots=True, kw_only=True)
class Copy:
    """An image on its way over the link."""

    job: Job[Span]
    is_to_device: bool
    queued_s: float
    first_s: float | None = None
    last_s: float = 0.0
    copied_bytes: int = 0
    error: str = ""
    done: anyio.Event = field(default_factory=anyio.Event)

    @property
    def wait_s(self) -> float:
        return max(0.0, (self.queued_s if self.first_s is None else self.first_s) - self.queued_s)

    @property
    def copy_s(self) -> float:
        return 0.0 if self.first_s is None else max(0.0, self.last_s - self.first_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lent:
    """Memory as it goes to an engine: its pieces in address order, and a descriptor for each."""

    pieces: tuple[Piece, ...]
    descriptors: tuple[int, ...]
    reserve_s: float


class Gpu:
    """Methods are for the event loop unless they say otherwise."""

    def __init__(
        self,
        gpu_uuid: str,
        *,
        open_device: Callable[[str], Device],
        pool: Callable[[Device], Pool],
        numa_index: int,
        on_lost: Callable[[str], None],
    ) -> None:
        """`on_lost` may be called from any thread, when the driver says that the GPU or its context is gone."""
        self.gpu_uuid = gpu_uuid
        self.numa_index = numa_index
        self.device: Device | None = None
        self.pool: Pool | None = None
        self._open_device = open_device
        self._make_pool = pool
        self._on_lost = on_lost
        self._opening = anyio.Lock()
        self._memory_thread = anyio.CapacityLimiter(1)
        self._regions: dict[int, Region] = {}
        self._piece_ids = itertools.count(1)
        self._job_ids = itertools.count(1)
        self._link: Link[Span] = Link()
        self._copies: dict[int, Copy] = {}
        self._changed = threading.Condition()
        self._is_closed = False
        self._busy_s = 0.0
        self._busy_until_s = 0.0
        self._threads: list[threading.Thread] = []
        self._loop = asyncio.get_running_loop()

    async def open(self) -> Pool:
        """The device with its context, made at the first call. Raises `Refused` when that cannot be had now."""
        async with self._opening:
            if self.pool is None:
                try:
                    self.device = await anyio.to_thread.run_sync(
                        self._open_device, self.gpu_uuid, limiter=self._memory_thread
                    )
                    self.pool = await anyio.to_thread.run_sync(
                        self._make_pool, self.device, limiter=self._memory_thread
                    )
                except DeviceError as error:
                    raise Refused(f"{self.gpu_uuid} cannot be opened: {error}", again_after_s=1.0) from error
                for number in range(LINK_THREADS):
                    name = f"link-{number}-{self.gpu_uuid[:12]}"
                    thread = threading.Thread(target=self._run_link, name=name, daemon=True)
                    self._threads.append(thread)
                    thread.start()
        return self.pool

    # ---- memory

    async def lend(
        self,
        size_bytes: int,
        *,
        tenant: str,
        adopted_bytes: int,
        range_count: int = 1,
        on_piece: Callable[[Piece, int], None] | None = None,
        before_giving_back: Callable[[], Awaitable[None]] | None = None,
    ) -> Lent:
        """Clean memory of whole granules, so much for each range; the pieces of a range follow those of the last one.

        `on_piece` hears of each piece and its offset from the worker thread. Raises `Refused` with everything given
        back: after `before_giving_back`, which ends what `on_piece` began.
        """
        pool = await self.open()
        whole_bytes = size_bytes * range_count
        short_by_bytes = pool.short_bytes(whole_bytes, adopted_bytes=adopted_bytes)
        if short_by_bytes:
            raise Refused(
                f"{self.gpu_uuid} has no room: {pool.lent_bytes} bytes are lent, {adopted_bytes} are of a former "
                f"broker, of {pool.capacity_bytes}",
                short_by_bytes=short_by_bytes,
            )
        if range_count > 1:
            plan = pool.plan_each(size_bytes, count=range_count, tenant=tenant, adopted_bytes=adopted_bytes)
        else:
            is_filled = on_piece is not None
            plan = pool.plan(size_bytes, tenant=tenant, adopted_bytes=adopted_bytes, is_filled=is_filled)
        pool.begin(plan)
        started_s = time.perf_counter()
        making = _Making(plan=plan, tenant=tenant)
        try:
            await anyio.to_thread.run_sync(self._carry_out, making, on_piece, limiter=self._memory_thread)
        except DeviceError as error:
            self._look_at(error)
            if before_giving_back is not None:
                await before_giving_back()
            await self._undo(pool, making)
            short_by_bytes = whole_bytes if isinstance(error, OutOfMemory) else 0
            raise Refused(f"{self.gpu_uuid} gave no memory: {error}", short_by_bytes=short_by_bytes) from error
        pool.destroyed(plan.destroy)
        for piece in making.made:
            pool.made(piece, is_lent=True)
        for piece in making.spare:
            pool.made(piece, is_lent=False)
        pool.planned_bytes -= sum(plan.spare_bytes) - sum(piece.size_bytes for piece in making.spare)
        return Lent(
            pieces=tuple(making.pieces), descriptors=tuple(making.descriptors),
            reserve_s=time.perf_counter() - started_s,
        )  # fmt: skip

    def _carry_out(self, making: "_Making", on_piece: Callable[[Piece, int], None] | None) -> None:
        """In the memory thread."""
        device = self._device()
        for piece in making.plan.destroy:
            self._destroy(piece)
        offset_bytes = 0
        for free in making.plan.take:
            if free.tenant != making.tenant:
                device.fill(self._regions[free.piece.piece_id], 0)
            making.hand_out(free.piece, self._export(free.piece))
            if on_piece is not None:
                on_piece(free.piece, offset_bytes)
            offset_bytes += free.piece.size_bytes
        for size_bytes in making.plan.make_bytes:
            piece = self._make(size_bytes)
            making.made.append(piece)
            # Not only of others' processes: a driver need not clean what this very process gave back to it.
            device.fill(self._regions[piece.piece_id], 0)
            making.hand_out(piece, self._export(piece))
            if on_piece is not None:
                on_piece(piece, offset_bytes)
            offset_bytes += size_bytes
        for size_bytes in making.plan.spare_bytes:
            try:
                making.spare.append(self._make(size_bytes))
            except OutOfMemory:
                break  # Somebody else was quicker; the pool is so much smaller.

    async def _undo(self, pool: Pool, making: "_Making") -> None:
        """Give a failed ask's pieces back."""
        close_all(making.descriptors)
        pool.destroyed(making.plan.destroy)
        for piece in (*making.made, *making.spare):
            pool.made(piece, is_lent=True)
        missing_bytes = sum(making.plan.make_bytes) + sum(making.plan.spare_bytes)
        pool.not_made(missing_bytes - sum(piece.size_bytes for piece in (*making.made, *making.spare)))
        taken = tuple(free.piece for free in making.plan.take)
        # Some may be clean already; whose bytes are in the others is no longer told apart.
        await self.take_back((*taken, *making.made, *making.spare), tenant=None)

    async def take_back(self, pieces: tuple[Piece, ...], *, tenant: str | None) -> None:
        """Pieces that nobody maps any more; what the pool does not keep is the driver's when this returns."""
        assert self.pool is not None
        gone = self.pool.give_back(pieces, tenant=tenant)
        if gone:
            await anyio.to_thread.run_sync(self._destroy_all, gone, limiter=self._memory_thread)
            self.pool.destroyed(gone)

    def _destroy_all(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            self._destroy(piece)

    def _destroy(self, piece: Piece) -> None:
        try:
            self._device().free(self._regions.pop(piece.piece_id))
        except DeviceError as error:  # a lost GPU: its memory is gone anyway
            self._look_at(error)
            log.warning("a piece of device memory was not freed", extra={"gpu": self.gpu_uuid, "why": str(error)})

    def _make(self, size_bytes: int) -> Piece:
        region = self._device().allocate(size_bytes)
        piece = Piece(piece_id=next(self._piece_ids), size_bytes=region.size_bytes)
        self._regions[piece.piece_id] = region
        return piece

    def _export(self, piece: Piece) -> int:
        exported = self._device().export_fds(self._regions[piece.piece_id])
        assert len(exported.chunks) == 1, "a piece is one handle"
        return exported.chunks[0].fd

    def whole_granules(self, size_bytes: int) -> int:
        assert self.pool is not None
        return round_up(size_bytes, granularity_bytes=self.pool.granularity_bytes)

    async def fill_pool(self) -> int:
        """With everything kept: take what is free beyond the capacity's bound; the bytes that were added."""
        pool = await self.open()
        room_bytes = await anyio.to_thread.run_sync(self._free_bytes, limiter=self._memory_thread)
        size_bytes = min(room_bytes, pool.capacity_bytes - pool.made_bytes) // pool.granularity_bytes
        size_bytes *= pool.granularity_bytes
        added_bytes = 0
        while size_bytes - added_bytes >= pool.granularity_bytes:
            piece_bytes = min(pool.piece_bytes_max, size_bytes - added_bytes)
            pool.planned_bytes += piece_bytes
            try:
                piece = await anyio.to_thread.run_sync(self._make, piece_bytes, limiter=self._memory_thread)
            except DeviceError:
                pool.not_made(piece_bytes)
                break
            pool.made(piece, is_lent=False)
            added_bytes += piece_bytes
        return added_bytes

    def _free_bytes(self) -> int:
        return self._device().memory().free_bytes

    # ---- copies

    def begin_copy(self, link_class: LinkClass, *, is_to_device: bool) -> Copy:
        """An empty copy in the line; give it spans, then `complete` it."""
        job: Job[Span] = Job(job_id=next(self._job_ids), link_class=link_class)
        copy = Copy(job=job, is_to_device=is_to_device, queued_s=time.perf_counter())
        with self._changed:
            self._link.add(job)
            self._copies[job.job_id] = copy
        return copy

    def add_spans(self, copy: Copy, spans: Sequence[Span]) -> None:
        """From any thread."""
        with self._changed:
            if not copy.job.is_complete:
                copy.job.ready.extend(spans)
                self._changed.notify_all()

    def complete(self, copy: Copy) -> None:
        """No more spans come."""
        with self._changed:
            copy.job.is_complete = True
            self._end_if_done(copy)

    def drop(self, copy: Copy, *, why: str) -> None:
        """Copy no further; it is done when what runs has ended."""
        with self._changed:
            copy.error = copy.error or why
            self._link.drop(copy.job)
            self._end_if_done(copy)

    def _end_if_done(self, copy: Copy) -> None:
        if copy.job.job_id in self._copies and self._link.remove_if_done(copy.job):
            del self._copies[copy.job.job_id]
            self._loop.call_soon_threadsafe(copy.done.set)

    def _run_link(self) -> None:
        while True:
            with self._changed:
                found = self._link.next()
                while found is None:
                    if self._is_closed:
                        return
                    self._changed.wait()
                    found = self._link.next()
                job, span = found
                copy = self._copies[job.job_id]
                if copy.first_s is None:
                    copy.first_s = time.perf_counter()
            started_s = time.perf_counter()
            why = self._copied(span, is_to_device=copy.is_to_device)
            with self._changed:
                copy.last_s = time.perf_counter()
                self._busy_s += copy.last_s - max(started_s, self._busy_until_s)
                self._busy_until_s = copy.last_s
                self._link.copied(job)
                self._changed.notify()  # the job's next may be copied now
                if why:
                    copy.error = copy.error or why
                    self._link.drop(job)
                else:
                    copy.copied_bytes += span.size_bytes
                self._end_if_done(copy)

    def _copied(self, span: Span, *, is_to_device: bool) -> str:
        """One slab; why it failed, empty when it did not."""
        device, region = self._device(), self._regions[span.piece_id]
        move = device.copy_to_device if is_to_device else device.copy_to_host
        try:
            move(
                region, span.host, region_offset_bytes=span.piece_offset_bytes,
                host_offset_bytes=span.host_offset_bytes, size_bytes=span.size_bytes,
            )  # fmt: skip
        except DeviceError as error:
            self._look_at(error)
            return str(error)
        return ""

    def _look_at(self, error: DeviceError) -> None:
        if isinstance(error, DeviceLost):
            self._on_lost(self.gpu_uuid)

    # ---- ends and views

    def _device(self) -> Device:
        assert self.device is not None, "open it first"
        return self.device

    async def close(self) -> None:
        """All memory goes back to the driver; engines that map it keep it until they end."""
        with self._changed:
            self._is_closed = True
            for copy in list(self._copies.values()):
                self._link.drop(copy.job)
            self._changed.notify_all()
        for thread in self._threads:
            await anyio.to_thread.run_sync(thread.join)
        if self.device is not None:
            await anyio.to_thread.run_sync(self.device.close)

    def view(self) -> GpuPoolView:
        return GpuPoolView(
            gpu_uuid=self.gpu_uuid,
            pooled_bytes=self.pool.free_bytes if self.pool else 0,
            lent_bytes=self.pool.lent_bytes + self.pool.leaving_bytes if self.pool else 0,
            waiting_copies=self._link.waiting_count,
            link_busy_s=round(self._busy_s, 6),
        )


@dataclass(slots=True, kw_only=True)
class _Making:
    """How far an ask has come; written by the memory thread."""

    plan: Plan
    tenant: str
    pieces: list[Piece] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    made: list[Piece] = field(default_factory=list)
    spare: list[Piece] = field(default_factory=list)

    def hand_out(self, piece: Piece, descriptor: int) -> None:
        self.pieces.append(piece)
        self.descriptors.append(descriptor)


def spans_in(piece: Piece, piece_offset_bytes: int, parts: Sequence[Part], *, page_bytes: int) -> list[Span]:
    """The copies between one piece, at its offset in the range, and the parts of an image that lie there.

    The image's first page is a span of its own.
    """
    spans: list[Span] = []
    part_begin = 0
    for part in parts:
        at = max(part_begin, piece_offset_bytes)
        end = min(part_begin + part.size_bytes, piece_offset_bytes + piece.size_bytes)
        while at < end:
            size = min(end, page_bytes) - at if at < page_bytes else end - at
            spans.append(
                Span(
                    piece_id=piece.piece_id,
                    piece_offset_bytes=at - piece_offset_bytes,
                    host=part.host,
                    host_offset_bytes=part.offset_bytes + at - part_begin,
                    size_bytes=size,
                )
            )
            at += size
        part_begin += part.size_bytes
    return spans

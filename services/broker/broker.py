"""What the broker does for the agent and for engines: accounts, pools, images and links put together.

Everything here runs on one event loop. Driver calls and files are left to worker threads by `Gpu` and `HostMemory`;
whatever may have changed while one was awaited is looked at again afterwards.
"""

import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import anyio
import anyio.abc
from msgspec import Struct

from schemas.brokers import (
    PAGE_BYTES,
    RANGES_PER_ASK_MAX,
    AccountClose,
    AccountOpen,
    BrokerDone,
    BrokerView,
    EngineHello,
    HostReserve,
    ImageForget,
    ImageRestore,
    ImageRestored,
    ImageSeal,
    ImageSealed,
    LinkClass,
    MemoryAsk,
    MemoryGrant,
    MemoryReturn,
    Prefetch,
)
from services.broker.arena import Image, Slab
from services.broker.core import Account, AccountKey, Accounts, Range
from services.broker.gpu import Copy, Gpu, Lent, Part, spans_in
from services.broker.host_memory import HostMemory
from services.broker.pool import Piece
from services.broker.refusals import Refused
from services.broker.wire import close_all

Say: TypeAlias = Callable[[Struct, Sequence[int]], Awaitable[None]]
"""Answer the peer with a message and descriptors."""

_ENDED: Final = "the engine is gone"

_END_WAIT_S: Final = 5.0
"""A killed process may need so long to leave the driver."""

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Loan:
    """The physical memory of one range."""

    gpu: Gpu
    pieces: tuple[Piece, ...]
    tenant: str
    copy: Copy | None = None
    """Under way: the pieces stay until it is done."""

    def with_offsets(self) -> list[tuple[Piece, int]]:
        offset_bytes, found = 0, []
        for piece in self.pieces:
            found.append((piece, offset_bytes))
            offset_bytes += piece.size_bytes
        return found


class Broker:
    def __init__(
        self,
        *,
        gpus: dict[str, Gpu],
        host: HostMemory,
        tasks: anyio.abc.TaskGroup,
        find_gpus: Callable[[], Mapping[str, Gpu]] = dict,
    ) -> None:
        """`find_gpus`: those that are there now."""
        self.broker_id = secrets.token_hex(8)
        self.accounts = Accounts()
        self.gpus = gpus
        self._find_gpus = find_gpus
        self.host = host
        self._tasks = tasks
        self._loans: dict[tuple[AccountKey, str], Loan] = {}
        self._watched: dict[int, anyio.Event] = {}
        """{pid: set when that process is gone and its memory is back}"""

    # ---- the agent

    def open_account(self, wish: AccountOpen) -> BrokerDone:
        for gpu_uuid in wish.granted_bytes:
            self._gpu(gpu_uuid)
        self.accounts.open(wish)
        for gpu_uuid in sorted(wish.granted_bytes):
            self._tasks.start_soon(self._open_gpu, self._gpu(gpu_uuid))
        return BrokerDone()

    async def _open_gpu(self, gpu: Gpu) -> None:
        """Ahead of the first ask: a context takes a fraction of a second."""
        try:
            await self.open_gpu(gpu)
        except Refused as refused:
            log.warning("a GPU cannot be opened", extra={"gpu": gpu.gpu_uuid, "why": refused.sentence})

    async def open_gpu(self, gpu: Gpu) -> None:
        await gpu.open()
        assert gpu.device is not None
        self.host.use(gpu.device)

    async def close_account(self, wish: AccountClose) -> BrokerDone:
        """Refused while a process that may map the memory is seen alive: what it maps must not be somebody else's."""
        key = wish.replica_id, wish.lease_epoch
        account = self.accounts.by_key.get(key)
        if account is None:
            return BrokerDone()
        with anyio.move_on_after(_END_WAIT_S):
            for pid in sorted(self.accounts.holders(account)):
                if pid in self._watched:
                    await self._watched[pid].wait()
        alive = [pid for pid in sorted(self.accounts.holders(account)) if pid in self._watched]
        if alive:
            raise Refused(f"process {alive[0]} of {wish.replica_id} is alive and maps memory", again_after_s=1.0)
        self.accounts.close(key)
        await self._take_back(account, list(account.ranges.values()))
        return BrokerDone()

    def forget(self, wish: ImageForget) -> BrokerDone:
        self.host.arena.forget_deployment(wish.deployment_id)
        self.host.save()
        return BrokerDone()

    def reserve(self, wish: HostReserve) -> BrokerDone:
        self.host.arena.reserve(
            replica_id=wish.replica_id, deployment_id=wish.deployment_id, size_bytes=wish.size_bytes
        )
        self.host.save()
        return BrokerDone()

    async def prefetch(self, wish: Prefetch) -> BrokerDone:
        """Answered when the images are in host memory."""
        arena = self.host.arena
        images = sorted(arena.images_of(wish.replica_id), key=lambda image: image.key)
        slabs = {slab.slab_id: slab for image in images for slab in arena.slabs_of(image)}
        arena.busy(slabs.values())
        try:
            for image in images:
                arena.touch(image)
            await self.host.bring(tuple(slabs.values()), numa_order=())
        finally:
            arena.idle(slabs.values())
            self.host.save()
        return BrokerDone()

    def view(self) -> BrokerView:
        return BrokerView(
            broker_id=self.broker_id,
            pid=os.getpid(),
            accounts=self.accounts.views(
                lambda account: self.host.sealed(self.host.arena.images_of(account.replica_id))
            ),
            gpus=tuple(gpu.view() for _, gpu in sorted(self.gpus.items())),
            host=self.host.views(),
            disk_budget_bytes=self.host.arena.disk_budget_bytes,
            disk_used_bytes=self.host.arena.disk_used_bytes,
            image_deployment_ids=self.host.arena.deployment_ids(),
        )

    # ---- engines: who they are

    def hello(self, hello: EngineHello, *, connection_id: int, pid: int) -> Account:
        """The account. The process is watched from now on: its end frees what it held."""
        process = pid or -connection_id
        account = self.accounts.hello(hello, connection_id=connection_id, process=process)
        if pid and pid not in self._watched:
            try:
                descriptor = os.pidfd_open(pid)
            except OSError as error:
                self.accounts.disconnected(account, connection_id)
                raise Refused(f"process {pid} is gone") from error
            self._watched[pid] = anyio.Event()
            self._tasks.start_soon(self._watch, pid, descriptor)
        return account

    async def _watch(self, pid: int, descriptor: int) -> None:
        try:
            await anyio.wait_readable(descriptor)
        finally:
            os.close(descriptor)
        for account in list(self.accounts.by_key.values()):
            await self._take_back(account, self.accounts.process_gone(account, pid))
        self._watched.pop(pid).set()

    # ---- engines: memory

    async def ask(self, account: Account, wish: MemoryAsk, *, connection_id: int, say: Say) -> None:
        gpu = self._gpu(wish.gpu_uuid)
        await self.open_gpu(gpu)
        range_ids = (wish.range_id, *wish.more_range_ids)
        held = self._hold(account, gpu, size_bytes=wish.size_bytes, range_ids=range_ids, connection_id=connection_id)
        lent = await self._lend(account, held, gpu, copy=None, on_piece=None)
        grant = MemoryGrant(
            range_id=wish.range_id,
            piece_bytes=tuple(piece.size_bytes for piece in lent.pieces),
            reserve_s=round(lent.reserve_s, 6),
        )
        await self._hand_over(say, grant, lent)

    def _hold(
        self, account: Account, gpu: Gpu, *, size_bytes: int, range_ids: Sequence[str], connection_id: int
    ) -> list[Range]:
        """All of them, of one size, or none."""
        self._check_open(account)
        if size_bytes <= 0:
            raise Refused("a range has at least one byte")
        if len(range_ids) > RANGES_PER_ASK_MAX:
            raise Refused(f"{len(range_ids)} ranges in one ask; at most {RANGES_PER_ASK_MAX}")
        size_bytes = gpu.whole_granules(size_bytes)
        self.accounts.check_room(account, gpu_uuid=gpu.gpu_uuid, size_bytes=size_bytes * len(range_ids))
        held: list[Range] = []
        try:
            for range_id in range_ids:
                one = self.accounts.hold(
                    account, gpu_uuid=gpu.gpu_uuid, size_bytes=size_bytes, range_id=range_id,
                    connection_id=connection_id,
                )  # fmt: skip
                held.append(one)
        except Refused:
            self._let_go(account, held)
            raise
        return held

    def _let_go(self, account: Account, held: Sequence[Range]) -> None:
        """Those that nobody else has let go, and named anew, meanwhile."""
        for one in held:
            if account.ranges.get(one.range_id) is one:
                self.accounts.let_go(account, one.range_id)

    async def _lend(
        self,
        account: Account,
        held: Sequence[Range],
        gpu: Gpu,
        *,
        copy: Copy | None,
        on_piece: Callable[[Piece, int], None] | None,
    ) -> Lent:
        """The memory of ranges of one size, entered as lent. Raises `Refused` with nothing held."""
        try:
            lent = await gpu.lend(
                held[0].size_bytes, range_count=len(held), tenant=account.tenant,
                adopted_bytes=self.accounts.adopted_bytes(gpu.gpu_uuid), on_piece=on_piece,
                before_giving_back=lambda: self._end_copy(gpu, copy),
            )  # fmt: skip
        except Refused:
            await self._end_copy(gpu, copy)
            self._let_go(account, held)
            raise
        if any(one.is_ended for one in held):
            close_all(lent.descriptors)
            await self._end_copy(gpu, copy)
            await gpu.take_back(lent.pieces, tenant=account.tenant)
            self._let_go(account, held)
            raise Refused(_ENDED)
        pieces = iter(lent.pieces)
        for one in held:
            loan = Loan(gpu=gpu, pieces=_next_of(pieces, one.size_bytes), tenant=account.tenant, copy=copy)
            self._loans[account.key, one.range_id] = loan
        return lent

    async def _end_copy(self, gpu: Gpu, copy: Copy | None) -> None:
        if copy is not None:
            gpu.drop(copy, why=_ENDED)
            await copy.done.wait()

    async def _hand_over(self, say: Say, grant: MemoryGrant, lent: Lent) -> None:
        try:
            await say(grant, lent.descriptors)
        finally:
            close_all(lent.descriptors)

    async def give_back(self, account: Account, wish: MemoryReturn, *, connection_id: int) -> BrokerDone:
        held = account.ranges.get(wish.range_id)
        if held is None and wish.size_bytes:
            self.accounts.return_adopted(
                account, gpu_uuid=wish.gpu_uuid, size_bytes=wish.size_bytes, connection_id=connection_id
            )
            return BrokerDone()
        range_ids = dict.fromkeys((wish.range_id, *wish.more_range_ids))
        await self._take_back(account, [self.accounts.range_of(account, range_id) for range_id in range_ids])
        return BrokerDone()

    async def _take_back(self, account: Account, ranges: Sequence[Range]) -> None:
        """Nobody maps these any more. One that is just being lent is given back by who lends it."""
        held_now: list[Range] = []
        loans: list[Loan] = []
        for held in ranges:
            loan = self._loans.pop((account.key, held.range_id), None)
            if loan is not None:
                held_now.append(held)
                loans.append(loan)
            elif account.ranges.get(held.range_id) is held:
                held.is_ended = True
        pieces: dict[str, list[Piece]] = {}
        for loan in loans:
            await self._end_copy(loan.gpu, loan.copy)
            pieces.setdefault(loan.gpu.gpu_uuid, []).extend(loan.pieces)
        for gpu_uuid, gone in pieces.items():
            await self.gpus[gpu_uuid].take_back(tuple(gone), tenant=account.tenant)
        self._let_go(account, held_now)

    # ---- engines: images

    async def seal(self, account: Account, wish: ImageSeal) -> ImageSealed:
        started_s = time.perf_counter()
        self._check_open(account)
        held = self.accounts.range_of(account, wish.range_id)
        loan = self._loans.get((account.key, wish.range_id))
        if loan is None or loan.copy is not None:
            raise Refused(f"range {wish.range_id} has no content yet")
        arena = self.host.arena
        kept = arena.images.get((account.replica_id, wish.image_id))
        if kept is not None and kept.generation > wish.generation:
            raise Refused(f"image {wish.image_id} is of generation {kept.generation} already")
        same = arena.known_content(tenant=account.tenant, content_id=wish.content_id, size_bytes=held.size_bytes)
        if same is not None:
            self._seal(account, wish, held, arena.slabs_of(same))
            return _sealed(wish, copied_bytes=0, shared_bytes=held.size_bytes, started_s=started_s)
        numa_order = (loan.gpu.numa_index,)
        await self.host.room(held.size_bytes, numa_order=numa_order)
        slabs = arena.new_slabs(
            held.size_bytes, tenant=account.tenant, replica_id=account.replica_id, numa_order=numa_order
        )
        try:
            copy = await self._copied(loan, await self.host.parts(slabs))
            if copy.error:
                raise Refused(f"image {wish.image_id} was not kept: {copy.error}")
            self._seal(account, wish, held, slabs)
        finally:
            arena.idle(slabs)
            self.host.save()
        return _sealed(wish, copied_bytes=copy.copied_bytes, shared_bytes=0, started_s=started_s)

    async def _copied(self, loan: Loan, parts: Sequence[Part]) -> Copy:
        """A range's content, copied to host memory."""
        copy = loan.gpu.begin_copy(LinkClass.SEAL, is_to_device=False)
        loan.copy = copy
        for piece, offset_bytes in loan.with_offsets():
            loan.gpu.add_spans(copy, spans_in(piece, offset_bytes, parts, page_bytes=PAGE_BYTES))
        loan.gpu.complete(copy)
        await copy.done.wait()
        loan.copy = None
        return copy

    def _seal(self, account: Account, wish: ImageSeal, held: Range, slabs: Sequence[Slab]) -> None:
        self.host.arena.seal(
            Image(
                replica_id=account.replica_id, image_id=wish.image_id,
                deployment_id=account.deployment_id or account.replica_id, tenant=account.tenant,
                generation=wish.generation, content_id=wish.content_id, size_bytes=held.size_bytes,
                slab_ids=tuple(slab.slab_id for slab in slabs),
            )
        )  # fmt: skip
        self.host.save()

    async def restore(self, account: Account, wish: ImageRestore, *, connection_id: int, say: Say) -> None:
        gpu = self._gpu(wish.gpu_uuid)
        await self.open_gpu(gpu)
        arena = self.host.arena
        image = arena.find(replica_id=account.replica_id, image_id=wish.image_id, generation=wish.generation)
        if image.tenant != account.tenant:
            raise Refused(f"image {wish.image_id} of {account.replica_id} is another tenant's")
        (held,) = self._hold(
            account, gpu, size_bytes=image.size_bytes, range_ids=(wish.range_id,), connection_id=connection_id
        )
        slabs = arena.slabs_of(image)
        arena.busy(slabs)
        try:
            try:
                arena.touch(image)
                await self.host.bring(slabs, numa_order=(gpu.numa_index,))
                parts = await self.host.parts(slabs)
            except Refused:
                self._let_go(account, [held])
                raise
            restored = await self._restored(account, held, gpu, wish, parts=parts, say=say)
            await say(restored, ())  # before the books are closed: somebody waits for it
        finally:
            arena.idle(slabs)
            self.host.save()

    async def _restored(
        self, account: Account, held: Range, gpu: Gpu, wish: ImageRestore, *, parts: Sequence[Part], say: Say
    ) -> ImageRestored:
        """Copies of a piece begin when the piece is there; the engine maps all of them meanwhile."""
        copy = gpu.begin_copy(wish.link_class, is_to_device=True)

        def begin(piece: Piece, offset_bytes: int) -> None:
            gpu.add_spans(copy, spans_in(piece, offset_bytes, parts, page_bytes=PAGE_BYTES))

        lent = await self._lend(account, [held], gpu, copy=copy, on_piece=begin)
        gpu.complete(copy)
        grant = MemoryGrant(
            range_id=held.range_id,
            piece_bytes=tuple(piece.size_bytes for piece in lent.pieces),
            reserve_s=round(lent.reserve_s, 6),
        )
        await self._hand_over(say, grant, lent)
        await copy.done.wait()
        loan = self._loans.get((account.key, held.range_id))
        if loan is not None:
            loan.copy = None
        if copy.error:
            raise Refused(f"image {wish.image_id} was not restored: {copy.error}; return range {wish.range_id}")
        return ImageRestored(
            range_id=held.range_id, copied_bytes=copy.copied_bytes, copy_s=round(copy.copy_s, 6),
            wait_s=round(copy.wait_s, 6),
        )  # fmt: skip

    # ---- inside

    def _gpu(self, gpu_uuid: str) -> Gpu:
        """One that is not known may have come back: it was away when this broker started."""
        if gpu_uuid not in self.gpus:
            self.gpus.update({uuid: gpu for uuid, gpu in self._find_gpus().items() if uuid not in self.gpus})
        gpu = self.gpus.get(gpu_uuid)
        if gpu is None:
            raise Refused(f"this host's broker has no GPU {gpu_uuid}")
        return gpu

    def _check_open(self, account: Account) -> None:
        if self.accounts.by_key.get(account.key) is not account:
            raise Refused(f"the account of {account.replica_id} was closed")


def _next_of(pieces: Iterator[Piece], size_bytes: int) -> tuple[Piece, ...]:
    """The next pieces, up to so many bytes, which they have exactly."""
    found: list[Piece] = []
    while size_bytes > 0:
        found.append(next(pieces))
        size_bytes -= found[-1].size_bytes
    assert size_bytes == 0, "no piece belongs to two ranges"
    return tuple(found)


def _sealed(wish: ImageSeal, *, copied_bytes: int, shared_bytes: int, started_s: float) -> ImageSealed:
    return ImageSealed(
        image_id=wish.image_id, generation=wish.generation, copied_bytes=copied_bytes, shared_bytes=shared_bytes,
        seal_s=round(time.perf_counter() - started_s, 6),
    )  # fmt: skip

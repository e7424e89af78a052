"""Which pieces of one GPU's memory are used for an ask, which are made, cut anew or let go. Pure.

A piece is one physical handle. Everything that was made is either free here or lent; what is being made counts as lent
from the moment it was planned. With what engines still map of a former broker, that never exceeds `capacity_bytes`.

Sizes. Asks of at least `piece_bytes_max` (1 GiB) are cut into pieces of that size and one for the rest: making,
exporting, importing and mapping a handle costs about 0.1 to 0.3 ms beside what goes by size, so 63 GB in 59 handles
lose 15 ms and in 64 MiB handles 240. Smaller asks get one piece of exactly their size, so that a cache that grows by
slabs gives back what it took. Free pieces are taken before new ones are made, the largest first.

The pieces that an image is copied into begin at a quarter of that and double: the first copy waits for the first piece
(2 ms, and 8 ms for a whole GiB), and each is made while the one before it is on the link, in less time than that takes.

Many ranges of one size take free pieces of just that size, and all others are made: what such a set has once been cut
into, the next set of the same size finds.
"""

from dataclasses import dataclass, field
from typing import Final

from schemas.units import GiB, MiB

FIRST_PART: Final = 4
"""The first piece of what an image is copied into is a fourth of the largest."""

PIECES_PER_ASK_MAX: Final = 500
"""Two batches of descriptors. An ask that would take more gets its smallest pieces made into larger ones first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    piece_id: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FreePiece:
    piece: Piece
    tenant: str | None
    """Whose bytes may be in it; None: nobody knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How an ask is met: destroy, take, make. `spare_bytes` are made for the pool, out of what was destroyed."""

    take: tuple[FreePiece, ...]
    destroy: tuple[Piece, ...]
    make_bytes: tuple[int, ...]
    spare_bytes: tuple[int, ...]


@dataclass(slots=True, kw_only=True)
class Pool:
    """One GPU's. Bytes are whole granules throughout."""

    capacity_bytes: int
    """The most that may be made, adopted memory of former brokers included."""
    granularity_bytes: int = 2 * MiB
    piece_bytes_max: int = GiB
    keep_bytes: int | None = 0
    """Free pieces beyond this are destroyed; None: all are kept."""
    free: dict[int, FreePiece] = field(default_factory=dict)
    lent: dict[int, Piece] = field(default_factory=dict)
    planned_bytes: int = 0
    """Being made."""
    leaving: dict[int, Piece] = field(default_factory=dict)
    """Being destroyed: neither lent nor free. All that is made later is made after they are gone."""

    @property
    def free_bytes(self) -> int:
        return sum(free.piece.size_bytes for free in self.free.values())

    @property
    def lent_bytes(self) -> int:
        return sum(piece.size_bytes for piece in self.lent.values())

    @property
    def leaving_bytes(self) -> int:
        return sum(piece.size_bytes for piece in self.leaving.values())

    @property
    def made_bytes(self) -> int:
        return self.free_bytes + self.lent_bytes + self.planned_bytes

    def short_bytes(self, size_bytes: int, *, adopted_bytes: int) -> int:
        """What the GPU lacks for an ask, all free pieces used; 0 when it can be met."""
        return max(0, self.lent_bytes + self.planned_bytes + adopted_bytes + size_bytes - self.capacity_bytes)

    def plan_each(self, size_bytes: int, *, count: int, tenant: str, adopted_bytes: int = 0) -> Plan:
        """For as many ranges of one size, not short; pieces in the order of the ranges, those that are made last."""
        same = [free for free in self.free.values() if free.piece.size_bytes == size_bytes <= self.piece_bytes_max]
        taken = sorted(same, key=lambda free: (free.tenant != tenant, free.piece.piece_id))[:count]
        make = self._cut(size_bytes) * (count - len(taken))
        destroy, spare_bytes = self._room_for(sum(make), taken, adopted_bytes=adopted_bytes)
        return Plan(take=tuple(taken), destroy=destroy, make_bytes=make, spare_bytes=self._cut(spare_bytes))

    def plan(self, size_bytes: int, *, tenant: str, adopted_bytes: int = 0, is_filled: bool = False) -> Plan:
        """For an ask that is not short. Own bytes first, then by size; ties by age. `is_filled`: with an image."""
        order = sorted(
            self.free.values(), key=lambda free: (-free.piece.size_bytes, free.tenant != tenant, free.piece.piece_id)
        )
        taken: list[FreePiece] = []
        left_bytes = size_bytes
        for free in order:
            if free.piece.size_bytes <= left_bytes and len(taken) < PIECES_PER_ASK_MAX // 2:
                taken.append(free)
                left_bytes -= free.piece.size_bytes
        make = self._growing(left_bytes) if is_filled and not taken else self._cut(left_bytes)
        destroy, spare_bytes = self._room_for(left_bytes, taken, adopted_bytes=adopted_bytes)
        return Plan(take=tuple(taken), destroy=destroy, make_bytes=make, spare_bytes=self._cut(spare_bytes))

    def _cut(self, size_bytes: int) -> tuple[int, ...]:
        whole, rest = divmod(size_bytes, self.piece_bytes_max)
        return (self.piece_bytes_max,) * whole + ((rest,) if rest else ())

    def _growing(self, size_bytes: int) -> tuple[int, ...]:
        """The first piece small, each twice as large as the one before it, up to the largest."""
        granule_bytes = self.granularity_bytes
        made: list[int] = []
        piece_bytes = max(self.piece_bytes_max // FIRST_PART // granule_bytes * granule_bytes, granule_bytes)
        while piece_bytes < min(self.piece_bytes_max, size_bytes):
            made.append(piece_bytes)
            size_bytes -= piece_bytes
            piece_bytes *= 2
        return (*made, *self._cut(size_bytes))

    def _room_for(self, new_bytes: int, taken: list[FreePiece], *, adopted_bytes: int) -> tuple[tuple[Piece, ...], int]:
        """Free pieces to destroy so that `new_bytes` can be made, the smallest first; and what of them is left over."""
        taken_ids = {free.piece.piece_id for free in taken}
        others = [free.piece for free in self.free.values() if free.piece.piece_id not in taken_ids]
        # With everything kept, room comes from the pool alone: what else is free on the GPU is not ours to count on.
        room_bytes = 0 if self.keep_bytes is None else self.capacity_bytes - adopted_bytes - self.made_bytes
        destroyed: list[Piece] = []
        for piece in sorted(others, key=lambda piece: (piece.size_bytes, piece.piece_id)):
            if room_bytes >= new_bytes:
                break
            destroyed.append(piece)
            room_bytes += piece.size_bytes
        spare_bytes = max(0, room_bytes - new_bytes) if self.keep_bytes is None and destroyed else 0
        return tuple(destroyed), spare_bytes

    # ---- what happened

    def begin(self, plan: Plan) -> None:
        """Nobody else gets what the plan uses."""
        for free in plan.take:
            del self.free[free.piece.piece_id]
            self.lent[free.piece.piece_id] = free.piece
        for piece in plan.destroy:
            del self.free[piece.piece_id]
            self.leaving[piece.piece_id] = piece
        self.planned_bytes += sum(plan.make_bytes) + sum(plan.spare_bytes)

    def made(self, piece: Piece, *, is_lent: bool) -> None:
        """A planned piece exists."""
        self.planned_bytes -= piece.size_bytes
        if is_lent:
            self.lent[piece.piece_id] = piece
        else:
            self.free[piece.piece_id] = FreePiece(piece=piece, tenant=None)

    def not_made(self, size_bytes: int) -> None:
        """A planned piece will not be."""
        self.planned_bytes -= size_bytes

    def destroyed(self, pieces: tuple[Piece, ...]) -> None:
        """They are the driver's again."""
        for piece in pieces:
            self.leaving.pop(piece.piece_id, None)

    def give_back(self, pieces: tuple[Piece, ...], *, tenant: str | None) -> tuple[Piece, ...]:
        """Pieces come back with a tenant's bytes in them: those to destroy."""
        for piece in pieces:
            del self.lent[piece.piece_id]
            self.free[piece.piece_id] = FreePiece(piece=piece, tenant=tenant)
        return self.trim()

    def trim(self) -> tuple[Piece, ...]:
        """Free pieces beyond `keep_bytes`, the smallest first: destroy them, then say `destroyed`."""
        if self.keep_bytes is None:
            return ()
        excess_bytes = self.free_bytes - self.keep_bytes
        gone: list[Piece] = []
        for free in sorted(self.free.values(), key=lambda free: (free.piece.size_bytes, free.piece.piece_id)):
            if excess_bytes <= 0:
                break
            gone.append(free.piece)
            excess_bytes -= free.piece.size_bytes
            del self.free[free.piece.piece_id]
            self.leaving[free.piece.piece_id] = free.piece
        return tuple(gone)

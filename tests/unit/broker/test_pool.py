"""How an ask is cut, and what a kept pool does when nothing in it fits."""

from schemas.units import GiB, MiB
from services.broker.pool import Piece, Pool


def with_free(*sizes: int, capacity: int, keep: int | None = None) -> Pool:
    pool = Pool(capacity_bytes=capacity, keep_bytes=keep)
    for number, size in enumerate(sizes, start=1):
        pool.planned_bytes += size
        pool.made(Piece(piece_id=number, size_bytes=size), is_lent=False)
    return pool


def test_a_large_ask_is_made_in_large_pieces_and_a_small_one_in_one() -> None:
    pool = Pool(capacity_bytes=80 * GiB)

    assert (GiB, GiB, 512 * MiB) == pool.plan(2 * GiB + 512 * MiB, tenant="t").make_bytes
    assert (64 * MiB,) == pool.plan(64 * MiB, tenant="t").make_bytes


def test_free_pieces_are_used_before_new_ones_are_made() -> None:
    pool = with_free(GiB, 64 * MiB, capacity=80 * GiB)

    plan = pool.plan(GiB + 128 * MiB, tenant="t")

    assert [1, 2] == [free.piece.piece_id for free in plan.take]
    assert (64 * MiB,) == plan.make_bytes


def test_a_pool_that_keeps_everything_cuts_a_piece_anew_and_keeps_the_rest() -> None:
    pool = with_free(GiB, GiB, capacity=2 * GiB)

    plan = pool.plan(256 * MiB, tenant="t")

    assert ((), (256 * MiB,), (768 * MiB,)) == (plan.take, plan.make_bytes, plan.spare_bytes)
    assert [1] == [piece.piece_id for piece in plan.destroy]


def test_small_pieces_are_made_into_a_large_one_when_the_gpu_is_full_of_them() -> None:
    pool = with_free(*[2 * MiB] * 1024, capacity=2 * GiB)

    plan = pool.plan(2 * GiB, tenant="t")

    assert len(plan.take) + len(plan.make_bytes) <= 500
    assert 2 * GiB == sum(free.piece.size_bytes for free in plan.take) + sum(plan.make_bytes)
    assert sum(piece.size_bytes for piece in plan.destroy) == sum(plan.make_bytes)

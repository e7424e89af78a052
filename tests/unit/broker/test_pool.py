"""How an ask is cut, and what a kept pool does when nothing in it fits."""

from hypothesis import given
from hypothesis import strategies as st

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


def test_what_an_image_is_copied_into_begins_with_a_small_piece() -> None:
    pool = Pool(capacity_bytes=80 * GiB)

    plan = pool.plan(3 * GiB, tenant="t", is_filled=True)

    assert (256 * MiB, 512 * MiB, GiB, GiB, 256 * MiB) == plan.make_bytes


def test_an_image_that_finds_a_free_piece_waits_for_none() -> None:
    pool = with_free(GiB, capacity=80 * GiB)

    plan = pool.plan(3 * GiB, tenant="t", is_filled=True)

    assert [1] == [free.piece.piece_id for free in plan.take]
    assert (GiB, GiB) == plan.make_bytes


def test_many_ranges_take_pieces_of_just_their_size() -> None:
    pool = with_free(GiB, 64 * MiB, 64 * MiB, 32 * MiB, capacity=80 * GiB)

    plan = pool.plan_each(64 * MiB, count=3, tenant="t")

    assert [2, 3] == [free.piece.piece_id for free in plan.take]
    assert (64 * MiB,) == plan.make_bytes


def test_many_ranges_of_a_pool_that_keeps_everything_are_cut_out_of_the_smallest_pieces_that_do() -> None:
    pool = with_free(GiB, 2 * GiB, capacity=3 * GiB)

    plan = pool.plan_each(64 * MiB, count=8, tenant="t")

    assert (64 * MiB,) * 8 == plan.make_bytes
    assert ([1], 512 * MiB) == ([piece.piece_id for piece in plan.destroy], sum(plan.spare_bytes))


@given(st.lists(st.integers(1, 40), max_size=12), st.integers(1, 24), st.integers(1, 8), st.sampled_from([None, 0, 20]))
def test_ranges_never_share_a_piece_and_the_pool_never_grows_beyond_its_capacity(
    free: list[int], size: int, count: int, keep: int | None
) -> None:
    granule = 2 * MiB
    pool = Pool(
        capacity_bytes=max(sum(free), size * count) * granule, piece_bytes_max=8 * granule,
        keep_bytes=None if keep is None else keep * granule,
    )  # fmt: skip
    for number, granules in enumerate(free, start=1):
        pool.planned_bytes += granules * granule
        pool.made(Piece(piece_id=number, size_bytes=granules * granule), is_lent=False)

    plan = pool.plan_each(size * granule, count=count, tenant="t")
    pool.begin(plan)

    sizes = iter([*(free.piece.size_bytes for free in plan.take), *plan.make_bytes])
    for _ in range(count):
        left_bytes = size * granule
        while left_bytes > 0:
            left_bytes -= next(sizes)
        assert left_bytes == 0
    assert next(sizes, None) is None
    assert pool.made_bytes <= pool.capacity_bytes

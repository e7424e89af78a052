"""Whose copy goes next."""

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from schemas.brokers import LinkClass
from services.broker.link import RANK, RUNNING_MAX, Job, Link


def job(number: int, link_class: LinkClass, slabs: int, *, is_complete: bool = True) -> Job[str]:
    ready = deque(f"{number}.{slab}" for slab in range(slabs))
    return Job(job_id=number, link_class=link_class, ready=ready, is_complete=is_complete)


def order(link: Link[str]) -> list[str]:
    found = []
    while (next_one := link.next()) is not None:
        one, slab = next_one
        link.copied(one)
        link.remove_if_done(one)
        found.append(slab)
    return found


def test_a_wake_goes_before_the_next_slab_of_a_seal_that_has_begun() -> None:
    link: Link[str] = Link()
    link.add(job(1, LinkClass.SEAL, 3))
    first = link.next()
    assert first is not None
    link.add(job(2, LinkClass.PREFETCH, 1))
    link.add(job(3, LinkClass.WAKE, 2))

    assert "1.0" == first[1]
    assert ["3.0", "3.1", "2.0", "1.1", "1.2"] == order(link)


def test_a_wake_whose_memory_is_still_being_made_lets_others_go() -> None:
    link: Link[str] = Link()
    wake = job(1, LinkClass.WAKE, 1, is_complete=False)
    link.add(wake)
    link.add(job(2, LinkClass.SEAL, 2))

    assert ["1.0", "2.0", "2.1"] == order(link)
    assert not wake.is_done
    assert 1 == link.waiting_count


def test_the_driver_has_few_slabs_of_a_job_at_a_time_and_more_of_a_wake() -> None:
    for link_class in LinkClass:
        link: Link[str] = Link()
        one = job(1, link_class, 9)
        link.add(one)

        given = [found for _ in range(9) if (found := link.next()) is not None]

        assert RUNNING_MAX[link_class] == len(given)
        link.copied(one)
        assert link.next() is not None
    assert RUNNING_MAX[LinkClass.WAKE] > RUNNING_MAX[LinkClass.SEAL]


def test_what_was_dropped_is_done_when_its_running_slab_is() -> None:
    link: Link[str] = Link()
    one = job(1, LinkClass.WAKE, 3)
    link.add(one)
    link.next()

    link.drop(one)

    assert not link.remove_if_done(one)
    link.copied(one)
    assert link.remove_if_done(one)
    assert link.next() is None


@given(st.lists(st.tuples(st.sampled_from(LinkClass), st.integers(1, 4)), max_size=8))
def test_every_slab_is_copied_once_and_none_before_one_of_a_higher_class(jobs: list[tuple[LinkClass, int]]) -> None:
    link: Link[str] = Link()
    for number, (link_class, slabs) in enumerate(jobs):
        link.add(job(number, link_class, slabs))

    copied = order(link)

    assert sorted(copied) == sorted(
        f"{number}.{slab}" for number, (_, slabs) in enumerate(jobs) for slab in range(slabs)
    )
    ranks = [RANK[jobs[int(slab.split(".")[0])][0]] for slab in copied]
    assert sorted(ranks) == ranks
    assert 0 == link.waiting_count

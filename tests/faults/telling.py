"""The whole story in the real shell, with whatever is to happen to it, checked to its end."""

import functools
from typing import Any

import anyio

from tests.faults import virtual_time
from tests.faults.mortal import STANDS_STILL_S
from tests.faults.mortal_fleet import Fleet, running
from tests.faults.stories import everything


def tell(**choices: Any) -> Fleet:
    """The whole story, checked; `choices` as for `running`."""

    async def story() -> Fleet:
        async with running(**choices) as fleet:
            await everything(fleet)
            if fleet.twin is not None:
                await anyio.sleep(STANDS_STILL_S + 2.0)
                await fleet.until(lambda: True, what="one of the two is active")
            fleet.check()
            fleet.end = fleet.summary()
            return fleet

    return virtual_time.run(story)


@functools.cache
def calm() -> Fleet:
    return tell()


def expect_calm(fleet: Fleet) -> None:
    ends = {key: (fleet.end[key], value) for key, value in calm().end.items() if fleet.end[key] != value}
    assert not ends, f"(this end, calm end): {ends}"

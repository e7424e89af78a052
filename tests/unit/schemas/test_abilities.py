"""How an engine is parked: what it can, what its node can, and what was asked for."""

import pytest

from schemas.abilities import ABILITIES, NEEDS_NODE, NoSwapDriver, image_bytes, swap_driver_for
from schemas.deployments import EngineKind, EngineSpec, SwapDriver
from schemas.units import GiB

ALL = tuple(SwapDriver)
NOTHING_OF_THE_NODE = tuple(driver for driver in SwapDriver if driver not in NEEDS_NODE)


def engine(kind: EngineKind, wish: SwapDriver | None = None) -> EngineSpec:
    return EngineSpec(kind=kind, weights_bytes=GiB, swap_driver=wish)


def test_every_kind_of_engine_can_be_parked_somehow_on_any_node() -> None:
    assert set(EngineKind) == set(ABILITIES)
    for kind in EngineKind:
        assert not isinstance(swap_driver_for(engine(kind), (NOTHING_OF_THE_NODE,)), NoSwapDriver), kind


@pytest.mark.parametrize(
    ("kind", "with_all", "with_nothing"),
    [
        (EngineKind.SIMULATED, SwapDriver.STORE, SwapDriver.HTTP_SLEEP),
        (EngineKind.VLLM, SwapDriver.HTTP_SLEEP, SwapDriver.HTTP_SLEEP),
        (EngineKind.SGLANG, SwapDriver.HTTP_RELEASE, SwapDriver.HTTP_RELEASE),
        (EngineKind.NIM, SwapDriver.CHECKPOINT, SwapDriver.RESTART),
        (EngineKind.OPENAI, SwapDriver.CHECKPOINT, SwapDriver.RESTART),
    ],
)
def test_the_quickest_that_engine_and_node_can_do_is_taken(
    kind: EngineKind, with_all: SwapDriver, with_nothing: SwapDriver
) -> None:
    assert with_all == swap_driver_for(engine(kind), (ALL,))
    assert with_nothing == swap_driver_for(engine(kind), (NOTHING_OF_THE_NODE,))
    assert with_nothing == swap_driver_for(engine(kind), ((),)), "a node that tells nothing promises nothing"


def test_what_needs_something_inside_the_engine_is_taken_only_when_it_is_asked_for() -> None:
    assert SwapDriver.STORE == swap_driver_for(engine(EngineKind.VLLM, SwapDriver.STORE), (ALL,))
    assert SwapDriver.STORE != swap_driver_for(engine(EngineKind.VLLM), (ALL,))


def test_a_replica_over_several_gpus_needs_its_driver_on_all_of_them() -> None:
    one_without = (ALL, NOTHING_OF_THE_NODE)

    assert SwapDriver.RESTART == swap_driver_for(engine(EngineKind.NIM), one_without)
    assert isinstance(swap_driver_for(engine(EngineKind.NIM, SwapDriver.CHECKPOINT), one_without), NoSwapDriver)


def test_a_wish_that_cannot_be_met_is_refused_with_what_can_be_had() -> None:
    by_kind = swap_driver_for(engine(EngineKind.NIM, SwapDriver.HTTP_SLEEP), (ALL,))
    by_node = swap_driver_for(engine(EngineKind.NIM, SwapDriver.CHECKPOINT), (NOTHING_OF_THE_NODE,))

    assert (
        NoSwapDriver(reason="an engine of kind 'nim' cannot be parked by 'http-sleep'; it can by checkpoint, restart")
        == by_kind
    )
    assert NoSwapDriver(reason="this node cannot park by 'checkpoint' on this GPU; it can by restart") == by_node


def test_a_whole_process_takes_more_host_memory_than_its_weights() -> None:
    def host_gib(driver: SwapDriver) -> float:
        size = image_bytes(driver, engine(EngineKind.VLLM), share_bytes=10 * GiB, residue_bytes=2 * GiB)
        return size / GiB

    assert [1, 1, 3, 10, 0] == [
        host_gib(driver)
        for driver in (
            SwapDriver.STORE,
            SwapDriver.HTTP_SLEEP,
            SwapDriver.SLEEP_CHECKPOINT,
            SwapDriver.CHECKPOINT,
            SwapDriver.RESTART,
        )
    ]

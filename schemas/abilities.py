"""What each kind of engine can do, as data: how it is parked, what stays, how it is drained, whether it can burst."""

from collections.abc import Mapping
from typing import Final

from msgspec import Struct

from schemas.deployments import EngineKind, EngineSpec, SwapDriver
from schemas.units import Bytes


class Abilities(Struct, frozen=True, kw_only=True):
    """Of one kind of engine, as it comes."""

    swap_drivers: tuple[SwapDriver, ...]
    """That it can be parked with, quickest return first."""
    asked_only: frozenset[SwapDriver] = frozenset()
    """Of these, what needs something in the engine that nobody can see from outside: used only when a deployment
    names it."""
    is_elastic: bool
    """Its cache can grow and shrink while it serves; else a larger grant helps only after a restart."""
    drained_by: str
    """When its route is closed: what shows that nothing is in flight."""
    residue: str
    """What stays on the GPU after the quickest of its drivers."""


_WHOLE_PROCESS: Final = (SwapDriver.CHECKPOINT, SwapDriver.RESTART)

ABILITIES: Final[Mapping[EngineKind, Abilities]] = {
    EngineKind.SIMULATED: Abilities(
        swap_drivers=tuple(SwapDriver),
        is_elastic=True,
        drained_by="it says that nothing is in flight",
        residue="its CUDA context",
    ),
    EngineKind.TRAINING: Abilities(
        swap_drivers=(SwapDriver.STORE, SwapDriver.HTTP_SLEEP, SwapDriver.SLEEP_CHECKPOINT, *_WHOLE_PROCESS),
        is_elastic=False,
        drained_by="a step has ended",
        residue="its CUDA context",
    ),
    EngineKind.VLLM: Abilities(
        swap_drivers=(SwapDriver.STORE, SwapDriver.HTTP_SLEEP, SwapDriver.SLEEP_CHECKPOINT, *_WHOLE_PROCESS),
        asked_only=frozenset({SwapDriver.STORE}),
        is_elastic=False,
        drained_by="its gauges say that nothing runs and nothing waits",
        residue="its CUDA context, CUDA graphs and NCCL buffers: 1 to 7 GB",
    ),
    EngineKind.SGLANG: Abilities(
        swap_drivers=(SwapDriver.STORE, SwapDriver.HTTP_RELEASE, *_WHOLE_PROCESS),
        asked_only=frozenset({SwapDriver.STORE}),
        is_elastic=False,
        drained_by="its gauges say that nothing runs and nothing waits",
        residue="its CUDA context and CUDA graphs",
    ),
    EngineKind.NIM: Abilities(
        swap_drivers=_WHOLE_PROCESS,
        is_elastic=False,
        drained_by="its gauges say that nothing runs and nothing waits",
        residue="nothing",
    ),
    EngineKind.LLAMA_SERVER: Abilities(
        swap_drivers=_WHOLE_PROCESS,
        is_elastic=False,
        drained_by="its gauges say that nothing runs and nothing waits",
        residue="nothing",
    ),
    EngineKind.OPENAI: Abilities(
        swap_drivers=_WHOLE_PROCESS,
        is_elastic=False,
        drained_by="one of the well-known gauges says so; without any it is never parked",
        residue="nothing",
    ),
}

BURSTS: Final = {True: "its cache grows and shrinks while it serves", False: "its cache is as large as it started"}


def told(engine: EngineSpec, offered: tuple[tuple[SwapDriver, ...], ...]) -> tuple[str, ...]:
    """For a person: what can be done with this engine on GPUs that offer these drivers."""
    able = ABILITIES[engine.kind]
    chosen = swap_driver_for(engine, offered)
    if isinstance(chosen, NoSwapDriver):
        parked, stays = f"cannot be parked: {chosen.reason}", ""
    else:
        parked = f"parked by {chosen}" + (", as asked for" if engine.swap_driver is not None else "")
        stays = "nothing stays on the GPU" if chosen in LEAVES_NOTHING else f"{able.residue} stays on the GPU"
    is_elastic = able.is_elastic if engine.is_elastic is None else engine.is_elastic
    return tuple(part for part in (parked, stays, f"drained when {able.drained_by}", BURSTS[is_elastic]) if part)


NEEDS_NODE: Final = frozenset({SwapDriver.STORE, SwapDriver.SLEEP_CHECKPOINT, SwapDriver.CHECKPOINT})
"""What a node must have something for: a memory broker, or a driver with checkpoints. The others do not."""
LEAVES_NOTHING: Final = frozenset({SwapDriver.SLEEP_CHECKPOINT, SwapDriver.CHECKPOINT, SwapDriver.RESTART})


class NoSwapDriver(Struct, frozen=True, kw_only=True):
    """The driver that a deployment names cannot be had."""

    reason: str


def swap_driver_for(engine: EngineSpec, offered: tuple[tuple[SwapDriver, ...], ...]) -> SwapDriver | NoSwapDriver:
    """How an engine is parked on GPUs that offer these drivers: as it wishes, else the quickest that all can do.

    `offered` has the drivers of each of its GPUs; a GPU that tells none can do what needs the engine only.
    """
    able = ABILITIES[engine.kind]
    wish = engine.swap_driver
    if wish is not None and wish not in able.swap_drivers:
        known = ", ".join(able.swap_drivers)
        return NoSwapDriver(reason=f"an engine of kind '{engine.kind}' cannot be parked by '{wish}'; it can by {known}")
    possible = [driver for driver in able.swap_drivers if all(_is_offered(driver, drivers) for drivers in offered)]
    if wish is None:
        return next(driver for driver in possible if driver not in able.asked_only)
    if wish not in possible:
        known = ", ".join(possible)
        return NoSwapDriver(reason=f"this node cannot park by '{wish}' on this GPU; it can by {known}")
    return wish


def _is_offered(driver: SwapDriver, drivers: tuple[SwapDriver, ...]) -> bool:
    return driver in drivers if drivers and driver in NEEDS_NODE else driver not in NEEDS_NODE


def image_bytes(driver: SwapDriver, engine: EngineSpec, *, share_bytes: Bytes, residue_bytes: Bytes) -> int:
    """Host memory that a parked replica takes: `share_bytes` and `residue_bytes` are those of all its shards."""
    match driver:
        case SwapDriver.RESTART:
            return 0
        case SwapDriver.CHECKPOINT:
            return share_bytes
        case SwapDriver.SLEEP_CHECKPOINT:
            return engine.weights_bytes + residue_bytes
        case _:
            return engine.weights_bytes

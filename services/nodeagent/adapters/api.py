"""The interface of all adapters: what an engine is told at its start, and how it is asked while it runs."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Final

from schemas.deployments import DeploymentSpec, EngineKind, Runtime, SwapDriver
from schemas.placement import ReplicaProposal
from schemas.units import MiB
from services.nodeagent.settings import NodeAgentSettings

CONTEXT_BYTES: Final = 640 * MiB
"""What a CUDA context and the libraries' own buffers take beside what an engine counts. Engines that size themselves by
a part of the GPU do not see it; 0.5 to 0.6 GB is usual on an H100."""

PORT: Final = "{port}"
"""In the place of a port that the runtime chooses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What an engine may hold on one GPU, and what the driver will tell it."""

    gpu_uuid: str
    granted_bytes: int
    visible_bytes: int
    """The total that it will see: its grant where the driver limits it, else the whole GPU."""
    free_bytes: int
    """What it will see free before it loads; its own grant is in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One start of one engine."""

    replica: ReplicaProposal
    rooms: tuple[Room, ...]
    """By shard."""
    settings: NodeAgentSettings
    host: str = "127.0.0.1"
    """The address to listen on: loopback, unless the engine has a network of its own."""
    port: str = PORT
    python: str = "python3"
    """Interpreter for the engines that we ship."""
    weight_cache: str = ""
    """Folder for downloaded weights, as the engine sees it; empty: the engine's own."""

    @property
    def deployment(self) -> DeploymentSpec:
        return self.replica.deployment

    @property
    def model(self) -> str:
        """The engine's own name for the model."""
        return self.deployment.engine.model or self.deployment.name

    @property
    def granted_bytes(self) -> int:
        """Of each GPU. What an engine holds is spread evenly: where one share is smaller, the smallest counts."""
        return min(room.granted_bytes for room in self.rooms)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What is started."""

    program: tuple[str, ...]
    """Empty: what a container's image starts by itself."""
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def arguments(self) -> tuple[str, ...]:
        return self.program + self.options


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauges:
    """Names of what an engine tells in Prometheus form; of several names for one thing the first that is there counts.

    Samples of one name are summed: an engine with several schedulers tells one each.
    """

    running: tuple[str, ...]
    waiting: tuple[str, ...]
    kv_used_fraction: tuple[str, ...] = ()
    route: str = "/metrics"


class Adapter(ABC):
    """One kind of engine. How it is parked and whether it can burst stands in `schemas.abilities`."""

    kind: ClassVar[EngineKind]
    is_ours: ClassVar[bool] = False
    """It answers ``/sublet/state``, which says all that the rest here is asked for."""
    usual_runtime: ClassVar[Runtime] = Runtime.PROCESS
    usual_image: ClassVar[str] = ""
    """For its container where the deployment names none; empty: it must."""
    ready_routes: ClassVar[tuple[str, ...]] = ("/health",)
    """GET gives 200 as soon as it takes requests, and while it could; of several the first that it has counts."""
    sleeping_route: ClassVar[str] = ""
    """GET gives ``{"is_sleeping": …}``; empty: it cannot be asked."""
    gauges: ClassVar[Gauges | None] = None
    """None: it does not tell how much it has to do."""

    @abstractmethod
    def command(self, job: Job) -> Command:
        """What starts it. Pure: the same job gives the same command."""


def runtime_of(spec: DeploymentSpec, adapter: Adapter) -> Runtime:
    """Where its program runs: as asked; else in a container if it names an image; else as its kind usually does."""
    if spec.engine.runtime is not None:
        return spec.engine.runtime
    return Runtime.DOCKER if spec.engine.image else adapter.usual_runtime


def may_sleep(job: Job, *drivers: SwapDriver) -> bool:
    """Whether it will be parked by one of these drivers, as far as its deployment says."""
    swap = job.deployment.engine.swap_driver
    return job.deployment.swap.is_parkable and (swap is None or swap in drivers)


def usual_program(job: Job, *usual: str) -> tuple[str, ...]:
    """The deployment's own command with its places filled in, else the usual one."""
    return filled(job.deployment.engine.command, job) or usual


def filled(words: tuple[str, ...], job: Job) -> tuple[str, ...]:
    """With ``{model}`` and ``{memory_bytes}`` filled in; ``{port}`` too where it is known already."""
    places = {"{port}": job.port, "{model}": job.model, "{memory_bytes}": str(job.granted_bytes)}
    for place, value in places.items():
        words = tuple(word.replace(place, value) for word in words)
    return words


def with_arguments(options: Mapping[str, str | None], job: Job) -> tuple[str, ...]:
    """These options, and the deployment's own over them, as a command line; an option that is None stands alone.

    ``true`` is an option that stands alone, ``false`` one that is left out.
    """
    own = {name: None if value == "true" else value for name, value in job.deployment.engine.arguments.items()}
    line: list[str] = []
    for name, value in ({**options, **own}).items():
        if value != "false":
            line += [f"--{name}"] if value is None else [f"--{name}", value]
    return tuple(line)


def part_of(size_bytes: int, total_bytes: int) -> str:
    """As a part of the total, rounded down to four places: what engines that count by parts are told."""
    assert total_bytes > 0, total_bytes
    return f"{min(10_000, max(1, size_bytes * 10_000 // total_bytes)) / 10_000:.4f}"


def gauge(text: str, names: tuple[str, ...]) -> float | None:
    """The sum of all samples of the first of these names that is there; None when none is: that is not zero."""
    for name in names:
        samples = [line.rsplit(maxsplit=1)[-1] for line in text.splitlines() if _names(line, name)]
        if samples:
            total = sum(float(sample) for sample in samples)
            return total if math.isfinite(total) else None
    return None


def _names(line: str, name: str) -> bool:
    return line.startswith(name) and line[len(name) : len(name) + 1] in ("{", " ")

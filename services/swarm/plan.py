"""What one seed does, as data: a fleet, traffic, operators' commands and faults, each step with its number and time.

A plan can be printed, replayed and made smaller. Every seed draws its own subset of fault kinds, so that rare mixtures
come up: a network that loses nothing while processes die, or the reverse.
"""

import random
from dataclasses import dataclass, field, replace
from typing import Final

from msgspec.structs import replace as changed

from kit.simulation_faults import Faults, Point
from schemas.deployments import (
    DeploymentSpec,
    EngineKind,
    EngineSpec,
    PlacementSpec,
    ShareSpec,
    SwapSpec,
    WorkloadKind,
)
from schemas.units import GB
from services.nodeagent.simulated_resizing import HostFaults

FAULTS: Final[dict[str, tuple[float, float]]] = {
    "crash": (0.05, 5.0),
    "crash-at": (0.05, 3.0),
    "crash-loop": (0.0, 0.0),
    "all-down": (0.1, 5.0),
    "pause": (5.0, 40.0),
    "rival": (0.0, 0.0),
    "cut": (2.0, 40.0),
    "cut-in": (2.0, 40.0),
    "cut-out": (2.0, 40.0),
    "slow-link": (10.0, 120.0),
    "clock": (0.0, 0.0),
    "bus-away": (2.0, 40.0),
    "silence": (2.0, 20.0),
    "engine-killed": (0.0, 0.0),
    "engine-hung": (2.0, 60.0),
    "gpu-lost": (20.0, 300.0),
    "power-lost": (10.0, 90.0),
    "foreign-memory": (10.0, 120.0),
    "nvml-silent": (5.0, 60.0),
    "host-memory-short": (5.0, 60.0),
    "journal-torn": (0.05, 2.0),
    "gateway-crash": (0.1, 5.0),
    "gateway-paused": (2.0, 40.0),
    "gateway-cut": (2.0, 60.0),
    "herd": (0.0, 0.0),
    "clients-leave": (0.0, 0.0),
    "xid": (0.0, 0.0),
    "gpu-sick": (20.0, 200.0),
}
"""{kind: shortest and longest time that it lasts, seconds}"""
OPERATIONS: Final = ("park", "wake", "retire", "redeploy", "deploy-twice", "park-wake-storm", "retire-while-waking")
TRAFFIC: Final = "requests"


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that happens at one time. `which`, `size` and `lasts_s` mean what the kind makes of them."""

    number: int
    at_s: float
    kind: str
    which: int = 0
    size: float = 0.0
    lasts_s: float = 0.0

    @property
    def is_fault(self) -> bool:
        return self.kind in FAULTS

    def __str__(self) -> str:
        lasting = f" for {self.lasts_s:.1f} s" if self.lasts_s else ""
        return f"{self.number:>4}  t={self.at_s:<8.2f} {self.kind} #{self.which}{lasting} ({self.size:.2f})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A seed's run. `steps` is in order of time, and a step's number is its place in the whole plan."""

    seed: int
    lasts_s: float
    node_count: int
    gpu_count: int
    gateway_count: int
    has_standbys: bool
    is_at_real_pace: bool
    """Ticks, samples and route leases as often as by default; else a few times less often, which runs faster."""
    models: tuple[DeploymentSpec, ...]
    faults: Faults
    host_faults: HostFaults
    steps: tuple[Step, ...] = field(default=())
    has_checkpoint: bool = False
    """Whether the nodes' drivers can take a process as it is."""

    def only(self, numbers: frozenset[int]) -> "Plan":
        return replace(self, steps=tuple(step for step in self.steps if step.number in numbers))

    def without(self, numbers: frozenset[int]) -> "Plan":
        return replace(self, steps=tuple(step for step in self.steps if step.number not in numbers))

    def text(self) -> str:
        """For people: the fleet in a few lines, then every step."""
        chances = {**_nonzero(self.faults, Faults()), **_nonzero(self.host_faults, HostFaults())}
        lines = [
            f"seed {self.seed}: {self.node_count} nodes of {self.gpu_count} GPUs, {self.lasts_s:.0f} s",
            f"{self.gateway_count} gateways, {'with' if self.has_standbys else 'no'} standbys"
            + (", drivers with checkpoints" if self.has_checkpoint else ""),
            f"chances: {chances or 'none'}",
        ]
        lines += [
            f"model {spec.name}: {spec.kind}, portion {spec.share.request_portion}{_up_to(spec)}{_spread(spec)}"
            for spec in self.models
        ]
        return "\n".join([*lines, *(str(step) for step in self.steps)])


def _up_to(spec: DeploymentSpec) -> str:
    """Empty for one that never has more than its request."""
    return f" up to {spec.share.limit_portion:g}" if spec.share.limit_portion else ""


def _spread(spec: DeploymentSpec) -> str:
    """Empty for one replica on one GPU."""
    wide = f" on each of {spec.share.gpu_count} GPUs" if spec.share.gpu_count > 1 else ""
    several = f", {spec.replica_count} replicas" if spec.replica_count > 1 else ""
    return f"{wide}{several}{', a gang' if spec.placement.is_gang else ''}"


def _nonzero(given: Faults | HostFaults, usual: Faults | HostFaults) -> dict[str, float]:
    names = type(given).__dataclass_fields__
    return {name: getattr(given, name) for name in names if getattr(given, name) != getattr(usual, name)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Over how many GPUs a replica goes, how many replicas there are, and whether they start together."""

    gpu_count: int = 1
    replica_count: int = 1
    is_gang: bool = False


def inference(
    name: str, *, weights_gb: float, portion: float, swap: SwapSpec | None = None, spread: Spread | None = None
) -> DeploymentSpec:
    spread = spread or Spread()
    return DeploymentSpec(
        name=name,
        engine=EngineSpec(weights_bytes=int(weights_gb * GB), cold_start_s=0.5),
        share=ShareSpec(request_portion=portion, gpu_count=spread.gpu_count),
        swap=swap or SwapSpec(),
        replica_count=spread.replica_count,
        placement=PlacementSpec(is_gang=spread.is_gang),
    )


def training(name: str, *, weights_gb: float, portion: float, spread: Spread | None = None) -> DeploymentSpec:
    spread = spread or Spread()
    return DeploymentSpec(
        name=name,
        kind=WorkloadKind.TRAINING,
        engine=EngineSpec(kind=EngineKind.TRAINING, weights_bytes=int(weights_gb * GB), cold_start_s=0.5),
        share=ShareSpec(request_portion=portion, gpu_count=spread.gpu_count),
        replica_count=spread.replica_count,
        placement=PlacementSpec(is_gang=spread.is_gang),
    )


def draw_plan(seed: int, *, lasts_s: float = 3600.0, faults_min: int = 10) -> Plan:
    """Everything that happens in this seed's run. Equal arguments give equal plans, in every process."""
    draw = random.Random(f"{seed}/plan")  # Reproducible by design.
    gateway_count = draw.choice([1, 2, 2, 3])
    bursts = random.Random(f"{seed}/bursts")  # Apart, so that what was drawn before bursts were is drawn still.
    models = tuple(_bursting(bursts, _model(draw, number)) for number in range(draw.randint(3, 8)))
    has_checkpoint = random.Random(f"{seed}/checkpoints").random() < 0.4  # Apart too.
    plan = Plan(
        seed=seed,
        lasts_s=lasts_s,
        node_count=draw.choice([1, 1, 2, 3]),
        gpu_count=draw.choice([1, 2, 2]),
        gateway_count=gateway_count,
        has_standbys=draw.random() < 0.6,
        is_at_real_pace=draw.random() < 0.08,
        models=models,
        faults=_chances(draw),
        host_faults=HostFaults(
            start_fails_fraction=draw.choice([0, 0, 0.1]),
            park_stays_fraction=draw.choice([0, 0, 0.1]),
            wake_fails_fraction=draw.choice([0, 0, 0.1]),
            # Drawn apart, so that all else of a seed stays what it was.
            step_hangs_fraction=random.Random(f"{seed}/hangs").choice([0, 0, 0, 0.05]),
            grow_fails_fraction=bursts.choice([0, 0, 0.1]),
            gives_slowly_fraction=bursts.choice([0, 0, 0.1]),
            gives_nothing_fraction=bursts.choice([0, 0, 0.1]),
        ),
        steps=_steps(draw, models, lasts_s=lasts_s, faults_min=faults_min),
        has_checkpoint=has_checkpoint,
    )
    return replace(plan, host_faults=_disobedient(plan.host_faults)) if has_checkpoint else plan


def _disobedient(faults: HostFaults) -> HostFaults:
    """The same, and borrowers go down the ladder as far as the driver's checkpoint and beyond."""
    return replace(faults, gives_nothing_fraction=0.5, park_stays_fraction=0.2)


def _chances(draw: random.Random) -> Faults:
    return Faults(
        latency_s=draw.choice([0.0004, 0.0004, 0.005, 0.05]),
        fleeting_lost_fraction=draw.choice([0, 0, 0.05, 0.3]),
        fleeting_twice_fraction=draw.choice([0, 0, 0.1, 0.3]),
        fleeting_late_fraction=draw.choice([0, 0, 0.05]),
        late_s=draw.choice([1.0, 5.0, 90.0]),
        ack_lost_fraction=draw.choice([0, 0, 0.02, 0.2]),
    )


def _model(draw: random.Random, number: int) -> DeploymentSpec:
    portion = draw.choice([0.2, 0.3, 0.4, 0.65, 0.9])
    name = f"m{number}"
    replica_count = draw.choice([1, 1, 1, 1, 2, 3])
    spread = Spread(
        gpu_count=draw.choice([1, 1, 1, 1, 2]),
        replica_count=replica_count,
        is_gang=replica_count > 1 and draw.random() < 0.5,
    )
    if draw.random() < 0.2:
        return training(name, weights_gb=portion * 60, portion=portion, spread=spread)
    swap = SwapSpec(
        warm_window_s=draw.choice([5.0, 20.0, 60.0]),
        minimum_residency_s=draw.choice([0.0, 0.5, 3.0]),
        cold_after_s=draw.choice([None, None, None, 60.0]),
        is_parkable=draw.random() > 0.1,
    )
    return inference(name, weights_gb=portion * 60, portion=portion, swap=swap, spread=spread)


def _bursting(draw: random.Random, spec: DeploymentSpec) -> DeploymentSpec:
    """The same, and about half of those that serve may have more than their request."""
    request = spec.share.request_portion or 0.0
    limit = draw.choice([request, request, min(1.0, request + 0.3), 1.0])
    share = changed(spec.share, limit_portion=max(limit, request), burst_weight=draw.choice([1, 1, 1, 3]))
    return spec if spec.kind is WorkloadKind.TRAINING or limit <= request else changed(spec, share=share)


def _steps(
    draw: random.Random, models: tuple[DeploymentSpec, ...], *, lasts_s: float, faults_min: int
) -> tuple[Step, ...]:
    kinds = [kind for kind in FAULTS if draw.random() < 0.4] or ["crash"]
    fault_count = faults_min + draw.randrange(faults_min)
    kinds += ["crash-at"] * 3 * kinds.count("crash-at")  # Six points for each of many services: it has most to try.
    found = [_fault(draw, draw.choice(kinds), lasts_s) for _ in range(fault_count)]
    found += _clusters(draw, kinds, lasts_s)
    for _ in range(draw.randint(0, max(1, round(lasts_s / 600)))):
        found.append(Step(0, draw.uniform(0, lasts_s), draw.choice(OPERATIONS), draw.randrange(100), draw.random()))
    # Bursts: a model is busy for a moment and then nobody wants it, so that it parks and wakes all the time.
    at_s = 0.0
    pace_s = draw.choice([8.0, 12.0, 20.0])
    while (at_s := at_s + draw.expovariate(1 / pace_s)) < lasts_s:
        found.append(
            Step(0, at_s, TRAFFIC, draw.randrange(100), float(draw.choice([1, 1, 1, 2, 4])), draw.uniform(0.1, 6))
        )
    ordered = sorted(found, key=lambda step: step.at_s)
    return tuple(replace(step, number=number) for number, step in enumerate(ordered))


def _fault(draw: random.Random, kind: str, lasts_s: float) -> Step:
    shortest_s, longest_s = FAULTS[kind]
    return Step(
        0, draw.uniform(0, lasts_s), kind, draw.randrange(1000), draw.random(), draw.uniform(shortest_s, longest_s)
    )


def _clusters(draw: random.Random, kinds: list[str], lasts_s: float) -> list[Step]:
    """Sequences matter more than single faults: a few within seconds of each other."""
    found = []
    for _ in range(draw.randint(0, 3)):
        begin_s = draw.uniform(0, lasts_s)
        for _ in range(draw.randint(2, 4)):
            step = _fault(draw, draw.choice(kinds), lasts_s)
            found.append(replace(step, at_s=min(lasts_s, begin_s + draw.expovariate(0.3))))
    return found


def point_of(step: Step) -> Point:
    """Where in its work a service dies in this step."""
    points = list(Point)
    return points[step.which // 7 % len(points)]

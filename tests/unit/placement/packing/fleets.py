"""Small fleets for tests."""

from fractions import Fraction

from services.placement.packing.fleet import Ask, Fleet, GpuShape, NodeShape
from services.placement.packing.index import Packer
from services.placement.packing.policies import policy_named

GPU = GpuShape(model="H100", capacity_units=1000)


def node(
    *gpus: GpuShape,
    cpu_milli: int = 64_000,
    memory_bytes: int = 1 << 40,
    labels: frozenset[str] = frozenset(),
    links: tuple[tuple[int, ...], ...] = (),
) -> NodeShape:
    return NodeShape(cpu_milli=cpu_milli, memory_bytes=memory_bytes, gpus=gpus, labels=labels, links=links)


def fleet_of(**shapes: NodeShape) -> Fleet:
    fleet = Fleet()
    for name, shape in shapes.items():
        fleet.add_node(name, shape)
    return fleet


def packer_of(policy: str = "best-fit", **shapes: NodeShape) -> Packer:
    return Packer(fleet_of(**shapes), policy_named(policy))


def share(units: int) -> Ask:
    return Ask(size_units=units)


def whole(count: int = 1) -> Ask:
    return Ask(gpu_count=count, portion=Fraction(1))

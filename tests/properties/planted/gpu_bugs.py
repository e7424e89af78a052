"""Faults in what becomes of GPUs that misbehave, get lost or have strangers on them."""

from collections.abc import Callable
from functools import partial
from typing import Any

from kit.service import Service
from schemas.nodes import GpuObserved, GpuQuarantined, LeaseReleased, NodeJoined, ReplicaDraining
from services.nodeagent.core import SERVICE as NODEAGENT
from services.nodeagent.gpu_inputs import GpuBack, GpuGone, QuarantineOver, TryGpu
from services.nodeagent.inputs import StopEngine
from services.placement.core import SERVICE as PLACEMENT
from tests.properties.planted.bug import Bug, with_fold, without
from tests.properties.planted.gpu_trial import check_gpus


def _nothing(state: Any, fact: Any) -> None:
    return None


def an_agent_that_ignores_its_quarantines() -> Service[Any]:
    return with_fold(NODEAGENT, GpuQuarantined, _nothing)


def a_placement_that_ignores_quarantines_of_gpus() -> Service[Any]:
    return with_fold(PLACEMENT, GpuQuarantined, _nothing)


def an_agent_that_does_not_count_strangers() -> Service[Any]:
    return with_fold(NODEAGENT, GpuObserved, _nothing)


def an_agent_that_keeps_what_was_on_a_lost_gpu() -> Service[Any]:
    return without(NODEAGENT, GpuGone, ReplicaDraining, LeaseReleased, StopEngine)


def an_agent_that_does_not_tell_that_a_gpu_is_back() -> Service[Any]:
    return without(NODEAGENT, GpuBack, NodeJoined, TryGpu)


def a_quarantine_that_is_never_tried() -> Service[Any]:
    return without(without(NODEAGENT, QuarantineOver, TryGpu), GpuBack, TryGpu)


def _play(name: str, plant: Callable[[], Service[Any]], seed: int) -> None:
    check_gpus(seed, {name: plant()})


def _bug(name: str, plant: Callable[[], Service[Any]], guards: str, breaks: str) -> Bug:
    words = plant.__name__.replace("_", " ")
    return Bug(name=words, guards=guards, breaks=breaks, play=partial(_play, name, plant))


BUGS = (
    _bug(
        "nodeagent",
        an_agent_that_ignores_its_quarantines,
        "GPUs: quarantine",
        "the agent forgets that a GPU is quarantined, and grants on it",
    ),
    _bug(
        "placement",
        a_placement_that_ignores_quarantines_of_gpus,
        "GPUs: quarantine",
        "placement proposes to a GPU whose quarantine it has read of",
    ),
    _bug(
        "nodeagent",
        an_agent_that_does_not_count_strangers,
        "I1",
        "foreign memory is told and not counted: starts and wakes find no room",
    ),
    _bug(
        "nodeagent",
        an_agent_that_keeps_what_was_on_a_lost_gpu,
        "GPUs: lost",
        "replicas of a lost GPU keep their leases",
    ),
    _bug(
        "nodeagent",
        an_agent_that_does_not_tell_that_a_gpu_is_back,
        "GPUs: lost",
        "a GPU that came back is never offered again",
    ),
    _bug(
        "nodeagent",
        a_quarantine_that_is_never_tried,
        "GPUs: quarantine",
        "the time is over, and the GPU stays closed",
    ),
)
SOUND = Bug(name="nothing", guards="", breaks="", play=lambda seed: check_gpus(seed, {}))

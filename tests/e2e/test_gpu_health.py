"""GPUs that misbehave while the node agent runs, with real processes over the software GPU's driver."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import pytest

import softgpu
import sublet
from schemas.messages import Fact
from schemas.nodes import GpuFaulted, GpuFaultKind, GpuObserved, GpuQuarantined, GpuReinstated
from schemas.units import GiB
from tests.e2e.stack import ROOT, RunningStack, chat, eventually

pytestmark = pytest.mark.nats
T = TypeVar("T", bound=Fact)
SEEN_S = 60.0
"""A look every two seconds, and a busy machine."""
STRANGER = """
import sys
from devices.cuda import CudaDevice
device = CudaDevice(sys.argv[1])
device.allocate(int(sys.argv[2]))
print("up", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def own_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    """Of this file: a GPU that was lost takes new models only when somebody says that it is well."""
    stack = RunningStack.start(tmp_path_factory.mktemp("health") / "state")
    try:
        with stack.client() as client:
            client.deploy(sublet.deployment("chat", weights="2GB", share=0.3))
        eventually(lambda: stack.state_of("chat") == "resident", "not resident", timeout_s=SEEN_S)
        yield stack
    finally:
        assert 0 == stack.stop()


def told(stack: RunningStack, kind: type[T]) -> list[T]:
    return [fact for fact in stack.facts() if isinstance(fact, kind)]


def gpu_host(stack: RunningStack) -> softgpu.Host:
    return softgpu.Host(stack.folder.runtime / "gpu", gpus=0)


def gpus(stack: RunningStack) -> dict[str, str]:
    """{uuid: why it is quarantined} as placement lists them."""
    with stack.client() as client:
        return {gpu.gpu_uuid: gpu.quarantine_reason for node in client.nodes().nodes for gpu in node.gpus}


def reopen(stack: RunningStack) -> None:
    """The one that is quarantined, as an operator does."""
    before = len(told(stack, GpuReinstated))
    eventually(lambda: any(gpus(stack).values()), "placement has not heard of it", timeout_s=SEEN_S)
    with stack.client() as client:
        ((node, closed),) = [
            (node.node, gpu.gpu_uuid) for node in client.nodes().nodes for gpu in node.gpus if gpu.quarantine_reason
        ]
        client.reinstate_gpu(node, closed)
    eventually(lambda: len(told(stack, GpuReinstated)) > before, "it was not opened again", timeout_s=SEEN_S)
    eventually(lambda: {""} == set(gpus(stack).values()), "placement has not heard of it", timeout_s=SEEN_S)


def residents(stack: RunningStack, model: str) -> set[int]:
    """On which GPUs it is resident, as placement knows."""
    with stack.client() as client:
        view = client.deployment(model)
    return (
        {replica.gpu_index for replica in view.replicas if replica.state == "resident"} if view is not None else set()
    )


def index_of_chat(stack: RunningStack) -> int:
    (index,) = residents(stack, "chat")
    return index


def test_a_stranger_on_a_gpu_is_counted_while_it_is_there(own_stack: RunningStack, tmp_path: Path) -> None:
    """Nobody of the stack is one: engines, the holder and the memory broker use GPUs too."""
    uuid, before_count = next(iter(gpus(own_stack))), len(told(own_stack, GpuObserved))
    host = gpu_host(own_stack)
    stranger = subprocess.Popen(
        [sys.executable, "-c", STRANGER, uuid, str(10 * GiB)],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), **host.environment()},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with stranger:
        assert stranger.stdout is not None
        assert b"up\n" == stranger.stdout.readline()

        def seen() -> list[GpuObserved]:  # A look between its context and its memory is a fact of its own.
            return [fact for fact in told(own_stack, GpuObserved)[before_count:] if fact.foreign_bytes >= 10 * GiB]

        eventually(lambda: bool(seen()), "the stranger was not seen", timeout_s=SEEN_S)
        stranger.kill()

    assert {uuid} == {fact.gpu_uuid for fact in seen()}
    assert all(fact.foreign_bytes < 11 * GiB for fact in seen())

    def is_over() -> bool:
        return {fact.gpu_uuid: fact.foreign_bytes for fact in told(own_stack, GpuObserved)}[uuid] == 0

    eventually(is_over, "it still counts", timeout_s=SEEN_S + 10)


def test_an_error_of_the_applications_is_told_and_closes_nothing(own_stack: RunningStack) -> None:
    gpu_host(own_stack).send_xid(0, 31)

    def is_told() -> bool:
        return any((fact.kind, fact.code) == (GpuFaultKind.XID, 31) for fact in told(own_stack, GpuFaulted))

    eventually(is_told, "the XID was not told", timeout_s=SEEN_S)

    assert {""} == set(gpus(own_stack).values())


def test_a_lost_gpus_model_answers_from_another_one_and_the_gpu_returns(own_stack: RunningStack) -> None:
    host, index = gpu_host(own_stack), index_of_chat(own_stack)

    host.set_lost(index)
    eventually(lambda: len(gpus(own_stack)) == 1, "the loss was not told", timeout_s=SEEN_S)
    eventually(lambda: residents(own_stack, "chat") == {1 - index}, "not placed again", timeout_s=SEEN_S)
    assert chat(own_stack.openai(), "chat")
    host.set_lost(index, is_lost=False)
    eventually(lambda: len(gpus(own_stack)) == 2, "the return was not told", timeout_s=SEEN_S)
    reopen(own_stack)
    with own_stack.client() as client:  # Too large to go beside what has moved.
        client.deploy(sublet.deployment("large", weights="2GB", share=0.9, parkable=False))
        eventually(lambda: residents(own_stack, "large") == {index}, "not placed", timeout_s=SEEN_S)
        assert chat(own_stack.openai(), "large")
        client.retire("large")
    eventually(lambda: own_stack.state_of("large") == "", "it is still there", timeout_s=SEEN_S)


def test_a_gpu_that_an_operator_wants_empty_is_emptied_while_its_model_answers(own_stack: RunningStack) -> None:
    index = index_of_chat(own_stack)
    with own_stack.client() as client:
        ((node, uuid),) = [(n.node, g.gpu_uuid) for n in client.nodes().nodes for g in n.gpus if g.index == index]
        client.close_gpu(node, uuid, is_draining=True, reason="a new fan")

    # For a moment both copies are resident.
    eventually(lambda: residents(own_stack, "chat") == {1 - index}, "it was not moved", timeout_s=SEEN_S)

    assert "an operator closed it: a new fan" == gpus(own_stack)[uuid]
    assert chat(own_stack.openai(), "chat")
    reopen(own_stack)


def test_memory_errors_close_a_gpu_and_what_serves_there_goes_on(own_stack: RunningStack) -> None:
    index, before = index_of_chat(own_stack), len(told(own_stack, GpuQuarantined))

    gpu_host(own_stack).set_health(index, ecc_error_count=1)
    eventually(lambda: len(told(own_stack, GpuQuarantined)) > before, "it was not closed", timeout_s=SEEN_S)

    assert GpuFaultKind.ECC in {fact.kind for fact in told(own_stack, GpuFaulted)}
    assert chat(own_stack.openai(), "chat")
    with own_stack.client() as client:
        client.deploy(sublet.deployment("next", weights="1GB", share=0.1))
        eventually(lambda: residents(own_stack, "next") == {1 - index}, "not placed", timeout_s=SEEN_S)
        client.retire("next")
    eventually(lambda: own_stack.state_of("next") == "", "it is still there", timeout_s=SEEN_S)
    reopen(own_stack)

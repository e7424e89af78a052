"""Engines in containers, against a Docker engine: gate, port, log, end, and an agent that comes back."""

import contextlib
import json
import os
import socket
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import pytest

from schemas.deployments import EngineKind, WorkloadKind
from services.nodeagent.engine_client import EngineClient
from services.nodeagent.runtimes.api import RuntimeProblem, StartRefused
from services.nodeagent.runtimes.container import ENGINE_PORT, ContainerStart
from services.nodeagent.runtimes.docker import Containers
from tests.fixtures import docker_engine

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.docker,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        "docker" not in os.environ.get("SUBLET_TESTS_REQUIRE", "").split(","), reason="`make compose-test` runs these"
    ),
]

NETWORK = "sublet-engines-test"
"""Made by the first container that wants it; it goes with the last."""
# An OpenAI server as small as can be, with a word on its output and the variable that it was given a secret in.
ENGINE = """
import http.server, json, os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: (print("stopping", flush=True), sys.exit(3)))
print("running as", os.getpid(), "with", len(os.environ.get("HF_TOKEN", "")), "secret characters", flush=True)
class Engine(http.server.BaseHTTPRequestHandler):
    def answer(self, body):
        self.send_response(200); self.end_headers(); self.wfile.write(body.encode())
    def do_GET(self):
        self.answer("vllm:num_requests_running 0\\nvllm:num_requests_waiting 0\\n" if self.path == "/metrics"
                    else json.dumps({"data": [{"id": "chat"}]}))
    def do_POST(self):
        self.answer(json.dumps({"choices": []}))
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("0.0.0.0", int(os.environ["PORT"])), Engine).serve_forever()
"""


@pytest.fixture(scope="module")
def image() -> str:
    """A Python, made here or known to the engine; nothing is downloaded."""
    return docker_engine.ensure_base_images().get("PYTHON_IMAGE", "python:3.12-slim-bookworm")


@pytest.fixture
def node() -> Iterator[str]:
    """A name of a node of its own; what is left of its containers is removed."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    yield name
    left = docker("ps", "-aq", "--filter", f"label=sublet.node={name}").split()
    if left:
        docker("rm", "-f", *left)
    subprocess.run(["docker", "network", "rm", NETWORK], check=False, capture_output=True, timeout=60)


def docker(*words: str) -> str:
    return subprocess.run(["docker", *words], check=True, capture_output=True, text=True, timeout=120).stdout


@contextlib.asynccontextmanager
async def agent(node: str, state_dir: Path) -> AsyncIterator[Containers]:
    """One life of an agent; its containers outlive it."""
    containers: Containers | None = None
    try:
        async with anyio.create_task_group() as tasks:
            containers = Containers(
                os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock"),
                node=node,
                state_dir=state_dir,
                tasks=tasks,
                log_bytes_max=1 << 20,
                pull_deadline_s=60.0,
                docker_config=state_dir / "none",
            )
            yield containers
            tasks.cancel_scope.cancel()
    finally:
        assert containers is not None
        await containers.close()


def wish(node: str, image: str, **changes: Any) -> ContainerStart:
    start = ContainerStart(
        node=node,
        replica_id="default/chat/1",
        lease_epoch=7,
        image=image,
        arguments=("python", "-c", ENGINE),
        is_whole=True,
        environment={"PORT": str(ENGINE_PORT), "HF_TOKEN": "hf_very-secret"},
        gpu_uuids=("GPU-0",),
        gpu_access="none",
        shm_bytes=64 << 20,
        network=NETWORK,
    )
    return ContainerStart(**{name: getattr(start, name) for name in start.__slots__} | changes)


async def eventually(look: Any, *, until: Any) -> Any:
    """What `look` gives as soon as `until` holds for it."""
    with anyio.fail_after(60):
        while not until(seen := await look()):
            await anyio.sleep(0.05)
    return seen


async def words_of(view: Any) -> str:
    path = anyio.Path(view.log_path)
    return await path.read_text() if await path.exists() else ""


async def test_an_engine_runs_only_when_its_gate_is_opened(node: str, image: str, tmp_path: Path) -> None:
    """Its process is there before, so that it can be limited: with a pid, and on cgroup v2 a leaf of its own."""
    async with agent(node, tmp_path) as containers:
        view = await containers.start(wish(node, image))
        assert (True, True, None) == (view.is_alive, view.is_gated, view.exit_code)
        assert view.pid > 0
        assert ("GPU-0",) == view.gpu_uuids
        # On cgroup v2 a leaf of its own, else none: never one that it shares.
        container_id = docker("ps", "-q", "--no-trunc", "--filter", f"label=sublet.node={node}").strip()
        assert not view.namespace or container_id in view.namespace
        with pytest.raises(aiohttp.ClientError):  # Docker listens on the port; nobody answers behind it.
            async with aiohttp.ClientSession() as session:
                await session.get(f"http://127.0.0.1:{view.port}/v1/models")
        assert "running as" not in await words_of(view)

        opened = await containers.open_gate(view.replica_id, lease_epoch=7)
        await containers.open_gate(view.replica_id, lease_epoch=7)
        client, endpoint = EngineClient(), f"http://127.0.0.1:{view.port}"
        with anyio.fail_after(60):
            await client.wait_until_ready(endpoint, EngineKind.OPENAI)
        await client.verify(endpoint, "chat", WorkloadKind.INFERENCE, timeout_s=20)
        assert await client.wait_until_idle(endpoint, timeout_s=20, kind=EngineKind.OPENAI)
        await client.close()

        assert not opened.is_gated
        assert opened.pid == view.pid  # The process that was limited is the engine.
        told = await eventually(lambda: words_of(view), until=lambda text: "running as" in text)
        assert "with 14 secret characters" in told
        assert "hf_very-secret" not in told


async def test_its_port_is_on_loopback_and_no_other_container_reaches_it(node: str, image: str, tmp_path: Path) -> None:
    async with agent(node, tmp_path) as containers:
        view = await containers.start(wish(node, image))
        await containers.open_gate(view.replica_id, lease_epoch=7)
        shown = json.loads(docker("ps", "-q", "--filter", f"label=sublet.node={node}") and docker(
            "inspect", *docker("ps", "-q", "--filter", f"label=sublet.node={node}").split()
        ))[0]  # fmt: skip

    bound = shown["NetworkSettings"]["Ports"][f"{ENGINE_PORT}/tcp"]
    assert ["127.0.0.1"] == [binding["HostIp"] for binding in bound]
    network = json.loads(docker("network", "inspect", NETWORK))[0]
    assert "false" == network["Options"]["com.docker.network.bridge.enable_icc"]
    with socket.socket() as stranger:
        stranger.settimeout(5)
        assert 0 != stranger.connect_ex((_other_address(), view.port))


def _other_address() -> str:
    """One of this host's addresses that is not loopback; 127.0.0.2 stands for one where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.2"
        return str(probe.getsockname()[0])


async def test_an_agent_that_comes_back_finds_its_containers_and_their_gates(
    node: str, image: str, tmp_path: Path
) -> None:
    """One that died before it opened a gate finds it shut, and may still set limits; words go on where they were."""
    async with agent(node, tmp_path) as containers:
        before = await containers.start(wish(node, image))

    async with agent(node, tmp_path) as containers:
        found = await containers.engine(before.replica_id)
        assert found is not None
        assert (before.pid, before.started_ticks, before.port) == (found.pid, found.started_ticks, found.port)
        assert found.is_gated
        assert [before.replica_id] == [view.replica_id for view in await containers.views()]
        same = await containers.start(wish(node, image))
        assert same.pid == before.pid
        await containers.open_gate(before.replica_id, lease_epoch=7)

    async with agent(node, tmp_path) as containers:
        found = await containers.engine(before.replica_id)
        assert found is not None
        assert not found.is_gated
        await eventually(lambda: words_of(found), until=lambda text: "running as" in text)
    async with agent("another-node", tmp_path) as containers:
        assert await containers.engine(before.replica_id) is None


async def test_an_end_is_asked_for_then_waited_for_and_nothing_is_left(node: str, image: str, tmp_path: Path) -> None:
    async with agent(node, tmp_path) as containers:
        view = await containers.start(wish(node, image))
        await containers.open_gate(view.replica_id, lease_epoch=7)
        await eventually(lambda: words_of(view), until=lambda text: "running as" in text)
        ended: list[Any] = []

        async def wait() -> None:
            ended.append(await containers.wait_for_exit(view.replica_id, lease_epoch=7, timeout_s=60))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await anyio.sleep(0.2)
            await containers.stop(view.replica_id, lease_epoch=6, grace_s=10)  # Of another lease: not this one.
            assert not ended
            await containers.stop(view.replica_id, lease_epoch=7, grace_s=10)
        await containers.stop(view.replica_id, lease_epoch=7, grace_s=10)
        await containers.forget(view.replica_id, lease_epoch=7)
        await containers.forget(view.replica_id, lease_epoch=7)

        assert "stopping" in await words_of(ended[0])
        assert (False, 3) == (ended[0].is_alive, ended[0].exit_code)
        assert await containers.engine(view.replica_id) is None
        with pytest.raises(RuntimeProblem) as unknown:
            await containers.wait_for_exit(view.replica_id, lease_epoch=7, timeout_s=1)
        assert 404 == unknown.value.status
        with pytest.raises(StartRefused, match="ended"):  # A start that was still on its way begins nothing.
            await containers.start(wish(node, image))


async def test_one_that_does_not_listen_is_killed(node: str, image: str, tmp_path: Path) -> None:
    deaf = wish(node, image, arguments=("sh", "-c", "trap '' TERM; echo deaf; while :; do sleep 1; done"))
    async with agent(node, tmp_path) as containers:
        view = await containers.start(deaf)
        await containers.open_gate(view.replica_id, lease_epoch=7)
        await eventually(lambda: words_of(view), until=lambda text: "deaf" in text)
        with anyio.fail_after(60):
            await containers.stop(view.replica_id, lease_epoch=7, grace_s=1)
        ended = await containers.engine(view.replica_id)

    assert ended is not None
    assert (False, -9) == (ended.is_alive, ended.exit_code)


async def test_the_images_own_program_runs_where_none_is_given(node: str, image: str, tmp_path: Path) -> None:
    """As `docker run` does it: the entrypoint stays, options take the place of the image's command."""
    own = docker("create", "--entrypoint", "echo", image, "own command").strip()
    tag = f"sublet-test:{node}"
    docker("commit", own, tag)
    docker("rm", own)
    try:
        async with agent(node, tmp_path) as containers:
            for replica_id, arguments, said in (("a", (), "own command"), ("b", ("given", "options"), "given options")):
                start = wish(node, tag, replica_id=replica_id, arguments=arguments, is_whole=False)
                view = await containers.start(start)
                await containers.open_gate(replica_id, lease_epoch=7)
                ended = await containers.wait_for_exit(replica_id, lease_epoch=7, timeout_s=60)
                assert 0 == ended.exit_code
                await eventually(lambda view=view: words_of(view), until=lambda text, said=said: said in text)
                await containers.forget(replica_id, lease_epoch=7)
    finally:
        docker("rmi", "-f", tag)


async def test_an_image_that_cannot_be_had_is_a_refusal_with_its_reason_in_the_log(node: str, tmp_path: Path) -> None:
    async with agent(node, tmp_path) as containers:
        start = wish(node, "127.0.0.1:1/no/such-image:1")
        with pytest.raises(StartRefused, match="such-image"):
            await containers.start(start)
        log = tmp_path / "containers" / "default%2Fchat%2F1.log"

    assert "pulling 127.0.0.1:1/no/such-image:1" in log.read_text()

"""What Docker is told about an engine's container, and how a download is told about; without any Docker."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio
import pytest
from aiohttp import web

from schemas.deployments import EngineKind
from services.nodeagent.adapters.api import runtime_of
from services.nodeagent.adapters.registry import ADAPTERS
from services.nodeagent.launch import container_job, container_start
from services.nodeagent.runtimes.api import RuntimeProblem, StartRefused
from services.nodeagent.runtimes.container import (
    GATE,
    ContainerStart,
    configuration,
    container_name,
    exit_code,
    is_gate,
)
from services.nodeagent.runtimes.docker import Containers
from services.nodeagent.runtimes.leaf import leaf_of
from services.nodeagent.runtimes.pulling import PullProgress, credentials, registry_of, whole_name
from services.nodeagent.runtimes.secrets import secrets_of
from services.nodeagent.settings import NodeAgentSettings
from tests.unit.nodeagent.test_adapters import job

IMAGE = {"Config": {"Entrypoint": ["/opt/serve"], "Cmd": ["--quick"]}}


def start(kind: EngineKind, *, settings: Mapping[str, Any] | None = None, **engine: Any) -> ContainerStart:
    planned = job(kind, **engine)
    wish = container_job(planned.replica, rooms=planned.rooms, settings=NodeAgentSettings(**settings or {}))
    return container_start(wish, lease_epoch=3, environment={"SUBLET_REPLICA_ID": "r"})


def test_engines_in_containers_are_those_that_say_so_name_an_image_or_come_as_nothing_else() -> None:
    def runtime(kind: EngineKind, **engine: Any) -> str:
        return runtime_of(job(kind, **engine).deployment, ADAPTERS[kind])

    assert "docker" == runtime(EngineKind.NIM)
    assert "process" == runtime(EngineKind.VLLM)
    assert "docker" == runtime(EngineKind.VLLM, image="vllm/vllm-openai:v1")
    assert "docker" == runtime(EngineKind.VLLM, runtime="docker")
    assert "process" == runtime(EngineKind.VLLM, runtime="process", image="unused")


def test_a_container_begins_at_its_gate_with_its_gpus_and_one_port_of_loopback() -> None:
    told = configuration(start(EngineKind.VLLM, gpus=2), image=IMAGE)

    assert list(GATE) == told["Entrypoint"]
    assert told["OpenStdin"]
    assert not told["StdinOnce"]  # A gate stays shut, not broken, when the agent dies before it opens it.
    assert ["vllm", "serve", "org/model"] == told["Cmd"][:3]
    assert [{"Driver": "nvidia", "DeviceIDs": ["GPU-0", "GPU-1"], "Capabilities": [["gpu"]]}] == told["HostConfig"][
        "DeviceRequests"
    ]
    assert {"8000/tcp": [{"HostIp": "127.0.0.1", "HostPort": ""}]} == told["HostConfig"]["PortBindings"]
    assert "sublet-engines" == told["HostConfig"]["NetworkMode"]
    assert ["no-new-privileges"] == told["HostConfig"]["SecurityOpt"]
    assert 16 << 30 == told["HostConfig"]["ShmSize"]
    assert ("r", "3", "GPU-0,GPU-1") == tuple(
        told["Labels"][f"sublet.{name}"] for name in ("replica_id", "lease_epoch", "gpu_uuids")
    )
    assert "--port" in told["Cmd"]
    assert "8000" == told["Cmd"][told["Cmd"].index("--port") + 1]
    assert "0.0.0.0" == told["Cmd"][told["Cmd"].index("--host") + 1]  # Of its own network.


def test_a_port_is_published_elsewhere_only_where_engines_are_reached_at_an_address() -> None:
    def host(engine_host: str) -> str:
        told = configuration(start(EngineKind.VLLM, settings={"engine_host": engine_host}), image=IMAGE)
        return str(told["HostConfig"]["PortBindings"]["8000/tcp"][0]["HostIp"])

    assert ["127.0.0.1", "10.0.0.7", "127.0.0.1"] == [host(name) for name in ("127.0.0.1", "10.0.0.7", "engines")]


def test_gpus_come_by_the_toolkit_by_cdi_or_not_at_all() -> None:
    cdi = configuration(start(EngineKind.NIM, settings={"docker_gpu_access": "cdi"}, image="nim"), image=IMAGE)
    none = configuration(start(EngineKind.NIM, settings={"docker_gpu_access": "none"}, image="nim"), image=IMAGE)

    assert [{"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=GPU-0"]}] == cdi["HostConfig"]["DeviceRequests"]
    assert "DeviceRequests" not in none["HostConfig"]


def test_an_image_starts_its_own_program_unless_one_is_given() -> None:
    nim = configuration(start(EngineKind.NIM, image="nim"), image=IMAGE)
    llama = configuration(start(EngineKind.LLAMA_SERVER, image="llama"), image=IMAGE)
    own = configuration(start(EngineKind.OPENAI, image="any", command=("serve", "{port}")), image=IMAGE)

    assert ["/opt/serve", "--quick"] == nim["Cmd"]
    assert ["/opt/serve", "--hf-repo"] == llama["Cmd"][:2]  # Options take the place of the image's command.
    assert ["serve", "8000"] == own["Cmd"]


def test_an_engine_without_any_image_is_refused() -> None:
    with pytest.raises(StartRefused, match="needs an image"):
        start(EngineKind.OPENAI, runtime="docker", command=("serve",))


def test_weights_and_the_broker_are_seen_through_mounts() -> None:
    planned = job(EngineKind.VLLM)
    settings = NodeAgentSettings(weight_cache_dir="/var/weights", docker_mounts=("/srv/models:/models:ro",))
    wish = container_start(
        container_job(planned.replica, rooms=planned.rooms, settings=settings),
        lease_epoch=3,
        environment={"SUBLET_BROKER_SOCKET": "/run/sublet/broker/engines.sock"},
    )
    told = configuration(wish, image=IMAGE)

    assert [
        "/srv/models:/models:ro", "/var/weights:/sublet/weights:rw", "/run/sublet/broker:/sublet/broker:ro",
    ] == told["HostConfig"]["Binds"]  # fmt: skip
    assert "HF_HOME=/sublet/weights" in told["Env"]
    assert "SUBLET_BROKER_SOCKET=/sublet/broker/engines.sock" in told["Env"]


def test_what_the_node_gives_goes_over_what_a_deployment_sets() -> None:
    told = configuration(start(EngineKind.VLLM, environment={"SUBLET_REPLICA_ID": "another", "A": "b"}), image=IMAGE)

    assert "SUBLET_REPLICA_ID=r" in told["Env"]
    assert "A=b" in told["Env"]


def test_names_of_containers_are_unique_whatever_a_replica_is_called() -> None:
    names = {container_name("node", replica_id) for replica_id in ("a/b", "a-b", "a.b", "ä/b", "x" * 200)}

    assert 5 == len(names)
    assert all(len(name) < 80 and name.replace("-", "").replace(".", "").isalnum() for name in names)


def test_a_gate_is_known_by_its_words_and_a_signal_by_its_number() -> None:
    assert is_gate(['/bin/sh -c read -r _ && exec "$@" </dev/null sublet-gate vllm serve'])
    assert is_gate([" ".join(GATE)[:26]]), "ps may cut lines"
    assert not is_gate(["vllm serve sublet-gateway"])


@pytest.mark.parametrize("words", ["runc init", "/usr/bin/runc init", "/proc/self/exe init", "/proc/self/fd/6 init"])
def test_dockers_own_program_is_a_gate_that_is_not_there_yet(words: str) -> None:
    assert is_gate([words])
    assert not is_gate(["python init"])
    assert [0, 3, -9, -15] == [exit_code(code) for code in (0, 3, 137, 143)]


def test_a_leaf_is_where_the_kernel_says_and_none_where_it_cannot_be_seen(tmp_path: Path) -> None:
    proc, mount = tmp_path / "proc", tmp_path / "cgroup"
    for pid, lines in (
        (1, "0::/docker/abc\n"),
        (2, "4:memory:/docker/abc\n"),
        (3, "0::/\n"),
        (4, "0::/../abc\n"),
        (6, "0::/system.slice/docker.service\n"),
    ):
        (proc / str(pid)).mkdir(parents=True)
        (proc / str(pid) / "cgroup").write_text(lines)
    (mount / "docker" / "abc").mkdir(parents=True)
    (mount / "cgroup.controllers").touch()
    (mount / "system.slice" / "docker.service").mkdir(parents=True)
    (mount / "system.slice" / "docker.service" / "cgroup.procs").touch()  # Of all containers.
    (mount / "docker" / "abc" / "cgroup.procs").touch()

    found = [leaf_of(pid, container_id="abc", proc=proc, mounts=(mount,)) for pid in (1, 2, 3, 4, 5, 6)]
    assert [f"{mount}/docker/abc", "", "", "", "", ""] == found
    assert not leaf_of(1, container_id="abc", proc=proc, mounts=(tmp_path,))  # cgroup v1: no controllers of v2 there.


def test_secrets_are_read_from_files_and_a_refusal_tells_names_only(tmp_path: Path) -> None:
    (tmp_path / "HF_TOKEN").write_text("hf_very-secret\n")
    (tmp_path / "PICTURE").write_bytes(b"\xff\xfe")

    assert {"HF_TOKEN": "hf_very-secret"} == secrets_of(["HF_TOKEN"], folder=str(tmp_path))
    assert {} == secrets_of([], folder="")
    for names, folder in ((["NGC_API_KEY"], tmp_path), (["../HF_TOKEN"], tmp_path), (["PICTURE"], tmp_path)):
        with pytest.raises(StartRefused) as refused:
            secrets_of(names, folder=str(folder))
        assert "hf_very" not in str(refused.value)
    with pytest.raises(StartRefused, match="no folder for secrets"):
        secrets_of(["HF_TOKEN"], folder="")


def test_what_a_container_is_started_with_does_not_show_its_secrets() -> None:
    planned = start(EngineKind.VLLM, environment={"A": "hf_very-secret"})

    assert "hf_very" not in repr(planned)


LINES: list[dict[str, Any]] = [
    {"status": "Pulling from nim/chat", "id": "1"},
    {"status": "Pulling fs layer", "id": "aaa", "progressDetail": {}},
    {"status": "Already exists", "id": "bbb", "progressDetail": {}},
    {"status": "Downloading", "id": "aaa", "progressDetail": {"current": 2_000_000_000, "total": 4_000_000_000}},
    {"status": "Downloading", "id": "ccc", "progressDetail": {"current": 500_000_000, "total": 1_000_000_000}},
    {"status": "Download complete", "id": "ccc", "progressDetail": {}},
    {"status": "Digest: sha256:0"},
]


def test_a_download_tells_how_far_it_is() -> None:
    progress = PullProgress(image="nim/chat:1")
    for line in LINES:
        progress.add(line)

    assert "sublet: pulling nim/chat:1: 3.0 of 5.0 GB known, 1 of 3 layers" == progress.told()
    progress.add({"status": "Pull complete", "id": "aaa", "progressDetail": {}})
    assert "5.0 of 5.0 GB known, 2 of 3 layers" in progress.told()


def test_a_login_is_found_for_the_registry_in_an_images_name() -> None:
    login = base64.b64encode(b"$oauthtoken:key:with:colons").decode()
    config = {"auths": {"nvcr.io": {"auth": login}, "https://index.docker.io/v1/": {"auth": login}, "x.io": {}}}

    assert ["nvcr.io", "docker.io", "docker.io", "localhost:5000"] == [
        registry_of(image) for image in ("nvcr.io/nim/a:1", "vllm/vllm-openai", "debian", "localhost:5000/a")
    ]
    assert {"username": "$oauthtoken", "password": "key:with:colons", "serveraddress": "nvcr.io"} == credentials(
        config, "nvcr.io/nim/a:1"
    )
    assert credentials(config, "vllm/vllm-openai") is not None
    assert credentials(config, "x.io/a") is None
    assert credentials({}, "nvcr.io/nim/a:1") is None
    assert "docker.io/vllm/vllm-openai" == whole_name("vllm/vllm-openai")
    assert "nvcr.io/nim/a" == whole_name("nvcr.io/nim/a")


@pytest.mark.processes
@pytest.mark.anyio
async def test_a_lease_that_ends_while_its_image_arrives_starts_nothing(tmp_path: Path) -> None:
    """A download takes an hour; whoever ends the lease meanwhile must not find a container after it."""
    asked: list[str] = []
    is_over = anyio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        asked.append(f"{request.method} {request.path}")
        match request.path.rpartition("/")[2]:
            case "version":
                return web.json_response({"ApiVersion": "1.45"})
            case "create" if "images" in request.path:
                response = web.StreamResponse(headers={"Content-Type": "application/json"})
                await response.prepare(request)
                for line in LINES:
                    await response.write(json.dumps(line).encode() + b"\r\n")
                await is_over.wait()
                return response
            case _ if "containers" in request.path:
                return web.json_response([])
        return web.json_response({"message": "No such image"}, status=404)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "docker.sock")).start()
    refused: list[str] = []
    try:
        async with anyio.create_task_group() as tasks:
            containers = Containers(
                f"unix://{tmp_path}/docker.sock", node="node", state_dir=tmp_path, tasks=tasks,
                log_bytes_max=1 << 20, pull_deadline_s=600.0, docker_config=tmp_path / "none",
            )  # fmt: skip

            async def begin() -> None:
                try:
                    await containers.start(start(EngineKind.NIM, image="nim/chat:1"))
                except StartRefused as why:
                    refused.append(str(why))

            tasks.start_soon(begin)
            with anyio.fail_after(60):
                while not any("images/create" in line for line in asked):
                    await anyio.sleep(0.01)
                pulling = await containers.engine("r")
                assert pulling is not None
                assert (True, True, 0) == (pulling.is_alive, pulling.is_gated, pulling.pid)
                await containers.stop("r", lease_epoch=3, grace_s=1)
            assert await containers.engine("r") is None
            assert "nim/chat:1" in await anyio.Path(pulling.log_path).read_text()
            await containers.close()
    finally:
        is_over.set()
        await runner.cleanup()

    assert ["its lease ended while it was being started"] == refused
    assert not [line for line in asked if line.startswith("POST") and "/containers/" in line]


@pytest.mark.anyio
async def test_where_no_docker_answers_there_is_no_engine_unless_one_was_made_here(tmp_path: Path) -> None:
    """No answer is not `none`: bytes of an engine that may run are not free, and not a stranger's."""
    async with anyio.create_task_group() as tasks:
        containers = Containers(
            f"unix://{tmp_path}/nobody.sock", node="node", state_dir=tmp_path, tasks=tasks,
            log_bytes_max=1 << 20, pull_deadline_s=1.0, docker_config=tmp_path / "none",
        )  # fmt: skip
        assert await containers.engine("r") is None
        assert () == await containers.views()
        with pytest.raises(StartRefused, match="does not answer"):
            await containers.start(start(EngineKind.VLLM))
        (tmp_path / "containers" / "r.made").touch()
        for asked in (containers.engine("r"), containers.views()):
            with pytest.raises(RuntimeProblem):
                await asked
        await containers.close()

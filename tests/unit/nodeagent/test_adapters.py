"""What each kind of engine is told at its start: only what its documentation knows, and never to listen in public."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from schemas.deployments import DeploymentSpec, EngineKind, EngineSpec, ShareSpec, SwapDriver, SwapSpec
from schemas.placement import ReplicaProposal, ShareProposal
from schemas.units import GiB, MiB
from services.nodeagent.adapters.api import Command, Job, Room, gauge
from services.nodeagent.adapters.registry import ADAPTERS
from services.nodeagent.launch import engine_start, process_job
from services.nodeagent.settings import NodeAgentSettings

DOCUMENTED: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "data" / "engine_options.json").read_text()
)
REAL = [EngineKind(kind) for kind in DOCUMENTED]
GPU_BYTES = 80 * GiB


def job(
    kind: EngineKind,
    *,
    gpus: int = 1,
    granted_bytes: int = 40 * GiB,
    visible_bytes: int = GPU_BYTES,
    free_bytes: int = GPU_BYTES,
    is_parkable: bool = True,
    host: str = "127.0.0.1",
    port: str = "8001",
    weight_cache: str = "",
    **engine: Any,
) -> Job:
    spec = DeploymentSpec(
        name="chat",
        engine=EngineSpec(kind=kind, weights_bytes=15 * GiB, **({"model": "org/model"} | engine)),
        share=ShareSpec(request_bytes=granted_bytes, gpu_count=gpus),
        swap=SwapSpec(is_parkable=is_parkable),
    )
    shares = tuple(
        ShareProposal(
            replica_id="r", shard_index=index, gpu_uuid=f"GPU-{index}",
            request_bytes=granted_bytes, limit_bytes=granted_bytes,
        )
        for index in range(gpus)
    )  # fmt: skip
    return Job(
        replica=ReplicaProposal(replica_id="r", deployment_id="d", tenant="t", deployment=spec, shares=shares),
        rooms=tuple(
            Room(
                gpu_uuid=share.gpu_uuid,
                granted_bytes=granted_bytes,
                visible_bytes=visible_bytes,
                free_bytes=free_bytes,
            )
            for share in shares
        ),
        settings=NodeAgentSettings(),
        host=host,
        port=port,
        weight_cache=weight_cache,
    )


def command(kind: EngineKind, **settings: Any) -> Command:
    return ADAPTERS[kind].command(job(kind, **settings))


def options_of(words: tuple[str, ...]) -> dict[str, str]:
    """{option: what follows it}; an option that stands alone has the empty text."""
    found: dict[str, str] = {}
    for word, following in zip(words, (*words, "--")[1:], strict=True):
        if word.startswith("--"):
            found[word.removeprefix("--")] = "" if following.startswith("--") else following
    return found


VARIANTS: list[dict[str, Any]] = [
    {},
    {"gpus": 4},
    {"weight_cache": "/weights"},
    {"is_parkable": False},
    {"model": "/models/chat.gguf"},
    *({"swap_driver": driver} for driver in SwapDriver),
]


@pytest.mark.parametrize("kind", REAL)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_option_and_variable_is_one_that_the_engine_documents(kind: EngineKind, variant: dict[str, Any]) -> None:
    """An option that is gone, or was never there, ends an engine at its start, on every node at once."""
    started = command(kind, **variant)

    through = shlex.split(started.environment.get("NIM_PASSTHROUGH_ARGS", ""))
    passed = options_of(started.options) | options_of(tuple(through))
    assert passed.keys() <= set(DOCUMENTED[kind]["options"])
    assert started.environment.keys() <= set(DOCUMENTED[kind]["variables"])


@pytest.mark.parametrize("kind", REAL)
def test_every_route_and_gauge_is_one_that_the_engine_documents(kind: EngineKind) -> None:
    adapter, documented = ADAPTERS[kind], DOCUMENTED[kind]

    assert adapter.gauges is not None
    names = (*adapter.gauges.running, *adapter.gauges.waiting, *adapter.gauges.kv_used_fraction)
    assert set(names) <= set(documented["metrics"])
    routes = {*adapter.ready_routes, adapter.sleeping_route, adapter.gauges.route} - {""}
    assert routes <= set(documented["routes"])


def test_every_kind_of_engine_has_an_adapter() -> None:
    assert set(EngineKind) == set(ADAPTERS)


@pytest.mark.parametrize("kind", [EngineKind.VLLM, EngineKind.SGLANG, EngineKind.LLAMA_SERVER])
def test_an_engine_listens_on_loopback_and_is_named_as_clients_name_it(kind: EngineKind) -> None:
    options = options_of(command(kind).options)

    assert ("127.0.0.1", "8001") == (options["host"], options["port"])
    assert "chat" == options.get("served-model-name", options.get("alias"))


def test_our_own_engines_listen_on_loopback_unless_they_are_told_another_address() -> None:
    assert "--host" not in command(EngineKind.SIMULATED).arguments
    assert "0.0.0.0" == options_of(command(EngineKind.SIMULATED, host="0.0.0.0").arguments)["host"]


def test_vllm_counts_its_part_of_the_total_that_it_sees() -> None:
    """Its context comes on top of what it counts; where the driver limits it, the total is its grant."""
    whole = options_of(command(EngineKind.VLLM).options)["gpu-memory-utilization"]
    limited = options_of(command(EngineKind.VLLM, visible_bytes=40 * GiB).options)["gpu-memory-utilization"]

    assert ("0.4921", "0.9843") == (whole, limited)
    assert float(whole) * GPU_BYTES <= 40 * GiB - 640 * MiB


def test_sglang_fills_its_part_of_what_is_free() -> None:
    """Beside a neighbour that holds half of the GPU the part is twice as large, and as many bytes."""
    alone = float(options_of(command(EngineKind.SGLANG).options)["mem-fraction-static"])
    beside = float(options_of(command(EngineKind.SGLANG, free_bytes=40 * GiB).options)["mem-fraction-static"])

    seen_alone, seen_beside = GPU_BYTES - 640 * MiB, 40 * GiB - 640 * MiB
    assert alone * seen_alone == pytest.approx(beside * seen_beside, rel=1e-3)
    assert beside * seen_beside <= 40 * GiB - 640 * MiB - 4 * GiB


def test_llama_server_leaves_free_what_is_not_granted_to_it() -> None:
    options = options_of(command(EngineKind.LLAMA_SERVER, gpus=2).options)

    assert f"{40 * 1024 + 640},{40 * 1024 + 640}" == options["fit-target"]
    assert "all" == options["n-gpu-layers"]


def test_llama_server_takes_a_file_or_a_repository() -> None:
    assert "org/model" == options_of(command(EngineKind.LLAMA_SERVER).options)["hf-repo"]
    path = options_of(command(EngineKind.LLAMA_SERVER, model="/models/chat.gguf").options)
    assert "/models/chat.gguf" == path["model"]
    assert "hf-repo" not in path


def test_a_share_of_several_gpus_is_served_by_all_of_them() -> None:
    assert "4" == options_of(command(EngineKind.VLLM, gpus=4).options)["tensor-parallel-size"]
    assert "4" == options_of(command(EngineKind.SGLANG, gpus=4).options)["tensor-parallel-size"]
    through = shlex.split(command(EngineKind.NIM, gpus=4).environment["NIM_PASSTHROUGH_ARGS"])
    assert "4" == options_of(tuple(through))["tensor-parallel-size"]


def test_the_development_mode_of_vllm_is_on_only_where_its_sleep_is_needed() -> None:
    """Its routes let a caller run anything."""
    assert "1" == command(EngineKind.VLLM).environment["VLLM_SERVER_DEV_MODE"]
    for never in ({"is_parkable": False}, {"swap_driver": SwapDriver.CHECKPOINT}):
        started = command(EngineKind.VLLM, **never)
        assert "VLLM_SERVER_DEV_MODE" not in started.environment
        assert "--enable-sleep-mode" not in started.options


def test_vllm_keeps_its_weights_in_our_store_only_where_that_is_asked_for() -> None:
    """The plugin has to be installed there, which nobody can see from outside."""
    asked = options_of(command(EngineKind.VLLM, swap_driver=SwapDriver.STORE).options)

    assert "sublet-store" == asked["sleep-mode-backend"]
    assert "sleep-mode-backend" not in options_of(command(EngineKind.VLLM).options)


def test_own_arguments_win_and_true_is_an_option_that_stands_alone() -> None:
    own = {"gpu-memory-utilization": "0.3", "enable-prefix-caching": "true", "enforce-eager": "false"}
    started = command(EngineKind.VLLM, arguments=own)

    options = options_of(started.options)
    assert "0.3" == options["gpu-memory-utilization"]
    assert "" == options["enable-prefix-caching"]
    assert "enforce-eager" not in options
    assert 1 == started.options.count("--gpu-memory-utilization")


def test_nim_is_told_by_variables_which_model_and_where_it_listens() -> None:
    started = command(EngineKind.NIM, weight_cache="/weights")

    assert () == started.arguments  # What the image starts by itself.
    assert "hf://org/model" == started.environment["NIM_MODEL_PATH"]
    assert ("chat", "8001") == (started.environment["NIM_SERVED_MODEL_NAME"], started.environment["NIM_SERVER_PORT"])
    assert "/weights" == started.environment["NIM_CACHE_PATH"]
    assert "NIM_MODEL_PATH" not in command(EngineKind.NIM, model="").environment
    assert "ngc://a/b" == command(EngineKind.NIM, model="ngc://a/b").environment["NIM_MODEL_PATH"]


def test_the_places_in_a_command_of_ones_own_are_filled_in() -> None:
    words = ("serve", "--at={port}", "{model}", "{memory_bytes}")
    started = command(EngineKind.OPENAI, command=words, arguments={"fast": "true"})

    assert ("serve", "--at=8001", "org/model", str(40 * GiB), "--fast") == started.arguments
    assert ("127.0.0.1", "8001") == (started.environment["HOST"], started.environment["PORT"])


def test_a_program_of_ones_own_takes_the_place_of_the_usual_one_and_keeps_its_options() -> None:
    started = command(EngineKind.VLLM, command=("/opt/vllm/bin/vllm", "serve"))

    assert ("/opt/vllm/bin/vllm", "serve", "org/model", "--host") == started.arguments[:4]


METRICS = """# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="chat"} 3.0
vllm:num_requests_running{engine="1",model_name="chat"} 2.0
vllm:num_requests_running_total{engine="0"} 900.0
vllm:num_requests_waiting{engine="0",model_name="chat"} 0.0
llamacpp:requests_processing 1
"""


def test_a_gauge_is_the_sum_of_its_samples_and_one_that_is_not_there_is_not_zero() -> None:
    assert 5 == gauge(METRICS, ("vllm:num_requests_running",))
    assert 0 == gauge(METRICS, ("vllm:num_requests_waiting",))
    assert 1 == gauge(METRICS, ("nothing", "llamacpp:requests_processing"))
    assert gauge(METRICS, ("sglang:num_running_reqs",)) is None
    assert gauge("a NaN\n", ("a",)) is None


def test_a_start_on_this_host_is_bound_to_loopback_unless_engines_have_a_network_of_their_own() -> None:
    proposal = job(EngineKind.VLLM).replica
    private = process_job(proposal, rooms=job(EngineKind.VLLM).rooms, settings=NodeAgentSettings(), python="python")
    apart = process_job(
        proposal, rooms=private.rooms, settings=NodeAgentSettings(engine_host="engines"), python="python"
    )

    assert ("127.0.0.1", "0.0.0.0") == (private.host, apart.host)


def test_what_a_deployment_sets_itself_goes_over_what_its_engine_needs_and_what_all_inherit() -> None:
    wished = job(EngineKind.VLLM, environment={"VLLM_SERVER_DEV_MODE": "0", "LANG": "C"})
    wish = engine_start(wished, lease_epoch=3, environment={"LANG": "C.UTF-8", "PATH": "/bin"})

    assert {"VLLM_SERVER_DEV_MODE": "0", "LANG": "C", "PATH": "/bin"} == wish.environment
    assert ("GPU-0",) == wish.gpu_uuids

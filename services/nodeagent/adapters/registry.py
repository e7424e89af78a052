"""Every kind of engine; one more is one more module here and one line there."""

from collections.abc import Mapping
from typing import Final

from schemas.deployments import DeploymentSpec, EngineKind, Runtime
from services.nodeagent.adapters.api import Adapter, runtime_of
from services.nodeagent.adapters.llama_server import LlamaServer
from services.nodeagent.adapters.nim import Nim
from services.nodeagent.adapters.openai import OpenAi
from services.nodeagent.adapters.ours import Simulated, Training
from services.nodeagent.adapters.sglang import Sglang
from services.nodeagent.adapters.vllm import Vllm

ADAPTERS: Final[Mapping[EngineKind, Adapter]] = {
    adapter.kind: adapter for adapter in (Simulated(), Training(), Vllm(), Sglang(), Nim(), LlamaServer(), OpenAi())
}


def is_container(spec: DeploymentSpec) -> bool:
    """Whether its program runs in a container of the host's Docker engine; else it is a process of the holder."""
    return runtime_of(spec, ADAPTERS[spec.engine.kind]) is Runtime.DOCKER

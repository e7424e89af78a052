"""Every kind of engine; one more is one more module here and one line there."""

from collections.abc import Mapping
from typing import Final

from schemas.deployments import EngineKind
from services.nodeagent.adapters.api import Adapter
from services.nodeagent.adapters.llama_server import LlamaServer
from services.nodeagent.adapters.nim import Nim
from services.nodeagent.adapters.openai import OpenAi
from services.nodeagent.adapters.ours import Simulated, Training
from services.nodeagent.adapters.sglang import Sglang
from services.nodeagent.adapters.vllm import Vllm

ADAPTERS: Final[Mapping[EngineKind, Adapter]] = {
    adapter.kind: adapter for adapter in (Simulated(), Training(), Vllm(), Sglang(), Nim(), LlamaServer(), OpenAi())
}

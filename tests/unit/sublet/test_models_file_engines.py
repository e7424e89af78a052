"""What a models file says of real engines."""

from pathlib import Path

import pytest

from sublet import _contract as contract
from sublet.models_file import InvalidFiles, parse, read_files
from sublet.positions import Problem

ROOT = Path(__file__).parents[3]


def problems(text: str) -> tuple[Problem, ...]:
    with pytest.raises(InvalidFiles) as told:
        parse(text)
    return told.value.problems


def test_every_setting_of_a_real_engine_reaches_the_wire() -> None:
    (spec,) = parse(
        """
models:
  chat:
    engine: vllm
    image: vllm/vllm-openai:v0.33.0
    command: [vllm, serve]
    runtime: docker
    environment: {VLLM_LOGGING_LEVEL: DEBUG, OMP_NUM_THREADS: 4, TOKENIZERS_PARALLELISM: false}
    secrets: [HF_TOKEN]
    swap: sleep-checkpoint
    elastic: true
    weights: 15GB
    share: 0.5
    burst_weight: 3
    compute: 0.5
"""
    )

    assert spec.engine == contract.EngineSpec(
        kind="vllm",
        weights_bytes=15_000_000_000,
        image="vllm/vllm-openai:v0.33.0",
        command=("vllm", "serve"),
        environment={"VLLM_LOGGING_LEVEL": "DEBUG", "OMP_NUM_THREADS": "4", "TOKENIZERS_PARALLELISM": "false"},
        secrets=("HF_TOKEN",),
        runtime="docker",
        swap_driver="sleep-checkpoint",
        is_elastic=True,
    )
    assert spec.share == contract.ShareSpec(request_portion=0.5, burst_weight=3, compute_portion=0.5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("engine: openai", "engine openai needs a command or an image that serves the model"),
        ("engine: openai, runtime: process", "engine openai needs a command or an image"),
        ("engine: nim", "engine nim needs an image to run in a container"),
        ("engine: nim, image: a, runtime: process", "engine nim runs in containers only"),
        ("engine: simulated, runtime: docker", "engine simulated needs an image to run in a container"),
        ("engine: vllm, image: a, runtime: process", "an image is for runtime docker"),
        ("engine: vllm, image: 'a b'", "image must be the name of an image such as vllm/vllm-openai:v0.33.0; found"),
        ("engine: vllm, command: vllm serve", "command must be a list of words such as [my-server, --port, '{port}']"),
        ("engine: vllm, environment: {HF_TOKEN: x}", "HF_TOKEN looks like a secret"),
        ("engine: vllm, environment: {db_password: x}", "db_password looks like a secret"),
        ("engine: vllm, environment: {SUBLET_BROKER_KEY: x}", "the variable SUBLET_BROKER_KEY is the node agent's"),
        ("engine: vllm, environment: {a-b: x}", "'a-b' is no name of a variable; use letters, digits and _"),
        ("engine: vllm, environment: {A: x}, secrets: [A]", "A is given twice, as a variable and as a secret"),
        ("engine: vllm, secrets: [../A]", "secrets.0 must be the name of a variable such as HF_TOKEN; found '../A'"),
        ("engine: vllm, arguments: {port: 1}", "the option port is the node agent's"),
        ("engine: llama-server, arguments: {hf-token: x}", "the option hf-token looks like a secret"),
        ("engine: sglang, swap: http-sleep", "engine sglang cannot be parked by http-sleep"),
        ("engine: vllm, swap: sleep", "unknown swap 'sleep'; use one of store, http-sleep"),
        ("engine: vlm", "unknown engine 'vlm'; use one of"),
        ("engine: vllm, burst_weight: 0", "burst_weight must be a whole number from 1 to 1000; found '0'"),
        ("engine: vllm, compute: 2", "compute must be a part of a GPU's processors such as 0.5, at most 1; found '2'"),
    ],
)  # fmt: skip
def test_what_cannot_be_started_is_told_before_it_is_sent(words: str, message: str) -> None:
    (told,) = problems(f"models:\n  chat: {{weights: 1GB, share: 0.3, {words}}}\n")

    assert told.message.startswith(message)


def test_a_secret_in_the_environment_is_told_where_it_belongs() -> None:
    (problem,) = problems("models:\n  chat: {engine: vllm, weights: 1GB, share: 0.3, environment: {HF_TOKEN: hf_x}}\n")

    assert problem.hint == "write `secrets: [HF_TOKEN]` and put its value on the nodes (secrets_dir)"


def test_the_example_has_one_of_each_real_engine() -> None:
    specs = read_files([ROOT / "examples" / "real-engines.yaml"])

    assert {spec.engine.kind for spec in specs} == set(contract.ENGINES) - {"simulated", "training"}

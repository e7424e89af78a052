"""The simulated engine as its clients see it, over HTTP, on a software GPU in phantom mode."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.unit.engines.running import MISTRAL, Engine, simulated, software_host

CHAT = {"model": MISTRAL, "messages": [{"role": "user", "content": "Say something."}], "max_tokens": 8}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with software_host(phantom=True) as host, simulated(host) as engine:
        yield engine.ready()


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_models_route_names_the_model(engine: Engine) -> None:
    (entry,) = engine.get("/v1/models").json["data"]

    assert (entry["id"], entry["object"], entry["state"]) == (MISTRAL, "model", "resident")
    assert engine.get(f"/v1/models/{MISTRAL}").json["id"] == MISTRAL
    assert engine.get("/v1/models/other").error["code"] == "model_not_found"


def test_a_chat_answer_has_the_shape_of_the_official_one(engine: Engine) -> None:
    answer = engine.post("/v1/chat/completions", CHAT).json

    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + 8


def test_a_stream_says_the_same_as_the_whole_answer(engine: Engine) -> None:
    whole = engine.post("/v1/chat/completions", CHAT).json["choices"][0]["message"]["content"]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    events = engine.post("/v1/chat/completions", CHAT | options).events

    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-2]) == whole
    assert events[-3]["choices"][0]["finish_reason"] == "length"
    assert (events[-2]["choices"], events[-2]["usage"]["completion_tokens"]) == ([], 8)
    assert events[-1] == "[DONE]"


def test_without_being_asked_a_stream_carries_no_usage(engine: Engine) -> None:
    events = engine.post("/v1/chat/completions", CHAT | {"stream": True}).events

    assert not [event for event in events if event != "[DONE]" and "usage" in event]


def test_a_plain_completion_counts_token_ids_exactly(engine: Engine) -> None:
    answer = engine.post("/v1/completions", {"model": MISTRAL, "prompt": list(range(300)), "max_tokens": 1}).json

    assert answer["object"] == "text_completion"
    assert answer["usage"]["prompt_tokens"] == 300


def test_a_stop_string_ends_a_stream_before_it(engine: Engine) -> None:
    whole = engine.complete(max_tokens=20).json["choices"][0]["text"]
    stop = whole.split()[5]
    events = engine.complete(max_tokens=20, stop=stop, stream=True).events

    text = "".join(event["choices"][0]["text"] for event in events[:-1])
    assert text == whole[: whole.index(stop)]
    assert events[-2]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"model": "other"}, 404, "model_not_found"),
        ({"n": 2}, 400, "invalid_value"),
        ({"max_tokens": 0}, 400, "invalid_value"),
        ({"max_tokens": 100_000}, 400, "context_length_exceeded"),
        ({"max_tokens": "many"}, 400, "invalid_request_body"),
        ({"messages": []}, 400, "invalid_value"),
    ],
)
def test_a_wrong_request_gets_an_openai_error(
    engine: Engine, change: dict[str, object], status: int, code: str
) -> None:
    answer = engine.post("/v1/chat/completions", CHAT | change)

    assert (answer.status, answer.error["code"]) == (status, code)
    assert set(answer.error) == {"message", "type", "param", "code"}


def test_broken_json_and_unknown_routes_get_openai_errors_too(engine: Engine) -> None:
    assert engine.post("/v1/completions", b"{").error["code"] == "invalid_request_body"
    assert engine.get("/v1/nothing").error["code"] == "not_found"
    assert engine.get("/v1/completions").status == 405


def test_embeddings_are_repeatable(engine: Engine) -> None:
    body = {"model": MISTRAL, "input": ["one", "two"], "dimensions": 16}
    first, second = (engine.post("/v1/embeddings", body).json for _ in range(2))

    assert first == second
    assert [len(entry["embedding"]) for entry in first["data"]] == [16, 16]


def test_the_official_client_is_served(client: openai.OpenAI) -> None:
    messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]
    whole = client.chat.completions.create(model=MISTRAL, messages=messages, max_tokens=6)
    pieces: list[str] = []
    usage = None
    with client.chat.completions.create(
        model=MISTRAL, messages=messages, max_tokens=6, stream=True, stream_options={"include_usage": True}
    ) as stream:
        for chunk in stream:
            pieces += [choice.delta.content or "" for choice in chunk.choices]
            usage = chunk.usage or usage

    assert "".join(pieces) == whole.choices[0].message.content
    assert usage == whole.usage
    assert [model.id for model in client.models.list()] == [MISTRAL]
    embedding = client.embeddings.create(model=MISTRAL, input="hello", dimensions=32)
    assert len(embedding.data[0].embedding) == 32
    with pytest.raises(openai.NotFoundError) as raised:
        client.completions.create(model="other", prompt="hello")
    assert raised.value.code == "model_not_found"


def test_a_client_that_hangs_up_frees_its_memory(engine: Engine) -> None:
    connection = engine.open_stream("long", max_tokens=20_000)
    engine.until(lambda state: state["in_flight"] == 1 and state["kv_used_bytes"] > 0)

    connection.close()

    state = engine.until(lambda state: state["in_flight"] == 0)
    assert state["kv_used_bytes"] == 0


def test_what_exceeds_the_kv_memory_waits_and_is_served(engine: Engine) -> None:
    """Ten requests of 20,000 tokens: 10 GiB of KV memory hold four at a time."""
    prompt = list(range(19_996))

    def ask(_: int) -> int:
        body = {"model": MISTRAL, "prompt": prompt, "max_tokens": 4}
        return engine.post("/v1/completions", body).status

    with ThreadPoolExecutor(10) as pool:
        asked = pool.map(ask, range(10))
        engine.until(lambda state: state["waiting"] > 0 and state["running"] > 0)
        assert set(asked) == {200}


def test_metrics_carry_the_names_of_vllm(engine: Engine) -> None:
    engine.complete()
    text = engine.get("/metrics").body.decode()
    families = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))

    assert {
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:time_to_first_token_seconds",
        "vllm:inter_token_latency_seconds",
        "vllm:e2e_request_latency_seconds",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:request_success_total",
        "vllm:cache_config_info",
        "vllm:engine_sleep_state",
    } <= families
    assert f'vllm:num_requests_running{{model_name="{MISTRAL}",engine="0"}} 0' in text
    assert 'device="software GPU"' in text
    assert re.search(r'vllm:time_to_first_token_seconds_bucket{.*le="\+Inf"} [1-9]', text)


def test_everything_says_that_it_is_simulated(engine: Engine) -> None:
    assert engine.get("/sublet/state").json["device"] == "software GPU"
    assert engine.wait_for("ready")["device"] == "software GPU"
    assert engine.get("/version").json["engine"] == "sublet-simulated"
    assert engine.complete().json["system_fingerprint"] == "sublet-simulated"


def test_sixteen_streams_share_the_steps(engine: Engine) -> None:
    """Batched, sixteen requests take far fewer steps than one after the other would."""
    before = engine.get("/sublet/state").json["steps"]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda index: engine.complete(f"prompt {index}", max_tokens=100), range(16)))

    assert [json.loads(answer.body)["usage"]["completion_tokens"] for answer in answers] == [100] * 16
    assert engine.get("/sublet/state").json["steps"] - before < 16 * 100 / 2

"""Request and answer formats, metrics text, and arguments, without a server."""

import argparse
import base64
import json
import struct

import msgspec
import pytest

from engines.errors import EngineError
from engines.process import byte_count, count, fraction, port, positive, seconds
from engines.prometheus import Histogram, Page, number_text
from engines.simulated.administration import timeout, waits
from engines.simulated.openai import (
    MESSAGE_TOKENS,
    ChatRequest,
    CompletionRequest,
    Shape,
    chat_prompt,
    completion_prompt,
    embedding_value,
    output_tokens_max,
    stop_strings,
)


def chat(text: str) -> ChatRequest:
    return msgspec.json.decode(text, type=ChatRequest)


def completion(prompt: object) -> CompletionRequest:
    return msgspec.json.decode(json.dumps({"model": "m", "prompt": prompt}), type=CompletionRequest)


def test_chat_messages_may_be_text_or_parts() -> None:
    plain = chat('{"model": "m", "messages": [{"role": "user", "content": "two words"}]}')
    parts = chat(
        '{"model": "m", "messages": [{"role": "user", "content":'
        ' [{"type": "text", "text": "two words"}, {"type": "image_url", "image_url": {"url": "x"}}]}]}'
    )

    assert chat_prompt(plain) == chat_prompt(parts)
    assert chat_prompt(plain).token_count == 3 + MESSAGE_TOKENS


def test_unknown_fields_are_ignored() -> None:
    request = chat('{"model": "m", "messages": [{"role": "user", "content": "a"}], "temperature": 0.1, "tools": []}')

    assert request.model == "m"


@pytest.mark.parametrize(("prompt", "tokens"), [("a b c", 3), ([1, 2, 3, 4], 4), (["a b"], 2)])
def test_a_prompt_may_be_text_token_ids_or_one_text_in_a_list(prompt: object, tokens: int) -> None:
    assert completion_prompt(completion(prompt)).token_count == tokens


@pytest.mark.parametrize("prompt", [["a", "b"], [], ["a", 1]])
def test_several_prompts_are_refused(prompt: object) -> None:
    with pytest.raises(EngineError) as raised:
        completion_prompt(completion(prompt))
    assert (raised.value.status, raised.value.param) == (400, "prompt")


def test_the_newer_name_of_max_tokens_wins() -> None:
    request = chat('{"model": "m", "messages": [], "max_tokens": 5, "max_completion_tokens": 7}')

    assert output_tokens_max(request) == 7


@pytest.mark.parametrize(("stop", "words"), [("null", ()), ('"a"', ("a",)), ('["a", "", "b"]', ("a", "b"))])
def test_stop_may_be_one_string_or_several(stop: str, words: tuple[str, ...]) -> None:
    assert stop_strings(chat(f'{{"model": "m", "messages": [], "stop": {stop}}}')) == words


def test_base64_embeddings_are_little_endian_floats() -> None:
    value = embedding_value([0.5, -0.25], "base64")

    assert isinstance(value, str)
    assert struct.unpack("<2f", base64.b64decode(value)) == (0.5, -0.25)


def test_every_chunk_of_a_stream_is_one_event() -> None:
    shape = Shape(id="x", created=1, model="m", is_chat=True)
    for chunk in (shape.opening(), shape.piece('say "a"\n'), shape.closing("stop")):
        assert chunk.startswith(b"data: {")
        assert chunk.endswith(b"}\n\n")
        assert chunk.count(b"\n") == 2


def test_buckets_are_cumulative_and_end_with_the_count() -> None:
    histogram = Histogram((0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 7.0):
        histogram.observe(value)

    assert list(histogram.lines("h", {"a": "b"})) == [
        'h_bucket{a="b",le="0.1"} 2',
        'h_bucket{a="b",le="1.0"} 3',
        'h_bucket{a="b",le="+Inf"} 4',
        'h_sum{a="b"} 7.65',
        'h_count{a="b"} 4',
    ]


def test_labels_are_escaped() -> None:
    page = Page()
    page.value("x", "gauge", "X.", 1, {"a": 'say "\\"\n'})

    assert page.text() == '# HELP x X.\n# TYPE x gauge\nx{a="say \\"\\\\\\"\\n"} 1\n'


@pytest.mark.parametrize(("value", "text"), [(1, "1"), (2.0, "2"), (0.5, "0.5"), (1e-7, "1e-07")])
def test_numbers_are_written_plainly(value: float, text: str) -> None:
    assert number_text(value) == text


@pytest.mark.parametrize(
    ("query", "is_waiting"), [({}, True), ({"wait": "false"}, False), ({"wait": "1"}, True), ({"mode": "abort"}, False)]
)
def test_sleep_waits_unless_told_otherwise(query: dict[str, str], is_waiting: bool) -> None:
    assert waits(query) is is_waiting


def test_a_timeout_is_optional_and_must_be_a_time() -> None:
    assert timeout(None) is None
    assert timeout("1.5") == 1.5
    for text in ("-1", "nan", "inf", "soon"):
        with pytest.raises(EngineError):
            timeout(text)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (byte_count, ("1", "14496047104"), ("0", "-1", "1GiB", "")),
        (count, ("1", "64"), ("0", "1.5", "x")),
        (port, ("0", "8080", "65535"), ("65536", "-1", "http")),
        (seconds, ("0", "10", "0.5"), ("-1", "nan", "inf", "x")),
        (positive, ("1", "0.05"), ("0", "-1", "nan", "inf", "x")),
        (fraction, ("0", "0.5", "1"), ("-0.1", "1.1", "nan", "x")),
    ],
)
def test_arguments_are_checked(kind: type[int] | type[float], good: tuple[str, ...], bad: tuple[str, ...]) -> None:
    for text in good:
        assert kind(text) == float(text)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError):
            kind(text)

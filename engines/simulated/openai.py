"""The OpenAI wire format: what a request may say, and the bodies of answers, chunks and errors.

Unknown fields are ignored, as real engines ignore what they do not implement. Sampling parameters have no effect: the
answer depends on the seed and the prompt alone.
"""

from __future__ import annotations

import base64
import struct
from dataclasses import dataclass
from typing import Any

import msgspec

from engines.errors import EngineError, invalid
from engines.http import error_body
from engines.simulated.text import Answer, token_count

# Per chat message: role and separators, as in common chat templates.
MESSAGE_TOKENS = 4
EMBEDDING_DIMENSIONS_DEFAULT = 256
EMBEDDING_DIMENSIONS_MAX = 4096
EMBEDDING_INPUTS_MAX = 2048


class ContentPart(msgspec.Struct, kw_only=True):
    type: str = "text"
    text: str | None = None


class ChatMessage(msgspec.Struct, kw_only=True):
    role: str
    content: str | list[ContentPart] | None = None


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool = False


class GenerationRequest(msgspec.Struct, kw_only=True):
    """What chat and plain completions have in common."""

    model: str
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = 1
    seed: int | None = None

    @property
    def has_usage_chunk(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(GenerationRequest, kw_only=True):
    messages: list[ChatMessage]


class CompletionRequest(GenerationRequest, kw_only=True):
    """A prompt may be text or token ids; of several prompts only one is taken."""

    prompt: str | list[int | str]


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    model: str
    input: str | list[str]
    encoding_format: str = "float"
    dimensions: int = EMBEDDING_DIMENSIONS_DEFAULT


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt as the engine sees it: the text that decides the answer, and its length."""

    text: str
    token_count: int


def chat_prompt(request: ChatRequest) -> Prompt:
    """All messages as one text."""
    if not request.messages:
        raise invalid("messages must have at least one entry.", param="messages")
    lines = []
    tokens = 0
    for message in request.messages:
        content = message.content or ""
        text = content if isinstance(content, str) else "".join(part.text or "" for part in content)
        lines.append(f"{message.role}: {text}")
        tokens += token_count(text) + MESSAGE_TOKENS
    return Prompt(text="\n".join(lines), token_count=tokens)


def completion_prompt(request: CompletionRequest) -> Prompt:
    """The prompt of a plain completion. Token ids count exactly, text approximately."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return Prompt(text=prompt, token_count=token_count(prompt))
    if prompt and all(isinstance(token, int) for token in prompt):
        return Prompt(text=" ".join(map(str, prompt)), token_count=len(prompt))
    if len(prompt) != 1:
        raise invalid("This simulated engine takes exactly one prompt per request.", param="prompt")
    text = str(prompt[0])
    return Prompt(text=text, token_count=token_count(text))


def output_tokens_max(request: GenerationRequest) -> int | None:
    """The number of tokens that the client asked for, None when it named none."""
    if request.n not in {None, 1}:
        raise invalid("This simulated engine gives one choice: n must be 1.", param="n")
    wanted = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    if wanted is not None and wanted < 1:
        raise invalid(f"max_tokens must be at least 1, got {wanted}.", param="max_tokens")
    return wanted


def stop_strings(request: GenerationRequest) -> tuple[str, ...]:
    """The stop strings, without empty ones."""
    stop = request.stop
    words = [stop] if isinstance(stop, str) else stop or []
    return tuple(word for word in words if word)


def usage_body(*, prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How one of the two generating routes words its answers."""

    id: str
    created: int  # seconds since 1970
    model: str
    is_chat: bool

    def whole(self, answer: Answer, *, prompt_tokens: int) -> bytes:
        """The body of an answer that is not streamed."""
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": answer.finish_reason}
        if self.is_chat:
            choice["message"] = {"role": "assistant", "content": answer.text}
        else:
            choice["text"] = answer.text
        usage = usage_body(prompt_tokens=prompt_tokens, completion_tokens=len(answer.pieces))
        kind = "chat.completion" if self.is_chat else "text_completion"
        return msgspec.json.encode({**self._head(kind), "choices": [choice], "usage": usage})

    def opening(self) -> bytes:
        """The first chunk of a chat stream, which names the role; nothing for plain completions."""
        return self._chunk({"role": "assistant", "content": ""}, None) if self.is_chat else b""

    def piece(self, text: str) -> bytes:
        """A chunk with some text."""
        return self._chunk({"content": text}, None) if self.is_chat else self._text_chunk(text, None)

    def closing(self, finish_reason: str) -> bytes:
        """The chunk that says why the stream ends."""
        return self._chunk({}, finish_reason) if self.is_chat else self._text_chunk("", finish_reason)

    def usage(self, *, prompt_tokens: int, completion_tokens: int) -> bytes:
        """The chunk that `stream_options.include_usage` asks for."""
        usage = usage_body(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
        return event({**self._head(self._stream_kind), "choices": [], "usage": usage})

    @property
    def _stream_kind(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        # The fingerprint labels every answer as made up.
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": "sublet-simulated",
        }

    def _chunk(self, delta: dict[str, str], finish_reason: str | None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return event({**self._head(self._stream_kind), "choices": [choice]})

    def _text_chunk(self, text: str, finish_reason: str | None) -> bytes:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
        return event({**self._head(self._stream_kind), "choices": [choice]})


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def error_event(error: EngineError) -> bytes:
    """An error after the stream has begun, as vLLM sends it."""
    return b"data: " + error_body(error) + b"\n\n"


DONE_EVENT = b"data: [DONE]\n\n"


def embedding_value(vector: list[float], encoding_format: str) -> list[float] | str:
    """A vector as the client wants it: numbers, or base64 of little-endian 32-bit floats."""
    if encoding_format == "float":
        return vector
    if encoding_format == "base64":
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    raise invalid(f"encoding_format must be float or base64, got {encoding_format!r}.", param="encoding_format")

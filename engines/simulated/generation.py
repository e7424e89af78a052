"""The routes that clients of a model use: completions, chat, embeddings, models."""

from __future__ import annotations

import itertools
import time
from typing import TypeVar

import msgspec
from aiohttp import web

from engines.errors import EngineError, invalid
from engines.http import JSON, json_response
from engines.simulated import openai
from engines.simulated.engine import Engine
from engines.simulated.reports import EngineState
from engines.simulated.serving import Ticket
from engines.simulated.text import Answer, answer_for, embedding_for, token_count

# No client asks for more in earnest, and making up the words takes time: 131,072 tokens are about 0.1 s.
OUTPUT_TOKENS_MAX = 131_072

RequestType = TypeVar("RequestType", openai.ChatRequest, openai.CompletionRequest, openai.EmbeddingRequest)


async def parsed(request: web.Request, kind: type[RequestType]) -> RequestType:
    """The body as a struct. Raises `EngineError` that says where it is wrong."""
    try:
        return msgspec.json.decode(await request.read(), type=kind)
    except msgspec.DecodeError as error:
        raise invalid(f"Invalid request body: {error}.", code="invalid_request_body") from error


class GenerationRoutes:
    """Handlers over one engine."""

    def __init__(self, engine: Engine, *, stream_interval: int) -> None:
        self._engine = engine
        self._stream_interval = stream_interval  # tokens per streamed chunk, except for the first
        self._started_at_s = int(time.time())
        self._ids = itertools.count(1)

    def add_to(self, app: web.Application) -> None:
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/v1/models/{model:.+}", self.model)
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_post("/v1/completions", self.completions)
        app.router.add_post("/v1/embeddings", self.embeddings)

    # -- models

    async def models(self, _: web.Request) -> web.Response:
        return json_response({"object": "list", "data": [self._model_body()]})

    async def model(self, request: web.Request) -> web.Response:
        self._check_model(request.match_info["model"])
        return json_response(self._model_body())

    def _model_body(self) -> dict[str, object]:
        engine = self._engine
        is_resident = engine.state is EngineState.RESIDENT
        return {
            "id": engine.settings.model,
            "object": "model",
            "created": self._started_at_s,
            "owned_by": "sublet-simulated",
            "max_model_len": engine.serving.tokens_max if is_resident else None,
            "state": engine.state.value,
        }

    def _check_model(self, name: str) -> None:
        if name != self._engine.settings.model:
            message = f"The model {name!r} does not exist; this engine serves {self._engine.settings.model!r}."
            raise EngineError(message, status=404, kind="invalid_request_error", code="model_not_found", param="model")

    # -- completions

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await parsed(request, openai.ChatRequest)
        return await self._generate(request, body, openai.chat_prompt(body), is_chat=True)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await parsed(request, openai.CompletionRequest)
        return await self._generate(request, body, openai.completion_prompt(body), is_chat=False)

    async def _generate(
        self, request: web.Request, body: openai.GenerationRequest, prompt: openai.Prompt, *, is_chat: bool
    ) -> web.StreamResponse:
        engine = self._engine
        self._check_model(body.model)
        tokens_max = openai.output_tokens_max(body)
        if tokens_max is not None and tokens_max > OUTPUT_TOKENS_MAX:
            raise invalid(f"max_tokens must be at most {OUTPUT_TOKENS_MAX}, got {tokens_max}.", param="max_tokens")
        engine.check_serving()
        answer = answer_for(
            seed=engine.settings.seed if body.seed is None else body.seed,
            prompt=prompt.text,
            output_tokens_max=tokens_max,
            stop=openai.stop_strings(body),
        )
        ticket = engine.submit(prompt_tokens=prompt.token_count, output_tokens=len(answer.pieces))
        shape = openai.Shape(
            id=f"{'chatcmpl' if is_chat else 'cmpl'}-{self._started_at_s}-{next(self._ids)}",
            created=int(time.time()),
            model=body.model,
            is_chat=is_chat,
        )
        try:
            if body.stream:
                return await self._stream(request, body, ticket, answer=answer, shape=shape, prompt=prompt)
            while not ticket.is_ended:
                await ticket.news()
            engine.serving.book_end(ticket, answer.finish_reason)
            return web.Response(body=shape.whole(answer, prompt_tokens=prompt.token_count), content_type=JSON)
        finally:
            engine.serving.cancel(ticket)  # does nothing for a request that has ended

    async def _stream(
        self,
        request: web.Request,
        body: openai.GenerationRequest,
        ticket: Ticket,
        *,
        answer: Answer,
        shape: openai.Shape,
        prompt: openai.Prompt,
    ) -> web.StreamResponse:
        # The first token decides between an HTTP error and an error inside the stream.
        await ticket.news()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(request)
        pending = shape.opening()
        sent_count = 0
        try:
            while True:
                # All tokens that have arrived leave as one chunk, in one write.
                is_due = ticket.ready_count - sent_count >= (self._stream_interval if sent_count else 1)
                if is_due or ticket.is_ended:
                    text = "".join(answer.pieces[sent_count : ticket.ready_count])
                    sent_count = ticket.ready_count
                    await response.write(pending + (shape.piece(text) if text else b""))
                    pending = b""
                if ticket.is_ended:
                    break
                await ticket.news()
        except EngineError as error:
            await response.write(error_event_and_done(error))
            return response
        ending = shape.closing(answer.finish_reason)
        if body.has_usage_chunk:
            ending += shape.usage(prompt_tokens=prompt.token_count, completion_tokens=sent_count)
        await response.write(ending + openai.DONE_EVENT)
        await response.write_eof()
        self._engine.serving.book_end(ticket, answer.finish_reason)
        return response

    # -- embeddings

    async def embeddings(self, request: web.Request) -> web.Response:
        engine = self._engine
        body = await parsed(request, openai.EmbeddingRequest)
        self._check_model(body.model)
        texts = [body.input] if isinstance(body.input, str) else body.input
        if not 0 < len(texts) <= openai.EMBEDDING_INPUTS_MAX:
            raise invalid(f"input must have 1 to {openai.EMBEDDING_INPUTS_MAX} texts.", param="input")
        if not 0 < body.dimensions <= openai.EMBEDDING_DIMENSIONS_MAX:
            raise invalid(f"dimensions must be 1 to {openai.EMBEDDING_DIMENSIONS_MAX}.", param="dimensions")
        prompt_tokens = sum(token_count(text) for text in texts)
        entries = []
        ticket = engine.submit(prompt_tokens=prompt_tokens, output_tokens=0)
        try:
            for index, text in enumerate(texts):
                vector = embedding_for(seed=engine.settings.seed, text=text, dimensions=body.dimensions)
                value = openai.embedding_value(vector, body.encoding_format)
                entries.append({"object": "embedding", "index": index, "embedding": value})
            while not ticket.is_ended:
                await ticket.news()
        finally:
            engine.serving.cancel(ticket)
        engine.serving.book_end(ticket, "stop")
        usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
        answer = {"object": "list", "data": entries, "model": body.model, "usage": usage}
        return json_response(answer)


def error_event_and_done(error: EngineError) -> bytes:
    """How a stream that has begun ends when the engine cannot go on."""
    return openai.error_event(error) + openai.DONE_EVENT

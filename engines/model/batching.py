"""Continuous batching: which sequences share the next step, and which wait for KV memory.

Pure and synchronous. The caller asks for a step (`next_step`), lets its time pass, and reports it done (`finish`):

    waiting --next_step, KV reserved--> prefilling --finish--> decoding --finish--> ended

Rules, in the order in which they apply:

1. Running sequences come first: each decoding one gets its token, each half-done prompt its next chunk.
2. Waiting sequences are admitted in order of arrival while the batch, the step's tokens and KV memory have room. The
   first that does not fit blocks those behind it, so that a large request is not starved.
3. A sequence reserves KV memory for its whole length when it is admitted, so a running one never lacks any.
   (vLLM grows block by block and preempts when it runs out; that goes into `_admit` and `next_step`.)
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

# Tokens per KV block: vLLM's default.
BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class KvGeometry:
    """How a sequence's length turns into blocks. A fixed per-sequence state (Mamba) counts as so many blocks."""

    block_bytes: int
    state_blocks: int
    block_tokens: int = BLOCK_TOKENS

    @classmethod
    def of(cls, *, kv_bytes_per_token: int, state_bytes_per_sequence: int) -> KvGeometry:
        block_bytes = BLOCK_TOKENS * kv_bytes_per_token
        return cls(block_bytes=block_bytes, state_blocks=-(-state_bytes_per_sequence // block_bytes))

    def blocks(self, token_count: int) -> int:
        """Blocks that a sequence of that length holds, its state included."""
        return self.state_blocks + -(-token_count // self.block_tokens)

    def tokens_max(self, block_count: int) -> int:
        """The longest single sequence that fits in so many blocks."""
        return max(block_count - self.state_blocks, 0) * self.block_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """Bounds of the batcher. Defaults are vLLM's for an H100, but for the queue, which vLLM does not bound."""

    sequences_max: int = 64
    step_tokens_max: int = 8192
    waiting_max: int = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceRequest:
    """One sequence to generate: so many prompt tokens in, exactly `output_tokens` out (0: prefill only)."""

    sequence_id: int
    prompt_tokens: int
    output_tokens: int

    @property
    def token_count(self) -> int:
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class TooLong:
    """Refused: the sequence would not fit even in an empty engine."""

    token_count: int
    tokens_max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueFull:
    """Refused: as many sequences wait as may."""

    waiting_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One iteration: prompt chunks as (sequence id, tokens), and the sequences that get their next token."""

    prefill: tuple[tuple[int, int], ...]
    decode: tuple[int, ...]
    context_tokens: int  # sum over `decode` of the tokens whose KV is read

    @property
    def prefill_tokens(self) -> int:
        return sum(tokens for _, tokens in self.prefill)


@dataclass(frozen=True, slots=True)
class Progress:
    """A sequence after a step: tokens produced so far, and whether that was all."""

    sequence_id: int
    output_count: int
    is_ended: bool


@dataclass(slots=True)
class _Sequence:
    request: SequenceRequest
    blocks: int
    prefilled_tokens: int = 0
    output_count: int = 0

    @property
    def is_prefilled(self) -> bool:
        return self.prefilled_tokens >= self.request.prompt_tokens


class Batcher:
    """The state of one engine's scheduler. Invariant: `used_blocks` is the sum over running sequences, never negative.

    `used_blocks <= block_limit` holds but for the time between a shrink and the end of the sequences that were running.
    """

    def __init__(self, *, geometry: KvGeometry, limits: BatchLimits, block_limit: int) -> None:
        self.geometry = geometry
        self.limits = limits
        self.block_limit = block_limit
        self.used_blocks = 0
        self._waiting: OrderedDict[int, _Sequence] = OrderedDict()
        self._running: OrderedDict[int, _Sequence] = OrderedDict()

    @property
    def waiting_count(self) -> int:
        return len(self._waiting)

    @property
    def running_count(self) -> int:
        return len(self._running)

    @property
    def is_idle(self) -> bool:
        return not self._running and not self._waiting

    def submit(self, request: SequenceRequest) -> TooLong | QueueFull | None:
        """Queue a sequence, or say why not."""
        assert request.prompt_tokens > 0, request
        assert request.sequence_id not in self._waiting, request
        assert request.sequence_id not in self._running, request
        blocks = self.geometry.blocks(request.token_count)
        if blocks > self.block_limit:
            return TooLong(token_count=request.token_count, tokens_max=self.geometry.tokens_max(self.block_limit))
        if len(self._waiting) >= self.limits.waiting_max:
            return QueueFull(waiting_count=len(self._waiting))
        self._waiting[request.sequence_id] = _Sequence(request=request, blocks=blocks)
        return None

    def cancel(self, sequence_id: int) -> bool:
        """Forget a sequence and free its KV memory; False when it is not (any more) here."""
        if self._waiting.pop(sequence_id, None) is not None:
            return True
        return self._end(sequence_id)

    def set_block_limit(self, block_limit: int) -> tuple[int, ...]:
        """Change how much KV memory may be reserved. Running sequences keep what they have.

        Returns the waiting sequences that can no longer fit; they are forgotten.
        """
        self.block_limit = block_limit
        dropped = tuple(key for key, sequence in self._waiting.items() if sequence.blocks > block_limit)
        for key in dropped:
            del self._waiting[key]
        return dropped

    def next_step(self) -> Step | None:
        """Admit what fits and say what the next iteration does; None when there is nothing to do."""
        decode = tuple(key for key, sequence in self._running.items() if sequence.is_prefilled)
        context_tokens = 0
        for key in decode:
            sequence = self._running[key]
            context_tokens += sequence.request.prompt_tokens + sequence.output_count
        room_tokens = self.limits.step_tokens_max - len(decode)
        prefill: list[tuple[int, int]] = []
        for key, sequence in self._running.items():
            if room_tokens > 0 and not sequence.is_prefilled:
                room_tokens -= self._plan_chunk(prefill, key, sequence, room_tokens)
        while room_tokens > 0 and (admitted := self._admit()) is not None:
            room_tokens -= self._plan_chunk(prefill, admitted.request.sequence_id, admitted, room_tokens)
        if not decode and not prefill:
            return None
        return Step(prefill=tuple(prefill), decode=decode, context_tokens=context_tokens)

    def finish(self, step: Step) -> tuple[Progress, ...]:
        """Book a step that is over. Sequences cancelled meanwhile are passed over.

        The step that ends a prompt also yields the first token, as in a real engine.
        """
        progress: list[Progress] = []
        for key, tokens in step.prefill:
            sequence = self._running.get(key)
            if sequence is None:
                continue
            sequence.prefilled_tokens += tokens
            if sequence.is_prefilled:
                progress.append(self._advance(key, sequence))
        for key in step.decode:
            sequence = self._running.get(key)
            if sequence is not None:
                progress.append(self._advance(key, sequence))
        return tuple(progress)

    def check_invariants(self) -> None:
        """For tests: what must hold between any two calls."""
        assert self.used_blocks == sum(sequence.blocks for sequence in self._running.values())
        assert len(self._running) <= self.limits.sequences_max
        assert len(self._waiting) <= self.limits.waiting_max
        assert not set(self._running) & set(self._waiting)

    def _admit(self) -> _Sequence | None:
        """Move the first waiting sequence to the running ones if there is room for it."""
        if not self._waiting or len(self._running) >= self.limits.sequences_max:
            return None
        key, sequence = next(iter(self._waiting.items()))
        if self.used_blocks + sequence.blocks > self.block_limit:
            return None
        del self._waiting[key]
        self._running[key] = sequence
        self.used_blocks += sequence.blocks
        return sequence

    @staticmethod
    def _plan_chunk(prefill: list[tuple[int, int]], key: int, sequence: _Sequence, room_tokens: int) -> int:
        tokens = min(sequence.request.prompt_tokens - sequence.prefilled_tokens, room_tokens)
        prefill.append((key, tokens))
        return tokens

    def _advance(self, key: int, sequence: _Sequence) -> Progress:
        if sequence.output_count < sequence.request.output_tokens:
            sequence.output_count += 1
        is_ended = sequence.output_count >= sequence.request.output_tokens
        if is_ended:
            self._end(key)
        return Progress(key, sequence.output_count, is_ended)

    def _end(self, key: int) -> bool:
        sequence = self._running.pop(key, None)
        if sequence is None:
            return False
        self.used_blocks -= sequence.blocks
        return True

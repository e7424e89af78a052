"""Continuous batching: which sequences share the next step, and which wait for KV memory.

Pure and synchronous. The caller asks for a step (`next_step`), lets its time pass, and reports it done (`finish`):

    waiting --next_step, first blocks taken--> prefilling --finish--> decoding --finish--> ended
       ^                                            |                     |
       +------------- preempted, blocks freed ------+---------------------+

Rules, in the order in which they apply; they are those of vLLM's V1 scheduler:

1. Running sequences come first, in order of their admission: each decoding one gets its token, each half-done prompt
   its next chunk, as far as the step's tokens go.
2. A sequence holds the blocks of the tokens it has, not of those it may get. One that needs a block when none is free
   takes those of the running sequence that was admitted last: that one is preempted. It waits at the head of the
   queue, and is computed again from its first token, the tokens it had produced included. If it is itself the last,
   it is itself preempted.
3. Only in a step without preemption are waiting sequences admitted: in order, while the batch, the step's tokens and
   free blocks have room. The first that does not fit blocks those behind it, so that a large request is not starved.

A part of each prompt may be found in the prefix cache (`BatchLimits.prefix_hit_fraction`): its tokens take blocks, but
no computation. A preempted sequence finds nothing there.
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
    window_tokens: int | None = None  # blocks behind a sliding window are freed

    @classmethod
    def of(
        cls, *, kv_bytes_per_token: int, state_bytes_per_sequence: int, window_tokens: int | None = None
    ) -> KvGeometry:
        block_bytes = BLOCK_TOKENS * kv_bytes_per_token
        state_blocks = -(-state_bytes_per_sequence // block_bytes)
        return cls(block_bytes=block_bytes, state_blocks=state_blocks, window_tokens=window_tokens)

    def blocks(self, token_count: int) -> int:
        """Blocks that a sequence of that length holds, its state included."""
        blocks = -(-token_count // self.block_tokens)
        if self.window_tokens is not None:
            blocks = min(blocks, -(-self.window_tokens // self.block_tokens) + 1)
        return self.state_blocks + blocks

    def tokens_max(self, block_count: int) -> int:
        """The longest single sequence that fits in so many blocks; without regard to a window."""
        return max(block_count - self.state_blocks, 0) * self.block_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """Bounds of the batcher. Defaults are vLLM's for an H100, but for the queue, which vLLM does not bound."""

    sequences_max: int = 64
    step_tokens_max: int = 8192
    waiting_max: int = 4096
    prefix_hit_fraction: float = 0.0  # of each prompt, found in the prefix cache


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


@dataclass(frozen=True, slots=True)
class Chunk:
    """Part of a prompt: the tokens computed before it, and those of this step."""

    sequence_id: int
    start_tokens: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One iteration: prompt chunks, and the sequences that get their next token."""

    prefill: tuple[Chunk, ...]
    decode: tuple[int, ...]
    context_tokens: int  # sum over `decode` of the positions that they look at

    @property
    def prefill_tokens(self) -> int:
        return sum(chunk.tokens for chunk in self.prefill)


@dataclass(frozen=True, slots=True)
class Progress:
    """A sequence after a step: tokens produced so far, and whether that was all."""

    sequence_id: int
    output_count: int
    is_ended: bool


@dataclass(slots=True)
class _Sequence:
    request: SequenceRequest
    computed_tokens: int = 0  # whose KV is there
    output_count: int = 0
    blocks: int = 0
    is_pinned: bool = False  # holds its whole length since a shrink; see `set_block_limit`
    was_preempted: bool = False

    @property
    def known_tokens(self) -> int:
        """Prompt and output so far; the newest token's KV is computed by the step that makes the next."""
        return self.request.prompt_tokens + self.output_count

    @property
    def is_prefilled(self) -> bool:
        return self.computed_tokens >= self.known_tokens - (1 if self.output_count else 0)


class Batcher:
    """The state of one engine's scheduler. Invariant: `used_blocks` is the sum over running sequences, never negative.

    `used_blocks <= block_limit` holds but for the time between a shrink and the end of the sequences that were running.
    """

    def __init__(self, *, geometry: KvGeometry, limits: BatchLimits, block_limit: int) -> None:
        self.geometry = geometry
        self.limits = limits
        self.block_limit = block_limit
        self.used_blocks = 0
        self.preemption_count = 0
        self.prefix_asked_tokens = 0  # of all prompts admitted, and what of them the prefix cache had
        self.prefix_found_tokens = 0
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
        if self.geometry.blocks(request.token_count) > self.block_limit:
            return TooLong(token_count=request.token_count, tokens_max=self.geometry.tokens_max(self.block_limit))
        if len(self._waiting) >= self.limits.waiting_max:
            return QueueFull(waiting_count=len(self._waiting))
        self._waiting[request.sequence_id] = _Sequence(request=request)
        return None

    def cancel(self, sequence_id: int) -> bool:
        """Forget a sequence and free its KV memory; False when it is not (any more) here."""
        if self._waiting.pop(sequence_id, None) is not None:
            return True
        return self._end(sequence_id)

    def set_block_limit(self, block_limit: int) -> tuple[int, ...]:
        """Change how much KV memory may be used. Running sequences keep what they have.

        One that could not fit in the new limit alone takes its whole length now, while the memory is still there, and
        is never preempted: it will end. If even that is not there, it is forgotten, as are waiting sequences that can
        no longer fit. Returns those that are forgotten.
        """
        old_limit, self.block_limit = self.block_limit, block_limit
        dropped = [key for key, sequence in self._waiting.items() if self._whole_blocks(sequence) > block_limit]
        for key in dropped:
            del self._waiting[key]
        for key, sequence in tuple(self._running.items()):
            more_blocks = self._whole_blocks(sequence) - sequence.blocks
            if sequence.is_pinned or self._whole_blocks(sequence) <= block_limit:
                continue
            if self.used_blocks + more_blocks <= old_limit:
                sequence.blocks += more_blocks
                self.used_blocks += more_blocks
                sequence.is_pinned = True
            else:
                self._end(key)
                dropped.append(key)
        return tuple(dropped)

    def next_step(self) -> Step | None:
        """Admit what fits and say what the next iteration does; None when there is nothing to do."""
        preempted_before = self.preemption_count
        decode: dict[int, int] = {}  # positions looked at, by sequence
        prefill: dict[int, Chunk] = {}
        room_tokens = self.limits.step_tokens_max
        for key, sequence in tuple(self._running.items()):
            if room_tokens <= 0:
                break
            if key not in self._running:  # preempted by one before it
                continue
            tokens = 1 if sequence.is_prefilled else min(sequence.known_tokens - sequence.computed_tokens, room_tokens)
            if not self._grow(key, sequence, tokens):
                continue
            room_tokens -= tokens
            self._plan(key, sequence, tokens, decode, prefill)
        if self.preemption_count == preempted_before or not (decode or prefill):
            while room_tokens > 0 and (admitted := self._admit(room_tokens)) is not None:
                key, sequence, tokens = admitted
                room_tokens -= tokens
                self._plan(key, sequence, tokens, decode, prefill)
        if not decode and not prefill:
            return None
        return Step(prefill=tuple(prefill.values()), decode=tuple(decode), context_tokens=sum(decode.values()))

    def finish(self, step: Step) -> tuple[Progress, ...]:
        """Book a step that is over. Sequences cancelled meanwhile are passed over.

        The step that ends a prompt also yields the first token, as in a real engine.
        """
        progress: list[Progress] = []
        for chunk in step.prefill:
            sequence = self._running.get(chunk.sequence_id)
            if sequence is None:
                continue
            sequence.computed_tokens += chunk.tokens
            if sequence.computed_tokens >= sequence.known_tokens:
                progress.append(self._advance(chunk.sequence_id, sequence))
        for key in step.decode:
            sequence = self._running.get(key)
            if sequence is not None:
                sequence.computed_tokens += 1
                progress.append(self._advance(key, sequence))
        return tuple(progress)

    def check_invariants(self) -> None:
        """For tests: what must hold between any two calls."""
        assert self.used_blocks == sum(sequence.blocks for sequence in self._running.values())
        assert not any(sequence.blocks for sequence in self._waiting.values())
        assert len(self._running) <= self.limits.sequences_max
        assert not set(self._running) & set(self._waiting)
        for sequence in self._running.values():
            assert sequence.computed_tokens <= sequence.known_tokens
            assert sequence.blocks >= self.geometry.blocks(sequence.computed_tokens)

    def _whole_blocks(self, sequence: _Sequence) -> int:
        return self.geometry.blocks(sequence.request.token_count)

    def _grow(self, key: int, sequence: _Sequence, tokens: int) -> bool:
        """Blocks for so many more tokens, from those admitted last if need be; False when it lost its own.

        A pinned sequence needs no more, so whoever is preempted has not been planned for this step yet.
        """
        wanted = max(self.geometry.blocks(sequence.computed_tokens + tokens), sequence.blocks)
        while wanted > sequence.blocks and self.used_blocks + wanted - sequence.blocks > self.block_limit:
            victim = next((k for k in reversed(self._running) if not self._running[k].is_pinned), key)
            self._preempt(victim)
            if victim == key:
                return False
        self.used_blocks += wanted - sequence.blocks
        sequence.blocks = wanted
        return True

    def _preempt(self, key: int) -> None:
        """Take all blocks of a running sequence; it waits at the head and will be computed again."""
        sequence = self._running.pop(key)
        self.used_blocks -= sequence.blocks
        sequence.blocks = sequence.computed_tokens = 0
        sequence.was_preempted = True
        self._waiting[key] = sequence
        self._waiting.move_to_end(key, last=False)
        self.preemption_count += 1

    def _admit(self, room_tokens: int) -> tuple[int, _Sequence, int] | None:
        """Move the first waiting sequence to the running ones if its first chunk has room; say how large that is."""
        if not self._waiting or len(self._running) >= self.limits.sequences_max:
            return None
        key, sequence = next(iter(self._waiting.items()))
        found_tokens = 0
        if not sequence.was_preempted:
            found_tokens = min(
                int(sequence.request.prompt_tokens * self.limits.prefix_hit_fraction),
                sequence.request.prompt_tokens - 1,  # the last token is always computed: its output is wanted
            )
        tokens = min(sequence.known_tokens - found_tokens, room_tokens)
        blocks = self.geometry.blocks(found_tokens + tokens)
        if self.used_blocks + blocks > self.block_limit:
            return None
        del self._waiting[key]
        self._running[key] = sequence
        self.prefix_asked_tokens += 0 if sequence.was_preempted else sequence.request.prompt_tokens
        self.prefix_found_tokens += found_tokens
        sequence.computed_tokens = found_tokens
        sequence.blocks = blocks
        self.used_blocks += blocks
        return key, sequence, tokens

    def _plan(
        self, key: int, sequence: _Sequence, tokens: int, decode: dict[int, int], prefill: dict[int, Chunk]
    ) -> None:
        if sequence.is_prefilled:
            looked_at = sequence.known_tokens
            if self.geometry.window_tokens is not None:
                looked_at = min(looked_at, self.geometry.window_tokens)
            decode[key] = looked_at
        else:
            prefill[key] = Chunk(key, sequence.computed_tokens, tokens)

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

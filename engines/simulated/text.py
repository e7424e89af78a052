"""The words the simulated engine says: decided by the seed and the prompt alone, so that a test can repeat them.

Tokens are approximated, in both directions: a text counts as its words or a quarter of its characters, whichever is
more; one word of output is one token.
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass

# Plain words of one token each in common tokenizers.
WORDS: tuple[str, ...] = tuple(
    """
    the a of and to in is it that for on with as by at from this which be are was can has will more when
    one each other time model memory light river stone garden window number letter music water paper
    small large early late clear quiet north south green silver simple open share place move hold wait
    return answer question begin follow carry keep turn
    """.split()
)
SENTENCE_WORDS = 12  # a full stop after so many

# Output length when the client names none: long enough to stream, short enough for a demo. Even spread by prompt.
OUTPUT_TOKENS_DEFAULT_MIN = 32
OUTPUT_TOKENS_DEFAULT_MAX = 160


def token_count(text: str) -> int:
    """Approximate tokens of a text, at least 1: its words or a quarter of its characters, whichever is more."""
    return max(len(text.split()), math.ceil(len(text) / 4), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """All that a request will get, known in advance. `pieces[i]` is the text of token i (empty when held back).

    A stop string is cut off, with everything behind it; tokens it began in arrive early only as far as they are kept.
    """

    pieces: tuple[str, ...]
    finish_reason: str  # "stop" | "length"

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def random_for(seed: int, prompt: str) -> random.Random:
    """The generator that decides everything about one prompt's answer; stable across processes and versions."""
    digest = hashlib.blake2b(f"{seed}\x00{prompt}".encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "big"))


def answer_for(*, seed: int, prompt: str, output_tokens_max: int | None, stop: tuple[str, ...]) -> Answer:
    """The answer to a prompt: exactly `output_tokens_max` tokens if given, unless a stop string comes first."""
    dice = random_for(seed, prompt)
    natural_count = dice.randint(OUTPUT_TOKENS_DEFAULT_MIN, OUTPUT_TOKENS_DEFAULT_MAX)
    count = natural_count if output_tokens_max is None else output_tokens_max
    pieces = tuple(_piece(dice.choice(WORDS), index) for index in range(count))
    full_text = "".join(pieces)
    cut_at = min((at for word in stop if (at := full_text.find(word)) >= 0), default=None)
    if cut_at is None:
        return Answer(pieces=pieces, finish_reason="stop" if output_tokens_max is None else "length")
    return Answer(pieces=_cut(pieces, cut_at=cut_at, stop=stop, full_text=full_text), finish_reason="stop")


def _piece(word: str, index: int) -> str:
    place = index % SENTENCE_WORDS
    if place == 0:
        word = word.capitalize()
    ending = "." if place == SENTENCE_WORDS - 1 else ""
    return f"{' ' if index else ''}{word}{ending}"


def _cut(pieces: tuple[str, ...], *, cut_at: int, stop: tuple[str, ...], full_text: str) -> tuple[str, ...]:
    """The pieces up to the token that completes the stop string; what lies behind `cut_at` is emptied."""
    stop_end = min(cut_at + len(word) for word in stop if full_text.startswith(word, cut_at))
    kept: list[str] = []
    start = 0
    for piece in pieces:
        kept.append(piece[: max(cut_at - start, 0)])
        start += len(piece)
        if start >= stop_end:
            break
    return tuple(kept)


def embedding_for(*, seed: int, text: str, dimensions: int) -> list[float]:
    """A unit vector decided by the seed and the text; different texts are nearly orthogonal, as random vectors are."""
    dice = random_for(seed, text)
    vector = [dice.gauss(0.0, 1.0) for _ in range(dimensions)]
    norm = math.sqrt(sum(value * value for value in vector))
    return [value / norm for value in vector]

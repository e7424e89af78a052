"""Made-up text: the same for the same seed and prompt, in every process."""

import math

import pytest

from engines.simulated.text import (
    OUTPUT_TOKENS_DEFAULT_MAX,
    OUTPUT_TOKENS_DEFAULT_MIN,
    Answer,
    answer_for,
    embedding_for,
    token_count,
)


def answer(prompt: str = "hello", *, seed: int = 1, tokens: int | None = 20, stop: tuple[str, ...] = ()) -> Answer:
    return answer_for(seed=seed, prompt=prompt, output_tokens_max=tokens, stop=stop)


@pytest.mark.parametrize(
    ("text", "tokens"), [("", 1), ("a b c d", 4), ("internationalisation", 5), ("hi " * 128, 128), ("漢字" * 8, 4)]
)
def test_a_text_counts_as_its_words_or_a_quarter_of_its_characters(text: str, tokens: int) -> None:
    assert token_count(text) == tokens


def test_the_answer_depends_on_seed_and_prompt_alone() -> None:
    assert answer() == answer()
    assert answer("other") != answer()
    assert answer(seed=2) != answer()


def test_the_answer_is_pinned_across_versions() -> None:
    """Recorded answers of clients stay valid; change this only with a note in the changelog."""
    assert answer(tokens=6).text == "Late for simple will this when"


def test_a_named_length_is_exact() -> None:
    subject = answer(tokens=300)

    assert (len(subject.pieces), subject.finish_reason) == (300, "length")


def test_without_a_named_length_the_answer_ends_by_itself() -> None:
    subject = answer(tokens=None)

    assert OUTPUT_TOKENS_DEFAULT_MIN <= len(subject.pieces) <= OUTPUT_TOKENS_DEFAULT_MAX
    assert subject.finish_reason == "stop"


def test_a_longer_answer_begins_with_the_shorter_one() -> None:
    assert answer(tokens=50).text.startswith(answer(tokens=10).text)


@pytest.mark.parametrize("stop_at", [1, 7, 19])
def test_a_stop_string_ends_the_answer_before_it(stop_at: int) -> None:
    whole = answer(tokens=40).text
    stop = whole[whole.index(answer(tokens=40).pieces[stop_at]) :][:6]
    subject = answer(tokens=40, stop=("never said", stop))

    assert subject.text == whole[: whole.index(stop)]
    assert subject.finish_reason == "stop"
    assert len(subject.pieces) < 40


def test_a_stop_string_that_is_not_said_changes_nothing() -> None:
    assert answer(stop=("never said",)) == answer()


def test_embeddings_are_unit_vectors_that_depend_on_the_text() -> None:
    one, same, other = (embedding_for(seed=1, text=text, dimensions=256) for text in ("a", "a", "b"))

    assert one == same
    assert math.isclose(sum(value * value for value in one), 1.0)
    assert abs(sum(left * right for left, right in zip(one, other, strict=True))) < 0.5

"""The small parts: agenda, usage, refusals, requests' bodies, readiness."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway import readiness, refusals
from services.gateway.agenda import Agenda
from services.gateway.readiness import Facts
from services.gateway.routes import RouteTable
from services.gateway.usage import StreamUsage, Usage
from services.gateway.wishes import _with_usage
from tests.unit.gateway import fleet

TEXT = b'data: {"choices":[{"delta":{"content":"a"}}],"usage":null}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2,"total_tokens":7}}\n\n'
DONE = b"data: [DONE]\n\n"
STREAM = TEXT * 3 + USAGE + DONE


# --- Agenda -----------------------------------------------------------------------------------------------------------


def test_setting_a_time_again_replaces_it() -> None:
    agenda = Agenda()
    agenda.set(("model", "a"), 5.0)
    agenda.set(("model", "a"), 7.0)

    assert [] == agenda.pop_due(6.0)
    assert 7.0 == agenda.next_due_s()
    assert [("model", "a")] == agenda.pop_due(7.0)
    assert agenda.next_due_s() is None


def test_ties_go_by_key_and_what_was_discarded_never_comes() -> None:
    agenda = Agenda()
    for name in ("b", "a", "c"):
        agenda.set(("model", name), 1.0)
    agenda.discard(("model", "c"))

    assert [("model", "a"), ("model", "b")] == agenda.pop_due(1.0)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 30)), max_size=400))
def test_the_agenda_is_a_sorted_table_however_often_times_are_replaced(steps: list[tuple[str, int]]) -> None:
    agenda, table = Agenda(), {}
    for name, due_s in steps:
        agenda.set(("model", name), float(due_s))
        table["model", name] = float(due_s)

    assert [key for _, key in sorted((due_s, key) for key, due_s in table.items())] == agenda.pop_due(30.0)


# --- Usage ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, len(STREAM) - 1), max_size=8))
def test_usage_is_found_and_hidden_however_the_stream_is_cut(cuts: list[int]) -> None:
    edges = [0, *sorted(set(cuts)), len(STREAM)]
    usage = StreamUsage(hides=True)

    passed = [usage.pass_on(STREAM[start:end]) for start, end in itertools.pairwise(edges)]

    assert TEXT * 3 + DONE == b"".join([*passed, usage.rest()])
    assert Usage(prompt_tokens=5, completion_tokens=2) == usage.usage
    assert usage.has_ended


def test_a_stream_that_shows_its_usage_passes_unchanged() -> None:
    usage = StreamUsage(hides=False)

    assert STREAM == usage.pass_on(STREAM)
    assert Usage(prompt_tokens=5, completion_tokens=2) == usage.usage


def test_a_stream_without_its_end_mark_has_not_ended() -> None:
    usage = StreamUsage(hides=True)
    usage.pass_on(TEXT + b'data: {"cho')

    assert b'data: {"cho' == usage.rest()
    assert not usage.has_ended


def test_a_stream_with_other_line_ends_is_not_held_back() -> None:
    usage = StreamUsage(hides=True)
    chunk = TEXT.replace(b"\n", b"\r\n")

    assert chunk == usage.pass_on(chunk)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, {"include_usage": True}),
        ({"stream_options": None}, {"include_usage": True}),
        (
            {"stream_options": {"include_usage": False, "continuous_usage_stats": True}},
            {"include_usage": True, "continuous_usage_stats": True},
        ),
    ],
)
def test_asking_for_usage_leaves_the_rest_of_the_request_as_it_is(
    options: dict[str, object], wanted: dict[str, object]
) -> None:
    body = {"model": "m", "stream": True, "temperature": 0.1, **options}

    assert {**body, "stream_options": wanted} == json.loads(_with_usage(json.dumps(body).encode()))


# --- Refusals ---------------------------------------------------------------------------------------------------------


def test_retry_after_is_whole_seconds_rounded_up() -> None:
    loading = refusals.model_loading("m", state="parked", eta_s=1.2, patience_s=1.0)

    assert "2" == loading.retry_after
    assert 1.2 == loading.body("id")["error"]["sublet"]["retry_after_s"]


# --- Readiness --------------------------------------------------------------------------------------------------------


def facts(**more: object) -> Facts:
    known = {
        "view_problem": "", "is_connected": True, "signal_age_s": 0.5, "signal_age_s_max": 3.0, "lease_problems": {},
        "is_stopping": False,
    }  # fmt: skip
    return Facts(**{**known, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({}, []),
        ({"view_problem": "behind"}, ["history"]),
        ({"is_connected": False, "signal_age_s": None}, ["bus"]),
        ({"signal_age_s": None}, ["signals"]),
        ({"signal_age_s": 4.0}, ["signals"]),
        ({"is_stopping": True}, ["stopping"]),
    ],
)
def test_every_step_of_the_wake_path_that_is_broken_is_named(change: dict[str, object], what: list[str]) -> None:
    report = readiness.report(RouteTable(), facts(**change), now_s=fleet.T0)

    assert what == [problem["what"] for problem in report["problems"]]
    assert report["ready"] == (not what)

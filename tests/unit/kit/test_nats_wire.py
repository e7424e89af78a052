"""Frames, headers and filters, without a server."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.bus import AppendConflict, AppendFull, AppendRefused, AppendUnknown, Entry, subject_matches
from kit.nats_wire import (
    append_error,
    delivery_of,
    disjoint_filters,
    fact_block,
    frame,
    header_block,
    status_of,
    stored_message,
)

tokens = st.sampled_from(["a", "b", "c"])
subjects = st.lists(tokens, min_size=1, max_size=4).map(".".join)
wildcards = st.builds(
    lambda parts, is_open: ".".join([*parts, ">"] if is_open else parts),
    st.lists(st.one_of(tokens, st.just("*")), min_size=1, max_size=3),
    st.booleans(),
)


@given(st.lists(wildcards, min_size=1, max_size=5), subjects)
def test_disjoint_filters_match_at_least_as_much(filters: list[str], subject: str) -> None:
    if any(subject_matches(pattern, subject) for pattern in filters):
        assert any(subject_matches(pattern, subject) for pattern in disjoint_filters(filters))


@given(st.lists(wildcards, min_size=1, max_size=5), subjects)
def test_no_subject_matches_two_disjoint_filters(filters: list[str], subject: str) -> None:
    for one, other in combinations(disjoint_filters(filters), 2):
        assert not (subject_matches(one, subject) and subject_matches(other, subject))


@given(
    st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0", exclude_categories=["Z", "Cc"]), min_size=1),
    st.binary(),
    st.integers(0, 2**53),
    st.integers(0, 2**53),
    st.text("0123456789abcdef", max_size=64),
)
def test_an_entrys_headers_are_read_back(id: str, body: bytes, cause: int, cursor: int, previous: str) -> None:
    entry = Entry(
        subject="a.b", body=body, id=id, cause_seq=cause, cursor_seq=cursor, previous_hash=previous, traceparent="00-1"
    )

    stored = stored_message(9, 1.5, "a.b", body, fact_block([], entry))

    assert (id, cause, cursor, previous, "00-1") == (
        stored.id, stored.cause_seq, stored.cursor_seq, stored.previous_hash, stored.traceparent,
    )  # fmt: skip


@given(st.binary())
def test_no_header_block_of_an_outsider_can_fail_a_reader(block: bytes) -> None:
    headers = b"NATS/1.0\r\n" + block

    stored_message(1, 0.0, "a", b"", headers)
    status_of(headers)


@pytest.mark.parametrize("chain", ["", "1,2", "a,b,c", "-1,2,x", "1,2,3,4", "\N{SUPERSCRIPT TWO},1,x"])
def test_a_malformed_chain_counts_as_none(chain: str) -> None:
    stored = stored_message(1, 0.0, "a", b"", header_block([("Sublet-Chain", chain)]))

    assert (stored.cause_seq, stored.cursor_seq, stored.previous_hash) == (0, 0, "")


def test_ids_of_other_publishers_are_known_by_their_names() -> None:
    for name in ("Sublet-Id", "Nats-Msg-Id", "ce-id", "CE-ID"):
        assert stored_message(1, 0.0, "a", b"", header_block([(name, "x")])).id == "x"


def test_frames_are_what_the_protocol_says() -> None:
    assert frame("a.b", b"xyz") == b"PUB a.b 3\r\nxyz\r\n"
    assert frame("a.b", b"", reply="r.1") == b"PUB a.b r.1 0\r\n\r\n"
    headers = header_block([("k", "v")])
    assert frame("a", b"xy", reply="r", headers=headers) == b"HPUB a r 18 20\r\nNATS/1.0\r\nk: v\r\n\r\nxy\r\n"


@pytest.mark.parametrize("value", ["a\r\nb: c", "a\nb", "a\rb"])
def test_a_header_value_holds_no_line_break(value: str) -> None:
    with pytest.raises(ValueError, match="line break"):
        header_block([("k", value)])


@pytest.mark.parametrize(
    ("code", "error_code", "kind"),
    [
        (400, 10071, AppendConflict),
        (400, 10164, AppendUnknown),
        (400, 10176, AppendUnknown),
        (503, 10008, AppendUnknown),
        (503, 10023, AppendFull),
        (500, 10047, AppendFull),
        (400, 10054, AppendRefused),
        (400, 10077, AppendRefused),
        (400, 10199, AppendRefused),
    ],
)
def test_the_servers_errors_say_whether_to_send_again(code: int, error_code: int, kind: type[Exception]) -> None:
    error = append_error({"code": code, "err_code": error_code, "description": "so it is"})

    assert type(error) is kind
    assert "so it is" in str(error)


def test_both_forms_of_an_acknowledgement_subject_are_read() -> None:
    short = b"$JS.ACK.SUBLET.read-1.1.42.7.1795598999369256039.3"
    long = b"$JS.ACK.hub.ACCHASH.SUBLET.read-1.1.42.7.1795598999369256039.3.rand"

    assert delivery_of(short) == delivery_of(long) == (42, 7, 1795598999369256039 / 1e9, 3)

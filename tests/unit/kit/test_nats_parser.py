"""Frames from bytes, however they are cut; and bytes that are no frames."""

import itertools

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.nats_parser import LINE_BYTES_MAX, Parser, ProtocolViolation

pytestmark = pytest.mark.anyio

Got = list[tuple[bytes, ...]]

FRAMES = (
    b"MSG a.b 1 3\r\nxyz\r\n"
    b"PING\r\n"
    b"MSG a.b 1 r.1 4\r\n\r\n\r\n\r\n"
    b"HMSG a.b 2 r.1 12 14\r\nNATS/1.0\r\n\r\nhi\r\n"
    b"INFO {}\r\n"
    b"HMSG a.b 2 12 12\r\nNATS/1.0\r\n\r\n\r\n"
    b"MSG other 3 1\r\nx\r\n"
    b"MSG a.b 1 0\r\n\r\n"
)
EXPECTED = [
    (b"1", b"a.b", b"", b"", b"xyz"),
    (b"PING\r\n",),
    (b"1", b"a.b", b"r.1", b"", b"\r\n\r\n"),
    (b"2", b"a.b", b"r.1", b"NATS/1.0\r\n\r\n", b"hi"),
    (b"INFO {}\r\n",),
    (b"2", b"a.b", b"", b"NATS/1.0\r\n\r\n", b""),
    (b"1", b"a.b", b"", b"", b""),
]


def parser() -> tuple[Parser, Got]:
    got: Got = []

    async def control(line: bytes) -> None:
        got.append((line,))

    def receiver(sid: bytes) -> object:
        return lambda subject, reply, headers, body: got.append((sid, subject, reply, headers or b"", body))

    return Parser({b"1": receiver(b"1"), b"2": receiver(b"2")}, control), got  # type: ignore[dict-item]


@given(st.lists(st.integers(0, len(FRAMES)), max_size=8))
def test_frames_are_the_same_however_they_are_cut(cuts: list[int]) -> None:
    made, got = parser()

    async def feed() -> None:
        places = sorted({0, *cuts, len(FRAMES)})
        for begin, end in itertools.pairwise(places):
            await made.parse(FRAMES[begin:end])

    anyio.run(feed)

    assert got == EXPECTED


@pytest.mark.parametrize(
    "data",
    [
        b"MSG a 1 x\r\n",
        b"MSG a 1 -9\r\n",
        b"MSG a\r\n",
        b"MSG a 1 r q 1\r\nx\r\n",
        b"MSG a 1 1\r\nxyz\r\n",
        b"HMSG a 1 9 2\r\nxx\r\n",
        b"HMSG a 1 z 2\r\nxx\r\n",
        b"x" * (LINE_BYTES_MAX + 1),
    ],
)
async def test_what_is_no_protocol_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        await parser()[0].parse(data)


async def test_a_new_connection_starts_afresh() -> None:
    made, got = parser()
    await made.parse(FRAMES[:15])
    made.reset()
    await made.parse(FRAMES)

    assert got == EXPECTED

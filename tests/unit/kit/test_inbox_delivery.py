"""Whatever bytes an outsider stores in the inbox, placement gets an input that it can reject."""

import pytest

from kit.bus import Stored
from kit.inbox import inbox_delivery
from kit.outcomes import UnreadableCommand

BODIES = {
    "no JSON": b"\x00\xff{",
    "no UTF-8": b'{"type": "inbox.park_requested.v1", "command_id": "\xff", "model": "a"}',
    "nested too deeply": b'{"type": "inbox.park_requested.v1", "command_id": "c", "x": ' + b"[" * 5000,
    "an array": b"[" * 5000,
    "unknown type": b'{"type": "inbox.no_such_thing.v1", "command_id": "c"}',
    "unknown version": b'{"type": "inbox.park_requested.v99", "command_id": "c"}',
    "a fact": b'{"type": "swapper.park_decided.v1", "command_id": "c"}',
    "nothing": b"",
}


@pytest.mark.parametrize("case", BODIES)
def test_unreadable_bytes_become_a_command_that_can_be_rejected(case: str) -> None:
    stored = Stored(
        seq=7, time_s=1.0, subject="sublet.in.default.inbox_park_requested_v1", body=BODIES[case], id="id-1"
    )

    delivery = inbox_delivery(stored, now_s=1.0)

    assert isinstance(delivery.input, UnreadableCommand)
    assert delivery.input.command_id in {"c", "id-1"}
    assert len(delivery.input.reason) > 10
    assert (7, "default") == (delivery.inbox_seq, delivery.tenant)

"""NATS in bytes: frames to send, header blocks received, and what the server's errors mean. Knows no client library.

Building a frame ourselves costs a fifth of what the client library takes, and what is received stays raw until someone
looks at it (docs/adr/0010).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, Final

from kit.bus import AppendConflict, AppendFull, AppendRefused, AppendUnknown, BusError, Entry, Stored

ID_HEADER: Final = "Sublet-Id"
"""Not `Nats-Msg-Id`: with the append check a retry would conflict instead of being a duplicate, and a batch refuses ids
that it has seen."""
CHAIN_HEADER: Final = "Sublet-Chain"
"""``<cause>,<cursor>,<previous hash>``."""
TRACE_HEADER: Final = "traceparent"
DEDUPLICATION_HEADER: Final = "Nats-Msg-Id"

WRONG_LAST_SEQUENCE: Final = 10071
STREAM_NOT_FOUND: Final = 10059
NO_MESSAGE_FOUND: Final = 10037
STORE_FAILED: Final = 10077
# The server may say something else in a moment: 10164 (R3: another append under the subject is in process), 10176 (part
# of a batch was lost on the way), 10008 and 10009 (no leader now), 10118 (stream offline), 10074 (could not apply it).
TRANSIENT_ERRORS: Final = frozenset({10008, 10009, 10074, 10118, 10164, 10176})
# 503 as well, but waiting does not help: no storage left, no resources left by the configured limits.
FULL_ERRORS: Final = frozenset({10023, 10028, 10047})

# The headers as `fact_block` writes them. Everything else is read by name; this is the way of a long replay.
_OWN_HEADERS = re.compile(
    rb"\r\nSublet-Id: ([^\r\n]*)\r\nSublet-Chain: (\d{1,19}),(\d{1,19}),([^\r\n,]*)\r\n(?:traceparent: ([^\r\n]*)\r\n)?"
)
_NOT_IN_A_SUBJECT = re.compile(r"[\s\x00]")


def service_inbox(user: str) -> str:
    """Where a service's answers arrive. Tenants have another form, so that no tenant's name can be a service's."""
    return f"_INBOX.{user}"


def tenant_inbox(tenant: str) -> str:
    """The inbox prefix that `sublet/` uses."""
    return f"_INBOX_{tenant}"


class ApiError(BusError):
    """JetStream answered with an error."""

    def __init__(self, error: Mapping[str, Any]) -> None:
        """`error` is the object of that name in the server's answer."""
        self.code = int(error.get("code", 0))
        self.error_code = int(error.get("err_code", 0))
        super().__init__(f"{error.get('description', 'unknown error')} ({self.error_code or self.code})")

    @property
    def is_transient(self) -> bool:
        """Asking again may help."""
        if self.error_code in FULL_ERRORS:
            return False
        return self.error_code in TRANSIENT_ERRORS or self.code >= 500  # As in HTTP.


def append_error(error: Mapping[str, Any]) -> BusError:
    """What an append or a stored publish raises for this answer of the server."""
    answered = ApiError(error)
    if answered.error_code == WRONG_LAST_SEQUENCE:
        return AppendConflict(str(answered))
    if answered.error_code in FULL_ERRORS:
        return AppendFull(
            f"the NATS server's store is full: {answered}; free some space, or raise max_file_store and restart it"
        )
    if answered.error_code == STORE_FAILED and "maximum" in str(answered):
        return AppendFull(f"the stream is as large as it may be: {answered}; raise its limits")
    if answered.is_transient:
        return AppendUnknown(str(answered))
    return AppendRefused(str(answered))


def checked_subject(subject: str) -> str:
    """The subject, if it cannot be taken for more than one word of the protocol. Raises `ValueError`."""
    if not subject or _NOT_IN_A_SUBJECT.search(subject):
        raise ValueError(f"not a subject: {subject!r}")
    return subject


@lru_cache(maxsize=4096)
def _encoded_subject(subject: str) -> bytes:
    return checked_subject(subject).encode()


def frame(subject: str, body: bytes, *, reply: str | bytes = "", headers: bytes = b"") -> bytes:
    """One message as the server reads it: ``PUB``, or ``HPUB`` when there is a header block.

    A reply subject in bytes is our own and not checked again.
    """
    to = _encoded_subject(subject)
    if reply:
        to = b"%b %b" % (to, reply if isinstance(reply, bytes) else _encoded_subject(reply))
    if not headers:
        return b"PUB %b %d\r\n%b\r\n" % (to, len(body), body)
    return b"HPUB %b %d %d\r\n%b%b\r\n" % (to, len(headers), len(headers) + len(body), headers, body)


def disjoint_filters(filters: Iterable[str]) -> list[str]:
    """Wildcards of which no two overlap (the server refuses those that do) and that together match at least as much.

    One that another contains is dropped. Two that overlap in part give way to one that contains both, so the reader
    must look again at what it gets.
    """
    disjoint: list[str] = []
    waiting = list(filters)
    while waiting:
        wanted = waiting.pop()
        other = next((present for present in disjoint if _overlap(present, wanted)), None)
        if other is None:
            disjoint.append(wanted)
        else:
            disjoint.remove(other)
            waiting.append(_union(other, wanted))
    return sorted(disjoint)


def _overlap(one: str, other: str) -> bool:
    """Whether some subject matches both."""
    left, right = one.split("."), other.split(".")
    for mine, theirs in zip(left, right, strict=False):
        if ">" in {mine, theirs}:
            return True
        if mine != theirs and "*" not in {mine, theirs}:
            return False
    return len(left) == len(right)


def _union(one: str, other: str) -> str:
    """The narrowest wildcard that contains both."""
    left, right = one.split("."), other.split(".")
    tokens: list[str] = []
    for mine, theirs in zip(left, right, strict=False):
        if ">" in {mine, theirs}:
            return ".".join([*tokens, ">"])
        tokens.append(mine if mine == theirs else "*")
    return ".".join(tokens) if len(left) == len(right) else ".".join([*tokens, ">"])


def header_block(headers: Sequence[tuple[str, str]]) -> bytes:
    """The headers as one block; empty bytes when there are none. Raises `ValueError` for a line break in one."""
    if not headers:
        return b""
    return _block("".join([f"{name}: {value}\r\n" for name, value in headers]), len(headers))


def fact_block(before: Sequence[tuple[str, str]], entry: Entry) -> bytes:
    """The headers of a fact: those `before` (of its check or batch), and ours, three at most. Raises `ValueError`."""
    lines = "".join([f"{name}: {value}\r\n" for name, value in before])
    chain = f"{entry.cause_seq},{entry.cursor_seq},{entry.previous_hash}"
    lines = f"{lines}{ID_HEADER}: {entry.id}\r\n{CHAIN_HEADER}: {chain}\r\n"
    if not entry.traceparent:
        return _block(lines, len(before) + 2)
    return _block(f"{lines}{TRACE_HEADER}: {entry.traceparent}\r\n", len(before) + 3)


def _block(lines: str, count: int) -> bytes:
    if lines.count("\n") != count or lines.count("\r") != count:
        raise ValueError("a header holds a line break")
    return f"NATS/1.0\r\n{lines}\r\n".encode()


def parsed_headers(block: bytes | None) -> dict[bytes, bytes]:
    """{lower-case name: value} of a received block; its status line is left to `status_of`."""
    if not block:
        return {}
    parsed = {}
    for line in block.split(b"\r\n")[1:]:
        name, colon, value = line.partition(b":")
        if colon:
            parsed[name.lower()] = value.strip()
    return parsed


def status_of(block: bytes | None) -> tuple[int, str]:
    """The inline status of a received block and its text, for example ``(503, "")``; ``(0, "")`` when it has none."""
    if not block or block[8:9] != b" ":
        return 0, ""
    number, _, text = block[9 : block.index(b"\r\n")].decode(errors="replace").partition(" ")
    return (int(number), text) if number.isdigit() else (0, "")


def stored_message(seq: int, time_s: float, subject: str, body: bytes, headers: bytes | None) -> Stored:
    """A message of a stream. Outsiders may have written any headers, so nothing in them can make this fail."""
    if not headers:
        return Stored(seq=seq, time_s=time_s, subject=subject, body=body)
    if ours := _OWN_HEADERS.search(headers):
        own_id, cause_seq, cursor_seq, hash_, trace = ours.groups(b"")
        return Stored(
            seq=seq,
            time_s=time_s,
            subject=subject,
            body=body,
            id=own_id.decode(errors="replace"),
            cause_seq=int(cause_seq),
            cursor_seq=int(cursor_seq),
            previous_hash=hash_.decode(errors="replace"),
            traceparent=trace.decode(errors="replace"),
        )
    parsed = parsed_headers(headers)
    own_id = parsed.get(b"sublet-id") or parsed.get(b"nats-msg-id") or parsed.get(b"ce-id") or b""
    cause, cursor, previous_hash = _chain(parsed.get(b"sublet-chain", b""))
    return Stored(
        seq=seq,
        time_s=time_s,
        subject=subject,
        body=body,
        id=own_id.decode(errors="replace"),
        cause_seq=cause,
        cursor_seq=cursor,
        previous_hash=previous_hash,
        traceparent=parsed.get(b"traceparent", b"").decode(errors="replace"),
    )


def _chain(value: bytes) -> tuple[int, int, str]:
    parts = value.split(b",")
    if len(parts) != 3 or not (parts[0].isdigit() and parts[1].isdigit()):
        return 0, 0, ""
    return int(parts[0]), int(parts[1]), parts[2].decode(errors="replace")


def delivery_of(ack_subject: bytes) -> tuple[int, int, float, int]:
    """Stream sequence, consumer sequence, stream time of a delivered message, and how many more wait to be.

    ``$JS.ACK.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<ns>.<pending>``, or with a domain and an
    account hash behind ``$JS.ACK`` and a random token at the end.
    """
    tokens = ack_subject.split(b".")
    at = 5 if len(tokens) < 11 else 7
    return int(tokens[at]), int(tokens[at + 1]), int(tokens[at + 2]) / 1e9, int(tokens[at + 3])


def unix_seconds(time: str) -> float:
    """The server's way to write a time (RFC 3339, nanoseconds, UTC) in Unix seconds."""
    return datetime.fromisoformat(time).timestamp()

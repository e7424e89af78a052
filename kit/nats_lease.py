"""Liveness leases in a key-value bucket: one message per lease, replaced only by who knows its last sequence.

Whether a lease has run out is judged by the server's clock alone: the time of the lease's message against the time that
the server puts on its answers. Per-key time limits of the server are not used: they come in whole seconds, and a marker
that they leave behind must be taken over by its sequence anyway.
"""

import base64
import json
from dataclasses import dataclass
from typing import Final

from kit.bus import BusError
from kit.nats_connection import Connection
from kit.nats_wire import NO_MESSAGE_FOUND, WRONG_LAST_SEQUENCE, ApiError, header_block, status_of, unix_seconds

LEASE_BUCKET: Final = "sublet-leases"
LEASE_STREAM: Final = f"KV_{LEASE_BUCKET}"
LEASE_SUBJECTS: Final = f"$KV.{LEASE_BUCKET}.>"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lease:
    seq: int
    renewed_at_s: float
    holder: str
    term_s: float


class Leases:
    """Takes and renews leases over one connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._own_seqs: dict[str, int] = {}
        """{lease: sequence of our last renewal}: renewing costs one round trip while nobody else writes."""

    async def acquire(self, name: str, holder: str, *, term_s: float) -> bool:
        """See `kit.bus.Bus.acquire_lease`."""
        own_seq = self._own_seqs.get(name)
        if own_seq is not None and await self._write(name, holder, term_s=term_s, after_seq=own_seq):
            return True
        lease = await self._present(name)
        if lease is None:
            return await self._write(name, holder, term_s=term_s, after_seq=0)
        if lease.holder != holder and await self._server_now_s() < lease.renewed_at_s + lease.term_s:
            return False
        return await self._write(name, holder, term_s=term_s, after_seq=lease.seq)

    async def _write(self, name: str, holder: str, *, term_s: float, after_seq: int) -> bool:
        body = json.dumps({"holder": holder, "term_s": term_s}).encode()
        headers = header_block([("Nats-Expected-Last-Subject-Sequence", str(after_seq))])
        answer = await self._connection.ask(f"$KV.{LEASE_BUCKET}.{name}", body, headers=headers)
        if status_of(answer.headers)[0]:
            raise BusError("there is no lease bucket, or it does not answer")
        answered = json.loads(answer.body)
        self._own_seqs.pop(name, None)
        if "error" in answered:
            error = ApiError(answered["error"])
            if error.error_code == WRONG_LAST_SEQUENCE:
                return False
            raise error
        self._own_seqs[name] = int(answered["seq"])
        return True

    async def _present(self, name: str) -> _Lease | None:
        try:
            request = {"last_by_subj": f"$KV.{LEASE_BUCKET}.{name}"}
            found = (await self._connection.api(f"STREAM.MSG.GET.{LEASE_STREAM}", request))["message"]
        except ApiError as error:
            if error.error_code == NO_MESSAGE_FOUND:
                return None
            raise
        try:
            body = json.loads(base64.b64decode(found.get("data", "")))
            holder, term_s = str(body["holder"]), float(body["term_s"])
        except (ValueError, KeyError, TypeError):
            holder, term_s = "", 0.0  # Not written by us, a deletion for example: nobody holds it.
        return _Lease(seq=found["seq"], renewed_at_s=unix_seconds(found["time"]), holder=holder, term_s=term_s)

    async def _server_now_s(self) -> float:
        info = await self._connection.api(f"STREAM.INFO.{LEASE_STREAM}")
        if "ts" not in info:
            raise BusError("the server does not tell its time; 2.12 or newer is needed")
        return unix_seconds(info["ts"])

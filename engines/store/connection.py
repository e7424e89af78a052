"""One connection to the memory broker: a line asks, a line answers, descriptors travel beside it.

The broker may be restarted while the engine lives on. A thread of the connection notices, connects again and says what
is still mapped; what was being asked at that moment is lost with the old broker, and `ConnectionLostError` says so.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import msgspec

from engines.store.messages import DESCRIPTORS_MAX, Ask, BrokerDone, BrokerRefused, EngineHello

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# A broker that is started again is there within a second or two; an engine that cannot park or wake for longer says so.
CONNECT_WITHIN_S = 10.0
CONNECT_PAUSE_S = 0.05
# The slowest answer is a seal of a whole GPU (141 GB) behind a wake of another one, at the speed of a PCIe 4 link.
ANSWER_WITHIN_S = 60.0
HELLO_WITHIN_S = 2.0
WATCH_EVERY_S = 0.5
LINE_BYTES_MAX = 1 << 20
REFUSED = b'{"refused"'

T = TypeVar("T")


class StoreError(Exception):
    """The memory broker did not do it. `short_by_bytes` is what was missing where bytes were, else 0.

    `is_refused`: it answered, with this reason; above 0, `again_after_s` says when another try may help. Otherwise it
    is not there, or broke off.
    """

    def __init__(
        self, reason: str, *, short_by_bytes: int = 0, is_refused: bool = False, again_after_s: float = 0.0
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.short_by_bytes = short_by_bytes
        self.is_refused = is_refused
        self.again_after_s = again_after_s


class ConnectionLostError(Exception):
    """The broker of this connection is gone, with all that it knew. What was asked has to be asked again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    """Where the broker is, and as whom it knows this engine."""

    socket_path: str
    replica_id: str
    lease_epoch: int
    key: str = field(repr=False)


def settings_from(environment: Mapping[str, str]) -> StoreSettings | None:
    """What the node agent put into the environment; None where the engine keeps its memory itself.

    Raises `ValueError` when a part of it is missing or wrong.
    """
    path = environment.get("SUBLET_BROKER_SOCKET", "")
    if not path:
        return None
    values = {name: environment.get(name, "") for name in ("SUBLET_BROKER_KEY", "SUBLET_REPLICA_ID")}
    epoch = environment.get("SUBLET_LEASE_EPOCH", "")
    missing = [name for name, value in values.items() if not value]
    if missing or not epoch.isdecimal():
        wrong = ", ".join([*missing, *(() if epoch.isdecimal() else ("SUBLET_LEASE_EPOCH",))])
        raise ValueError(f"SUBLET_BROKER_SOCKET is set, but not, or not rightly: {wrong}")
    return StoreSettings(
        socket_path=path,
        replica_id=values["SUBLET_REPLICA_ID"],
        lease_epoch=int(epoch),
        key=values["SUBLET_BROKER_KEY"],
    )


class Connection:
    """Blocking; one question at a time. `held` tells what is mapped now, `{gpu_uuid: bytes}`, for each hello.

    `incarnation` counts the hellos that were heard: what an earlier one lent, this broker does not know.
    """

    def __init__(self, settings: StoreSettings, *, held: Callable[[], Mapping[str, int]]) -> None:
        self.incarnation = 0
        self.lock = threading.RLock()  # held from a question to the last of its answers
        self._settings = settings
        self._held = held
        self._socket: socket.socket | None = None
        self._received = bytearray()
        self._descriptors: list[int] = []
        self._is_closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="store", daemon=True)

    @property
    def is_connected(self) -> bool:
        """As far as is known: a broker that has just died is noticed when it is asked."""
        return self._socket is not None

    def open(self) -> None:
        """Connect and say hello. Raises `StoreError`."""
        with self.lock:
            self._connected()
        if not self._watcher.is_alive() and not self._is_closed.is_set():
            self._watcher.start()

    def ask(self, question: Ask, answer: type[T]) -> T:
        """One answer without descriptors. Raises `StoreError` when refused, `ConnectionLostError`."""
        with self.lock:
            self.send(question)
            return self.hear(answer)

    def send(self, question: Ask) -> None:
        """For questions with several answers: hold `lock` until the last. Connects first where that is needed."""
        stream = self._connected()
        try:
            stream.sendall(msgspec.json.encode(question) + b"\n")
        except OSError as error:
            raise self._lost(error) from error

    def hear(self, answer: type[T]) -> T:
        """The next line; its descriptors stay here until `take_descriptors`."""
        line = self._line()
        if line.startswith(REFUSED):
            self._close_descriptors()
            refused = msgspec.json.decode(line, type=BrokerRefused)
            raise StoreError(
                refused.refused,
                short_by_bytes=refused.short_by_bytes,
                is_refused=True,
                again_after_s=refused.again_after_s,
            )
        try:
            return msgspec.json.decode(line, type=answer)
        except msgspec.DecodeError as error:
            raise self._lost(error) from error

    def take_descriptors(self, count: int) -> tuple[int, ...]:
        """Those of the last line, the caller's to close. Raises `ConnectionLostError` when there are not so many."""
        if len(self._descriptors) < count:
            raise self._lost(f"{len(self._descriptors)} descriptors of {count}")
        taken, self._descriptors = self._descriptors[:count], self._descriptors[count:]
        return tuple(taken)

    def close(self) -> None:
        """The broker takes back what this connection has. Idempotent."""
        self._is_closed.set()
        with self.lock:
            self._drop()

    # -- inside

    def _connected(self) -> socket.socket:
        """The socket, after a hello; tries for `CONNECT_WITHIN_S`, so that a broker's restart is waited for."""
        give_up_s = time.monotonic() + CONNECT_WITHIN_S
        while self._socket is None:
            if self._is_closed.is_set():
                raise StoreError("the connection to the memory broker is closed")
            try:
                self._connect()
            except StoreError as error:
                # A broker that was started again knows the engine only when the node agent has told it.
                self._drop()
                if not error.again_after_s or time.monotonic() > give_up_s:
                    raise
                self._is_closed.wait(error.again_after_s)
            except (OSError, ConnectionLostError) as error:
                self._drop()
                if time.monotonic() > give_up_s:
                    raise StoreError(f"no memory broker at {self._settings.socket_path}: {error}") from error
                self._is_closed.wait(CONNECT_PAUSE_S)
        return self._socket

    def _connect(self) -> None:
        settings = self._settings
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket = stream
        stream.settimeout(HELLO_WITHIN_S)
        stream.connect(settings.socket_path)
        hello = EngineHello(
            replica_id=settings.replica_id,
            lease_epoch=settings.lease_epoch,
            key=settings.key,
            held_bytes={gpu_uuid: size for gpu_uuid, size in self._held().items() if size},
        )
        stream.sendall(msgspec.json.encode(hello) + b"\n")
        self.hear(BrokerDone)
        stream.settimeout(ANSWER_WITHIN_S)
        self.incarnation += 1

    def _line(self) -> bytes:
        searched = 0
        while (end := self._received.find(b"\n", searched)) < 0:
            searched = len(self._received)
            if searched > LINE_BYTES_MAX:
                raise self._lost("an answer without an end")
            self._receive()
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return line

    def _receive(self) -> None:
        """More bytes, with the descriptors beside them: those wait in order, for the lines that name them."""
        stream = self._socket
        if stream is None:
            raise ConnectionLostError("not connected")
        try:
            content, descriptors, flags, _ = socket.recv_fds(
                stream, 1 << 16, DESCRIPTORS_MAX + 3, socket.MSG_CMSG_CLOEXEC
            )
        except OSError as error:
            raise self._lost(error) from error
        self._descriptors.extend(descriptors)
        if flags & socket.MSG_CTRUNC:
            raise self._lost("descriptors were cut off; is the limit of open files too low?")
        if not content:
            raise self._lost("it closed the connection")
        self._received += content

    def _lost(self, reason: object) -> ConnectionLostError:
        self._drop()
        return ConnectionLostError(f"the memory broker is gone: {reason}")

    def _drop(self) -> None:
        stream, self._socket = self._socket, None
        if stream is not None:
            stream.close()
        self._received.clear()
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _watch(self) -> None:
        """Connect again when the broker has gone while nobody asks, so that the next one soon knows what is held."""
        while not self._is_closed.wait(0 if self._sees_life() else CONNECT_PAUSE_S):
            # One try at a time, so that a park in between need not wait for a broker that stays away.
            with self.lock:
                if self._is_gone() and not self._is_closed.is_set():
                    self._drop()
                    try:
                        self._connect()
                    except (OSError, StoreError, ConnectionLostError):
                        self._drop()

    def _sees_life(self) -> bool:
        """Waits a while; False at once when the broker hangs up."""
        stream = self._socket
        if stream is None:
            return False
        poll = select.poll()
        try:
            poll.register(stream, select.POLLRDHUP)
            return not poll.poll(WATCH_EVERY_S * 1000)
        except (OSError, ValueError):
            return False

    def _is_gone(self) -> bool:
        if self._socket is None:
            return True
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        return bool(poll.poll(0))

"""Finds the token usage in an answer, and takes it out of a stream that shall not show it. Pure."""

from typing import Final

import msgspec

MARK: Final = b'"usage":{'
EVENT_END: Final = b"\n\n"
CARRY_BYTES_MAX: Final = 1 << 16
"""Of an event that has not ended; a longer one is passed on as it is."""


class Usage(msgspec.Struct):
    """Tokens as the engine counted them."""

    prompt_tokens: int = 0
    completion_tokens: int | None = 0


class _Answer(msgspec.Struct):
    usage: Usage | None = None


class _Chunk(msgspec.Struct):
    choices: list[msgspec.Raw] = []
    usage: Usage | None = None


_ANSWER: Final = msgspec.json.Decoder(_Answer)
_CHUNK: Final = msgspec.json.Decoder(_Chunk)


def usage_of(body: bytes) -> Usage | None:
    """The usage in a whole answer; None when there is none."""
    try:
        return _ANSWER.decode(body).usage
    except msgspec.MsgspecError:
        return None


class StreamUsage:
    """Watches a stream of server-sent events go by. Looks for one mark and parses only the event that holds it."""

    def __init__(self, *, hides: bool) -> None:
        self.usage: Usage | None = None
        self.tail = b""
        """The end of what went by, to see how the stream ended."""
        self._hides = hides
        self._carry = b""

    def pass_on(self, chunk: bytes) -> bytes:
        """What the client gets for this chunk; may be empty, when an event has not ended yet."""
        if self._hides:
            chunk = self._whole_events(chunk)
        if MARK in chunk:
            chunk = self._take(chunk)
        if chunk:
            self.tail = chunk[-4096:] if len(chunk) >= 64 else (self.tail + chunk)[-4096:]
        return chunk

    def rest(self) -> bytes:
        """What is left when the stream ends in the middle of an event."""
        carry, self._carry = self._carry, b""
        return carry

    @property
    def has_ended(self) -> bool:
        """True when the stream said that it is complete, or named an error."""
        return b"data: [DONE]" in self.tail or b'data: {"error"' in self.tail

    def _whole_events(self, chunk: bytes) -> bytes:
        if self._carry:
            chunk = self._carry + chunk
            self._carry = b""
        if chunk.endswith(EVENT_END):
            return chunk
        end = chunk.rfind(EVENT_END)
        cut = 0 if end < 0 else end + len(EVENT_END)
        # Other line ends than ours (a proxy's CRLF) would be carried for ever: such a stream is passed on as it is.
        if len(chunk) - cut > CARRY_BYTES_MAX or b"\r\n\r\n" in chunk[cut:]:
            self._hides = False
            return chunk
        self._carry = chunk[cut:]
        return chunk[:cut]

    def _take(self, chunk: bytes) -> bytes:
        kept = []
        for event in chunk.split(EVENT_END):
            found = self._parse(event) if MARK in event else None
            if found is not None and found.usage is not None:
                self.usage = found.usage
                if self._hides and not found.choices:
                    continue
            kept.append(event)
        return EVENT_END.join(kept)

    @staticmethod
    def _parse(event: bytes) -> _Chunk | None:
        try:
            return _CHUNK.decode(event[event.index(b"{") :])
        except (msgspec.MsgspecError, ValueError):
            return None

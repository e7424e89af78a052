"""Many tries that know nothing of each other, over several forked processes; what failed, by try."""

import json
import os
import signal
from collections.abc import Callable, Sequence
from typing import Any


def failures(tries: Sequence[Any], attempt: Callable[[Any], None], *, process_count: int = 1) -> dict[str, str]:
    """`{try: why it failed}` of all of them, so that one report names every one that fails.

    Fork, and not threads or a pool: a try is a whole event loop, and what it needs was computed before. A process that
    ends without a word has failed too.
    """
    if process_count == 1:
        return _failed_of(tries, attempt)
    parts = [tries[number::process_count] for number in range(process_count)]
    children = [_forked(part, attempt) for part in parts if part]
    found: dict[str, str] = {}
    try:
        for pid, pipe in children:
            with os.fdopen(pipe, "rb") as told:
                content = told.read()
            found |= json.loads(content) if content else {f"process {pid}": "it ended without a word"}
    finally:
        for pid, _ in children:
            os.kill(pid, signal.SIGKILL)  # As a rule it is a zombie by now.
            os.waitpid(pid, 0)
    return found


def _forked(tries: Sequence[Any], attempt: Callable[[Any], None]) -> tuple[int, int]:
    """Its pid, and the pipe that tells what failed in it."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    try:
        os.close(reading)
        content = json.dumps(_failed_of(tries, attempt)).encode()
        with os.fdopen(writing, "wb") as told:
            told.write(content)
    finally:
        os._exit(0)  # None of what the parent would do at its end is ours.


def _failed_of(tries: Sequence[Any], attempt: Callable[[Any], None]) -> dict[str, str]:
    failed = {}
    for each in tries:
        try:
            attempt(each)
        except Exception as error:  # noqa: BLE001  (whatever it is, it is told with the try)
            failed[str(each)] = repr(_first(error))
    return failed


def _first(error: Exception) -> BaseException:
    return error.exceptions[0] if isinstance(error, ExceptionGroup) else error

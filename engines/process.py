"""What both engines need to be well-behaved processes: log lines, death with the parent, an end within two seconds."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import time
from datetime import UTC, datetime
from typing import Any, NoReturn

import msgspec

# After SIGTERM the process is gone within two seconds, even if a driver call hangs: this leaves 0.2 s for the kernel.
EXIT_WITHIN_S = 1.8

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2

_PR_SET_PDEATHSIG = 1
_STDOUT = 1
_PARENT_THREAD_ENDED = signal.SIGUSR1


class Log:
    """JSON lines on standard output: the message is a constant, the values are fields."""

    def __init__(self, **fields: Any) -> None:
        self._fields = fields

    def bind(self, **fields: Any) -> None:
        """Add fields to every later line."""
        self._fields = {**self._fields, **fields}

    def info(self, message: str, **fields: Any) -> None:
        self._write("info", message, fields)

    def warning(self, message: str, **fields: Any) -> None:
        self._write("warning", message, fields)

    def error(self, message: str, **fields: Any) -> None:
        self._write("error", message, fields)

    def _write(self, level: str, message: str, fields: dict[str, Any]) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "level": level, "message": message, **self._fields, **fields}
        # Straight to the descriptor: a buffered line that cannot be written would fail again at exit.
        with contextlib.suppress(OSError):  # whoever read the log is gone; that must not stop an engine, nor its end
            os.write(_STDOUT, msgspec.json.encode(line) + b"\n")


class LibraryRecords(logging.Handler):
    """Warnings and errors of libraries, as lines of the log."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        reason = repr(record.exc_info[1]) if record.exc_info else None
        self._log.warning("library warning", library=record.name, text=record.getMessage()[:500], reason=reason)


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one sentence, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        sentence = message[0].upper() + message[1:]
        self.exit(EXIT_USAGE, f"{self.prog}: {sentence.rstrip('.')}. Try --help.\n")


def byte_count(text: str) -> int:
    """An argument of so many bytes, more than zero."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes above zero")
    return int(text)


def seconds(text: str) -> float:
    """An argument of so many seconds, zero or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, zero or more")
    return value


def fraction(text: str) -> float:
    """An argument from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def positive(text: str) -> float:
    """An argument above zero."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above zero")
    return value


def count(text: str) -> int:
    """A whole-number argument above zero."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return int(text)


def gpu_list(text: str) -> tuple[str, ...]:
    """An argument that names one or several GPUs, with commas between them, each once."""
    uuids = tuple(text.split(","))
    if not all(uuids) or len(set(uuids)) < len(uuids):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of different GPUs with commas between them")
    return uuids


def port(text: str) -> int:
    """A TCP port; 0 lets the system choose one, which the log line `listening` then names."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to 65535")
    return int(text)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that both engines take."""
    parser.add_argument("--model", required=True, metavar="NAME", help="the name that clients use")
    parser.add_argument(
        "--memory-bytes",
        required=True,
        type=byte_count,
        metavar="N",
        help="device memory to live in on each GPU, context included",
    )
    parser.add_argument(
        "--gpu",
        required=True,
        type=gpu_list,
        metavar="UUID[,UUID...]",
        help="the GPU, as NVML prints it (GPU-...), or several: what the engine holds is spread over them evenly",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", required=True, type=port, metavar="P", help="port to listen on; 0 chooses a free one")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="decides all made-up content (default: 1)")
    parser.add_argument(
        "--outlive-parent", action="store_true", help="keep running when the process that started this one ends"
    )


def die_with_parent() -> None:
    """Ask the kernel for a signal when the thread that started us ends. Does nothing outside Linux.

    The thread may end while its process lives on (worker threads come and go), so the signal is one of its own:
    `stop_on_signals` looks whether the parent is still there. Before that is set up the signal ends the process.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, _PARENT_THREAD_ENDED, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


def stop_on_signals(stop: asyncio.Event, log: Log) -> None:
    """Set `stop` at SIGTERM or SIGINT, and end the process by force if it is still there shortly before two seconds.

    The signal of `die_with_parent` counts only when the parent is gone.
    """
    parent_pid = os.getppid()

    def on_signal(number: signal.Signals) -> None:
        is_from_kernel = number is _PARENT_THREAD_ENDED
        if stop.is_set() or (is_from_kernel and os.getppid() == parent_pid):
            return
        stop.set()
        log.info("stopping", reason="parent ended" if is_from_kernel else number.name)
        deadline = threading.Timer(EXIT_WITHIN_S, os._exit, args=(EXIT_FAILED,))
        deadline.daemon = True
        deadline.start()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, _PARENT_THREAD_ENDED):
        loop.add_signal_handler(number, on_signal, number)


def process_age_s() -> float:
    """Seconds since this process was started, before the interpreter ran; -1 where the system does not say."""
    try:
        with open("/proc/self/stat", "rb") as file:  # noqa: PTH123 (a path object costs an import)
            started_ticks = int(file.read().rsplit(b")", 1)[1].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return -1.0

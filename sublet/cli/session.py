"""What a verb runs in: the context, a client, a clock, and the options that every verb has."""

from __future__ import annotations

import asyncio
import functools
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sublet import context as contexts
from sublet.cli import output
from sublet.errors import InvalidInput

if TYPE_CHECKING:
    from sublet.client import Client

Result = TypeVar("Result")
Command = TypeVar("Command", bound=Callable[..., Any])

POLL_S = 0.3


@contextmanager
def _without_aiohttp() -> Iterator[None]:
    """NATS imports aiohttp where it is installed, for websockets only: 90 ms that no verb needs."""
    if "aiohttp" in sys.modules or "nats" in sys.modules:
        yield
        return
    sys.modules["aiohttp"] = None  # type: ignore[assignment]  # Python's own way to say: not to be imported.
    try:
        yield
    finally:
        del sys.modules["aiohttp"]


def _connect(context: contexts.Context) -> AbstractAsyncContextManager[Client]:
    with _without_aiohttp():
        import sublet.transport  # noqa: F401  # Loaded here, so that `connect` finds it without aiohttp.
    from sublet.client import connect

    return connect(context)


@dataclass(slots=True)
class Session:
    """Everything that a verb reaches outside with; tests pass other functions."""

    open_client: Callable[[contexts.Context], AbstractAsyncContextManager[Client]] = _connect
    environ: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    folder: Path = field(default_factory=Path.cwd)
    now_s: Callable[[], float] = time.time
    monotonic_s: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    context_path: str | None = None
    color: str = "auto"
    is_json: bool = False
    is_debug: bool = False

    def context(self) -> contexts.Context:
        path = Path(self.context_path) if self.context_path else None
        return contexts.load(self.environ, self.folder, path)

    def run(self, work: Callable[[Client], Awaitable[Result]]) -> Result:
        """Connect, do the work, disconnect."""

        async def connected() -> Result:
            async with self.open_client(self.context()) as client:
                if self.is_debug:
                    client.on_command = lambda sent: self.say(f"traceparent {sent.traceparent}  command {sent.id}")
                return await work(client)

        return asyncio.run(connected())

    def say(self, words: str) -> None:
        """Progress and remarks: to stderr, and not at all beside JSON unless asked for with --debug."""
        if not self.is_json or self.is_debug:
            click.echo(words, err=True)

    def emit(self, schema: str, body: dict[str, Any], *, is_line: bool = False) -> None:
        click.echo(output.as_json(schema, body, is_line=is_line))

    def show(self, text: str) -> None:
        """Data to stdout."""
        if text:
            click.echo(text, color=output.wants_color(self.color, self.environ))


class Verb(click.Command):
    """A command whose help shows examples before its options."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_help_text(ctx, formatter)
        with formatter.section("Examples"):
            for example in self.examples:
                formatter.write(f"{'':>{formatter.current_indent}}{example}\n")


def verb(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command its session as first argument, and the options ``--json`` and ``--debug``."""

    @click.option("--json", "is_json", is_flag=True, help="One JSON object on stdout; errors as JSON on stderr.")
    @click.option("--debug", "is_debug", is_flag=True, help="Print the trace id, and tracebacks of errors.")
    @click.pass_context
    @functools.wraps(command)
    def wrapped(ctx: click.Context, *args: Any, **options: Any) -> Any:
        session = ctx.ensure_object(Session)
        session.is_json, session.is_debug = options.pop("is_json"), options.pop("is_debug")
        return command(session, *args, **options)

    return wrapped


class Duration(click.ParamType[float]):
    """``90s``, ``5m``; a plain number is seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        from sublet.quantities import seconds_of

        if isinstance(value, int | float):
            return float(value)
        seconds = seconds_of(value) if not value.replace(".", "", 1).isdigit() else float(value)
        if seconds is None:
            self.fail(f"'{value}' is no duration; write 90s or 5m", param, ctx)
        return seconds


def following(default_s: float) -> Callable[[Command], Command]:
    """The options ``--detach`` and ``--timeout`` of verbs that follow what they started."""

    def decorate(command: Command) -> Command:
        command = click.option(
            "--timeout", "timeout_s", type=Duration(), default=default_s, show_default=False,
            help=f"Follow at most this long.  [default: {default_s:g}s]",
        )(command)  # fmt: skip
        return click.option("--detach", is_flag=True, help="Do not follow; return when the command is answered.")(
            command
        )

    return decorate


def model_argument(command: Command) -> Command:
    return click.argument("model", metavar="MODEL")(command)


def require(value: str, what: str, fix: str) -> str:
    """The value, or an error that says how to get one."""
    if not value:
        raise InvalidInput(f"{what} is not known here", fix=fix, code="no_context")
    return value

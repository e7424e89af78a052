"""The command line. Importing this module imports click and nothing else: each verb is loaded when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import click

from sublet.errors import Failed, InvalidInput, SubletError


class Listed(NamedTuple):
    section: str
    home: str
    """Module and attribute of its command."""
    summary: str
    impact: str
    """``ro`` changes nothing, ``rw`` does."""


VERBS: Final = {
    "env": Listed("Start", "sublet.cli.access:env", "Print exports: address and key for any OpenAI client.", "ro"),
    "deploy": Listed(
        "Models", "sublet.cli.deploying:deploy", "Deploy one model and follow it until it is ready.", "rw"
    ),
    "apply": Listed("Models", "sublet.cli.deploying:apply", "Deploy everything in models files.", "rw"),
    "ps": Listed("Models", "sublet.cli.looking:ps", "List models: state, share, place, and what is next.", "ro"),
    "park": Listed("Models", "sublet.cli.changing:park", "Move a model to host memory now.", "rw"),
    "wake": Listed("Models", "sublet.cli.changing:wake", "Bring a model back to its GPU now.", "rw"),
    "retire": Listed("Models", "sublet.cli.changing:retire", "Take a model away: drain, stop, release.", "rw"),
    "logs": Listed("Models", "sublet.cli.history:logs", "Show the end of a model's engine log.", "ro"),
    "explain": Listed("Decide", "sublet.cli.history:explain", "Say why a model is where it is, or why not.", "ro"),
    "check": Listed("Decide", "sublet.cli.deploying:check", "Check models files; needs no server.", "ro"),
    "plan": Listed("Decide", "sublet.cli.deciding:plan", "Say what would become of models files now.", "ro"),
    "nodes": Listed("GPUs", "sublet.cli.looking:nodes", "List GPUs: promised, held, free to promise.", "ro"),
    "gpu": Listed("GPUs", "sublet.cli.deciding:gpu", "Open a quarantined GPU again.", "rw"),
    "repack": Listed("GPUs", "sublet.cli.deciding:repack", "Free whole GPUs by moving models.", "rw"),
    "quota": Listed("Access", "sublet.cli.deciding:quota", "Set and list what tenants are guaranteed.", "rw"),
    "keys": Listed("Access", "sublet.cli.access:keys", "Make, list and revoke API keys.", "rw"),
    "events": Listed("History", "sublet.cli.history:events", "Show what happened; -w goes on.", "ro"),
}
EXIT_CODES: Final = {
    0: "done",
    1: "failed",
    2: "wrong use or invalid file",
    3: "cannot be placed",
    4: "not found",
    5: "refused",
    6: "timed out; work goes on",
    7: "control plane unreachable",
    130: "interrupted",
}


class LazyGroup(click.Group):
    """Loads a verb's module when it is called, and ends every run with one of `EXIT_CODES`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Stand-ins, so that "did you mean" and completion know the names without loading anything.
        self.commands = {name: click.Command(name, short_help=verb.summary) for name, verb in VERBS.items()}

    def list_commands(self, ctx: click.Context) -> list[str]:  # The library's signature.
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = VERBS[cmd_name].home.partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # The same.
        with formatter.section("Examples"):
            formatter.write_dl(
                [("sublet apply -f models.yaml", "deploy a fleet"), ("sublet ps", "see what became of it")]
            )
        for section in dict.fromkeys(verb.section for verb in VERBS.values()):
            with formatter.section(section):
                formatter.write_dl([(name, verb.summary) for name, verb in VERBS.items() if verb.section == section])
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in EXIT_CODES.items()])

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        """Run, render whatever went wrong, and exit. ``standalone_mode`` is ours: click would exit with 1 for most."""
        words = list(sys.argv[1:] if args is None else args)
        extra["standalone_mode"] = False
        outcome: Any = None
        try:
            outcome = super().main(words, *rest, **extra)
        except click.Abort:
            raise SystemExit(130) from None
        except click.ClickException as error:
            if (
                type(error).__name__ == "NoArgsIsHelpError"
            ):  # Click 8.2 and newer; older ones print the help themselves.
                click.echo(error.format_message())
                raise SystemExit(0) from None
            _fail(_usage_error(error), words)
        except SubletError as error:
            if "--debug" in words:
                raise
            _fail(error, words)
        except Exception as error:  # Ours to mend; whoever runs it gets a sentence, with --debug all of it.
            if "--debug" in words:
                raise
            _fail(Failed(f"{type(error).__name__}: {error}", fix="again with --debug", code="internal"), words)
        raise SystemExit(outcome if isinstance(outcome, int) else 0)


def _usage_error(error: click.ClickException) -> SubletError:
    context = getattr(error, "ctx", None)
    help_of = context.command_path if context is not None else "sublet"
    return InvalidInput(error.format_message(), fix=f"{help_of} --help", code="usage")


def _fail(error: SubletError, words: Sequence[str]) -> None:
    from sublet.cli.output import render_error

    click.echo(render_error(error, as_json="--json" in words), err=True)
    raise SystemExit(error.exit_code)


def _print_version(ctx: click.Context, parameter: click.Parameter, is_wanted: bool) -> None:  # noqa: FBT001  # Click's signature.
    if is_wanted:
        from importlib import metadata

        try:
            click.echo(metadata.version("sublet"))
        except metadata.PackageNotFoundError:
            click.echo("a checkout that is not installed")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Every verb knows --json, and --help with examples.",
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show it.")
@click.option(
    "--context", "context_path", type=click.Path(), help="Context file; else $SUBLET_CONTEXT, .sublet/context.json."
)
@click.option(
    "--color", type=click.Choice(["auto", "always", "never"]), default="auto", help="Colours; auto: on a terminal."
)
@click.pass_context
def cli(ctx: click.Context, context_path: str | None, color: str) -> None:
    """Let many models share few GPUs."""
    from sublet.cli.session import Session

    session = ctx.ensure_object(Session)
    session.context_path = context_path
    session.color = color


def main() -> None:
    """The installed command."""
    cli(prog_name="sublet")

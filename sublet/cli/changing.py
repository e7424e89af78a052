"""``sublet park``, ``wake`` and ``retire``: one model, from one state to another."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import click

from sublet import _contract as contract
from sublet import quantities
from sublet.cli import following, words
from sublet.cli.session import Session, Verb, model_argument, verb
from sublet.cli.session import following as following_options

if TYPE_CHECKING:
    from sublet.client import Client


@click.command(cls=Verb, examples=("sublet park chat", "sublet park chat --detach"))
@model_argument
@following_options(60.0)
@verb
def park(session: Session, *, model: str, detach: bool, timeout_s: float) -> int:
    """Move a model to host memory now, whatever its warm window says.

    Requests that are running end first; the next one wakes it again.
    """
    return _change(
        session,
        "park",
        model,
        lambda client: client.park(model),
        following.is_off_the_gpu,
        None if detach else timeout_s,
    )


@click.command(cls=Verb, examples=("sublet wake chat", "sublet wake chat --timeout 10s"))
@model_argument
@following_options(60.0)
@verb
def wake(session: Session, *, model: str, detach: bool, timeout_s: float) -> int:
    """Bring a model back to its GPU now, before a request asks for it."""
    return _change(
        session, "wake", model, lambda client: client.wake(model), following.is_resident, None if detach else timeout_s
    )


@click.command(cls=Verb, examples=("sublet retire chat", "sublet retire chat --yes"))
@model_argument
@click.option("--yes", is_flag=True, help="Do not ask.")
@following_options(60.0)
@verb
def retire(session: Session, *, model: str, yes: bool, detach: bool, timeout_s: float) -> int:
    """Take a model away: drain, stop, release.

    Asks first when a person is at the terminal.
    """
    if not yes and not session.is_json and sys.stdin.isatty():
        click.confirm(f"retire {model}: running requests end, then its engine stops. Go on?", abort=True, err=True)
    return _change(
        session, "retire", model, lambda client: client.retire(model), following.is_gone, None if detach else timeout_s
    )


def _change(
    session: Session,
    name: str,
    model: str,
    command: Callable[[Client], Awaitable[contract.CommandAnswered]],
    goal: following.Goal,
    timeout_s: float | None,
) -> int:
    """Send the command, follow it (unless `timeout_s` is None), and say where the model is now."""

    async def work(client: Client) -> tuple[contract.CommandAnswered, following.Followed | None]:
        answer = await command(client)
        session.say(
            f"  {model}  {answer.verdict}: {answer.message}" if answer.message else f"  {model}  {answer.verdict}"
        )
        if timeout_s is None:
            return answer, None
        ended = await following.follow(
            session, client, {model: goal}, timeout_s=timeout_s, may_vanish=goal is following.is_gone
        )
        return answer, ended[0]

    answer, ended = session.run(work)
    if ended is not None and ended.error is not None:
        raise ended.error
    state = _state_after(ended, name)
    if session.is_json:
        took_s = None if ended is None else round(ended.took_s, 3)
        session.emit(f"sublet.{name}.v1", {"model": model, **contract.plain(answer), "state": state, "took_s": took_s})
    else:
        took = f"  {quantities.seconds(ended.took_s)}" if ended is not None else ""
        session.show(f"{model}  {state}{took}")
    return 0


def _state_after(ended: following.Followed | None, name: str) -> str:
    if ended is None:
        return f"{name} ordered"
    return str(words.state_of(ended.view)) if ended.view is not None else "retired"

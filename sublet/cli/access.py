"""``sublet env`` and ``sublet keys``: how clients get in."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import click

from sublet import _contract as contract
from sublet import quantities
from sublet.cli import output
from sublet.cli.session import Session, Verb, require, verb
from sublet.context import START_IT, openai_base_url

if TYPE_CHECKING:
    from sublet.client import Client


@click.command(cls=Verb, examples=('eval "$(sublet env)"', "sublet env --json"))
@verb
def env(session: Session) -> None:
    """Print exports for a shell: address and key for any OpenAI client. Needs no server."""
    context = session.context()
    gateway = require(context.gateway_url, "the gateway's address", START_IT)
    variables = {"OPENAI_BASE_URL": openai_base_url(context), "SUBLET_URL": gateway.rstrip("/")}
    if context.api_key:
        variables = {**variables, "OPENAI_API_KEY": context.api_key}
    else:
        session.say("# no API key here; make one: export OPENAI_API_KEY=$(sublet keys new)")
    if session.is_json:
        session.emit("sublet.env.v1", {"variables": variables, "label": context.label, "tenant": context.tenant})
        return
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "SUBLET_URL"):
        if name in variables:
            session.show(f"export {name}={shlex.quote(variables[name])}")


@click.group()
def keys() -> None:
    """Make, list and revoke API keys."""


@keys.command(
    "new", cls=Verb, examples=("export OPENAI_API_KEY=$(sublet keys new)", "sublet keys new --name ci --json")
)
@click.option("--name", default="", help="What it is for; shown by `sublet keys ls`.")
@verb
def keys_new(session: Session, *, name: str) -> None:
    """Make a key. It alone is printed on stdout, once; Sublet keeps only its hash."""
    made = session.run(lambda client: client.create_key(name))
    if session.is_json:
        session.emit("sublet.key.v1", {"key_id": made.key_id, "key": made.key, "name": made.name})
        return
    session.say(f"key {made.key_id} is accepted from now on; it is shown this once")
    session.show(made.key)


@keys.command("ls", cls=Verb, examples=("sublet keys ls", "sublet keys ls --json"))
@verb
def keys_ls(session: Session) -> None:
    """List keys, without anything that could be used as one."""

    async def work(client: Client) -> contract.KeyList:
        return await client.keys()

    listed = session.run(work)
    if session.is_json:
        session.emit("sublet.keys.v1", contract.plain(listed))
        return
    now_s = session.now_s()
    rows = [(key.key_id, key.name or "-", quantities.span(max(0.0, now_s - key.created_at_s))) for key in listed.keys]
    session.show(output.table(["KEY", "NAME", "AGE"], rows) or "no keys yet; make one:  sublet keys new")


@keys.command(
    "revoke", cls=Verb, examples=("sublet keys revoke key-4f1d2a9c0b7e", "sublet keys revoke key-4f1d2a9c0b7e --json")
)
@click.argument("key_id", metavar="KEY")
@verb
def keys_revoke(session: Session, *, key_id: str) -> None:
    """Stop accepting a key."""
    answer = session.run(lambda client: client.revoke_key(key_id))
    if session.is_json:
        session.emit("sublet.key_revoked.v1", {"key_id": key_id, **contract.plain(answer)})
    else:
        session.show(f"{key_id}  revoked" if answer.verdict == "admitted" else f"{key_id}  was revoked before")

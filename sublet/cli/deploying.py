"""``sublet deploy``, ``apply`` and ``check``: from a wish to a model that answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from sublet import _contract as contract
from sublet import quantities
from sublet.cli import following, output, words
from sublet.cli.session import Session, Verb, verb
from sublet.cli.session import following as following_options
from sublet.errors import Failed, InvalidInput, NotPlaced, Refused, SubletError, TimedOut
from sublet.models_file import SUFFIXES, deployment, read_files

if TYPE_CHECKING:
    from sublet.client import Applied, Client

FOLLOW_S: Final = 180.0
# Which exit code an apply ends with when its models ended differently: the one that asks most of the reader.
SEVERITY: Final[tuple[type[SubletError], ...]] = (Failed, Refused, NotPlaced, TimedOut, SubletError)

files_option = click.option(
    "-f", "--file", "files", type=click.Path(path_type=Path), multiple=True, required=True,
    help="A models file or a folder of them; may be repeated.",
)  # fmt: skip
dry_run_option = click.option("--dry-run", is_flag=True, help="Print what would be sent, and send nothing.")


@click.command(
    cls=Verb,
    examples=(
        "sublet deploy chat --weights 14.5GB --share 0.3 --limit 0.4",
        "sublet deploy org/model --engine vllm --weights 16GB --share 0.4 --secret HF_TOKEN",
    ),
)
@click.argument("model", metavar="MODEL")
@click.option("--weights", required=True, help="Size of its weights, for example 14.5GB.")
@click.option("--share", required=True, help="Guaranteed part of a GPU: 0.3, or 20GiB.")
@click.option("--limit", help="Upper bound of its part; kept, not used yet.")
@click.option("--engine", type=click.Choice(contract.ENGINES), help="The program that serves it.")
@click.option("--model", "engine_model", metavar="NAME", help="The engine's own name for the model.")
@click.option("--image", help="Image of its container.")
@click.option("--runtime", type=click.Choice(contract.RUNTIMES), help="What runs its program.  [default: by engine]")
@click.option("--secret", "secrets", multiple=True, metavar="NAME", help="A secret of the node, as a variable.")
@click.option("--swap", type=click.Choice(contract.SWAP_DRIVERS), help="How it leaves the GPU.  [default: quickest]")
@click.option("--kind", type=click.Choice(contract.KINDS), help="inference, or a training job.")
@click.option("--priority", type=click.Choice(contract.PRIORITIES), help="Default: by kind.")
@click.option("--warm", metavar="DURATION", help="Stays on the GPU this long when idle.  [default: 5m]")
@click.option("--cold-after", metavar="DURATION", help="Idle this long, its process stops too.")
@click.option("--cold-start", metavar="DURATION", help="Simulated engines: how long a cold start takes.")
@click.option("--parkable/--not-parkable", default=None, help="May it leave the GPU when idle.")
@click.option(
    "--minimum-grade", type=click.Choice(contract.GRADES), help="Only where isolation is at least this strong."
)
@dry_run_option
@following_options(FOLLOW_S)
@verb
def deploy(
    session: Session,
    *,
    model: str,
    share: str,
    limit: str | None,
    dry_run: bool,
    detach: bool,
    timeout_s: float,
    secrets: tuple[str, ...],
    engine_model: str | None,
    **settings: Any,
) -> int:
    """Deploy one model and follow it until it is ready.

    The same again changes nothing; other settings replace the old ones.
    """
    if model.endswith(SUFFIXES):
        raise InvalidInput(f"{model} is a file", fix=f"sublet apply -f {model}", code="usage")
    settings |= {"model": engine_model, "secrets": list(secrets) or None}
    spec = deployment(model, share=_amount(share), limit=_amount(limit), **settings)
    if dry_run:
        return _show_wishes(session, [spec])
    (ended,) = session.run(lambda client: _deploy_all(session, client, [spec], timeout_s=None if detach else timeout_s))
    if ended.error is not None:
        raise ended.error
    if session.is_json:
        session.emit("sublet.deploy.v1", ended.as_json())
    else:
        session.show(_outcome_table([ended]))
        session.say('next:  sublet ps    eval "$(sublet env)"')
    return 0


@click.command(cls=Verb, examples=("sublet apply -f models.yaml", "sublet apply -f models/ -f extra.yaml --detach"))
@files_option
@dry_run_option
@following_options(FOLLOW_S)
@verb
def apply(session: Session, *, files: tuple[Path, ...], dry_run: bool, detach: bool, timeout_s: float) -> int:
    """Deploy everything in models files, and follow until each model is ready.

    All mistakes of all files are told before anything is sent. What is so already stays as it is.
    """
    specs = read_files(files)
    if dry_run:
        return _show_wishes(session, specs)
    outcomes = session.run(lambda client: _deploy_all(session, client, specs, timeout_s=None if detach else timeout_s))
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    if session.is_json:
        session.emit("sublet.apply.v1", {"models": [outcome.as_json() for outcome in outcomes]})
    else:
        session.show(_outcome_table(outcomes))
        for error in errors:
            session.say(output.render_error(error, as_json=False))
    worst = min(
        errors, key=lambda error: next(i for i, kind in enumerate(SEVERITY) if isinstance(error, kind)), default=None
    )
    return 0 if worst is None else worst.exit_code


@click.command(cls=Verb, examples=("sublet check -f models.yaml", "sublet check -f models/"))
@files_option
@verb
def check(session: Session, *, files: tuple[Path, ...]) -> int:
    """Check models files: every mistake at once, with its place and a suggestion. Needs no server."""
    specs = read_files(files)
    if session.is_json:
        session.emit("sublet.check.v1", {"models": [contract.plain(spec) for spec in specs], "problems": []})
    else:
        count = len(specs)
        session.show(f"{count} {'model' if count == 1 else 'models'}, no problems")
    return 0


class Outcome:
    """What became of one model of a deploy: the answer to its command, and where following ended."""

    def __init__(self, applied: Applied, followed: following.Followed | None) -> None:
        self.model = applied.spec.name
        self.answer = applied.answer
        self.is_unchanged = applied.is_unchanged
        self.followed = followed
        self.error = applied.error or (followed.error if followed is not None else None)

    @property
    def view(self) -> contract.DeploymentView | None:
        return self.followed.view if self.followed is not None else None

    def as_json(self) -> dict[str, Any]:
        view, answer = self.view, self.answer
        replica = view.replicas[0] if view is not None and view.replicas else None
        return {
            "model": self.model,
            "verdict": answer.verdict if answer is not None else None,
            "message": answer.message if answer is not None else "",
            "command_id": answer.command_id if answer is not None else None,
            "inbox_seq": answer.inbox_seq if answer is not None else None,
            "state": words.state_of(view).word if view is not None else None,
            "node": replica.node if replica is not None else None,
            "gpu_uuid": replica.gpu_uuid if replica is not None else None,
            "granted_bytes": replica.granted_bytes if replica is not None else None,
            "took_s": round(self.followed.took_s, 3) if self.followed is not None else None,
            "error": self.error.as_json() if self.error is not None else None,
        }

    def cells(self) -> list[str]:
        if self.answer is None:
            return [self.model, "✗ refused" if isinstance(self.error, Refused) else "✗ failed", "", ""]
        view = self.view
        if view is None:
            return [self.model, "unchanged" if self.is_unchanged else "admitted", "", ""]
        place = f"{words.share_text(view)} on {words.where_text(view)}" if view.replicas else ""
        took = "unchanged" if self.is_unchanged else quantities.seconds(self.followed.took_s) if self.followed else ""
        return [self.model, str(words.state_of(view)), place, took]


async def _deploy_all(
    session: Session, client: Client, specs: Sequence[contract.DeploymentSpec], *, timeout_s: float | None
) -> list[Outcome]:
    """Send all, then follow those that were taken (unless `timeout_s` is None)."""
    applied = await client.apply(specs)
    for one in applied:
        verdict = "refused" if one.answer is None else "unchanged" if one.is_unchanged else one.answer.verdict
        session.say(f"  {one.spec.name}  {verdict}")
    goals: dict[str, following.Goal] = {
        one.spec.name: following.is_up_or_cold if one.is_unchanged else following.is_up
        for one in applied
        if one.answer is not None
    }
    if timeout_s is None or not goals:
        return [Outcome(one, None) for one in applied]
    ended = {one.model: one for one in await following.follow(session, client, goals, timeout_s=timeout_s)}
    return [Outcome(one, ended.get(one.spec.name)) for one in applied]


def _amount(text: str | None) -> float | str | None:
    """A portion as a number, anything else as it was written."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _show_wishes(session: Session, specs: Sequence[contract.DeploymentSpec]) -> int:
    """The dry run: the wire form, as JSON for people and programs alike."""
    session.emit("sublet.dry_run.v1", {"deployments": [contract.plain(spec) for spec in specs]})
    return 0


def _outcome_table(outcomes: Sequence[Outcome]) -> str:
    return output.table(["", "", "", ""], [outcome.cells() for outcome in outcomes], tones=words.TONES)

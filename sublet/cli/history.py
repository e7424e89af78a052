"""``sublet events``, ``explain`` and ``logs``: what happened, and why."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Final

import click

from sublet import _contract as contract
from sublet import quantities
from sublet.cli import output, words
from sublet.cli.deciding import constraint_lines
from sublet.cli.session import Session, Verb, model_argument, verb
from sublet.client import replica_of
from sublet.errors import NotFound

if TYPE_CHECKING:
    from sublet.client import Client

WATCH_WAIT_S: Final = 5.0
LOG_POLL_S: Final = 0.5
# Columns; sentences are broken there.
WIDTH: Final = 100
# Pages of a thousand events that looking for the newest ones may read.
PAGES_MAX: Final = 100


@click.command(cls=Verb, examples=("sublet events", "sublet events -w --model chat"))
@click.option("-w", "--watch", is_flag=True, help="Go on with new events as they happen.")
@click.option("--model", default="", help="Only events of this model.")
@click.option("--after", "after_seq", type=click.IntRange(min=0), help="Events after this sequence; else the newest.")
@click.option(
    "-n", "--tail", "tail_count", type=click.IntRange(0, contract.EVENT_LIMIT_MAX), default=50, show_default=True,
    help="How many of the newest.",
)  # fmt: skip
@click.option("--time", "time_format", type=click.Choice(["clock", "iso"]), default="clock", help="How times look.")
@verb
def events(
    session: Session, *, watch: bool, model: str, after_seq: int | None, tail_count: int, time_format: str
) -> None:
    """Show what happened, oldest first.

    The number at the end is the event's sequence; `<-` names the event that led to it.
    With -w and --json each line is one object.
    """

    def show(listed: tuple[contract.EventView, ...]) -> None:
        if session.is_json and watch:
            for event in listed:
                session.emit("sublet.event.v1", contract.plain(event), is_line=True)
        elif not session.is_json:
            session.show(events_table(listed, time_format=time_format))

    async def work(client: Client) -> None:
        if after_seq is None:
            found, last_seq = await newest(client, model=model, tail_count=tail_count)
        else:
            page = await client.events(after_seq=after_seq, model=model, limit_count=contract.EVENT_LIMIT_MAX)
            found, last_seq = page.events, page.last_seq
        show(found)
        if session.is_json and not watch:
            session.emit("sublet.events.v1", {"events": contract.plain(found), "last_seq": last_seq})
        while watch:
            page = await client.events(after_seq=last_seq, model=model, wait_s=WATCH_WAIT_S)
            show(page.events)
            last_seq = next_seq(page, asked_after=last_seq, limit_count=100)
            # An answer that came at once without events means that this control plane does not wait; do not spin.
            await session.sleep(0.0 if page.events else 0.2)

    session.run(work)


async def newest(client: Client, *, model: str, tail_count: int) -> tuple[tuple[contract.EventView, ...], int]:
    """The last `tail_count` events, and the sequence to go on after. History is read forward: it has no other way."""
    kept: tuple[contract.EventView, ...] = ()
    after_seq = 0
    for _ in range(PAGES_MAX):
        page = await client.events(after_seq=after_seq, model=model, limit_count=contract.EVENT_LIMIT_MAX)
        kept = (*kept, *page.events)[-tail_count:] if tail_count else ()
        reached_seq = next_seq(page, asked_after=after_seq, limit_count=contract.EVENT_LIMIT_MAX)
        if len(page.events) < contract.EVENT_LIMIT_MAX:
            return kept, reached_seq
        after_seq = reached_seq
    return kept, after_seq


def next_seq(page: contract.EventList, *, asked_after: int, limit_count: int) -> int:
    """Where the next page starts: a full page ends at its last event, a shorter one where placement has read to."""
    if len(page.events) >= limit_count:
        return page.events[-1].seq
    return max(asked_after, page.last_seq, page.events[-1].seq if page.events else 0)


@click.command(cls=Verb, examples=("sublet explain chat", "sublet explain chat --json | jq .remedy"))
@model_argument
@verb
def explain(session: Session, *, model: str) -> None:
    """Say why a model is where it is, or why it is not placed."""

    async def work(client: Client) -> None:
        explanation = await client.explain(model)
        if not explanation.is_known:
            raise await unknown_model(client, model)
        if session.is_json:
            session.emit("sublet.explain.v1", contract.plain(explanation))
            return
        places = await places_of_gpus(client) if explanation.alternatives else {}
        session.show(explanation_text(explanation, now_s=session.now_s(), places=places))

    session.run(work)


async def places_of_gpus(client: Client) -> dict[str, str]:
    """How people call each GPU: {gpu_uuid: "a/gpu0"}."""
    return {gpu.gpu_uuid: f"{node.node}/gpu{gpu.index}" for node in (await client.nodes()).nodes for gpu in node.gpus}


async def unknown_model(client: Client, model: str) -> NotFound:
    """The error for a name that no deployment has, with the nearest one."""
    names = [view.deployment.name for view in (await client.deployments()).deployments]
    near = difflib.get_close_matches(model, names, n=1)
    hint = f"did you mean '{near[0]}'?" if near else "`sublet ps` lists the models"
    return NotFound(f"there is no model '{model}'", fix=hint, code="unknown_model")


def explanation_text(explanation: contract.Explanation, *, now_s: float, places: Mapping[str, str]) -> str:
    """Summary, decisions in order, other GPUs with the reason against each, and the way out."""
    view = explanation.deployment
    lines = []
    if view is not None:
        where = f"  {words.share_text(view)} on {words.where_text(view)}" if view.replicas else ""
        lines.append(f"{explanation.model}  {words.state_text(view, now_s=now_s)}{where}")
    if explanation.summary:
        lines += [_indented(line) for line in textwrap.wrap(explanation.summary, WIDTH - 2)]
    facts = _facts(explanation)
    if facts:
        lines += ["", _indented(output.table(["", ""], facts))]
    if explanation.decisions:
        lines += ["", "Decisions", _indented(events_table(explanation.decisions, time_format="clock"))]
    if explanation.alternatives:
        rows = [
            (
                places.get(other.gpu_uuid) or f"{other.node} {other.gpu_uuid}".strip(),
                other.reason,
                _missing(other.short_by_bytes),
            )
            for other in explanation.alternatives
        ]
        lines += ["", "Other GPUs", _indented(output.table(["", "", ""], rows))]
    if explanation.constraints:
        lines += [
            "",
            "What rules GPUs out for one more",
            *(f"  {x}" for x in constraint_lines(explanation.constraints)),
        ]
    remedy = explanation.remedy or (view.remedy if view is not None else "")
    if remedy:
        lines += ["", f"What would help: {remedy}"]
    if explanation.ways:
        lines += [] if remedy else ["", "What would help one more"]
        lines += [f"  {way}" for way in explanation.ways]
    return "\n".join(lines)


def _facts(explanation: contract.Explanation) -> list[tuple[str, str]]:
    """Reasons in a few words, who gave way to whom, what moves, and what would be decided about one more."""
    rows = []
    if explanation.codes:
        rows.append(("why", ", ".join(words.CODES.get(code, code.replace("_", " ")) for code in explanation.codes)))
    if explanation.policy:
        rows.append(("policy", explanation.policy))
    displaced = words.counted(f"{one.model} of {one.tenant}: {one.reason}" for one in explanation.displaced)
    rows += [("displaced", one) for one in displaced]
    if explanation.displaced_by:
        rows.append(("displaced by", explanation.displaced_by))
    rows += [("moving", move) for move in explanation.moves]
    if explanation.one_more and explanation.one_more not in explanation.summary:
        rows.append(("one more", explanation.one_more))
    if explanation.engine:
        rows.append(("engine", "; ".join(explanation.engine)))
    return rows


def _missing(short_by_bytes: int) -> str:
    return f"{quantities.gib(short_by_bytes)} GiB missing" if short_by_bytes else ""


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def events_table(listed: tuple[contract.EventView, ...], *, time_format: str) -> str:
    rows = [
        (
            _time(event.at_s, time_format),
            event.type,
            event.model or "-",
            event.text,
            f"{event.seq}{f' <- {event.cause_seq}' if event.cause_seq else ''}",
        )
        for event in listed
    ]
    return output.table(["", "", "", "", ""], rows)


def _time(at_s: float, time_format: str) -> str:
    local = datetime.fromtimestamp(at_s).astimezone()
    return local.isoformat(timespec="milliseconds") if time_format == "iso" else f"{local:%H:%M:%S}"


@click.command(cls=Verb, examples=("sublet logs chat", "sublet logs chat -f -n 20"))
@model_argument
@click.option("-f", "--follow", is_flag=True, help="Go on with new lines.")
@click.option(
    "-n", "--tail", "tail_count", type=click.IntRange(1, contract.LOG_TAIL_MAX), default=200, show_default=True,
    help="Lines from the end.",
)  # fmt: skip
@verb
def logs(session: Session, *, model: str, follow: bool, tail_count: int) -> None:
    """Show the end of a model's engine log.

    With -f it survives a move of the model: it goes on with the new replica. With --json each line is one object.
    """

    async def work(client: Client) -> None:
        replica_id, after_bytes = "", 0
        while True:
            view = await client.deployment(model)
            if view is None:
                raise await unknown_model(client, model)
            replica = replica_of(view)
            if replica.replica_id != replica_id:
                replica_id, after_bytes = replica.replica_id, 0
            chunk = await client.logs(
                node=replica.node, replica_id=replica_id, after_bytes=after_bytes, tail_count=tail_count
            )
            after_bytes = chunk.next_bytes
            for line in chunk.lines:
                if session.is_json:
                    session.emit(
                        "sublet.log_line.v1", {"model": model, "replica_id": replica_id, "line": line}, is_line=True
                    )
                else:
                    session.show(line)
            if not follow:
                return
            await session.sleep(LOG_POLL_S)

    session.run(work)

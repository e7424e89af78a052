"""``sublet ps`` and ``sublet nodes``: what there is."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

import click

from sublet import _contract as contract
from sublet import quantities
from sublet.cli import output, words
from sublet.cli.session import Session, Verb, verb

if TYPE_CHECKING:
    from sublet.client import Client

WATCH_S: Final = 1.0
BAR_CELLS: Final = 9

watch_option = click.option(
    "-w", "--watch", is_flag=True, help="Go on: draw again each second, in a pipe on each change."
)
wide_option = click.option("--wide", is_flag=True, help="More columns.")


@click.command(cls=Verb, examples=("sublet ps", "sublet ps --json | jq .deployments"))
@wide_option
@watch_option
@verb
def ps(session: Session, *, wide: bool, watch: bool) -> None:
    """List models: state, share, place, and what is next.

    SHARE is the guaranteed part of a GPU; after a plus what is borrowed beyond it now.
    """

    async def draw(client: Client) -> str:
        listed = await client.deployments()
        if session.is_json:
            return output.as_json("sublet.ps.v1", contract.plain(listed), is_line=watch)
        return models_table(listed, now_s=session.now_s(), is_wide=wide)

    session.run(lambda client: repeated(session, lambda: draw(client), is_repeated=watch))


@click.command(cls=Verb, examples=("sublet nodes", "sublet nodes --wide"))
@wide_option
@watch_option
@verb
def nodes(session: Session, *, wide: bool, watch: bool) -> None:
    """List GPUs: promised, held, free to promise.

    PROMISED is the sum of guarantees, parked models' included; HELD is what leases take now.
    FREE TO PROMISE is what a new model may still be guaranteed.
    """

    async def draw(client: Client) -> str:
        listed = await client.nodes()
        if session.is_json:
            return output.as_json("sublet.nodes.v1", contract.plain(listed), is_line=watch)
        return nodes_table(listed, is_wide=wide)

    session.run(lambda client: repeated(session, lambda: draw(client), is_repeated=watch))


async def repeated(session: Session, draw: Callable[[], Awaitable[str]], *, is_repeated: bool) -> None:
    """Show it once; or for ever, in place on a terminal, in a pipe only when it has changed."""
    shown = ""
    while True:
        text = await draw()
        if is_repeated and sys.stdout.isatty() and not session.is_json:
            session.show(output.clear_screen() + text)
        elif text != shown:
            session.show(text)
        shown = text
        if not is_repeated:
            return
        await session.sleep(WATCH_S)


def models_table(listed: contract.DeploymentList, *, now_s: float, is_wide: bool) -> str:
    if not listed.deployments:
        return "no models yet; deploy one:  sublet deploy chat --weights 14.5GB --share 0.3"
    headers = ["MODEL", "STATE", "SHARE", "WHERE", "NEXT"]
    if is_wide:
        headers += ["LIMIT", "HELD GiB", "PRIORITY", "KIND", "ENGINE", "SWAP", "AGE"]
    rows = []
    for view in listed.deployments:
        row = [
            view.deployment.name,
            words.state_text(view, now_s=now_s),
            words.share_text(view),
            words.where_text(view),
            words.next_text(view),
        ]
        rows.append(row + (_wide_cells(view, now_s=now_s) if is_wide else []))
    footer = words.label_of(listed.labels)
    return output.table(headers, rows, tones=words.TONES) + (f"\n({footer})" if footer else "")


def _wide_cells(view: contract.DeploymentView, *, now_s: float) -> list[str]:
    wish = view.deployment
    held_bytes = sum(
        replica.residue_bytes if replica.state == "parked" else replica.granted_bytes for replica in view.replicas
    )
    return [
        words.limit_text(view),
        quantities.gib(held_bytes) if view.replicas else "-",
        wish.priority or contract.DEFAULT_PRIORITIES.get(wish.kind, "-"),
        wish.kind,
        words.engine_text(wish.engine),
        (wish.engine.swap_driver or "quickest") if wish.swap.is_parkable else "-",
        quantities.span(max(0.0, now_s - view.admitted_at_s)),
    ]


def nodes_table(listed: contract.NodeList, *, is_wide: bool) -> str:
    if not listed.nodes:
        return "no nodes yet; each GPU host runs one node agent"
    headers = ["GPU", "TYPE", "PROMISED GiB", "HELD GiB", "FREE TO PROMISE", "GRADE"]
    if is_wide:
        headers += ["COMPUTE", "READY", "PARKED", "RESERVE GiB", "CAPACITY GiB", "HOST CPU LEFT", "HOST GiB LEFT"]
        headers += ["GRADE REASON"]
    rows = [_gpu_cells(node, gpu, is_wide=is_wide) for node in listed.nodes for gpu in node.gpus]
    return "\n".join([output.table(headers, rows), *_footers(listed)])


def _gpu_cells(node: contract.NodeView, gpu: contract.GpuView, *, is_wide: bool) -> list[str]:
    free_bytes = max(0, gpu.allocatable_bytes - gpu.promised_bytes)
    filled = round(BAR_CELLS * min(1.0, gpu.promised_bytes / gpu.allocatable_bytes)) if gpu.allocatable_bytes else 0
    cells = [
        f"{node.node}/gpu{gpu.index}",
        words.gpu_type(gpu.name),
        f"{'█' * filled}{'░' * (BAR_CELLS - filled)} {quantities.gib(gpu.promised_bytes)}",
        quantities.gib(gpu.held_bytes),
        quantities.gib(free_bytes),
        gpu.grade,
    ]
    if is_wide:
        cells += [
            "MIG" if gpu.is_mig else gpu.compute_sharing,
            str(gpu.resident_count),
            str(gpu.parked_count),
            quantities.gib(gpu.reserve_bytes),
            quantities.gib(gpu.capacity_bytes),
            f"{node.cpu_left_millicores / 1000:g}" if node.cpu_millicores is not None else "-",
            quantities.gib(max(0, node.memory_left_bytes)) if node.memory_bytes is not None else "-",
            gpu.grade_reason or "-",
        ]
    return cells


def _footers(listed: contract.NodeList) -> list[str]:
    """Reserve, host memory for parked models, and the kind of GPU."""
    gpus = [gpu for node in listed.nodes for gpu in node.gpus]
    reserves = sorted({quantities.gib(gpu.reserve_bytes) for gpu in gpus})
    hosts = ", ".join(
        f"{node.node} {quantities.gib(node.host_parked_bytes)} of {quantities.gib(node.host_budget_bytes)} GiB"
        for node in listed.nodes
    )
    labels = tuple(dict.fromkeys(node.label for node in listed.nodes if node.label))
    parts: list[Any] = [
        f"reserve {' / '.join(reserves)} GiB per GPU" if reserves else "",
        f"parked in host memory: {hosts}",
    ]
    lines = [f"({'; '.join(part for part in parts if part)})"]
    closed = [
        f"{node.node}/gpu{gpu.index} is quarantined ({gpu.quarantine_reason})"
        for node in listed.nodes
        for gpu in node.gpus
        if gpu.quarantine_reason
    ]
    lines += (
        [f"({'; '.join(closed)}: nothing new goes there; if well: sublet gpu reinstate NODE/GPU)"] if closed else []
    )
    foreign = [
        f"{node.node}/gpu{gpu.index} {quantities.gib(gpu.foreign_bytes)} GiB"
        for node in listed.nodes
        for gpu in node.gpus
        if gpu.foreign_bytes
    ]
    lines += [f"(used by processes of others: {', '.join(foreign)})"] if foreign else []
    away = [f"{node.node} is {node.condition}" for node in listed.nodes if node.condition != "open"]
    lines += [f"({'; '.join(away)}: nothing new goes there)"] if away else []
    labelled = [
        f"{node.node} {' '.join(f'{key}={value}' for key, value in sorted(node.labels.items()))}"
        for node in listed.nodes
        if node.labels
    ]
    lines += [f"(labels: {'; '.join(labelled)})"] if labelled else []
    return lines + ([f"({words.label_of(labels)})"] if labels else [])

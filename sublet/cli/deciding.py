"""``sublet plan``, ``repack``, ``gpu`` and ``quota``: what would happen, GPUs back, and who is guaranteed what."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sublet import _contract as contract
from sublet import quantities
from sublet.cli import output, words
from sublet.cli.deploying import files_option
from sublet.cli.session import Session, Verb, verb
from sublet.errors import InvalidInput, NotPlaced
from sublet.models_file import read_files

if TYPE_CHECKING:
    from sublet.client import Client

VERDICTS = {"new": "+ new", "replaced": "~ replaced", "unchanged": "= unchanged", "rejected": "✗ rejected"}


@click.command(cls=Verb, examples=("sublet plan -f models.yaml", "sublet plan -f models.yaml --json | jq .deployments"))
@files_option
@verb
def plan(session: Session, *, files: tuple[Path, ...]) -> int:
    """Say what would become of models files now: places, who would give way, what is missing.

    Answered by the same decisions that `apply` would meet; nothing is changed or reserved.
    Exit code 3 when not everything has a place.
    """
    specs = read_files(files)
    answer = session.run(lambda client: client.plan(specs))
    if session.is_json:
        session.emit("sublet.plan.v1", contract.plain(answer))
    else:
        session.show(plan_text(answer))
    return 0 if answer.has_room_for_all else NotPlaced.exit_code


def plan_text(answer: contract.Plan) -> str:
    """A row for each replica or group of equal ones, then what is missing and what would help."""
    if not answer.deployments:
        return "nothing to plan"
    rows = [row for planned in answer.deployments for row in _plan_rows(planned)]
    lines = [output.table(["", "MODEL", "WHERE", "GiB", "WHY"], rows, tones={"✗": "bad", "+": "good", "~": "busy"})]
    for planned in answer.deployments:
        victims = [victim for replica in planned.replicas for victim in replica.victims]
        if victims:
            names = ", ".join(words.counted(f"{victim.model} ({victim.tenant})" for victim in victims))
            lines += ["", f"{planned.model} takes the place of: {names}"]
        if planned.problem:
            is_named = planned.problem.startswith(f"{planned.model} ")
            lines += ["", planned.problem if is_named else f"{planned.model}: {planned.problem}"]
            lines += [f"  {line}" for line in constraint_lines(planned.constraints)]
            lines += [f"  what would help: {planned.remedy}"] if planned.remedy else []
            lines += [f"    {way}" for way in planned.ways]
    return "\n".join(lines)


def _plan_rows(planned: contract.PlannedDeployment) -> list[tuple[str, ...]]:
    sign = VERDICTS.get(planned.verdict, planned.verdict)
    if not planned.replicas:
        why = "rejected" if planned.verdict == "rejected" else "no place" if planned.problem else "cold"
        return [(sign if not planned.problem else "✗ " + sign[2:], planned.model, "-", "-", why)]
    groups: dict[tuple[str, str, tuple[str, ...]], list[contract.PlannedReplica]] = {}
    for replica in planned.replicas:
        key = (replica.node, words.gpus_text(replica.gpu_indices), replica.codes)
        groups.setdefault(key, []).append(replica)
    rows: list[tuple[str, ...]] = []
    for (node, gpus, _), replicas in groups.items():
        times = f"  x{len(replicas)}" if len(replicas) > 1 else ""
        size = quantities.gib(sum(replicas[0].request_bytes))
        codes = ", ".join(words.CODES.get(code, code.replace("_", " ")) for code in replicas[0].codes)
        rows.append((sign, planned.model, f"{node}/{gpus}{times}", size, codes))
    missing = planned.wanted_count - len(planned.replicas)
    if missing > 0:
        rows.append(("✗ no place", planned.model, f"{missing} of {planned.wanted_count} replicas", "-", "see below"))
    return rows


def constraint_lines(constraints: Sequence[contract.Constraint]) -> list[str]:
    """What rules GPUs out, counted; with the least that is missing."""
    rows = []
    for one in constraints:
        gpus = f"{one.gpu_count} {'GPU' if one.gpu_count == 1 else 'GPUs'}"
        nodes = f"on {one.node_count} {'node' if one.node_count == 1 else 'nodes'}"
        short = f"at least {quantities.gib(one.short_by_bytes)} GiB missing" if one.short_by_bytes else ""
        rows.append((gpus, nodes, words.CODES.get(one.code, one.code.replace("_", " ")), short))
    return output.table(["", "", "", ""], rows).splitlines()


@click.command(cls=Verb, examples=("sublet repack --dry-run", "sublet repack --moves 4"))
@click.option(
    "--moves", "move_count_max", type=click.IntRange(1, 1000), default=8, show_default=True,
    help="Move so many replicas at most.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Show the moves and the GPUs that they free, and move nothing.")
@verb
def repack(session: Session, *, move_count_max: int, dry_run: bool) -> None:
    """Free whole GPUs now by moving what may be moved. For the operator's tenant.

    A replica moves behind a ready replacement; `movable: false` stays. `sublet events -w` shows the moves.
    """
    if dry_run:
        plan = session.run(lambda client: client.plan_repack(move_count_max=move_count_max))
        if session.is_json:
            session.emit("sublet.repack_plan.v1", contract.plain(plan))
        else:
            session.show(repack_text(plan))
        return
    answer = session.run(lambda client: client.repack(move_count_max=move_count_max))
    if session.is_json:
        session.emit("sublet.repack.v1", contract.plain(answer))
    else:
        session.show(answer.message)


def repack_text(plan: contract.RepackPlan) -> str:
    """A row for each move, then the GPUs that are empty when all are done."""
    if not plan.freed:
        return "no GPU can be freed by moves that are allowed"
    rows = [
        (
            move.model,
            move.tenant,
            f"{move.from_node}/{words.gpus_text(move.from_gpu_indices)}",
            f"{move.to_node}/{words.gpus_text(move.to_gpu_indices)}",
            quantities.gib(move.moved_bytes),
            "behind a ready replacement" if move.is_serving else "idle or parked",
        )
        for move in plan.moves
    ]
    freed = ", ".join(f"{gpu.node}/{words.gpus_text((gpu.gpu_index,))}" for gpu in plan.freed)
    count, moves = len(plan.freed), len(plan.moves)
    told = f"{count} {'GPU' if count == 1 else 'GPUs'} freed by {moves} {'move' if moves == 1 else 'moves'}: {freed}"
    return output.table(["MODEL", "TENANT", "FROM", "TO", "GiB LOADED", "HOW"], rows) + f"\n\n{told}"


@click.group(short_help="Close a GPU to new models, or open it again.")
def gpu() -> None:
    """What an operator decides about single GPUs; `sublet nodes` lists them."""


@gpu.command(
    "close", cls=Verb,
    examples=("sublet gpu close host-1/gpu0 --drain", "sublet gpu close host-1/gpu0 --reason 'new fan on Friday'"),
)  # fmt: skip
@click.argument("place", metavar="NODE/GPU")
@click.option("--drain", is_flag=True, help="Also move away what is there, as far as it may be moved.")
@click.option("--reason", default="", help="Shown to whoever looks at the GPU.")
@verb
def gpu_close(session: Session, *, place: str, drain: bool, reason: str) -> None:
    """Put nothing new on a GPU until it is reinstated: before it is serviced. For the operator's tenant.

    What runs there goes on. With --drain replicas move to where there is room, those that serve behind a ready
    replacement; the answer names those that stay until they end. NODE/GPU is as `sublet nodes` lists it.
    """

    async def close(client: Client) -> contract.CommandAnswered:
        node, uuid = await _found(client, place)
        return await client.close_gpu(node, uuid, is_draining=drain, reason=reason)

    _told(session, "sublet.gpu_close.v1", place, session.run(close))


@gpu.command(
    "reinstate", cls=Verb, examples=("sublet gpu reinstate host-1/gpu0", "sublet gpu reinstate host-1/GPU-4f2c")
)
@click.argument("place", metavar="NODE/GPU")
@verb
def gpu_reinstate(session: Session, *, place: str) -> None:
    """Take new models on a closed GPU again, because you know that it is well. For the operator's tenant.

    NODE/GPU is as `sublet nodes` lists it, or the node and the begin of the GPU's UUID.
    """

    async def reinstate(client: Client) -> contract.CommandAnswered:
        return await client.reinstate_gpu(*await _found(client, place))

    _told(session, "sublet.gpu_reinstate.v1", place, session.run(reinstate))


async def _found(client: Client, place: str) -> tuple[str, str]:
    """The node of `host-1/gpu0`, and the UUID of its GPU; of `host-1/GPU-4f2c` as it is."""
    node, _, name = place.rpartition("/")
    if not node or not name:
        raise InvalidInput(f"'{place}' is no NODE/GPU", fix="write it as `sublet nodes` does, for example host-1/gpu0")
    if not (name.startswith("gpu") and name[3:].isdigit()):
        return node, name
    listed = await client.nodes()
    there = [gpu for n in listed.nodes if n.node == node for gpu in n.gpus if gpu.index == int(name[3:])]
    if not there:
        raise InvalidInput(f"there is no GPU {place}", fix="list them:  sublet nodes")
    return node, there[0].gpu_uuid


def _told(session: Session, schema: str, place: str, answer: contract.CommandAnswered) -> None:
    if session.is_json:
        session.emit(schema, {"gpu": place, **contract.plain(answer)})
    else:
        session.show(answer.message)


@click.group(short_help="Set and list what tenants are guaranteed.")
def quota() -> None:
    """What tenants are guaranteed, and their part of what others leave."""


@quota.command("set", cls=Verb, examples=("sublet quota set acme --gpus 4", "sublet quota set acme --gpus none"))
@click.argument("tenant", metavar="TENANT")
@click.option("--gpus", required=True, help="GPUs that it is guaranteed, for example 4 or 2.5; none: no limit.")
@click.option(
    "--weight", type=click.FloatRange(min=0), default=1.0, show_default=True,
    help="Its part of what is left, against the weights of others.",
)  # fmt: skip
@verb
def quota_set(session: Session, *, tenant: str, gpus: str, weight: float) -> None:
    """Guarantee a tenant so many GPUs. For the operator's tenant.

    What is never preempted stays within the quota; what may be preempted may use more, by weight.
    """
    limit = _gpus_of(gpus)
    answer = session.run(lambda client: client.set_quota(tenant, gpu_quota=limit, over_quota_weight=weight))
    if session.is_json:
        session.emit("sublet.quota_set.v1", {"tenant": tenant, **contract.plain(answer)})
    else:
        session.show(answer.message)


def _gpus_of(text: str) -> float | None:
    if text == "none":
        return None
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1e6:
        raise InvalidInput(f"--gpus {text} is no number of GPUs", fix="write a number such as 4 or 2.5, or none")
    return number


@quota.command("ls", cls=Verb, examples=("sublet quota ls", "sublet quota ls --json"))
@verb
def quota_ls(session: Session) -> None:
    """List tenants: guaranteed, in use, and what waits. Other tenants are shown to the operator only."""
    listed = session.run(lambda client: client.quotas())
    if session.is_json:
        session.emit("sublet.quotas.v1", contract.plain(listed))
        return
    rows = [
        (
            one.tenant,
            "no limit" if one.gpu_quota is None else f"{one.gpu_quota:g}",
            f"{one.over_quota_weight:g}",
            f"{one.used_gpus:.2f}",
            f"{one.never_preempted_gpus:.2f}",
            str(one.waiting_count),
        )
        for one in listed.quotas
    ]
    headers = ["TENANT", "QUOTA", "WEIGHT", "GPUS USED", "NEVER PREEMPTED", "WAITING"]
    session.show(output.table(headers, rows) or "no tenants yet")

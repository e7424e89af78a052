"""Commands of the inbox: each leads to exactly one fact that names it, and to one answer."""

from collections.abc import Sequence
from typing import Any

from kit.outcomes import Context, Outcome, Reply, Timer, UnreadableCommand
from schemas.deployments import problems_of
from schemas.inbox import (
    CommandAnswered,
    DeployRequested,
    GpuCloseRequested,
    GpuReinstateRequested,
    KeyCreateRequested,
    KeyRevokeRequested,
    ParkRequested,
    QuotaRequested,
    RepackRequested,
    RetireRequested,
    Verdict,
    WakeRequested,
)
from schemas.messages import Command
from schemas.nodes import GpuOffer
from schemas.placement import (
    CommandDuplicated,
    CommandFact,
    CommandRejected,
    DeploymentAdmitted,
    DeploymentRetired,
    GpuCloseAsked,
    GpuReinstateAsked,
    KeyAdded,
    KeyRevoked,
    ParkAsked,
    QuotaSet,
    RepackAsked,
    WakeAsked,
)
from services.placement import repacking, tenants
from services.placement.core import SERVICE
from services.placement.placing import next_turn, release_all
from services.placement.state import ClusterState, Deployment


def _duplicate(state: ClusterState, command: Command, ctx: Context) -> list[Outcome]:
    """The answer to a command that was handled before, else nothing."""
    verdict = state.command_ids.get(f"{ctx.tenant}/{command.command_id}")
    if verdict is None:
        return []
    return _same(command, f"this command was handled before ({verdict})", ctx)


def _same(command: Command, message: str, ctx: Context) -> list[Outcome]:
    fact = CommandDuplicated(**_command(command, ctx), message=message)
    return [fact, _reply(command, Verdict.DUPLICATE, message, ctx)]


def _reject(command: Command | UnreadableCommand, code: str, message: str, ctx: Context) -> list[Outcome]:
    fact = CommandRejected(**_command(command, ctx), code=code, message=message)
    return [fact, _reply(command, Verdict.REJECTED, message, ctx, code)]


def _admit(command: Command, fact: CommandFact, message: str, ctx: Context) -> list[Outcome]:
    return [fact, _reply(command, Verdict.ADMITTED, message, ctx)]


def _command(command: Command | UnreadableCommand, ctx: Context) -> dict[str, Any]:
    return {
        "at_s": ctx.now_s,
        "inbox_seq": ctx.cause_seq,
        "command_id": command.command_id,
        "tenant": ctx.tenant,
    }


def _reply(command: Command | UnreadableCommand, verdict: Verdict, message: str, ctx: Context, code: str = "") -> Reply:
    answer = CommandAnswered(
        command_id=command.command_id, verdict=verdict, message=message, code=code, inbox_seq=ctx.cause_seq
    )
    return Reply(tenant=ctx.tenant, answer=answer)


@SERVICE.on(DeployRequested)
def deploy_requested(state: ClusterState, command: DeployRequested, ctx: Context) -> Sequence[Outcome]:
    """Admit a sound wish; the same wish again changes nothing, another one for the same name replaces the old.

    What failed for good is replaced by the same wish too: it is tried anew.
    """
    if duplicate := _duplicate(state, command, ctx):
        return duplicate
    spec = command.deployment
    if problems := problems_of(spec):
        return _reject(command, "SUB-ADM-001", " ".join(problems), ctx)
    present = state.named(ctx.tenant, spec.name)
    if present is not None and present.spec == spec and not _failure(state, present):
        return _same(command, f"{spec.name} is deployed like this already", ctx)
    outcomes: list[Outcome] = []
    revision_count = 1
    if present is not None:
        revision_count = present.revision_count + 1
        outcomes += release_all(state, present, f"replaced by revision {revision_count}", ctx)
        retired = DeploymentRetired(**_command(command, ctx), deployment_id=present.deployment_id, model=spec.name)
        outcomes.append(retired)
    admitted = DeploymentAdmitted(
        **_command(command, ctx),
        deployment_id=f"d{ctx.cause_seq}",
        revision_count=revision_count,
        deployment=spec,
    )
    outcomes += _admit(command, admitted, f"{spec.name} is admitted", ctx)
    # Placed in an input of its own, together with all that comes at the same time; one is enough for all of them.
    return outcomes if state.index.untold else [*outcomes, next_turn(ctx)]


@SERVICE.on(RetireRequested)
def retire_requested(state: ClusterState, command: RetireRequested, ctx: Context) -> Sequence[Outcome]:
    if duplicate := _duplicate(state, command, ctx):
        return duplicate
    deployment = state.named(ctx.tenant, command.model)
    if deployment is None:
        return _unknown_model(state, command, command.model, ctx)
    fact = DeploymentRetired(**_command(command, ctx), deployment_id=deployment.deployment_id, model=command.model)
    admitted = _admit(command, fact, f"{command.model} is being retired", ctx)
    claims_end = [next_turn(ctx)] if deployment.deployment_id in state.index.claims_of else []
    return [*admitted, *release_all(state, deployment, "retired", ctx), *claims_end]


@SERVICE.on(ParkRequested)
def park_requested(state: ClusterState, command: ParkRequested, ctx: Context) -> Sequence[Outcome]:
    if duplicate := _duplicate(state, command, ctx):
        return duplicate
    deployment = state.named(ctx.tenant, command.model)
    if deployment is None:
        return _unknown_model(state, command, command.model, ctx)
    if not deployment.spec.swap.is_parkable:
        return _reject(command, "SUB-SWP-001", f"{command.model} is not parkable (swap.is_parkable is false)", ctx)
    fact = ParkAsked(**_command(command, ctx), deployment_id=deployment.deployment_id)
    return _admit(command, fact, f"{command.model} is being parked", ctx)


@SERVICE.on(WakeRequested)
def wake_requested(state: ClusterState, command: WakeRequested, ctx: Context) -> Sequence[Outcome]:
    if duplicate := _duplicate(state, command, ctx):
        return duplicate
    deployment = state.named(ctx.tenant, command.model)
    if deployment is None:
        return _unknown_model(state, command, command.model, ctx)
    if reason := _failure(state, deployment):
        message = f"{command.model} failed for good ({reason}); deploy it again to try anew"
        return _reject(command, "SUB-SWP-003", message, ctx)
    is_placed = bool(state.replicas_of(deployment.deployment_id))
    if deployment.problem and deployment.replica_count > 0 and not is_placed:
        why = "; ".join(part for part in (deployment.problem, deployment.remedy) if part)
        return _reject(command, "SUB-SWP-002", f"{command.model} is not placed: {why}", ctx)
    fact = WakeAsked(**_command(command, ctx), deployment_id=deployment.deployment_id)
    return _admit(command, fact, f"{command.model} is being woken", ctx)


@SERVICE.on(RepackRequested)
def repack_requested(state: ClusterState, command: RepackRequested, ctx: Context) -> Sequence[Outcome]:
    """Say how many GPUs moves can free, and begin as many moves as may run at once."""
    if duplicate := _duplicate(state, command, ctx):
        return duplicate
    if refused := _not_the_operator(state, command, "ask for moves", ctx):
        return refused
    plan = repacking.planned(state, move_count_max=command.move_count_max, now_s=ctx.now_s)
    count, move_count = len(plan.freed), len(plan.steps)
    fact = RepackAsked(**_command(command, ctx), move_count_max=command.move_count_max, gpus_freed=count)
    message = (
        f"{count} GPU{'' if count == 1 else 's'} can be freed by {move_count} move{'' if move_count == 1 else 's'}"
    )
    moves = repacking.begin(state, plan, repacking.ASKED, ctx)
    return [*_admit(command, fact, message if count else "no GPU can be freed by moves that are allowed", ctx), *moves]


@SERVICE.on(QuotaRequested)
def quota_requested(state: ClusterState, command: QuotaRequested, ctx: Context) -> Sequence[Outcome]:
    """Set what a tenant is guaranteed. A smaller quota takes nothing from what runs and is never preempted."""
    if duplicate := _duplicate(state, command, ctx):
        return duplicate
    if refused := _not_the_operator(state, command, "set quotas", ctx):
        return refused
    tenant, quota = command.quota_tenant, command.gpu_quota
    told = "no quota" if quota is None else f"a quota of {quota:g} GPUs"
    if tenants.quota_of(state, tenant) == (quota, command.over_quota_weight):
        return _same(command, f"tenant {tenant} has {told} and this weight already", ctx)
    fact = QuotaSet(
        **_command(command, ctx),
        quota_tenant=tenant,
        gpu_quota=quota,
        over_quota_weight=command.over_quota_weight,
    )
    message = f"tenant {tenant} has {told} and an over-quota weight of {command.over_quota_weight:g} from now on"
    return [*_admit(command, fact, message, ctx), next_turn(ctx)]


@SERVICE.on(GpuReinstateRequested)
def gpu_reinstate_requested(state: ClusterState, command: GpuReinstateRequested, ctx: Context) -> Sequence[Outcome]:
    """Its node opens it again, without trying it."""
    if duplicate := _duplicate(state, command, ctx):
        return duplicate
    if refused := _not_the_operator(state, command, "open and close GPUs", ctx):
        return refused
    found = _gpus_named(state, command)
    if len(found) != 1:
        return _unclear_gpu(command, len(found), ctx)
    gpu = found[0]
    place = f"{command.node}/gpu{gpu.index}"
    if not gpu.quarantine_reason:
        return _same(command, f"{place} is not quarantined", ctx)
    fact = GpuReinstateAsked(**_command(command, ctx), node=command.node, gpu_uuid=gpu.gpu_uuid)
    return _admit(command, fact, f"{place} takes new replicas again", ctx)


@SERVICE.on(GpuCloseRequested)
def gpu_close_requested(state: ClusterState, command: GpuCloseRequested, ctx: Context) -> Sequence[Outcome]:
    """Its node closes it; what is there leaves by moves, if that is wanted. Closing it again may ask for that later."""
    if duplicate := _duplicate(state, command, ctx):
        return duplicate
    if refused := _not_the_operator(state, command, "open and close GPUs", ctx):
        return refused
    found = _gpus_named(state, command)
    if len(found) != 1:
        return _unclear_gpu(command, len(found), ctx)
    gpu = found[0]
    told = f"{command.node}/gpu{gpu.index} takes no new replicas until it is reinstated"
    if command.is_draining:
        movable, staying = repacking.leaving_and_staying(state, command.node, gpu.gpu_uuid)
        told += f"; {len(movable)} of {len(movable) + len(staying)} replicas there are moved where there is room"
        told += f"; until they end, these stay: {', '.join(staying)}" if staying else ""
    fact = GpuCloseAsked(
        **_command(command, ctx),
        node=command.node,
        gpu_uuid=gpu.gpu_uuid,
        is_draining=command.is_draining,
        reason=command.reason,
    )
    emptying = [Timer(due_s=ctx.now_s, input=repacking.MoveOn())] if command.is_draining else []
    return [*_admit(command, fact, told, ctx), *emptying]


def _gpus_named(state: ClusterState, command: GpuCloseRequested | GpuReinstateRequested) -> list[GpuOffer]:
    node = state.nodes.get(command.node)
    return [gpu for uuid, gpu in node.gpus.items() if uuid.startswith(command.gpu_uuid)] if node is not None else []


def _unclear_gpu(command: GpuCloseRequested | GpuReinstateRequested, count: int, ctx: Context) -> list[Outcome]:
    message = f"{command.node or 'no node'} offers {count} GPUs that begin with '{command.gpu_uuid}', not one"
    return _reject(command, "SUB-OPR-002", message, ctx)


def _not_the_operator(state: ClusterState, command: Command, wish: str, ctx: Context) -> list[Outcome]:
    """The rejection of what only the operator's tenant may do, else nothing."""
    operator = state.settings.operator_tenant
    if ctx.tenant == operator:
        return []
    return _reject(command, "SUB-OPR-001", f"only the operator's tenant ('{operator}') may {wish}", ctx)


@SERVICE.on(KeyCreateRequested)
def key_create_requested(state: ClusterState, command: KeyCreateRequested, ctx: Context) -> Sequence[Outcome]:
    if duplicate := _duplicate(state, command, ctx):
        return duplicate
    if len(command.key_hash) != 64 or not set(command.key_hash) <= set("0123456789abcdef"):
        return _reject(command, "SUB-KEY-001", "key_hash must be a SHA-256 in lower-case hexadecimal", ctx)
    taken = state.keys.get(command.key_id)
    if taken is not None:
        return _reject(command, "SUB-KEY-002", f"a key with the id '{command.key_id}' exists already", ctx)
    fact = KeyAdded(**_command(command, ctx), key_id=command.key_id, key_hash=command.key_hash, name=command.name)
    return _admit(command, fact, f"key {command.key_id} is accepted from now on", ctx)


@SERVICE.on(KeyRevokeRequested)
def key_revoke_requested(state: ClusterState, command: KeyRevokeRequested, ctx: Context) -> Sequence[Outcome]:
    if duplicate := _duplicate(state, command, ctx):
        return duplicate
    key = state.keys.get(command.key_id)
    if key is None or key.tenant != ctx.tenant:
        return _reject(command, "SUB-KEY-003", f"there is no key '{command.key_id}'", ctx)
    return _admit(command, KeyRevoked(**_command(command, ctx), key_id=command.key_id), "the key is revoked", ctx)


@SERVICE.on(UnreadableCommand)
def unreadable_command(state: ClusterState, command: UnreadableCommand, ctx: Context) -> Sequence[Outcome]:
    """Nothing is lost or silent: the bytes stay in the inbox, the reason goes into history and to the sender."""
    return _reject(command, "SUB-INB-001", f"the command cannot be read: {command.reason}", ctx)


def _failure(state: ClusterState, deployment: Deployment) -> str:
    """Why all of its replicas were given up; empty when one is alive or none was made."""
    replicas = state.replicas_of(deployment.deployment_id)
    has_failed = bool(replicas) and all(replica.state == "failed" for replica in replicas)
    return replicas[-1].problem or "no reason was told" if has_failed else ""


def _unknown_model(state: ClusterState, command: Command, model: str, ctx: Context) -> list[Outcome]:
    known = sorted(d.spec.name for d in state.deployments.values() if d.tenant == ctx.tenant)
    there = f"there are: {', '.join(known[:20])}" if known else "nothing is deployed"
    return _reject(command, "SUB-MDL-001", f"there is no deployment '{model}'; {there}", ctx)

"""How an engine is started: its arguments, from the lease and the deployment."""

from typing import Final

from schemas.deployments import EngineKind
from schemas.holders import EngineStart
from schemas.placement import ReplicaProposal
from services.nodeagent.settings import NodeAgentSettings

LOOPBACK: Final = ("127.0.0.1", "localhost")


def engine_start(
    replica: ReplicaProposal, *, lease_epoch: int, settings: NodeAgentSettings, python: str, environment: dict[str, str]
) -> EngineStart:
    """The wish for the holder.

    The engine lives in its granted bytes, context included, on each of its GPUs, and spreads what it holds evenly:
    where one share is smaller than another, the smallest counts. ``{port}`` is the holder's choice.
    """
    gpu_uuids = tuple(share.gpu_uuid for share in replica.shares)
    spec = replica.deployment
    common = [
        python,
        "-m",
        "engines",
        spec.engine.kind.value,
        "--model",
        spec.name,
        "--memory-bytes",
        str(min(share.request_bytes for share in replica.shares)),
        "--gpu",
        ",".join(gpu_uuids),
        "--port",
        "{port}",
    ]
    if settings.engine_host not in LOOPBACK:
        common += ["--host", "0.0.0.0"]  # noqa: S104  (as the setting says)
    if spec.engine.kind is EngineKind.TRAINING:
        common += ["--checkpoint-dir", f"{settings.state_dir}/checkpoints/{replica.tenant}/{spec.name}"]
    else:
        cold_s = settings.cold_start_s if spec.engine.cold_start_s is None else spec.engine.cold_start_s
        common += ["--weights-bytes", str(spec.engine.weights_bytes), "--cold-start-s", str(cold_s)]
    for name, value in sorted(spec.engine.arguments.items()):
        common += [f"--{name}", value]
    return EngineStart(
        replica_id=replica.replica_id,
        lease_epoch=lease_epoch,
        arguments=tuple(common),
        environment=environment,
        gpu_uuids=gpu_uuids,
    )

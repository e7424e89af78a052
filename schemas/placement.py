"""Facts of placement: what was admitted, where replicas shall go, and why not."""

from enum import StrEnum
from typing import ClassVar

from msgspec import Struct

from schemas.deployments import DeploymentSpec
from schemas.messages import Fact
from schemas.units import Bytes, Count, Identifier, ModelName, Name, Seconds, Sequence, UnixSeconds


class PlacementFact(Fact, frozen=True):
    writer: ClassVar[str] = "placement"

    at_s: UnixSeconds
    """When it was decided, in stream time."""


class CommandFact(PlacementFact, frozen=True):
    """One per inbox message; the highest `inbox_seq` is placement's inbox cursor."""

    inbox_seq: Sequence
    command_id: str
    tenant: Name


class DeploymentAdmitted(CommandFact, frozen=True, tag="placement.deployment_admitted.v1"):
    """The wish is sound; it will be placed, explained or retired."""

    deployment_id: Identifier
    revision_count: Count
    deployment: DeploymentSpec


class CommandRejected(CommandFact, frozen=True, tag="placement.command_rejected.v1"):
    """The command cannot be carried out as it stands; `message` says what to change."""

    code: str
    message: str


class CommandDuplicated(CommandFact, frozen=True, tag="placement.command_duplicated.v1"):
    """This command was handled before, or what it wishes for is so already; nothing changes."""

    message: str


class DeploymentRetired(CommandFact, frozen=True, tag="placement.deployment_retired.v1"):
    """The deployment is gone from the wish list; its replicas are being released."""

    deployment_id: Identifier
    model: ModelName


class ParkAsked(CommandFact, frozen=True, tag="placement.park_asked.v1"):
    """An operator wants the model parked; the swapper carries it out."""

    deployment_id: Identifier


class WakeAsked(CommandFact, frozen=True, tag="placement.wake_asked.v1"):
    """An operator wants the model resident; the swapper, or for a cold model the autoscaler, carries it out."""

    deployment_id: Identifier


class KeyAdded(CommandFact, frozen=True, tag="placement.key_added.v1"):
    """Gateways accept the key from now on."""

    key_id: Identifier
    key_hash: str
    name: str


class KeyRevoked(CommandFact, frozen=True, tag="placement.key_revoked.v1"):
    """Gateways refuse the key from now on."""

    key_id: Identifier


class ShareProposal(Struct, frozen=True, kw_only=True):
    """One shard's share on one GPU, with all that the node agent needs to start it."""

    replica_id: Identifier
    shard_index: int
    gpu_uuid: str
    request_bytes: Bytes
    limit_bytes: Bytes


class ReplicaProposal(Struct, frozen=True, kw_only=True):
    """One replica on one node, with its shards."""

    replica_id: Identifier
    deployment_id: Identifier
    tenant: Name
    deployment: DeploymentSpec
    shares: tuple[ShareProposal, ...]


class Alternative(Struct, frozen=True, kw_only=True):
    """Why a GPU was not chosen."""

    node: Name
    gpu_uuid: str
    reason: str
    short_by_bytes: Bytes = 0


class PlacementProposed(PlacementFact, frozen=True, tag="placement.proposed.v1"):
    """Where replicas shall go; the node agent grants or refuses against what it measures."""

    is_sharded: ClassVar[bool] = True

    proposal_id: Identifier
    node: Name
    replicas: tuple[ReplicaProposal, ...]
    reason: str
    alternatives: tuple[Alternative, ...] = ()


class FailureReason(StrEnum):
    NO_NODE = "no_node"
    LARGER_THAN_ANY_GPU = "larger_than_any_gpu"
    NO_GPU_HAS_ROOM = "no_gpu_has_room"
    NO_HOST_MEMORY = "no_host_memory"
    GRADE_NOT_AVAILABLE = "grade_not_available"
    REFUSED_BY_NODE = "refused_by_node"


class PlacementFailed(PlacementFact, frozen=True, tag="placement.failed.v1"):
    """Nothing fits now; tried again when a node reports more room."""

    deployment_id: Identifier
    replica_id: Identifier
    model: ModelName
    reason: FailureReason
    message: str
    missing_bytes: Bytes
    remedy: str
    """What would make it fit."""
    alternatives: tuple[Alternative, ...] = ()


class ReleaseProposed(PlacementFact, frozen=True, tag="placement.release_proposed.v1"):
    """The replica's lease shall end: drain, stop the engine, give everything back."""

    is_sharded: ClassVar[bool] = True

    node: Name
    replica_id: Identifier
    reason: str
    drain_s: Seconds = 30.0

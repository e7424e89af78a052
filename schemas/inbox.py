"""Commands of outsiders, and the answer that each one gets. Published to ``sublet.in.<tenant>.>``."""

from enum import StrEnum
from typing import Annotated

from msgspec import Meta

from schemas.deployments import DeploymentSpec
from schemas.messages import Command, Message
from schemas.units import Count, Identifier, ModelName, Name, Sequence


class DeployRequested(Command, frozen=True, tag="inbox.deploy_requested.v1"):
    """Make this deployment so. The same spec again changes nothing; another spec for the name replaces it."""

    deployment: DeploymentSpec


class RetireRequested(Command, frozen=True, tag="inbox.retire_requested.v1"):
    """Take the deployment away: drain, stop, release."""

    model: ModelName


class ParkRequested(Command, frozen=True, tag="inbox.park_requested.v1"):
    """Park the model now, whatever its warm window says."""

    model: ModelName


class WakeRequested(Command, frozen=True, tag="inbox.wake_requested.v1"):
    """Bring the model back to its GPU now."""

    model: ModelName


class RepackRequested(Command, frozen=True, tag="inbox.repack_requested.v1"):
    """Free whole GPUs now by moving what may be moved. For the operator's tenant only."""

    move_count_max: Count = 8


class QuotaRequested(Command, frozen=True, tag="inbox.quota_requested.v1"):
    """Set what a tenant is guaranteed, and its part of what others leave. For the operator's tenant only."""

    quota_tenant: Name
    gpu_quota: Annotated[float, Meta(ge=0)] | None = None
    """GPUs; None: no limit."""
    over_quota_weight: Annotated[float, Meta(ge=0)] = 1.0


class GpuReinstateRequested(Command, frozen=True, tag="inbox.gpu_reinstate_requested.v1"):
    """A quarantined GPU is well: take new replicas there again. For the operator's tenant only."""

    node: Name
    gpu_uuid: str
    """Whole, or the first characters of it if only one GPU of the node begins with them."""


class GpuCloseRequested(Command, frozen=True, tag="inbox.gpu_close_requested.v1"):
    """Put nothing new on a GPU until it is reinstated. For the operator's tenant only."""

    node: Name
    gpu_uuid: str
    """Whole, or the first characters of it if only one GPU of the node begins with them."""
    is_draining: bool = False
    """Also move away what is there, as far as it may be moved and there is room elsewhere."""
    reason: str = ""
    """Shown to whoever looks at the GPU."""


class KeyCreateRequested(Command, frozen=True, tag="inbox.key_create_requested.v1"):
    """Accept a new API key. The client made it; only its hash travels."""

    key_id: Identifier
    key_hash: str
    """SHA-256 of the key, hexadecimal."""
    name: str = ""


class KeyRevokeRequested(Command, frozen=True, tag="inbox.key_revoke_requested.v1"):
    """Stop accepting a key."""

    key_id: Identifier


class Verdict(StrEnum):
    ADMITTED = "admitted"
    REJECTED = "rejected"
    DUPLICATE = "duplicate"


class CommandAnswered(Message, frozen=True, tag="inbox.command_answered.v1"):
    """What became of a command; sent to ``sublet.out.<tenant>.<command id>``."""

    command_id: str
    verdict: Verdict
    message: str
    code: str = ""
    inbox_seq: Sequence = 0

"""Settings of placement; variables ``SUBLET_PLACEMENT_<NAME>``."""

from msgspec import Struct

from schemas.units import MiB
from services.placement.packing.policies import DEFAULT_POLICY


class PlacementSettings(Struct, frozen=True, kw_only=True):
    """One active instance in the whole system."""

    residue_bytes: int = 640 * MiB
    """Device bytes that a parked replica is expected to keep; the node agent checks against its own measure."""
    policy: str = DEFAULT_POLICY
    """How room is packed, for deployments that do not ask to be spread; `services.placement.packing.policies`."""
    concurrent_use_fraction: float = 0.9
    """Of what always-resident replicas leave of a GPU: so much may be expected to be in use at the same time."""
    assumed_use_fraction: float = 0.1
    """Part of the time that a model is assumed to be in use while no gateway has told."""
    use_window_s: float = 600.0
    """How far back use is remembered: what was an hour ago counts for nothing."""
    use_stale_s: float = 30.0
    """A model of which no gateway spoke for so long is taken to be in use at least as much as is assumed."""
    use_retry_s: float = 60.0
    """What did not fit because others are in use too much is tried again after this time."""
    placed_per_input_count: int = 256
    """Replicas decided in one input at most; the rest follow in the next one, so that commands are answered between."""
    gang_hold_s: float = 60.0
    """So long nodes hold the leases of a gang; placement gives it up after half of that."""
    gang_attempt_count: int = 5
    """After so many gangs given up in a row the deployment is told, and left alone for `gang_pause_max_s`."""
    gang_pause_s: float = 2.0
    """Before a gang that was given up is tried again; twice as long after each further one."""
    gang_pause_max_s: float = 300.0
    refusal_count: int = 5
    """After so many refusals in a row a replica is reported as not placed, until a node has more room."""
    remembered_command_count: int = 10_000
    """Command ids kept to recognise a repeated command."""
    compiled: bool = False
    """Choose nodes with compiled code: for fleets of many hundred nodes. Needs numba (the extra `compiled`)."""
    preemption_drain_s: float = 15.0
    """What is displaced has so long to end its requests, or to write a checkpoint, before it is stopped."""
    claim_s_max: float = 120.0
    """Room that is being made is kept for its newcomer so long; who has not left then is not waited for."""
    displaced_rest_s: float = 30.0
    """What gave way is not placed again before so much time has passed, so that a place is not lost in turns."""
    operator_tenant: str = "default"
    """The tenant that may set quotas and repack; by default the one that the local stack uses."""
    node_lost_s: float = 30.0
    """A node that is silent this long is lost: its replicas get another place. Route leases (1 s) ended long before."""
    nobody_heard_s: float = 10.0
    """No node at all is heard this long: it is placement that cannot hear, and none is lost. Agents speak every 2 s."""
    presence_tick_s: float = 2.0
    """How often placement looks for silent nodes."""
    return_settle_s: float = 5.0
    """So long after a node's return its agent has told what still runs; then surplus replicas are released."""
    flap_window_s: float = 3600.0
    """Losses of a node are remembered this long."""
    quarantine_s: float = 60.0
    """After the second loss nothing new goes to a node for this long; twice as long after each further one."""
    quarantine_max_s: float = 1800.0
    """The longest quarantine."""
    load_fresh_s: float = 3.0
    """A gateway's load sample older than this says nothing: its models count as busy."""
    gateway_gone_s: float = 10.0
    """A gateway that is silent this long is gone; its route leases ended long before."""
    defragment_every_s: float = 30.0
    """How often placement looks whether moves would free GPUs or let a waiting deployment in."""
    fragmented_fraction_min: float = 0.25
    """Of the bytes that nobody is promised, so much must lie on partly used GPUs before tidying up is worth it."""
    moves_at_once_max: int = 4
    """Each one costs a start, and room for both copies until it ends."""
    moves_per_hour_max: int = 12
    """Without being asked; an operator's wish has its own number."""
    move_timeout_s: float = 900.0
    """A replacement that is not ready by then is given up. A cold start of a large model takes minutes."""
    move_rest_s: float = 600.0
    """A replica that was placed more recently is not moved to tidy up."""
    move_drain_s: float = 120.0
    """The requests of a moved replica have this long to end; new ones go to its replacement."""
    repack_valid_s: float = 900.0
    """An operator's wish for moves is over after this time, done or not."""

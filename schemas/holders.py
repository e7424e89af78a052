"""HTTP bodies of the holder: route leases for gateways (TCP), engine control for the node agent (private socket)."""

from msgspec import Struct

from schemas.units import Count, Identifier, Seconds


class RouteLeaseWish(Struct, frozen=True, kw_only=True):
    """A gateway renews its route lease and says which state of the closed routes it has acted on.

    ``POST /routes/lease``. Answered at once when `seen_version` is not the current one, else after at most `wait_s`
    or on a change.
    """

    gateway: Identifier
    """Unique for each process: a restarted gateway takes a new name, and its old lease ends by itself."""
    seen_version: int
    """The version whose closed routes this gateway has stopped routing to; -1 at first, and never smaller again."""
    wait_s: Seconds = 0.3


class RouteLease(Struct, frozen=True, kw_only=True):
    """While it lasts the gateway may route to this node's open replicas without asking anybody."""

    version: int
    """Grows with each change, also over restarts of the holder. Ignore an answer older than the newest one acted on."""
    closed_ids: tuple[Identifier, ...]
    """Replicas that must get no new request."""
    open_ids: tuple[Identifier, ...]
    """Replicas that may get requests. One in neither list may get none."""
    endpoints: tuple[str, ...] = ()
    """Of each open replica, in the order of `open_ids`. A gateway that knows another one lags behind its facts."""
    term_s: Seconds
    """Counted from when the gateway sent its wish; after it the gateway must not route here."""


class RouteOpen(Struct, frozen=True, kw_only=True):
    replica_id: Identifier
    endpoint: str


class RouteClose(Struct, frozen=True, kw_only=True):
    """Answered when every gateway acknowledged, or its lease ended. 409 when the route is opened meanwhile."""

    replica_id: Identifier


class RouteClosed(Struct, frozen=True, kw_only=True):
    waited_s: Seconds
    expired_count: Count
    """Gateways that did not acknowledge; their leases ended."""


class EngineStart(Struct, frozen=True, kw_only=True):
    """Start a program behind a gate: it does not run before ``POST /engines/<id>/gate`` opens it."""

    replica_id: Identifier
    lease_epoch: int
    arguments: tuple[str, ...]
    environment: dict[str, str]
    gpu_uuids: tuple[str, ...]
    """Becomes CUDA_VISIBLE_DEVICES unless `environment` sets it."""
    port: int = 0
    """0: the holder picks a free one and puts it in place of ``{port}`` in arguments and environment."""


class EngineStop(Struct, frozen=True, kw_only=True):
    """``POST /engines/<id>/stop``: SIGTERM, after `grace_s` SIGKILL. Answered when nothing is left of it."""

    grace_s: Seconds


class EngineView(Struct, frozen=True, kw_only=True):
    replica_id: Identifier
    lease_epoch: int
    pid: int
    started_ticks: int
    """Start time of the process in clock ticks since boot: with the pid it names one process for ever."""
    port: int
    is_gated: bool
    is_alive: bool
    """False when nothing is left of it, its children included."""
    exit_code: int | None
    """-N when signal N ended it."""
    gpu_uuids: tuple[str, ...] = ()
    namespace: str
    """What the guard limits: a cgroup path, or a declared group on the software GPU."""
    log_path: str


class BrokerProcessView(Struct, frozen=True, kw_only=True):
    """The memory broker that the holder keeps (`schemas/brokers.py`)."""

    pid: int
    """0 while none runs. It has a context on each GPU that it lends: memory that belongs to no replica."""
    restart_count: Count
    engine_socket: str
    control_socket: str
    log_path: str


class HolderView(Struct, frozen=True, kw_only=True):
    """Everything a returning agent needs to adopt what runs."""

    holder_id: str
    engines: tuple[EngineView, ...]
    open_ids: tuple[Identifier, ...]
    closed_ids: tuple[Identifier, ...]
    broker: BrokerProcessView | None = None
    """None: this holder keeps none."""
    leftover_namespaces: dict[Identifier, str] = {}
    """Empty cgroups of a former holder whose limits it could not clear: do so, then ``DELETE /engines/<id>``."""


class HolderRefused(Struct, frozen=True, kw_only=True):
    """The body of every refusal (400 and up): one sentence."""

    reason: str

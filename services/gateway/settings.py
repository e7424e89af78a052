"""What an operator may choose for a gateway. Environment: ``SUBLET_GATEWAY_<FIELD>``."""

from typing import Annotated

from msgspec import Meta, Struct

from schemas.units import GiB, MiB, Name

PositiveCount = Annotated[int, Meta(ge=1)]
PositiveSeconds = Annotated[float, Meta(gt=0, description="seconds")]
PositiveBytes = Annotated[int, Meta(ge=1, description="bytes")]


class GatewaySettings(Struct, frozen=True, kw_only=True):
    """Every field has its unit in its name; the sentence below it says what the default rests on."""

    gateway_id: str = ""
    """Names this process in signals and route leases; never reused. Empty: made of host, process id and start time."""
    holder_token: str = ""
    """Bearer token that the nodes' holders ask for; empty: none. ``SUBLET_HOLDER_TOKEN`` sets it on both sides."""
    host: str = "127.0.0.1"
    """Address to listen on. Local by default, because a gateway without TLS before it belongs on no other network."""
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    """TCP port; 0 picks a free one. 8000 is what OpenAI-compatible servers use, so that clients need no change."""
    reuse_port: bool = False
    """Several gateway processes share one port (Linux). Off: a port taken by mistake is an error, not a riddle."""
    auth_required: bool = True
    """Refuse requests without a key. Switch off only where nobody else can reach the port."""
    open_tenant: Name = "default"
    """Whose models a request without a key sees when `auth_required` is off."""
    request_bytes_max: PositiveBytes = 32 * MiB
    """Larger bodies get 413. 32 MiB holds a dozen inlined pictures; the product with the hold bounds is memory."""
    hold_count_per_model_max: PositiveCount = 1000
    """Requests that may wait for one model here; more get 429, so that a dead model cannot eat the gateway."""
    hold_bytes_per_model_max: PositiveBytes = 256 * MiB
    """Bytes of bodies that may wait for one model here."""
    hold_count_max: PositiveCount = 5000
    """Requests that may wait in all. A waiting request costs about 30 KiB beside its body."""
    hold_bytes_max: PositiveBytes = 1 * GiB
    """Bytes of bodies that may wait in all."""
    wanted_repeat_s: PositiveSeconds = 0.25
    """How often an unanswered wish for a model is repeated: one lost message costs at most this much of a wake."""
    sample_every_s: PositiveSeconds = 1.0
    """How often the load of all models is told. Warm windows are longer by orders of magnitude."""
    sample_gap_s: PositiveSeconds = 0.05
    """The least time between two samples: bounds the signals when models turn busy and idle with each request."""
    ramp_first_count: PositiveCount = 4
    """Held requests released at once when their model is back; doubled with each first token, so that the engine
    compiles and fills its batch before the crowd comes."""
    ramp_step_s: PositiveSeconds = 0.25
    """The ramp also doubles after this time without a first token: one long prompt must not block the rest."""
    shun_asleep_s: PositiveSeconds = 0.1
    """How long a replica gets nothing after it said that it is asleep. Its return is announced; this is a net."""
    shun_broken_s: PositiveSeconds = 0.5
    """How long a replica gets nothing after its connection broke. Its node agent sees a dead engine sooner."""
    retry_after_unknown_s: PositiveSeconds = 5.0
    """Told to clients when nothing is known yet about how long the model takes to return."""
    heartbeat_s: PositiveSeconds = 5.0
    """A held streaming request hears a comment line this often. Before the first one no header is sent, so that errors
    keep their status. Proxies cut silent connections after 30 to 60 s."""
    connect_timeout_s: PositiveSeconds = 2.0
    """For a new connection to an engine; beyond it the request is tried elsewhere or held again."""
    silence_timeout_s: PositiveSeconds = 300.0
    """How long an engine may send nothing. Long: a prompt of 100,000 tokens behind a full batch is legitimate."""
    cut_count_max: PositiveCount = 2
    """How often a request may be sent again after its connection was cut before the answer began. Not more: it may be
    what kills the engine."""
    meter_streams: bool = True
    """Ask engines for the token usage of streamed answers; it is taken out again where the client did not ask."""
    upstream_connections_max: PositiveCount = 2000
    """Open connections to engines, all together; about 40 KiB each."""
    lease_wait_s: PositiveSeconds = 0.3
    """How long a holder may keep a renewal open. Under a third of the usual term of 1 s, so that two may be lost."""
    lease_timeout_s: PositiveSeconds = 0.5
    """When a renewal counts as lost; half a usual term, so that the next one can still be in time."""
    lease_retry_s: PositiveSeconds = 0.05
    """Pause after a lost renewal."""
    signal_queue_max: PositiveCount = 2000
    """Signals that wait for the bus; more are dropped and counted. All of them are repeated anyway."""
    signal_timeout_s: PositiveSeconds = 1.0
    """A signal that the bus has not taken by then is dropped: an old observation is worse than the next one."""
    metric_models_max: PositiveCount = 200
    """Models with a label of their own in /metrics; the others share the label ``other``."""
    drain_s: PositiveSeconds = 30.0
    """How long running answers may go on after a stop signal."""

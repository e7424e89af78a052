"""What whoever starts a stack may choose."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from schemas.units import GiB


@dataclass(frozen=True, slots=True, kw_only=True)
class StackSettings:
    """One stack on this host."""

    state_dir: Path
    """Kept; the next stack with it goes on where this one stopped."""
    gateway_port: int = 0
    """0: a free one, the same as last time where possible."""
    gpu_count: int = 2
    """Software GPUs; real ones are taken as they are."""
    uses_software_gpu: bool | None = None
    """None: where there is no real one."""
    profile: str = "h100-80"
    cold_start_s: float = 10.0
    """How long software engines take to start before their weights load. A setting, not a measurement."""
    phantom_host_bytes: int = 2048 * GiB
    """Host memory for parked weights on software GPUs, whose memory takes no room. Real ones: half of what is free."""
    node: str = "local"
    tenant: str = "default"
    service_settings: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """``{"swapper": {"tick_s": 0.1}}``: any setting of any service, over the stack's own."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """More variables for every service, for example ``SUBLET_TRACE_FILE`` or ``OTEL_EXPORTER_OTLP_ENDPOINT``."""
    restart_longest_s: float = 5.0
    """Between a part's death and its next start, however soon it dies again: it doubles from a tenth of a second."""
    handles_signals: bool = True
    """SIGINT and SIGTERM cancel the block and stop the stack."""

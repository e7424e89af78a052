"""Settings of the autoscaler; variables ``SUBLET_AUTOSCALER_<NAME>``."""

from msgspec import Struct


class AutoscalerSettings(Struct, frozen=True, kw_only=True):
    """One active instance in the whole system."""

    tick_s: float = 1.0
    """How often idle deployments are looked at."""
    load_fresh_s: float = 3.0
    """A gateway's load sample older than this says nothing: hold."""
    gateway_gone_s: float = 10.0
    """A gateway that is silent this long is gone."""

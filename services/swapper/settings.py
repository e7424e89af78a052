"""Settings of the swapper; variables ``SUBLET_SWAPPER_<NAME>``."""

from typing import Literal

from msgspec import Struct


class SwapperSettings(Struct, frozen=True, kw_only=True):
    """One active instance in the whole system."""

    policy: Literal["likely-return", "lru", "lfu", "landlord", "cost-rate"] = "likely-return"
    """Who of those that may give way is worth least."""
    tick_s: float = 0.25
    """How often warm windows, returns and unanswered orders are looked at. Wakes do not wait for it."""
    wanted_fresh_s: float = 1.0
    """A model is wanted while its newest signal is younger; gateways repeat it every 250 ms."""
    load_fresh_s: float = 3.0
    """A gateway's load sample older than this says nothing: its models count as busy."""
    gateway_gone_s: float = 10.0
    """A gateway that is silent this long is gone; its route leases ended long before."""
    switch_after_s: float = 2.0
    """When the oldest request has waited this long, a busy model may be drained for it."""
    order_repeat_s: float = 1.0
    """An order that no fact answers is sent again."""
    order_deadline_s: float = 60.0
    """An order that no fact answers this long is given up and decided anew."""
    refused_pause_s: float = 0.25
    """After a refused wake, before it is decided anew."""
    training_return_s: float = 1.0
    """Room must have been free this long before training takes it back."""

"""Signals of gateways. They write no facts."""

from msgspec import Struct

from schemas.messages import Signal
from schemas.units import Count, Epoch, Identifier, ModelName, Seconds, UnixSeconds


class ModelWanted(Signal, frozen=True, tag="gateways.model_wanted.v1"):
    """Requests wait for this model; repeated every 250 ms with the same `wake_epoch` until it is answered."""

    gateway: str
    deployment_id: Identifier
    model: ModelName
    replica_id: str = ""
    """Empty when the deployment is cold: no replica has a lease."""
    wake_epoch: Epoch = 0
    waiting_count: Count = 1
    oldest_wait_s: Seconds = 0.0
    deadline_s: Seconds = 30.0


class ModelLoad(Struct, frozen=True, kw_only=True):
    """What one gateway saw of one model since its last sample."""

    deployment_id: Identifier
    in_flight_count: Count
    waiting_count: Count
    arrived_count: Count
    last_arrival_s: UnixSeconds
    """Stream time of the newest request; 0 when none was seen."""


class LoadSampled(Signal, frozen=True, tag="gateways.load_sampled.v1"):
    """One gateway's load, every second and at once when a model turns busy or idle.

    A silent gateway is unknown, not idle.
    """

    gateway: str
    models: tuple[ModelLoad, ...]

"""Settings of placement; variables ``SUBLET_PLACEMENT_<NAME>``."""

from msgspec import Struct

from schemas.units import MiB


class PlacementSettings(Struct, frozen=True, kw_only=True):
    """One active instance in the whole system."""

    residue_bytes: int = 640 * MiB
    """Device bytes that a parked replica is expected to keep; the node agent checks against its own measure."""
    refusal_count: int = 5
    """After so many refusals in a row a replica is reported as not placed, until a node has more room."""
    remembered_command_count: int = 10_000
    """Command ids kept to recognise a repeated command."""

"""What all services that follow history share, apart from their connection; section ``shell`` of the file."""

from msgspec import Struct


class ShellSettings(Struct, frozen=True, kw_only=True):
    """Variables ``SUBLET_<SERVICE>_<NAME>`` or ``SUBLET_<NAME>``."""

    snapshot_every_count: int = 10_000
    """Inputs handled between two snapshots: bounds what a start must fold. 0: none are taken, and none are used."""
    snapshot_every_s: float = 3600.0
    """A writer to whom little happens takes one by time, so that history can be trimmed below it."""
    check_every_count: int = 1000
    """Commits between two checks of the state's invariants; a broken one stops the instance. 0: never."""

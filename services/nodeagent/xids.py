"""NVIDIA's XID errors: whose fault each is, and what that means for the GPU.

Source: NVIDIA's catalogue (docs.nvidia.com/deploy/xid-errors), for Ampere and newer. Where it tells to restart the
application, the GPU is well; where it tells to reset the GPU or to restart the host, it is not. NVIDIA's own device
plugin for Kubernetes takes 13, 31, 43, 45, 68 and 109 for the application's. For 109 the catalogue asks for a reset; we
follow the plugin: one workload that hangs must not close a GPU to all others.
"""

from enum import StrEnum
from typing import Final

from msgspec import Struct


class Blame(StrEnum):
    """Who is at fault."""

    APPLICATION = "application"
    """Its process ends or should; the GPU is well."""
    HARDWARE = "hardware"
    """The GPU, its memory, its link or its firmware: it needs a reset or a repair."""
    NOBODY = "nobody"
    """A notice: something was put right, or prepared."""
    UNKNOWN = "unknown"


class Xid(Struct, frozen=True):
    blame: Blame
    meaning: str


LOST_XID: Final = 79

XIDS: Final[dict[int, Xid]] = {
    8: Xid(Blame.APPLICATION, "it stopped processing"),
    13: Xid(Blame.APPLICATION, "a kernel did what it must not"),
    31: Xid(Blame.APPLICATION, "a kernel touched memory that is not there"),
    32: Xid(Blame.APPLICATION, "commands from the application were damaged"),
    43: Xid(Blame.APPLICATION, "an application's work was stopped"),
    45: Xid(Blame.APPLICATION, "an application's channel was cleaned up"),
    46: Xid(Blame.HARDWARE, "it stopped processing, and a reset of its engine did not help"),
    48: Xid(Blame.HARDWARE, "memory error of two bits that cannot be corrected"),
    61: Xid(Blame.HARDWARE, "its microcontroller stopped"),
    62: Xid(Blame.HARDWARE, "its microcontroller halted"),
    63: Xid(Blame.NOBODY, "a damaged row of memory is to be replaced at the next reset"),
    64: Xid(Blame.HARDWARE, "a damaged row of memory cannot be replaced"),
    68: Xid(Blame.APPLICATION, "video decoding failed"),
    69: Xid(Blame.APPLICATION, "a kernel did what this class of GPU does not know"),
    74: Xid(Blame.HARDWARE, "NVLink error"),
    LOST_XID: Xid(Blame.HARDWARE, "it fell off the bus"),
    92: Xid(Blame.NOBODY, "many memory errors that were corrected"),
    94: Xid(Blame.APPLICATION, "memory error that reached one application only"),
    95: Xid(Blame.HARDWARE, "memory error that may have reached every application"),
    109: Xid(Blame.APPLICATION, "a context did not give way in time"),
    110: Xid(Blame.HARDWARE, "security fault"),
    119: Xid(Blame.HARDWARE, "its system processor did not answer in time"),
    120: Xid(Blame.HARDWARE, "its system processor failed"),
    140: Xid(Blame.HARDWARE, "memory error that was not recovered from"),
}

_UNKNOWN: Final = Xid(Blame.UNKNOWN, "see NVIDIA's catalogue of XID errors")


def xid_of(code: int) -> Xid:
    return XIDS.get(code, _UNKNOWN)

"""Sizes and durations as people write and read them: ``14.5GB``, ``20GiB``, ``5m``; 13.5 GiB, 12 min."""

from __future__ import annotations

import math
import re
from typing import Final

SIZE: Final = re.compile(r"(\d+(?:\.\d+)?) ?(B|[KMGT]i?B)")
_SIZE_UNITS: Final = {
    "B": 1,
    "KB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4,
    "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4,
}  # fmt: skip
DURATION: Final = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|s|m|h|d))+")
_DURATION_PART: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_DURATION_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
GIB: Final = 1024**3
# Numbers on the wire are 64-bit; nothing that a person means is near it.
BYTES_MAX: Final = 2**63 - 1


def bytes_of(text: str) -> int | None:
    """The bytes in ``14.5GB`` (powers of 1000) or ``20GiB`` (powers of 1024); None when it is no size."""
    found = SIZE.fullmatch(text.strip())
    if found is None:
        return None
    size_bytes = float(found[1]) * _SIZE_UNITS[found[2]]
    return round(size_bytes) if size_bytes <= BYTES_MAX else None


def seconds_of(text: str) -> float | None:
    """The seconds in ``5m``, ``10s``, ``500ms`` or ``1h30m``; None when it is no duration."""
    text = text.strip()
    if DURATION.fullmatch(text) is None:
        return None
    seconds = sum(float(number) * _DURATION_UNITS[unit] for number, unit in _DURATION_PART.findall(text))
    return seconds if math.isfinite(seconds) else None


def gib(size_bytes: float) -> str:
    """A number of GiB with one decimal, without its unit."""
    return f"{size_bytes / GIB:.1f}"


def seconds(value_s: float) -> str:
    """A measured time: ``0.64 s``, ``12.3 s``."""
    return f"{value_s:.2f} s" if value_s < 10 else f"{value_s:.1f} s"


def span(value_s: float) -> str:
    """A rounded time: ``40 s``, ``12 min``, ``3 h``, ``2 d``."""
    for unit_s, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if value_s >= unit_s:
            return f"{value_s / unit_s:.0f} {unit}"
    return f"{value_s:.0f} s" if value_s >= 1 or value_s == 0 else f"{value_s:.1f} s"

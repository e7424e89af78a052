"""GPU models as data: `profiles.toml`, read and checked once."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from softgpu.errors import HostError

_FILE = Path(__file__).resolve().with_name("profiles.toml")


@dataclass(frozen=True, slots=True, kw_only=True)
class CallCost:
    """How long one driver call takes at least: a fixed part, and a part for each GiB it touches."""

    call_ns: int
    gib_ns: int = 0
    source: str = ""  # where the numbers are from; "estimate" begins what nobody measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What one GPU model is like. Sizes in bytes, speeds in bytes per second; a speed of 0 is that of this machine."""

    name: str
    total_bytes: int
    reserved_bytes: int
    context_bytes: int
    h2d_bytes_per_s: int
    d2h_bytes_per_s: int
    pageable_bytes_per_s: int
    compute_major: int
    compute_minor: int
    multiprocessor_count: int
    architecture: int
    pci_device_id: int
    pcie_generation: int
    pcie_width: int
    power_limit_mw: int
    costs: Mapping[str, CallCost]


@cache
def profiles() -> Mapping[str, Profile]:
    """All profiles, by name."""
    content = tomllib.loads(_FILE.read_text(encoding="utf-8"))
    tables = {
        name: {call: CallCost(**cost) for call, cost in table.items()} for name, table in content["costs"].items()
    }
    return {
        name: Profile(**{**values, "costs": _joined(tables, values["costs"])})
        for name, values in content["gpu"].items()
    }


def _joined(tables: Mapping[str, Mapping[str, CallCost]], names: list[str]) -> Mapping[str, CallCost]:
    return {call: cost for name in names for call, cost in tables[name].items()}


def profile_named(name: str) -> Profile:
    known = profiles()
    if name not in known:
        raise HostError(f"there is no GPU profile {name!r}; known: {', '.join(sorted(known))}")
    return known[name]

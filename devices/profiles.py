"""What GPUs of a model have and how fast they are: data in `devices/profiles/*.json`, every figure with its source.

The virtual devices compute with them and the software driver is set up from them; on real hardware they serve as first
estimates until something is measured. A source that starts with "assumption" is exactly that.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuProfile:
    """One model of GPU. `sources` names where each figure is from: `{field: text}`."""

    name: str
    title: str  # as NVML names the product
    aliases: tuple[str, ...]
    capacity_bytes: int  # total, as NVML reports it
    reserved_bytes: int  # of it, what the driver keeps
    context_bytes: int  # device memory that one process's context costs
    compute_capability: str  # "9.0"
    link_generation: int
    link_width_count: int
    to_device_bytes_per_s: int  # from pinned memory, one direction alone
    to_host_bytes_per_s: int
    pageable_bytes_per_s: int  # either direction, from memory that is not pinned
    memory_bytes_per_s: int  # peak of the device's own memory
    flops_per_s: int  # peak, dense BF16
    back_bytes_per_s: int  # creating and mapping physical memory
    unback_bytes_per_s: int  # unmapping and releasing it
    pin_bytes_per_s: int  # pinning host memory
    checkpoint_bytes_per_s: int  # the driver's own checkpoint into pageable memory
    restore_bytes_per_s: int  # and back
    context_s: float  # making a context
    call_s: float  # a driver call that moves nothing
    sources: dict[str, str]


@functools.cache
def profiles() -> dict[str, GpuProfile]:
    """All profiles by name, without aliases, in the order of their names."""
    folder = resources.files("devices").joinpath("profiles")
    files = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".json")), key=lambda entry: entry.name)
    read = [_from_json(json.loads(entry.read_text(encoding="utf-8"))) for entry in files]
    return {profile.name: profile for profile in read}


def profile(name: str) -> GpuProfile:
    """The profile of that name or alias. Raises `KeyError` that lists the known names."""
    for candidate in profiles().values():
        if name == candidate.name or name in candidate.aliases:
            return candidate
    raise KeyError(f"no GPU profile {name!r}; known: {', '.join(profiles())}")


def _from_json(document: dict[str, Any]) -> GpuProfile:
    """One file as a profile. A figure without a source, a missing or an unknown one is an error in our own data."""
    figures = document["figures"]
    expected = {field.name for field in fields(GpuProfile)} - {"name", "title", "aliases", "sources"}
    assert set(figures) == expected, f"{document['name']}: {sorted(set(figures) ^ expected)}"
    assert all(figure["source"] for figure in figures.values()), document["name"]
    return GpuProfile(
        name=document["name"],
        title=document["title"],
        aliases=tuple(document["aliases"]),
        sources={name: figure["source"] for name, figure in figures.items()},
        **{name: figure["value"] for name, figure in figures.items()},
    )

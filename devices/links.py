"""Direct links between the GPUs of one host: how fast each pair can exchange bytes. Pure; `devices.nvml` asks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

GB = 1e9
# By NVML's number of an NVLink version, one link in one direction. From NVIDIA's figures for whole GPUs, both ways:
# P100 160 GB/s on 4 links, V100 300 on 6, A100 600 on 12, H100 900 on 18, B200 1800 on 18. Others are not known to us.
NVLINK_BYTES_PER_S: Mapping[int, float] = MappingProxyType(
    {1: 20.0 * GB, 2: 25.0 * GB, 3: 25.0 * GB, 4: 25.0 * GB, 5: 25.0 * GB, 6: 25.0 * GB, 7: 50.0 * GB}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One active link of a GPU. At its other end is another GPU, or a switch that all GPUs of the host share."""

    remote_bus_id: str
    bytes_per_s: float  # in one direction


def direct_rates(links: Collection[Link], peers: Mapping[str, str]) -> dict[str, float]:
    """`{uuid: bytes per second in one direction}` to each of `peers`, the GPUs within reach (`{uuid: PCI bus id}`).

    Links that end at a peer are its own. A peer at which none ends is behind the switch, and all links that end at no
    peer lead there: alone it has the rate of them all, at once with others a part.
    """
    buses = set(peers.values())
    shared_bytes_per_s = sum(link.bytes_per_s for link in links if link.remote_bus_id not in buses)
    rates = {}
    for uuid, bus_id in sorted(peers.items()):
        own_bytes_per_s = sum(link.bytes_per_s for link in links if link.remote_bus_id == bus_id)
        rates[uuid] = own_bytes_per_s or shared_bytes_per_s
    return {uuid: rate for uuid, rate in rates.items() if rate > 0}

"""How fast two GPUs of a host reach each other: from links as NVML lists them."""

from devices.links import Link, direct_rates

GB = 1000**3


def links(*ends: str, rate: float = 25.0 * GB) -> list[Link]:
    return [Link(remote_bus_id=end, bytes_per_s=rate) for end in ends]


def test_links_that_end_at_a_gpu_are_its_own() -> None:
    """As in a V100 mesh: two links to one neighbour, one to another, none to the third."""
    found = direct_rates(links("bus-1", "bus-1", "bus-2"), {"GPU-1": "bus-1", "GPU-2": "bus-2"})

    assert {"GPU-1": 50.0 * GB, "GPU-2": 25.0 * GB} == found


def test_behind_a_switch_every_gpu_has_the_rate_of_all_links() -> None:
    """As in an H100 board: 18 links to switches, 450 GB/s to whichever GPU."""
    found = direct_rates(links(*["switch"] * 18), {"GPU-1": "bus-1", "GPU-2": "bus-2"})

    assert {"GPU-1": 450.0 * GB, "GPU-2": 450.0 * GB} == found


def test_without_links_nobody_is_named() -> None:
    assert {} == direct_rates([], {"GPU-1": "bus-1"})


def test_a_peer_that_no_link_reaches_is_not_named() -> None:
    assert {"GPU-1": 25.0 * GB} == direct_rates(links("bus-1"), {"GPU-1": "bus-1", "GPU-2": "bus-2"})

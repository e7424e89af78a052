"""Profiles are complete, sourced and plausible."""

import pytest

from devices.api import GiB
from devices.profiles import GpuProfile, profile, profiles


def test_the_gpus_we_promise_are_there() -> None:
    assert {"h100-80", "h200", "a100-80", "l40s", "rtx-4090"} <= set(profiles())


@pytest.mark.parametrize("found", profiles().values(), ids=profiles())
def test_figures_are_sourced_and_in_a_plausible_range(found: GpuProfile) -> None:
    assert all(found.sources.values())
    assert 16 * GiB < found.capacity_bytes < 256 * GiB
    assert found.reserved_bytes < GiB
    assert found.context_bytes < GiB
    # Far below the lanes' raw rate: PCIe 4 carries 2 GB/s a lane and direction, PCIe 5 twice that.
    lane_bytes_per_s = {4: 2e9, 5: 4e9}[found.link_generation]
    for speed in (found.to_device_bytes_per_s, found.to_host_bytes_per_s):
        assert 0.5 < speed / (lane_bytes_per_s * found.link_width_count) < 1
    assert found.pageable_bytes_per_s < found.to_host_bytes_per_s < found.back_bytes_per_s < found.memory_bytes_per_s


def test_an_alias_leads_to_its_profile() -> None:
    assert profile("h200-141") is profile("h200")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(KeyError, match=r"h100-80.*rtx-4090"):
        profile("h1000")

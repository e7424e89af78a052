"""What an engine takes from its environment about MPS."""

import pytest

from engines.mps import sharing_from


def test_the_environment_of_an_mps_client_makes_it_share_by_mps_with_its_ceiling() -> None:
    client = {"CUDA_MPS_PIPE_DIRECTORY": "/pipe", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "25"}

    sharing = sharing_from(client, mode=None, switch_s=0.0)
    assert ("mps", 0.25) == (sharing.mode, sharing.sm_fraction)
    assert "time-sliced" == sharing_from(client, mode="time-sliced", switch_s=0.0).mode, "what it is told goes first"


def test_without_a_daemon_a_ceiling_means_nothing() -> None:
    alone = sharing_from({"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "25"}, mode=None, switch_s=0.0)

    assert ("time-sliced", 1.0) == (alone.mode, alone.sm_fraction)


@pytest.mark.parametrize("percentage", ["", "much", "0", "-1", "101", "nan"])
def test_a_percentage_that_is_none_is_no_ceiling(percentage: str) -> None:
    client = {"CUDA_MPS_PIPE_DIRECTORY": "/pipe", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": percentage}

    assert 1.0 == sharing_from(client, mode=None, switch_s=0.0).sm_fraction

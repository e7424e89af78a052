"""Errors carry what a caller needs, and every name we map is one that the driver has."""

import pickle

import pynvml
import pytest
from cuda.bindings import driver

from devices import cuda_errors, nvml
from devices.api import DeviceError, DeviceLost, InvalidUse, NotSupported, OutOfMemory


@pytest.mark.parametrize(
    "error",
    [
        DeviceError(call="cuMemMap", code="CUDA_ERROR_UNKNOWN"),
        DeviceLost(call="nvmlDeviceGetMemoryInfo", code="GPU is lost", detail="GPU-1"),
        OutOfMemory(call="cuMemCreate", code="CUDA_ERROR_OUT_OF_MEMORY", requested_bytes=5, free_bytes=None),
    ],
)
def test_an_error_survives_the_way_to_another_process(error: DeviceError) -> None:
    copy = pickle.loads(pickle.dumps(error))

    assert type(copy) is type(error)
    assert copy.__dict__ == error.__dict__
    assert str(copy) == str(error)


def test_out_of_memory_says_both_numbers() -> None:
    error = OutOfMemory(call="cuMemCreate", code="CUDA_ERROR_OUT_OF_MEMORY", requested_bytes=5, free_bytes=3)

    assert str(error) == "cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY (requested 5 bytes, free 3)"


def test_every_cuda_code_we_know_exists() -> None:
    known = {code.name for code in driver.CUresult}

    assert set(cuda_errors._CLASSES) <= known
    assert cuda_errors.OUT_OF_MEMORY in known


def test_an_unknown_cuda_code_is_a_plain_device_error() -> None:
    assert cuda_errors.error_class("CUDA_ERROR_OF_THE_FUTURE") is DeviceError


def test_a_function_that_this_pynvml_lacks_is_not_supported() -> None:
    with pytest.raises(NotSupported):
        nvml.call("nvmlDeviceFromTheFuture")


def test_nvml_before_its_start_is_a_mistake_of_ours() -> None:
    assert nvml._CLASSES[pynvml.NVML_ERROR_UNINITIALIZED] is InvalidUse

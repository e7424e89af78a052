"""Which `DeviceError` a CUDA error code becomes. Codes are compared by name, so that this needs no driver."""

from __future__ import annotations

from devices.api import (
    ClientEvicted,
    DeviceError,
    DeviceLost,
    InvalidUse,
    NotFound,
    NotPermitted,
    NotReady,
    NotSupported,
)

OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"

# Everything after which the context is unusable until the process restarts counts as lost: the driver API documents
# these as leaving the process in an inconsistent state. UNKNOWN is what a GPU that fell off the bus answers.
_CLASSES: dict[str, type[DeviceError]] = {
    "CUDA_ERROR_NOT_SUPPORTED": NotSupported,
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE": NotSupported,
    "CUDA_ERROR_CALL_REQUIRES_NEWER_DRIVER": NotSupported,
    "CUDA_ERROR_STUB_LIBRARY": NotSupported,
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": NotSupported,
    "CUDA_ERROR_NOT_PERMITTED": NotPermitted,
    "CUDA_ERROR_MPS_CLIENT_TERMINATED": ClientEvicted,
    "CUDA_ERROR_NOT_READY": NotReady,
    "CUDA_ERROR_TIMEOUT": NotReady,
    "CUDA_ERROR_MPS_SERVER_NOT_READY": NotReady,
    "CUDA_ERROR_NO_DEVICE": NotFound,
    "CUDA_ERROR_INVALID_DEVICE": NotFound,
    "CUDA_ERROR_NOT_FOUND": NotFound,
    "CUDA_ERROR_INVALID_VALUE": InvalidUse,
    "CUDA_ERROR_INVALID_HANDLE": InvalidUse,
    "CUDA_ERROR_INVALID_CONTEXT": InvalidUse,
    "CUDA_ERROR_ILLEGAL_STATE": InvalidUse,
    "CUDA_ERROR_NOT_INITIALIZED": InvalidUse,
    "CUDA_ERROR_UNKNOWN": DeviceLost,
    "CUDA_ERROR_DEVICE_UNAVAILABLE": DeviceLost,
    "CUDA_ERROR_CONTEXT_IS_DESTROYED": DeviceLost,
    "CUDA_ERROR_ILLEGAL_ADDRESS": DeviceLost,
    "CUDA_ERROR_LAUNCH_FAILED": DeviceLost,
    "CUDA_ERROR_HARDWARE_STACK_ERROR": DeviceLost,
    "CUDA_ERROR_ECC_UNCORRECTABLE": DeviceLost,
    "CUDA_ERROR_NVLINK_UNCORRECTABLE": DeviceLost,
    "CUDA_ERROR_EXTERNAL_DEVICE": DeviceLost,
    "CUDA_ERROR_CONTAINED": DeviceLost,
}


def error_class(code: str) -> type[DeviceError]:
    """The port's class for a driver error other than `OUT_OF_MEMORY`; `DeviceError` itself when we know nothing."""
    return _CLASSES.get(code, DeviceError)

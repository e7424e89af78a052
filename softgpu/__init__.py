"""A software CUDA driver and NVML: unmodified cuda-python and pynvml run on a host without a GPU.

    host = softgpu.Host(Path("/dev/shm/my-host"), gpus=2, phantom=True).create()
    subprocess.run([...], env={**os.environ, **host.environment()})
    host.remove()

What it models and what it does not is in `docs/softgpu.md`. A green test on it proves our logic, not NVIDIA's driver.
"""

from softgpu.errors import BuildError, HostError, SoftgpuError
from softgpu.host import (
    NO_LIMIT,
    DeviceStatus,
    FaultStatus,
    GroupStatus,
    Host,
    HostStatus,
    LimitStatus,
    ProcessStatus,
)
from softgpu.library import build, library_directory
from softgpu.profiles import CallCost, Profile, profiles

__all__ = [
    "NO_LIMIT",
    "BuildError",
    "CallCost",
    "DeviceStatus",
    "FaultStatus",
    "GroupStatus",
    "Host",
    "HostError",
    "HostStatus",
    "LimitStatus",
    "ProcessStatus",
    "Profile",
    "SoftgpuError",
    "build",
    "library_directory",
    "profiles",
]

/* What a device says about itself. */
#include "cuda_driver.h"

#include <stdio.h>
#include <string.h>

#define CHECK_DEVICE(candidate) \
    ENTER();                    \
    if (!is_device(candidate))  \
    return CUDA_ERROR_INVALID_DEVICE

static const device *device_of(CUdevice index) { return &host->devices[driver_device(index)]; }

CUDA_EXPORT CUresult cuDeviceGetCount(int *count) {
    ENTER();
    if (!count)
        return CUDA_ERROR_INVALID_VALUE;
    *count = (int)host->device_count;
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuDeviceGet(CUdevice *found, int ordinal) {
    CHECK_DEVICE(ordinal);
    if (!found)
        return CUDA_ERROR_INVALID_VALUE;
    *found = ordinal;
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuDeviceGetName(char *name, int size, CUdevice index) {
    CHECK_DEVICE(index);
    snprintf(name, (size_t)size, "%s", device_of(index)->name);
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice index) {
    CHECK_DEVICE(index);
    memcpy(uuid->bytes, device_of(index)->uuid_bytes, sizeof uuid->bytes);
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice index) {
    CHECK_DEVICE(index);
    *bytes = device_of(index)->total_bytes - device_of(index)->reserved_bytes;
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuDeviceGetPCIBusId(char *text, int size, CUdevice index) {
    CHECK_DEVICE(index);
    snprintf(text, (size_t)size, "0000:%02x:00.0", device_of(index)->pci_bus);
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuDeviceGetByPCIBusId(CUdevice *found, const char *text) {
    ENTER();
    unsigned domain, bus, slot;
    if (!found || !text || sscanf(text, "%x:%x:%x", &domain, &bus, &slot) != 3)
        return CUDA_ERROR_INVALID_VALUE;
    for (uint32_t i = 0; i < host->device_count; i++) {
        if (device_of((CUdevice)i)->pci_bus != bus)
            continue;
        *found = (CUdevice)i;
        return CUDA_SUCCESS;
    }
    return CUDA_ERROR_INVALID_DEVICE;
}

CUDA_EXPORT CUresult cuDeviceComputeCapability(int *major, int *minor, CUdevice index) {
    CHECK_DEVICE(index);
    *major = (int)device_of(index)->compute_major;
    *minor = (int)device_of(index)->compute_minor;
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuDeviceCanAccessPeer(int *can, CUdevice index, CUdevice peer) {
    CHECK_DEVICE(index);
    if (!is_device(peer))
        return CUDA_ERROR_INVALID_DEVICE;
    *can = 0;
    return CUDA_SUCCESS;
}

/* Attributes that do not depend on the profile. What is missing is 0, the driver's word for "no". */
static const struct {
    int attribute, value;
} fixed_attributes[] = {
    {1, 1024},                                /* MAX_THREADS_PER_BLOCK */
    {2, 1024},                                /* MAX_BLOCK_DIM_X, _Y, _Z */
    {3, 1024},   {4, 64},    {5, 2147483647}, /* MAX_GRID_DIM_X, _Y, _Z */
    {6, 65535},  {7, 65535}, {8, 49152},      /* MAX_SHARED_MEMORY_PER_BLOCK */
    {9, 65536},                               /* TOTAL_CONSTANT_MEMORY */
    {10, 32},                                 /* WARP_SIZE */
    {12, 65536},                              /* MAX_REGISTERS_PER_BLOCK */
    {15, 1},                                  /* GPU_OVERLAP */
    {19, 1},                                  /* CAN_MAP_HOST_MEMORY */
    {31, 1},                                  /* CONCURRENT_KERNELS */
    {32, 1},                                  /* ECC_ENABLED */
    {39, 2048},                               /* MAX_THREADS_PER_MULTIPROCESSOR */
    {40, 3},                                  /* ASYNC_ENGINE_COUNT */
    {41, 1},                                  /* UNIFIED_ADDRESSING */
    {78, 1},                                  /* STREAM_PRIORITIES_SUPPORTED */
    {91, 1},                                  /* CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM */
    {99, 1},                                  /* HOST_REGISTER_SUPPORTED */
    {102, 1},                                 /* VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED */
    {103, 1},                                 /* HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED */
    {115, 1},                                 /* MEMORY_POOLS_SUPPORTED */
};

static int profile_attribute(const device *gpu, int attribute) {
    switch (attribute) {
    case 16: return (int)gpu->multiprocessor_count;
    case 33: return (int)gpu->pci_bus;
    case 75: return (int)gpu->compute_major;
    case 76: return (int)gpu->compute_minor;
    case 139: return (int)gpu->pci_device_id;
    default: return 0;
    }
}

CUDA_EXPORT CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice index) {
    CHECK_DEVICE(index);
    if (!value)
        return CUDA_ERROR_INVALID_VALUE;
    *value = profile_attribute(device_of(index), attribute);
    for (size_t i = 0; i < sizeof fixed_attributes / sizeof *fixed_attributes; i++)
        if (fixed_attributes[i].attribute == attribute)
            *value = fixed_attributes[i].value;
    return CUDA_SUCCESS;
}

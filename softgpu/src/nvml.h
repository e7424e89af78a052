/* The part of NVML that softgpu answers. Layouts are those of nvidia-ml-py 13 (pynvml.py), declared by
 * ourselves. */
#ifndef SOFTGPU_NVML_H
#define SOFTGPU_NVML_H

#include "host.h"

#define NVML_EXPORT __attribute__((visibility("default")))

typedef enum {
    NVML_SUCCESS = 0,
    NVML_ERROR_UNINITIALIZED = 1,
    NVML_ERROR_INVALID_ARGUMENT = 2,
    NVML_ERROR_NOT_SUPPORTED = 3,
    NVML_ERROR_NO_PERMISSION = 4,
    NVML_ERROR_NOT_FOUND = 6,
    NVML_ERROR_INSUFFICIENT_SIZE = 7,
    NVML_ERROR_DRIVER_NOT_LOADED = 9,
    NVML_ERROR_TIMEOUT = 10,
    NVML_ERROR_FUNCTION_NOT_FOUND = 13,
    NVML_ERROR_GPU_IS_LOST = 15,
    NVML_ERROR_INSUFFICIENT_RESOURCES = 23,
    NVML_ERROR_ARGUMENT_VERSION_MISMATCH = 25,
    NVML_ERROR_UNKNOWN = 999,
} nvmlReturn;

typedef device *nvmlDevice;

typedef struct {
    unsigned long long total, free, used;
} nvmlMemory;
typedef struct {
    unsigned version;
    unsigned long long total, reserved, free, used;
} nvmlMemoryV2;
typedef struct {
    unsigned gpu, memory;
} nvmlUtilization;
typedef struct {
    char busIdLegacy[16];
    unsigned domain, bus, device, pciDeviceId, pciSubSystemId;
    char busId[32];
} nvmlPciInfo;
typedef struct {
    unsigned pid;
    unsigned long long usedGpuMemory;
    unsigned gpuInstanceId, computeInstanceId;
} nvmlProcessInfo;
typedef struct {
    nvmlDevice device;
    unsigned long long eventType, eventData;
    unsigned gpuInstanceId, computeInstanceId;
} nvmlEventData;
typedef struct {
    unsigned multiprocessorCount, sharedCopyEngineCount, sharedDecoderCount, sharedEncoderCount, sharedJpegCount,
        sharedOfaCount, gpuInstanceSliceCount, computeInstanceSliceCount;
    unsigned long long memorySizeMB;
} nvmlDeviceAttributes;
typedef struct {
    const char *nameSpace;
    unsigned long long softLimit, hardLimit;
} nvmlSetMemoryLimits;
typedef struct {
    const char *nameSpace;
    unsigned long long softLimit, hardLimit, currentUsed;
} nvmlGetMemoryLimits;

#define SW_THERMAL_SLOWDOWN 0x20ull
#define HW_THERMAL_SLOWDOWN 0x40ull
#define ECC_UNCORRECTED 1u
#define NO_INSTANCE 0xffffffffu /* no MIG: neither a GPU instance nor a compute instance */

nvmlReturn nvml_enter(const char *function); /* initialised? must it fail? */
nvmlReturn nvml_enter_device(const char *function,
                             nvmlDevice gpu); /* and is that a device that still answers? */
int nvml_index(nvmlDevice gpu);
nvmlReturn nvml_enter_gpu(const char *function, nvmlDevice gpu); /* and not only a MIG instance of one? */

#define NVML_ENTER()                               \
    do {                                           \
        nvmlReturn entered = nvml_enter(__func__); \
        if (entered != NVML_SUCCESS)               \
            return entered;                        \
    } while (0)

#define NVML_ENTER_DEVICE(gpu)                                 \
    do {                                                       \
        nvmlReturn entered = nvml_enter_device(__func__, gpu); \
        if (entered != NVML_SUCCESS)                           \
            return entered;                                    \
    } while (0)

#define NVML_ENTER_GPU(gpu)                                 \
    do {                                                    \
        nvmlReturn entered = nvml_enter_gpu(__func__, gpu); \
        if (entered != NVML_SUCCESS)                        \
            return entered;                                 \
    } while (0)

#endif

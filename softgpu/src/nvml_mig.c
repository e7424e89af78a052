/* Multi-instance GPUs: the mode, and the instances that a host was made with. */
#include "nvml.h"

#define INSTANCES_MAX 7

NVML_EXPORT nvmlReturn nvmlDeviceGetMigMode(nvmlDevice gpu, unsigned *current, unsigned *pending) {
    NVML_ENTER_GPU(gpu);
    if (!gpu->is_mig) /* of a GPU that is whole nobody may ask whether it could be cut: that is not modelled */
        return NVML_ERROR_NOT_SUPPORTED;
    *current = *pending = 1;
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn nvmlDeviceGetMaxMigDeviceCount(nvmlDevice gpu, unsigned *count) {
    NVML_ENTER_GPU(gpu);
    *count = gpu->is_mig ? INSTANCES_MAX : 0;
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn nvmlDeviceGetMigDeviceHandleByIndex(nvmlDevice gpu, unsigned index,
                                                           nvmlDevice *instance) {
    NVML_ENTER_GPU(gpu);
    if (index >= INSTANCES_MAX)
        return NVML_ERROR_INVALID_ARGUMENT;
    for (int d = 0; d < (int)host->device_count; d++) {
        if (d == nvml_index(gpu) || mig_parent(d) != nvml_index(gpu) || index--)
            continue;
        *instance = &host->devices[d];
        return NVML_SUCCESS;
    }
    return NVML_ERROR_NOT_FOUND;
}

NVML_EXPORT nvmlReturn nvmlDeviceIsMigDeviceHandle(nvmlDevice gpu, unsigned *is_instance) {
    NVML_ENTER_DEVICE(gpu);
    *is_instance = gpu->mig_parent != 0;
    return NVML_SUCCESS;
}

static nvmlReturn enter_instance(const char *function, nvmlDevice instance) {
    nvmlReturn entered = nvml_enter_device(function, instance);
    return entered == NVML_SUCCESS && !instance->mig_parent ? NVML_ERROR_INVALID_ARGUMENT : entered;
}

#define NVML_ENTER_INSTANCE(instance)                            \
    do {                                                         \
        nvmlReturn entered = enter_instance(__func__, instance); \
        if (entered != NVML_SUCCESS)                             \
            return entered;                                      \
    } while (0)

NVML_EXPORT nvmlReturn nvmlDeviceGetDeviceHandleFromMigDeviceHandle(nvmlDevice instance, nvmlDevice *gpu) {
    NVML_ENTER_INSTANCE(instance);
    *gpu = &host->devices[mig_parent(nvml_index(instance))];
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn nvmlDeviceGetGpuInstanceId(nvmlDevice instance, unsigned *id) {
    NVML_ENTER_INSTANCE(instance);
    *id = instance->mig_id;
    return NVML_SUCCESS;
}

/* One compute instance in each, as most are made. */
NVML_EXPORT nvmlReturn nvmlDeviceGetComputeInstanceId(nvmlDevice instance, unsigned *id) {
    NVML_ENTER_INSTANCE(instance);
    *id = 0;
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn nvmlDeviceGetAttributes_v2(nvmlDevice instance, nvmlDeviceAttributes *attributes) {
    NVML_ENTER_INSTANCE(instance);
    *attributes = (nvmlDeviceAttributes){
        .multiprocessorCount = instance->multiprocessor_count,
        .sharedCopyEngineCount = instance->mig_slices,
        .gpuInstanceSliceCount = instance->mig_slices,
        .computeInstanceSliceCount = instance->mig_slices,
        .memorySizeMB = instance->total_bytes >> 20,
    };
    return NVML_SUCCESS;
}

/* Memory limits of a group: soft is its guarantee, hard its ceiling (driver R615 and later).
 *
 * nameSpace is a cgroup v2 directory, or, where that is missing, a name that processes declare in
 * SOFTGPU_GROUP. */
#include "nvml.h"

#include <unistd.h>

static int is_path(const char *name_space) { return name_space[0] == '/'; }

static uint64_t key_of(const char *name_space) {
    return is_path(name_space) ? group_key_of_path(name_space) : group_key_of_name(name_space);
}

static nvmlReturn check(const char *name_space) {
    if (!name_space || !*name_space)
        return NVML_ERROR_INVALID_ARGUMENT;
    return key_of(name_space) ? NVML_SUCCESS : NVML_ERROR_NOT_FOUND;
}

NVML_EXPORT nvmlReturn nvmlDeviceSetMemoryLimits_v1(nvmlDevice gpu, const nvmlSetMemoryLimits *limits) {
    NVML_ENTER_GPU(gpu);
    if (gpu->is_mig)
        return NVML_ERROR_NOT_SUPPORTED; /* limits and MIG exclude each other */
    if (!limits || limits->softLimit > limits->hardLimit)
        return NVML_ERROR_INVALID_ARGUMENT;
    nvmlReturn checked = check(limits->nameSpace);
    if (checked != NVML_SUCCESS)
        return checked;
    if (is_path(limits->nameSpace) && geteuid())
        return NVML_ERROR_NO_PERMISSION; /* as the driver; a declared name is ours alone, and anyone's */
    fault_record struck;
    if (fault_strikes(__func__, FAULT_LIE, &struck))
        return NVML_SUCCESS;
    host_lock();
    int failed = group_set(key_of(limits->nameSpace), limits->nameSpace, nvml_index(gpu), limits->softLimit,
                           limits->hardLimit);
    host_unlock();
    return failed ? NVML_ERROR_INSUFFICIENT_RESOURCES : NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn nvmlDeviceGetMemoryLimits_v1(nvmlDevice gpu, nvmlGetMemoryLimits *limits) {
    NVML_ENTER_GPU(gpu);
    if (gpu->is_mig)
        return NVML_ERROR_NOT_SUPPORTED;
    if (!limits)
        return NVML_ERROR_INVALID_ARGUMENT;
    nvmlReturn checked = check(limits->nameSpace);
    if (checked != NVML_SUCCESS)
        return checked;
    uint64_t key = key_of(limits->nameSpace);
    int index = nvml_index(gpu);
    host_lock();
    host_reap();
    const group_record *group = group_find(key);
    limits->softLimit = group ? group->soft_bytes[index] : 0;
    limits->hardLimit = group ? group->hard_bytes[index] : NO_LIMIT;
    limits->currentUsed = group_used(key, index);
    host_unlock();
    fault_record struck;
    if (fault_strikes(__func__, FAULT_LIE, &struck)) {
        limits->softLimit = 0;
        limits->hardLimit = NO_LIMIT;
    }
    return NVML_SUCCESS;
}

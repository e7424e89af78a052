/* Starting and stopping NVML, versions, error texts. */
#include "nvml.h"

#include <stdio.h>
#include <string.h>

static int start_count;

nvmlReturn nvml_enter(const char *function) {
    if (!__atomic_load_n(&start_count, __ATOMIC_ACQUIRE))
        return NVML_ERROR_UNINITIALIZED;
    return (nvmlReturn)fault_code(function);
}

nvmlReturn nvml_enter_device(const char *function, nvmlDevice gpu) {
    nvmlReturn entered = nvml_enter(function);
    if (entered != NVML_SUCCESS)
        return entered;
    if (gpu < host->devices || gpu >= host->devices + host->device_count)
        return NVML_ERROR_INVALID_ARGUMENT;
    return device_is_lost(nvml_index(gpu)) ? NVML_ERROR_GPU_IS_LOST : NVML_SUCCESS;
}

nvmlReturn nvml_enter_gpu(const char *function, nvmlDevice gpu) {
    nvmlReturn entered = nvml_enter_device(function, gpu);
    return entered == NVML_SUCCESS && gpu->mig_parent ? NVML_ERROR_NOT_SUPPORTED : entered;
}

int nvml_index(nvmlDevice gpu) { return (int)(gpu - host->devices); }

NVML_EXPORT nvmlReturn nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    if (host_attach())
        return NVML_ERROR_DRIVER_NOT_LOADED;
    __atomic_fetch_add(&start_count, 1, __ATOMIC_RELEASE);
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
NVML_EXPORT nvmlReturn nvmlInit(void) { return nvmlInitWithFlags(0); }

NVML_EXPORT nvmlReturn nvmlShutdown(void) {
    if (!start_count)
        return NVML_ERROR_UNINITIALIZED;
    __atomic_fetch_sub(&start_count, 1, __ATOMIC_RELEASE);
    return NVML_SUCCESS;
}

NVML_EXPORT const char *nvmlErrorString(int result) {
    switch (result) {
    case NVML_SUCCESS: return "Success";
    case NVML_ERROR_UNINITIALIZED: return "Uninitialized";
    case NVML_ERROR_INVALID_ARGUMENT: return "Invalid Argument";
    case NVML_ERROR_NOT_SUPPORTED: return "Not Supported";
    case NVML_ERROR_NO_PERMISSION: return "Insufficient Permissions";
    case NVML_ERROR_NOT_FOUND: return "Not Found";
    case NVML_ERROR_INSUFFICIENT_SIZE: return "Insufficient Size";
    case NVML_ERROR_DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case NVML_ERROR_TIMEOUT: return "Timeout";
    case NVML_ERROR_FUNCTION_NOT_FOUND: return "Function Not Found";
    case NVML_ERROR_GPU_IS_LOST: return "GPU is lost";
    case NVML_ERROR_INSUFFICIENT_RESOURCES: return "Insufficient Resources";
    case NVML_ERROR_ARGUMENT_VERSION_MISMATCH: return "Argument Version Mismatch";
    default: return "Unknown Error";
    }
}

static nvmlReturn answer_text(char *text, unsigned size, const char *answer) {
    if (strlen(answer) >= size)
        return NVML_ERROR_INSUFFICIENT_SIZE;
    snprintf(text, size, "%s", answer);
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn nvmlSystemGetDriverVersion(char *text, unsigned size) {
    NVML_ENTER();
    return answer_text(text, size, host->driver_text);
}

NVML_EXPORT nvmlReturn nvmlSystemGetNVMLVersion(char *text, unsigned size) {
    NVML_ENTER();
    char version[64];
    snprintf(version, sizeof version, "%u.%s", host->driver_version / 1000, host->driver_text);
    return answer_text(text, size, version);
}

NVML_EXPORT nvmlReturn nvmlSystemGetCudaDriverVersion_v2(int *version) {
    NVML_ENTER();
    *version = (int)host->driver_version;
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn nvmlSystemGetCudaDriverVersion(int *version) {
    return nvmlSystemGetCudaDriverVersion_v2(version);
}

NVML_EXPORT nvmlReturn nvmlSystemGetProcessName(unsigned pid, char *text, unsigned size) {
    NVML_ENTER();
    char path[64];
    snprintf(path, sizeof path, "/proc/%u/comm", pid);
    FILE *file = fopen(path, "re");
    if (!file)
        return NVML_ERROR_NOT_FOUND;
    if (!fgets(text, (int)size, file))
        *text = 0;
    text[strcspn(text, "\n")] = 0;
    fclose(file);
    return NVML_SUCCESS;
}

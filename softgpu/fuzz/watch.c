/* Reading NVML and the device, and setting limits. */
#include "worker.h"

#include <stdio.h>
#include <unistd.h>

static nvmlDevice some_gpu(void) { return self.gpus[chance(GPU_MAX)]; }

static int read_memory(void) {
    nvmlMemoryV2 now = {.version = sizeof now | 2u << 24};
    if (!answered(nvmlDeviceGetMemoryInfo_v2(some_gpu(), &now)))
        return 0;
    if (now.used + now.free + now.reserved != now.total)
        fail("%llu used, %llu free and %llu reserved are not %llu in total", now.used, now.free, now.reserved,
             now.total);
    return 1;
}

static int read_processes(void) {
    nvmlProcessInfo list[256];
    unsigned count = 256;
    nvmlDevice gpu = some_gpu();
    nvmlMemoryV2 now = {.version = sizeof now | 2u << 24};
    if (!answered(nvmlDeviceGetComputeRunningProcesses_v3(gpu, &count, list)) ||
        !answered(nvmlDeviceGetMemoryInfo_v2(gpu, &now)))
        return 0;
    for (unsigned i = 0; i < count; i++)
        if (list[i].usedGpuMemory > now.total)
            fail("process %u uses %llu bytes of %llu", list[i].pid, list[i].usedGpuMemory, now.total);
    return 1;
}

static int read_info(void) {
    size_t free_bytes, total_bytes, device_bytes;
    CUcontext now = NULL;
    if (cuCtxGetCurrent(&now) != CUDA_SUCCESS || !now || !did(cuMemGetInfo_v2(&free_bytes, &total_bytes)) ||
        !did(cuDeviceTotalMem_v2(&device_bytes, 0)))
        return 0;
    if (free_bytes > total_bytes || total_bytes > device_bytes)
        fail("%zu bytes free of %zu", free_bytes, total_bytes);
    return 1;
}

static int set_limit(void) {
    char name[32];
    uint64_t hard_bytes = chance(3) ? NO_LIMIT : (8 + chance(120)) * MIB;
    snprintf(name, sizeof name, "group-%d", (int)chance(4));
    nvmlSetMemoryLimits wanted = {name, chance(2) ? 0 : hard_bytes / 2, hard_bytes};
    return answered(nvmlDeviceSetMemoryLimits_v1(some_gpu(), &wanted));
}

/* A limit on the root of cgroup v2 holds for everybody; where there is none to write to, it is refused. */
static int set_cgroup_limit(void) {
    nvmlSetMemoryLimits wanted = {"/sys/fs/cgroup", 0, chance(2) ? NO_LIMIT : 200 * MIB};
    nvmlReturn result = nvmlDeviceSetMemoryLimits_v1(some_gpu(), &wanted);
    return result == NVML_ERROR_NO_PERMISSION || result == NVML_ERROR_NOT_FOUND ? 0 : answered(result);
}

static int read_limit(void) {
    char name[32];
    snprintf(name, sizeof name, "group-%d", (int)chance(4));
    nvmlGetMemoryLimits now = {.nameSpace = name};
    if (!answered(nvmlDeviceGetMemoryLimits_v1(some_gpu(), &now)))
        return 0;
    if (now.softLimit > now.hardLimit)
        fail("a soft limit of %llu above the hard one of %llu", now.softLimit, now.hardLimit);
    return 1;
}

static int read_rest(void) {
    nvmlUtilization rates;
    unsigned value;
    int count, version;
    return answered(nvmlDeviceGetUtilizationRates(some_gpu(), &rates)) &&
           answered(nvmlDeviceGetTemperature(some_gpu(), 0, &value)) && did(cuDeviceGetCount(&count)) &&
           cuDriverGetVersion(&version) == CUDA_SUCCESS;
}

static int watch_events(void) {
    nvmlEventData data;
    if (!self.watched) {
        if (!answered(nvmlEventSetCreate(&self.watched))) {
            self.watched = NULL;
            return 0;
        }
        return answered(nvmlDeviceRegisterEvents(some_gpu(), 8, self.watched));
    }
    nvmlReturn result = nvmlEventSetWait_v2(self.watched, &data, 0);
    if (result != NVML_ERROR_TIMEOUT && !answered(result))
        return 0;
    if (chance(10) == 0 && answered(nvmlEventSetFree(self.watched)))
        self.watched = NULL;
    return 1;
}

const operation_kind watch_operations[] = {
    {"read NVML's memory", read_memory, 25},
    {"read NVML's processes", read_processes, 15},
    {"read the driver's memory", read_info, 20},
    {"set a limit", set_limit, 12},
    {"set a cgroup's limit", set_cgroup_limit, 1},
    {"read a limit", read_limit, 12},
    {"read the rest", read_rest, 8},
    {"watch events", watch_events, 10},
    {0},
};

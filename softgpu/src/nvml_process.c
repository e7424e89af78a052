/* Who uses a device, and how much of it. */
#include "nvml.h"

#define NOT_AVAILABLE (~0ull) /* NVML_VALUE_NOT_AVAILABLE */

/* The bytes of a process are its contexts and the chunks it created, shared or not. */
static unsigned list_on(int index, nvmlProcessInfo *list, unsigned room, unsigned count) {
    unsigned instance = host->devices[index].mig_parent ? host->devices[index].mig_id : NO_INSTANCE;
    for (int i = 0; i < PROCESS_MAX; i++) {
        const process_record *process = &host->processes[i];
        uint64_t used_bytes = process_bytes(process, index);
        if (!process->is_used || !used_bytes)
            continue;
        int pid = process_pid(i);
        if (pid <= 0) /* outside the asker's pid namespace: NVML cannot name it either */
            continue;
        if (count < room)
            list[count] = (nvmlProcessInfo){(unsigned)pid, used_bytes, instance, instance == NO_INSTANCE ? NO_INSTANCE : 0};
        count++;
    }
    return count;
}

/* On a GPU that is cut: those on all its instances. */
static unsigned list_processes(int index, nvmlProcessInfo *list, unsigned room) {
    unsigned count = 0;
    for (int d = 0; d < (int)host->device_count; d++)
        if (d == index || mig_parent(d) == index)
            count = list_on(d, list, room, count);
    return count;
}

NVML_EXPORT nvmlReturn nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice gpu, unsigned *count,
                                                               nvmlProcessInfo *list) {
    NVML_ENTER_DEVICE(gpu);
    unsigned room = list ? *count : 0;
    host_lock();
    host_reap();
    *count = list_processes(nvml_index(gpu), list, room);
    host_unlock();
    fault_record struck;
    if (fault_strikes(__func__, FAULT_EMPTY, &struck))
        *count = 0;
    if (room && fault_strikes(__func__, FAULT_UNKNOWN, &struck))
        for (unsigned i = 0; i < *count && i < room; i++)
            list[i].usedGpuMemory = NOT_AVAILABLE;
    return *count > room ? NVML_ERROR_INSUFFICIENT_SIZE : NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn nvmlDeviceGetComputeRunningProcesses_v2(nvmlDevice gpu, unsigned *count,
                                                               nvmlProcessInfo *list) {
    return nvmlDeviceGetComputeRunningProcesses_v3(gpu, count, list);
}

static nvmlReturn nobody(const char *function, nvmlDevice gpu, unsigned *count) {
    nvmlReturn entered = nvml_enter_device(function, gpu);
    if (entered == NVML_SUCCESS)
        *count = 0;
    return entered;
}

NVML_EXPORT nvmlReturn nvmlDeviceGetGraphicsRunningProcesses_v3(nvmlDevice gpu, unsigned *count,
                                                                nvmlProcessInfo *list) {
    (void)list;
    return nobody(__func__, gpu, count);
}

NVML_EXPORT nvmlReturn nvmlDeviceGetMPSComputeRunningProcesses_v3(nvmlDevice gpu, unsigned *count,
                                                                  nvmlProcessInfo *list) {
    (void)list;
    return nobody(__func__, gpu, count);
}

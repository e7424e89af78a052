/* Devices: finding them, and what they say about themselves. */
#include "nvml.h"

#include <stdio.h>
#include <string.h>

NVML_EXPORT nvmlReturn nvmlDeviceGetCount_v2(unsigned *count) {
    NVML_ENTER();
    *count = host->gpu_count;
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice *gpu) {
    NVML_ENTER();
    if (index >= host->gpu_count)
        return NVML_ERROR_INVALID_ARGUMENT;
    *gpu = &host->devices[index];
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice *gpu) {
    NVML_ENTER();
    for (uint32_t i = 0; i < host->device_count; i++) {
        if (strcmp(uuid, host->devices[i].uuid))
            continue;
        *gpu = &host->devices[i];
        return NVML_SUCCESS;
    }
    return NVML_ERROR_NOT_FOUND;
}

NVML_EXPORT nvmlReturn nvmlDeviceGetHandleByPciBusId_v2(const char *text, nvmlDevice *gpu) {
    NVML_ENTER();
    unsigned domain, bus, slot;
    if (sscanf(text, "%x:%x:%x", &domain, &bus, &slot) != 3)
        return NVML_ERROR_INVALID_ARGUMENT;
    for (uint32_t i = 0; i < host->gpu_count; i++) {
        if (host->devices[i].pci_bus != bus)
            continue;
        *gpu = &host->devices[i];
        return NVML_SUCCESS;
    }
    return NVML_ERROR_NOT_FOUND;
}

NVML_EXPORT nvmlReturn nvmlDeviceGetName(nvmlDevice gpu, char *text, unsigned size) {
    NVML_ENTER_DEVICE(gpu);
    snprintf(text, size, "%s", gpu->name);
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn nvmlDeviceGetUUID(nvmlDevice gpu, char *text, unsigned size) {
    NVML_ENTER_DEVICE(gpu);
    snprintf(text, size, "%s", gpu->uuid);
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn nvmlDeviceGetPciInfo_v3(nvmlDevice gpu, nvmlPciInfo *pci) {
    NVML_ENTER_GPU(gpu);
    memset(pci, 0, sizeof *pci);
    pci->bus = gpu->pci_bus;
    pci->pciDeviceId = gpu->pci_device_id;
    snprintf(pci->busIdLegacy, sizeof pci->busIdLegacy, "0000:%02X:00.0", gpu->pci_bus);
    snprintf(pci->busId, sizeof pci->busId, "00000000:%02X:00.0", gpu->pci_bus);
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn nvmlDeviceGetCudaComputeCapability(nvmlDevice gpu, int *major, int *minor) {
    NVML_ENTER_DEVICE(gpu);
    *major = (int)gpu->compute_major;
    *minor = (int)gpu->compute_minor;
    return NVML_SUCCESS;
}

/* The plain questions, all of one form. */
#define DEVICE_QUESTION(function, answer)                              \
    NVML_EXPORT nvmlReturn function(nvmlDevice gpu, unsigned *value) { \
        NVML_ENTER_DEVICE(gpu);                                        \
        *value = (unsigned)(answer);                                   \
        return NVML_SUCCESS;                                           \
    }

DEVICE_QUESTION(nvmlDeviceGetIndex, nvml_index(gpu))
DEVICE_QUESTION(nvmlDeviceGetMinorNumber, nvml_index(gpu))
DEVICE_QUESTION(nvmlDeviceGetArchitecture, gpu->architecture)
DEVICE_QUESTION(nvmlDeviceGetPersistenceMode, 1)
DEVICE_QUESTION(nvmlDeviceGetComputeMode, 0)
DEVICE_QUESTION(nvmlDeviceGetPowerUsage, gpu->power_mw)
DEVICE_QUESTION(nvmlDeviceGetEnforcedPowerLimit, gpu->power_limit_mw)
DEVICE_QUESTION(nvmlDeviceGetPowerManagementLimit, gpu->power_limit_mw)
DEVICE_QUESTION(nvmlDeviceGetMaxPcieLinkGeneration, gpu->pcie_generation)
DEVICE_QUESTION(nvmlDeviceGetCurrPcieLinkGeneration, gpu->pcie_generation)
DEVICE_QUESTION(nvmlDeviceGetMaxPcieLinkWidth, gpu->pcie_width)
DEVICE_QUESTION(nvmlDeviceGetCurrPcieLinkWidth, gpu->pcie_width)

NVML_EXPORT nvmlReturn nvmlDeviceGetTemperature(nvmlDevice gpu, unsigned sensor, unsigned *value) {
    NVML_ENTER_GPU(gpu);
    if (sensor)
        return NVML_ERROR_INVALID_ARGUMENT;
    *value = gpu->temperature_c;
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn nvmlDeviceGetUtilizationRates(nvmlDevice gpu, nvmlUtilization *rates) {
    NVML_ENTER_GPU(gpu);
    *rates = (nvmlUtilization){gpu->utilization_gpu_percent, gpu->utilization_memory_percent};
    return NVML_SUCCESS;
}

/* Of the reasons for a slower clock only heat is modelled: the driver's own throttle, and the hardware's. */
NVML_EXPORT nvmlReturn nvmlDeviceGetCurrentClocksEventReasons(nvmlDevice gpu, unsigned long long *reasons) {
    NVML_ENTER_GPU(gpu);
    *reasons = gpu->is_hot ? SW_THERMAL_SLOWDOWN | HW_THERMAL_SLOWDOWN : 0;
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn nvmlDeviceGetCurrentClocksThrottleReasons(nvmlDevice gpu,
                                                                 unsigned long long *reasons) {
    return nvmlDeviceGetCurrentClocksEventReasons(gpu, reasons);
}

/* Errors that were corrected are none; what could not be corrected stays counted for good. */
NVML_EXPORT nvmlReturn nvmlDeviceGetTotalEccErrors(nvmlDevice gpu, unsigned type, unsigned counter,
                                                   unsigned long long *count) {
    NVML_ENTER_GPU(gpu);
    if (type > 1 || counter > 1)
        return NVML_ERROR_INVALID_ARGUMENT;
    *count = type == ECC_UNCORRECTED ? gpu->ecc_error_count : 0;
    return NVML_SUCCESS;
}

/* ---- memory ---- */

static nvmlMemoryV2 memory_now(const char *function, device *gpu) {
    nvmlMemoryV2 memory = {.total = gpu->total_bytes, .reserved = gpu->reserved_bytes};
    fault_record struck;
    if (fault_strikes(function, FAULT_EMPTY, &struck))
        return (nvmlMemoryV2){0};
    host_lock();
    host_reap();
    for (int d = 0; d < (int)host->device_count; d++) /* a GPU that is cut: what its instances use */
        if (d == nvml_index(gpu) || mig_parent(d) == nvml_index(gpu))
            memory.used += host->devices[d].used_bytes;
    host_unlock();
    if (fault_strikes(function, FAULT_STALE, &struck))
        memory.used = struck.used_bytes[nvml_index(gpu)];
    if (fault_strikes(function, FAULT_LIE, &struck))
        memory.used /= 2;
    memory.free = memory.total - memory.reserved - memory.used;
    return memory;
}

/* The first version counts the reserved part as used. */
NVML_EXPORT nvmlReturn nvmlDeviceGetMemoryInfo(nvmlDevice gpu, nvmlMemory *memory) {
    NVML_ENTER_DEVICE(gpu);
    nvmlMemoryV2 now = memory_now(__func__, gpu);
    *memory = (nvmlMemory){.total = now.total, .free = now.free, .used = now.used + now.reserved};
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn nvmlDeviceGetMemoryInfo_v2(nvmlDevice gpu, nvmlMemoryV2 *memory) {
    NVML_ENTER_DEVICE(gpu);
    unsigned version = memory->version;
    if (version != (sizeof *memory | 2u << 24))
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    *memory = memory_now(__func__, gpu);
    memory->version = version;
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn nvmlDeviceGetBAR1MemoryInfo(nvmlDevice gpu, nvmlMemory *memory) {
    NVML_ENTER_DEVICE(gpu);
    *memory = (nvmlMemory){.total = gpu->total_bytes, .free = gpu->total_bytes};
    return NVML_SUCCESS;
}

/* The names without a version, for clients that look them up. */
NVML_EXPORT nvmlReturn nvmlDeviceGetCount(unsigned *count) { return nvmlDeviceGetCount_v2(count); }
NVML_EXPORT nvmlReturn nvmlDeviceGetHandleByIndex(unsigned index, nvmlDevice *gpu) {
    return nvmlDeviceGetHandleByIndex_v2(index, gpu);
}
NVML_EXPORT nvmlReturn nvmlDeviceGetHandleByPciBusId(const char *text, nvmlDevice *gpu) {
    return nvmlDeviceGetHandleByPciBusId_v2(text, gpu);
}
NVML_EXPORT nvmlReturn nvmlDeviceGetPciInfo(nvmlDevice gpu, nvmlPciInfo *pci) {
    return nvmlDeviceGetPciInfo_v3(gpu, pci);
}

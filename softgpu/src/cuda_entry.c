/* cuGetProcAddress: which function answers which name at which version.
 *
 * A client asks with the version of the interface that it was compiled for, so one name can mean different
 * signatures: each row says from which version on its function has the right one. A name without a row
 * resolves to a function that returns CUDA_ERROR_NOT_SUPPORTED: clients such as cuda-python ask for
 * everything at start and call little. */
#include "cuda_abi.h"
#include "cuda_driver.h"

#include <string.h>

/* name, first version, function */
#define ENTRIES(ROW)                                                                           \
    ROW(cuCheckpointOperationComplete, 13041, cuCheckpointOperationComplete)                   \
    ROW(cuCheckpointProcessCheckpoint, 12080, cuCheckpointProcessCheckpoint)                   \
    ROW(cuCheckpointProcessGetRestoreThreadId, 12080, cuCheckpointProcessGetRestoreThreadId)   \
    ROW(cuCheckpointProcessGetState, 12080, cuCheckpointProcessGetState)                       \
    ROW(cuCheckpointProcessLock, 12080, cuCheckpointProcessLock)                               \
    ROW(cuCheckpointProcessRestore, 12080, cuCheckpointProcessRestore)                         \
    ROW(cuCheckpointProcessUnlock, 12080, cuCheckpointProcessUnlock)                           \
    ROW(cuCtxCreate, 12050, cuCtxCreate_v4)                                                    \
    ROW(cuCtxCreate, 11040, cuCtxCreate_v3)                                                    \
    ROW(cuCtxCreate, 3020, cuCtxCreate_v2)                                                     \
    ROW(cuCtxDestroy, 4000, cuCtxDestroy_v2)                                                   \
    ROW(cuCtxGetApiVersion, 3020, cuCtxGetApiVersion)                                          \
    ROW(cuCtxGetCurrent, 4000, cuCtxGetCurrent)                                                \
    ROW(cuCtxGetDevice, 13000, cuCtxGetDevice_v2)                                              \
    ROW(cuCtxGetDevice, 2000, cuCtxGetDevice)                                                  \
    ROW(cuCtxGetFlags, 7000, cuCtxGetFlags)                                                    \
    ROW(cuCtxGetId, 12000, cuCtxGetId)                                                         \
    ROW(cuCtxGetStreamPriorityRange, 5050, cuCtxGetStreamPriorityRange)                        \
    ROW(cuCtxPopCurrent, 4000, cuCtxPopCurrent_v2)                                             \
    ROW(cuCtxPushCurrent, 4000, cuCtxPushCurrent_v2)                                           \
    ROW(cuCtxSetCurrent, 4000, cuCtxSetCurrent)                                                \
    ROW(cuCtxSynchronize, 13000, cuCtxSynchronize_v2)                                          \
    ROW(cuCtxSynchronize, 2000, cuCtxSynchronize)                                              \
    ROW(cuDeviceCanAccessPeer, 4000, cuDeviceCanAccessPeer)                                    \
    ROW(cuDeviceComputeCapability, 2000, cuDeviceComputeCapability)                            \
    ROW(cuDeviceGet, 2000, cuDeviceGet)                                                        \
    ROW(cuDeviceGetAttribute, 2000, cuDeviceGetAttribute)                                      \
    ROW(cuDeviceGetByPCIBusId, 4010, cuDeviceGetByPCIBusId)                                    \
    ROW(cuDeviceGetCount, 2000, cuDeviceGetCount)                                              \
    ROW(cuDeviceGetDefaultMemPool, 11020, cuDeviceGetDefaultMemPool)                           \
    ROW(cuDeviceGetMemPool, 11020, cuDeviceGetMemPool)                                         \
    ROW(cuDeviceGetName, 2000, cuDeviceGetName)                                                \
    ROW(cuDeviceGetPCIBusId, 4010, cuDeviceGetPCIBusId)                                        \
    ROW(cuDeviceGetUuid, 9020, cuDeviceGetUuid_v2)                                             \
    ROW(cuDevicePrimaryCtxGetState, 7000, cuDevicePrimaryCtxGetState)                          \
    ROW(cuDevicePrimaryCtxRelease, 7000, cuDevicePrimaryCtxRelease_v2)                         \
    ROW(cuDevicePrimaryCtxReset, 7000, cuDevicePrimaryCtxReset_v2)                             \
    ROW(cuDevicePrimaryCtxRetain, 7000, cuDevicePrimaryCtxRetain)                              \
    ROW(cuDevicePrimaryCtxSetFlags, 7000, cuDevicePrimaryCtxSetFlags_v2)                       \
    ROW(cuDeviceSetMemPool, 11020, cuDeviceSetMemPool)                                         \
    ROW(cuDeviceTotalMem, 3020, cuDeviceTotalMem_v2)                                           \
    ROW(cuDriverGetVersion, 2020, cuDriverGetVersion)                                          \
    ROW(cuEventCreate, 2000, cuEventCreate)                                                    \
    ROW(cuEventDestroy, 4000, cuEventDestroy_v2)                                               \
    ROW(cuEventElapsedTime, 2000, cuEventElapsedTime_v2)                                       \
    ROW(cuEventQuery, 2000, cuEventQuery)                                                      \
    ROW(cuEventRecord, 2000, cuEventRecord)                                                    \
    ROW(cuEventRecordWithFlags, 11010, cuEventRecordWithFlags)                                 \
    ROW(cuEventSynchronize, 2000, cuEventSynchronize)                                          \
    ROW(cuGetErrorName, 6000, cuGetErrorName)                                                  \
    ROW(cuGetErrorString, 6000, cuGetErrorString)                                              \
    ROW(cuGetExportTable, 3000, cuGetExportTable)                                              \
    ROW(cuGetProcAddress, 12000, cuGetProcAddress_v2)                                          \
    ROW(cuGetProcAddress, 11030, cuGetProcAddress)                                             \
    ROW(cuInit, 2000, cuInit)                                                                  \
    ROW(cuIpcCloseMemHandle, 4010, cuIpcCloseMemHandle)                                        \
    ROW(cuIpcGetEventHandle, 4010, cuIpcGetEventHandle)                                        \
    ROW(cuIpcOpenEventHandle, 4010, cuIpcOpenEventHandle)                                      \
    ROW(cuIpcGetMemHandle, 4010, cuIpcGetMemHandle)                                            \
    ROW(cuIpcOpenMemHandle, 4010, cuIpcOpenMemHandle_v2)                                       \
    ROW(cuLaunchHostFunc, 13020, cuLaunchHostFunc_v2)                                          \
    ROW(cuLaunchHostFunc, 10000, cuLaunchHostFunc)                                             \
    ROW(cuMemAddressFree, 10020, cuMemAddressFree)                                             \
    ROW(cuMemAddressReserve, 10020, cuMemAddressReserve)                                       \
    ROW(cuMemAlloc, 3020, cuMemAlloc_v2)                                                       \
    ROW(cuMemAllocAsync, 11020, cuMemAllocAsync)                                               \
    ROW(cuMemAllocFromPoolAsync, 11020, cuMemAllocFromPoolAsync)                               \
    ROW(cuMemAllocHost, 3020, cuMemAllocHost_v2)                                               \
    ROW(cuMemAllocPitch, 3020, cuMemAllocPitch_v2)                                             \
    ROW(cuMemCreate, 10020, cuMemCreate)                                                       \
    ROW(cuMemExportToShareableHandle, 10020, cuMemExportToShareableHandle)                     \
    ROW(cuMemFree, 3020, cuMemFree_v2)                                                         \
    ROW(cuMemFreeAsync, 11020, cuMemFreeAsync)                                                 \
    ROW(cuMemFreeHost, 2000, cuMemFreeHost)                                                    \
    ROW(cuMemGetAccess, 10020, cuMemGetAccess)                                                 \
    ROW(cuMemGetAddressRange, 3020, cuMemGetAddressRange_v2)                                   \
    ROW(cuMemGetAllocationGranularity, 10020, cuMemGetAllocationGranularity)                   \
    ROW(cuMemGetAllocationPropertiesFromHandle, 10020, cuMemGetAllocationPropertiesFromHandle) \
    ROW(cuMemGetInfo, 3020, cuMemGetInfo_v2)                                                   \
    ROW(cuMemHostAlloc, 2020, cuMemHostAlloc)                                                  \
    ROW(cuMemHostGetDevicePointer, 3020, cuMemHostGetDevicePointer_v2)                         \
    ROW(cuMemHostGetFlags, 2030, cuMemHostGetFlags)                                            \
    ROW(cuMemHostRegister, 4000, cuMemHostRegister_v2)                                         \
    ROW(cuMemHostUnregister, 4000, cuMemHostUnregister)                                        \
    ROW(cuMemImportFromShareableHandle, 10020, cuMemImportFromShareableHandle)                 \
    ROW(cuMemMap, 10020, cuMemMap)                                                             \
    ROW(cuMemPoolCreate, 11020, cuMemPoolCreate)                                               \
    ROW(cuMemPoolDestroy, 11020, cuMemPoolDestroy)                                             \
    ROW(cuMemPoolGetAccess, 11020, cuMemPoolGetAccess)                                         \
    ROW(cuMemPoolGetAttribute, 11020, cuMemPoolGetAttribute)                                   \
    ROW(cuMemPoolSetAccess, 11020, cuMemPoolSetAccess)                                         \
    ROW(cuMemPoolSetAttribute, 11020, cuMemPoolSetAttribute)                                   \
    ROW(cuMemPoolTrimTo, 11020, cuMemPoolTrimTo)                                               \
    ROW(cuMemRelease, 10020, cuMemRelease)                                                     \
    ROW(cuMemRetainAllocationHandle, 11000, cuMemRetainAllocationHandle)                       \
    ROW(cuMemSetAccess, 10020, cuMemSetAccess)                                                 \
    ROW(cuMemUnmap, 10020, cuMemUnmap)                                                         \
    ROW(cuMemcpy, 4000, cuMemcpy)                                                              \
    ROW(cuMemcpyAsync, 4000, cuMemcpyAsync)                                                    \
    ROW(cuMemcpyDtoD, 3020, cuMemcpyDtoD_v2)                                                   \
    ROW(cuMemcpyDtoDAsync, 3020, cuMemcpyDtoDAsync_v2)                                         \
    ROW(cuMemcpyDtoH, 3020, cuMemcpyDtoH_v2)                                                   \
    ROW(cuMemcpyDtoHAsync, 3020, cuMemcpyDtoHAsync_v2)                                         \
    ROW(cuMemcpyHtoD, 3020, cuMemcpyHtoD_v2)                                                   \
    ROW(cuMemcpyHtoDAsync, 3020, cuMemcpyHtoDAsync_v2)                                         \
    ROW(cuMemsetD16, 3020, cuMemsetD16_v2)                                                     \
    ROW(cuMemsetD16Async, 3020, cuMemsetD16Async)                                              \
    ROW(cuMemsetD32, 3020, cuMemsetD32_v2)                                                     \
    ROW(cuMemsetD32Async, 3020, cuMemsetD32Async)                                              \
    ROW(cuMemsetD8, 3020, cuMemsetD8_v2)                                                       \
    ROW(cuMemsetD8Async, 3020, cuMemsetD8Async)                                                \
    ROW(cuPointerGetAttribute, 4000, cuPointerGetAttribute)                                    \
    ROW(cuPointerGetAttributes, 7000, cuPointerGetAttributes)                                  \
    ROW(cuStreamCreate, 2000, cuStreamCreate)                                                  \
    ROW(cuStreamCreateWithPriority, 5050, cuStreamCreateWithPriority)                          \
    ROW(cuStreamDestroy, 4000, cuStreamDestroy_v2)                                             \
    ROW(cuStreamGetCtx, 12050, cuStreamGetCtx_v2)                                              \
    ROW(cuStreamGetCtx, 9020, cuStreamGetCtx)                                                  \
    ROW(cuStreamGetDevice, 12080, cuStreamGetDevice)                                           \
    ROW(cuStreamGetFlags, 5050, cuStreamGetFlags)                                              \
    ROW(cuStreamGetId, 12000, cuStreamGetId)                                                   \
    ROW(cuStreamGetPriority, 5050, cuStreamGetPriority)                                        \
    ROW(cuStreamIsCapturing, 10000, cuStreamIsCapturing)                                       \
    ROW(cuStreamQuery, 2000, cuStreamQuery)                                                    \
    ROW(cuStreamSynchronize, 2000, cuStreamSynchronize)                                        \
    ROW(cuStreamWaitEvent, 3020, cuStreamWaitEvent)

/* The table needs addresses only; the signatures are those of the client. */
#define ENTRY_SYMBOL(name, version, function) extern void function##_symbol(void) __asm__(#function);
ENTRIES(ENTRY_SYMBOL)

typedef void (*entry_point)(void);
#define ENTRY_ROW(name, version, function) {#name, version, function##_symbol},
static const struct {
    const char *name;
    int version;
    entry_point function;
} entries[] = {ENTRIES(ENTRY_ROW)};

CUresult not_supported(void) { return CUDA_ERROR_NOT_SUPPORTED; }

/* Rows of one name stand newest first. */
static entry_point find(const char *name, int version, int *is_known) {
    *is_known = 0;
    for (size_t i = 0; i < sizeof entries / sizeof *entries; i++) {
        if (strcmp(entries[i].name, name))
            continue;
        *is_known = 1;
        if (version >= entries[i].version)
            return entries[i].function;
    }
    return NULL;
}

CUDA_EXPORT CUresult cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags,
                                         int *status) {
    int is_known;
    (void)flags; /* the per-thread default stream is the legacy one here */
    if (!name || !*name || !function)
        return CUDA_ERROR_INVALID_VALUE;
    entry_point found = find(name, version, &is_known);
    if (!is_known)
        found = (entry_point)not_supported;
    *function = (void *)found;
    if (status)
        *status = found ? CU_ENTRY_FOUND : CU_ENTRY_TOO_OLD;
    return found ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

CUDA_EXPORT CUresult cuGetProcAddress(const char *name, void **function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}

/* The CUDA runtime wants undocumented tables from here; without them it says so and stops. */
CUDA_EXPORT CUresult cuGetExportTable(const void **table, const CUuuid *id) {
    (void)id;
    *table = NULL;
    return CUDA_ERROR_NOT_FOUND;
}

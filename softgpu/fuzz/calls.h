/* The exported functions that the fuzzer calls, by their exported names, as a client sees them. */
#ifndef SOFTGPU_FUZZ_CALLS_H
#define SOFTGPU_FUZZ_CALLS_H

#include "../src/cuda_abi.h"
#include "../src/nvml.h"

CUresult cuInit(unsigned flags);
CUresult cuDriverGetVersion(int *version);
CUresult cuDeviceGetCount(int *count);
CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice index);
CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice index);
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice index);
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice index);
CUresult cuDevicePrimaryCtxReset_v2(CUdevice index);
CUresult cuDevicePrimaryCtxGetState(CUdevice index, unsigned *flags, int *is_active);
CUresult cuCtxCreate_v4(CUcontext *context, void *parameters, unsigned flags, CUdevice index);
CUresult cuCtxDestroy_v2(CUcontext context);
CUresult cuCtxSetCurrent(CUcontext context);
CUresult cuCtxGetCurrent(CUcontext *context);
CUresult cuCtxGetDevice(CUdevice *index);
CUresult cuCtxPushCurrent_v2(CUcontext context);
CUresult cuCtxPopCurrent_v2(CUcontext *context);
CUresult cuCtxSynchronize(void);
CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *total_bytes);
CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t bytes);
CUresult cuMemAllocPitch_v2(CUdeviceptr *address, size_t *pitch, size_t width, size_t rows, unsigned size);
CUresult cuMemFree_v2(CUdeviceptr address);
CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *bytes, CUdeviceptr address);
CUresult cuMemHostAlloc(void **address, size_t bytes, unsigned flags);
CUresult cuMemFreeHost(void *address);
CUresult cuMemHostRegister_v2(void *address, size_t bytes, unsigned flags);
CUresult cuMemHostUnregister(void *address);
CUresult cuMemcpyHtoD_v2(CUdeviceptr target, const void *source, size_t bytes);
CUresult cuMemcpyDtoH_v2(void *target, CUdeviceptr source, size_t bytes);
CUresult cuMemcpyDtoD_v2(CUdeviceptr target, CUdeviceptr source, size_t bytes);
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr target, const void *source, size_t bytes, CUstream stream);
CUresult cuMemcpyDtoHAsync_v2(void *target, CUdeviceptr source, size_t bytes, CUstream stream);
CUresult cuMemsetD8_v2(CUdeviceptr target, unsigned char value, size_t count);
CUresult cuMemsetD32_v2(CUdeviceptr target, unsigned value, size_t count);
CUresult cuMemsetD8Async(CUdeviceptr target, unsigned char value, size_t count, CUstream stream);
CUresult cuMemAddressReserve(CUdeviceptr *address, size_t bytes, size_t alignment, CUdeviceptr hint,
                             unsigned long long flags);
CUresult cuMemAddressFree(CUdeviceptr address, size_t bytes);
CUresult cuMemCreate(CUmemGenericAllocationHandle *value, size_t bytes, const CUmemAllocationProp *properties,
                     unsigned long long flags);
CUresult cuMemRelease(CUmemGenericAllocationHandle value);
CUresult cuMemMap(CUdeviceptr address, size_t bytes, size_t offset, CUmemGenericAllocationHandle value,
                  unsigned long long flags);
CUresult cuMemUnmap(CUdeviceptr address, size_t bytes);
CUresult cuMemSetAccess(CUdeviceptr address, size_t bytes, const CUmemAccessDesc *rights, size_t count);
CUresult cuMemGetAccess(unsigned long long *flags, const CUmemLocation *location, CUdeviceptr address);
CUresult cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp *properties,
                                                CUmemGenericAllocationHandle value);
CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle *value, void *address);
CUresult cuMemExportToShareableHandle(void *shareable, CUmemGenericAllocationHandle value, int type,
                                      unsigned long long flags);
CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle *value, void *shareable, int type);
CUresult cuIpcGetMemHandle(CUipcMemHandle *exported, CUdeviceptr address);
CUresult cuIpcOpenMemHandle_v2(CUdeviceptr *address, CUipcMemHandle exported, unsigned flags);
CUresult cuIpcGetEventHandle(CUipcEventHandle *exported, CUevent event);
CUresult cuIpcCloseMemHandle(CUdeviceptr address);
CUresult cuDeviceGetDefaultMemPool(CUmemoryPool *pool, CUdevice index);
CUresult cuMemPoolCreate(CUmemoryPool *pool, const CUmemPoolProps *properties);
CUresult cuMemPoolDestroy(CUmemoryPool pool);
CUresult cuMemAllocAsync(CUdeviceptr *address, size_t bytes, CUstream stream);
CUresult cuMemAllocFromPoolAsync(CUdeviceptr *address, size_t bytes, CUmemoryPool pool, CUstream stream);
CUresult cuMemFreeAsync(CUdeviceptr address, CUstream stream);
CUresult cuStreamCreate(CUstream *stream, unsigned flags);
CUresult cuStreamDestroy_v2(CUstream stream);
CUresult cuStreamSynchronize(CUstream stream);
CUresult cuStreamQuery(CUstream stream);
CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags);
CUresult cuLaunchHostFunc(CUstream stream, CUhostFn function, void *argument);
CUresult cuEventCreate(CUevent *event, unsigned flags);
CUresult cuEventDestroy_v2(CUevent event);
CUresult cuEventRecord(CUevent event, CUstream stream);
CUresult cuEventQuery(CUevent event);
CUresult cuEventSynchronize(CUevent event);
CUresult cuPointerGetAttribute(void *value, int attribute, CUdeviceptr address);

CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice index);
CUresult cuCheckpointProcessGetState(int pid, int *state);
CUresult cuCheckpointProcessLock(int pid, const CUcheckpointLockArgs *arguments);
CUresult cuCheckpointProcessUnlock(int pid, const void *arguments);
CUresult cuCheckpointProcessCheckpoint(int pid, const CUcheckpointCheckpointArgs *arguments);
CUresult cuCheckpointProcessRestore(int pid, const CUcheckpointRestoreArgs *arguments);
CUresult cuCheckpointOperationComplete(CUcheckpointOperationHandle handle);

typedef struct event_set event_set;
nvmlReturn nvmlInit_v2(void);
nvmlReturn nvmlShutdown(void);
nvmlReturn nvmlDeviceGetCount_v2(unsigned *count);
nvmlReturn nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice *gpu);
nvmlReturn nvmlDeviceGetMemoryInfo_v2(nvmlDevice gpu, nvmlMemoryV2 *memory);
nvmlReturn nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice gpu, unsigned *count, nvmlProcessInfo *list);
nvmlReturn nvmlDeviceGetUtilizationRates(nvmlDevice gpu, nvmlUtilization *rates);
nvmlReturn nvmlDeviceGetTemperature(nvmlDevice gpu, unsigned sensor, unsigned *value);
nvmlReturn nvmlDeviceSetMemoryLimits_v1(nvmlDevice gpu, const nvmlSetMemoryLimits *limits);
nvmlReturn nvmlDeviceGetMemoryLimits_v1(nvmlDevice gpu, nvmlGetMemoryLimits *limits);
nvmlReturn nvmlEventSetCreate(event_set **set);
nvmlReturn nvmlEventSetFree(event_set *set);
nvmlReturn nvmlDeviceRegisterEvents(nvmlDevice gpu, unsigned long long types, event_set *set);
nvmlReturn nvmlEventSetWait_v2(event_set *set, nvmlEventData *data, unsigned timeout_ms);

#endif

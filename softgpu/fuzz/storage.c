/* Copying another process's memory to custom storage and back. */
#include "storage.h"

#include <string.h>

static int copy_blocks(const CUcheckpointCustomStorageInfo *info, unsigned char *storage, int is_restore) {
    for (unsigned b = 0; b < info->deviceCount; b++) {
        const CUcheckpointCustomStoragePerDeviceData *block = &info->perDeviceData[b];
        CUresult result = is_restore ? cuMemcpyHtoD_v2(block->devPtr, storage, block->size)
                                     : cuMemcpyDtoH_v2(storage, block->devPtr, block->size);
        if (result != CUDA_SUCCESS)
            return -1;
        storage += block->size;
    }
    return 0;
}

CUresult checkpoint_to(int pid, unsigned char *storage, uint64_t room) {
    CUcheckpointCustomStorageInfo *info = NULL;
    CUcheckpointCheckpointArgs arguments = {.customStorageInfo_out = &info};
    uint64_t bytes = 0;
    CUresult result = cuCheckpointProcessCheckpoint(pid, &arguments);
    if (result != CUDA_SUCCESS)
        return result;
    for (unsigned b = 0; b < info->deviceCount; b++)
        bytes += info->perDeviceData[b].size;
    if (bytes > room || copy_blocks(info, storage, 0))
        return CUDA_ERROR_OPERATING_SYSTEM;
    return cuCheckpointOperationComplete(info->handle);
}

CUresult restore_from(int pid, unsigned char *storage, CUcheckpointGpuPair *pairs, unsigned count) {
    CUcheckpointCustomStorageInfo *info = NULL;
    CUcheckpointRestoreArgs arguments = {.gpuPairs = pairs, .gpuPairsCount = count, .customStorageInfo_out = &info};
    CUresult result = cuCheckpointProcessRestore(pid, &arguments);
    if (result != CUDA_SUCCESS)
        return result;
    if (copy_blocks(info, storage, 1))
        return CUDA_ERROR_OPERATING_SYSTEM;
    return cuCheckpointOperationComplete(info->handle);
}

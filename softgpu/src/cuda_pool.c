/* Stream-ordered allocation, present so that clients which use it work: every block is a chunk of its own,
 * freed when its stream gets there; nothing is pooled. */
#include "cuda_driver.h"

#include <stdlib.h>

struct CUmemPoolHandle_st {
    int device;
    int is_default;
    uint64_t release_threshold;
};

enum { REUSE_FIRST = 1, REUSE_LAST = 3, RELEASE_THRESHOLD = 4 }; /* CUmemPool_attribute */

static struct CUmemPoolHandle_st default_pools[DEVICE_MAX];
static CUmemoryPool chosen_pools[DEVICE_MAX];

CUDA_EXPORT CUresult cuDeviceGetDefaultMemPool(CUmemoryPool *pool, CUdevice index) {
    ENTER();
    if (!is_device(index))
        return CUDA_ERROR_INVALID_DEVICE;
    default_pools[index].device = index;
    default_pools[index].is_default = 1;
    *pool = &default_pools[index];
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuDeviceGetMemPool(CUmemoryPool *pool, CUdevice index) {
    CUresult result = cuDeviceGetDefaultMemPool(pool, index);
    if (result == CUDA_SUCCESS && chosen_pools[index])
        *pool = chosen_pools[index];
    return result;
}

CUDA_EXPORT CUresult cuDeviceSetMemPool(CUdevice index, CUmemoryPool pool) {
    ENTER();
    if (!is_device(index))
        return CUDA_ERROR_INVALID_DEVICE;
    chosen_pools[index] = pool;
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuMemPoolCreate(CUmemoryPool *pool, const CUmemPoolProps *properties) {
    ENTER();
    if (!pool || !properties || properties->location.type != CU_MEM_LOCATION_DEVICE)
        return CUDA_ERROR_NOT_SUPPORTED;
    CUmemoryPool created = calloc(1, sizeof *created);
    if (!created)
        return CUDA_ERROR_OUT_OF_MEMORY;
    created->device = properties->location.id;
    *pool = created;
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuMemPoolDestroy(CUmemoryPool pool) {
    ENTER();
    if (!pool)
        return CUDA_ERROR_INVALID_VALUE;
    if (!pool->is_default)
        free(pool);
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuMemPoolTrimTo(CUmemoryPool pool, size_t bytes) {
    ENTER();
    (void)pool, (void)bytes;
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuMemPoolSetAccess(CUmemoryPool pool, const CUmemAccessDesc *rights, size_t count) {
    ENTER();
    (void)pool, (void)rights, (void)count;
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuMemPoolGetAccess(int *flags, CUmemoryPool pool, const CUmemLocation *location) {
    ENTER();
    *flags = pool->device == location->id ? CU_MEM_ACCESS_READWRITE : CU_MEM_ACCESS_NONE;
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuMemPoolSetAttribute(CUmemoryPool pool, int attribute, const void *value) {
    ENTER();
    if (attribute == RELEASE_THRESHOLD)
        pool->release_threshold = *(const uint64_t *)value;
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuMemPoolGetAttribute(CUmemoryPool pool, int attribute, void *value) {
    ENTER();
    if (attribute >= REUSE_FIRST && attribute <= REUSE_LAST)
        *(int *)value = 1;
    else
        *(uint64_t *)value = attribute == RELEASE_THRESHOLD ? pool->release_threshold : 0;
    return CUDA_SUCCESS;
}

CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t bytes);
CUresult cuMemFree_v2(CUdeviceptr address);

CUDA_EXPORT CUresult cuMemAllocAsync(CUdeviceptr *address, size_t bytes, CUstream stream) {
    ENTER_WITH_CONTEXT();
    (void)stream;
    return cuMemAlloc_v2(address, bytes);
}

CUDA_EXPORT CUresult cuMemAllocFromPoolAsync(CUdeviceptr *address, size_t bytes, CUmemoryPool pool,
                                             CUstream stream) {
    (void)pool;
    return cuMemAllocAsync(address, bytes, stream);
}

CUDA_EXPORT CUresult cuMemFreeAsync(CUdeviceptr address, CUstream stream) {
    ENTER_WITH_CONTEXT();
    CUresult result = stream_finish(stream);
    return result == CUDA_SUCCESS ? cuMemFree_v2(address) : result;
}

/* Plain memory: device allocations, pinned host memory, copies and fills. */
#define _GNU_SOURCE
#include "cuda_driver.h"

#include <sys/mman.h>

/* Below this, allocations are packed in steps of 512 bytes; above, in whole pages. */
#define SMALL_BYTES (1ull << 20)
#define SMALL_STEP 512ull

/* The leaf group's hard limit is the device's size as its processes see it; a parent's limit is enforced
 * unseen. */
static void narrow_to_group(int index, uint64_t *free_bytes, uint64_t *total_bytes) {
    process_record *process = driver_process();
    group_refresh(process);
    const group_record *group = process->group_keys[0] ? group_find(process->group_keys[0]) : NULL;
    if (!group || group->hard_bytes[index] >= *total_bytes)
        return;
    uint64_t hard_bytes = group->hard_bytes[index], used_bytes = group_used(group->key, index);
    uint64_t left_bytes = used_bytes < hard_bytes ? hard_bytes - used_bytes : 0;
    *total_bytes = hard_bytes;
    if (left_bytes < *free_bytes)
        *free_bytes = left_bytes;
}

CUDA_EXPORT CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *total_bytes) {
    ENTER_WITH_CONTEXT();
    if (!free_bytes || !total_bytes)
        return CUDA_ERROR_INVALID_VALUE;
    int index = driver_device(context_current()->device);
    host_lock();
    host_reap();
    uint64_t total = host->devices[index].total_bytes - host->devices[index].reserved_bytes;
    uint64_t left = total - host->devices[index].used_bytes;
    narrow_to_group(index, &left, &total);
    host_unlock();
    if (mps_left(context_current()->device) < left)
        left = mps_left(context_current()->device);
    *free_bytes = left;
    *total_bytes = total;
    return CUDA_SUCCESS;
}

/* With the driver lock held. */
static CUresult allocate(CUcontext context, uint64_t bytes, CUdeviceptr *address) {
    int handle;
    uint64_t held_bytes = round_up(bytes, bytes < SMALL_BYTES ? SMALL_STEP : GRANULARITY);
    CUresult result = handle_create(context->device, held_bytes, NULL, &handle);
    if (result != CUDA_SUCCESS)
        return result;
    uint64_t mapped_bytes = round_up(held_bytes, GRANULARITY);
    void *base = reserve_addresses(mapped_bytes, GRANULARITY);
    region added = {.base = (uint64_t)base,
                    .bytes = bytes,
                    .mapped_bytes = mapped_bytes,
                    .kind = REGION_ALLOCATED,
                    .handle = handle,
                    .access = CU_MEM_ACCESS_READWRITE,
                    .context = context};
    if (!base || region_insert(&regions, added)) {
        handle_release(handle);
        return CUDA_ERROR_OPERATING_SYSTEM;
    }
    handle_record_of(handle)->mappings = 1;
    handle_record_of(handle)->references = 0; /* it lives by its mapping alone */
    *address = (CUdeviceptr)base;
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t bytes) {
    ENTER_WITH_CONTEXT();
    if (!address || !bytes)
        return CUDA_ERROR_INVALID_VALUE;
    if (bytes > BYTES_MAX)
        return CUDA_ERROR_OUT_OF_MEMORY;
    uint64_t started_ns = clock_ns();
    driver_lock();
    CUresult result = allocate(context_current(), bytes, address);
    driver_unlock();
    if (result == CUDA_SUCCESS)
        pay(CALL_MEM_ALLOC, started_ns, bytes);
    return result;
}

CUresult allocation_free(region *allocated) {
    int handle = allocated->handle;
    munmap((void *)allocated->base, allocated->mapped_bytes);
    region_remove(&regions, allocated);
    handle_unmap(handle);
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuMemFree_v2(CUdeviceptr address) {
    ENTER();
    if (!address)
        return CUDA_SUCCESS;
    streams_finish(0);
    uint64_t started_ns = clock_ns(), bytes = 0;
    driver_lock();
    region *allocated = region_of_base(&regions, address, REGION_ALLOCATED);
    if (allocated) {
        bytes = allocated->bytes;
        allocation_free(allocated);
    }
    driver_unlock();
    if (!bytes)
        return CUDA_ERROR_INVALID_VALUE;
    pay(CALL_MEM_FREE, started_ns, bytes);
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuMemAllocPitch_v2(CUdeviceptr *address, size_t *pitch, size_t width, size_t rows,
                                        unsigned size) {
    (void)size;
    if (!pitch || !width || !rows)
        return CUDA_ERROR_INVALID_VALUE;
    if (width > BYTES_MAX || rows > BYTES_MAX / round_up(width, SMALL_STEP))
        return CUDA_ERROR_OUT_OF_MEMORY;
    *pitch = round_up(width, SMALL_STEP);
    return cuMemAlloc_v2(address, *pitch * rows);
}

CUDA_EXPORT CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *bytes, CUdeviceptr address) {
    ENTER();
    driver_lock();
    const region *found = region_at(&regions, address);
    if (found && base)
        *base = found->base;
    if (found && bytes)
        *bytes = found->bytes;
    driver_unlock();
    return found ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

/* ---- pinned host memory ---- */

/* Backed lazily and without reservation: in phantom mode an arena larger than this machine costs nothing
 * until it is touched. Small pages there, or each small header written into it would take 2 MiB. */
CUDA_EXPORT CUresult cuMemHostAlloc(void **address, size_t bytes, unsigned flags) {
    ENTER_WITH_CONTEXT();
    if (!address || !bytes)
        return CUDA_ERROR_INVALID_VALUE;
    if (bytes > BYTES_MAX)
        return CUDA_ERROR_OUT_OF_MEMORY;
    uint64_t started_ns = clock_ns(), mapped_bytes = round_up(bytes, 4096);
    void *base =
        mmap(NULL, mapped_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED)
        return CUDA_ERROR_OUT_OF_MEMORY;
    if (host->is_phantom)
        madvise(base, mapped_bytes, MADV_NOHUGEPAGE);
    driver_lock();
    int failed = region_insert(&regions, (region){.base = (uint64_t)base,
                                                  .bytes = bytes,
                                                  .mapped_bytes = mapped_bytes,
                                                  .kind = REGION_HOST,
                                                  .flags = flags,
                                                  .context = context_current()});
    driver_unlock();
    if (failed) {
        munmap(base, mapped_bytes);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    *address = base;
    pay(CALL_HOST_ALLOC, started_ns, bytes);
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuMemAllocHost_v2(void **address, size_t bytes) {
    return cuMemHostAlloc(address, bytes, 0);
}

CUDA_EXPORT CUresult cuMemFreeHost(void *address) {
    ENTER();
    streams_finish(1);
    driver_lock();
    region *found = region_of_base(&regions, (uint64_t)address, REGION_HOST);
    CUresult result = found ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
    if (found) {
        munmap(address, found->mapped_bytes);
        region_remove(&regions, found);
    }
    driver_unlock();
    return result;
}

CUDA_EXPORT CUresult cuMemHostRegister_v2(void *address, size_t bytes, unsigned flags) {
    ENTER_WITH_CONTEXT();
    if (!address || !bytes)
        return CUDA_ERROR_INVALID_VALUE;
    uint64_t started_ns = clock_ns();
    CUresult result = CUDA_SUCCESS;
    driver_lock();
    if (region_overlaps(&regions, (uint64_t)address, bytes))
        result = CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
    else if (region_insert(&regions, (region){.base = (uint64_t)address,
                                              .bytes = bytes,
                                              .kind = REGION_REGISTERED,
                                              .flags = flags,
                                              .context = context_current()}))
        result = CUDA_ERROR_OUT_OF_MEMORY;
    driver_unlock();
    if (result == CUDA_SUCCESS)
        pay(CALL_HOST_REGISTER, started_ns, bytes);
    return result;
}

CUDA_EXPORT CUresult cuMemHostUnregister(void *address) {
    ENTER();
    streams_finish(1);
    driver_lock();
    region *found = region_of_base(&regions, (uint64_t)address, REGION_REGISTERED);
    if (found)
        region_remove(&regions, found);
    driver_unlock();
    return found ? CUDA_SUCCESS : CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
}

CUDA_EXPORT CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr *pointer, void *address, unsigned flags) {
    ENTER();
    (void)flags;
    driver_lock();
    const region *found = region_at(&regions, (uint64_t)address);
    int is_pinned = found && !region_is_device(found);
    driver_unlock();
    *pointer = (CUdeviceptr)address;
    return is_pinned ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUDA_EXPORT CUresult cuMemHostGetFlags(unsigned *flags, void *address) {
    ENTER();
    driver_lock();
    const region *found = region_at(&regions, (uint64_t)address);
    int is_pinned = found && !region_is_device(found);
    if (is_pinned)
        *flags = found->flags;
    driver_unlock();
    return is_pinned ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

/* ---- copies and fills ---- */

static int is_corrupt(const char *function) {
    fault_record struck;
    return fault_strikes(function, FAULT_CORRUPT, &struck);
}

static CUresult copy_now(const char *function, uint64_t target, uint64_t source, uint64_t bytes) {
    streams_finish(0); /* as the legacy stream does */
    CUresult result = copy_bytes(target, source, bytes);
    return result == CUDA_SUCCESS && bytes && is_corrupt(function) ? copy_corrupt(target, bytes) : result;
}

static CUresult copy_later(const char *function, uint64_t target, uint64_t source, uint64_t bytes,
                           CUstream stream) {
    int is_pageable = 0;
    if (!bytes)
        return CUDA_SUCCESS;
    CUresult result = copy_check(target, source, &is_pageable);
    if (result == CUDA_SUCCESS)
        result = stream_submit(stream, (op){.kind = OP_COPY,
                                            .target = target,
                                            .source = source,
                                            .bytes = bytes,
                                            .is_corrupt = is_corrupt(function)});
    /* The driver must read pageable memory before it returns, so such a copy is asynchronous in name only. */
    return result == CUDA_SUCCESS && is_pageable ? stream_finish(stream) : result;
}

#define COPY(function, target_type, source_type)                                          \
    CUDA_EXPORT CUresult function(target_type target, source_type source, size_t bytes) { \
        ENTER_WITH_CONTEXT();                                                             \
        return copy_now(__func__, (uint64_t)target, (uint64_t)source, bytes);             \
    }
#define COPY_ASYNC(function, target_type, source_type)                                                     \
    CUDA_EXPORT CUresult function(target_type target, source_type source, size_t bytes, CUstream stream) { \
        ENTER_WITH_CONTEXT();                                                                              \
        return copy_later(__func__, (uint64_t)target, (uint64_t)source, bytes, stream);                    \
    }
#define FILL(function, type)                                                                                 \
    CUDA_EXPORT CUresult function##_v2(CUdeviceptr target, type value, size_t count) {                       \
        ENTER_WITH_CONTEXT();                                                                                \
        streams_finish(0);                                                                                   \
        return fill_bytes(target, value, sizeof value, count);                                               \
    }                                                                                                        \
    CUDA_EXPORT CUresult function##Async(CUdeviceptr target, type value, size_t count, CUstream stream) {    \
        ENTER_WITH_CONTEXT();                                                                                \
        return stream_submit(                                                                                \
            stream,                                                                                          \
            (op){.kind = OP_FILL, .target = target, .value = value, .width = sizeof value, .bytes = count}); \
    }

COPY(cuMemcpy, CUdeviceptr, CUdeviceptr)
COPY(cuMemcpyHtoD_v2, CUdeviceptr, const void *)
COPY(cuMemcpyDtoH_v2, void *, CUdeviceptr)
COPY(cuMemcpyDtoD_v2, CUdeviceptr, CUdeviceptr)
COPY_ASYNC(cuMemcpyAsync, CUdeviceptr, CUdeviceptr)
COPY_ASYNC(cuMemcpyHtoDAsync_v2, CUdeviceptr, const void *)
COPY_ASYNC(cuMemcpyDtoHAsync_v2, void *, CUdeviceptr)
COPY_ASYNC(cuMemcpyDtoDAsync_v2, CUdeviceptr, CUdeviceptr)
FILL(cuMemsetD8, unsigned char)
FILL(cuMemsetD16, unsigned short)
FILL(cuMemsetD32, unsigned)

/* Virtual memory management: physical chunks, address reservations, and mappings between them. */
#define _GNU_SOURCE
#include "cuda_driver.h"

#include <sys/mman.h>

static int is_device_location(CUmemLocation location) { return location.type == CU_MEM_LOCATION_DEVICE; }

CUDA_EXPORT CUresult cuMemGetAllocationGranularity(size_t *bytes, const CUmemAllocationProp *properties,
                                                   int option) {
    ENTER();
    (void)option;
    if (!bytes || !properties || !is_device_location(properties->location))
        return CUDA_ERROR_INVALID_VALUE;
    if (!is_device(properties->location.id))
        return CUDA_ERROR_INVALID_DEVICE;
    *bytes = GRANULARITY;
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuMemAddressReserve(CUdeviceptr *address, size_t bytes, size_t alignment,
                                         CUdeviceptr hint, unsigned long long flags) {
    ENTER();
    (void)hint;
    if (alignment < GRANULARITY)
        alignment = GRANULARITY;
    if (!address || !bytes || flags || bytes % GRANULARITY || alignment & (alignment - 1))
        return CUDA_ERROR_INVALID_VALUE;
    if (bytes > BYTES_MAX || alignment > BYTES_MAX)
        return CUDA_ERROR_OUT_OF_MEMORY;
    void *base = reserve_addresses(bytes, alignment);
    if (!base)
        return CUDA_ERROR_OUT_OF_MEMORY;
    driver_lock();
    int failed = region_insert(
        &reservations,
        (region){.base = (uint64_t)base, .bytes = bytes, .mapped_bytes = bytes, .kind = REGION_RESERVED});
    driver_unlock();
    if (failed) {
        munmap(base, bytes);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    *address = (CUdeviceptr)base;
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuMemAddressFree(CUdeviceptr address, size_t bytes) {
    ENTER();
    CUresult result = CUDA_ERROR_INVALID_VALUE;
    driver_lock();
    region *reserved = region_of_base(&reservations, address, REGION_RESERVED);
    if (reserved && reserved->bytes == bytes && !region_overlaps(&regions, address, bytes)) {
        region_remove(&reservations, reserved);
        munmap((void *)address, bytes);
        result = CUDA_SUCCESS;
    }
    driver_unlock();
    return result;
}

CUDA_EXPORT CUresult cuMemCreate(CUmemGenericAllocationHandle *value, size_t bytes,
                                 const CUmemAllocationProp *properties, unsigned long long flags) {
    ENTER();
    if (!value || !properties || !bytes || flags || bytes % GRANULARITY)
        return CUDA_ERROR_INVALID_VALUE;
    if (properties->type != CU_MEM_ALLOCATION_PINNED)
        return CUDA_ERROR_INVALID_VALUE;
    if (!is_device_location(properties->location))
        return CUDA_ERROR_NOT_SUPPORTED;
    if (!is_device(properties->location.id))
        return CUDA_ERROR_INVALID_DEVICE;
    uint64_t started_ns = clock_ns();
    int handle;
    driver_lock();
    CUresult result = handle_create(properties->location.id, bytes, properties, &handle);
    if (result == CUDA_SUCCESS)
        *value = handle_value(handle);
    driver_unlock();
    if (result == CUDA_SUCCESS)
        pay(CALL_MEM_CREATE, started_ns, bytes);
    return result;
}

CUDA_EXPORT CUresult cuMemRelease(CUmemGenericAllocationHandle value) {
    ENTER();
    uint64_t started_ns = clock_ns(), freed_bytes = 0;
    driver_lock();
    int handle = handle_of_value(value);
    if (handle)
        freed_bytes = handle_release(handle);
    driver_unlock();
    if (!handle)
        return CUDA_ERROR_INVALID_VALUE;
    pay(CALL_MEM_RELEASE, started_ns, freed_bytes);
    return CUDA_SUCCESS;
}

/* With the driver lock held. */
static CUresult map(uint64_t address, uint64_t bytes, int handle) {
    const region *reserved = region_at(&reservations, address);
    if (!handle || bytes > handle_record_of(handle)->file.bytes)
        return CUDA_ERROR_INVALID_VALUE;
    if (!reserved || address + bytes > reserved->base + reserved->bytes)
        return CUDA_ERROR_INVALID_VALUE;
    if (region_overlaps(&regions, address, bytes))
        return CUDA_ERROR_INVALID_VALUE;
    if (region_insert(&regions,
                      (region){.base = address, .bytes = bytes, .kind = REGION_MAPPED, .handle = handle}))
        return CUDA_ERROR_OPERATING_SYSTEM;
    handle_record_of(handle)->mappings++;
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuMemMap(CUdeviceptr address, size_t bytes, size_t offset,
                              CUmemGenericAllocationHandle value, unsigned long long flags) {
    ENTER();
    if (flags || offset || !bytes || address % GRANULARITY || bytes % GRANULARITY)
        return CUDA_ERROR_INVALID_VALUE; /* the real driver, too, takes no offset but 0 */
    uint64_t started_ns = clock_ns();
    driver_lock();
    CUresult result = map(address, bytes, handle_of_value(value));
    driver_unlock();
    if (result == CUDA_SUCCESS)
        pay(CALL_MEM_MAP, started_ns, bytes);
    return result;
}

/* With the driver lock held: the bytes of the mappings that lie wholly within the range. */
static uint64_t mapped_within(uint64_t address, uint64_t bytes) {
    uint64_t covered_bytes = 0;
    for (uint64_t at = address; at < address + bytes;) {
        const region *mapping = region_of_base(&regions, at, REGION_MAPPED);
        if (!mapping || at + mapping->bytes > address + bytes)
            break;
        covered_bytes += mapping->bytes;
        at += mapping->bytes;
    }
    return covered_bytes;
}

CUDA_EXPORT CUresult cuMemUnmap(CUdeviceptr address, size_t bytes) {
    ENTER();
    streams_finish(1);
    uint64_t started_ns = clock_ns(), freed_bytes = 0;
    driver_lock();
    int is_whole = bytes && mapped_within(address, bytes) == bytes;
    for (uint64_t at = address; is_whole && at < address + bytes;) {
        region *mapping = region_of_base(&regions, at, REGION_MAPPED);
        int handle = mapping->handle;
        at += mapping->bytes;
        region_remove(&regions, mapping);
        freed_bytes += handle_unmap(handle);
    }
    driver_unlock();
    if (!is_whole)
        return CUDA_ERROR_INVALID_VALUE;
    pay(CALL_MEM_UNMAP, started_ns, bytes);
    pay_for_size(CALL_MEM_RELEASE, clock_ns(), freed_bytes); /* the handle was released before */
    return CUDA_SUCCESS;
}

/* With the driver lock held. */
static void set_access(region *mapping, const CUmemAccessDesc *rights, size_t count) {
    int index = handle_record_of(mapping->handle)->device;
    for (size_t i = 0; i < count; i++)
        if (is_device_location(rights[i].location) && rights[i].location.id == index)
            mapping->access = rights[i].flags;
}

CUDA_EXPORT CUresult cuMemSetAccess(CUdeviceptr address, size_t bytes, const CUmemAccessDesc *rights,
                                    size_t count) {
    ENTER();
    if (!rights || !count || !bytes)
        return CUDA_ERROR_INVALID_VALUE;
    uint64_t started_ns = clock_ns();
    driver_lock();
    int is_whole = mapped_within(address, bytes) == bytes;
    for (uint64_t at = address; is_whole && at < address + bytes;) {
        region *mapping = region_of_base(&regions, at, REGION_MAPPED);
        set_access(mapping, rights, count);
        at += mapping->bytes;
    }
    driver_unlock();
    if (!is_whole)
        return CUDA_ERROR_INVALID_VALUE;
    pay(CALL_MEM_SET_ACCESS, started_ns, bytes);
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuMemGetAccess(unsigned long long *flags, const CUmemLocation *location,
                                    CUdeviceptr address) {
    ENTER();
    if (!flags || !location)
        return CUDA_ERROR_INVALID_VALUE;
    driver_lock();
    const region *mapping = region_at(&regions, address);
    int is_mapping = mapping && mapping->kind == REGION_MAPPED;
    if (is_mapping)
        *flags = location->id == handle_record_of(mapping->handle)->device ? (unsigned)mapping->access : 0;
    driver_unlock();
    return is_mapping ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUDA_EXPORT CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle *value, void *address) {
    ENTER();
    driver_lock();
    const region *mapping = region_at(&regions, (uint64_t)address);
    int is_mapping = mapping && mapping->kind == REGION_MAPPED;
    if (is_mapping) {
        handle_record_of(mapping->handle)->references++;
        *value = handle_value(mapping->handle);
    }
    driver_unlock();
    return is_mapping ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUDA_EXPORT CUresult cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp *properties,
                                                            CUmemGenericAllocationHandle value) {
    ENTER();
    driver_lock();
    int handle = handle_of_value(value);
    if (handle)
        *properties = handle_record_of(handle)->properties;
    driver_unlock();
    return handle ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUDA_EXPORT CUresult cuMemExportToShareableHandle(void *shareable, CUmemGenericAllocationHandle value,
                                                  int type, unsigned long long flags) {
    ENTER();
    if (flags || !shareable)
        return CUDA_ERROR_INVALID_VALUE;
    if (type != CU_MEM_HANDLE_POSIX_FD)
        return CUDA_ERROR_NOT_SUPPORTED;
    int descriptor = -1;
    driver_lock();
    int handle = handle_of_value(value);
    if (handle && handle_record_of(handle)->properties.requestedHandleTypes & type) {
        host_lock();
        descriptor = chunk_open(handle_record_of(handle)->chunk, HOLDER_DESCRIPTOR);
        host_unlock();
    }
    driver_unlock();
    if (descriptor < 0)
        return CUDA_ERROR_INVALID_VALUE;
    *(int *)shareable = descriptor;
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle *value, void *shareable,
                                                    int type) {
    ENTER();
    if (!value)
        return CUDA_ERROR_INVALID_VALUE;
    if (type != CU_MEM_HANDLE_POSIX_FD)
        return CUDA_ERROR_NOT_SUPPORTED;
    int handle;
    host_lock();
    int chunk = chunk_of_descriptor((int)(intptr_t)shareable);
    int descriptor = chunk < 0 ? -1 : chunk_open(chunk, own_process);
    host_unlock();
    if (descriptor < 0)
        return CUDA_ERROR_INVALID_VALUE;
    driver_lock();
    CUresult result = handle_adopt(chunk, descriptor, &handle);
    if (result == CUDA_SUCCESS)
        *value = handle_value(handle);
    driver_unlock();
    return result;
}

/* This process's holds on physical memory. Values carry a generation, so that a stale handle is refused. */
#include "cuda_driver.h"

#include <stdlib.h>
#include <unistd.h>

#define VALUE_TAG (0x5347ull << 48)

static handle_record *records; /* index 0 is never used */
static int record_count;
static int free_hint = 1;

handle_record *handle_record_of(int handle) { return &records[handle]; }

static int grow(void) {
    int count = record_count ? record_count * 2 : 64;
    handle_record *grown = realloc(records, (size_t)count * sizeof *grown);
    if (!grown)
        return -1;
    records = grown;
    for (; record_count < count; record_count++)
        records[record_count] = (handle_record){.chunk = -1};
    return 0;
}

static int free_record(void) {
    for (int i = free_hint; i < record_count; i++)
        if (records[i].chunk < 0)
            return i;
    for (int i = 1; i < free_hint && i < record_count; i++)
        if (records[i].chunk < 0)
            return i;
    int first_new = record_count ? record_count : 1;
    return grow() ? 0 : first_new;
}

/* Whether that was the last hold on the memory: only then is it freed, and its freeing paid for. */
static int host_let_go(int chunk) {
    host_lock();
    chunk_let_go(chunk, own_process);
    int is_freed = !host->chunks[chunk].is_used;
    host_unlock();
    return is_freed;
}

static CUresult fill_record(int chunk, int device, uint64_t bytes, int descriptor, int *handle) {
    chunk_file file;
    int found = free_record();
    if (!found) {
        close(descriptor);
        host_let_go(chunk);
        return CUDA_ERROR_OPERATING_SYSTEM;
    }
    if (chunk_file_open(&file, descriptor, bytes, host->is_clean)) {
        host_let_go(chunk);
        return CUDA_ERROR_OPERATING_SYSTEM;
    }
    uint32_t generation = records[found].generation + 1;
    records[found] = (handle_record){
        .chunk = chunk, .device = device, .references = 1, .generation = generation, .file = file};
    free_hint = found + 1;
    *handle = found;
    return CUDA_SUCCESS;
}

CUresult handle_create(int device, uint64_t bytes, const CUmemAllocationProp *properties, int *handle) {
    int descriptor = -1;
    if (bytes > mps_left(device))
        return CUDA_ERROR_OUT_OF_MEMORY;
    host_lock();
    int chunk = chunk_create(device, bytes, own_process, &descriptor);
    host_unlock();
    if (chunk < 0)
        return chunk == CHUNK_NO_ROOM ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_ERROR_OPERATING_SYSTEM;
    CUresult result = fill_record(chunk, device, bytes, descriptor, handle);
    if (result == CUDA_SUCCESS && properties)
        records[*handle].properties = *properties;
    return result;
}

CUresult handle_adopt(int chunk, int descriptor, int *handle) {
    const chunk_record *shared = &host->chunks[chunk]; /* the descriptor keeps the row, but not its owner's */
    host_lock();
    int device = process_ordinal(driver_process(), chunk_device(shared));
    host_unlock();
    CUresult result = fill_record(chunk, device, shared->bytes, descriptor, handle);
    if (result == CUDA_SUCCESS)
        records[*handle].properties = (CUmemAllocationProp){
            .type = CU_MEM_ALLOCATION_PINNED,
            .requestedHandleTypes = CU_MEM_HANDLE_POSIX_FD,
            .location = {CU_MEM_LOCATION_DEVICE, device},
        };
    return result;
}

CUmemGenericAllocationHandle handle_value(int handle) {
    return VALUE_TAG | (uint64_t)(records[handle].generation & 0xffff) << 32 | (uint32_t)handle;
}

int handle_of_value(CUmemGenericAllocationHandle value) {
    int candidate = (int)(uint32_t)value;
    if (candidate <= 0 || candidate >= record_count || records[candidate].chunk < 0)
        return 0;
    return records[candidate].references > 0 && handle_value(candidate) == value ? candidate : 0;
}

static uint64_t close_when_unused(int handle) {
    handle_record *record = &records[handle];
    if (record->references > 0 || record->mappings > 0)
        return 0;
    uint64_t bytes = record->file.bytes;
    int chunk = record->chunk;
    chunk_file_close(&record->file);
    record->chunk = -1;
    free_hint = handle;
    return host_let_go(chunk) ? bytes : 0;
}

uint64_t handle_unmap(int handle) {
    records[handle].mappings--;
    return close_when_unused(handle);
}

uint64_t handle_release(int handle) {
    records[handle].references--;
    return close_when_unused(handle);
}

/* A child's inherited descriptors would keep the parent's memory alive. */
void handles_close_after_fork(void) {
    for (int i = 1; i < record_count; i++)
        if (records[i].chunk >= 0)
            close(records[i].file.descriptor);
}

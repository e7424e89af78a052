/* Checkpoints to custom storage (CUDA 13.4.1): a target's memory, device by device, is one block of addresses
 * in the caller, which copies it away or back and then completes the operation.
 *
 * The memory of a block is the target's chunks in the order of their creation. On completion of a checkpoint
 * they are made as fresh memory, so that a copy which the caller forgot shows (not in a phantom, whose big
 * copies move nothing). */
#include "cuda_driver.h"

#include <stdlib.h>
#include <sys/mman.h>

typedef struct CUIcheckpointOperation_st {
    struct CUIcheckpointOperation_st *next;
    target aimed;
    process_state step;
    uint64_t mapped_bytes[DEVICE_MAX]; /* of each block */
    CUcheckpointCustomStoragePerDeviceData blocks[DEVICE_MAX];
    CUcheckpointCustomStorageInfo info; /* what the caller is given a pointer to */
} operation;

static operation *operations; /* under the driver lock */

/* With the host lock held: the caller must be ready to map what lies on these devices. */
CUresult storage_check(const target *aimed, const uint8_t *device_map) {
    if (aimed->index == own_process)
        return CUDA_ERROR_NOT_SUPPORTED;
    if (!driver_process()->is_client)
        return CUDA_ERROR_NOT_INITIALIZED;
    for (uint32_t ordinal = 0; ordinal < host->device_count; ordinal++) {
        uint64_t bytes = aimed->process->charged_bytes[ordinal] + aimed->process->context_bytes[ordinal];
        if (bytes && !context_primary(process_ordinal(driver_process(), device_map[ordinal])))
            return CUDA_ERROR_INVALID_CONTEXT;
    }
    return CUDA_SUCCESS;
}

static int by_id(const void *left, const void *right) {
    uint64_t first = host->chunks[*(const int *)left].id, second = host->chunks[*(const int *)right].id;
    return (first > second) - (first < second);
}

/* With the host lock held: the rows of the target's chunks on a device, oldest first. */
static int list_chunks(const target *aimed, int device_index, int *rows) {
    int count = 0;
    for (uint32_t i = 0; i < host->chunk_end; i++) {
        const chunk_record *chunk = &host->chunks[i];
        if (chunk->is_used && chunk->owner == aimed->index && chunk_device(chunk) == device_index)
            rows[count++] = (int)i;
    }
    qsort(rows, (size_t)count, sizeof *rows, by_id);
    return count;
}

/* With the driver lock held. When the target has died meanwhile, its rows may be others' by now. */
static int map_chunk(const target *aimed, int row, uint64_t address) {
    int handle, descriptor = -1;
    host_lock();
    if (target_is_there(aimed))
        descriptor = chunk_open(row, own_process);
    host_unlock();
    if (descriptor < 0 || handle_adopt(row, descriptor, &handle) != CUDA_SUCCESS)
        return -1;
    region added = {.base = address,
                    .bytes = host->chunks[row].bytes,
                    .kind = REGION_STORAGE,
                    .handle = handle,
                    .access = CU_MEM_ACCESS_READWRITE};
    if (region_insert(&regions, added)) {
        handle_release(handle);
        return -1;
    }
    handle_record_of(handle)->mappings = 1;
    handle_record_of(handle)->references = 0;
    return 0;
}

static void forget(const operation *done) {
    for (unsigned b = 0; !host->is_phantom && b < done->info.deviceCount; b++)
        for (uint64_t at = done->blocks[b].devPtr; at < done->blocks[b].devPtr + done->blocks[b].size;) {
            driver_lock();
            const region *part = region_at(&regions, at);
            at = part->base + part->bytes;
            chunk_file_forget(&handle_record_of(part->handle)->file);
            driver_unlock();
        }
}

static void unmap(const operation *done) {
    for (unsigned b = 0; b < done->info.deviceCount; b++) {
        uint64_t at = done->blocks[b].devPtr, end = at + done->blocks[b].size;
        driver_lock();
        while (at < end) {
            region *part = region_at(&regions, at);
            int handle = part->handle;
            at += part->bytes;
            region_remove(&regions, part);
            handle_unmap(handle);
        }
        driver_unlock();
        if (done->blocks[b].stream)
            cuStreamDestroy_v2(done->blocks[b].stream);
        munmap((void *)done->blocks[b].devPtr, done->mapped_bytes[b]);
    }
}

/* One block for what the target has on a device; without anything, none. */
static int map_block(operation *made, int device_index) {
    static int rows[CHUNK_MAX]; /* under the driver lock */
    int ordinal = process_ordinal(driver_process(), device_index);
    driver_lock();
    host_lock();
    int count = list_chunks(&made->aimed, device_index, rows), failed = 0;
    uint64_t bytes = 0, at;
    for (int i = 0; i < count; i++)
        bytes += host->chunks[rows[i]].bytes;
    host_unlock();
    void *base = bytes ? reserve_addresses(round_up(bytes, GRANULARITY), GRANULARITY) : NULL;
    if (base) {
        CUcheckpointCustomStoragePerDeviceData *block = &made->blocks[made->info.deviceCount];
        made->mapped_bytes[made->info.deviceCount++] = round_up(bytes, GRANULARITY);
        block->devPtr = at = (CUdeviceptr)base;
        for (int i = 0; i < count && !failed; i++) {
            failed = map_chunk(&made->aimed, rows[i], at);
            at += failed ? 0 : host->chunks[rows[i]].bytes;
        }
        block->size = at - block->devPtr;
    }
    driver_unlock();
    if (!base)
        return bytes ? -1 : 0;
    CUstream stream = stream_create(context_primary(ordinal));
    made->blocks[made->info.deviceCount - 1].stream = stream;
    return failed || !stream ? -1 : 0;
}

static void take_back(const operation *failed) {
    host_lock();
    if (target_is_there(&failed->aimed))
        checkpoint_settle(failed->aimed.process);
    host_unlock();
}

CUresult storage_begin(const target *aimed, process_state step, CUcheckpointCustomStorageInfo **info) {
    operation *made = calloc(1, sizeof *made);
    int failed = !made;
    if (made)
        *made = (operation){.aimed = *aimed, .step = step};
    for (uint32_t d = 0; d < host->device_count && !failed; d++)
        failed = map_block(made, (int)d);
    if (failed) {
        operation nothing = {.aimed = *aimed};
        take_back(made ? made : &nothing);
        if (made)
            unmap(made);
        free(made);
        return CUDA_ERROR_OPERATING_SYSTEM;
    }
    if (step == STATE_RESTORING)
        forget(made); /* what the last caller may have left undone */
    made->info.handle = made;
    made->info.perDeviceData = made->blocks;
    driver_lock();
    made->next = operations;
    operations = made;
    driver_unlock();
    *info = &made->info;
    return CUDA_SUCCESS;
}

static operation *take(CUcheckpointOperationHandle handle) {
    operation *found = NULL;
    driver_lock();
    for (operation **link = &operations; *link && !found; link = found ? link : &(*link)->next)
        if (*link == handle) {
            found = *link;
            *link = found->next;
        }
    driver_unlock();
    return found;
}

/* The commit is the one store of the new state; until the content is forgotten nobody else may take a step.
 */
static CUresult commit(const operation *done) {
    CUresult result = CUDA_ERROR_ILLEGAL_STATE;
    host_lock();
    process_record *process = done->aimed.process;
    if (target_is_there(&done->aimed) && checkpoint_state(process) == done->step) {
        checkpoint_reach(process, done->step == STATE_CHECKPOINTING ? STATE_CHECKPOINTED : STATE_LOCKED, 1);
        result = CUDA_SUCCESS;
    }
    host_unlock();
    return result;
}

CUDA_EXPORT CUresult cuCheckpointOperationComplete(CUcheckpointOperationHandle handle) {
    ENTER();
    operation *done = take(handle);
    if (!done)
        return CUDA_ERROR_INVALID_VALUE;
    uint64_t started_ns = clock_ns(), bytes = 0;
    for (unsigned b = 0; b < done->info.deviceCount; b++) {
        stream_finish(done->blocks[b].stream);
        bytes += done->blocks[b].size;
    }
    CUresult result = commit(done);
    if (result == CUDA_SUCCESS && done->step == STATE_CHECKPOINTING)
        forget(done);
    unmap(done);
    host_lock();
    if (result == CUDA_SUCCESS && target_is_there(&done->aimed))
        checkpoint_release(done->aimed.process);
    host_unlock();
    if (result == CUDA_SUCCESS)
        pay(done->step == STATE_CHECKPOINTING ? CALL_CHECKPOINT_COMPLETE : CALL_RESTORE_COMPLETE, started_ns,
            bytes);
    free(done);
    return result;
}

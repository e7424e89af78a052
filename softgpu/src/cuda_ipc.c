/* cuIpc memory handles: another process opens an allocation by a token.
 *
 * Both must be in one IPC namespace, as NVIDIA asks of containers. A handle that is open already is counted,
 * and its address given again. */
#include "cuda_driver.h"

#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#define TOKEN_MAGIC 0x43504953ull

typedef struct {
    uint64_t magic, chunk, id, bytes, name_space;
} token;

_Static_assert(sizeof(token) <= sizeof(CUipcMemHandle), "a token travels in a CUipcMemHandle");

uint64_t ipc_namespace(void) {
    struct stat status;
    return stat("/proc/self/ns/ipc", &status) ? 0 : status.st_ino;
}

CUDA_EXPORT CUresult cuIpcGetMemHandle(CUipcMemHandle *exported, CUdeviceptr address) {
    ENTER();
    if (!exported)
        return CUDA_ERROR_INVALID_VALUE;
    driver_lock();
    const region *allocated = region_at(&regions, address);
    int is_allocation = allocated && allocated->kind == REGION_ALLOCATED;
    if (is_allocation) {
        int chunk = handle_record_of(allocated->handle)->chunk;
        token made = {TOKEN_MAGIC, (uint64_t)chunk, host->chunks[chunk].id, allocated->bytes,
                      ipc_namespace()};
        memset(exported, 0, sizeof *exported);
        memcpy(exported, &made, sizeof made);
    }
    driver_unlock();
    return is_allocation ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

static int open_token(const token *given) {
    int descriptor = -1;
    if (given->magic != TOKEN_MAGIC || given->chunk >= CHUNK_MAX || given->name_space != ipc_namespace())
        return -1;
    host_lock();
    const chunk_record *chunk = &host->chunks[given->chunk];
    if (chunk->is_used && chunk->id == given->id && chunk->owner != own_process && chunk_is_on_device(chunk))
        descriptor = chunk_open((int)given->chunk, own_process);
    host_unlock();
    return descriptor;
}

/* With the driver lock held: the address at which the chunk is open already, now once more. */
static int reopen(const token *given, CUdeviceptr *address) {
    for (int i = 0; i < regions.count; i++) {
        region *opened = &regions.items[i];
        if (opened->kind != REGION_IPC || opened->ipc_id != given->id)
            continue;
        opened->ipc_count++;
        *address = opened->base;
        return 1;
    }
    return 0;
}

/* With the driver lock held. */
static CUresult map_token(const token *given, int descriptor, CUdeviceptr *address) {
    int handle;
    CUresult result = handle_adopt((int)given->chunk, descriptor, &handle);
    if (result != CUDA_SUCCESS)
        return result;
    uint64_t mapped_bytes = round_up(given->bytes, GRANULARITY);
    void *base = reserve_addresses(mapped_bytes, GRANULARITY);
    region added = {.base = (uint64_t)base,
                    .bytes = given->bytes,
                    .mapped_bytes = mapped_bytes,
                    .kind = REGION_IPC,
                    .ipc_count = 1,
                    .ipc_id = given->id,
                    .handle = handle,
                    .access = CU_MEM_ACCESS_READWRITE,
                    .context = context_current()};
    if (!base || region_insert(&regions, added)) {
        handle_release(handle);
        return CUDA_ERROR_OPERATING_SYSTEM;
    }
    handle_record_of(handle)->mappings = 1;
    handle_record_of(handle)->references = 0;
    *address = (CUdeviceptr)base;
    return CUDA_SUCCESS;
}

/* With the driver lock held. */
static CUresult open_anew(const token *given, CUdeviceptr *address) {
    int descriptor = open_token(given);
    return descriptor < 0 ? CUDA_ERROR_INVALID_VALUE : map_token(given, descriptor, address);
}

CUDA_EXPORT CUresult cuIpcOpenMemHandle_v2(CUdeviceptr *address, CUipcMemHandle exported, unsigned flags) {
    ENTER_WITH_CONTEXT();
    token given;
    memcpy(&given, &exported, sizeof given);
    if (!address || flags != CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS)
        return CUDA_ERROR_INVALID_VALUE;
    driver_lock();
    CUresult result = reopen(&given, address) ? CUDA_SUCCESS : open_anew(&given, address);
    driver_unlock();
    return result;
}

CUDA_EXPORT CUresult cuIpcCloseMemHandle(CUdeviceptr address) {
    ENTER();
    streams_finish(1);
    driver_lock();
    region *opened = region_of_base(&regions, address, REGION_IPC);
    if (opened && !--opened->ipc_count)
        allocation_free(opened);
    driver_unlock();
    return opened ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

/* Contexts, cuMemAlloc, pools, IPC, pinned memory, and what memory holds. */
#include "worker.h"

#include "../src/chunk_file.h"

#include <string.h>

/* ---- contents ---- */

void stamp(CUdeviceptr address) {
    unsigned char bytes[STAMP_BYTES];
    uint64_t tag = next(&self.random);
    memcpy(bytes, &tag, 8);
    fill_pattern(bytes + 8, tag, STAMP_BYTES - 8);
    did(cuMemcpyHtoD_v2(address, bytes, STAMP_BYTES));
}

/* Of anybody's memory: whole, or never written because its maker was refused or died before. */
void check_stamp(CUdeviceptr address) {
    unsigned char bytes[STAMP_BYTES], expected[STAMP_BYTES];
    uint64_t tag;
    if (!did(cuMemcpyDtoH_v2(bytes, address, STAMP_BYTES)))
        return;
    memcpy(&tag, bytes, 8);
    memcpy(expected, &tag, 8);
    fill_pattern(expected + 8, tag, STAMP_BYTES - 8);
    if (!memcmp(bytes, expected, STAMP_BYTES))
        return;
    memset(expected, DIRTY_BYTE, STAMP_BYTES);
    if (memcmp(bytes, expected, STAMP_BYTES))
        fail("shared memory holds neither its stamp nor dirt");
}

static void expect_bytes(const content *holds, unsigned char *expected, uint64_t count) {
    if (!holds->is_written)
        memset(expected, DIRTY_BYTE, count);
    else if (holds->is_fill)
        memset(expected, (int)holds->tag, count);
    else
        fill_pattern(expected, holds->tag, count);
}

void check_content(CUdeviceptr address, uint64_t bytes, content *holds) {
    static unsigned char expected[BUFFER_BYTES];
    uint64_t offset = holds->offset, count = holds->bytes;
    if (!holds->is_written) {
        count = 1 + chance(BUFFER_BYTES / 4);
        if (bytes < STAMP_BYTES + count)
            return;
        offset = STAMP_BYTES + chance(bytes - STAMP_BYTES - count + 1);
    } else if (!holds->is_known) {
        return;
    }
    if (!did(cuMemcpyDtoH_v2(self.scratch, address + offset, count)))
        return;
    expect_bytes(holds, expected, count);
    if (memcmp(self.scratch, expected, count))
        fail("%llu bytes at %llu are not what was %s", (unsigned long long)count, (unsigned long long)offset,
             holds->is_written ? "written" : "never written");
}

void write_content(CUdeviceptr address, uint64_t bytes, content *holds) {
    uint64_t count = 1 + chance(chance(4) ? 600 : BUFFER_BYTES - 1);
    if (bytes < STAMP_BYTES + count)
        return;
    uint64_t offset = STAMP_BYTES + chance(bytes - STAMP_BYTES - count + 1);
    int is_fill = chance(4) == 0;
    settle_streams(); /* a stream that waits for no other could still write there */
    uint64_t tag = is_fill ? chance(3) ? 0 : chance(256) : next(&self.random);
    fill_pattern(self.scratch, tag, count);
    CUresult result = is_fill ? cuMemsetD8_v2(address + offset, (unsigned char)tag, count)
                              : cuMemcpyHtoD_v2(address + offset, self.scratch, count);
    *holds = (content){.is_written = 1, .is_known = did(result), .is_fill = is_fill, .offset = offset,
                       .bytes = count, .tag = tag};
}

/* ---- contexts ---- */

static int has_context(void) {
    CUcontext now = NULL;
    return cuCtxGetCurrent(&now) == CUDA_SUCCESS && now;
}

static int retain(void) {
    int device = (int)chance(GPU_MAX);
    CUcontext retained;
    if (!self.primary[device]) {
        if (!got_memory(cuDevicePrimaryCtxRetain(&retained, device)))
            return 0;
        self.primary[device] = retained;
    }
    return did(cuCtxSetCurrent(self.primary[device]));
}

static void leave_context(CUcontext left, int device) {
    forget_blocks_of(left);
    if (left == self.primary[device])
        self.primary[device] = NULL;
}

static int release_or_reset(void) {
    int device = (int)chance(GPU_MAX), is_reset = (int)chance(2);
    if (!self.primary[device])
        return 0;
    settle_streams();
    if (!did(is_reset ? cuDevicePrimaryCtxReset_v2(device) : cuDevicePrimaryCtxRelease_v2(device)))
        return 0;
    leave_context(self.primary[device], device);
    return retain();
}

static int create_or_destroy(void) {
    int device = (int)chance(GPU_MAX);
    if (!self.created) {
        if (!got_memory(cuCtxCreate_v4(&self.created, NULL, 0, device))) {
            self.created = NULL;
            return 0;
        }
        CUcontext pushed; /* the stack must not grow: the new one takes the place of the current one */
        return cuCtxPopCurrent_v2(&pushed) == CUDA_SUCCESS && cuCtxSetCurrent(self.created) == CUDA_SUCCESS;
    }
    settle_streams();
    if (!did(cuCtxDestroy_v2(self.created)))
        return 0;
    forget_blocks_of(self.created);
    self.created = NULL;
    return retain();
}

/* ---- blocks ---- */

void forget_blocks_of(CUcontext context) {
    for (int i = 0; i < BLOCK_MAX; i++)
        if (self.blocks[i].address && !self.blocks[i].is_ipc && self.blocks[i].context == context)
            self.blocks[i].address = 0;
}

static block *some_block(int is_used) {
    int first = (int)chance(BLOCK_MAX);
    for (int i = 0; i < BLOCK_MAX; i++) {
        block *candidate = &self.blocks[(first + i) % BLOCK_MAX];
        if (!candidate->address == !is_used)
            return candidate;
    }
    return NULL;
}

static uint64_t some_bytes(void) {
    switch (chance(6)) {
    case 0: return 1 + chance(600);
    case 1: return 4096 * (1 + chance(200));
    case 2: return MIB * (1 + chance(24));
    default: return 1 + chance(3 * MIB);
    }
}

static CUresult take(CUdeviceptr *address, uint64_t *bytes) {
    size_t pitch;
    switch (chance(6)) {
    case 0: return cuMemAllocAsync(address, *bytes, NULL);
    case 1:
        if (self.pool_is_made)
            return cuMemAllocFromPoolAsync(address, *bytes, self.pool, NULL);
        return cuMemAlloc_v2(address, *bytes);
    case 2: {
        CUresult result = cuMemAllocPitch_v2(address, &pitch, 100, 1 + *bytes / 512, 4);
        *bytes = pitch * (1 + *bytes / 512);
        return result;
    }
    default: return cuMemAlloc_v2(address, *bytes);
    }
}

static int allocate(void) {
    block *row = some_block(0);
    CUcontext now = NULL;
    uint64_t bytes = some_bytes();
    CUdeviceptr address = 0;
    int device;
    if (!row || !did(cuCtxGetCurrent(&now)) || !now || !did(cuCtxGetDevice(&device)) ||
        !got_memory(take(&address, &bytes)))
        return 0;
    *row = (block){.address = address, .bytes = bytes, .device = device, .context = now};
    return 1;
}

int free_block(block *freed) {
    settle_streams();
    CUresult result = freed->is_ipc   ? cuIpcCloseMemHandle(freed->address)
                      : chance(3) == 0 && has_context() ? cuMemFreeAsync(freed->address, NULL)
                                                      : cuMemFree_v2(freed->address);
    if (!did(result))
        return 0;
    freed->address = 0;
    return 1;
}

static int free_some(void) {
    block *row = some_block(1);
    return row ? free_block(row) : 0;
}

static int write_block(void) {
    block *row = some_block(1);
    if (!row || row->is_ipc || !has_context())
        return 0;
    write_content(row->address, row->bytes, &row->holds);
    return 1;
}

static int read_block(void) {
    block *row = some_block(1);
    if (!row || !has_context())
        return 0;
    if (row->is_ipc)
        check_stamp(row->address);
    else
        check_content(row->address, row->bytes, &row->holds);
    return 1;
}

static int copy_block(void) {
    block *from = some_block(1), *to = some_block(1);
    if (!from || !to || from == to || to->is_ipc || from->is_ipc || !from->holds.is_known || !has_context())
        return 0;
    content copied = from->holds;
    if (to->bytes < STAMP_BYTES + copied.bytes)
        return 0;
    settle_streams();
    copied.offset = STAMP_BYTES + chance(to->bytes - STAMP_BYTES - copied.bytes + 1);
    copied.is_known = did(cuMemcpyDtoD_v2(to->address + copied.offset, from->address + from->holds.offset,
                                          copied.bytes));
    to->holds = copied;
    return copied.is_known;
}

static int ask_about_block(void) {
    block *row = some_block(1);
    CUdeviceptr base;
    size_t bytes;
    int device;
    uint64_t last = row && row->bytes ? row->bytes - 1 : 0;
    if (!row || !did(cuMemGetAddressRange_v2(&base, &bytes, row->address + last)))
        return 0;
    if (row->is_ipc && !row->bytes)
        row->bytes = bytes;
    if (base != row->address || bytes != row->bytes)
        fail("the range of a block of %llu bytes at %llx%s is %zu bytes at %llx", (unsigned long long)row->bytes,
             (unsigned long long)row->address, row->is_ipc ? ", from another process," : "", bytes,
             (unsigned long long)base);
    if (did(cuPointerGetAttribute(&device, 9, row->address)) && device != row->device && !row->is_ipc)
        fail("a block lies on GPU %d instead of %d", device, row->device);
    return 1;
}

/* What must be refused: too much, nothing, what is not there. */
static int misuse_memory(void) {
    CUdeviceptr address;
    size_t pitch;
    if (!has_context())
        return 0;
    switch (chance(6)) {
    case 0: return refused(cuMemAlloc_v2(&address, UINT64_MAX - chance(4 * MIB)), CUDA_ERROR_OUT_OF_MEMORY);
    case 1: return refused(cuMemAlloc_v2(&address, 0), CUDA_ERROR_INVALID_VALUE);
    case 2: return refused(cuMemFree_v2((CUdeviceptr)self.scratch), CUDA_ERROR_INVALID_VALUE);
    case 3:
        return refused(cuMemAllocPitch_v2(&address, &pitch, 1ull << 40, 1ull << 40, 4), CUDA_ERROR_OUT_OF_MEMORY);
    case 4: return refused(cuIpcCloseMemHandle(4096), CUDA_ERROR_INVALID_VALUE);
    default: return refused(cuMemAlloc_v2(&address, 1ull << 50), CUDA_ERROR_OUT_OF_MEMORY);
    }
}

/* ---- IPC ---- */

static int share_block(void) {
    block *row = some_block(1);
    CUipcMemHandle token;
    if (!row || row->is_ipc || row->bytes < STAMP_BYTES || !has_context())
        return 0;
    if (!row->is_shared)
        stamp(row->address);
    row->is_shared = self.has_shared = 1;
    if (!did(cuIpcGetMemHandle(&token, row->address)))
        return 0;
    token_slot *slot = &shared->tokens[chance(TOKEN_MAX)];
    uint32_t version = __atomic_load_n(&slot->version, __ATOMIC_ACQUIRE);
    if (version % 2 || !__atomic_compare_exchange_n(&slot->version, &version, version + 1, 0, __ATOMIC_ACQ_REL,
                                                    __ATOMIC_RELAXED))
        return 0;
    memcpy(slot->bytes, token.bytes, sizeof slot->bytes);
    __atomic_store_n(&slot->version, version + 2, __ATOMIC_RELEASE);
    return 1;
}

static int open_token(void) {
    const token_slot *slot = &shared->tokens[chance(TOKEN_MAX)];
    block *row = some_block(0);
    CUipcMemHandle token;
    CUdeviceptr address;
    uint32_t version = __atomic_load_n(&slot->version, __ATOMIC_ACQUIRE);
    if (!row || !has_context() || version % 2 || !version)
        return 0;
    memcpy(token.bytes, slot->bytes, sizeof slot->bytes);
    if (__atomic_load_n(&slot->version, __ATOMIC_ACQUIRE) != version)
        return 0;
    CUresult result = cuIpcOpenMemHandle_v2(&address, token, 1);
    if (result == CUDA_ERROR_INVALID_VALUE || !did(result)) /* freed meanwhile, or our own */
        return 0;
    *row = (block){.address = address, .is_ipc = 1, .device = -1};
    return 1;
}

/* ---- pools and pinned memory ---- */

static int make_or_end_pool(void) {
    CUmemPoolProps wanted = {.allocType = 1, .location = {CU_MEM_LOCATION_DEVICE, (int)chance(GPU_MAX)}};
    if (!self.pool_is_made)
        return self.pool_is_made = did(cuMemPoolCreate(&self.pool, &wanted));
    if (!did(cuMemPoolDestroy(self.pool)))
        return 0;
    self.pool_is_made = 0;
    return 1;
}

static int pin_or_unpin(void) {
    if (!has_context())
        return 0;
    settle_streams();
    if (chance(2)) {
        CUresult result = self.is_pinned ? cuMemFreeHost(self.pinned)
                                         : cuMemHostAlloc((void **)&self.pinned, BUFFER_BYTES, 0);
        if (!did(result))
            return 0;
        self.is_pinned = !self.is_pinned;
        return 1;
    }
    if (!did(self.is_registered ? cuMemHostUnregister(self.registered)
                                : cuMemHostRegister_v2(self.registered, BUFFER_BYTES, 0)))
        return 0;
    self.is_registered = !self.is_registered;
    return 1;
}

const operation_kind memory_operations[] = {
    {"retain a context", retain, 30},
    {"release or reset a context", release_or_reset, 3},
    {"create or destroy a context", create_or_destroy, 6},
    {"allocate", allocate, 70},
    {"free", free_some, 60},
    {"write", write_block, 60},
    {"read", read_block, 80},
    {"copy on the device", copy_block, 25},
    {"ask about a block", ask_about_block, 20},
    {"misuse memory", misuse_memory, 10},
    {"share a block", share_block, 20},
    {"open a token", open_token, 25},
    {"make or end a pool", make_or_end_pool, 5},
    {"pin or unpin", pin_or_unpin, 10},
    {0},
};

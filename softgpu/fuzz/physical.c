/* Chunks, reservations, mappings, and descriptors that travel. */
#define _GNU_SOURCE
#include "worker.h"

#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static chunk *some_chunk(int is_used) {
    int first = (int)chance(CHUNK_LIMIT);
    for (int i = 0; i < CHUNK_LIMIT; i++) {
        chunk *candidate = &self.chunks[(first + i) % CHUNK_LIMIT];
        if ((candidate->value || candidate->mappings) == is_used)
            return candidate;
    }
    return NULL;
}

static CUmemAllocationProp properties(int device) {
    return (CUmemAllocationProp){.type = CU_MEM_ALLOCATION_PINNED,
                                 .requestedHandleTypes = CU_MEM_HANDLE_POSIX_FD,
                                 .location = {CU_MEM_LOCATION_DEVICE, device}};
}

static int create(void) {
    chunk *row = some_chunk(0);
    int device = (int)chance(GPU_MAX);
    uint64_t bytes = 2 * MIB * (1 + chance(3));
    CUmemAllocationProp wanted = properties(device);
    CUmemGenericAllocationHandle value;
    if (!row || !got_memory(cuMemCreate(&value, bytes, &wanted, 0)))
        return 0;
    *row = (chunk){.value = value, .bytes = bytes, .device = device};
    return 1;
}

static int release(void) {
    chunk *row = some_chunk(1);
    if (!row || !row->value || !did(cuMemRelease(row->value)))
        return 0;
    row->value = 0;
    return 1;
}

static int reserve(void) {
    for (int i = 0; i < RANGE_MAX; i++) {
        range *row = &self.ranges[i];
        if (row->base)
            continue;
        int slots = 1 + (int)chance(RANGE_SLOTS);
        CUdeviceptr base;
        if (!did(cuMemAddressReserve(&base, (uint64_t)slots * 2 * MIB, chance(2) ? 0 : 4 * MIB, 0, 0)))
            return 0;
        *row = (range){.base = base, .slots = slots};
        return 1;
    }
    return 0;
}

static range *some_range(void) {
    range *row = &self.ranges[chance(RANGE_MAX)];
    return row->base ? row : NULL;
}

static int is_empty(const range *row) {
    for (int i = 0; i < row->slots; i++)
        if (row->mapped[i])
            return 0;
    return 1;
}

static int give_back(void) {
    range *row = some_range();
    if (!row)
        return 0;
    if (!is_empty(row))
        return refused(cuMemAddressFree(row->base, (uint64_t)row->slots * 2 * MIB), CUDA_ERROR_INVALID_VALUE);
    if (!did(cuMemAddressFree(row->base, (uint64_t)row->slots * 2 * MIB)))
        return 0;
    row->base = 0;
    return 1;
}

static int slots_of(const chunk *row) { return (int)(row->bytes / (2 * MIB)); }

static int fits(const range *row, int slot, int slots) {
    if (slot + slots > row->slots)
        return 0;
    for (int i = slot; i < slot + slots; i++)
        if (row->mapped[i])
            return 0;
    return 1;
}

static int map(void) {
    range *row = some_range();
    chunk *mapped = some_chunk(1);
    if (!row || !mapped || !mapped->value)
        return 0;
    int slot = (int)chance((uint64_t)row->slots), slots = slots_of(mapped);
    CUdeviceptr address = row->base + (uint64_t)slot * 2 * MIB;
    CUresult result = cuMemMap(address, mapped->bytes, 0, mapped->value, 0);
    if (!fits(row, slot, slots))
        return refused(result, CUDA_ERROR_INVALID_VALUE);
    if (!did(result))
        return 0;
    for (int i = slot; i < slot + slots; i++)
        row->mapped[i] = (int)(mapped - self.chunks) + 1;
    mapped->mappings++;
    CUmemAccessDesc right = {{CU_MEM_LOCATION_DEVICE, mapped->device}, CU_MEM_ACCESS_READWRITE};
    int tries = 0;
    while (!did(cuMemSetAccess(address, mapped->bytes, &right, 1)) && ++tries < 200)
        usleep(1000); /* injected failures end, and lost devices come back */
    return 1;
}

/* The first slot of the mapping that covers a random slot; -1: nothing there. */
static int some_mapping(const range *row) {
    int slot = (int)chance((uint64_t)row->slots);
    if (!row->mapped[slot])
        return -1;
    int first = 0;
    while (first < row->slots) { /* mappings of one chunk may stand side by side */
        int slots = row->mapped[first] ? slots_of(&self.chunks[row->mapped[first] - 1]) : 1;
        if (slot < first + slots)
            return first;
        first += slots;
    }
    return -1;
}

static int unmap_at(range *row, int slot) {
    chunk *mapped = &self.chunks[row->mapped[slot] - 1];
    int slots = slots_of(mapped);
    settle_streams();
    if (!did(cuMemUnmap(row->base + (uint64_t)slot * 2 * MIB, mapped->bytes)))
        return 0;
    memset(&row->mapped[slot], 0, (size_t)slots * sizeof *row->mapped);
    mapped->mappings--;
    return 1;
}

static int unmap(void) {
    range *row = some_range();
    int slot = row ? some_mapping(row) : -1;
    return slot < 0 ? 0 : unmap_at(row, slot);
}

static int is_writable(CUdeviceptr address, int device) {
    unsigned long long flags = 0;
    CUmemLocation at = {CU_MEM_LOCATION_DEVICE, device};
    return did(cuMemGetAccess(&flags, &at, address)) && flags == CU_MEM_ACCESS_READWRITE;
}

static int touch(void) {
    range *row = some_range();
    int slot = row ? some_mapping(row) : -1;
    CUcontext now = NULL;
    if (slot < 0 || !did(cuCtxGetCurrent(&now)) || !now)
        return 0;
    chunk *mapped = &self.chunks[row->mapped[slot] - 1];
    CUdeviceptr address = row->base + (uint64_t)slot * 2 * MIB;
    if (!is_writable(address, mapped->device))
        return 0;
    if (mapped->is_imported)
        check_stamp(address);
    else if (!mapped->is_shared && chance(4) == 0)
        stamp(address);
    else if (chance(2))
        write_content(address, mapped->bytes, &mapped->holds);
    else
        check_content(address, mapped->bytes, &mapped->holds);
    return 1;
}

static int retain_again(void) {
    range *row = some_range();
    int slot = row ? some_mapping(row) : -1;
    CUmemGenericAllocationHandle value;
    if (slot < 0)
        return 0;
    chunk *mapped = &self.chunks[row->mapped[slot] - 1];
    if (!did(cuMemRetainAllocationHandle(&value, (void *)(row->base + (uint64_t)slot * 2 * MIB))))
        return 0;
    if (!mapped->value) {
        mapped->value = value;
        return 1;
    }
    int tries = 0;
    while (!did(cuMemRelease(value)) && ++tries < 200)
        usleep(1000);
    return 1;
}

static int misuse_chunks(void) {
    CUmemAllocationProp wanted = properties(0);
    CUmemGenericAllocationHandle value;
    CUdeviceptr base;
    switch (chance(6)) {
    case 0: return refused(cuMemRelease(0x5347000000000000ull + chance(100)), CUDA_ERROR_INVALID_VALUE);
    case 1: return refused(cuMemCreate(&value, 2 * MIB + 1, &wanted, 0), CUDA_ERROR_INVALID_VALUE);
    case 2: return refused(cuMemCreate(&value, 1ull << 63, &wanted, 0), CUDA_ERROR_OUT_OF_MEMORY);
    case 3:
        return refused(cuMemAddressReserve(&base, 0 - 2 * MIB, 4 * MIB, 0, 0), CUDA_ERROR_OUT_OF_MEMORY);
    case 4: return refused(cuMemUnmap(1ull << 40, 2 * MIB), CUDA_ERROR_INVALID_VALUE);
    default: return refused(cuMemUnmap(0 - 2 * MIB, 4 * MIB), CUDA_ERROR_INVALID_VALUE);
    }
}

/* ---- descriptors ---- */

static int send_descriptor(int descriptor) {
    char byte = 'x';
    char room[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec part = {&byte, 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof room};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(header), &descriptor, sizeof descriptor);
    return sendmsg(shared->exchange[0], &message, MSG_DONTWAIT) == 1;
}

static int receive_descriptor(void) {
    char byte;
    char room[CMSG_SPACE(sizeof(int))];
    struct iovec part = {&byte, 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof room};
    int descriptor = -1;
    if (recvmsg(shared->exchange[1], &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC) != 1)
        return -1;
    const struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    if (header && header->cmsg_type == SCM_RIGHTS)
        memcpy(&descriptor, CMSG_DATA(header), sizeof descriptor);
    return descriptor;
}

/* Only what is mapped can be stamped; what is shared unstamped reads as dirt. */
static int export_chunk(void) {
    chunk *row = some_chunk(1);
    int descriptor;
    if (!row || !row->value)
        return 0;
    if (!did(cuMemExportToShareableHandle(&descriptor, row->value, CU_MEM_HANDLE_POSIX_FD, 0)))
        return 0;
    row->is_shared = self.has_shared = 1;
    int is_sent = send_descriptor(descriptor);
    close(descriptor);
    return is_sent;
}

static int import_chunk(void) {
    chunk *row = some_chunk(0);
    CUmemGenericAllocationHandle value;
    CUmemAllocationProp found;
    int descriptor = row ? receive_descriptor() : -1;
    if (descriptor < 0)
        return 0;
    CUresult result = cuMemImportFromShareableHandle(&value, (void *)(intptr_t)descriptor, CU_MEM_HANDLE_POSIX_FD);
    close(descriptor);
    if (!did(result))
        return 0;
    if (!did(cuMemGetAllocationPropertiesFromHandle(&found, value)))
        found.location.id = 0;
    /* Its size is not asked for: the smallest that there is can always be mapped. */
    *row = (chunk){.value = value, .bytes = 2 * MIB, .device = found.location.id, .is_imported = 1};
    return 1;
}

/* ---- the end ---- */

static int again(CUresult (*call)(CUdeviceptr, size_t), CUdeviceptr address, size_t bytes) {
    for (int i = 0; i < 2000; i++) {
        if (did(call(address, bytes)))
            return 1;
        usleep(1000);
    }
    return 0;
}

static CUresult release_value(CUdeviceptr value, size_t bytes) {
    (void)bytes;
    return cuMemRelease(value);
}

static CUresult free_at(CUdeviceptr index, size_t bytes) {
    (void)bytes;
    return free_block(&self.blocks[index]) ? CUDA_SUCCESS : CUDA_ERROR_UNKNOWN;
}

static CUresult drop_context(CUdeviceptr device, size_t bytes) {
    (void)bytes;
    return cuDevicePrimaryCtxRelease_v2((int)device);
}

static CUresult destroy_context(CUdeviceptr context, size_t bytes) {
    (void)bytes;
    return cuCtxDestroy_v2((CUcontext)context);
}

/* Memory that was shared may live on and stays charged to its maker; without that nothing may be left. */
static void expect_no_charge(void) {
    nvmlProcessInfo list[64];
    for (int d = 0; d < GPU_MAX && !self.has_shared; d++) {
        unsigned count = 64;
        if (!answered(nvmlDeviceGetComputeRunningProcesses_v3(self.gpus[d], &count, list)))
            continue;
        for (unsigned i = 0; i < count; i++)
            if (list[i].pid == (unsigned)getpid())
                fail("%llu bytes are left on GPU %d after an orderly end", list[i].usedGpuMemory, d);
    }
}

static int unmap_all(range *row) {
    int is_done = 1;
    for (int slot = 0; slot < row->slots;) {
        const chunk *mapped = row->mapped[slot] ? &self.chunks[row->mapped[slot] - 1] : NULL;
        if (mapped)
            is_done &= again(cuMemUnmap, row->base + (uint64_t)slot * 2 * MIB, mapped->bytes);
        slot += mapped ? slots_of(mapped) : 1;
    }
    return is_done & again(cuMemAddressFree, row->base, (uint64_t)row->slots * 2 * MIB);
}

int end_orderly(void) {
    now_doing("end in order");
    settle_streams();
    int is_done = 1;
    for (int i = 0; i < BLOCK_MAX; i++)
        if (self.blocks[i].address)
            is_done &= again(free_at, (CUdeviceptr)i, 0);
    for (int i = 0; i < RANGE_MAX; i++)
        if (self.ranges[i].base)
            is_done &= unmap_all(&self.ranges[i]);
    for (int i = 0; i < CHUNK_LIMIT; i++)
        if (self.chunks[i].value)
            is_done &= again(release_value, self.chunks[i].value, 0);
    if (self.created)
        is_done &= again(destroy_context, (CUdeviceptr)self.created, 0);
    for (int d = 0; d < GPU_MAX; d++)
        if (self.primary[d])
            is_done &= again(drop_context, (CUdeviceptr)d, 0);
    if (is_done)
        expect_no_charge();
    return is_done;
}

const operation_kind physical_operations[] = {
    {"create a chunk", create, 60},
    {"release a chunk", release, 50},
    {"reserve addresses", reserve, 25},
    {"give addresses back", give_back, 15},
    {"map", map, 70},
    {"unmap", unmap, 45},
    {"touch a mapping", touch, 70},
    {"retain by address", retain_again, 15},
    {"misuse chunks", misuse_chunks, 10},
    {"export a chunk", export_chunk, 25},
    {"import a chunk", import_chunk, 25},
    {0},
};

/* Physical device memory: its rows, its files, and how long it lives.
 *
 * A chunk is a sparse file. Everyone who can still reach it (an allocation, a handle, a mapping, an exported
 * descriptor, a descriptor waiting in a socket) does so through an open description with a shared flock. When
 * an exclusive flock succeeds, nobody can reach it any more and it is freed. That is CUDA's own rule: memory
 * outlives its creator exactly while somebody can map it.
 *
 * Order of writes: the row is complete before the file appears, and the file is gone before the row is free.
 * A death in between leaves a row without a file, which the next reaper frees.
 */
#define _GNU_SOURCE
#include "chunk_file.h"
#include "host.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

static void chunk_path(char *path, size_t size, uint64_t id) {
    char name[32];
    snprintf(name, sizeof name, "c%llu", (unsigned long long)id);
    host_path(path, size, name);
}

int chunk_fits(int device_index, uint64_t bytes) {
    const device *gpu = &host->devices[device_index];
    uint64_t taken_bytes = gpu->used_bytes + gpu->reserved_bytes;
    return taken_bytes <= gpu->total_bytes && bytes <= gpu->total_bytes - taken_bytes;
}

int chunk_device(const chunk_record *chunk) {
    if (chunk->owner == CHUNK_UNOWNED)
        return (int)chunk->device;
    return process_device(&host->processes[chunk->owner], (int)chunk->ordinal);
}

int chunk_is_on_device(const chunk_record *chunk) {
    return chunk->owner == CHUNK_UNOWNED || !process_is_away(&host->processes[chunk->owner]);
}

/* The device first: it counts only once there is no owner. */
void chunk_disown(chunk_record *chunk) {
    int index = chunk_device(chunk), was_counted = chunk_is_on_device(chunk);
    chunk->device = (uint32_t)index;
    __atomic_store_n(&chunk->owner, CHUNK_UNOWNED, __ATOMIC_RELEASE);
    if (!was_counted)
        host->devices[index].used_bytes += chunk->bytes;
}

int chunk_reserve(int device_index, process_record *process, uint64_t bytes) {
    if (!group_admits(process, device_index, bytes)) {
        host_reap(); /* a dead member of the group may still be charged */
        if (!group_admits(process, device_index, bytes))
            return 0;
    }
    if (chunk_fits(device_index, bytes))
        return 1;
    host_reap();
    return chunk_fits(device_index, bytes) || mps_make_room(process, device_index, bytes);
}

static int free_row(void) {
    for (uint32_t step = 0; step < CHUNK_MAX; step++) {
        uint32_t i = (host->chunk_next + step) % CHUNK_MAX;
        if (!host->chunks[i].is_used)
            return (int)i;
    }
    return -1;
}

/* The shared flock keeps the chunk alive; the lock on the holder's byte tells who it is. */
static int hold(int descriptor, int holder) {
    struct flock byte = {.l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = holder, .l_len = 1};
    return flock(descriptor, LOCK_SH) || fcntl(descriptor, F_OFD_SETLK, &byte) ? -1 : 0;
}

static int create_file(chunk_record *chunk, int index) {
    char path[320];
    struct stat status;
    chunk_path(path, sizeof path, chunk->id);
    int descriptor = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (descriptor < 0)
        return -1;
    if (chunk_file_format(descriptor, index, chunk->id, chunk->bytes) || fstat(descriptor, &status) ||
        hold(descriptor, chunk->owner)) {
        close(descriptor);
        unlink(path);
        return -1;
    }
    chunk->inode = status.st_ino;
    return descriptor;
}

int chunk_create(int ordinal, uint64_t bytes, int owner, int *descriptor) {
    process_record *process = &host->processes[owner];
    int device_index = process_device(process, ordinal);
    group_refresh(process);
    if (!chunk_reserve(device_index, process, bytes))
        return CHUNK_NO_ROOM;
    int index = free_row();
    if (index < 0)
        return CHUNK_OS_ERROR;
    chunk_record *chunk = &host->chunks[index];
    *chunk = (chunk_record){
        .ordinal = (uint32_t)ordinal, .owner = owner, .bytes = bytes, .id = ++host->last_chunk_id};
    __atomic_store_n(&chunk->is_used, 1, __ATOMIC_RELEASE);
    if ((uint32_t)index >= host->chunk_end)
        host->chunk_end = (uint32_t)index + 1;
    *descriptor = create_file(chunk, index);
    if (*descriptor < 0) {
        __atomic_store_n(&chunk->is_used, 0, __ATOMIC_RELEASE);
        return CHUNK_OS_ERROR;
    }
    host->chunk_next = (uint32_t)index + 1;
    host->devices[device_index].used_bytes += bytes;
    process->charged_bytes[ordinal] += bytes;
    return index;
}

int chunk_open(int index, int holder) {
    char path[320];
    chunk_path(path, sizeof path, host->chunks[index].id);
    int descriptor = open(path, O_RDWR | O_CLOEXEC);
    if (descriptor < 0)
        return -1;
    host->chunks[index].was_shared |= holder != host->chunks[index].owner;
    hold(descriptor, holder);
    return descriptor;
}

int chunk_is_held_by(const chunk_record *chunk, int first_holder, int end_holder) {
    char path[320];
    struct flock bytes = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = first_holder};
    bytes.l_len = end_holder - first_holder;
    if (!bytes.l_len) /* which would mean: to the end */
        return 0;
    chunk_path(path, sizeof path, chunk->id);
    int descriptor = open(path, O_RDWR | O_CLOEXEC);
    if (descriptor < 0)
        return 0;
    int is_held = !fcntl(descriptor, F_OFD_GETLK, &bytes) && bytes.l_type != F_UNLCK;
    close(descriptor);
    return is_held;
}

int chunk_of_descriptor(int descriptor) {
    struct stat status;
    chunk_footer footer;
    if (fstat(descriptor, &status) || chunk_file_identify(descriptor, (uint64_t)status.st_size, &footer))
        return -1;
    if (footer.index >= CHUNK_MAX)
        return -1;
    const chunk_record *chunk = &host->chunks[footer.index];
    int is_same = chunk->is_used && chunk->id == footer.id && chunk->inode == status.st_ino;
    return is_same ? (int)footer.index : -1;
}

static int is_held(const chunk_record *chunk) {
    char path[320];
    chunk_path(path, sizeof path, chunk->id);
    int descriptor = open(path, O_RDWR | O_CLOEXEC);
    if (descriptor < 0)
        return 0;
    int held = flock(descriptor, LOCK_EX | LOCK_NB) != 0;
    close(descriptor);
    return held;
}

static void destroy(chunk_record *chunk) {
    char path[320];
    chunk_path(path, sizeof path, chunk->id);
    unlink(path);
    __atomic_store_n(&chunk->is_used, 0, __ATOMIC_RELEASE);
    if (chunk_is_on_device(chunk))
        host->devices[chunk_device(chunk)].used_bytes -= chunk->bytes;
    if (chunk->owner != CHUNK_UNOWNED)
        host->processes[chunk->owner].charged_bytes[chunk->ordinal] -= chunk->bytes;
    if (chunk->is_detached)
        host->detached_count--;
    host->chunk_next = (uint32_t)(chunk - host->chunks);
}

void chunk_settle(int index) {
    chunk_record *chunk = &host->chunks[index];
    if (!is_held(chunk)) {
        destroy(chunk);
    } else if (!chunk->is_detached) {
        chunk->is_detached = 1;
        host->detached_count++;
    }
}

void chunk_let_go(int index, int owner) {
    const chunk_record *chunk = &host->chunks[index];
    if (chunk->is_used && (chunk->owner == owner || chunk->is_detached))
        chunk_settle(index);
}

/* Damage on purpose, so that a test sees the check find it. */
#include "fuzz.h"

#include "../src/host.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <linux/futex.h>
#include <sys/wait.h>
#include <unistd.h>

static chunk_record *some_chunk(void) {
    for (uint32_t i = 0; i < CHUNK_MAX; i++)
        if (host->chunks[i].is_used)
            return &host->chunks[i];
    return NULL;
}

static process_record *some_process(void) {
    for (int i = 0; i < PROCESS_MAX; i++)
        if (host->processes[i].is_used)
            return &host->processes[i];
    return NULL;
}

static void chunk_file_path(char *path, size_t size, const chunk_record *chunk) {
    char name[32];
    snprintf(name, sizeof name, "c%llu", (unsigned long long)chunk->id);
    host_path(path, size, name);
}

static void remove_file(chunk_record *chunk) {
    char path[320];
    chunk_file_path(path, sizeof path, chunk);
    unlink(path);
}

static void add_file(void) {
    char path[320];
    host_path(path, sizeof path, "c999999");
    close(open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666));
}

static void copy_chunk(const chunk_record *chunk) {
    host->chunks[host->chunk_end] = *chunk;
    host->chunk_end++;
    host->devices[chunk_device(chunk)].used_bytes += chunk->bytes;
    host->processes[chunk->owner].charged_bytes[chunk->ordinal] += chunk->bytes;
}

static void add_group(const char *name, uint64_t soft_bytes, uint64_t hard_bytes) {
    group_set(group_key_of_name(name), name, 0, soft_bytes, hard_bytes);
}

static void add_shared_event(uint32_t holder, uint64_t id) {
    shared_event *event = &host->shared_events[7];
    *event = (shared_event){.is_used = 1, .id = id};
    event->holders[holder / 64] = 1ull << holder % 64;
    host->last_shared_event_id = 5;
}

#define KINDS(ROW)                                                                                \
    ROW("used", host->devices[0].used_bytes += 4096)                                              \
    ROW("capacity", host->devices[0].total_bytes = host->devices[0].used_bytes - 1)               \
    ROW("charged", process->charged_bytes[0] -= 512)                                              \
    ROW("context", process->context_bytes[0] = 1)                                                 \
    ROW("chunk-bytes", chunk->bytes *= 2)                                                         \
    ROW("chunk-owner", chunk->owner = PROCESS_MAX - 1)                                            \
    ROW("chunk-device", chunk->ordinal = DEVICE_MAX - 1)                                          \
    ROW("checkpointer", process->checkpointer = PROCESS_MAX - 1)                                  \
    ROW("placement", process->placement = PLACEMENT_AWAY)                                         \
    ROW("gate", process->gate = 1)                                                                \
    ROW("device-map", process->device_maps[0][0] = process->device_maps[0][1])                    \
    ROW("calls", process->active_calls++)                                                         \
    ROW("chunk-unowned", chunk->owner = CHUNK_UNOWNED)                                            \
    ROW("chunk-id", chunk->id = host->last_chunk_id + 7)                                          \
    ROW("chunk-twice", copy_chunk(chunk))                                                         \
    ROW("chunk-gone", memset(chunk, 0, sizeof *chunk))                                            \
    ROW("chunk-end", host->chunk_end = 0)                                                         \
    ROW("inode", chunk->inode++)                                                                  \
    ROW("detached", host->detached_count++)                                                       \
    ROW("process-gone", memset(process, 0, sizeof *process))                                      \
    ROW("group-end", (add_group("a", 1, 2), host->group_end = 0))                                 \
    ROW("group-twice", (add_group("a", 1, 2), add_group("b", 1, 2), host->groups[1].key = host->groups[0].key)) \
    ROW("group-order", (add_group("a", 1, 2), host->groups[0].soft_bytes[0] = 3))                 \
    ROW("cgroups", host->cgroup_count++)                                                          \
    ROW("event-holder", add_shared_event(PROCESS_MAX - 1, 5))                                     \
    ROW("event-alone", (add_shared_event(0, 5), host->shared_events[7].holders[0] = 0))           \
    ROW("event-id", add_shared_event(0, 6))                                                       \
    ROW("faults", host->fault_count++)                                                            \
    ROW("file-gone", remove_file(chunk))                                                          \
    ROW("file-left", add_file())

#define KIND_NAME(name, action) name,
static const char *const kinds[] = {KINDS(KIND_NAME)};

const char *plant_kind(int index) {
    return index < (int)(sizeof kinds / sizeof *kinds) ? kinds[index] : NULL;
}

/* What is left when a process is killed that was just woken to take the lock: nobody holds it, and the next one
 * in the queue sleeps. */
int lose_wakeup(void) {
    int *word = &host->mutex.__data.__lock;
    host_lock();
    pid_t waiter = start_child();
    if (!waiter) {
        host_lock();
        host_unlock();
        _exit(0);
    }
    while (!(__atomic_load_n(word, __ATOMIC_ACQUIRE) & (int)FUTEX_WAITERS))
        usleep(1000);
    usleep(20000); /* until it sleeps */
    __atomic_store_n(word, 0, __ATOMIC_RELEASE);
    for (int i = 0; i < 2000; i++) {
        if (waitpid(waiter, NULL, WNOHANG) == waiter)
            return 0;
        usleep(1000);
    }
    kill(waiter, SIGKILL);
    fprintf(stderr, "softgpu-fuzz: a process sleeps beside an open lock\n");
    return 1;
}

#define KIND_DO(name, action)   \
    if (!strcmp(kind, name)) {  \
        action;                 \
        is_done = 1;            \
    }

int plant(const char *kind) {
    int is_done = 0;
    host_lock();
    chunk_record *chunk = some_chunk();
    process_record *process = some_process();
    if (chunk && process) {
        KINDS(KIND_DO)
    }
    host_unlock();
    if (!is_done)
        fprintf(stderr, "softgpu-fuzz: cannot plant %s\n", kind);
    return is_done ? 0 : 1;
}

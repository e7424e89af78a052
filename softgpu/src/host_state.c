/* Finding, mapping and locking the shared state. */
#include "host.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define LOCK_SLEEP_NS 50000000

host_state *host;

static char directory[256];
static pthread_mutex_t attaching = PTHREAD_MUTEX_INITIALIZER;

uint64_t round_up(uint64_t value, uint64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

const char *host_directory(void) {
    const char *named = getenv("SOFTGPU_DIR");
    if (!directory[0])
        snprintf(directory, sizeof directory, "%s", named && *named ? named : "/dev/shm/softgpu");
    return directory;
}

void host_path(char *path, size_t size, const char *name) {
    snprintf(path, size, "%s/%s", host_directory(), name);
}

/* The state file is renamed into place complete, so whoever can open it may use it. */
static host_state *map_state(void) {
    char path[320];
    host_path(path, sizeof path, "state");
    int descriptor = open(path, O_RDWR | O_CLOEXEC);
    if (descriptor < 0)
        return NULL;
    struct stat status;
    void *mapped = MAP_FAILED;
    if (!fstat(descriptor, &status) && status.st_size == (off_t)sizeof(host_state))
        mapped = mmap(NULL, sizeof(host_state), PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    close(descriptor);
    if (mapped == MAP_FAILED)
        return NULL;
    host_state *state = mapped;
    if (state->magic == HOST_MAGIC && state->bytes == sizeof(host_state))
        return state;
    munmap(mapped, sizeof(host_state));
    return NULL;
}

int host_attach(void) {
    pthread_mutex_lock(&attaching);
    if (!host) {
        host_state *found = map_state();
        if (found && process_attach() == 0) {
            host = found;
        } else {
            fprintf(stderr,
                    "softgpu: no host at %s (create one with softgpu.Host or python -m softgpu create)\n",
                    host_directory());
            if (found)
                munmap(found, sizeof *found);
            directory[0] = 0; /* the next attempt reads SOFTGPU_DIR again */
        }
    }
    pthread_mutex_unlock(&attaching);
    return host ? 0 : -1;
}

void host_prepare_mutex(host_state *fresh) {
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(&fresh->mutex, &attributes);
    pthread_mutexattr_destroy(&attributes);
}

static void recount_chunks(void) {
    host->detached_count = 0;
    host->chunk_end = 0;
    for (uint32_t i = 0; i < CHUNK_MAX; i++) {
        const chunk_record *chunk = &host->chunks[i];
        if (!chunk->is_used)
            continue;
        host->chunk_end = i + 1;
        if (chunk_is_on_device(chunk))
            host->devices[chunk_device(chunk)].used_bytes += chunk->bytes;
        host->detached_count += chunk->is_detached || chunk->owner == CHUNK_UNOWNED;
        if (chunk->owner != CHUNK_UNOWNED)
            host->processes[chunk->owner].charged_bytes[chunk->ordinal] += chunk->bytes;
    }
}

static void recount_process(process_record *process) {
    for (uint32_t d = 0; d < host->device_count; d++) {
        process->charged_bytes[d] = 0;
        if (process->is_used && !process_is_away(process))
            host->devices[process_device(process, (int)d)].used_bytes += process->context_bytes[d];
    }
    if (process->is_used)
        gate_set(process);
}

/* Somebody died inside the lock: the rows are true (see the order of writes in host_chunk.c), the sums may
 * not be. */
static void host_recount(void) {
    for (uint32_t d = 0; d < host->device_count; d++)
        host->devices[d].used_bytes = 0;
    for (int p = 0; p < PROCESS_MAX; p++)
        recount_process(&host->processes[p]);
    recount_chunks();
    group_recount();
    host->fault_count = 0;
    for (int f = 0; f < FAULT_MAX; f++)
        host->fault_count += host->faults[f].function[0] != 0;
}

/* Whoever is woken to take the lock and is killed first takes the wake-up with it, and the others would sleep
 * beside an open lock until somebody new comes. So nobody sleeps for long. */
static int lock_in_pieces(void) {
    int result = pthread_mutex_trylock(&host->mutex);
    while (result == EBUSY || result == ETIMEDOUT) {
        struct timespec until;
        clock_gettime(CLOCK_REALTIME, &until); /* the only clock that every C library has for this */
        until.tv_nsec += LOCK_SLEEP_NS;
        until.tv_sec += until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        result = pthread_mutex_timedlock(&host->mutex, &until);
    }
    return result;
}

void host_lock(void) {
    if (lock_in_pieces() != EOWNERDEAD)
        return;
    pthread_mutex_consistent(&host->mutex);
    host->recovery_count++;
    host_recount();
}

void host_unlock(void) { pthread_mutex_unlock(&host->mutex); }

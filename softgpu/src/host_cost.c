/* How long calls take. The numbers are settings (softgpu/profiles.toml); this file only keeps to them. */
#define _GNU_SOURCE
#include "host.h"

#include <errno.h>
#include <time.h>

const char *const call_names[CALL_COUNT] = {
    [CALL_CONTEXT_CREATE] = "context_create",
    [CALL_MEM_ALLOC] = "cuMemAlloc",
    [CALL_MEM_FREE] = "cuMemFree",
    [CALL_MEM_CREATE] = "cuMemCreate",
    [CALL_MEM_MAP] = "cuMemMap",
    [CALL_MEM_SET_ACCESS] = "cuMemSetAccess",
    [CALL_MEM_UNMAP] = "cuMemUnmap",
    [CALL_MEM_RELEASE] = "cuMemRelease",
    [CALL_HOST_ALLOC] = "cuMemHostAlloc",
    [CALL_HOST_REGISTER] = "cuMemHostRegister",
    [CALL_CHECKPOINT] = "checkpoint",
    [CALL_RESTORE] = "restore",
    [CALL_CHECKPOINT_MAP] = "checkpoint_map",
    [CALL_CHECKPOINT_COMPLETE] = "checkpoint_complete",
    [CALL_RESTORE_MAP] = "restore_map",
    [CALL_RESTORE_COMPLETE] = "restore_complete",
    [CALL_CHECKPOINT_LOCK] = "checkpoint_lock",
    [CALL_CHECKPOINT_UNLOCK] = "checkpoint_unlock",
};

/* A sleep wakes up late by about the thread's timer slack (50 us by default); the last bit is spun. */
#define SPIN_NS 60000ull

uint64_t clock_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

void sleep_until(uint64_t deadline_ns) {
    struct timespec until = {(time_t)(deadline_ns / 1000000000ull), (long)(deadline_ns % 1000000000ull)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) == EINTR) {
    }
}

/* Calls of some tens of microseconds must not turn into a hundred, so what a sleep cannot hit is spun. */
static void last_until(uint64_t deadline_ns) {
    if (clock_ns() + SPIN_NS < deadline_ns)
        sleep_until(deadline_ns - SPIN_NS);
    while (clock_ns() < deadline_ns) {
    }
}

static uint64_t by_size_ns(call kind, uint64_t bytes) {
    return (uint64_t)((double)bytes / (double)GIB * (double)host->costs[kind].gib_ns);
}

void pay(call kind, uint64_t started_ns, uint64_t bytes) {
    uint64_t lasting_ns = host->costs[kind].call_ns + by_size_ns(kind, bytes);
    if (lasting_ns)
        last_until(started_ns + lasting_ns);
}

void pay_for_size(call kind, uint64_t started_ns, uint64_t bytes) {
    uint64_t lasting_ns = by_size_ns(kind, bytes);
    if (lasting_ns)
        last_until(started_ns + lasting_ns);
}

/* Events that several processes use: rows in the host's table, held by processes, one bit each.
 *
 * Who waits for a record whose process has died waits no longer: its work on the device ended with it. */
#define _GNU_SOURCE
#include "host.h"

#include <linux/futex.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* The recorder may die instead of waking anybody, and somebody has to notice. */
static const struct timespec look_again = {.tv_nsec = 50000000};

static uint64_t bit(int process) { return 1ull << process % 64; }

int shared_event_create(int process) {
    for (int i = 0; i < SHARED_EVENT_MAX; i++) {
        shared_event *event = &host->shared_events[i];
        if (event->is_used)
            continue;
        memset(event, 0, sizeof *event);
        event->id = ++host->last_shared_event_id;
        event->recorder = process;
        event->holders[process / 64] = bit(process);
        __atomic_store_n(&event->is_used, 1, __ATOMIC_RELEASE);
        return i;
    }
    return -1;
}

int shared_event_join(int row, uint64_t id, int process) {
    shared_event *event = row >= 0 && row < SHARED_EVENT_MAX ? &host->shared_events[row] : NULL;
    if (!event || !event->is_used || event->id != id)
        return -1;
    event->holders[process / 64] |= bit(process);
    return 0;
}

static void free_when_alone(shared_event *event) {
    uint64_t left = 0;
    for (int i = 0; i < PROCESS_MAX / 64; i++)
        left |= event->holders[i];
    if (!left)
        __atomic_store_n(&event->is_used, 0, __ATOMIC_RELEASE);
}

void shared_event_leave(int row, int process) {
    shared_event *event = &host->shared_events[row];
    event->holders[process / 64] &= ~bit(process);
    free_when_alone(event);
}

static void pass(shared_event *event, uint64_t sequence) {
    uint64_t completed = __atomic_load_n(&event->completed, __ATOMIC_ACQUIRE);
    while (completed < sequence && !__atomic_compare_exchange_n(&event->completed, &completed, sequence, 0,
                                                                __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
    }
    __atomic_fetch_add(&event->passes, 1, __ATOMIC_RELEASE);
    syscall(SYS_futex, &event->passes, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

void shared_event_bury(const uint8_t *is_dead) {
    for (int i = 0; i < SHARED_EVENT_MAX; i++) {
        shared_event *event = &host->shared_events[i];
        if (event->is_used && is_dead[event->recorder])
            pass(event, event->recorded);
        for (int p = 0; p < PROCESS_MAX && event->is_used; p++)
            if (is_dead[p] && event->holders[p / 64] & bit(p))
                shared_event_leave(i, p);
        if (event->is_used) /* the last holder may have died while it left */
            free_when_alone(event);
    }
}

uint64_t shared_event_record(int row, int process) {
    shared_event *event = &host->shared_events[row];
    __atomic_store_n(&event->recorder, process, __ATOMIC_RELEASE);
    return __atomic_add_fetch(&event->recorded, 1, __ATOMIC_ACQ_REL);
}

void shared_event_complete(int row, uint64_t sequence) { pass(&host->shared_events[row], sequence); }

int shared_event_has_passed(int row, uint64_t sequence) {
    return __atomic_load_n(&host->shared_events[row].completed, __ATOMIC_ACQUIRE) >= sequence;
}

void shared_event_await(int row, uint64_t sequence) {
    shared_event *event = &host->shared_events[row];
    for (;;) {
        uint32_t passes = __atomic_load_n(&event->passes, __ATOMIC_ACQUIRE);
        if (shared_event_has_passed(row, sequence))
            return;
        syscall(SYS_futex, &event->passes, FUTEX_WAIT, passes, &look_again, NULL, 0);
        host_lock();
        host_reap();
        host_unlock();
    }
}

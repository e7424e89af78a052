/* The gate that every driver call of a process passes. While another process has it locked, the gate is shut
 * and calls wait at it, however long; what has passed is counted, so that the locker knows when all is quiet.
 *
 * Who closes the gate and then sees no active call, knows that none is under way: a call counts itself before
 * it looks at the gate. */
#define _GNU_SOURCE
#include "host.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* A wake-up is lost when the one who opened the gate dies before it calls, or who shut it dies and nobody else
 * calls the driver; so nobody sleeps for longer. */
static const struct timespec sleep_max = {.tv_nsec = 50000000};

static void look_after_locker(const process_record *process) {
    int by = __atomic_load_n(&process->checkpointer, __ATOMIC_RELAXED);
    if (by == NOBODY || process_pid(by) >= 0)
        return;
    host_lock();
    host_reap();
    host_unlock();
}

void gate_enter(process_record *process) {
    for (;;) {
        __atomic_fetch_add(&process->active_calls, 1, __ATOMIC_SEQ_CST);
        if (!__atomic_load_n(&process->gate, __ATOMIC_SEQ_CST))
            return;
        gate_leave(process);
        syscall(SYS_futex, &process->gate, FUTEX_WAIT, 1, &sleep_max, NULL, 0);
        look_after_locker(process);
    }
}

void gate_leave(process_record *process) { __atomic_fetch_sub(&process->active_calls, 1, __ATOMIC_SEQ_CST); }

static int wants_shut(const process_record *process) {
    process_state state = checkpoint_state(process);
    if (state == STATE_FAILED) /* its calls go on, and fail */
        return 0;
    return state != STATE_RUNNING || process->checkpointer != NOBODY;
}

void gate_set(process_record *process) {
    uint32_t shut = process->is_used && wants_shut(process);
    __atomic_store_n(&process->gate, shut, __ATOMIC_SEQ_CST);
    if (!shut)
        syscall(SYS_futex, &process->gate, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

int gate_is_quiet(const process_record *process) {
    return !__atomic_load_n(&process->active_calls, __ATOMIC_SEQ_CST) &&
           !__atomic_load_n(&process->queued_ops, __ATOMIC_SEQ_CST);
}

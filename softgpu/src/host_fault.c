/* Injected faults: "function F, after N calls, goes wrong M times in this way". */
#include "host.h"

#include <ctype.h>
#include <string.h>
#include <unistd.h>

#define HANG_POLL_NS 10000000ull

const char *const fault_names[FAULT_KIND_COUNT] = {
    [FAULT_CODE] = "code", [FAULT_DELAY] = "delay", [FAULT_HANG] = "hang",   [FAULT_CORRUPT] = "corrupt",
    [FAULT_LIE] = "lie",   [FAULT_STALE] = "stale", [FAULT_EMPTY] = "empty", [FAULT_UNKNOWN] = "unknown",
};

/* A fault on cuMemAlloc also means cuMemAlloc_v2: clients know the plain name. */
static int names(const char *fault, const char *function) {
    size_t length = strlen(fault);
    if (strncmp(function, fault, length))
        return 0;
    const char *rest = function + length;
    return !*rest || (rest[0] == '_' && rest[1] == 'v' && isdigit((unsigned char)rest[2]));
}

/* The first fault of these kinds (bits) that is due for this call. */
static int due(const char *function, unsigned kinds, fault_record *struck) {
    int found = 0;
    if (!__atomic_load_n(&host->fault_count, __ATOMIC_RELAXED))
        return 0;
    host_lock();
    for (int i = 0; i < FAULT_MAX && !found; i++) {
        fault_record *fault = &host->faults[i];
        if (!fault->function[0] || !fault->times || !(kinds >> fault->kind & 1) ||
            !names(fault->function, function))
            continue;
        if (fault->after > 0) {
            fault->after--;
            continue;
        }
        if (fault->times > 0)
            fault->times--;
        fault->hit_count++;
        fault->struck_pid = (int32_t)getpid();
        *struck = *fault;
        found = 1;
    }
    host_unlock();
    return found;
}

int fault_strikes(const char *function, fault_kind kind, fault_record *struck) {
    return due(function, 1u << kind, struck);
}

static void hang(uint64_t serial) {
    for (int is_there = 1; is_there;) {
        sleep_until(clock_ns() + HANG_POLL_NS);
        host_lock();
        is_there = 0;
        for (int i = 0; i < FAULT_MAX; i++)
            is_there |= host->faults[i].serial == serial;
        host_unlock();
    }
}

/* Slowness first: a call can be late and fail as well. */
int fault_code(const char *function) {
    fault_record struck;
    if (due(function, 1u << FAULT_DELAY | 1u << FAULT_HANG, &struck)) {
        if (struck.kind == FAULT_DELAY)
            sleep_until(clock_ns() + struck.value);
        else
            hang(struck.serial);
    }
    return due(function, 1u << FAULT_CODE, &struck) ? (int)struck.value : 0;
}

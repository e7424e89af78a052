/* Event sets. An event is a row in the host's ring; each set remembers how far it has read. */
#define _GNU_SOURCE
#include "nvml.h"

#include <stdlib.h>
#include <string.h>

#define XID_EVENT 0x8ull
#define ECC_EVENTS 0x3ull
#define POLL_NS \
    2000000ull /* rows are few and late by at most this; a futex across processes would buy nothing */

typedef struct {
    uint64_t types[DEVICE_MAX];
    uint64_t seen_count;
} event_set;

NVML_EXPORT nvmlReturn nvmlEventSetCreate(event_set **set) {
    NVML_ENTER();
    event_set *created = calloc(1, sizeof *created);
    if (!created)
        return NVML_ERROR_INSUFFICIENT_RESOURCES;
    created->seen_count = __atomic_load_n(&host->event_count, __ATOMIC_ACQUIRE);
    *set = created;
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn nvmlEventSetFree(event_set *set) {
    free(set);
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn nvmlDeviceGetSupportedEventTypes(nvmlDevice gpu, unsigned long long *types) {
    NVML_ENTER_DEVICE(gpu);
    *types = XID_EVENT | ECC_EVENTS;
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn nvmlDeviceRegisterEvents(nvmlDevice gpu, unsigned long long types, event_set *set) {
    NVML_ENTER_DEVICE(gpu);
    set->types[nvml_index(gpu)] |= types;
    return NVML_SUCCESS;
}

static int next_event(event_set *set, nvmlEventData *data) {
    int found = 0;
    host_lock();
    if (host->event_count > set->seen_count + EVENT_MAX)
        set->seen_count = host->event_count - EVENT_MAX;
    while (!found && set->seen_count < host->event_count) {
        const event_record *event = &host->events[set->seen_count++ % EVENT_MAX];
        if (!(set->types[event->device] & event->type))
            continue;
        *data = (nvmlEventData){&host->devices[event->device], event->type, event->data, NO_INSTANCE,
                                NO_INSTANCE};
        found = 1;
    }
    host_unlock();
    return found;
}

NVML_EXPORT nvmlReturn nvmlEventSetWait_v2(event_set *set, nvmlEventData *data, unsigned timeout_ms) {
    NVML_ENTER();
    uint64_t deadline_ns = clock_ns() + timeout_ms * 1000000ull;
    for (;;) {
        if (next_event(set, data))
            return NVML_SUCCESS;
        uint64_t now_ns = clock_ns();
        if (now_ns >= deadline_ns)
            return NVML_ERROR_TIMEOUT;
        sleep_until(now_ns + POLL_NS < deadline_ns ? now_ns + POLL_NS : deadline_ns);
    }
}

NVML_EXPORT nvmlReturn nvmlEventSetWait(event_set *set, nvmlEventData *data, unsigned timeout_ms) {
    return nvmlEventSetWait_v2(set, data, timeout_ms);
}

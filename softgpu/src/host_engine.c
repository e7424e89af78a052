/* The copy engines: one for each direction of each device, shared by all processes of the host.
 *
 * Time on an engine is booked piece by piece, so that copies of several processes interleave and share the
 * link. */
#include "host.h"

/* Returns when the piece will be done; 0 when the link's speed is not modelled. `earliest_ns` is where this
 * copy's previous piece ended: a thread that woke up late catches up, it does not lose link time. */
uint64_t engine_book(int device_index, direction way, int is_pageable, uint64_t bytes, uint64_t earliest_ns) {
    device *gpu = &host->devices[device_index];
    copy_engine *engine = &gpu->engines[way];
    uint64_t end_ns = 0;
    host_lock();
    engine->moved_bytes += bytes;
    uint64_t bytes_per_s = engine->bytes_per_s;
    if (is_pageable && gpu->pageable_bytes_per_s && (!bytes_per_s || gpu->pageable_bytes_per_s < bytes_per_s))
        bytes_per_s = gpu->pageable_bytes_per_s;
    if (bytes_per_s) {
        uint64_t start_ns = engine->busy_until_ns > earliest_ns ? engine->busy_until_ns : earliest_ns;
        end_ns = start_ns + (uint64_t)((double)bytes * 1e9 / (double)bytes_per_s);
        engine->busy_until_ns = end_ns;
    }
    host_unlock();
    return end_ns;
}

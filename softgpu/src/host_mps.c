/* What the MPS server does about memory, with limits of groups (driver R615, MPS v3): when a client that
 * stays within its group's soft limit would be refused, a client of a group above its own is ended.
 *
 * As documented: nobody is ended for being above the limit alone; the requester is never the victim; the
 * victim's next call says CUDA_ERROR_MPS_CLIENT_TERMINATED. Which victim is not: here the biggest client of
 * the group that is most above. Processes without any limit are no candidates, for they have none to cross.
 */
#include "host.h"

int mps_has_ended(const process_record *process) {
    return (__atomic_load_n(&process->placement, __ATOMIC_ACQUIRE) & PLACEMENT_ENDED) != 0;
}

static int is_within_soft(const process_record *process, int device_index, uint64_t bytes) {
    const group_record *group = group_nearest(process, device_index);
    return group && group_used(group->key, device_index) + bytes <= group->soft_bytes[device_index];
}

static uint64_t above_soft(const process_record *process, int device_index) {
    const group_record *group = group_nearest(process, device_index);
    uint64_t used_bytes = group ? group_used(group->key, device_index) : 0;
    return group && used_bytes > group->soft_bytes[device_index]
               ? used_bytes - group->soft_bytes[device_index]
               : 0;
}

static process_record *choose_victim(const process_record *requester, int device_index) {
    process_record *victim = NULL;
    uint64_t most_above = 0;
    for (int i = 0; i < PROCESS_MAX; i++) {
        process_record *candidate = &host->processes[i];
        uint64_t bytes = candidate->is_used ? process_bytes(candidate, device_index) : 0;
        if (!bytes || candidate == requester || checkpoint_state(candidate) != STATE_RUNNING)
            continue;
        uint64_t above = above_soft(candidate, device_index);
        if (above > most_above ||
            (above && above == most_above && bytes > process_bytes(victim, device_index))) {
            most_above = above;
            victim = candidate;
        }
    }
    return victim;
}

int mps_make_room(process_record *process, int device_index, uint64_t bytes) {
    if (!host->is_mps || !is_within_soft(process, device_index, bytes))
        return 0;
    while (!chunk_fits(device_index, bytes)) {
        process_record *victim = choose_victim(process, device_index);
        if (!victim)
            return 0;
        checkpoint_end_client(victim);
        host->devices[device_index].eviction_count++;
    }
    return 1;
}

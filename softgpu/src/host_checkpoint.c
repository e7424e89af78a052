/* Taking a whole process off its devices and putting it back.
 *
 * A process's placement word says where it stands in the protocol, whether its memory counts on devices, and
 * on which. Each step of the protocol is one store to that word, after which the devices' sums are brought up
 * to date; who dies in between leaves sums that the next one counts anew. A step that takes time is held by
 * its `checkpointer`; when that dies in the midst of it, the process is back where it was before the step.
 *
 * The bytes themselves stay where they are, in chunk files, which are host memory anyway. */
#include "host.h"

#include <string.h>

process_state checkpoint_state(const process_record *process) {
    return (process_state)(__atomic_load_n(&process->placement, __ATOMIC_ACQUIRE) & PLACEMENT_STATE);
}

static void place(process_record *process, uint32_t placement) {
    for (uint32_t d = 0; d < host->device_count; d++)
        host->devices[d].used_bytes -= process_bytes(process, (int)d);
    __atomic_store_n(&process->placement, placement, __ATOMIC_RELEASE);
    for (uint32_t d = 0; d < host->device_count; d++)
        host->devices[d].used_bytes += process_bytes(process, (int)d);
}

static uint32_t with_state(const process_record *process, process_state state) {
    return (process->placement & ~(uint32_t)PLACEMENT_STATE) | state;
}

int checkpoint_begin(process_record *process, process_state from, process_state to, int by) {
    if (checkpoint_state(process) != from || process->checkpointer != NOBODY || mps_has_ended(process))
        return -1;
    process->checkpointer = by;
    place(process, with_state(process, to));
    gate_set(process);
    return 0;
}

void checkpoint_reach(process_record *process, process_state reached, int is_stored) {
    uint32_t placement = (process->placement & PLACEMENT_MAP) | reached;
    if (reached == STATE_CHECKPOINTED)
        placement |= PLACEMENT_AWAY | (is_stored ? PLACEMENT_STORED : 0);
    place(process, placement);
}

void checkpoint_release(process_record *process) {
    process->checkpointer = NOBODY;
    gate_set(process);
}

int checkpoint_admits(process_record *process, const uint8_t *device_map) {
    for (uint32_t ordinal = 0; ordinal < host->device_count; ordinal++) {
        uint64_t bytes = process->context_bytes[ordinal] + process->charged_bytes[ordinal];
        if (bytes && !chunk_reserve(device_map[ordinal], process, bytes))
            return 0;
    }
    return 1;
}

/* Always into the other map, also when nothing moves: so the way back is known. */
void checkpoint_bring_back(process_record *process, const uint8_t *device_map, int by) {
    uint32_t turned = (process->placement ^ PLACEMENT_MAP) & (PLACEMENT_MAP | PLACEMENT_STORED);
    memcpy(process->device_maps[(turned & PLACEMENT_MAP) != 0], device_map, DEVICE_MAX);
    process->checkpointer = by;
    place(process, turned | STATE_RESTORING);
    gate_set(process);
}

/* Whatever state it is in: on its devices or away, there it stays. */
void checkpoint_fail(process_record *process) {
    place(process, with_state(process, STATE_FAILED));
    checkpoint_release(process);
}

void checkpoint_settle(process_record *process) {
    uint32_t kept = process->placement & (PLACEMENT_MAP | PLACEMENT_STORED);
    process_state state = checkpoint_state(process);
    if (state == STATE_CHECKPOINTING)
        place(process, with_state(process, STATE_LOCKED));
    if (state == STATE_RESTORING)
        place(process, (kept ^ PLACEMENT_MAP) | PLACEMENT_AWAY | STATE_CHECKPOINTED);
    process->checkpointer = NOBODY;
    gate_set(process);
}

void checkpoint_end_client(process_record *process) {
    int index = (int)(process - host->processes);
    for (uint32_t i = 0; i < host->chunk_end; i++) { /* what others have too is theirs from now on */
        chunk_record *chunk = &host->chunks[i];
        if (chunk->is_used && chunk->owner == index && chunk->was_shared &&
            (chunk_is_held_by(chunk, 0, index) ||
             chunk_is_held_by(chunk, index + 1, HOLDER_DESCRIPTOR + 1))) {
            process->charged_bytes[chunk->ordinal] -= chunk->bytes;
            chunk_disown(chunk);
            host->detached_count += !chunk->is_detached;
            chunk->is_detached = 1;
        }
    }
    place(process, process->placement | PLACEMENT_AWAY | PLACEMENT_ENDED);
}

/* Memory that it gave to others (or a descriptor of it that is still about), or that it has from others. */
int checkpoint_is_shared(int process_index) {
    for (uint32_t i = 0; i < host->chunk_end; i++) {
        const chunk_record *chunk = &host->chunks[i];
        if (!chunk->is_used || !chunk->was_shared)
            continue;
        if (chunk->owner != process_index) {
            if (chunk_is_held_by(chunk, process_index, process_index + 1))
                return 1;
        } else if (chunk_is_held_by(chunk, 0, process_index) ||
                   chunk_is_held_by(chunk, process_index + 1, HOLDER_DESCRIPTOR + 1)) {
            return 1;
        }
    }
    return 0;
}

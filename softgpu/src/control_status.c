/* The whole host as JSON. Names are those of the Python side; bytes and nanoseconds are integers. */
#include "control.h"
#include "host.h"

#include <stdio.h>

static void text(const char *value) {
    putchar('"');
    for (; *value; value++) {
        if (*value == '"' || *value == '\\')
            putchar('\\');
        if ((unsigned char)*value >= ' ')
            putchar(*value);
    }
    putchar('"');
}

static void number(const char *key, uint64_t value) {
    printf("\"%s\": %llu, ", key, (unsigned long long)value);
}

static const char *const state_names[] = {"running", "locked",        "checkpointed",
                                          "failed",  "checkpointing", "restoring"};

static void processes_of(int index) {
    const char *separator = "";
    printf("\"processes\": [");
    for (int i = 0; i < PROCESS_MAX; i++) {
        const process_record *process = &host->processes[i];
        uint64_t used_bytes = process_bytes(process, index), own_bytes = process_own_bytes(process, index);
        if (!process->is_used || !own_bytes)
            continue;
        printf("%s{\"pid\": %d, \"command\": ", separator, process_pid(i));
        text(process->command);
        printf(", \"group\": ");
        text(process->group_name);
        printf(", ");
        printf("\"is_evicted\": %s, ", mps_has_ended(process) ? "true" : "false");
        number("poison_code", process->poison[process_ordinal(process, index)]);
        printf("\"state\": \"%s\", ", state_names[checkpoint_state(process)]);
        number("context_bytes", process->context_bytes[process_ordinal(process, index)]);
        number("away_bytes", own_bytes - used_bytes);
        printf("\"used_bytes\": %llu}", (unsigned long long)used_bytes);
        separator = ", ";
    }
    printf("]");
}

static void one_device(int index) {
    const device *gpu = &host->devices[index];
    printf("{\"index\": %d, \"uuid\": ", index);
    text(gpu->uuid);
    printf(", \"name\": ");
    text(gpu->name);
    printf(", ");
    number("total_bytes", gpu->total_bytes);
    number("reserved_bytes", gpu->reserved_bytes);
    number("used_bytes", gpu->used_bytes);
    number("context_bytes", gpu->context_bytes);
    number("h2d_bytes_per_s", gpu->engines[HOST_TO_DEVICE].bytes_per_s);
    number("d2h_bytes_per_s", gpu->engines[DEVICE_TO_HOST].bytes_per_s);
    number("pageable_bytes_per_s", gpu->pageable_bytes_per_s);
    number("h2d_moved_bytes", gpu->engines[HOST_TO_DEVICE].moved_bytes);
    number("d2h_moved_bytes", gpu->engines[DEVICE_TO_HOST].moved_bytes);
    number("eviction_count", gpu->eviction_count);
    number("utilization_gpu_percent", gpu->utilization_gpu_percent);
    number("temperature_c", gpu->temperature_c);
    number("ecc_error_count", gpu->ecc_error_count);
    printf("\"is_hot\": %s, ", gpu->is_hot ? "true" : "false");
    printf("\"is_mig\": %s, \"mig_parent\": ", gpu->is_mig ? "true" : "false");
    if (gpu->mig_parent)
        printf("%u, ", gpu->mig_parent - 1);
    else
        printf("null, ");
    printf("\"is_lost\": %s, ", gpu->is_lost ? "true" : "false");
    processes_of(index);
    printf("}");
}

static void limit_of(const group_record *group, int index) {
    printf("{\"device\": %d, \"soft_bytes\": %llu, \"hard_bytes\": ", index,
           (unsigned long long)group->soft_bytes[index]);
    if (group->hard_bytes[index] == NO_LIMIT)
        printf("null");
    else
        printf("%llu", (unsigned long long)group->hard_bytes[index]);
    printf(", \"used_bytes\": %llu}", (unsigned long long)group_used(group->key, index));
}

static void all_groups(void) {
    const char *separator = "";
    printf("\"groups\": [");
    for (uint32_t i = 0; i < host->group_end; i++) {
        const group_record *group = &host->groups[i];
        if (!group->key)
            continue;
        printf("%s{\"name\": ", separator);
        text(group->name);
        printf(", \"limits\": [");
        for (uint32_t d = 0; d < host->device_count; d++) {
            printf("%s", d ? ", " : "");
            limit_of(group, (int)d);
        }
        printf("]}");
        separator = ", ";
    }
    printf("]");
}

static void all_faults(void) {
    const char *separator = "";
    printf("\"faults\": [");
    for (int i = 0; i < FAULT_MAX; i++) {
        const fault_record *fault = &host->faults[i];
        if (!fault->function[0])
            continue;
        printf("%s{\"function\": ", separator);
        text(fault->function);
        printf(", \"after\": %d, \"times\": %d, \"kind\": \"%s\", \"value\": %llu, "
               "\"hit_count\": %u, \"struck_pid\": %d}",
               fault->after, fault->times, fault_names[fault->kind], (unsigned long long)fault->value,
               fault->hit_count, fault->struck_pid);
        separator = ", ";
    }
    printf("]");
}

static unsigned live_chunks(void) {
    unsigned count = 0;
    for (uint32_t i = 0; i < host->chunk_end; i++)
        count += host->chunks[i].is_used;
    return count;
}

void control_status(void) {
    host_lock();
    host_reap();
    printf("{\"directory\": ");
    text(host_directory());
    printf(", \"driver_version\": %u, ", host->driver_version);
    printf("\"is_phantom\": %s, ", host->is_phantom ? "true" : "false");
    printf("\"is_mps\": %s, ", host->is_mps ? "true" : "false");
    printf("\"is_clean\": %s, ", host->is_clean ? "true" : "false");
    number("recovery_count", host->recovery_count);
    printf("\"chunk_count\": %u, \"devices\": [", live_chunks());
    for (uint32_t d = 0; d < host->device_count; d++) {
        printf("%s", d ? ", " : "");
        one_device((int)d);
    }
    printf("], ");
    all_groups();
    printf(", ");
    all_faults();
    printf("}\n");
    host_unlock();
}

/* Is the shared state true? Every rule that must hold whenever nobody is changing it, checked by counting the
 * records again and by looking at the files. What only the dead held is tidied away in between, as by any
 * call that meets them, and then nothing of it may be left. */
#define _GNU_SOURCE
#include "chunk_file.h"
#include "host.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

static check_report reporter;
static int finding_count;

__attribute__((format(printf, 1, 2))) static void found(const char *form, ...) {
    char text[512];
    va_list values;
    va_start(values, form);
    vsnprintf(text, sizeof text, form, values);
    va_end(values);
    finding_count++;
    reporter(text);
}

static void equal(const char *what, int index, uint64_t recorded, uint64_t counted) {
    if (recorded != counted)
        found("%s %d: recorded %llu, counted %llu", what, index, (unsigned long long)recorded,
              (unsigned long long)counted);
}

static int is_owner(int process) {
    return process >= 0 && process < PROCESS_MAX && host->processes[process].is_used;
}

/* ---- sums (once the rows are known to be sound) ---- */

static uint64_t bytes_of_owner(int owner, uint32_t ordinal) {
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < host->chunk_end; i++) {
        const chunk_record *chunk = &host->chunks[i];
        if (chunk->is_used && chunk->owner == owner && chunk->ordinal == ordinal)
            bytes += chunk->bytes;
    }
    return bytes;
}

static void check_device(uint32_t d) {
    const device *gpu = &host->devices[d];
    uint64_t bytes = 0;
    for (int p = 0; p < PROCESS_MAX; p++) {
        const process_record *process = &host->processes[p];
        if (process->is_used && !process_is_away(process))
            bytes += process->context_bytes[process_ordinal(process, (int)d)];
    }
    for (uint32_t i = 0; i < host->chunk_end; i++) {
        const chunk_record *chunk = &host->chunks[i];
        if (chunk->is_used && chunk_is_on_device(chunk) && chunk_device(chunk) == (int)d)
            bytes += chunk->bytes;
    }
    equal("used_bytes of GPU", (int)d, gpu->used_bytes, bytes);
    if (gpu->used_bytes > gpu->total_bytes || gpu->reserved_bytes > gpu->total_bytes - gpu->used_bytes)
        found("GPU %u: %llu bytes used and %llu reserved are more than its %llu", d,
              (unsigned long long)gpu->used_bytes, (unsigned long long)gpu->reserved_bytes,
              (unsigned long long)gpu->total_bytes);
}

static void check_charges(int p) {
    const process_record *process = &host->processes[p];
    for (uint32_t ordinal = 0; process->is_used && ordinal < host->device_count; ordinal++) {
        uint64_t one_context = host->devices[process_device(process, (int)ordinal)].context_bytes;
        equal("charged_bytes of process", p, process->charged_bytes[ordinal], bytes_of_owner(p, ordinal));
        if (process->context_bytes[ordinal] && process->context_bytes[ordinal] != one_context)
            found("process %d: a context of %llu bytes, where one takes %llu", p,
                  (unsigned long long)process->context_bytes[ordinal], (unsigned long long)one_context);
    }
}

/* ---- rows ---- */

static int by_id(const void *left, const void *right) {
    uint64_t a = host->chunks[*(const uint32_t *)left].id, b = host->chunks[*(const uint32_t *)right].id;
    return a < b ? -1 : a > b;
}

static void check_ids(uint32_t *rows, uint32_t count) {
    qsort(rows, count, sizeof *rows, by_id);
    for (uint32_t i = 1; i < count; i++)
        if (host->chunks[rows[i]].id == host->chunks[rows[i - 1]].id)
            found("chunks %u and %u have the same id %llu", rows[i - 1], rows[i],
                  (unsigned long long)host->chunks[rows[i]].id);
}

static void check_chunk(uint32_t i) {
    const chunk_record *chunk = &host->chunks[i];
    uint32_t device_index = chunk->owner == CHUNK_UNOWNED ? chunk->device : chunk->ordinal;
    if (device_index >= host->device_count)
        found("chunk %u: there is no GPU %u", i, device_index);
    if (!chunk->bytes || !chunk->id || chunk->id > host->last_chunk_id)
        found("chunk %u: %llu bytes, id %llu of %llu", i, (unsigned long long)chunk->bytes,
              (unsigned long long)chunk->id, (unsigned long long)host->last_chunk_id);
    if (chunk->owner == CHUNK_UNOWNED ? !chunk->is_detached : !is_owner(chunk->owner))
        found("chunk %u: its owner %d is no process", i, chunk->owner);
}

static void check_chunks(void) {
    static uint32_t rows[CHUNK_MAX];
    uint32_t count = 0, detached_count = 0, end = 0;
    for (uint32_t i = 0; i < CHUNK_MAX; i++) {
        if (!host->chunks[i].is_used)
            continue;
        check_chunk(i);
        end = i + 1;
        detached_count += host->chunks[i].is_detached;
        rows[count++] = i;
    }
    if (end > host->chunk_end)
        found("chunk %u lies behind the recorded end %u", end - 1, host->chunk_end);
    equal("detached_count", 0, host->detached_count, detached_count);
    check_ids(rows, count);
}

/* Where it stands in the checkpoint protocol, and on which devices. */
static void check_process(int p) {
    const process_record *process = &host->processes[p];
    process_state state = checkpoint_state(process);
    int by = process->checkpointer, seen[DEVICE_MAX] = {0};
    if (by != NOBODY && !is_owner(by))
        found("process %d: its checkpointer %d is no process", p, by);
    int must_be_away = state == STATE_CHECKPOINTED || mps_has_ended(process);
    int may_be_away = must_be_away || state == STATE_FAILED;
    if (state > STATE_RESTORING || process_is_away(process) < must_be_away ||
        process_is_away(process) > may_be_away)
        found("process %d: the placement %x cannot be", p, process->placement);
    uint32_t is_shut = state != STATE_FAILED && (state != STATE_RUNNING || by != NOBODY);
    if (process->gate != is_shut)
        found("process %d: its gate is %s in state %d", p, is_shut ? "open" : "shut", state);
    for (int ordinal = 0; ordinal < DEVICE_MAX; ordinal++) {
        int index = process_device(process, ordinal);
        if (index >= DEVICE_MAX || seen[index]++)
            found("process %d: its devices are no permutation", p);
    }
}

static void check_groups(void) {
    uint32_t end = 0, cgroup_count = 0;
    for (uint32_t i = 0; i < GROUP_MAX; i++) {
        const group_record *group = &host->groups[i];
        if (!group->key)
            continue;
        end = i + 1;
        cgroup_count += !(group->key >> 63);
        for (uint32_t other = 0; other < i; other++)
            if (host->groups[other].key == group->key)
                found("groups %u and %u are the same", other, i);
        for (uint32_t d = 0; d < host->device_count; d++)
            if (group->soft_bytes[d] > group->hard_bytes[d])
                found("group %s: soft limit above hard on GPU %u", group->name, d);
    }
    equal("group_end", 0, host->group_end, end);
    equal("cgroup_count", 0, host->cgroup_count, cgroup_count);
}

static void check_shared_event(uint32_t i) {
    const shared_event *event = &host->shared_events[i];
    int holder_count = 0;
    for (int p = 0; p < PROCESS_MAX; p++) {
        if (!(event->holders[p / 64] >> p % 64 & 1))
            continue;
        holder_count++;
        if (!is_owner(p))
            found("shared event %u: its holder %d is no process", i, p);
    }
    if (!holder_count)
        found("shared event %u: nobody holds it", i);
    if (!event->id || event->id > host->last_shared_event_id || event->completed > event->recorded)
        found("shared event %u: id %llu, %llu of %llu records passed", i, (unsigned long long)event->id,
              (unsigned long long)event->completed, (unsigned long long)event->recorded);
    for (uint32_t other = 0; other < i; other++)
        if (host->shared_events[other].is_used && host->shared_events[other].id == event->id)
            found("shared events %u and %u are the same", other, i);
}

static void check_shared_events(void) {
    for (uint32_t i = 0; i < SHARED_EVENT_MAX; i++)
        if (host->shared_events[i].is_used)
            check_shared_event(i);
}

static void check_faults(void) {
    uint32_t count = 0;
    for (int i = 0; i < FAULT_MAX; i++)
        count += host->faults[i].function[0] != 0;
    equal("fault_count", 0, host->fault_count, count);
}

/* ---- files ---- */

static void check_file(uint32_t i) {
    const chunk_record *chunk = &host->chunks[i];
    char name[32], path[320];
    struct stat status;
    chunk_footer footer;
    snprintf(name, sizeof name, "c%llu", (unsigned long long)chunk->id);
    host_path(path, sizeof path, name);
    int descriptor = open(path, O_RDWR | O_CLOEXEC);
    if (descriptor < 0 || fstat(descriptor, &status)) {
        found("chunk %u: its file %s is missing", i, name);
        return;
    }
    if (status.st_ino != chunk->inode || chunk_file_identify(descriptor, (uint64_t)status.st_size, &footer) ||
        footer.id != chunk->id || footer.bytes != chunk->bytes || footer.index != i)
        found("chunk %u: the file %s is another's", i, name);
    close(descriptor);
}

static int is_known_file(const char *name) {
    static const char *const known[] = {".", "..", "settings", "state", "processes", "lock"};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(name, known[i]))
            return 1;
    return 0;
}

static int is_chunk_file(const char *name) {
    char *end;
    uint64_t id = name[0] == 'c' ? strtoull(name + 1, &end, 10) : 0;
    if (!id || *end)
        return 0;
    for (uint32_t i = 0; i < host->chunk_end; i++)
        if (host->chunks[i].is_used && host->chunks[i].id == id)
            return 1;
    return 0;
}

static void check_directory(void) {
    DIR *folder = opendir(host_directory());
    if (!folder) {
        found("the host's directory cannot be read");
        return;
    }
    for (const struct dirent *entry; (entry = readdir(folder)) != NULL;)
        if (!is_known_file(entry->d_name) && !is_chunk_file(entry->d_name))
            found("the file %s belongs to nothing", entry->d_name);
    closedir(folder);
}

/* ---- the living ---- */

static int is_held(uint64_t id) {
    char name[32], path[320];
    snprintf(name, sizeof name, "c%llu", (unsigned long long)id);
    host_path(path, sizeof path, name);
    int descriptor = open(path, O_RDWR | O_CLOEXEC);
    int held = descriptor >= 0 && flock(descriptor, LOCK_EX | LOCK_NB) != 0;
    if (descriptor >= 0)
        close(descriptor);
    return held;
}

static void check_records(void) {
    for (int p = 0; p < PROCESS_MAX; p++)
        if (host->processes[p].is_used)
            check_process(p);
    check_chunks();
    check_groups();
    check_faults();
    if (finding_count)
        return;
    for (uint32_t d = 0; d < host->device_count; d++)
        check_device(d);
    for (int p = 0; p < PROCESS_MAX; p++)
        check_charges(p);
}

static void check_files(void) {
    for (uint32_t i = 0; i < host->chunk_end; i++)
        if (host->chunks[i].is_used)
            check_file(i);
    check_directory();
}

static void check_living(int is_quiet) {
    for (int p = 0; p < PROCESS_MAX; p++) {
        if (host->processes[p].is_used && process_pid(p) < 0)
            found("process %d is dead and has a row", p);
        if (host->processes[p].is_used && is_quiet && !gate_is_quiet(&host->processes[p]))
            found("process %d: %u calls and %u queued operations are counted and none is under way", p,
                  host->processes[p].active_calls, host->processes[p].queued_ops);
    }
    for (uint32_t i = 0; is_quiet && i < host->chunk_end; i++)
        if (host->chunks[i].is_used && !is_held(host->chunks[i].id))
            found("chunk %u: nobody can reach it", i);
}

int host_check(check_report report, int is_quiet) {
    reporter = report;
    finding_count = 0;
    check_records();
    if (finding_count) /* reaping trusts them */
        return finding_count;
    host_reap();
    check_records();
    check_shared_events(); /* whoever dies while it leaves one leaves it to the next reaper */
    check_files();
    check_living(is_quiet);
    return finding_count;
}

/* Checkpoints of another process, by its pid as this process sees it.
 *
 * None of these calls passes the gate: a process may lock itself. Steps that take time hold the target by its
 * row's `checkpointer`, not by a lock, so that nobody else waits for them. */
#define _GNU_SOURCE
#include "cuda_driver.h"

#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LOCK_POLL_NS 200000ull

/* Unlike other calls, these need no cuInit, but for custom storage. */
static CUresult enter(const char *function) {
    driver_lock();
    int failed = driver_attach();
    driver_unlock();
    return failed ? CUDA_ERROR_NOT_INITIALIZED : (CUresult)fault_code(function);
}

#define CHECKPOINT_ENTER()             \
    CUresult result = enter(__func__); \
    if (result != CUDA_SUCCESS)        \
    return result

int target_is_there(const target *aimed) {
    return aimed->process->is_used && aimed->process->serial == aimed->serial &&
           process_pid(aimed->index) >= 0;
}

/* With the host lock held. A process that lives but never called cuInit is not initialised, as the driver has
 * been seen to say. */
static CUresult find(int pid, target *aimed) {
    host_reap();
    int index = process_of_pid(pid);
    if (index < 0 || !host->processes[index].is_client)
        return pid > 0 && (!kill(pid, 0) || errno == EPERM) ? CUDA_ERROR_NOT_INITIALIZED
                                                            : CUDA_ERROR_INVALID_VALUE;
    process_record *process = &host->processes[index];
    *aimed = (target){.index = index, .serial = process->serial, .process = process};
    return CUDA_SUCCESS;
}

static uint64_t total_bytes(const process_record *process) {
    uint64_t bytes = 0;
    for (uint32_t d = 0; d < host->device_count; d++)
        bytes += process_own_bytes(process, (int)d);
    return bytes;
}

static int uses_lost_device(const process_record *process, const uint8_t *device_map) {
    for (uint32_t ordinal = 0; ordinal < host->device_count; ordinal++)
        if (process->context_bytes[ordinal] + process->charged_bytes[ordinal] &&
            device_is_lost(device_map[ordinal]))
            return 1;
    return 0;
}

static const uint8_t *current_map(const process_record *process) {
    return process->device_maps[(process->placement & PLACEMENT_MAP) != 0];
}

/* With the host lock held: the end of a step that took its time. The target may have died, or been given up.
 */
static CUresult finish(const target *aimed, process_state step, process_state reached) {
    if (!target_is_there(aimed))
        return CUDA_ERROR_INVALID_VALUE;
    if (checkpoint_state(aimed->process) != step || aimed->process->checkpointer != own_process)
        return CUDA_ERROR_ILLEGAL_STATE;
    checkpoint_reach(aimed->process, reached, 0);
    checkpoint_release(aimed->process);
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuCheckpointProcessGetState(int pid, int *state) {
    CHECKPOINT_ENTER();
    if (!state)
        return CUDA_ERROR_INVALID_VALUE;
    target aimed;
    host_lock();
    result = find(pid, &aimed);
    if (result == CUDA_SUCCESS)
        *state = checkpoint_state(aimed.process);
    host_unlock();
    return result;
}

/* ---- lock and unlock ---- */

static int wait_until_quiet(const target *aimed, unsigned timeout_ms) {
    uint64_t deadline_ns = timeout_ms ? clock_ns() + timeout_ms * 1000000ull : UINT64_MAX;
    while (!gate_is_quiet(aimed->process)) {
        if (clock_ns() >= deadline_ns || !target_is_there(aimed))
            return 0;
        sleep_until(clock_ns() + LOCK_POLL_NS);
    }
    return 1;
}

CUDA_EXPORT CUresult cuCheckpointProcessLock(int pid, const CUcheckpointLockArgs *arguments) {
    CHECKPOINT_ENTER();
    target aimed;
    uint64_t started_ns = clock_ns();
    host_lock();
    result = find(pid, &aimed);
    if (result == CUDA_SUCCESS && checkpoint_begin(aimed.process, STATE_RUNNING, STATE_RUNNING, own_process))
        result = CUDA_ERROR_ILLEGAL_STATE;
    host_unlock();
    if (result != CUDA_SUCCESS)
        return result;
    int is_quiet = wait_until_quiet(&aimed, arguments ? arguments->timeoutMs : 0);
    host_lock();
    result = finish(&aimed, STATE_RUNNING, is_quiet ? STATE_LOCKED : STATE_RUNNING);
    host_unlock();
    if (result == CUDA_SUCCESS && !is_quiet)
        result = CUDA_ERROR_NOT_READY;
    if (result == CUDA_SUCCESS)
        pay(CALL_CHECKPOINT_LOCK, started_ns, 0);
    return result;
}

CUDA_EXPORT CUresult cuCheckpointProcessUnlock(int pid, const void *arguments) {
    CHECKPOINT_ENTER();
    (void)arguments;
    target aimed;
    uint64_t started_ns = clock_ns();
    host_lock();
    result = find(pid, &aimed);
    if (result == CUDA_SUCCESS && checkpoint_begin(aimed.process, STATE_LOCKED, STATE_LOCKED, own_process))
        result = CUDA_ERROR_ILLEGAL_STATE;
    host_unlock();
    if (result != CUDA_SUCCESS)
        return result;
    pay(CALL_CHECKPOINT_UNLOCK, started_ns, 0);
    host_lock();
    result = finish(&aimed, STATE_LOCKED, STATE_RUNNING);
    host_unlock();
    return result;
}

/* ---- checkpoint ---- */

/* With the host lock held: may it be checkpointed? If so, the step is begun. */
static CUresult begin_checkpoint(int pid, target *aimed) {
    CUresult result = find(pid, aimed);
    if (result != CUDA_SUCCESS)
        return result;
    if (checkpoint_state(aimed->process) != STATE_LOCKED || aimed->process->checkpointer != NOBODY)
        return CUDA_ERROR_ILLEGAL_STATE;
    if (uses_lost_device(aimed->process, current_map(aimed->process))) {
        checkpoint_fail(aimed->process);
        return CUDA_ERROR_UNKNOWN;
    }
    if (checkpoint_is_shared(aimed->index))
        return CUDA_ERROR_NOT_SUPPORTED;
    checkpoint_begin(aimed->process, STATE_LOCKED, STATE_CHECKPOINTING, own_process);
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuCheckpointProcessCheckpoint(int pid, const CUcheckpointCheckpointArgs *arguments) {
    CHECKPOINT_ENTER();
    CUcheckpointCustomStorageInfo **info = arguments ? arguments->customStorageInfo_out : NULL;
    target aimed;
    uint64_t started_ns = clock_ns(), bytes = 0;
    host_lock();
    result = find(pid, &aimed);
    if (result == CUDA_SUCCESS && info)
        result = storage_check(&aimed, current_map(aimed.process));
    if (result == CUDA_SUCCESS)
        result = begin_checkpoint(pid, &aimed);
    if (result == CUDA_SUCCESS)
        bytes = total_bytes(aimed.process);
    host_unlock();
    if (result != CUDA_SUCCESS)
        return result;
    if (info) {
        result = storage_begin(&aimed, STATE_CHECKPOINTING, info);
        if (result == CUDA_SUCCESS)
            pay(CALL_CHECKPOINT_MAP, started_ns, bytes);
        return result;
    }
    pay(CALL_CHECKPOINT, started_ns, bytes);
    host_lock();
    result = finish(&aimed, STATE_CHECKPOINTING, STATE_CHECKPOINTED);
    host_unlock();
    return result;
}

/* ---- restore ---- */

static int device_of_uuid(const CUuuid *uuid) {
    for (uint32_t d = 0; d < host->device_count; d++)
        if (!memcmp(host->devices[d].uuid_bytes, uuid->bytes, sizeof uuid->bytes))
            return (int)d;
    return -1;
}

/* From each device to its successor: a permutation, whose open ends are the devices that no pair names. */
static CUresult read_pairs(const CUcheckpointGpuPair *pairs, unsigned count, int *successors) {
    int is_taken[DEVICE_MAX] = {0};
    for (int d = 0; d < DEVICE_MAX; d++)
        successors[d] = -1;
    for (unsigned i = 0; i < count; i++) {
        int old = device_of_uuid(&pairs[i].oldUuid), new = device_of_uuid(&pairs[i].newUuid);
        if (old < 0 || new < 0 || successors[old] >= 0 || is_taken[new])
            return CUDA_ERROR_INVALID_VALUE;
        if (strcmp(host->devices[old].name, host->devices[new].name))
            return CUDA_ERROR_INVALID_VALUE; /* only within one type of chip */
        successors[old] = new;
        is_taken[new] = 1;
    }
    return CUDA_SUCCESS;
}

static void close_permutation(int *successors) {
    int is_taken[DEVICE_MAX] = {0};
    for (int d = 0; d < DEVICE_MAX; d++)
        if (successors[d] >= 0)
            is_taken[successors[d]] = 1;
    for (int d = 0; d < DEVICE_MAX; d++)
        for (int candidate = d, step = 0; successors[d] < 0; candidate = step++)
            if (!is_taken[candidate]) {
                successors[d] = candidate;
                is_taken[candidate] = 1;
            }
}

static CUresult map_devices(const process_record *process, const CUcheckpointRestoreArgs *arguments,
                            uint8_t *device_map) {
    int successors[DEVICE_MAX];
    memcpy(device_map, current_map(process), DEVICE_MAX);
    if (!arguments || !arguments->gpuPairsCount)
        return CUDA_SUCCESS;
    if (!arguments->gpuPairs)
        return CUDA_ERROR_INVALID_VALUE;
    CUresult result = read_pairs(arguments->gpuPairs, arguments->gpuPairsCount, successors);
    for (uint32_t d = 0; result == CUDA_SUCCESS && d < host->device_count; d++)
        if (process_own_bytes(process, (int)d) && successors[d] < 0)
            result = CUDA_ERROR_INVALID_VALUE; /* the pairs must name every checkpointed device */
    if (result != CUDA_SUCCESS)
        return result;
    close_permutation(successors);
    for (int ordinal = 0; ordinal < DEVICE_MAX; ordinal++)
        device_map[ordinal] = (uint8_t)successors[device_map[ordinal]];
    return CUDA_SUCCESS;
}

/* With the host lock held: may it come back? If so, its room is taken. */
static CUresult begin_restore(const target *aimed, const uint8_t *device_map, int is_custom) {
    process_record *process = aimed->process;
    if (checkpoint_state(process) != STATE_CHECKPOINTED || process->checkpointer != NOBODY)
        return CUDA_ERROR_ILLEGAL_STATE;
    if (((process->placement & PLACEMENT_STORED) != 0) != is_custom)
        return CUDA_ERROR_INVALID_VALUE; /* its content is where it was brought */
    CUresult result = is_custom ? storage_check(aimed, device_map) : CUDA_SUCCESS;
    if (result != CUDA_SUCCESS)
        return result;
    if (uses_lost_device(process, device_map))
        return CUDA_ERROR_DEVICE_UNAVAILABLE;
    if (!checkpoint_admits(process, device_map))
        return CUDA_ERROR_OUT_OF_MEMORY;
    if (!target_is_there(aimed)) /* looking for room buries the dead */
        return CUDA_ERROR_INVALID_VALUE;
    checkpoint_bring_back(process, device_map, own_process);
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuCheckpointProcessRestore(int pid, const CUcheckpointRestoreArgs *arguments) {
    CHECKPOINT_ENTER();
    CUcheckpointCustomStorageInfo **info = arguments ? arguments->customStorageInfo_out : NULL;
    target aimed;
    uint8_t device_map[DEVICE_MAX];
    uint64_t started_ns = clock_ns(), bytes = 0;
    host_lock();
    result = find(pid, &aimed);
    if (result == CUDA_SUCCESS)
        result = map_devices(aimed.process, arguments, device_map);
    if (result == CUDA_SUCCESS)
        result = begin_restore(&aimed, device_map, info != NULL);
    if (result == CUDA_SUCCESS)
        bytes = total_bytes(aimed.process);
    host_unlock();
    if (result != CUDA_SUCCESS)
        return result;
    if (info) {
        result = storage_begin(&aimed, STATE_RESTORING, info);
        if (result == CUDA_SUCCESS)
            pay(CALL_RESTORE_MAP, started_ns, bytes);
        return result;
    }
    pay(CALL_RESTORE, started_ns, bytes);
    host_lock();
    result = finish(&aimed, STATE_RESTORING, STATE_LOCKED);
    host_unlock();
    return result;
}

/* ---- the restore thread ---- */

/* A thread's number in our pid namespace: the entry whose innermost number is the one that it calls itself.
 */
static int thread_as_seen_here(int pid, int own_number) {
    char path[64], line[256];
    int found = 0;
    snprintf(path, sizeof path, "/proc/%d/task", pid);
    DIR *threads = opendir(path);
    for (struct dirent *entry; threads && !found && (entry = readdir(threads));) {
        char status[340];
        snprintf(status, sizeof status, "%s/%s/status", path, entry->d_name);
        FILE *file = fopen(status, "re");
        while (file && fgets(line, sizeof line, file))
            if (!strncmp(line, "NSpid:", 6) && atoi(strrchr(line, '\t') + 1) == own_number)
                found = atoi(entry->d_name);
        if (file)
            fclose(file);
    }
    if (threads)
        closedir(threads);
    return found;
}

CUDA_EXPORT CUresult cuCheckpointProcessGetRestoreThreadId(int pid, int *thread) {
    CHECKPOINT_ENTER();
    if (!thread)
        return CUDA_ERROR_INVALID_VALUE;
    target aimed;
    host_lock();
    result = find(pid, &aimed);
    int own_number = result == CUDA_SUCCESS ? aimed.process->restore_thread : 0;
    host_unlock();
    if (result != CUDA_SUCCESS)
        return result;
    *thread = thread_as_seen_here(pid, own_number);
    return *thread ? CUDA_SUCCESS : CUDA_ERROR_OPERATING_SYSTEM;
}

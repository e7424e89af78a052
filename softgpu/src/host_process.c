/* Who is alive, and what becomes of the memory of those who are not.
 *
 * Each process holds a POSIX record lock on one byte of the file `processes`. The kernel drops it at any
 * death, in whatever container. F_OFD_GETLK asks for the holder without the own locks being invisible, and
 * the kernel translates the holder's pid to the asker's pid namespace: NVML's pids come from there.
 *
 * The descriptor is never closed: closing any descriptor of a file drops all record locks that the process
 * has on it.
 */
#define _GNU_SOURCE
#include "host.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int liveness = -1;

int process_attach(void) {
    char path[320];
    host_path(path, sizeof path, "processes");
    if (liveness < 0)
        liveness = open(path, O_RDWR | O_CLOEXEC);
    return liveness < 0 ? -1 : 0;
}

static struct flock byte_of(int index) {
    return (struct flock){.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = index, .l_len = 1};
}

int process_pid(int index) {
    struct flock lock = byte_of(index);
    if (fcntl(liveness, F_OFD_GETLK, &lock))
        return -1;
    return lock.l_type == F_UNLCK ? -1 : lock.l_pid;
}

static void read_command(char *command, size_t size) {
    FILE *file = fopen("/proc/self/comm", "re");
    if (!file)
        return;
    if (fgets(command, (int)size, file))
        command[strcspn(command, "\n")] = 0;
    fclose(file);
}

int process_enter(void) {
    host_reap();
    for (int i = 0; i < PROCESS_MAX; i++) {
        process_record *process = &host->processes[i];
        struct flock lock = byte_of(i);
        if (process->is_used || fcntl(liveness, F_SETLK, &lock))
            continue;
        memset(process, 0, sizeof *process);
        process->pid = getpid();
        process->restore_thread = gettid();
        process->serial = ++host->last_serial;
        process->checkpointer = NOBODY;
        for (int d = 0; d < DEVICE_MAX; d++)
            process->device_maps[0][d] = process->device_maps[1][d] = (uint8_t)d;
        read_command(process->command, sizeof process->command);
        group_locate(process);
        __atomic_store_n(&process->is_used, 1,
                         __ATOMIC_RELEASE); /* last: a row counts only when it is whole */
        return i;
    }
    return -1;
}

int process_of_pid(int pid) {
    for (int i = 0; pid > 0 && i < PROCESS_MAX; i++)
        if (host->processes[i].is_used && process_pid(i) == pid)
            return i;
    return -1;
}

int process_device(const process_record *process, int ordinal) {
    uint32_t placement = __atomic_load_n(&process->placement, __ATOMIC_ACQUIRE);
    return process->device_maps[(placement & PLACEMENT_MAP) != 0][ordinal];
}

int process_ordinal(const process_record *process, int device_index) {
    for (int ordinal = 0; ordinal < DEVICE_MAX; ordinal++)
        if (process_device(process, ordinal) == device_index)
            return ordinal;
    return device_index; /* not reached: a map leaves no device out */
}

int process_is_away(const process_record *process) {
    return (__atomic_load_n(&process->placement, __ATOMIC_ACQUIRE) & PLACEMENT_AWAY) != 0;
}

uint64_t process_own_bytes(const process_record *process, int device_index) {
    int ordinal = process_ordinal(process, device_index);
    return process->context_bytes[ordinal] + process->charged_bytes[ordinal];
}

uint64_t process_bytes(const process_record *process, int device_index) {
    return process_is_away(process) ? 0 : process_own_bytes(process, device_index);
}

static void free_process(process_record *process) {
    for (uint32_t d = 0; d < host->device_count && !process_is_away(process); d++)
        host->devices[process_device(process, (int)d)].used_bytes -= process->context_bytes[d];
    __atomic_store_n(&process->is_used, 0, __ATOMIC_RELEASE);
    memset(process, 0, sizeof *process);
}

void host_reap(void) {
    uint8_t is_dead[PROCESS_MAX] = {0};
    int dead_count = 0;
    for (int i = 0; i < PROCESS_MAX; i++) {
        is_dead[i] = host->processes[i].is_used && process_pid(i) < 0;
        dead_count += is_dead[i];
    }
    if (!dead_count && !host->detached_count)
        return;
    for (uint32_t i = 0; i < host->chunk_end; i++) {
        const chunk_record *chunk = &host->chunks[i];
        if (chunk->is_used && (chunk->owner == CHUNK_UNOWNED || chunk->is_detached || is_dead[chunk->owner]))
            chunk_settle((int)i);
    }
    for (uint32_t i = 0; dead_count && i < host->chunk_end; i++) { /* what others hold outlives its creator */
        if (host->chunks[i].is_used && host->chunks[i].owner != CHUNK_UNOWNED &&
            is_dead[host->chunks[i].owner])
            chunk_disown(&host->chunks[i]);
    }
    for (int i = 0; dead_count && i < PROCESS_MAX; i++) { /* before their rows are free for others */
        int by = host->processes[i].checkpointer;
        if (host->processes[i].is_used && by != NOBODY && is_dead[by])
            checkpoint_settle(&host->processes[i]);
    }
    if (dead_count)
        shared_event_bury(is_dead);
    for (int i = 0; i < PROCESS_MAX; i++)
        if (is_dead[i])
            free_process(&host->processes[i]);
}

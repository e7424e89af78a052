/* Groups of processes with memory limits: cgroup v2 directories, or names that processes declare.
 *
 * A cgroup is known by its inode, which is the same inside and outside a cgroup namespace. A process belongs
 * to its own cgroup and to all ancestors. Where cgroup v2 is missing or not writable, a process declares its
 * group in SOFTGPU_GROUP and the limit is set on that name.
 *
 * As in the driver (R615): hard is a ceiling for the group and everything below it, and the leaf's hard limit
 * is what its processes see as the device's size. Soft alone reserves nothing.
 */
#include "host.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

uint64_t group_key_of_path(const char *path) {
    struct stat status;
    if (stat(path, &status) || !S_ISDIR(status.st_mode))
        return 0;
    return status.st_ino;
}

/* FNV-1a. The top bit keeps names apart from inodes. */
uint64_t group_key_of_name(const char *name) {
    uint64_t hash = 0xcbf29ce484222325ull;
    for (; *name; name++)
        hash = (hash ^ (unsigned char)*name) * 0x100000001b3ull;
    return hash | 1ull << 63;
}

static int cgroup_directory(char *path, size_t size) {
    char line[512];
    int found = 0;
    FILE *file = fopen("/proc/self/cgroup", "re");
    if (!file)
        return 0;
    const char *root =
        access("/sys/fs/cgroup/cgroup.procs", F_OK) ? "/sys/fs/cgroup/unified" : "/sys/fs/cgroup";
    while (!found && fgets(line, sizeof line, file)) {
        if (strncmp(line, "0::", 3))
            continue;
        line[strcspn(line, "\n")] = 0;
        snprintf(path, size, "%s%s", root, strcmp(line + 3, "/") ? line + 3 : "");
        found = 1;
    }
    fclose(file);
    return found;
}

void group_locate(process_record *process) {
    char path[600];
    int depth = 0;
    const char *declared = getenv("SOFTGPU_GROUP");
    memset(process->group_keys, 0, sizeof process->group_keys);
    if (declared && *declared) {
        snprintf(process->group_name, sizeof process->group_name, "%s", declared);
        process->group_keys[depth++] = group_key_of_name(declared);
    }
    if (!cgroup_directory(path, sizeof path))
        return;
    while (depth < GROUP_DEPTH_MAX && strncmp(path, "/sys/fs/cgroup", 14) == 0) {
        uint64_t key = group_key_of_path(path);
        if (!key)
            return;
        process->group_keys[depth++] = key;
        *strrchr(path, '/') = 0;
    }
}

void group_refresh(process_record *process) {
    if (host->cgroup_count)
        group_locate(process);
}

static int is_name(uint64_t key) { return key >> 63; }

static int is_member(const process_record *process, uint64_t key) {
    for (int i = 0; i < GROUP_DEPTH_MAX && process->group_keys[i]; i++)
        if (process->group_keys[i] == key)
            return 1;
    return 0;
}

uint64_t group_used(uint64_t key, int device_index) {
    uint64_t used_bytes = 0;
    for (int i = 0; i < PROCESS_MAX; i++) {
        const process_record *process = &host->processes[i];
        if (process->is_used && is_member(process, key))
            used_bytes += process_bytes(process, device_index);
    }
    return used_bytes;
}

group_record *group_find(uint64_t key) {
    for (uint32_t i = 0; i < host->group_end; i++)
        if (host->groups[i].key == key)
            return &host->groups[i];
    return NULL;
}

group_record *group_nearest(const process_record *process, int device_index) {
    for (int i = 0; i < GROUP_DEPTH_MAX && process->group_keys[i]; i++) {
        group_record *group = group_find(process->group_keys[i]);
        if (group && (group->soft_bytes[device_index] || group->hard_bytes[device_index] != NO_LIMIT))
            return group;
    }
    return NULL;
}

int group_admits(const process_record *process, int device_index, uint64_t bytes) {
    for (int i = 0; i < GROUP_DEPTH_MAX && process->group_keys[i]; i++) {
        const group_record *group = group_find(process->group_keys[i]);
        if (!group || group->hard_bytes[device_index] == NO_LIMIT)
            continue;
        uint64_t used_bytes = group_used(group->key, device_index),
                 hard_bytes = group->hard_bytes[device_index];
        if (used_bytes > hard_bytes || bytes > hard_bytes - used_bytes)
            return 0;
    }
    return 1;
}

static int limits_nothing(const group_record *group) {
    for (uint32_t d = 0; d < host->device_count; d++)
        if (group->soft_bytes[d] || group->hard_bytes[d] != NO_LIMIT)
            return 0;
    return 1;
}

void group_recount(void) {
    host->group_end = 0;
    host->cgroup_count = 0;
    for (uint32_t i = 0; i < GROUP_MAX; i++) {
        if (!host->groups[i].key)
            continue;
        host->group_end = i + 1;
        host->cgroup_count += !is_name(host->groups[i].key);
    }
}

static group_record *new_group(uint64_t key, const char *name) {
    for (int i = 0; i < GROUP_MAX; i++) {
        group_record *group = &host->groups[i];
        if (group->key)
            continue;
        memset(group, 0, sizeof *group);
        for (int d = 0; d < DEVICE_MAX; d++)
            group->hard_bytes[d] = NO_LIMIT;
        snprintf(group->name, sizeof group->name, "%s", name);
        __atomic_store_n(&group->key, key, __ATOMIC_RELEASE);
        return group;
    }
    return NULL;
}

/* Whoever dies between the two writes must not leave a soft limit above the hard one. */
static void write_limits(group_record *group, int device_index, uint64_t soft_bytes, uint64_t hard_bytes) {
    if (hard_bytes < group->soft_bytes[device_index]) {
        __atomic_store_n(&group->soft_bytes[device_index], soft_bytes, __ATOMIC_RELEASE);
        __atomic_store_n(&group->hard_bytes[device_index], hard_bytes, __ATOMIC_RELEASE);
    } else {
        __atomic_store_n(&group->hard_bytes[device_index], hard_bytes, __ATOMIC_RELEASE);
        __atomic_store_n(&group->soft_bytes[device_index], soft_bytes, __ATOMIC_RELEASE);
    }
}

int group_set(uint64_t key, const char *name, int device_index, uint64_t soft_bytes, uint64_t hard_bytes) {
    group_record *group = group_find(key);
    if (!group)
        group = new_group(key, name);
    if (!group)
        return -1;
    write_limits(group, device_index, soft_bytes, hard_bytes);
    if (limits_nothing(group))
        group->key = 0; /* the row is free again */
    group_recount();
    return 0;
}

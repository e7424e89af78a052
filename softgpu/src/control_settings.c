/* Making a host from its settings file: lines of a key and a value, written by the Python side
 * (softgpu/host.py).
 *
 * There are no defaults here: what a device is like is data (softgpu/profiles.toml), and a missing key is an
 * error. */
#include "control.h"
#include "host.h"

#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef enum { NUMBER32, NUMBER64, TEXT } field_kind;
typedef struct {
    const char *key;
    field_kind kind;
    size_t offset, size;
} field;

#define HOST_FIELD(key, kind) {#key, kind, offsetof(host_state, key), sizeof(((host_state *)0)->key)}
#define DEVICE_FIELD(key, kind) {#key, kind, offsetof(device, key), sizeof(((device *)0)->key)}
#define ENGINE_FIELD(key, way) {key, NUMBER64, offsetof(device, engines[way].bytes_per_s), sizeof(uint64_t)}

static const field host_fields[] = {
    HOST_FIELD(device_count, NUMBER32), HOST_FIELD(driver_version, NUMBER32), HOST_FIELD(driver_text, TEXT),
    HOST_FIELD(is_phantom, NUMBER32),   HOST_FIELD(is_clean, NUMBER32),       HOST_FIELD(is_mps, NUMBER32),
};

static const field device_fields[] = {
    DEVICE_FIELD(name, TEXT),
    DEVICE_FIELD(compute_major, NUMBER32),
    DEVICE_FIELD(compute_minor, NUMBER32),
    DEVICE_FIELD(multiprocessor_count, NUMBER32),
    DEVICE_FIELD(architecture, NUMBER32),
    DEVICE_FIELD(pci_device_id, NUMBER32),
    DEVICE_FIELD(pcie_generation, NUMBER32),
    DEVICE_FIELD(pcie_width, NUMBER32),
    DEVICE_FIELD(temperature_c, NUMBER32),
    DEVICE_FIELD(power_mw, NUMBER32),
    DEVICE_FIELD(power_limit_mw, NUMBER32),
    DEVICE_FIELD(utilization_gpu_percent, NUMBER32),
    DEVICE_FIELD(utilization_memory_percent, NUMBER32),
    DEVICE_FIELD(total_bytes, NUMBER64),
    DEVICE_FIELD(reserved_bytes, NUMBER64),
    DEVICE_FIELD(context_bytes, NUMBER64),
    DEVICE_FIELD(pageable_bytes_per_s, NUMBER64),
    ENGINE_FIELD("h2d_bytes_per_s", HOST_TO_DEVICE),
    ENGINE_FIELD("d2h_bytes_per_s", DEVICE_TO_HOST),
};

enum { HOST_FIELD_COUNT = sizeof host_fields / sizeof *host_fields };
enum { DEVICE_FIELD_COUNT = sizeof device_fields / sizeof *device_fields };

static void store(void *structure, const field *where, const char *value) {
    char *target = (char *)structure + where->offset;
    uint64_t number = strtoull(value, NULL, 0);
    uint32_t narrow = (uint32_t)number;
    if (where->kind == TEXT)
        snprintf(target, where->size, "%s", value);
    else if (where->kind == NUMBER64)
        memcpy(target, &number, sizeof number);
    else
        memcpy(target, &narrow, sizeof narrow);
}

static int set_cost(host_state *fresh, const char *value) {
    char name[64];
    unsigned long long call_ns, gib_ns;
    if (sscanf(value, "%63s %llu %llu", name, &call_ns, &gib_ns) != 3)
        return -1;
    for (int i = 0; i < CALL_COUNT; i++) {
        if (strcmp(name, call_names[i]))
            continue;
        fresh->costs[i] = (call_cost){call_ns, gib_ns};
        return 0;
    }
    return -1;
}

static int set_uuid(host_state *fresh, const char *value) {
    unsigned index;
    char hex[33];
    if (sscanf(value, "%u %32[0-9a-f]", &index, hex) != 2 || strlen(hex) != 32 || index >= DEVICE_MAX)
        return -1;
    device *gpu = &fresh->devices[index];
    for (int i = 0; i < 16; i++) {
        char pair[3] = {hex[2 * i], hex[2 * i + 1], 0};
        gpu->uuid_bytes[i] = (uint8_t)strtoul(pair, NULL, 16);
    }
    snprintf(gpu->uuid, sizeof gpu->uuid, "GPU-%.8s-%.4s-%.4s-%.4s-%.12s", hex, hex + 8, hex + 12, hex + 16,
             hex + 20);
    return 0;
}

/* "PARENT ID SLICES TOTAL_BYTES UUIDHEX NAME": one instance; these lines come last, so that it is like its GPU
 * in all else. */
static int set_mig(host_state *fresh, const char *value) {
    unsigned parent, id, slices;
    unsigned long long total_bytes;
    char hex[33], name[96];
    if (sscanf(value, "%u %u %u %llu %32[0-9a-f] %95[^\n]", &parent, &id, &slices, &total_bytes, hex, name) != 6)
        return -1;
    uint32_t index = fresh->device_count;
    if (parent >= DEVICE_MAX || index >= DEVICE_MAX || strlen(hex) != 32)
        return -1;
    char uuid[64];
    snprintf(uuid, sizeof uuid, "%u %s", index, hex);
    if (set_uuid(fresh, uuid))
        return -1;
    device *instance = &fresh->devices[index];
    memcpy(instance->uuid, "MIG", 3);
    snprintf(instance->name, sizeof instance->name, "%s", name);
    instance->total_bytes = total_bytes;
    instance->reserved_bytes = 0;
    instance->multiprocessor_count = instance->multiprocessor_count * slices / 7;
    instance->mig_parent = parent + 1;
    instance->mig_id = id;
    instance->mig_slices = slices;
    fresh->devices[parent].is_mig = 1;
    fresh->device_count++;
    return 0;
}

/* Which of the fields was seen, so that a missing one is told. */
typedef struct {
    int host_seen[HOST_FIELD_COUNT], device_seen[DEVICE_FIELD_COUNT];
} progress;

static int apply(host_state *fresh, const char *key, const char *value, progress *so_far) {
    if (!strcmp(key, "cost"))
        return set_cost(fresh, value);
    if (!strcmp(key, "uuid"))
        return set_uuid(fresh, value);
    if (!strcmp(key, "mig"))
        return set_mig(fresh, value);
    for (int i = 0; i < HOST_FIELD_COUNT; i++) {
        if (strcmp(host_fields[i].key, key))
            continue;
        store(fresh, &host_fields[i], value);
        so_far->host_seen[i] = 1;
        return 0;
    }
    for (int i = 0; i < DEVICE_FIELD_COUNT; i++) {
        if (strcmp(device_fields[i].key, key))
            continue;
        for (int d = 0; d < DEVICE_MAX; d++)
            store(&fresh->devices[d], &device_fields[i], value);
        so_far->device_seen[i] = 1;
        return 0;
    }
    return -1;
}

static int report_missing(const progress *so_far) {
    const char *missing = NULL;
    for (int i = 0; i < HOST_FIELD_COUNT; i++)
        if (!so_far->host_seen[i])
            missing = host_fields[i].key;
    for (int i = 0; i < DEVICE_FIELD_COUNT; i++)
        if (!so_far->device_seen[i])
            missing = device_fields[i].key;
    if (missing)
        fprintf(stderr, "softgpu: the settings lack %s\n", missing);
    return missing ? -1 : 0;
}

static int read_settings(host_state *fresh) {
    char path[320], line[256];
    progress so_far = {0};
    host_path(path, sizeof path, "settings");
    FILE *file = fopen(path, "re");
    if (!file) {
        perror(path);
        return -1;
    }
    int failed = 0;
    while (!failed && fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = 0;
        char *value = strchr(line, ' ');
        if (value)
            *value++ = 0;
        failed = !value || apply(fresh, line, value, &so_far);
        if (failed)
            fprintf(stderr, "softgpu: cannot use the setting \"%s %s\"\n", line, value ? value : "");
    }
    fclose(file);
    if (!failed && fresh->device_count > DEVICE_MAX) {
        fprintf(stderr, "softgpu: at most %d GPUs\n", DEVICE_MAX);
        failed = 1;
    }
    return failed ? -1 : report_missing(&so_far);
}

static int fill_state(host_state *fresh) {
    if (read_settings(fresh))
        return -1;
    for (uint32_t i = 0; i < DEVICE_MAX; i++) {
        uint32_t parent = fresh->devices[i].mig_parent;
        fresh->devices[i].pci_bus = 0x10 + (parent ? parent - 1 : i);
        fresh->gpu_count += i < fresh->device_count && !parent;
    }
    host_prepare_mutex(fresh);
    fresh->bytes = sizeof *fresh;
    fresh->magic = HOST_MAGIC;
    return 0;
}

static int touch(const char *name) {
    char path[320];
    host_path(path, sizeof path, name);
    int descriptor = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (descriptor < 0)
        return -1;
    close(descriptor);
    return 0;
}

/* The state is made under another name and renamed: whoever can open it finds it whole. */
int control_create(void) {
    char path[320], making[360];
    host_path(path, sizeof path, "state");
    snprintf(making, sizeof making, "%s.%d", path, (int)getpid());
    int descriptor = open(making, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (descriptor < 0 || posix_fallocate(descriptor, 0, sizeof(host_state))) {
        perror(making);
        return -1;
    }
    host_state *fresh = mmap(NULL, sizeof *fresh, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    close(descriptor);
    int failed = fresh == MAP_FAILED || fill_state(fresh) || touch("processes") || rename(making, path);
    if (failed) {
        perror("softgpu: cannot create the host");
        unlink(making);
    }
    return failed ? -1 : 0;
}

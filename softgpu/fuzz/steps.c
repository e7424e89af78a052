/* Death at every step. For each chosen operation a fresh process does it instruction by instruction and is killed
 * after its first step, another after its second, and so on until one comes to the end. A step is an instruction
 * after which the shared state is another than before, or one that enters the kernel (which changes files and
 * locks). After each death the rules must hold, what the dead one had must be gone, and a witness that shares
 * memory with it must find its own bytes and be able to allocate. */
#define _GNU_SOURCE
#include "storage.h"
#include "worker.h"

#include "../src/host.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum { SMALL = 3000, WITNESS_BYTES = 4 << 20, SUBJECT_BYTES = 64 << 10 };

static struct {
    CUcontext context;
    CUevent event;
    CUdeviceptr address, base, opened;
    CUmemGenericAllocationHandle value;
    int imported_descriptor; /* of the witness's chunk; inherited */
    int to_witness[2], to_subject[2];
    pid_t witness, subject; /* the subject shares nothing: it is what victims checkpoint */
    uint64_t living_bytes;
    unsigned char *storage; /* outlives the victims */
} scene;

static void need(int is_true) {
    if (!is_true)
        _exit(6);
}

/* ---- what victims do ---- */

static CUmemAllocationProp wanted(void) {
    return (CUmemAllocationProp){.type = CU_MEM_ALLOCATION_PINNED,
                                 .requestedHandleTypes = CU_MEM_HANDLE_POSIX_FD,
                                 .location = {CU_MEM_LOCATION_DEVICE, 0}};
}

static void nothing(void) {}
static void init(void) { need(cuInit(0) == CUDA_SUCCESS); }
static void retain(void) {
    need(cuDevicePrimaryCtxRetain(&scene.context, 0) == CUDA_SUCCESS);
    need(cuCtxSetCurrent(scene.context) == CUDA_SUCCESS);
}
static void begin(void) {
    init();
    retain();
}
static void drop_context(void) { need(cuDevicePrimaryCtxRelease_v2(0) == CUDA_SUCCESS); }
static void allocate(void) { need(cuMemAlloc_v2(&scene.address, 3 << 20) == CUDA_SUCCESS); }
static void begin_with_block(void) {
    begin();
    allocate();
}
static void release_block(void) { need(cuMemFree_v2(scene.address) == CUDA_SUCCESS); }
static void write_block(void) {
    static unsigned char bytes[SMALL];
    need(cuMemcpyHtoD_v2(scene.address + 100, bytes, SMALL) == CUDA_SUCCESS);
}
static void create(void) {
    CUmemAllocationProp properties = wanted();
    need(cuMemCreate(&scene.value, 2 * MIB, &properties, 0) == CUDA_SUCCESS);
}
static void begin_with_chunk(void) {
    begin();
    create();
    need(cuMemAddressReserve(&scene.base, 2 * MIB, 0, 0, 0) == CUDA_SUCCESS);
}
static void release_chunk(void) { need(cuMemRelease(scene.value) == CUDA_SUCCESS); }
static void map(void) {
    CUmemAccessDesc right = {{CU_MEM_LOCATION_DEVICE, 0}, CU_MEM_ACCESS_READWRITE};
    need(cuMemMap(scene.base, 2 * MIB, 0, scene.value, 0) == CUDA_SUCCESS);
    need(cuMemSetAccess(scene.base, 2 * MIB, &right, 1) == CUDA_SUCCESS);
}
static void begin_with_mapping(void) {
    begin_with_chunk();
    map();
    release_chunk();
}
static void unmap(void) { need(cuMemUnmap(scene.base, 2 * MIB) == CUDA_SUCCESS); }
static void export_chunk(void) {
    int descriptor;
    need(cuMemExportToShareableHandle(&descriptor, scene.value, CU_MEM_HANDLE_POSIX_FD, 0) == CUDA_SUCCESS);
    close(descriptor);
}
static void import_chunk(void) {
    void *shareable = (void *)(intptr_t)scene.imported_descriptor;
    need(cuMemImportFromShareableHandle(&scene.value, shareable, CU_MEM_HANDLE_POSIX_FD) == CUDA_SUCCESS);
}
static void begin_with_import(void) {
    begin();
    import_chunk();
}
static void open_token(void) {
    CUipcMemHandle token;
    memcpy(token.bytes, shared->tokens[0].bytes, sizeof token.bytes);
    need(cuIpcOpenMemHandle_v2(&scene.opened, token, 1) == CUDA_SUCCESS);
}
static void begin_with_token(void) {
    begin();
    open_token();
}
static void close_token(void) { need(cuIpcCloseMemHandle(scene.opened) == CUDA_SUCCESS); }
static void set_limits(uint64_t soft_bytes, uint64_t hard_bytes) {
    nvmlDevice gpu;
    nvmlSetMemoryLimits limits = {"victims", soft_bytes, hard_bytes};
    need(nvmlDeviceGetHandleByIndex_v2(0, &gpu) == NVML_SUCCESS);
    need(nvmlDeviceSetMemoryLimits_v1(gpu, &limits) == NVML_SUCCESS);
}
static void begin_nvml(void) { need(nvmlInit_v2() == NVML_SUCCESS); }
static void limit(void) { set_limits(10 * MIB, 20 * MIB); }
static void begin_with_limit(void) {
    begin_nvml();
    limit();
}
static void raise_limit(void) { set_limits(30 * MIB, 40 * MIB); }
static void lower_limit(void) { set_limits(2 * MIB, 4 * MIB); }
static void clear_limit(void) { set_limits(0, NO_LIMIT); }
static void read_memory(void) {
    nvmlDevice gpu;
    nvmlMemoryV2 now = {.version = sizeof now | 2u << 24};
    need(nvmlDeviceGetHandleByIndex_v2(0, &gpu) == NVML_SUCCESS);
    need(nvmlDeviceGetMemoryInfo_v2(gpu, &now) == NVML_SUCCESS);
}

static void make_event(void) {
    CUipcEventHandle handle;
    need(cuEventCreate(&scene.event, 4 | CU_EVENT_DISABLE_TIMING) == CUDA_SUCCESS); /* CU_EVENT_INTERPROCESS */
    need(cuIpcGetEventHandle(&handle, scene.event) == CUDA_SUCCESS);
}
static void begin_with_event(void) {
    begin();
    make_event();
}
static void end_event(void) { need(cuEventDestroy_v2(scene.event) == CUDA_SUCCESS); }
static void lock(void) { need(cuCheckpointProcessLock(scene.subject, NULL) == CUDA_SUCCESS); }
static void unlock(void) { need(cuCheckpointProcessUnlock(scene.subject, NULL) == CUDA_SUCCESS); }
static void checkpoint(void) { need(cuCheckpointProcessCheckpoint(scene.subject, NULL) == CUDA_SUCCESS); }
static void restore(void) { need(cuCheckpointProcessRestore(scene.subject, NULL) == CUDA_SUCCESS); }
static CUresult move(int is_stored) {
    CUcheckpointGpuPair pairs[GPU_MAX];
    CUcheckpointRestoreArgs arguments = {.gpuPairs = pairs, .gpuPairsCount = GPU_MAX};
    for (int d = 0; d < GPU_MAX; d++) {
        need(cuDeviceGetUuid_v2(&pairs[d].oldUuid, d) == CUDA_SUCCESS);
        need(cuDeviceGetUuid_v2(&pairs[d].newUuid, GPU_MAX - 1 - d) == CUDA_SUCCESS);
    }
    return is_stored ? restore_from(scene.subject, scene.storage, pairs, GPU_MAX)
                     : cuCheckpointProcessRestore(scene.subject, &arguments);
}
static void restore_elsewhere(void) { need(move(0) == CUDA_SUCCESS); }
static void begin_with_lock(void) {
    begin();
    need(cuDevicePrimaryCtxRetain(&scene.context, 1) == CUDA_SUCCESS);
    lock();
}
static void begin_with_checkpoint(void) {
    begin_with_lock();
    checkpoint();
}
static void checkpoint_to_storage(void) {
    need(checkpoint_to(scene.subject, scene.storage, SUBJECT_BYTES) == CUDA_SUCCESS);
}
static void begin_with_stored(void) {
    begin_with_lock();
    checkpoint_to_storage();
}
static void restore_from_storage(void) { need(move(1) == CUDA_SUCCESS); }

typedef enum { NO_CORPSE, CORPSE, CORPSE_IN_LOCK } corpse;
typedef struct {
    const char *name;
    void (*setup)(void), (*act)(void);
    corpse beside; /* somebody who has died just before: the victim tidies up after it */
} scenario;

static const scenario scenarios[] = {
    {"cuInit", nothing, init, NO_CORPSE},
    {"retain a context", init, retain, NO_CORPSE},
    {"release a context with memory", begin_with_block, drop_context, NO_CORPSE},
    {"cuMemAlloc", begin, allocate, NO_CORPSE},
    {"cuMemFree", begin_with_block, release_block, NO_CORPSE},
    {"cuMemcpyHtoD", begin_with_block, write_block, NO_CORPSE},
    {"cuMemCreate", begin, create, NO_CORPSE},
    {"cuMemRelease", begin_with_chunk, release_chunk, NO_CORPSE},
    {"cuMemMap", begin_with_chunk, map, NO_CORPSE},
    {"cuMemUnmap", begin_with_mapping, unmap, NO_CORPSE},
    {"export a chunk", begin_with_chunk, export_chunk, NO_CORPSE},
    {"import a chunk", begin, import_chunk, NO_CORPSE},
    {"release an import", begin_with_import, release_chunk, NO_CORPSE},
    {"cuIpcOpenMemHandle", begin, open_token, NO_CORPSE},
    {"cuIpcCloseMemHandle", begin_with_token, close_token, NO_CORPSE},
    {"set a limit", begin_nvml, limit, NO_CORPSE},
    {"raise a limit", begin_with_limit, raise_limit, NO_CORPSE},
    {"lower a limit", begin_with_limit, lower_limit, NO_CORPSE},
    {"clear a limit", begin_with_limit, clear_limit, NO_CORPSE},
    {"share an event", begin, make_event, NO_CORPSE},
    {"destroy a shared event", begin_with_event, end_event, NO_CORPSE},
    {"lock a process", begin, lock, NO_CORPSE},
    {"unlock a process", begin_with_lock, unlock, NO_CORPSE},
    {"checkpoint a process", begin_with_lock, checkpoint, NO_CORPSE},
    {"restore a process", begin_with_checkpoint, restore, NO_CORPSE},
    {"restore on another GPU", begin_with_checkpoint, restore_elsewhere, NO_CORPSE},
    {"checkpoint to storage", begin_with_lock, checkpoint_to_storage, NO_CORPSE},
    {"restore from storage", begin_with_stored, restore_from_storage, NO_CORPSE},
    {"tidy up after a dead process", begin_nvml, read_memory, CORPSE},
    {"recover from a death inside the lock", begin_nvml, read_memory, CORPSE_IN_LOCK},
};
enum { SCENARIO_COUNT = sizeof scenarios / sizeof *scenarios };

/* ---- the witness ---- */

static void fill_witness(unsigned char *bytes) { fill_pattern(bytes, 4711, SMALL); }

static void prove(CUdeviceptr own) {
    unsigned char expected[SMALL], found[SMALL];
    CUdeviceptr extra;
    fill_witness(expected);
    need(cuMemcpyDtoH_v2(found, own + 5000, SMALL) == CUDA_SUCCESS && !memcmp(found, expected, SMALL));
    need(cuMemAlloc_v2(&extra, 3 * MIB) == CUDA_SUCCESS);
    need(cuMemcpyHtoD_v2(extra + 77, expected, SMALL) == CUDA_SUCCESS);
    need(cuMemcpyDtoH_v2(found, extra + 77, SMALL) == CUDA_SUCCESS && !memcmp(found, expected, SMALL));
    need(cuMemFree_v2(extra) == CUDA_SUCCESS);
}

static void be_witness(int channel) {
    unsigned char bytes[SMALL];
    CUdeviceptr own;
    CUipcMemHandle token;
    int descriptor;
    char byte = 'w';
    begin();
    need(cuMemAlloc_v2(&own, WITNESS_BYTES) == CUDA_SUCCESS);
    fill_witness(bytes);
    need(cuMemcpyHtoD_v2(own + 5000, bytes, SMALL) == CUDA_SUCCESS);
    need(cuIpcGetMemHandle(&token, own) == CUDA_SUCCESS);
    memcpy(shared->tokens[0].bytes, token.bytes, sizeof token.bytes);
    create();
    need(cuMemExportToShareableHandle(&descriptor, scene.value, CU_MEM_HANDLE_POSIX_FD, 0) == CUDA_SUCCESS);
    shared->descriptor = descriptor; /* the parent opens it through /proc */
    do {
        need(write(channel, &byte, 1) == 1);
        if (read(channel, &byte, 1) != 1)
            _exit(0);
        prove(own);
    } while (1);
}

static void be_subject(int channel) {
    unsigned char expected[SMALL], found[SMALL];
    CUdeviceptr own;
    char byte = 's';
    begin();
    need(cuMemAlloc_v2(&own, SUBJECT_BYTES) == CUDA_SUCCESS);
    fill_pattern(expected, 1234, SMALL);
    need(cuMemcpyHtoD_v2(own + 999, expected, SMALL) == CUDA_SUCCESS);
    do {
        need(write(channel, &byte, 1) == 1);
        if (read(channel, &byte, 1) != 1)
            _exit(0);
        need(cuMemcpyDtoH_v2(found, own + 999, SMALL) == CUDA_SUCCESS && !memcmp(found, expected, SMALL));
    } while (1);
}

static int hear(int channel) {
    char byte;
    return read(channel, &byte, 1) == 1;
}

static int ask(int channel) {
    char byte = '?';
    return write(channel, &byte, 1) == 1 && hear(channel);
}

static pid_t start_listener(void (*be)(int channel), int *channel) {
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, channel))
        return -1;
    pid_t child = start_child();
    if (!child) {
        close(channel[0]);
        be(channel[1]);
    }
    close(channel[1]);
    return hear(channel[0]) ? child : -1;
}

static int start_listeners(void) {
    scene.witness = start_listener(be_witness, scene.to_witness);
    scene.subject = start_listener(be_subject, scene.to_subject);
    scene.storage = mmap(NULL, SUBJECT_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (scene.witness < 0 || scene.subject < 0 || scene.storage == MAP_FAILED)
        return -1;
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", scene.witness, shared->descriptor);
    scene.imported_descriptor = open(path, O_RDWR);
    scene.living_bytes = used_bytes_of_host();
    return scene.imported_descriptor < 0 ? -1 : 0;
}

/* ---- stepping ---- */

static int wait_for(pid_t process) {
    int status = 0;
    while (waitpid(process, &status, __WALL) < 0 && errno == EINTR) {
    }
    return status;
}

enum { CAME_TO_THE_END = 7 };

static place_list *places;

/* Returns how the victim ended. */
static int sacrifice(const scenario *chosen, trace_plan plan) {
    pid_t victim = start_child();
    if (victim)
        return wait_for(victim);
    chosen->setup();
    trace_start(plan);
    chosen->act();
    trace_end();
    _exit(CAME_TO_THE_END);
}

static int list_places(const scenario *chosen, int is_every_instruction) {
    memset(places, 0, sizeof *places);
    pid_t victim = start_child();
    if (victim)
        return wait_for(victim);
    chosen->setup();
    trace_list(places, is_every_instruction);
    chosen->act();
    trace_end();
    _exit(CAME_TO_THE_END);
}

static int sacrifice_at(const scenario *chosen, place where) {
    pid_t victim = start_child();
    if (victim)
        return wait_for(victim);
    chosen->setup();
    if (trace_await(where, SIGKILL))
        _exit(CAME_TO_THE_END);
    chosen->act();
    _exit(CAME_TO_THE_END);
}

static void leave_corpse(corpse kind) {
    static const scenario dying = {"", begin_with_mapping, allocate, NO_CORPSE};
    if (kind == CORPSE)
        sacrifice(&dying, (trace_plan){.steps = 0});
    if (kind == CORPSE_IN_LOCK) /* its mapping is chunk last + 1, and in the middle of making last + 2 it dies */
        sacrifice(&dying, (trace_plan){.steps = 3, .from_chunk_id = host->last_chunk_id + 1});
}

/* Whatever the victim left half done with the subject, somebody else can bring to an end. */
static void rescue(void) {
    int state = STATE_RUNNING;
    begin();
    need(cuDevicePrimaryCtxRetain(&scene.context, 1) == CUDA_SUCCESS);
    need(cuCheckpointProcessGetState(scene.subject, &state) == CUDA_SUCCESS);
    if (state == STATE_CHECKPOINTED) {
        CUresult result = cuCheckpointProcessRestore(scene.subject, NULL);
        if (result == CUDA_ERROR_INVALID_VALUE) /* its content went to storage */
            result = restore_from(scene.subject, scene.storage, NULL, 0);
        need(result == CUDA_SUCCESS);
        state = STATE_LOCKED;
    }
    if (state == STATE_LOCKED)
        unlock();
    else
        need(state == STATE_RUNNING);
    _exit(0);
}

static int rescue_subject(void) {
    pid_t rescuer = start_child();
    if (!rescuer)
        rescue();
    int status = wait_for(rescuer);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0 && ask(scene.to_subject[0]);
}

static void forget_limits(void) {
    host_lock();
    for (uint32_t d = 0; d < host->device_count; d++)
        if (group_find(group_key_of_name("victims")))
            group_set(group_key_of_name("victims"), "victims", (int)d, 0, NO_LIMIT);
    host_unlock();
}

static int findings_after(const scenario *chosen, int step) {
    char when[128];
    snprintf(when, sizeof when, "%s, killed after step %d", chosen->name, step);
    int findings = check_host(1, when);
    forget_limits();
    if (!findings && !rescue_subject()) {
        printf("FOUND %s: the subject cannot be brought back whole\n", when);
        findings++;
    }
    host_lock();
    host_reap();
    host_unlock();
    if (!findings && used_bytes_of_host() != scene.living_bytes) {
        printf("FOUND %s: %llu bytes in use, and the living have %llu\n", when,
               (unsigned long long)used_bytes_of_host(), (unsigned long long)scene.living_bytes);
        findings++;
    }
    if (!findings && !ask(scene.to_witness[0])) {
        printf("FOUND %s: the witness cannot go on\n", when);
        findings++;
    }
    return findings ? findings : check_host(1, when);
}

typedef struct {
    int kills, misses, findings;
    uint64_t instructions;
} outcome;

static int tell(const scenario *chosen, const char *what) {
    printf("FOUND %s: %s\n", chosen->name, what);
    return 1;
}

static outcome kill_everywhere(const scenario *chosen, int is_every_instruction, int stride) {
    outcome result = {0};
    leave_corpse(chosen->beside);
    int listed = list_places(chosen, is_every_instruction);
    result.instructions = shared->instructions;
    result.findings = findings_after(chosen, 0);
    if (!WIFEXITED(listed) || WEXITSTATUS(listed) != CAME_TO_THE_END)
        result.findings += tell(chosen, "the operation itself failed");
    for (int step = 0; step < places->count && !result.findings; step += stride) {
        leave_corpse(chosen->beside);
        int status = sacrifice_at(chosen, places->places[step]);
        if (WIFEXITED(status)) /* it went another way this time (a lock was taken, say): count its steps */
            status = sacrifice(chosen, (trace_plan){step + 1, is_every_instruction, 0});
        result.findings = findings_after(chosen, step + 1);
        result.kills += WIFSIGNALED(status);
        result.misses += WIFEXITED(status) && WEXITSTATUS(status) == CAME_TO_THE_END;
        int is_killed = WIFSIGNALED(status) && (WTERMSIG(status) == SIGKILL || WTERMSIG(status) == SIGTRAP);
        if (!is_killed && (!WIFEXITED(status) || WEXITSTATUS(status) != CAME_TO_THE_END))
            result.findings += tell(chosen, "it ended otherwise than by its kill");
    }
    return result;
}

static void bury_listeners(void) {
    kill(scene.witness, SIGKILL);
    kill(scene.subject, SIGKILL);
    wait_for(scene.witness);
    wait_for(scene.subject);
    close(scene.imported_descriptor);
}

int steps_run(const char *only, int is_every_instruction, int stride) {
    int findings = 0, kills = 0, misses = 0, count = 0;
    uint64_t started_ns = clock_ns();
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (!trace_is_possible()) {
        fprintf(stderr, "softgpu-fuzz: this processor lets no process count its own instructions\n");
        return 2;
    }
    places = mmap(NULL, sizeof *places, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED || places == MAP_FAILED || stride < 1 || start_listeners()) {
        fprintf(stderr, "softgpu-fuzz: the witness does not start\n");
        return 2;
    }
    for (int i = 0; i < SCENARIO_COUNT && !findings; i++) {
        int is_chosen = !strcmp(only, "all") || !strcmp(only, scenarios[i].name) ||
                        (!strcmp(only, "quick") && scenarios[i].beside != CORPSE_IN_LOCK);
        if (!is_chosen)
            continue;
        outcome result = kill_everywhere(&scenarios[i], is_every_instruction, stride);
        printf("STEPS %s: killed at %d places in %llu instructions, %d not reached\n", scenarios[i].name,
               result.kills, (unsigned long long)result.instructions, result.misses);
        fflush(stdout);
        findings += result.findings;
        kills += result.kills;
        misses += result.misses;
        count++;
    }
    bury_listeners();
    findings += check_host(1, "at the end") + (used_bytes_of_host() != 0);
    printf("RESULT {\"operations\": %d, \"kills\": %d, \"not_reached\": %d, \"duration_s\": %.3f, "
           "\"findings\": %d}\n",
           count, kills, misses, (double)(clock_ns() - started_ns) / 1e9, findings);
    return findings || !count ? 1 : 0;
}

/* Death of the target at every step of a checkpoint to storage or back, and somebody else in its place: whoever takes
 * the step stops at one place after another; there the target is killed, and a new process gets its row and the row of
 * its memory. When the step goes on, the new process's memory must not be read or written. */
#define _GNU_SOURCE
#include "storage.h"
#include "worker.h"

#include "../src/host.h"

#include <linux/futex.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BYTES = 64 << 10, SAMPLE = 3000, OFFSET = 999 };
enum { TARGET_TAG = 1234, HEIR_TAG = 4321 };
#define LIMIT_NS 20000000000ull

static struct {
    pid_t target;
    int is_restore;
    int channel[2]; /* to the process that was started last, and its own end */
    unsigned char *storage;
    place_list *places;
} race;

static void need(int is_true) {
    if (!is_true)
        _exit(6);
}

static void take_memory(CUdeviceptr *address, uint64_t tag) {
    unsigned char bytes[SAMPLE];
    CUcontext context;
    need(cuInit(0) == CUDA_SUCCESS && cuDevicePrimaryCtxRetain(&context, 0) == CUDA_SUCCESS);
    need(cuCtxSetCurrent(context) == CUDA_SUCCESS && cuMemAlloc_v2(address, BYTES) == CUDA_SUCCESS);
    fill_pattern(bytes, tag, SAMPLE);
    need(cuMemcpyHtoD_v2(*address + OFFSET, bytes, SAMPLE) == CUDA_SUCCESS);
}

/* Target or heir: has memory, says so, and looks at it again when asked. */
static void be_owner(uint64_t tag) {
    unsigned char found[SAMPLE], expected[SAMPLE];
    CUdeviceptr own;
    char byte = 'o';
    take_memory(&own, tag);
    need(write(race.channel[1], &byte, 1) == 1);
    need(read(race.channel[1], &byte, 1) == 1);
    fill_pattern(expected, tag, SAMPLE);
    need(cuMemcpyDtoH_v2(found, own + OFFSET, SAMPLE) == CUDA_SUCCESS && !memcmp(found, expected, SAMPLE));
    _exit(0);
}

static pid_t start_owner(uint64_t tag) {
    char byte;
    close(race.channel[0]);
    close(race.channel[1]);
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, race.channel))
        return -1;
    pid_t child = start_child();
    if (!child)
        be_owner(tag);
    return read(race.channel[0], &byte, 1) == 1 ? child : -1;
}

/* How it ended (or stopped); -1 when it did neither in time. */
static int wait_for(pid_t process, int flags) {
    int status;
    for (uint64_t end_ns = clock_ns() + LIMIT_NS; clock_ns() < end_ns; usleep(200))
        if (waitpid(process, &status, flags | WNOHANG | __WALL) == process)
            return status;
    return -1;
}

static void end_one(pid_t process) {
    kill(process, SIGKILL);
    waitpid(process, NULL, __WALL);
}

static int ask_owner(pid_t owner) {
    char byte = '?';
    return write(race.channel[0], &byte, 1) == 1 && wait_for(owner, 0) == 0;
}

static void prepare_step(void) {
    CUcontext context;
    need(cuInit(0) == CUDA_SUCCESS);
    for (int d = GPU_MAX - 1; d >= 0; d--)
        need(cuDevicePrimaryCtxRetain(&context, d) == CUDA_SUCCESS && cuCtxSetCurrent(context) == CUDA_SUCCESS);
    need(cuCheckpointProcessLock(race.target, NULL) == CUDA_SUCCESS);
    if (race.is_restore)
        need(checkpoint_to(race.target, race.storage, BYTES) == CUDA_SUCCESS);
}

static CUresult take_step(void) {
    return race.is_restore ? restore_from(race.target, race.storage, NULL, 0)
                           : checkpoint_to(race.target, race.storage, BYTES);
}

static int list_places(void) {
    race.target = start_owner(TARGET_TAG);
    pid_t stepping = start_child();
    if (!stepping) {
        prepare_step();
        trace_list(race.places, 0);
        CUresult result = take_step();
        trace_end();
        _exit(result == CUDA_SUCCESS ? 0 : 8);
    }
    int status = wait_for(stepping, 0);
    end_one(race.target);
    return status == 0 ? 0 : -1;
}

static int holds_lock(pid_t process) {
    return (__atomic_load_n(&host->mutex.__data.__lock, __ATOMIC_ACQUIRE) & FUTEX_TID_MASK) == process;
}

static int is_pattern_in_storage(uint64_t tag) {
    unsigned char expected[SAMPLE];
    fill_pattern(expected, tag, SAMPLE);
    return memmem(race.storage, BYTES, expected, SAMPLE) != NULL;
}

static int tell(int step, const char *what) {
    printf("FOUND %s storage, the target dies after step %d: %s\n", race.is_restore ? "from" : "to", step, what);
    return 1;
}

/* 1 when there was a race; 0 when its place was not reached, or inside the lock; below zero: a finding. */
static int race_at(int step) {
    memset(race.storage, 0, BYTES);
    race.target = start_owner(TARGET_TAG);
    pid_t stepping = start_child();
    if (!stepping) {
        prepare_step();
        need(trace_await(race.places->places[step], SIGSTOP) == 0);
        take_step(); /* whatever it says */
        _exit(0);
    }
    int status = wait_for(stepping, WUNTRACED), is_race = 0, is_found = 0;
    end_one(race.target);
    if (status >= 0 && WIFSTOPPED(status) && !holds_lock(stepping)) {
        pid_t heir = start_owner(HEIR_TAG);
        is_race = heir > 0;
        kill(stepping, SIGCONT);
        if (wait_for(stepping, 0) != 0)
            is_found = tell(step, "whoever took the step does not end in order");
        if (heir < 0 || !ask_owner(heir))
            is_found = tell(step, "another process's memory was written to");
        if (is_pattern_in_storage(HEIR_TAG))
            is_found = tell(step, "another process's memory was read");
        end_one(heir);
    }
    end_one(stepping);
    is_found |= check_host(1, "after a target's death") != 0;
    return is_found ? -1 : is_race;
}

int races_run(void) {
    int races = 0, findings = 0, places = 0;
    uint64_t started_ns = clock_ns();
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    race.places = mmap(NULL, sizeof *race.places, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    race.storage = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    race.channel[0] = race.channel[1] = -1;
    if (!trace_is_possible() || shared == MAP_FAILED || race.places == MAP_FAILED || race.storage == MAP_FAILED)
        return 2;
    for (race.is_restore = 0; race.is_restore < 2 && !findings; race.is_restore++) {
        memset(race.places, 0, sizeof *race.places);
        if (list_places())
            findings += tell(0, "the step itself failed");
        places += race.places->count;
        for (int step = 0; step < race.places->count && !findings; step++) {
            int is_race = race_at(step);
            findings += is_race < 0;
            races += is_race > 0;
        }
    }
    printf("RESULT {\"operations\": %d, \"races\": %d, \"duration_s\": %.3f, \"findings\": %d}\n", places, races,
           (double)(clock_ns() - started_ns) / 1e9, findings);
    return findings ? 1 : 0;
}

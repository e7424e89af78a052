/* One worker: starts the driver, does random operations until it is told to stop or is killed. */
#define _GNU_SOURCE
#include "worker.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

worker self;

static const operation_kind *const families[] = {memory_operations, physical_operations, queue_operations,
                                                 watch_operations, checkpoint_operations};
enum { FAMILY_COUNT = sizeof families / sizeof *families, BATCH = 64 };

static const operation_kind *kinds[OPERATION_MAX];
static int kind_count, total_weight;

static void list_kinds(void) {
    if (kind_count)
        return;
    for (int f = 0; f < FAMILY_COUNT; f++)
        for (const operation_kind *kind = families[f]; kind->name && kind_count < OPERATION_MAX; kind++) {
            kinds[kind_count++] = kind;
            total_weight += kind->weight;
        }
}

const char *operation_name(int kind) {
    list_kinds();
    return kind < kind_count ? kinds[kind]->name : NULL;
}

uint64_t chance(uint64_t limit) { return below(&self.random, limit); }

void now_doing(const char *what) { __atomic_store_n(&shared->doing[self.number], what, __ATOMIC_RELAXED); }

void fail(const char *form, ...) {
    char text[300];
    va_list values;
    va_start(values, form);
    vsnprintf(text, sizeof text, form, values);
    va_end(values);
    if (!__atomic_exchange_n(&shared->has_failed, 1, __ATOMIC_ACQ_REL))
        snprintf(shared->failure, sizeof shared->failure, "worker %d, life %llu, operation %llu, %s: %s",
                 self.number, (unsigned long long)self.incarnation, (unsigned long long)self.operation,
                 shared->doing[self.number], text);
    _exit(3);
}

/* Injected, or the device is lost for a while. */
static int is_excused(CUresult result) {
    return result == INJECTED_CODE || result == CUDA_ERROR_UNKNOWN || result == CUDA_ERROR_DEVICE_UNAVAILABLE;
}

int did(CUresult result) {
    self.answers++;
    if (result != CUDA_SUCCESS && !is_excused(result))
        fail("answered %d", result);
    return result == CUDA_SUCCESS;
}

int got_memory(CUresult result) {
    self.answers += result == CUDA_ERROR_OUT_OF_MEMORY;
    return result == CUDA_ERROR_OUT_OF_MEMORY ? 0 : did(result);
}

int refused(CUresult result, CUresult expected) {
    self.answers++;
    if (result != expected && !is_excused(result))
        fail("answered %d instead of %d", result, expected);
    return result == expected;
}

int answered(nvmlReturn result) {
    self.answers++;
    if (result != NVML_SUCCESS && result != INJECTED_CODE && result != NVML_ERROR_GPU_IS_LOST)
        fail("NVML answered %d", result);
    return result == NVML_SUCCESS;
}

static void start(int number, uint64_t incarnation) {
    char group[32];
    snprintf(group, sizeof group, "group-%d", number % 3);
    setenv("SOFTGPU_GROUP", group, 1);
    memset(&self, 0, sizeof self);
    self.number = number;
    self.process = getpid();
    self.incarnation = incarnation;
    self.random = generator_of(shared->seed, (uint64_t)number, incarnation);
    now_doing("start");
    self.scratch = malloc(BUFFER_BYTES);
    self.registered = aligned_alloc(4096, BUFFER_BYTES);
    while (!did(cuInit(0))) {
    }
    if (nvmlInit_v2() != NVML_SUCCESS)
        fail("NVML does not start");
    for (int i = 0; i < GPU_MAX; i++)
        while (!answered(nvmlDeviceGetHandleByIndex_v2((unsigned)i, &self.gpus[i]))) {
        }
}

static void wait_while_paused(void) {
    if (!__atomic_load_n(&shared->is_paused, __ATOMIC_ACQUIRE))
        return;
    settle_streams();
    __atomic_store_n(&shared->is_waiting[self.number], 1, __ATOMIC_RELEASE);
    while (__atomic_load_n(&shared->is_paused, __ATOMIC_ACQUIRE))
        usleep(300);
    __atomic_store_n(&shared->is_waiting[self.number], 0, __ATOMIC_RELEASE);
}

static int choose(void) {
    int left = (int)chance((uint64_t)total_weight), kind = 0;
    while (left >= kinds[kind]->weight)
        left -= kinds[kind++]->weight;
    return kind;
}

/* What finds nothing to do it with (a free without a block) asks the driver nothing, and another is chosen. */
static void do_one(void) {
    uint64_t answers = self.answers;
    int kind, is_done;
    self.operation++;
    do {
        kind = choose();
        now_doing(kinds[kind]->name);
        is_done = kinds[kind]->run();
    } while (!is_done && self.answers == answers);
    __atomic_fetch_add(is_done ? &shared->counts[kind] : &shared->refusals[kind], 1, __ATOMIC_RELAXED);
}

static void maybe_end(void) {
    if (chance(4000) == 0)
        exit(end_orderly() ? 0 : 5);
}

/* Sometimes it dies at an instruction of its operation, which no killer from outside can choose so well. */
static void do_one_perhaps_dying(void) {
    if (!trace_is_possible() || chance(2500)) {
        do_one();
        return;
    }
    __atomic_store_n(&shared->is_stepping[self.number], 1, __ATOMIC_RELEASE);
    trace_start((trace_plan){.steps = 1 + (int)chance(4000), .is_every_instruction = 1});
    do_one();
    trace_end();
    __atomic_store_n(&shared->is_stepping[self.number], 0, __ATOMIC_RELEASE);
}

void worker_run(int number, uint64_t incarnation) {
    list_kinds();
    start(number, incarnation);
    for (;;) {
        for (int i = 0; i < BATCH; i++) {
            wait_while_paused();
            maybe_end();
            do_one_perhaps_dying();
            __atomic_fetch_add(&shared->operations[number], 1, __ATOMIC_RELAXED);
        }
        __atomic_fetch_add(&shared->operation_count, BATCH, __ATOMIC_RELAXED);
        if (__atomic_load_n(&shared->is_finishing, __ATOMIC_ACQUIRE))
            exit(end_orderly() ? 0 : 5);
    }
}
